"""One train batch for each inner step: what episodes give and strategies take."""

from __future__ import annotations

from typing import Any


class StepBatches(tuple[Any, ...]):
    """Train batches for the inner steps: step k gets batch k modulo their number.

    It is made from any iterable of batches, in the order of the steps.

    Example:
        >>> StepBatches([1, 2]).of_step(2)
        1
    """

    def of_step(self, k: int) -> Any:
        """The batch of inner step ``k``."""
        return self[k % len(self)]

    @classmethod
    def of(cls, train: Any) -> StepBatches:
        """``train`` itself if it is a ``StepBatches``, else one batch for all steps.

        Raises:
            ValueError: there is no batch.
        """
        batches = train if isinstance(train, cls) else cls([train])
        if not batches:
            raise ValueError("train: got StepBatches without a batch, expected at least one")
        return batches
