"""What label files hold: values, the classes they become, and the regions that are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.errors import CaseError, raise_faults


@dataclass(frozen=True)
class LabelSet:
    """Which label values a file holds, the classes they become, and the regions to report.

    Args:
        values: class name -> value in the label file; 0 is always the background, class 0.
        regions: region name -> names of its classes; one region per class unless given.

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
        """Values of a file to class indices, uint8; an unknown value raises ``CaseError``."""
        lookup = {0: 0, **{value: k for k, value in enumerate(self.values.values(), start=1)}}
        found = np.unique(label)
        unknown = [v for v in found.tolist() if v not in lookup]
        if unknown:
            raise CaseError(
                f"label values {', '.join(f'{v:g}' for v in unknown[:5])} are not in the label set "
                f"{{0: background, {', '.join(f'{v}: {n}' for n, v in self.values.items())}}}; "
                "mend the file or set data.labels"
            )
        classes = np.zeros(label.shape, np.uint8)
        for value, index in lookup.items():
            classes[label == value] = index
        return torch.from_numpy(classes)

    def decode(self, classes: Tensor) -> NDArray[np.int16]:
        """Class indices to the values that label files hold."""
        table = np.array([0, *self.values.values()], np.int16)
        decoded: NDArray[np.int16] = table[classes.cpu().numpy().astype(np.int64)]
        return decoded

    def region(self, classes: Tensor, name: str) -> Tensor:
        """Where class indices belong to region ``name``: bool, the same shape."""
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
