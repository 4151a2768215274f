"""Meta-Drop's episodes: train and meta batches of patches, from disjoint patients with their own masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from prism_meta.data.augmentation import Augmentation
from prism_meta.data.cache import CachedCase
from prism_meta.data.drawing import DEFAULT_FOREGROUND, Drawn, DrawnEpisodes
from prism_meta.data.following_masks import FollowsLosses
from prism_meta.data.masking import DynamicMask, MaskPolicy
from prism_meta.data.subset_masks import ChoosesCases, held
from prism_meta.errors import ConfigError, Fault


class Episodes(DrawnEpisodes):
    """The episodes of a training run. Item t is the pair (D_train, D_meta) of episode t.

    The batches of D_train and D_meta come from disjoint patients, and each batch has its own masks. All
    random numbers of episode t depend only on (seed, rank, t), so a resumed run sees the same episodes,
    with any number of worker processes. A ``HardMask`` depends on its losses, too.

    Args:
        cases: cached cases of at least two patients.
        patch: patch size in voxels: two numbers for slices, three for volumes. A smaller volume is
            padded with zeros at both ends, and ``Batch.valid`` excludes the padding.
        batch_size: number of patches B in each batch.
        steps: number of episodes.
        inner_steps: number K of train batches per episode. D_train is a ``Batch`` for K = 1, and
            otherwise ``StepBatches``, one batch for each inner step. Defaults to 1.
        train_mask: mask policy of D_train. Defaults to ``DynamicMask()``.
        meta_mask: mask policy of D_meta. Defaults to ``DynamicMask()``.
        foreground: share of patches that are centred on a foreground class. The others are centred
            on any brain voxel. Defaults to 0.5.
        augmentation: applied to every patch. Defaults to None.
        seed: random seed of the episodes.
        rank: index of this process. Each process draws different episodes.

    Raises:
        ConfigError: there are fewer than two patients, or too few cases fit the mask policies.

    Source: Meta-Drop of PRISM.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        *,
        patch: Sequence[int],
        batch_size: int,
        steps: int,
        inner_steps: int = 1,
        train_mask: MaskPolicy | None = None,
        meta_mask: MaskPolicy | None = None,
        foreground: float = DEFAULT_FOREGROUND,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        super().__init__(
            cases,
            patch=patch,
            batch_size=batch_size,
            steps=steps,
            inner_steps=inner_steps,
            foreground=foreground,
            augmentation=augmentation,
            seed=seed,
            rank=rank,
        )
        self.train_mask, self.meta_mask = train_mask or DynamicMask(), meta_mask or DynamicMask()
        self.draw(Generator().manual_seed(0), 0)  # raises if no episode can be drawn

    @property
    def follows_losses(self) -> bool:
        """Whether a mask policy does, e.g. ``HardMask``. Its state is then a part of every episode."""
        return bool(self._followers)

    def observe(self, mask: Tensor, losses: Tensor) -> None:
        """Tell policies that follow losses the ``losses`` (B,) of samples that were shown ``mask`` (B, M)."""
        for policy in self._followers.values():
            policy.observe(mask, losses)

    def state_dict(self) -> dict[str, Tensor]:
        """The states of the policies that follow losses."""
        return {
            f"{name}.{key}": value
            for name, policy in self._followers.items()
            for key, value in policy.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore ``state_dict`` (``state``)."""
        for name, policy in self._followers.items():
            keys = policy.state_dict()
            policy.load_state_dict({key: state[f"{name}.{key}"] for key in keys})

    @property
    def _followers(self) -> dict[str, FollowsLosses]:
        """The policies that follow losses, once if it is one for both batches."""
        found = {"train": self.train_mask, "meta": self.meta_mask}
        if self.meta_mask is self.train_mask:
            del found["meta"]
        return {name: p for name, p in found.items() if isinstance(p, FollowsLosses)}

    def draw(self, generator: Generator, step: int) -> tuple[list[Drawn], Drawn]:
        count = self.inner_steps
        to_train = self._walk(self.train_mask, self.availability, step * count, count, walk=0)
        to_meta = self._walk(self.meta_mask, self.meta_availability, step, 1, walk=1)
        train, meta = self._split_cases(generator, to_train, to_meta)
        train_batches = self._masked(
            train, self.availability, self.train_mask, count, to_train, generator
        )
        meta_batches = self._masked(
            meta, self.meta_availability, self.meta_mask, 1, to_meta, generator
        )
        return train_batches, meta_batches[0]

    def _walk(
        self, policy: MaskPolicy, availability: Tensor, start: int, count: int, *, walk: int
    ) -> Tensor:
        """The subsets (count, M) that a policy wants its next batches to show; none for most policies."""
        if not isinstance(policy, ChoosesCases):
            return availability[:0]
        return policy.walk(availability, start, count, seed=(self.seed, self.rank, walk))

    def _masked(
        self,
        pool: Tensor,
        availability: Tensor,
        policy: MaskPolicy,
        count: int,
        shown: Tensor,
        generator: Generator,
    ) -> list[Drawn]:
        """``count`` batches of the cases in ``pool``; ``shown`` has the subsets of a walk."""
        if isinstance(policy, ChoosesCases):
            chosen = policy.batches(availability[pool], self.batch_size, shown, generator)
            return [Drawn(pool[rows], mask) for rows, mask in chosen]
        # Every case is drawn before one is drawn again.
        rounds = -(-self.batch_size * count // len(pool))
        rows = pool.repeat(rounds)[: self.batch_size * count].view(count, self.batch_size)
        return [Drawn(one, policy(availability[one], generator)) for one in rows]

    def _split_cases(
        self, generator: Generator, to_train: Tensor, to_meta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Indices of the cases of disjoint patients, eligible for each mask policy, in random order.

        Args:
            generator: source of the random numbers.
            to_train: subsets (S, M) that some case of D_train should have, as far as possible.
            to_meta: the same of D_meta.
        """
        order = torch.randperm(len(self.cases), generator=generator)
        last = torch.isin(self.patients[order], self._holders(order, self.availability, to_train))
        first = ~last & torch.isin(
            self.patients[order], self._holders(order, self.meta_availability, to_meta)
        )
        # D_meta takes the first half of the patients.
        order = torch.cat([order[first], order[~first & ~last], order[last]])
        fit_meta = order[self.meta_mask.eligible(self.meta_availability[order])]
        meta = self._half(fit_meta)
        rest = self._without(order, meta)
        train = rest[self.train_mask.eligible(self.availability[rest])]
        if not len(train):
            # The meta set took every case that is eligible for the train mask. Divide them.
            both = meta[self.train_mask.eligible(self.availability[meta])]
            patients = self._patients_of(both)
            train = both[torch.isin(self.patients[both], patients[: -(-len(patients) // 2)])]
            meta = self._half(self._without(fit_meta, train))
        if not len(meta) or not len(train):
            message = (
                f"no episode can be drawn: {len(train)} cases fit the train mask and {len(meta)} "
                "others fit the meta mask; a full mask needs complete cases, use a dynamic one instead"
            )
            raise ConfigError([Fault(message, "train_mask", "meta_mask")])
        return train, meta

    def _holders(self, order: Tensor, availability: Tensor, wanted: Tensor) -> Tensor:
        """Few patients, early ones in ``order``, who together have all ``wanted`` subsets (S, M)."""
        found: list[int] = []
        for subset in sorted(wanted, key=lambda row: -int(row.sum())):
            having = self.patients[order[held(subset[None], availability[order])[0]]].tolist()
            if not set(having) & set(found):
                found += having[:1]
        return torch.tensor(found, dtype=torch.long)

    def _half(self, pool: Tensor) -> Tensor:
        """The cases in ``pool`` of at most half of all patients, the first ones there."""
        chosen = self._patients_of(pool)[: len(self.patients.unique()) // 2]
        return pool[torch.isin(self.patients[pool], chosen)]

    def _without(self, pool: Tensor, others: Tensor) -> Tensor:
        """The cases in ``pool`` of patients that have none in ``others``."""
        return pool[~torch.isin(self.patients[pool], self.patients[others])]

    def _patients_of(self, pool: Tensor) -> Tensor:
        """The patients of the cases in ``pool``, in the order of their first case."""
        return torch.tensor(list(dict.fromkeys(self.patients[pool].tolist())), dtype=torch.long)
