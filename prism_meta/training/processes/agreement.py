"""What the processes of one training tell each other beside gradients: errors, losses, and when to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from torch import distributed

from prism_meta.errors import PrismError
from prism_meta.training.stopping import TrainingStopped

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

T = TypeVar("T")


class Processes:
    """All processes of a training.

    Args:
        fabric: devices and processes, launched.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self._group: Any = None
        if fabric.world_size > 1:
            # On the CPU, so that no device waits; and without a limit, because preparing cases takes long.
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(days=1000))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. Every process must call it."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.fabric.world_size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """A ``PrismError`` in the block of one process is raised by all of them, after the block.

        So is ``TrainingStopped``.

        The block itself must not wait for other processes.
        """
        own: PrismError | TrainingStopped | None = None
        try:
            yield
        except (PrismError, TrainingStopped) as error:
            own = error
        found = next((error for error in self.gather(own) if error is not None), None)
        if found is not None:
            raise found from own
