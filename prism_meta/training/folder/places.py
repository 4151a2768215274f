"""Where a command writes: its run folder, locked, and the cache of prepared cases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from prism_meta.files import kept_if_used, writable_folder
from prism_meta.training.config import Config
from prism_meta.training.folder.lock import LOCK, locked


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """The run folder, locked. It is made if needed, and removed again if nothing was written to it."""
    with kept_if_used(out):
        try:
            with locked(writable_folder(out)):
                yield
        except BaseException:
            if out.is_dir() and {path.name for path in out.iterdir()} == {LOCK}:
                (out / LOCK).unlink()
            raise


def cache_folder(config: Config, out: Path | str | None, stack: ExitStack) -> Path:
    """The folder of the prepared cases: beside the run folder, or a temporary one."""
    if config.data.cache is not None:
        return config.data.cache
    if out is not None:
        return Path(out).parent / ".prism-meta-cache"
    return Path(stack.enter_context(TemporaryDirectory()))
