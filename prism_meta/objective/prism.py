"""E10: PRISM's total loss as an objective for the strategies, with the weights of E11 or E12."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.modalities import Batch
from prism_meta.networks.prediction import Prediction, ShownPairs
from prism_meta.objective import losses
from prism_meta.objective.meta_losses import MetaLoss
from prism_meta.objective.weighting import (
    BETA,
    DELTA,
    LearnedSubsetWeights,
    PairWeights,
    Weight,
    Weighting,
    modality_means,
)


class PrototypeLoss(Protocol):
    """A loss of prototypes, see ``losses.prototype_l2``."""

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        num_classes: int,
        *,
        valid: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Loss:
    """The value of an objective.

    Args:
        loss: scalar to minimise.
        terms: its components before weighting, detached. ``fuse`` and ``prm`` are scalars. ``uni``,
            ``pixel`` and ``proto`` are (M,), means over the samples that show the modality. A weighting
            adds its current weights ``beta`` and ``delta`` (M,), and terms of its own.
        samples: L_fuse of each sample, (B,), with its graph.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    samples: Tensor

    def changed(self, loss: Tensor, **terms: Tensor) -> Loss:
        """This one with another ``loss`` and more terms."""
        return replace(
            self, loss=loss, terms=self.terms | {n: term.detach() for n, term in terms.items()}
        )


class PrismObjective:
    """L = L_fuse + sum_m (beta_m L_pixel^m + delta_m L_proto^m) + L_uni + L_prm (E10).

    Sums run over the modalities that a sample shows, and the batch is averaged. Voxels that
    ``Batch.valid`` excludes are left out. L_prm is the loss of the
    prm maps (coarse-scale outputs of the fused decoder). The objective is a pure function of ``forward``
    and ``batch``; only ``observe`` and ``end_epoch`` change the state of a weighting.

    Args:
        beta: weight of pixel distillation (E8), one number or one per modality. With
            ``LearnedWeights`` it is the fixed weight in L_meta and defaults to their initial value.
        delta: weight of prototype alignment (E9), in the same form.
        temperature: T of E8.
        direction: of the divergence in E8.
        scale_decay: weight 2^-s for prm scale s in E8, as in the published code, instead of 1.
        prototype: ``losses.prototype_l2`` or ``losses.prototype_similarity``.
        weighted: class weights in the cross-entropy of E5-E7. Defaults to False, because a patch without
            foreground would give its only class the weight 0.
        unimodal: False computes only L_fuse + L_prm, for nets with one branch. ``forward`` is then called
            with ``unimodal=False`` and computes no single modalities.
        weighting: ``RelativePreference`` (E11) or ``LearnedWeights`` (E12). Defaults to fixed weights.
        subset_weights: multiply the loss of each sample in L_train by the learned weight of its subset.
        meta_loss: what L_meta is instead of L, e.g. ``SoftWorst()`` or ``Ranking()``. Defaults to L.
        sample_losses: add the term ``samples``, L_fuse of each sample, (B,); ``HardMask`` needs it.

    Raises:
        ValueError: a ``weighting`` with ``unimodal=False``, which leaves it nothing to weight; later, the
            number of weights is not that of the modalities.

    Source: PRISM's total loss; PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> from prism_meta.networks.prism import PrismNet
        >>> net = PrismNet(num_modalities=2, num_classes=3, spatial_dims=2, width=4)
        >>> batch = Batch(torch.randn(1, 2, 16, 16), torch.ones(1, 2).bool(), torch.zeros(1, 16, 16).long())
        >>> sorted(PrismObjective()(net, batch).terms)
        ['fuse', 'pixel', 'prm', 'proto', 'uni']
    """

    def __init__(
        self,
        *,
        beta: Weight | None = None,
        delta: Weight | None = None,
        temperature: float = 4.0,
        direction: losses.Direction = "student_teacher",
        scale_decay: bool = False,
        prototype: PrototypeLoss = losses.prototype_l2,
        weighted: bool = False,
        unimodal: bool = True,
        weighting: Weighting | None = None,
        subset_weights: LearnedSubsetWeights | None = None,
        meta_loss: MetaLoss | None = None,
        sample_losses: bool = False,
    ) -> None:
        if weighting is not None and not unimodal:
            raise ValueError(
                f"weighting: got {type(weighting).__name__} with unimodal=False, which leaves nothing "
                "to weight; leave out one of the two"
            )
        first = (BETA, DELTA) if weighting is None else weighting.start
        self.beta, self.delta = (
            first[0] if beta is None else beta,
            first[1] if delta is None else delta,
        )
        self.temperature, self.direction = temperature, direction
        self.scale_decay = scale_decay
        self.prototype, self.weighted = prototype, weighted
        self.unimodal, self.weighting = unimodal, weighting
        self.subset_weights, self.meta_loss = subset_weights, meta_loss
        self.sample_losses = sample_losses

    def __call__(self, forward: Callable[..., Any], batch: Batch) -> Loss:
        """Evaluate ``batch``; ``forward`` has the signature of ``PrismNet``."""
        # A callable that takes only an image and a mask works too.
        options = {} if self.unimodal else {"unimodal": False}
        prediction: Prediction = forward(batch.image, batch.mask, **options)
        # Autocast would compute prototypes and their similarities in half precision.
        with torch.autocast(batch.image.device.type, enabled=False):
            return self._loss(prediction, batch)

    def fused_losses(self, forward: Callable[..., Any], batch: Batch) -> Tensor:
        """L_fuse (E5) of each sample of ``batch``, (B,); ``forward`` is that of an objective."""
        prediction: Prediction = forward(batch.image, batch.mask, unimodal=False)
        with torch.autocast(batch.image.device.type, enabled=False):
            return self._segmentation(prediction.fused, batch.target, batch.valid)

    def weights(self) -> dict[str, Tensor]:
        """What changes over training, detached; {} without anything.

        ``beta`` and ``delta`` (M,) of the weighting, and ``subset_weights`` (2^M - 1,).
        """
        found: dict[str, Tensor] = {}
        if self.weighting is not None:
            # A tensor of its state, whose device needs no synchronisation.
            like = next(iter(self.weighting.state_dict().values()))
            beta, delta = self.weighting.weights(*self._fixed(self.weighting.num_modalities, like))
            found |= {"beta": beta.detach(), "delta": delta.detach()}
        if self.subset_weights is not None:
            found["subset_weights"] = self.subset_weights.weights().detach()
        return found

    def hyper_parameters(self) -> dict[str, Tensor]:
        """The free parameters of E12 by name; {} if nothing is learned."""
        return {
            name: p
            for part in self._parts()
            for name, p in part.named_parameters()
            if p.requires_grad
        }

    @property
    def meta_objective(self) -> Callable[..., Loss]:
        """The objective of L_meta: this one, with fixed instead of learned weights, or its ``meta_loss``."""
        outer = self
        if self.hyper_parameters():
            outer = copy(self)
            outer.subset_weights = None
            if self.weighting is not None and self.weighting.hyper_parameters():
                outer.weighting = None
        return outer if self.meta_loss is None else partial(self.meta_loss, outer)

    def observe(self, terms: Mapping[str, Tensor]) -> None:
        """Record the terms of one step, for E11."""
        if self.weighting is not None:
            self.weighting.observe(terms)

    def end_epoch(self) -> None:
        """Update E of E11 from what was observed since the last epoch."""
        if self.weighting is not None:
            self.weighting.end_epoch()

    def to(self, device: torch.device | str) -> PrismObjective:
        """Move the weighting's state to ``device``, in place."""
        for part in self._parts():
            part.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs: the states of the weighting and of the weights of subsets."""
        return {name: value for part in self._parts() for name, value in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state_dict`` (``state``)."""
        for part in self._parts():
            part.load_state_dict({name: state[name] for name in part.state_dict()})

    def _parts(self) -> list[nn.Module]:
        """What has a state; no two have a name in common."""
        return [part for part in (self.weighting, self.subset_weights) if part is not None]

    def _loss(self, prediction: Prediction, batch: Batch) -> Loss:
        fuse = self._segmentation(prediction.fused, batch.target, batch.valid)
        prm = fuse.new_zeros(len(fuse))
        for scale, coarse in enumerate(prediction.prm, start=1):
            upsampled = _upsample(coarse, batch.target)
            prm = prm + 2.0**-scale * self._segmentation(upsampled, batch.target, batch.valid)
        weight = None if self.subset_weights is None else self.subset_weights.of(batch.mask)
        loss = (fuse + prm if weight is None else weight * (fuse + prm)).mean()
        terms = {"fuse": fuse.detach().mean(), "prm": prm.detach().mean()}
        if self.sample_losses:
            terms["samples"] = fuse.detach()
        if self.unimodal:
            per_pair, more = self._per_pair(prediction, batch.target, batch.valid)
            if weight is not None:
                per_pair = weight[prediction.pairs.sample] * per_pair
            loss = loss + per_pair.sum() / len(fuse)
            terms |= more
        return Loss(loss, terms, fuse)

    def _per_pair(
        self, prediction: Prediction, target: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_uni + beta L_pixel + delta L_proto of each pair, (P,), and their terms."""
        pairs, classes = prediction.pairs, prediction.fused.shape[1]
        pair_target = target[pairs.sample]
        pair_valid = None if valid is None else valid[pairs.sample]
        students = _full(prediction.single_modality.features)
        teachers = _full(prediction.features[pairs.sample])
        uni = self._segmentation(prediction.unimodal_packed, pair_target, pair_valid)
        pixel = self._pixel(prediction, pair_valid)
        proto = self.prototype(students, teachers, pair_target, classes, valid=pair_valid)
        weights = self._weigh(
            pairs,
            lambda: losses.prototype_distance(
                students.detach(), teachers, pair_target, classes, valid=pair_valid
            ),
            like=uni,
        )
        terms = {
            "uni": modality_means(uni, pairs),
            "pixel": modality_means(pixel, pairs),
            "proto": modality_means(proto, pairs),
            **weights.terms,
        }
        return uni + weights.beta * pixel + weights.delta * proto, terms

    def _weigh(
        self, pairs: ShownPairs, distance: Callable[[], Tensor], *, like: Tensor
    ) -> PairWeights:
        count = pairs.mask.shape[1]
        beta, delta = self._fixed(count, like)
        if self.weighting is None:
            return PairWeights(beta[pairs.modality], delta[pairs.modality])
        if self.weighting.num_modalities != count:
            raise ValueError(
                f"weighting: has {self.weighting.num_modalities} modalities, expected {count} as in the "
                "batch"
            )
        return self.weighting.weigh(beta, delta, pairs, distance)

    def _fixed(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        return _per_modality(self.beta, count, like), _per_modality(self.delta, count, like)

    def _segmentation(self, logits: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
        return losses.segmentation(_full(logits), target, weighted=self.weighted, valid=valid)

    def _pixel(self, prediction: Prediction, valid: Tensor | None) -> Tensor:
        """E8: the output and every prm scale, (P,)."""
        students = (prediction.single_modality.logits, *prediction.single_modality.prm)
        teachers = (prediction.fused, *prediction.prm)
        total = torch.zeros((), device=prediction.fused.device)
        for scale, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            weight = 2.0**-scale if self.scale_decay else 1.0  # the output is scale 0
            total = total + weight * losses.pixel_distillation(
                _full(student),
                _full(teacher.detach()[prediction.pairs.sample]),
                self.temperature,
                self.direction,
                valid=None if valid is None else _coarse(valid, student),
            )
        return total


def _per_modality(weight: Weight, count: int, like: Tensor) -> Tensor:
    """One weight per modality, (M,)."""
    weights = like.new_tensor(list(weight) if isinstance(weight, Sequence) else [weight] * count)
    if len(weights) != count:
        raise ValueError(
            f"beta, delta: got {len(weights)} weights, expected 1 or {count}, one per modality"
        )
    return weights


def _upsample(coarse: Tensor, target: Tensor) -> Tensor:
    mode = "trilinear" if coarse.ndim == 5 else "bilinear"
    return F.interpolate(_full(coarse), size=target.shape[1:], mode=mode)


def _coarse(valid: Tensor, maps: Tensor) -> Tensor:
    """Valid voxels (B, *S) at the scale of ``maps``: those of which any part is valid."""
    pool = F.adaptive_max_pool3d if maps.ndim == 5 else F.adaptive_max_pool2d
    return pool(valid[:, None].to(maps.dtype), maps.shape[2:])[:, 0] > 0


def _full(x: Tensor) -> Tensor:
    """At least float32: losses are not computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
