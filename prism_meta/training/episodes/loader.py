"""Episodes in order, loaded ahead by additional processes, and pinned for a GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from prism_meta.errors import PrismError

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

#: Seconds for which a worker outlives SIGTERM.
_GRACE = 30
#: Shorter trainings end before a worker pays off.
_SHORT = 50
#: Workers that feed one GPU by default. One is enough for a CPU, whose steps take longer.
_PER_GPU = 4
#: With so many cores a training on the CPU has none to spare.
_BUSY = 2


def default_workers(fabric: Fabric, episodes: int) -> int:
    """How many additional processes load episodes.

    None in a short training, and none on a CPU with two cores for each process of the training: steps use
    both, and a worker takes more from them than it saves (``benchmarks/loader.py``).

    Args:
        fabric: devices and processes, launched.
        episodes: number of episodes to load.
    """
    if episodes < _SHORT:
        return 0
    per_node: int = fabric.world_size // max(1, _nodes(fabric))
    cores = _cores() // max(1, per_node)
    if fabric.device.type == "cpu":
        return int(cores > _BUSY)
    return max(0, min(cores - 1, _PER_GPU))


def load_episodes(
    episodes: Any,
    indices: Sequence[int],
    *,
    workers: int,
    pin: bool = False,
    give_way: bool = False,
    state_of: Callable[[int], Any] | None = None,
) -> Generator[Any, None, None]:
    """Yield ``episodes[index]`` for each of ``indices``. Close the generator, so that the workers end.

    Args:
        episodes: a dataset or a sequence.
        indices: in this order.
        workers: number of additional processes.
        pin: put the tensors into pinned memory, from which a GPU copies while it computes.
        give_way: run the processes at the lowest priority, so that steps on the same CPU come first. Without
            it a process makes steps on two cores up to 29 % slower (``benchmarks/loader.py``).
        state_of: gives the state with which the episode of an index is drawn, or None. It is asked when
            the episode is handed to a worker, up to twice the number of workers in advance.

    Raises:
        PrismError: an episode cannot be loaded.
    """
    loader = DataLoader(
        _Guarded(episodes),
        batch_size=None,
        collate_fn=_unchanged,
        sampler=_Requests(indices, state_of),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=partial(_start_worker, give_way=give_way),
    )
    iterator = iter(loader)
    try:
        for _ in indices:
            loaded = next(iterator)
            if isinstance(loaded.value, PrismError):
                raise loaded.value
            yield loaded.value
    finally:
        del iterator  # a traceback would keep it and its workers alive


class _Requests:
    """The indices of the episodes, each with the state to draw it with."""

    def __init__(self, indices: Sequence[int], state_of: Callable[[int], Any] | None) -> None:
        self.indices, self.state_of = indices, state_of

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for index in self.indices:
            yield index, None if self.state_of is None else self.state_of(index)

    def __len__(self) -> int:
        return len(self.indices)


class _Loaded:
    """An episode, or the error of one. It is an object of ours, because torch turns tuples into lists."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def pin_memory(self) -> _Loaded:
        return self if isinstance(self.value, PrismError) else _Loaded(_pinned(self.value))


class _Guarded(Dataset[_Loaded]):
    """Episodes, or the error that one raised: torch would turn that of a worker into a traceback."""

    def __init__(self, episodes: Any) -> None:
        self.episodes = episodes

    def __getitem__(self, request: tuple[int, Any]) -> _Loaded:
        index, state = request
        try:
            if state is not None:
                self.episodes.load_state_dict(state)
            return _Loaded(self.episodes[index])
        except PrismError as error:
            return _Loaded(error)


def _pinned(value: Any) -> Any:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return type(value)(map(_pinned, value))
    return pin_memory(value)


def _unchanged(episode: Any) -> Any:
    """Keeps batches of any type as the dataset gives them; torch would turn tuples into lists."""
    return episode


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _nodes(fabric: Fabric) -> int:
    return int(getattr(fabric.strategy, "num_nodes", 1))


def _start_worker(worker: int, *, give_way: bool) -> None:
    _outlive_signals()
    if give_way and hasattr(os, "nice"):
        os.nice(19)


def _outlive_signals() -> None:
    """A signal to all processes asks the main process to stop, which needs its workers until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE))
