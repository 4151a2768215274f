"""Mask policies that follow the losses of the training: hard subsets come more often."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from prism_meta.data.masking import AnyCase, MaskPolicy
from prism_meta.data.subset_masks import held
from prism_meta.modalities import subset_index, subsets


@runtime_checkable
class FollowsLosses(MaskPolicy, Protocol):
    """A mask policy that depends on the losses of the training so far, e.g. ``HardMask``."""

    def observe(self, mask: Tensor, losses: Tensor) -> None:
        """Add the losses (B,) of samples that were shown ``mask``, bool (B, M), in this order."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next masks depend on."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore ``state_dict``."""


class FollowingMask(AnyCase, ABC):
    """Base of the policies that draw subsets in proportion to weights made from their losses.

    Of the subsets that a case has, s is drawn with probability w_s / sum_r w_r. A subclass implements
    ``weights``. It can use the running losses L_s: an exponential moving average of the losses that
    ``observe`` was told for s, one sample after another, L_s <- decay L_s + (1 - decay) loss, starting at
    the first one.

    Args:
        num_modalities: M.
        decay: of the average, in [0, 1). Defaults to 0.9.

    Raises:
        ValueError: ``decay`` is out of range. Calls raise it if the number of modalities differs.
    """

    def __init__(self, num_modalities: int, *, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, expected a number in [0, 1)")
        self.subsets, self.decay = subsets(num_modalities), decay
        #: Running loss of each subset; NaN where there is none.
        self.losses = torch.full((len(self.subsets),), torch.nan, dtype=torch.float64)

    @abstractmethod
    def weights(self) -> Tensor:
        """The weight of each subset, (2^M - 1,), > 0."""

    def known_losses(self) -> Tensor:
        """The running losses; a subset without one counts like the mean of the others, or 1 without any."""
        known = ~self.losses.isnan()
        return torch.where(known, self.losses, self.losses.nanmean() if known.any() else 1.0)

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        if not len(availability):
            return availability.clone()
        chances = self.probabilities(availability)
        chosen = torch.multinomial(chances, 1, generator=generator).flatten()
        return self.subsets[chosen].to(availability.device)

    def probabilities(self, availability: Tensor) -> Tensor:
        """The probability of each subset for cases (N, M): (N, 2^M - 1), in the order of ``subsets``."""
        self._check(availability, "availability")
        weights = held(self.subsets, availability.cpu()).T * self.weights()
        return weights / weights.sum(1, keepdim=True)

    def observe(self, mask: Tensor, losses: Tensor) -> None:
        """Add the losses (B,) of samples that were shown ``mask``, bool (B, M), in this order."""
        self._check(mask, "mask")
        for k, loss in zip(subset_index(mask.cpu()).tolist(), losses.tolist(), strict=True):
            before = self.losses[k]
            new = loss if before.isnan() else self.decay * before + (1 - self.decay) * loss
            self.losses[k] = new

    def state_dict(self) -> dict[str, Tensor]:
        """The running losses."""
        return {"losses": self.losses.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore ``state_dict``."""
        self.losses = self._loaded("losses", state["losses"])

    def _loaded(self, name: str, values: Tensor) -> Tensor:
        if values.shape != self.losses.shape:
            raise ValueError(
                f"{name}: got those of {len(values)} subsets, expected {len(self.losses)}"
            )
        return values.to("cpu", torch.float64, copy=True)

    def _check(self, rows: Tensor, name: str) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.subsets.shape[1]:
            raise ValueError(
                f"{name}: got shape {tuple(rows.shape)}, expected (N, {self.subsets.shape[1]})"
            )


class HardMask(FollowingMask):
    """Draws a subset in proportion to (its running loss)^power, so that hard subsets come more often.

    Of the subsets that a case has, s is drawn with probability L_s^p / sum_r L_r^p, see ``FollowingMask``.
    Without any loss, all are equally likely, as with ``DynamicMask``.

    Args:
        num_modalities: M.
        power: p, at least 0. Defaults to 4.
        decay: of the average, in [0, 1). Defaults to 0.9.

    Raises:
        ValueError: a number is out of range. Calls raise it if the number of modalities differs.

    Example:
        >>> policy = HardMask(2)
        >>> policy.observe(torch.tensor([[True, False], [True, True]]), torch.tensor([1.0, 0.5]))
        >>> drawn = policy.probabilities(torch.ones(1, 2).bool())  # losses 1, 0.75 and 0.5
        >>> [round(p, 3) for p in drawn[0].tolist()]
        [0.725, 0.229, 0.045]
    """

    def __init__(self, num_modalities: int, *, power: float = 4.0, decay: float = 0.9) -> None:
        if not power >= 0:
            raise ValueError(f"power: got {power}, expected a number >= 0")
        super().__init__(num_modalities, decay=decay)
        self.power = power

    def weights(self) -> Tensor:
        losses = self.known_losses()
        # Relative to the largest, so that no power overflows; 0 would never be drawn again.
        relative: Tensor = (losses / losses.max().clamp(min=1e-12)).clamp(min=1e-3)
        return relative**self.power


class GroupDROMask(FollowingMask):
    """Draws a subset in proportion to q_s of group DRO, whose groups are the subsets.

    Training on subsets drawn with q approximates min over phi, max over q of sum_s q_s L_s(phi), the loss of
    the worst subset. Each batch of losses takes one step of the ascent,

        q_s <- q_s exp(step L_s) / sum_r q_r exp(step L_r),

    with the running losses L_s of ``FollowingMask``, so that a subset does not gain by being seen often.
    q starts uniform.

    Args:
        num_modalities: M.
        step: step size eta of q, at least 0. Defaults to 0.01, as published.
        decay: of the running losses, in [0, 1). Defaults to 0.9.

    Raises:
        ValueError: a number is out of range. Calls raise it if the number of modalities differs.

    Source: Sagawa et al., ICLR 2020 (algorithm 1, with q as the chance of a subset instead of the weight of
    its loss).

    Example:
        >>> policy = GroupDROMask(2, step=1.0)
        >>> policy.observe(torch.tensor([[True, False], [False, True], [True, True]]), torch.arange(3.0))
        >>> [round(p, 3) for p in policy.weights().tolist()]
        [0.09, 0.245, 0.665]
    """

    def __init__(self, num_modalities: int, *, step: float = 0.01, decay: float = 0.9) -> None:
        if not step >= 0:
            raise ValueError(f"step: got {step}, expected a number >= 0")
        super().__init__(num_modalities, decay=decay)
        self.step = step
        #: log q, whose sum of exponentials is 1.
        self.log_q = torch.zeros_like(self.losses).log_softmax(0)

    def weights(self) -> Tensor:
        # A subset of chance 0 could never be drawn again, nor a case that has only such subsets.
        return self.log_q.exp().clamp(min=1e-12)

    def observe(self, mask: Tensor, losses: Tensor) -> None:
        super().observe(mask, losses)
        self.log_q = (self.log_q + self.step * self.known_losses()).log_softmax(0)

    def state_dict(self) -> dict[str, Tensor]:
        """The running losses, and log q."""
        return {**super().state_dict(), "log_q": self.log_q.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.log_q = self._loaded("log_q", state["log_q"])
