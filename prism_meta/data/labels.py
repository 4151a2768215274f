"""Label sets: the values in label files, the classes of the model, and the regions to report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.errors import CaseError, Fault, one_line, raise_faults

#: Name of class 0, which has value 0 in label files.
BACKGROUND = "background"
#: Class indices are stored as uint8.
MAX_CLASSES = 255
#: Label values this close to a whole number are that number.
_ROUNDED = 1e-3
#: The largest value that label files hold: int32.
MAX_VALUE = 2**31 - 1


@dataclass(frozen=True)
class LabelSet:
    """Maps the values in label files to class indices, and classes to the regions to report.

    Args:
        values: class name -> value in the label files. The order gives the class indices 1, 2, ...;
            value 0 is always the background, class 0.
        regions: region name -> names of its classes. Defaults to one region per class.

    Raises:
        CaseError: a value is no whole number from 1 to ``MAX_VALUE`` or is used twice; there are more
            than ``MAX_CLASSES`` classes; a class is named "background"; a region has no classes or
            names an unknown one; or a name is empty.

    Example:
        >>> lesion = LabelSet({"lesion": 1})
        >>> lesion.names, lesion.regions
        (('background', 'lesion'), {'lesion': ('lesion',)})
    """

    values: Mapping[str, int]
    regions: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = [*self._value_faults(), *self._name_faults()]
        for region, classes in self.regions.items():
            if not classes:
                faults.append(
                    f"region {region!r}: has no classes; name at least one of {', '.join(self.values)}"
                )
            for name in sorted(set(classes) - set(self.values)):
                faults.append(
                    f"region {region!r}: unknown class {name!r}; use some of {', '.join(self.values)}"
                )
        raise_faults(CaseError, faults)
        regions = {r: tuple(c) for r, c in self.regions.items()} or {n: (n,) for n in self.values}
        object.__setattr__(self, "regions", regions)

    def _value_faults(self) -> Iterator[str]:
        values = list(self.values.values())
        if not values:
            yield "labels: none given; name at least one class, e.g. {'lesion': 1}"
        if len(values) > MAX_CLASSES:
            yield (
                f"labels: got {len(values)} classes, expected at most {MAX_CLASSES}; merge some of them"
            )
            return
        whole = all(isinstance(v, Integral) and not isinstance(v, bool) for v in values)
        if not whole or any(v < 1 for v in values) or len(set(values)) < len(values):
            yield (
                f"labels: got {dict(self.values)}; give each class its own value >= 1 (0 is background)"
            )
        elif max(values, default=1) > MAX_VALUE:
            yield (
                f"labels: got the value {max(values)}, expected at most {MAX_VALUE}, the largest that "
                "label files hold; use smaller values"
            )

    def _name_faults(self) -> Iterator[str]:
        for kind, names in (("class", self.values), ("region", self.regions)):
            for name in names:
                if not name.strip() or one_line(name) != name:
                    yield (
                        f"{kind} {name!r}: is empty or has control characters; give it a name that "
                        "tables can hold"
                    )
        if BACKGROUND in self.values:
            yield (
                f"class {BACKGROUND!r}: is value 0 in every label set; leave it out or give it another "
                "name"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by index; 0 is the background."""
        return (BACKGROUND, *self.values)

    def encode(self, label: NDArray[Any]) -> Tensor:
        """Convert the values of a label file to class indices.

        Args:
            label: values, any shape. Those within 1e-3 of a whole number count as that number, because
                scaled files hold 1.00002 for 1.

        Returns:
            uint8 class indices, the same shape.

        Raises:
            CaseError: a value is not in the label set.
        """
        lookup = {0: 0, **{value: k for k, value in enumerate(self.values.values(), start=1)}}
        if label.dtype.kind == "f":
            whole = np.rint(label)
            with np.errstate(invalid="ignore"):  # infinity minus itself
                near = np.abs(label - whole) <= _ROUNDED
            label = np.where(near, whole, label)  # others keep their value for the message
        found = np.unique(label)
        unknown = [v for v in found.tolist() if v not in lookup]
        if unknown:
            known = ", ".join(f"{value}: {name}" for name, value in self.values.items())
            message = (
                f"label values {', '.join(_shown(v) for v in unknown[:5])} are not in the label set "
                f"{{0: background, {known}}}; correct the file or the label set"
            )
            raise CaseError([Fault(message, "labels")])
        classes = np.zeros(label.shape, np.uint8)
        for value, index in lookup.items():
            classes[label == value] = index
        return torch.from_numpy(classes)

    def decode(self, classes: Tensor) -> NDArray[Any]:
        """Convert class indices, any shape, to the values of label files.

        Args:
            classes: class indices, 0 for the background.

        Returns:
            int16; int32 if a value of the label set needs it.
        """
        largest = max(self.values.values())
        dtype = np.int16 if largest <= np.iinfo(np.int16).max else np.int32
        table = np.array([0, *self.values.values()], dtype)
        decoded: NDArray[Any] = table[classes.cpu().numpy().astype(np.int64)]
        return decoded

    def region(self, classes: Tensor, name: str) -> Tensor:
        """Return where class indices ``classes`` belong to region ``name``: bool, the same shape."""
        wanted = [self.names.index(n) for n in self.regions[name]]
        return torch.isin(classes, torch.tensor(wanted, device=classes.device, dtype=classes.dtype))


def _shown(value: float) -> str:
    """A label value as a user writes it: whole numbers have no exponent."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:g}"


#: BraTS 2018-2021: 1 necrotic and non-enhancing core, 2 oedema, 4 enhancing tumour.
BRATS_LABELS = LabelSet(
    {"necrotic": 1, "oedema": 2, "enhancing": 4},
    {
        "WT": ("necrotic", "oedema", "enhancing"),
        "TC": ("necrotic", "enhancing"),
        "ET": ("enhancing",),
    },
)
