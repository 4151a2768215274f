"""Episodes: a train and a meta batch of patches from disjoint cases, each with its own masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from prism_meta.data.masking import DynamicMask, MaskPolicy
from prism_meta.data.preprocessing import CachedCase
from prism_meta.errors import ConfigError, raise_faults
from prism_meta.modalities import Batch


class Augmentation:
    """Random flips, rotation and scaling, and intensity changes per modality, by MONAI.

    Args:
        spatial_dims: 2 or 3.
        probability: of rotation and scaling.
    """

    def __init__(self, spatial_dims: int, *, probability: float = 0.3) -> None:
        from monai.transforms.compose import Compose
        from monai.transforms.intensity.dictionary import (
            RandAdjustContrastd,
            RandGaussianNoised,
            RandScaleIntensityd,
            RandShiftIntensityd,
        )
        from monai.transforms.spatial.dictionary import RandAffined, RandFlipd

        keys, axes = ("image", "target"), range(spatial_dims)
        turn = 0.26  # radians, 15 degrees
        self._transform: Any = Compose(
            [
                *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in axes),
                RandAffined(
                    keys,
                    prob=probability,
                    rotate_range=[turn] * (1 if spatial_dims == 2 else 3),
                    scale_range=[0.15] * spatial_dims,
                    mode=("bilinear", "nearest"),
                    padding_mode="zeros",
                ),
                RandScaleIntensityd("image", factors=0.2, prob=0.8, channel_wise=True),
                RandShiftIntensityd("image", offsets=0.2, prob=0.8, channel_wise=True),
                RandAdjustContrastd("image", gamma=(0.7, 1.5), prob=0.2, retain_stats=True),
                RandGaussianNoised("image", std=0.1, prob=0.2),
            ]
        )

    def seed(self, seed: int) -> None:
        """Start anew; it costs more than a patch, so do it once per episode."""
        self._transform.set_random_state(seed=seed)

    def __call__(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Change image (M, *S) and target (*S) together."""
        with _without_metadata():
            out = self._transform({"image": image, "target": target[None].float()})
        return out["image"].float(), out["target"][0].round().long()


class Episodes(Dataset[tuple[Batch, Batch]]):
    """Episode t of a training run: D_train and D_meta, from disjoint cases, each with its own masks.

    Everything random in episode t comes from (seed, rank, t), so that a resumed run sees the same
    episodes, in whatever number of worker processes.

    Args:
        cases: prepared cases, at least two.
        patch: size in voxels, two numbers for axial slices, three for volumes.
        batch_size: B of each of the two batches.
        steps: number of episodes.
        train_mask: what is shown of D_train.
        meta_mask: what is shown of D_meta.
        foreground: share of patches centred on a foreground class; the others lie in the brain.
        augmentation: of every patch, or None.
        seed: of everything.
        rank: of this process; each process draws other episodes.

    Raises:
        ConfigError: the patch is larger than a volume, or there are too few cases for two batches.

    Source: Meta-Drop of PRISM. The default is dynamic masks in both batches.
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
        foreground: float = 0.67,
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
        self._pools(torch.Generator().manual_seed(0))  # raises where no episode can be drawn

    def _faults(self) -> list[str]:
        faults = [
            f"patch {self.size[: 2 if self.squeeze else 3]} is larger than the volume of case {case.id}, "
            f"{case.shape} voxels at the model's spacing; use a smaller data.patch or a finer data.spacing"
            for case in self.cases
            if any(p > s for p, s in zip(self.size, case.shape, strict=True))
        ]
        if len(self.cases) < 2:
            faults.append(
                f"{len(self.cases)} training case: an episode needs at least 2, for its train and its "
                "meta batch are drawn from different cases; add cases or hold fewer out"
            )
        return faults

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Batch, Batch]:
        entropy = np.random.SeedSequence((self.seed, self.rank, step))
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        random = np.random.RandomState(entropy.generate_state(2)[1])
        if self.augmentation is not None:
            self.augmentation.seed(random.randint(2**31))
        train, meta = self._pools(generator)
        return (
            self._batch(train, self.train_mask, generator, random),
            self._batch(meta, self.meta_mask, generator, random),
        )

    def _pools(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two disjoint halves of the cases, each fit for its policy, in random order."""
        order = torch.randperm(len(self.cases), generator=generator)
        fit_meta = order[self.meta_mask.eligible(self.availability[order])]
        meta = fit_meta[: len(self.cases) // 2]
        rest = order[~torch.isin(order, meta)]
        train = rest[self.train_mask.eligible(self.availability[rest])]
        if not len(train):
            # The meta half has taken every case that fits the train mask: share them.
            both = meta[self.train_mask.eligible(self.availability[meta])]
            train = both[: -(-len(both) // 2)]
            meta = fit_meta[~torch.isin(fit_meta, train)][: len(self.cases) // 2]
        if not len(meta) or not len(train):
            raise ConfigError(
                f"masks: no episode can be drawn: {len(train)} cases fit the train mask and {len(meta)} "
                "others the meta mask; the full policy needs complete cases, use dynamic instead"
            )
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
        return Batch(torch.stack(images), mask, torch.stack(targets), tuple(c.id for c in cases))

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
        (centre,) = generate_label_classes_crop_centers(
            self.size, 1, case.shape, centres, ratios, random, warn=False
        )
        corner = [c - s // 2 for c, s in zip(centre, self.size, strict=True)]
        image, target = case.patch(corner, self.size, shown)
        if self.squeeze:
            image, target = image[..., 0], target[..., 0]
        if self.augmentation is not None:
            image, target = self.augmentation(image, target)
        return image, target


@contextmanager
def _without_metadata() -> Iterator[None]:
    """MONAI's record of what was done to a tensor takes a third of the time of an episode."""
    from monai.data.meta_obj import get_track_meta, set_track_meta

    tracked = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(tracked)
