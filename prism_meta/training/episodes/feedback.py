"""Losses fed back to episodes whose masks follow them, with the same result in every run and process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prism_meta.bilevel.strategies import MetaGradient
from prism_meta.errors import PrismError
from prism_meta.training.episodes.adaptive import AdaptiveEpisodes
from prism_meta.training.processes.agreement import Processes

#: The term of an objective that the masks follow: the loss of each sample, (B,).
SAMPLES = "samples"
#: Outer steps in a block.
BLOCK = 10

State = dict[str, Tensor]


class Feedback:
    """Feeds the losses of meta batches to the episodes, and says which state each episode is drawn with.

    Worker processes draw episodes ahead, so a loss cannot change the very next one. Outer steps are cut
    into blocks. All episodes of block b are drawn with the state from the beginning of block b - 1, and
    those of the first two blocks with the first state. That does not depend on the number of workers or
    on where a run was interrupted. All processes add the losses of all of them, in the same order.

    Args:
        episodes: if they are no ``AdaptiveEpisodes`` that follow losses, this class does nothing.
        per_step: number of episodes of an outer step.
        processes: all processes of the training.
    """

    def __init__(self, episodes: Any, per_step: int, processes: Processes) -> None:
        follow = isinstance(episodes, AdaptiveEpisodes) and episodes.follows_losses
        self.episodes: AdaptiveEpisodes | None = episodes if follow else None
        self.per_step, self.processes = per_step, processes
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._block = 0
        first: State = {} if self.episodes is None else self.episodes.state_dict()
        self._running = self._now = self._next = first

    def most_workers(self, workers: int) -> int:
        """At most as many worker processes as can load ahead without a state that is not known yet."""
        # torch's DataLoader hands out two episodes per worker in advance.
        return workers if self.episodes is None else min(workers, BLOCK * self.per_step // 2)

    def state_of(self, index: int) -> State | None:
        """The state with which episode ``index`` is drawn; None if there is none."""
        if self.episodes is None:
            return None
        return self._now if index // self.per_step // BLOCK <= self._block else self._next

    def collect(self, results: Sequence[MetaGradient], episodes: Sequence[tuple[Any, Any]]) -> None:
        """Keep the losses of one outer step. They stay on the device until ``read``."""
        if self.episodes is None:
            return
        for result, (_, meta) in zip(results, episodes, strict=True):
            losses = result.terms.get(SAMPLES)
            if losses is None or losses.shape != meta.mask.shape[:1]:
                raise PrismError(
                    f"masks: a policy that follows losses needs the term {SAMPLES!r} of the objective, the "
                    "loss of each sample (B,), and there is none; use PrismObjective(sample_losses=True), "
                    "add the term, or choose another policy"
                )
            self._pending.append((meta.mask.cpu(), losses))

    def read(self, step: int) -> None:
        """Add what was collected; ``step`` outer steps are done. Every process must call it."""
        if self.episodes is None:
            return
        own = [(mask, losses.double().cpu()) for mask, losses in self._pending]
        self._pending.clear()
        self.episodes.load_state_dict(self._running)
        # In the order of the steps, however often losses are read.
        for pairs in zip(*self.processes.gather(_by_step(own, self.per_step)), strict=True):
            for mask, losses in (pair for of_process in pairs for pair in of_process):
                self.episodes.observe(mask, losses)
        self._running = self.episodes.state_dict()
        if step // BLOCK > self._block:
            self._block = step // BLOCK
            self._now, self._next = self._next, self._running

    def state_dict(self) -> dict[str, State]:
        """What a checkpoint needs; {} if the episodes do not follow losses."""
        if self.episodes is None:
            return {}
        return {"running": self._running, "now": self._now, "next": self._next}

    def load_state_dict(self, state: Mapping[str, State], step: int) -> None:
        """Continue from ``state_dict`` after ``step`` outer steps."""
        if self.episodes is None:
            return
        loaded = []
        for name in ("running", "now", "next"):
            self.episodes.load_state_dict(state[name])  # checks it, and moves it to the CPU
            loaded.append(self.episodes.state_dict())
        self._running, self._now, self._next = loaded
        self._block = step // BLOCK


def _by_step(
    pairs: Sequence[tuple[Tensor, Tensor]], per_step: int
) -> list[list[tuple[Tensor, Tensor]]]:
    return [list(pairs[k : k + per_step]) for k in range(0, len(pairs), per_step)]


def without_samples(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The terms to log."""
    return {name: term for name, term in terms.items() if name != SAMPLES}
