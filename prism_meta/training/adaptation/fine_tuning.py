"""Adapting a trained model to a few labelled cases of one site, which all show one subset of modalities."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prism_meta.bilevel.strategies import Objective, SingleLevel
from prism_meta.data.augmentation import Augmentation
from prism_meta.data.cache import CachedCase
from prism_meta.data.drawing import DEFAULT_FOREGROUND
from prism_meta.data.labels import LabelSet
from prism_meta.data.support import SupportEpisodes
from prism_meta.evaluation.windows import OVERLAP
from prism_meta.training.adaptation.choice import Choice, HeldOut, Setting, choose
from prism_meta.training.fit import OnStep, fit
from prism_meta.training.folder.weights import load_weights, weights_file
from prism_meta.training.validation.one_subset import OneSubsetValidation

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

#: Rates and numbers of steps that are tried on held-out cases.
RATES = (3e-4, 1e-3, 3e-3)
LENGTHS = (10, 20, 40)
#: Of one patient, who leaves nothing to hold out. In trials with one case (2-D slices, U-Net) it was the best
#: of three settings; 40 steps of 3e-3 were worse than not adapting. See ``benchmarks/adaptation.py``.
DEFAULT = Setting(5e-4, 20)
#: Decay of the moving average of the weights: it counts the last ten steps or so.
AVERAGE = 0.9
#: More held-out groups than this would only take longer; more patients are held out several at a time.
MOST_GROUPS = 10

#: Called with the steps that are done, their number, and a note.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Adapter:
    """Fine-tunes all weights of a model with Adam on patches of support cases, all showing one subset.

    A constant rate, and a moving average of the weights. ``choose`` finds the rate and the number of steps
    by holding out one patient after the other; ``train`` adapts.

    Args:
        subset: bool (M,), what the cases show; other modalities are not read.
        objective: ``objective(forward, batch)``.
        modalities: names of the M modalities, in the model's order.
        labels: classes and regions, in which Dice is measured.
        patch: in voxels; two numbers for slices, three for volumes.
        batch_size: patches per step.
        foreground: see ``Episodes``.
        augment: whether patches are augmented.
        overlap: of the windows in which held-out cases are predicted, in [0, 1).
        clip_norm: largest norm of the gradient.
        seed: of patches and dropout.
        fabric: a device, launched. Defaults to one device.

    Example:
        >>> import tempfile
        >>> import prism_meta as pm
        >>> from prism_meta.data.cache import prepare
        >>> from prism_meta.data.phantom import write_phantoms
        >>> folder = tempfile.mkdtemp()
        >>> _ = write_phantoms(folder, [[True] * 4] * 2, shape=(40, 48, 36), spacing=4.0)
        >>> support = prepare(
        ...     pm.load_cases(folder), folder + "/cache", preprocessing=pm.Preprocessing((4.0, 4.0, 4.0)),
        ...     labels=pm.BRATS_LABELS,
        ... )
        >>> adapter = Adapter(
        ...     pm.subset("flair+t1"), pm.PrismObjective(), pm.BRATS, pm.BRATS_LABELS, patch=(32, 32)
        ... )
        >>> model = pm.PrismNet(spatial_dims=2, width=2)
        >>> choice = adapter.choose(model, support, rates=(1e-3,), lengths=(1, 2))
        >>> adapted, log = adapter.train(model, support, Setting(1e-3, 2))
        >>> len(choice.compared), len(log)
        (2, 2)
    """

    subset: Tensor
    objective: Objective
    modalities: Sequence[str]
    labels: LabelSet
    patch: Sequence[int] = field(kw_only=True)
    batch_size: int = field(default=8, kw_only=True)
    foreground: float = field(default=DEFAULT_FOREGROUND, kw_only=True)
    augment: bool = field(default=True, kw_only=True)
    overlap: float = field(default=OVERLAP, kw_only=True)
    clip_norm: float | None = field(default=5.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    fabric: Fabric | None = field(default=None, kw_only=True)

    def train(
        self,
        model: nn.Module,
        cases: Sequence[CachedCase],
        setting: Setting,
        *,
        folder: Path | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[nn.Module, list[dict[str, Any]]]:
        """Adapt a copy of ``model`` to all of ``cases``.

        Args:
            model: it is not changed.
            cases: support cases, at least one.
            setting: rate and number of steps.
            folder: gets ``metrics.jsonl`` and ``weights``, see ``fit``. Defaults to no files.
            on_step: see ``fit``.

        Returns:
            The copy with the averaged weights, in evaluation mode, and the log of the steps.

        Raises:
            ConfigError: a case lacks a modality of the subset.
            PrismError: a loss is not finite.
        """
        with TemporaryDirectory() as temporary:
            place = Path(temporary) if folder is None else folder
            adapted, log = self._fit(model, cases, setting, folder=place, on_step=on_step)
            load_weights(weights_file(place, "ema"), adapted)
        return adapted, log

    def choose(
        self,
        model: nn.Module,
        cases: Sequence[CachedCase],
        *,
        rates: Sequence[float] = RATES,
        lengths: Sequence[int] = LENGTHS,
        progress: Progress = lambda done, total, note: None,
    ) -> Choice:
        """Choose the rate and the number of steps by leave-one-out; see the function ``choose``.

        Each patient is held out in turn. For each rate the model is adapted to the others up to the
        largest number of steps, and the averaged weights predict the held-out cases on the way. More than
        ten patients are held out in ten groups.

        Args:
            model: it is not changed.
            cases: support cases of at least two patients.
            rates: those to try.
            lengths: numbers of steps to try.
            progress: called with steps done and to do.

        Raises:
            ConfigError: a case lacks a modality of the subset.
            PrismError: a loss is not finite.
            ValueError: there are fewer than two patients, or a number of steps is less than 1.
        """
        groups = _groups(cases)
        if len(groups) < 2 or min(lengths) < 1:
            raise ValueError(
                f"cases, lengths: got {len(groups)} patients and {list(lengths)} steps, expected at least "
                "two patients and one step; adapt to one case with a fixed setting"
            )
        longest, tried = max(lengths), 0
        total = len(groups) * len(rates) * longest
        held_out = []
        for group in groups:
            held = [case for case in cases if case.patient in group]
            others = [case for case in cases if case.patient not in group]
            note = held[0].id if len(held) == 1 else f"{held[0].id} and {len(held) - 1} more"
            progress(tried * longest, total, note)
            watched = self.validation(held, every=math.gcd(*lengths))
            before = self.dice(model, held)
            after: dict[Setting, float] = {}
            for lr in rates:
                start = tried * longest

                def told(
                    step: int, _: dict[str, Any], start: int = start, note: str = note
                ) -> None:
                    progress(start + step, total, note)

                _, log = self._fit(
                    model, others, Setting(lr, longest), validation=watched, on_step=told
                )
                found = {line["step"]: line["validation"] for line in log if "validation" in line}
                after |= {Setting(lr, n): found[n]["ema"]["dice"] for n in lengths}
                tried += 1
            held_out.append(HeldOut(tuple(case.id for case in held), before, after))
        return choose(held_out)

    def dice(self, model: nn.Module, cases: Sequence[CachedCase]) -> float:
        """The mean Dice of the subset over cases, in [0, 1]; see ``OneSubsetValidation``."""
        measured = self.validation(cases).dice(model, cases)
        return fmean(value for case in measured for value in case.values())

    def validation(self, cases: Sequence[CachedCase], *, every: int = 1) -> OneSubsetValidation:
        """What measures Dice on some cases."""
        return OneSubsetValidation(
            cases,
            modalities=self.modalities,
            labels=self.labels,
            patch=self.patch,
            overlap=self.overlap,
            every=every,
            subset=self.subset,
        )

    def _fit(
        self,
        model: nn.Module,
        cases: Sequence[CachedCase],
        setting: Setting,
        *,
        folder: Path | None = None,
        validation: OneSubsetValidation | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[nn.Module, list[dict[str, Any]]]:
        """A copy of ``model`` after the last step, without averaging, and the log."""
        adapted = copy.deepcopy(model)
        if self.fabric is not None:
            self.fabric.to_device(adapted)
        episodes = SupportEpisodes(
            cases,
            self.subset,
            patch=self.patch,
            batch_size=self.batch_size,
            steps=setting.steps,
            foreground=self.foreground,
            augmentation=Augmentation(len(self.patch)) if self.augment else None,
            seed=self.seed,
        )
        log = fit(
            adapted,
            self.objective,
            SingleLevel(),
            episodes,
            optimizer=torch.optim.Adam(adapted.parameters(), lr=setting.lr),
            alpha=0.0,
            clip_norm=self.clip_norm,
            fabric=self.fabric,
            folder=folder,
            workers=0,
            validation=validation,
            ema=AVERAGE,
            cosine_every=0,
            seed=self.seed,
            on_step=on_step,
        )
        return adapted, log


def _groups(cases: Sequence[CachedCase]) -> list[set[str]]:
    """The patients that are held out together: one at a time, if they are not too many."""
    patients = list(dict.fromkeys(case.patient for case in cases))
    count = min(len(patients), MOST_GROUPS)
    return [set(patients[k::count]) for k in range(count)]
