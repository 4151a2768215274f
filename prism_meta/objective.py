"""E10: PRISM's total loss as an objective for the strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta import losses
from prism_meta.modalities import Batch
from prism_meta.network import Prediction

PrototypeLoss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Loss:
    """The value of an objective.

    Args:
        loss: scalar to minimise.
        terms: its components before weighting, detached: ``fuse`` and ``prm`` scalars; ``uni``,
            ``pixel`` and ``proto`` (M,), the mean over the samples that show the modality.
    """

    loss: Tensor
    terms: dict[str, Tensor]


class PrismObjective:
    """L = L_fuse + sum_m (beta_m L_pixel^m + delta_m L_proto^m) + L_uni + L_prm (E10).

    Sums run over the modalities that a sample is shown; the batch is averaged.

    Args:
        beta: weight of pixel distillation (E8), one number or one per modality.
        delta: weight of prototype alignment (E9), likewise.
        temperature: T of E8.
        direction: of the divergence in E8.
        prototype: ``losses.prototype_l2`` or ``losses.prototype_similarity``.
        weighted: class weights in the cross-entropy of E5-E7.

    Source: PRISM's total loss; PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> from prism_meta.network import PrismNet
        >>> net = PrismNet(num_modalities=2, num_classes=3, spatial_dims=2, width=4)
        >>> batch = Batch(torch.randn(1, 2, 16, 16), torch.ones(1, 2).bool(), torch.zeros(1, 16, 16).long())
        >>> sorted(PrismObjective()(net, batch).terms)
        ['fuse', 'pixel', 'prm', 'proto', 'uni']
    """

    def __init__(
        self,
        *,
        beta: float | Sequence[float] = 0.02,
        delta: float | Sequence[float] = 0.01,
        temperature: float = 4.0,
        direction: losses.Direction = "student_teacher",
        prototype: PrototypeLoss = losses.prototype_l2,
        weighted: bool = True,
    ) -> None:
        self.beta, self.delta = beta, delta
        self.temperature, self.direction = temperature, direction
        self.prototype, self.weighted = prototype, weighted

    def __call__(self, forward: Callable[..., Any], batch: Batch) -> Loss:
        """Evaluate on ``batch``; ``forward`` has the signature of ``PrismNet``."""
        prediction: Prediction = forward(batch.image, batch.mask)
        pairs = prediction.pairs
        target, pair_target = batch.target, batch.target[pairs.sample]
        fuse = self._segmentation(prediction.fused, target)
        prm = fuse.new_zeros(len(fuse))
        for scale, coarse in enumerate(prediction.prm, start=1):
            prm = prm + 2.0**-scale * self._segmentation(_upsample(coarse, target), target)
        uni = self._segmentation(prediction.unimodal_packed, pair_target)
        pixel = self._pixel(prediction)
        proto = self.prototype(
            _full(prediction.alone.features),
            _full(prediction.features[pairs.sample]),
            pair_target,
            prediction.fused.shape[1],
        )
        beta, delta = (_per_modality(w, pairs.mask, like=uni) for w in (self.beta, self.delta))
        per_pair = uni + beta[pairs.modality] * pixel + delta[pairs.modality] * proto
        loss = (fuse + prm).mean() + per_pair.sum() / len(fuse)
        shown = pairs.mask.sum(0)

        def by_modality(values: Tensor) -> Tensor:
            sums = values.new_zeros(len(shown)).index_add(0, pairs.modality, values.detach())
            return sums / shown.clamp(min=1)

        terms = {
            "fuse": fuse.detach().mean(),
            "prm": prm.detach().mean(),
            "uni": by_modality(uni),
            "pixel": by_modality(pixel),
            "proto": by_modality(proto),
        }
        return Loss(loss, terms)

    def _segmentation(self, logits: Tensor, target: Tensor) -> Tensor:
        return losses.segmentation(_full(logits), target, weighted=self.weighted)

    def _pixel(self, prediction: Prediction) -> Tensor:
        """E8: the output and every prm scale, weight 1 each: (P,)."""
        students = (prediction.alone.logits, *prediction.alone.prm)
        teachers = (prediction.fused, *prediction.prm)
        total = torch.zeros((), device=prediction.fused.device)
        for student, teacher in zip(students, teachers, strict=True):
            total = total + losses.pixel_distillation(
                _full(student),
                _full(teacher.detach()[prediction.pairs.sample]),
                self.temperature,
                self.direction,
            )
        return total


def _per_modality(weight: float | Sequence[float], mask: Tensor, *, like: Tensor) -> Tensor:
    """One weight per modality, (M,)."""
    weights = (
        like.new_tensor(weight).expand(mask.shape[1])
        if not isinstance(weight, Sequence)
        else (like.new_tensor(list(weight)))
    )
    if len(weights) != mask.shape[1]:
        raise ValueError(
            f"beta, delta: got {len(weights)} weights, expected 1 or {mask.shape[1]}, one per modality"
        )
    return weights


def _upsample(coarse: Tensor, target: Tensor) -> Tensor:
    mode = "trilinear" if coarse.ndim == 5 else "bilinear"
    return F.interpolate(_full(coarse), size=target.shape[1:], mode=mode)


def _full(x: Tensor) -> Tensor:
    """At least float32: losses are not computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
