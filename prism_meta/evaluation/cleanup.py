"""Clean-up of predicted labels: small or isolated components are removed, region by region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.data.labels import LabelSet
from prism_meta.data.restore import bounding_box

#: Volumes that differ by less than this share are equal: affines in float32 give 0.9999999 mm^3 for 1.
_ROUNDED = 1e-6


@dataclass(frozen=True)
class RegionRule:
    """What is removed from one region, in this order. A component is connected by 26 neighbours.

    Volumes are in ml, so that a rule does the same on every grid.

    Args:
        largest: only the largest component stays. Components of the same size all stay, because nothing
            says which of them is right.
        component_ml: components smaller than this are removed.
        total_ml: if what is left is smaller than this, all of it is removed.

    Example:
        >>> RegionRule(largest=True).removed([5, 3, 5], voxel=1.0).tolist()
        [False, True, False]
        >>> RegionRule(total_ml=0.01).removed([5, 3], voxel=1.0).tolist()  # 8 of 10 mm^3
        [True, True]
    """

    largest: bool = False
    component_ml: float = 0.0
    total_ml: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether it can remove anything."""
        return self != RegionRule()

    def removed(self, voxels: Sequence[int] | NDArray[Any], *, voxel: float) -> NDArray[np.bool_]:
        """Which components are removed.

        Args:
            voxels: number of voxels of each component.
            voxel: volume of a voxel in mm^3.
        """
        counts = np.asarray(voxels, dtype=np.int64)
        gone = np.zeros(len(counts), dtype=bool)
        if not len(counts):
            return gone
        if self.largest:
            gone |= counts < counts.max()
        gone |= counts * voxel < _least(self.component_ml)
        if counts[~gone].sum() * voxel < _least(self.total_ml):
            gone[:] = True
        return gone

    def __str__(self) -> str:
        parts = [
            *(["only the largest component"] if self.largest else []),
            *([f"no component under {self.component_ml:g} ml"] if self.component_ml else []),
            *([f"none if under {self.total_ml:g} ml"] if self.total_ml else []),
        ]
        return ", ".join(parts) or "as predicted"


@dataclass(frozen=True)
class Cleanup:
    """Rules by region, which change predicted class indices.

    Regions are cleaned in order of their number of classes, e.g. WT, then TC, then ET. The voxels of a
    removed component leave the region and all regions inside it. They get a class of the smallest region
    around it: a removed ET becomes the necrotic class of TC, a removed TC becomes oedema, and a removed WT
    becomes background. If the surrounding region has several such classes, the one that belongs to the
    fewest regions is taken, and then the first. Regions that only overlap do not surround each other.

    Args:
        rules: region -> rule. Regions without one stay as predicted.

    Example:
        >>> from prism_meta.data.labels import BRATS_LABELS
        >>> classes = torch.tensor([1, 3, 3, 0, 2, 0, 3], dtype=torch.uint8).reshape(7, 1, 1)
        >>> cleanup = Cleanup({"WT": RegionRule(largest=True), "ET": RegionRule(total_ml=0.003)})
        >>> cleanup(classes, BRATS_LABELS, voxel=1.0).flatten().tolist()
        [1, 1, 1, 0, 0, 0, 0]

    Source: nnU-Net (Isensee et al., Nature Methods 2021) keeps the largest component. RFNet (Ding et al.,
    ICCV 2021) removes a region below a volume.
    """

    rules: Mapping[str, RegionRule] = field(default_factory=dict)

    @property
    def is_on(self) -> bool:
        """Whether it can change anything."""
        return any(rule.is_on for rule in self.rules.values())

    def __call__(self, classes: Tensor, labels: LabelSet, *, voxel: float) -> Tensor:
        """The cleaned class indices.

        Args:
            classes: class indices, uint8 (D, H, W). They are not changed.
            labels: the classes and regions; regions without a rule, and rules of other regions, do nothing.
            voxel: volume of a voxel in mm^3.

        Returns:
            uint8 (D, H, W); ``classes`` itself if nothing is removed.
        """
        for region in outer_first(labels):
            rule = self.rules.get(region, RegionRule())
            if not rule.is_on:
                continue
            found = Components.of(labels.region(classes, region))
            gone = rule.removed(found.voxels, voxel=voxel)
            if gone.any():
                classes = classes.clone(memory_format=torch.contiguous_format)
                places = torch.from_numpy(found.flat[gone[found.component]]).to(classes.device)
                classes.view(-1)[places] = replacement(labels, region)
        return classes

    def __str__(self) -> str:
        return "; ".join(f"{name}: {rule}" for name, rule in self.rules.items() if rule.is_on)

    @staticmethod
    def common(cleanups: Sequence[Cleanup]) -> Cleanup:
        """What several clean-ups have in common: in each region the weakest of their rules.

        Args:
            cleanups: at least one clean-up.

        Example:
            >>> first = Cleanup({"WT": RegionRule(largest=True, total_ml=2.0)})
            >>> second = Cleanup({"WT": RegionRule(total_ml=0.5), "ET": RegionRule(largest=True)})
            >>> print(Cleanup.common([first, second]))
            WT: none if under 0.5 ml
        """
        regions = dict.fromkeys(name for cleanup in cleanups for name in cleanup.rules)
        rules = {}
        for name in regions:
            each = [cleanup.rules.get(name, RegionRule()) for cleanup in cleanups]
            rule = RegionRule(
                all(rule.largest for rule in each),
                min(rule.component_ml for rule in each),
                min(rule.total_ml for rule in each),
            )
            if rule.is_on:
                rules[name] = rule
        return Cleanup(rules)


#: The rule behind the column ETpp of BraTS tables: an enhancing tumour under 500 voxels of 1 mm is none.
BRATS_CLEANUP = Cleanup({"ET": RegionRule(total_ml=0.5)})


@dataclass(frozen=True)
class Components:
    """The connected components of a mask. Only their voxels are stored.

    Args:
        flat: (n,) long, flat indices of the n voxels of the mask.
        component: (n,) the component of each voxel, from 0.
        voxels: (c,) number of voxels of each component.
    """

    flat: NDArray[np.int64]
    component: NDArray[np.integer[Any]]
    voxels: NDArray[np.int64]

    @classmethod
    def of(cls, mask: Tensor) -> Components:
        """The components of bool (D, H, W), connected by 26 neighbours.

        Example:
            >>> Components.of(torch.tensor([True, True, False, True]).reshape(4, 1, 1)).voxels.tolist()
            [2, 1]
        """
        from scipy import ndimage

        box = bounding_box(mask)
        if box is None:
            nothing = np.zeros(0, dtype=np.int64)
            return cls(nothing, nothing, nothing)
        span = tuple(slice(*ends) for ends in box)
        inside = mask[span].cpu().numpy()
        # The 26 neighbours that connect lesions when they are counted.
        marked, count = ndimage.label(inside, ndimage.generate_binary_structure(3, 3))
        places = np.nonzero(inside)
        moved = tuple(place + start for place, (start, _) in zip(places, box, strict=True))
        component = marked[places] - 1
        voxels = np.bincount(component, minlength=count)
        return cls(np.ravel_multi_index(moved, tuple(mask.shape)), component, voxels)


def outer_first(labels: LabelSet) -> list[str]:
    """The regions, those with most classes first; equal ones keep their order.

    Example:
        >>> from prism_meta.data.labels import BRATS_LABELS
        >>> outer_first(BRATS_LABELS)
        ['WT', 'TC', 'ET']
    """
    return sorted(labels.regions, key=lambda name: -len(set(labels.regions[name])))


def replacement(labels: LabelSet, region: str) -> int:
    """The class index that removed voxels of a region become; see ``Cleanup``.

    Example:
        >>> from prism_meta.data.labels import BRATS_LABELS
        >>> [BRATS_LABELS.names[replacement(BRATS_LABELS, name)] for name in ("WT", "TC", "ET")]
        ['background', 'oedema', 'necrotic']
    """
    own = set(labels.regions[region])
    around = [classes for classes in labels.regions.values() if set(classes) > own]
    if not around:
        return 0
    nearest = min(around, key=lambda classes: len(set(classes)))
    others = [name for name in nearest if name not in own]
    return labels.names.index(
        min(others, key=lambda name: sum(name in classes for classes in labels.regions.values()))
    )


def _least(ml: float) -> float:
    """A volume in ml as mm^3, less the tolerance for rounding."""
    return ml * 1000 * (1 - _ROUNDED)
