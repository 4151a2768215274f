"""The training loop: where data and algorithms meet.

It runs on Lightning Fabric, which owns the device, the precision and the processes. A strategy
calls the model functionally, so the model is not wrapped for several processes; the meta-gradient
and the adapted parameters are averaged over them instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from prism_meta.bilevel.functional.trees import Params
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import MetaGradient, Reptile
from prism_meta.data.augmentation import Augmentation
from prism_meta.data.cache import CachedCase
from prism_meta.data.episodes import Episodes
from prism_meta.errors import PrismError
from prism_meta.files import atomic
from prism_meta.modalities import Batch
from prism_meta.training.config import Config
from prism_meta.training.run import Run

#: Losses stay on the device for so many steps, since reading them makes the device wait.
_STEPS_PER_READING = 10


@runtime_checkable
class Adaptive(Protocol):
    """An objective whose weights change over training, as ``PrismObjective`` with a weighting."""

    def weights(self) -> dict[str, Tensor]:
        """The weights in force, for the log."""

    def observe(self, terms: Mapping[str, Tensor]) -> None:
        """Take note of the terms of one episode, in sums."""

    def end_epoch(self) -> None:
        """Use what was observed since the last epoch."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state_dict``."""


class Trainer:
    """Runs a ``MetaLearner`` over episodes, with checkpoints that a later call continues.

    Args:
        learner: its model must be on the device of ``fabric``, and so its objective if that is
            ``Adaptive``: the state of such an objective is kept in the checkpoint.
        episodes: item t is (D_train, D_meta) of episode t and depends on t alone.
        scheduler: of the learner's optimizer, one step per episode.
        fabric: launched.
        checkpoint: file for the state.
        metrics: JSON lines, one per step.
        inner_lr: the tensor that is the inner optimizer's rate, if it shall decay with the outer rate.
        episodes_per_step: an outer step averages over so many.
        epoch: length of an epoch in steps; none ends unless given.
        checkpoint_every: steps.
        workers: processes that load data.
        seed: of what is random in the model (dropout).
    """

    def __init__(
        self,
        learner: MetaLearner,
        episodes: Dataset[tuple[Batch, Batch]],
        *,
        scheduler: LRScheduler,
        fabric: Fabric,
        checkpoint: Path,
        metrics: Path,
        inner_lr: Tensor | None = None,
        episodes_per_step: int = 1,
        epoch: int | None = None,
        checkpoint_every: int = 100,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.learner, self.episodes, self.scheduler, self.fabric = (
            learner,
            episodes,
            scheduler,
            fabric,
        )
        self.checkpoint, self.metrics = checkpoint, metrics
        self.epoch, self.checkpoint_every = epoch, checkpoint_every
        self.objective = learner.objective if isinstance(learner.objective, Adaptive) else None
        self.inner_lr = inner_lr
        self._first_inner_lr = None if inner_lr is None else inner_lr.clone()
        self.episodes_per_step = episodes_per_step
        self.workers, self.seed = workers, seed

    def fit(
        self, *, resume: bool = False, on_step: Callable[[int, dict[str, Any]], None] | None = None
    ) -> None:
        """Train to the last episode; with ``resume``, from the checkpoint on.

        Args:
            resume: continue; the result equals that of an uninterrupted run.
            on_step: called every few steps with the step and the newest line of the metrics.

        Raises:
            PrismError: there is no checkpoint to resume from, or a loss is not finite.
        """
        start = self._restore() if resume else 0
        self._truncate(start)
        count = self.episodes_per_step
        total = len(self.episodes) // count  # type: ignore[arg-type]
        loader = DataLoader(
            self.episodes,
            batch_size=None,
            sampler=range(start * count, total * count),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
        self.learner.model.train()
        pending: list[tuple[int, float, MetaGradient, Tensor]] = []
        episodes = iter(loader)
        for step in range(start, total):
            group = list(islice(episodes, count))
            lr = float(self.scheduler.get_last_lr()[0])
            result, norm = self._step(step, group)
            # Gradients would keep a model's worth of memory alive per pending step.
            small = replace(result, gradient={}, adapted={}, buffers={}, inner_buffers={}, state={})
            pending.append((step, lr, small, norm))
            done = step + 1
            if self.objective is not None and self.epoch is not None and done % self.epoch == 0:
                self._gather(self.objective)
                self.objective.end_epoch()
            save = done % self.checkpoint_every == 0 or done == total
            if save or done % _STEPS_PER_READING == 0:
                last = self._log(pending)
                pending.clear()
                if on_step is not None:
                    on_step(done, last)
            if save:
                self._save(done)

    def _step(
        self, step: int, episodes: Sequence[tuple[Batch, Batch]]
    ) -> tuple[MetaGradient, Tensor]:
        torch.manual_seed(self.seed * 1_000_003 + step)
        device = self.fabric.device
        if self.inner_lr is not None and self._first_inner_lr is not None:
            first, now = self.scheduler.base_lrs[0], self.scheduler.get_last_lr()[0]
            self.inner_lr.copy_(self._first_inner_lr * (now / first))
        with self.fabric.autocast():
            results = [
                self.learner.meta_gradient(train.to(device), meta.to(device))
                for train, meta in episodes
            ]
        result = self._averaged(MetaGradient.mean(results))
        if self.objective is not None:
            for each in results:
                self.objective.observe(each.terms)
            # Learned weights are no part of the terms, for the meta loss does not use them.
            result = replace(result, terms={**self.objective.weights(), **result.terms})
        norm = self.learner.apply(result)
        self.scheduler.step()
        return result, norm

    def _averaged(self, result: MetaGradient) -> MetaGradient:
        """Means over all processes, which keeps their models equal."""
        if self.fabric.world_size == 1:
            return result

        def mean(values: Any) -> Any:
            return self.fabric.all_reduce(values, reduce_op="mean")

        def floating(buffers: Params) -> Params:
            return {n: b for n, b in buffers.items() if b.is_floating_point()}

        # Unused is what no process used: else some would step where others do not.
        names = list(result.gradient)
        flags = torch.tensor([float(n in result.unused) for n in names], device=self.fabric.device)
        everywhere = mean(flags).eq(1).tolist()
        return replace(
            result,
            unused=frozenset(n for n, unused in zip(names, everywhere, strict=True) if unused),
            gradient=mean(result.gradient),
            adapted=mean(result.adapted),
            hyper_gradient=mean(result.hyper_gradient),
            weight_gradient=mean(result.weight_gradient),
            state=mean(result.state),
            buffers={**result.buffers, **mean(floating(result.buffers))},
            inner_buffers={**result.inner_buffers, **mean(floating(result.inner_buffers))},
        )

    def _gather(self, objective: Adaptive) -> None:
        """The same state of the objective in all processes.

        Each adds what it observes to its own sums, and a mean of sums may be taken at any time.
        """
        if self.fabric.world_size > 1:
            objective.load_state_dict(
                self.fabric.all_reduce(objective.state_dict(), reduce_op="mean")
            )

    def _log(self, pending: Sequence[tuple[int, float, MetaGradient, Tensor]]) -> dict[str, Any]:
        lines = [
            {
                "step": step + 1,
                **({} if self.epoch is None else {"epoch": step // self.epoch + 1}),
                "train_loss": float(result.train_loss),
                "meta_loss": float(result.meta_loss),
                "terms": {name: term.tolist() for name, term in result.terms.items()},
                "gradient_norm": float(norm),
                "lr": lr,
            }
            for step, lr, result, norm in pending
        ]
        for line in lines:
            if (
                not torch.tensor([line["train_loss"], line["meta_loss"], line["gradient_norm"]])
                .isfinite()
                .all()
            ):
                raise PrismError(
                    f"training diverged at step {line['step']}: losses {line['train_loss']:g} and "
                    f"{line['meta_loss']:g}, gradient norm {line['gradient_norm']:g}; lower "
                    "meta.inner_lr or training.lr, and check the images"
                )
        if self.fabric.is_global_zero:
            with self.metrics.open("a", encoding="utf-8") as handle:
                handle.writelines(json.dumps(line) + "\n" for line in lines)
        return lines[-1]

    def _truncate(self, start: int) -> None:
        """Drop the lines of steps that will be made again."""
        if not self.fabric.is_global_zero or not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        with atomic(self.metrics) as partial:
            partial.write_text("".join(lines[:start]), encoding="utf-8")

    def _save(self, step: int) -> None:
        if self.objective is not None:
            self._gather(self.objective)
        if not self.fabric.is_global_zero:
            return
        state = {
            "step": step,
            "model": self.learner.model.state_dict(),
            "learner": self.learner.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "objective": {} if self.objective is None else self.objective.state_dict(),
        }
        with atomic(self.checkpoint) as partial:
            torch.save(state, partial)

    def _restore(self) -> int:
        try:
            state = torch.load(self.checkpoint, map_location=self.fabric.device, weights_only=True)
        except FileNotFoundError as error:
            raise PrismError(
                f"{self.checkpoint}: no checkpoint to resume from; start the run anew with another --out"
            ) from error
        self.learner.model.load_state_dict(state["model"])
        self.learner.load_state_dict(state["learner"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.objective is not None:
            self.objective.load_state_dict(state["objective"])
        return int(state["step"])


def missing_rates(cases: Sequence[CachedCase]) -> list[float]:
    """FR^m of the cases; a modality that none has counts as 0.99."""
    availability = torch.stack([case.availability for case in cases])
    rates: list[float] = (1 - availability.double().mean(0)).clamp(max=0.99).tolist()
    return rates


def build_episodes(run: Run, cases: Sequence[CachedCase], *, rank: int = 0) -> Episodes:
    """The episodes that a run's configuration asks for.

    Raises:
        ConfigError: the patch is larger than a volume, or no episode can be drawn.
    """
    config = run.config
    train_mask, meta_mask = config.masks.build(missing_rates(cases))
    return Episodes(
        cases,
        patch=config.data.patch,
        batch_size=config.data.batch_size,
        steps=config.training.steps * config.meta.episodes,
        train_mask=train_mask,
        meta_mask=meta_mask,
        foreground=config.data.foreground,
        augmentation=Augmentation(len(config.data.patch)) if config.training.augment else None,
        seed=config.seed,
        rank=rank,
    )


def train(
    run: Run,
    cases: Sequence[CachedCase],
    *,
    fabric: Fabric,
    resume: bool = False,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
) -> torch.nn.Module:
    """Train the model of a run on prepared cases, and write its weights.

    Args:
        run: an open run.
        cases: its training cases.
        fabric: launched.
        resume: continue from the run's checkpoint.
        on_step: see ``Trainer.fit``.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        PrismError: see ``Trainer.fit`` and ``build_episodes``.
    """
    config = run.config
    episodes = build_episodes(run, cases, rank=fabric.global_rank)
    torch.manual_seed(config.seed)  # the same initial weights in every process
    model = config.build_model()
    fabric.to_device(model)
    meta = config.meta
    objective = config.objective.build(missing_rates(cases)).to(fabric.device)
    optimizer, scheduler = _outer(config, model, list(objective.hyper_parameters().values()))
    # So many cases are drawn in a step: both batches of its episodes, in every process.
    drawn = 2 * config.data.batch_size * meta.episodes * fabric.world_size
    inner_lr = torch.tensor(meta.inner_lr)
    learner = MetaLearner(
        model,
        objective,
        meta.build(inner_lr, weight_decay=config.training.weight_decay),
        optimizer,
        alpha=0.0 if meta.strategy == "reptile" else meta.alpha,
        inner_state=meta.inner_state,
        buffers="outer",
        clip_norm=config.training.clip_norm,
    )
    trainer = Trainer(
        learner,
        episodes,
        scheduler=scheduler,
        fabric=fabric,
        checkpoint=run.checkpoint,
        metrics=run.metrics,
        inner_lr=inner_lr if meta.inner_decay and meta.strategy != "reptile" else None,
        episodes_per_step=meta.episodes,
        epoch=math.ceil(len(cases) / drawn),
        checkpoint_every=config.training.checkpoint_every,
        workers=config.data.workers,
        seed=config.seed,
    )
    trainer.fit(resume=resume, on_step=on_step)
    if fabric.is_global_zero:
        run.save_weights(model)
    model.eval()
    return model


def _outer(
    config: Config, model: torch.nn.Module, weights: Sequence[Tensor]
) -> tuple[Optimizer, LRScheduler]:
    """The outer optimizer and its schedule; ``weights`` are the objective's learned ones."""
    training = config.training
    if config.meta.strategy == "reptile":
        optimizer: Optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return optimizer, Reptile.schedule(optimizer, training.steps)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if weights:
        # Decay would pull a free parameter to 0, which is a weight of log 2.
        rate = config.objective.weights_lr
        groups.append({"params": list(weights), "lr": rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(
        groups, lr=training.lr, weight_decay=training.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.PolynomialLR(
        optimizer, total_iters=training.steps, power=0.9
    )
    return optimizer, scheduler
