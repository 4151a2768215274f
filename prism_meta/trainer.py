"""The training loop: where data and algorithms meet.

It runs on Lightning Fabric, which owns the device, the precision and the processes. A strategy
calls the model functionally, so the model is not wrapped for several processes; the meta-gradient
and the adapted parameters are averaged over them instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from prism_meta.data import CachedCase
from prism_meta.episodes import Augmentation, Episodes
from prism_meta.errors import PrismError
from prism_meta.files import atomic
from prism_meta.learner import MetaLearner
from prism_meta.modalities import Batch
from prism_meta.run import Run
from prism_meta.strategies import MetaGradient

#: Losses stay on the device for so many steps, since reading them makes the device wait.
_STEPS_PER_READING = 10


class Trainer:
    """Runs a ``MetaLearner`` over episodes, with checkpoints that a later call continues.

    Args:
        learner: its model must be on the device of ``fabric``.
        episodes: item t is (D_train, D_meta) of step t and depends on t alone.
        scheduler: of the learner's optimizer, one step per episode.
        fabric: launched.
        checkpoint: file for the state.
        metrics: JSON lines, one per step.
        clip_norm: the meta-gradient is scaled down to this norm.
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
        clip_norm: float,
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
        self.clip_norm, self.checkpoint_every = clip_norm, checkpoint_every
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
        total = len(self.episodes)  # type: ignore[arg-type]
        loader = DataLoader(
            self.episodes,
            batch_size=None,
            sampler=range(start, total),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
        self.learner.model.train()
        pending: list[tuple[int, float, MetaGradient, Tensor]] = []
        for step, (train, meta) in enumerate(loader, start=start):
            lr = float(self.scheduler.get_last_lr()[0])
            result, norm = self._step(step, train, meta)
            # Gradients would keep a model's worth of memory alive per pending step.
            pending.append((step, lr, replace(result, gradient={}, adapted={}, buffers={}), norm))
            done = step + 1
            save = done % self.checkpoint_every == 0 or done == total
            if save or done % _STEPS_PER_READING == 0:
                last = self._log(pending)
                pending.clear()
                if on_step is not None:
                    on_step(done, last)
            if save:
                self._save(done)

    def _step(self, step: int, train: Batch, meta: Batch) -> tuple[MetaGradient, Tensor]:
        torch.manual_seed(self.seed * 1_000_003 + step)
        device = self.fabric.device
        with self.fabric.autocast():
            result = self.learner.meta_gradient(train.to(device), meta.to(device))
        result = self._averaged(result)
        gradients = list(result.gradient.values())
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        clipped = {name: g * scale for name, g in result.gradient.items()}
        self.learner.apply(replace(result, gradient=clipped))
        self.scheduler.step()
        return result, norm

    def _averaged(self, result: MetaGradient) -> MetaGradient:
        """Means over all processes, which keeps their models equal."""
        if self.fabric.world_size == 1:
            return result

        def mean(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            averaged: dict[str, Tensor] = self.fabric.all_reduce(tensors, reduce_op="mean")
            return averaged

        floating = {n: b for n, b in result.buffers.items() if b.is_floating_point()}
        return replace(
            result,
            gradient=mean(result.gradient),
            adapted=mean(result.adapted),
            buffers={**result.buffers, **mean(floating)},
        )

    def _log(self, pending: Sequence[tuple[int, float, MetaGradient, Tensor]]) -> dict[str, Any]:
        lines = [
            {
                "step": step + 1,
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
        if not self.fabric.is_global_zero:
            return
        state = {
            "step": step,
            "model": self.learner.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
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
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        return int(state["step"])


def build_episodes(run: Run, cases: Sequence[CachedCase], *, rank: int = 0) -> Episodes:
    """The episodes that a run's configuration asks for.

    Raises:
        ConfigError: the patch is larger than a volume, or no episode can be drawn.
    """
    config = run.config
    availability = torch.stack([case.availability for case in cases])
    rates = (1 - availability.double().mean(0)).clamp(max=0.99).tolist()
    train_mask, meta_mask = config.masks.build(rates)
    return Episodes(
        cases,
        patch=config.data.patch,
        batch_size=config.data.batch_size,
        steps=config.training.steps,
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
    resume: bool = False,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
) -> torch.nn.Module:
    """Train the model of a run on prepared cases, and write its weights.

    Args:
        run: an open run.
        cases: its training cases.
        resume: continue from the run's checkpoint.
        on_step: see ``Trainer.fit``.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        PrismError: see ``Trainer.fit`` and ``build_episodes``.
    """
    config = run.config
    fabric = Fabric(
        accelerator=config.fabric.accelerator,
        devices=config.fabric.devices,
        num_nodes=config.fabric.nodes,
        precision=config.fabric.precision,
    )
    fabric.launch()
    episodes = build_episodes(run, cases, rank=fabric.global_rank)
    torch.manual_seed(config.seed)  # the same initial weights in every process
    model = config.build_model()
    fabric.to_device(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.training.lr, weight_decay=config.training.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.PolynomialLR(
        optimizer, total_iters=config.training.steps, power=0.9
    )
    trainer = Trainer(
        MetaLearner(
            model, config.objective.build(), config.meta.build(), optimizer, config.meta.alpha
        ),
        episodes,
        scheduler=scheduler,
        fabric=fabric,
        checkpoint=run.checkpoint,
        metrics=run.metrics,
        clip_norm=config.training.clip_norm,
        checkpoint_every=config.training.checkpoint_every,
        workers=config.data.workers,
        seed=config.seed,
    )
    trainer.fit(resume=resume, on_step=on_step)
    if fabric.is_global_zero:
        run.save_weights(model)
    model.eval()
    return model
