"""Any segmentation net, trained and used with missing modalities."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.errors import PrismError, raise_faults
from prism_meta.modalities import BRATS
from prism_meta.networks.multi_encoder import MultiEncoderNet, declaration_fault
from prism_meta.networks.outputs import check_shape, logit_maps, resampled
from prism_meta.networks.prediction import DecoderOutput, Prediction, SegmentationModel, ShownPairs


class WrappedNet(nn.Module):
    """A net that maps images to logits, with PrismNet's signature; see ``wrap``, which makes it.

    Args:
        net: the net; ``state_dict`` is its own.
        modalities: names of the M modalities.
        features: layer whose output makes the prototypes (E9). Defaults to the logits.
    """

    def __init__(
        self, net: nn.Module, modalities: Sequence[str], features: str | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.modalities = tuple(modalities)
        self.features = features
        #: Number of spatial dimensions of the image, from the net's first convolution; None if unknown.
        self.spatial_dims = _spatial_dims(net)
        # The wrapper's state is the net's own, also if the wrapper is part of another module.
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]

    def forward(self, image: Tensor, mask: Tensor, *, unimodal: bool = True) -> Prediction:
        """Predict a batch.

        Args:
            image: (B, M, *S). What ``mask`` hides is not used.
            mask: bool (B, M), the modalities that are shown; each row has at least one True.
            unimodal: also predict each shown modality by itself (E6, E8, E9). Defaults to True.

        Raises:
            ValueError: a sample is shown no modality, or a shape does not fit.
        """
        pairs = self._pairs(image, mask)
        if not unimodal:
            pairs = pairs.empty()
        rows = _Rows.of(pairs)
        encoded = self._encode(image, mask)
        with self._features() as seen:
            logits, *prm = self._decode(encoded, rows.sample, rows.mask, size=image.shape[2:])
        features = logits if self.features is None else resampled(self.features, seen, logits)
        branch = DecoderOutput(logits, features, tuple(prm))
        single = branch.select(rows.pair_row)
        packed = single.logits
        if unimodal and isinstance(self.net, MultiEncoderNet):
            packed = self.net.decode_unimodal(encoded, pairs.sample, pairs.modality)
            check_shape("decode_unimodal", packed, single.logits)
        return Prediction(branch.select(slice(len(mask))), single, packed, pairs)

    def segment(self, image: Tensor, mask: Tensor) -> Tensor:
        """The fused logits (B, K, *S) only, from ``image`` (B, M, *S) and ``mask``, bool (B, M)."""
        self._pairs(image, mask)
        return self._fused(self._encode(image, mask), mask, size=image.shape[2:])

    def segment_subsets(self, image: Tensor, subsets: Tensor) -> Tensor:
        """The fused logits for several subsets of one batch, for inference.

        A net with several encoders runs ``encode`` once; any other net runs once per subset.

        Args:
            image: (B, M, *S); a modality that is in no subset is not used.
            subsets: bool (S, M); each row has at least one True.

        Returns:
            (S, B, K, *S). Row s equals ``segment`` with subset s for the whole batch.

        Raises:
            ValueError: a subset is empty, or a shape does not fit.

        Example:
            >>> model = wrap(nn.Conv2d(2, 3, 1), modalities=("t1", "t2"))
            >>> subsets = torch.tensor([[True, False], [True, True]])
            >>> model.segment_subsets(torch.randn(5, 2, 8, 8), subsets).shape
            torch.Size([2, 5, 3, 8, 8])
        """
        union, *masks = (shown.expand(len(image), -1) for shown in (subsets.any(0), *subsets))
        for mask in (union, *masks):
            self._pairs(image, mask)
        encoded = self._encode(image, union)
        return torch.stack([self._fused(encoded, mask, size=image.shape[2:]) for mask in masks])

    def _pairs(self, image: Tensor, mask: Tensor) -> ShownPairs:
        if image.shape[1] != len(self.modalities):
            raise ValueError(
                f"image: got {image.shape[1]} channels, expected {len(self.modalities)} "
                f"({', '.join(self.modalities)})"
            )
        if mask.shape != image.shape[:2]:
            raise ValueError(
                f"mask: got {tuple(mask.shape)}, expected (B, M) = {tuple(image.shape[:2])}"
            )
        return ShownPairs.from_mask(mask)

    def _encode(self, image: Tensor, mask: Tensor) -> Any:
        """The input of ``_decode``; without several encoders it is the masked image itself."""
        image = hidden(image, mask)
        return self.net.encode(image, mask) if isinstance(self.net, MultiEncoderNet) else image

    def _fused(self, encoded: Any, mask: Tensor, *, size: torch.Size) -> Tensor:
        """The logits of each sample shown its row of ``mask``."""
        every = torch.arange(len(mask), device=mask.device)
        return self._decode(encoded, every, mask, size=size)[0]

    def _decode(
        self, encoded: Any, sample: Tensor, mask: Tensor, *, size: torch.Size
    ) -> tuple[Tensor, ...]:
        """Logits of ``sample[n]`` shown ``mask[n]``, then the coarser maps if there are any."""
        if isinstance(self.net, MultiEncoderNet):
            output = self.net.decode_fused(encoded, sample, mask)
        else:
            output = self.net(hidden(encoded[sample], mask))
        return logit_maps(output, len(sample), size)

    @contextmanager
    def _features(self) -> Iterator[list[Any]]:
        """Collect the outputs of the layer ``features`` within the context."""
        seen: list[Any] = []
        if self.features is None:
            yield seen
            return

        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            # A copy, because the next layer may be an activation that works in place.
            seen.append(output.clone() if isinstance(output, Tensor) else output)

        handle = self.net.get_submodule(self.features).register_forward_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()


@dataclass(frozen=True)
class _Rows:
    """The rows that the net runs on: the samples, then the shown pairs that are not samples already.

    Args:
        sample: (N,) long, the sample of each row.
        mask: bool (N, M), the modalities that a row shows.
        pair_row: (P,) long, the row of each pair. A sample that is shown one modality is its only pair.
    """

    sample: Tensor
    mask: Tensor
    pair_row: Tensor

    @classmethod
    def of(cls, pairs: ShownPairs) -> _Rows:
        batch, modalities = pairs.mask.shape
        every = torch.arange(batch, device=pairs.mask.device)
        several = (pairs.mask.sum(1) > 1)[pairs.sample]
        extra = several.nonzero()[:, 0]
        appended = batch + several.cumsum(0) - 1
        single = F.one_hot(pairs.modality[extra], modalities).bool()
        return cls(
            torch.cat((every, pairs.sample[extra])),
            torch.cat((pairs.mask, single)),
            torch.where(several, appended, pairs.sample),
        )


def wrap(
    net: nn.Module, modalities: Sequence[str] = BRATS, *, features: str | None = None
) -> WrappedNet:
    """Let ``MetaLearner`` and ``PrismObjective`` train ``net`` with missing modalities.

    The net receives zeros for modalities that are not shown, whatever the image holds there (NaN
    included). Its unimodal outputs are the net on one modality at a time. Distillation (E8) works on its
    logits, prototypes (E9) on its logits or on a layer's features. If the net returns several maps (deep
    supervision), the coarser ones are trained as prm maps (coarse-scale outputs, E7).

    The net runs once on all distinct inputs: the samples and their single modalities. BatchNorm in
    training mode therefore takes its statistics over both together, and ``wrap`` warns of it. InstanceNorm
    and GroupNorm are unaffected.

    Args:
        net: maps an image (N, M, *S) to logits (N, K, *S), or to a tuple, list or stack (N, H, K, *S) of
            logits with the output first. A net with several encoders implements ``MultiEncoderNet``
            instead.
        modalities: names of the M channels, in order.
        features: name of the layer, as in ``net.named_modules()``, from whose output (N, C, *s) the
            prototypes are computed, after linear resampling to the grid of the logits. Defaults to the
            logits.

    Returns:
        A module with PrismNet's signature, ``model(image, mask) -> Prediction``. Its ``state_dict`` is
        that of ``net``.

    Raises:
        PrismError: all faults together: no modality or a name twice, no such layer, an incomplete
            ``MultiEncoderNet``, or a net that is wrapped already. Later: outputs of a wrong shape
            (ValueError).

    Example:
        >>> model = wrap(nn.Conv2d(2, 3, 1), modalities=("t1", "t2"))
        >>> model(torch.randn(1, 2, 8, 8), torch.tensor([[True, False]])).fused.shape
        torch.Size([1, 3, 8, 8])
        >>> sorted(model.state_dict()), model.spatial_dims
        (['bias', 'weight'], 2)
        >>> net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
        >>> model = wrap(net, modalities=("t1", "t2"), features="1")
        >>> model(torch.randn(1, 2, 8, 8), torch.tensor([[True, True]])).features.shape
        torch.Size([1, 8, 8, 8])
    """
    if not isinstance(net, nn.Module):
        raise PrismError(f"net: got {type(net).__name__}, expected a torch.nn.Module")
    faults = [
        _names_fault(modalities),
        _wrapped_fault(net),
        _layer_fault(net, features),
        declaration_fault(net),
    ]
    raise_faults(PrismError, [fault for fault in faults if fault is not None])
    batch_norms = [
        name or "net"
        for name, module in net.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    if batch_norms:
        listed = ", ".join(batch_norms[:3]) + (", ..." if len(batch_norms) > 3 else "")
        warnings.warn(
            f"net: BatchNorm in {listed} takes its statistics over samples and their single modalities "
            "together, and MetaLearner keeps those of the meta batch (buffers='outer'); InstanceNorm or "
            'GroupNorm depend on no other sample (in MONAI\'s nets norm="instance")',
            stacklevel=2,
        )
    return WrappedNet(net, modalities, features)


def _wrapped_fault(net: nn.Module) -> str | None:
    if not isinstance(net, SegmentationModel):
        return None
    return (
        f"net: {type(net).__name__} takes subsets of modalities as it is; use it without wrap, or pass "
        "the net inside it"
    )


def _names_fault(modalities: Sequence[str]) -> str | None:
    if isinstance(modalities, str):
        return f"modalities: got the string {modalities!r}, expected a sequence of names"
    if modalities and len(set(modalities)) == len(modalities):
        return None
    return f"modalities: got {tuple(modalities)}, expected different names, at least one"


def _layer_fault(net: nn.Module, features: str | None) -> str | None:
    known = [name for name, _ in net.named_modules(remove_duplicate=False) if name]
    if features is None or features in known:
        return None
    near = difflib.get_close_matches(features, known, n=3, cutoff=0.4) or known[:3]
    return (
        f"features: got {features!r}, which is no layer of {type(net).__name__}; expected a name of "
        f"net.named_modules(), e.g. {', '.join(near) or 'none: it has no layers'}"
    )


def _spatial_dims(net: nn.Module) -> int | None:
    """Of the net's first convolution."""
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    found = (dims[kind] for m in net.modules() for kind in dims if isinstance(m, kind))
    return next(found, None)


def hidden(image: Tensor, mask: Tensor) -> Tensor:
    """The image with zeros in hidden channels; by ``where``, because NaN * 0 is NaN."""
    shown = mask.view(*mask.shape, *[1] * (image.ndim - 2))
    return torch.where(shown, image, image.new_zeros(()))


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    inner = f"{prefix}net."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name[len(inner) :]] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}net.{name[len(prefix) :]}"] = state.pop(name)
