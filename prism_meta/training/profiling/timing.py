"""Times of calls that take turns, because the speed of a machine drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Seconds:
    """How long a call took in each round.

    Args:
        rounds: seconds, one per round.

    Example:
        >>> times = Seconds((2.0, 1.0, 9.0))
        >>> times.median, times.low, times.high
        (2.0, 1.0, 9.0)
    """

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds, which a single slow one does not move."""
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        """The fastest round."""
        return min(self.rounds)

    @property
    def high(self) -> float:
        """The slowest round."""
        return max(self.rounds)

    def ratio(self, base: Seconds) -> float:
        """The median of the ratios to ``base``, round by round.

        Example:
            >>> Seconds((2.0, 4.0, 9.0)).ratio(Seconds((1.0, 2.0, 3.0)))
            2.0
        """
        pairs = zip(self.rounds, base.rounds, strict=True)
        return statistics.median(own / other for own, other in pairs)


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    on_call: Callable[[str], None] = lambda name: None,
) -> dict[str, Seconds]:
    """Time each call once per round; every second round goes backwards, which cancels a steady drift.

    Args:
        calls: name -> what to time. Call each once before, because first calls are slow.
        rounds: how often each is timed.
        device: what the calls compute on; its work is waited for.
        on_call: called with the name after each call.

    Example:
        >>> order = []
        >>> calls = {name: lambda name=name: order.append(name) for name in "ab"}
        >>> times = interleaved(calls, rounds=2, device=torch.device("cpu"))
        >>> "".join(order), len(times["a"].rounds)
        ('abba', 2)
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)
        for name in reversed(names) if number % 2 else names:
            wait_for(device)
            start = time.perf_counter()
            calls[name]()
            wait_for(device)
            taken[name].append(time.perf_counter() - start)
            on_call(name)
    return {name: Seconds(tuple(seconds)) for name, seconds in taken.items()}


class PeakMemory:
    """The most memory that torch had allocated on a GPU within the context, beyond what it had before.

    ``bytes`` is None on other devices, whose allocator does not tell.

    Example:
        >>> with PeakMemory(torch.device("cpu")) as peak:
        ...     x = torch.zeros(10)
        >>> peak.bytes is None
        True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
