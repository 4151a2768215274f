"""Any segmentation net, trained and used with missing modalities."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.modalities import BRATS
from prism_meta.networks.prism import Branch, Pairs, Prediction

#: Linear interpolation, by the number of spatial dimensions.
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@runtime_checkable
class MultiEncoderNet(Protocol):
    """What a net with an encoder per modality declares, so that each is run once per batch.

    ``wrap`` calls ``encode`` once, then both decoders on what it gave. Rows are what PrismNet's fused
    branch is run on too: the batch, and behind it each modality that a sample is shown beside others,
    alone; in ``segment_subsets`` the batch, once per subset. So a row may be shown less than was
    encoded, and what it is not shown must not reach its logits.

    Example:
        >>> class Two(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoders = nn.ModuleList(nn.Conv2d(1, 4, 3, padding=1) for _ in range(2))
        ...         self.fused, self.alone = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        ...
        ...     def encode(self, image, mask):
        ...         scans = image.split(1, dim=1)
        ...         return torch.stack([e(x) for e, x in zip(self.encoders, scans)], 1)  # (B, M, C, *S)
        ...
        ...     def decode_fused(self, encoded, sample, mask):
        ...         shown = mask[:, :, None, None, None]
        ...         return self.fused((shown * encoded[sample]).sum(1) / shown.sum(1))
        ...
        ...     def decode_unimodal(self, encoded, sample, modality):
        ...         return self.alone(encoded[sample, modality])
        >>> model = wrap(Two(), modalities=("t1", "t2"))
        >>> model(torch.randn(1, 2, 8, 8), torch.ones(1, 2).bool()).unimodal.shape
        torch.Size([1, 2, 3, 8, 8])
    """

    def encode(self, image: Tensor, mask: Tensor) -> Any:
        """Anything that the decoders need, from image (B, M, *S), 0 where mask (B, M) hides it."""

    def decode_fused(self, encoded: Any, sample: Tensor, mask: Tensor) -> Any:
        """Logits (N, K, *S) of N rows: row n is sample ``sample[n]`` shown ``mask[n]``, bool (N, M)."""

    def decode_unimodal(self, encoded: Any, sample: Tensor, modality: Tensor) -> Tensor:
        """Logits (P, K, *S) of E6: row p is modality ``modality[p]`` of sample ``sample[p]``."""


class WrappedNet(nn.Module):
    """A net of image -> logits behind PrismNet's signature; see ``wrap``."""

    def __init__(
        self, net: nn.Module, modalities: Sequence[str], features: str | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.modalities = tuple(modalities)
        self.features = features
        # The wrapper's state is the net's own, also where the wrapper is part of another module.
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]

    def forward(self, image: Tensor, mask: Tensor, *, unimodal: bool = True) -> Prediction:
        pairs = self._pairs(image, mask)
        if not unimodal:
            pairs = pairs.none()
        rows = _Rows.of(pairs)
        encoded = self._encode(image, mask)
        with self._features() as seen:
            logits, *prm = self._decode(encoded, rows.sample, rows.mask, size=image.shape[2:])
        features = logits if self.features is None else _resampled(self.features, seen, logits)
        branch = Branch(logits, features, tuple(prm))
        alone = branch.take(rows.alone)
        single = alone.logits
        if unimodal and isinstance(self.net, MultiEncoderNet):
            single = self.net.decode_unimodal(encoded, pairs.sample, pairs.modality)
            _same_shape("decode_unimodal", single, alone.logits)
        return Prediction(branch.take(slice(len(mask))), alone, single, pairs)

    def segment(self, image: Tensor, mask: Tensor) -> Tensor:
        """The fused logits (B, K, *S) alone, for inference."""
        self._pairs(image, mask)
        return self._fused(self._encode(image, mask), mask, size=image.shape[2:])

    def segment_subsets(self, image: Tensor, subsets: Tensor) -> Tensor:
        """The fused logits of many subsets of one batch, for inference.

        A net with several encoders runs ``encode`` once; a plain one is run subset by subset.

        Args:
            image: (B, M, *S); a modality that no subset shows is not used.
            subsets: bool (S, M), each with a modality.

        Returns:
            (S, B, K, *S), those of ``segment`` with each subset for the whole batch.

        Raises:
            ValueError: as ``segment``.

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

    def _pairs(self, image: Tensor, mask: Tensor) -> Pairs:
        if image.shape[1] != len(self.modalities):
            raise ValueError(
                f"image: got {image.shape[1]} channels, expected {len(self.modalities)} "
                f"({', '.join(self.modalities)})"
            )
        if mask.shape != image.shape[:2]:
            raise ValueError(
                f"mask: got {tuple(mask.shape)}, expected (B, M) = {tuple(image.shape[:2])}"
            )
        return Pairs.of(mask)

    def _encode(self, image: Tensor, mask: Tensor) -> Any:
        """What ``_decode`` works on; a plain net's is the masked image itself."""
        image = _hide(image, mask)
        return self.net.encode(image, mask) if isinstance(self.net, MultiEncoderNet) else image

    def _fused(self, encoded: Any, mask: Tensor, *, size: torch.Size) -> Tensor:
        """The logits of each sample shown its row of ``mask``."""
        every = torch.arange(len(mask), device=mask.device)
        return self._decode(encoded, every, mask, size=size)[0]

    def _decode(
        self, encoded: Any, sample: Tensor, mask: Tensor, *, size: torch.Size
    ) -> tuple[Tensor, ...]:
        """Logits of ``sample[n]`` shown ``mask[n]``: the output, then the coarser maps if there are."""
        if isinstance(self.net, MultiEncoderNet):
            output = self.net.decode_fused(encoded, sample, mask)
        else:
            output = self.net(_hide(encoded[sample], mask))
        return _maps(output, len(sample), size)

    @contextmanager
    def _features(self) -> Iterator[list[Any]]:
        """What the layer ``features`` gives within the context; its hook is gone afterwards."""
        seen: list[Any] = []
        if self.features is None:
            yield seen
            return

        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            # A copy, for the next layer may be an activation that works in place.
            seen.append(output.clone() if isinstance(output, Tensor) else output)

        handle = self.net.get_submodule(self.features).register_forward_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()


@dataclass(frozen=True)
class _Rows:
    """What the fused branch is run on: the batch, and behind it the pairs that it has not yet.

    Args:
        sample: (N,) long.
        mask: bool (N, M), what a row is shown.
        alone: (P,) long, the row of each pair. A sample that is shown one modality is its own pair.
    """

    sample: Tensor
    mask: Tensor
    alone: Tensor

    @classmethod
    def of(cls, pairs: Pairs) -> _Rows:
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
    """Let ``net`` be trained by ``MetaLearner`` and ``PrismObjective`` with missing modalities.

    Modalities that are not shown reach the net as zeros, whatever the image holds there (NaN
    included). Its unimodal outputs are the net on one modality at a time; distillation (E8) works on
    its logits, prototypes (E9) on its logits or on a layer's features. A net that gives several maps
    (deep supervision) trains on the coarser ones as prm maps (E7).

    One call of the net has all of them, each different input once. BatchNorm in training mode thus
    takes its statistics over samples and their single modalities together; InstanceNorm and GroupNorm
    know no such thing.

    Args:
        net: maps an image (N, M, *S) to logits (N, K, *S), or to a tuple, list or stack (N, H, K, *S)
            of logits, the output first and then coarser maps; any ``nn.Module``. A net with several
            encoders declares the methods of ``MultiEncoderNet`` instead.
        modalities: names of the M channels, in order.
        features: name of the layer, as in ``net.named_modules()``, whose output (N, C, *s) the
            prototypes are taken from, resampled linearly to the grid of the logits; the logits unless
            given.

    Returns:
        A module with PrismNet's signature, ``model(image, mask) -> Prediction``; its ``state_dict`` is
        that of ``net``.

    Raises:
        ValueError: no modality or a name twice, no such layer, or a declaration of ``MultiEncoderNet``
            that lacks a method; later, outputs of a wrong shape.

    Example:
        >>> model = wrap(nn.Conv2d(2, 3, 1), modalities=("t1", "t2"))
        >>> model(torch.randn(1, 2, 8, 8), torch.tensor([[True, False]])).fused.shape
        torch.Size([1, 3, 8, 8])
        >>> sorted(model.state_dict())
        ['bias', 'weight']
        >>> net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
        >>> model = wrap(net, modalities=("t1", "t2"), features="1")
        >>> model(torch.randn(1, 2, 8, 8), torch.tensor([[True, True]])).features.shape
        torch.Size([1, 8, 8, 8])
    """
    if not modalities or len(set(modalities)) != len(modalities):
        raise ValueError(
            f"modalities: got {tuple(modalities)}, expected different names, at least one"
        )
    _check_layer(net, features)
    _check_declaration(net)
    return WrappedNet(net, modalities, features)


def _check_layer(net: nn.Module, features: str | None) -> None:
    known = [name for name, _ in net.named_modules(remove_duplicate=False) if name]
    if features is None or features in known:
        return
    near = difflib.get_close_matches(features, known, n=3, cutoff=0.4) or known[:3]
    raise ValueError(
        f"features: got {features!r}, which is no layer of {type(net).__name__}; expected a name of "
        f"net.named_modules(), e.g. {', '.join(near) or 'none: it has no layers'}"
    )


def _check_declaration(net: nn.Module) -> None:
    # Not by ``encode``, a name that ordinary nets have too.
    methods = ("encode", "decode_fused", "decode_unimodal")
    missing = [name for name in methods if not callable(getattr(net, name, None))]
    if missing and any(name not in missing for name in methods[1:]):
        raise ValueError(
            f"net: {type(net).__name__} has no {', '.join(missing)}; a net with several encoders "
            f"declares {', '.join(methods)}, see MultiEncoderNet"
        )


def _maps(output: Any, rows: int, size: torch.Size) -> tuple[Tensor, ...]:
    """The output's logits, then the coarser ones if the net gives any."""
    wanted = f"({', '.join(map(str, (rows, 'K', *size)))})"
    if (
        isinstance(output, Tensor) and output.ndim == len(size) + 3
    ):  # as MONAI's DynUNet stacks them
        output = output.unbind(1)
    maps = (output,) if isinstance(output, Tensor) else output
    if (
        not isinstance(maps, (tuple, list))
        or not all(isinstance(m, Tensor) for m in maps)
        or not maps
    ):
        raise ValueError(
            f"net: gave {_kind(output)}, expected logits (N, K, *S) = {wanted}, or a tuple or list of "
            "maps with the output first; wrap a module that returns these alone"
        )
    first = maps[0]
    if first.ndim != len(size) + 2 or len(first) != rows or first.shape[2:] != size:
        raise ValueError(
            f"net: gave logits {tuple(first.shape)}, expected (N, K, *S) = {wanted} for its input; "
            "bring them to the input's grid, the finest first where there are several"
        )
    for number, coarse in enumerate(maps[1:], start=2):
        if coarse.ndim != first.ndim or coarse.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"net: gave {tuple(coarse.shape)} as map {number} of {len(maps)}, expected logits "
                f"(N, K, *s) with N, K = {first.shape[0]}, {first.shape[1]}; switch off outputs that "
                "are no logits, or wrap a module that leaves them out"
            )
    return tuple(maps)


def _resampled(layer: str, seen: Sequence[Any], logits: Tensor) -> Tensor:
    """The features that the layer gave, on the grid of the logits."""
    if len(seen) != 1:
        raise ValueError(
            f"features: {layer} ran {len(seen)} times in one pass of the net; name a layer that runs once"
        )
    (features,) = seen
    if (
        not isinstance(features, Tensor)
        or features.ndim != logits.ndim
        or len(features) != len(logits)
    ):
        shape = tuple(features.shape) if isinstance(features, Tensor) else _kind(features)
        raise ValueError(
            f"features: {layer} gave {shape}, expected (N, C, *s) with N = {len(logits)} and "
            f"{logits.ndim - 2} spatial dimensions; name a layer that gives feature maps"
        )
    size = logits.shape[2:]
    if features.shape[2:] == size:
        return features
    return F.interpolate(features, size=size, mode=_LINEAR[len(size)])


def _same_shape(method: str, logits: Tensor, expected: Tensor) -> None:
    if logits.shape != expected.shape:
        raise ValueError(
            f"net: {method} gave {tuple(logits.shape)}, expected (P, K, *S) = {tuple(expected.shape)}"
        )


def _kind(value: Any) -> str:
    """A value's type, and those of its parts."""
    if isinstance(value, (tuple, list)):
        return (
            f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value) or 'nothing'}"
        )
    return f"a {type(value).__name__}"


def _hide(image: Tensor, mask: Tensor) -> Tensor:
    """``where``, not a product: NaN * 0 is NaN."""
    shown = mask.view(*mask.shape, *[1] * (image.ndim - 2))
    return torch.where(shown, image, image.new_zeros(()))


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    inner = f"{prefix}net."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name[len(inner) :]] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}net.{name[len(prefix) :]}"] = state.pop(name)
