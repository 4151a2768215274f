"""What to expect of a prediction: the Dice that the validation cases had from the same modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism_meta.errors import PrismError
from prism_meta.modalities import subset_name
from prism_meta.training.folder.weights import Kind
from prism_meta.training.run import Run


@dataclass(frozen=True)
class Expected:
    """The Dice of the validation cases by subset of modalities, on the model's grid.

    Args:
        modalities: names of the M modalities.
        dice: subset -> mean over cases and regions, in [0, 1]; without subsets that no case had.

    Example:
        >>> expected = Expected(("flair", "t1"), {"t1": 0.4, "flair": 0.6, "flair+t1": 0.7})
        >>> expected.of([False, True]), expected.best_addition([False, True])
        (0.4, ('flair', 0.3))
        >>> expected.best_addition([True, True]) is None
        True
    """

    modalities: tuple[str, ...]
    dice: Mapping[str, float]

    @classmethod
    def of_run(cls, run: Run, weights: Kind | None = None) -> Expected | None:
        """What the validation of a run measured with the weights that a prediction uses.

        Args:
            run: a run whose training has ended.
            weights: see ``Run.load_model``.

        Raises:
            PrismError: the log of the run is damaged.
        """
        lines = {line["step"]: line["validation"] for line in run.history() if "validation" in line}
        if not lines:
            return None
        kind = weights or run.kinds[0]
        try:
            last = max(lines)
            best = lines[last]["best"]
            step, key = (best["step"], best["weights"]) if kind == "best" else (last, kind)
            dice = {str(name): float(value) for name, value in lines[step][key]["subsets"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PrismError(
                f"{run.metrics}: has a validation of another form; restore the file, or delete it to "
                "predict without the expected Dice"
            ) from error
        return cls(run.config.data.modalities, dice)

    def of(self, shown: Sequence[bool]) -> float | None:
        """The Dice from these modalities; None if no validation case had all of them."""
        return self.dice.get(subset_name(list(shown), self.modalities))

    def best_addition(self, shown: Sequence[bool]) -> tuple[str, float] | None:
        """The missing modality that would raise Dice most, and by how much; None if none would."""
        now = self.of(shown)
        gains = {}
        for place, name in enumerate(self.modalities):
            more = self.of([*shown[:place], True, *shown[place + 1 :]])
            if now is not None and more is not None and not shown[place] and more > now:
                gains[name] = round(more - now, 6)
        best = max(gains, key=gains.__getitem__, default=None)
        return None if best is None else (best, gains[best])
