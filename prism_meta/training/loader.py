"""Episodes in order, loaded by additional processes if asked for."""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from prism_meta.errors import PrismError

#: Seconds for which a worker outlives SIGTERM.
_GRACE = 30


def load_episodes(
    episodes: Any, indices: Sequence[int], *, workers: int
) -> Generator[Any, None, None]:
    """Yield ``episodes[index]`` for each of ``indices``. Close the generator, so that the workers end.

    Args:
        episodes: a dataset or a sequence.
        indices: in this order.
        workers: number of additional processes.

    Raises:
        PrismError: an episode cannot be loaded.
    """
    loader = DataLoader(
        _Guarded(episodes),
        batch_size=None,
        collate_fn=_unchanged,
        sampler=indices,
        num_workers=workers,
        worker_init_fn=_outlive_signals,
    )
    iterator = iter(loader)
    try:
        for _ in indices:
            episode = next(iterator)
            if isinstance(episode, PrismError):
                raise episode
            yield episode
    finally:
        del iterator  # a traceback would keep it and its workers alive


class _Guarded(Dataset[Any]):
    """Episodes, or the error that one raised: torch would turn that of a worker into a traceback."""

    def __init__(self, episodes: Any) -> None:
        self.episodes = episodes

    def __getitem__(self, index: int) -> Any:
        try:
            return self.episodes[index]
        except PrismError as error:
            return error


def _unchanged(episode: Any) -> Any:
    """Keeps batches of any type as the dataset gives them; torch would turn tuples into lists."""
    return episode


def _outlive_signals(worker: int) -> None:
    """A signal to all processes asks the main process to stop, which needs its workers until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE))
