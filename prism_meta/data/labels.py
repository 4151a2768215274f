"""Label sets: the values in label files, the classes of the model, and the regions to report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.errors import CaseError, Fault, raise_faults


@dataclass(frozen=True)
class LabelSet:
    """Maps the values in label files to class indices, and classes to the regions to report.

    Args:
        values: class name -> value in the label files. The order gives the class indices 1, 2, ...;
            value 0 is always the background, class 0.
        regions: region name -> names of its classes. Defaults to one region per class.

    Raises:
        CaseError: a value is 0 or used twice, or a region names an unknown class.

    Example:
        >>> lesion = LabelSet({"lesion": 1})
        >>> lesion.names, lesion.regions
        (('background', 'lesion'), {'lesion': ('lesion',)})
    """

    values: Mapping[str, int]
    regions: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = []
        if not self.values:
            faults.append("labels: none given; name at least one class, e.g. {'lesion': 1}")
        if any(v < 1 for v in self.values.values()) or len(set(self.values.values())) < len(
            self.values
        ):
            faults.append(
                f"labels: got {dict(self.values)}; give each class its own value >= 1 (0 is background)"
            )
        for region, classes in self.regions.items():
            for name in set(classes) - set(self.values):
                faults.append(
                    f"region {region!r}: unknown class {name!r}; use some of {', '.join(self.values)}"
                )
        raise_faults(CaseError, faults)
        regions = {r: tuple(c) for r, c in self.regions.items()} or {n: (n,) for n in self.values}
        object.__setattr__(self, "regions", regions)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by index; 0 is the background."""
        return ("background", *self.values)

    def encode(self, label: NDArray[Any]) -> Tensor:
        """Convert the values of a label file to class indices.

        Args:
            label: values, any shape.

        Returns:
            uint8 class indices, the same shape.

        Raises:
            CaseError: a value is not in the label set.
        """
        lookup = {0: 0, **{value: k for k, value in enumerate(self.values.values(), start=1)}}
        found = np.unique(label)
        unknown = [v for v in found.tolist() if v not in lookup]
        if unknown:
            known = ", ".join(f"{value}: {name}" for name, value in self.values.items())
            message = (
                f"label values {', '.join(f'{v:g}' for v in unknown[:5])} are not in the label set "
                f"{{0: background, {known}}}; correct the file or the label set"
            )
            raise CaseError([Fault(message, "labels")])
        classes = np.zeros(label.shape, np.uint8)
        for value, index in lookup.items():
            classes[label == value] = index
        return torch.from_numpy(classes)

    def decode(self, classes: Tensor) -> NDArray[np.int16]:
        """Convert class indices, any shape, to the values of label files, int16."""
        table = np.array([0, *self.values.values()], np.int16)
        decoded: NDArray[np.int16] = table[classes.cpu().numpy().astype(np.int64)]
        return decoded

    def region(self, classes: Tensor, name: str) -> Tensor:
        """Return where class indices belong to region ``name``: bool, the same shape."""
        wanted = [self.names.index(n) for n in self.regions[name]]
        return torch.isin(classes, torch.tensor(wanted, device=classes.device, dtype=classes.dtype))


#: BraTS 2018-2021: 1 necrotic and non-enhancing core, 2 oedema, 4 enhancing tumour.
BRATS_LABELS = LabelSet(
    {"necrotic": 1, "oedema": 2, "enhancing": 4},
    {
        "WT": ("necrotic", "oedema", "enhancing"),
        "TC": ("necrotic", "enhancing"),
        "ET": ("enhancing",),
    },
)
