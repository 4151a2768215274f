"""Episodes: a train batch and a meta batch of patches, from disjoint cases with their own masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from prism_meta.data.augmentation import Augmentation
from prism_meta.data.cache import CachedCase
from prism_meta.data.masking import DynamicMask, MaskPolicy
from prism_meta.errors import ConfigError, Fault, raise_faults
from prism_meta.modalities import Batch

#: Default share of patches that are centred on a foreground class.
DEFAULT_FOREGROUND = 0.5
#: Target of padding until the batch is complete. It is no class, and augmentation moves it with the rest.
_PADDING = -1


class Episodes(Dataset[tuple[Batch, Batch]]):
    """The episodes of a training run. Item t is the pair of batches (D_train, D_meta) of episode t.

    The two batches come from disjoint cases, and each has its own masks. All random numbers of
    episode t depend only on (seed, rank, t), so a resumed run sees the same episodes, with any
    number of worker processes.

    Args:
        cases: cached cases, at least two.
        patch: patch size in voxels: two numbers for slices, three for volumes. A smaller volume is
            padded with zeros at both ends, and ``Batch.valid`` excludes the padding.
        batch_size: number of patches B in each of the two batches.
        steps: number of episodes.
        train_mask: mask policy of D_train. Defaults to ``DynamicMask()``.
        meta_mask: mask policy of D_meta. Defaults to ``DynamicMask()``.
        foreground: share of patches that are centred on a foreground class. The others are centred
            on any brain voxel. Defaults to 0.5.
        augmentation: applied to every patch. Defaults to None.
        seed: random seed of the episodes.
        rank: index of this process. Each process draws different episodes.

    Raises:
        ConfigError: there are fewer than two cases, or too few cases fit the mask policies.

    Source: Meta-Drop of PRISM.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        *,
        patch: Sequence[int],
        batch_size: int,
        steps: int,
        train_mask: MaskPolicy | None = None,
        meta_mask: MaskPolicy | None = None,
        foreground: float = DEFAULT_FOREGROUND,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        self.cases = list(cases)
        self.size = tuple(patch) if len(patch) == 3 else (*patch, 1)
        self.squeeze = len(patch) == 2
        self.batch_size, self.steps = batch_size, steps
        self.train_mask, self.meta_mask = train_mask or DynamicMask(), meta_mask or DynamicMask()
        self.foreground, self.augmentation = foreground, augmentation
        self.seed, self.rank = seed, rank
        raise_faults(ConfigError, self._faults())
        self.availability = torch.stack([case.availability for case in self.cases])
        self._centres: dict[str, list[Tensor]] = {}
        self._split_cases(torch.Generator().manual_seed(0))  # raises if no episode can be drawn

    def _faults(self) -> list[Fault]:
        if len(self.cases) >= 2:
            return []
        found = f"{len(self.cases)} training case{'' if len(self.cases) == 1 else 's'}"
        message = (
            f"{found}: an episode needs at least 2, because its train and meta batch come from "
            "different cases; add cases or hold fewer out"
        )
        return [Fault(message, "holdout")]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Batch, Batch]:
        entropy = np.random.SeedSequence((self.seed, self.rank, step))
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        random = np.random.RandomState(entropy.generate_state(2)[1])
        if self.augmentation is not None:
            self.augmentation.seed(random.randint(2**31))
        train, meta = self._split_cases(generator)
        return (
            self._batch(train, self.train_mask, generator, random),
            self._batch(meta, self.meta_mask, generator, random),
        )

    def _split_cases(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices of two disjoint sets of cases, each eligible for its mask policy, in random order."""
        order = torch.randperm(len(self.cases), generator=generator)
        fit_meta = order[self.meta_mask.eligible(self.availability[order])]
        meta = fit_meta[: len(self.cases) // 2]
        rest = order[~torch.isin(order, meta)]
        train = rest[self.train_mask.eligible(self.availability[rest])]
        if not len(train):
            # The meta set took every case that is eligible for the train mask. Divide them.
            both = meta[self.train_mask.eligible(self.availability[meta])]
            train = both[: -(-len(both) // 2)]
            meta = fit_meta[~torch.isin(fit_meta, train)][: len(self.cases) // 2]
        if not len(meta) or not len(train):
            message = (
                f"no episode can be drawn: {len(train)} cases fit the train mask and {len(meta)} "
                "others fit the meta mask; a full mask needs complete cases, use a dynamic one instead"
            )
            raise ConfigError([Fault(message, "train_mask", "meta_mask")])
        return train, meta

    def _batch(
        self,
        pool: Tensor,
        policy: MaskPolicy,
        generator: torch.Generator,
        random: np.random.RandomState,
    ) -> Batch:
        rounds = -(-self.batch_size // len(pool))
        chosen = pool.repeat(rounds)[: self.batch_size]
        mask = policy(self.availability[chosen], generator)
        cases = [self.cases[i] for i in chosen.tolist()]
        patches = [self._patch(c, shown, random) for c, shown in zip(cases, mask, strict=True)]
        images, targets = zip(*patches, strict=True)
        target = torch.stack(targets)
        padding = target == _PADDING
        return Batch(
            torch.stack(images),
            mask,
            target.masked_fill(padding, 0),
            tuple(c.id for c in cases),
            ~padding if padding.any() else None,
        )

    def _patch(
        self, case: CachedCase, shown: Tensor, random: np.random.RandomState
    ) -> tuple[Tensor, Tensor]:
        from monai.transforms.utils import generate_label_classes_crop_centers

        if case.id not in self._centres:
            self._centres[case.id] = case.centres()
        centres = self._centres[case.id]
        classes = [len(c) > 0 for c in centres[1:]]
        share = self.foreground / max(1, sum(classes))
        ratios = [1 - self.foreground if any(classes) else 1.0, *(share * c for c in classes)]
        size = [min(p, s) for p, s in zip(self.size, case.shape, strict=True)]
        (centre,) = generate_label_classes_crop_centers(
            size, 1, case.shape, centres, ratios, random, warn=False
        )
        corner = [c - s // 2 for c, s in zip(centre, size, strict=True)]
        image, target = case.patch(corner, size, shown=shown)
        image, target = _padded(image, self.size, 0), _padded(target, self.size, _PADDING)
        if self.squeeze:
            image, target = image[..., 0], target[..., 0]
        if self.augmentation is not None:
            image, target = self.augmentation(image, target)
        return image, target


def _padded(maps: Tensor, size: Sequence[int], value: int) -> Tensor:
    """Pad the last axes to ``size`` at both ends, as MONAI's sliding window does in prediction."""
    ends: list[int] = []
    for wanted, there in zip(reversed(size), reversed(maps.shape), strict=False):
        ends += [(wanted - there) // 2, (wanted - there + 1) // 2]
    return pad(maps, ends, value=value) if any(ends) else maps
