"""The training loop.

It runs on Lightning Fabric, which owns the device, the precision and the processes. A strategy
calls the model functionally, so the model is not wrapped for several processes. The meta-gradient
and the adapted parameters are averaged over the processes instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset

from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import MetaGradient
from prism_meta.errors import PrismError
from prism_meta.modalities import Batch
from prism_meta.training.episodes.adaptive import Adaptive
from prism_meta.training.episodes.feedback import Feedback, without_samples
from prism_meta.training.episodes.loader import default_workers, load_episodes
from prism_meta.training.folder import log
from prism_meta.training.folder.checkpoint import load_checkpoint, save_checkpoint
from prism_meta.training.loggers.following import Loggers
from prism_meta.training.loggers.journal import Journal
from prism_meta.training.outer.alignment import Alignment
from prism_meta.training.outer.averaging import AveragedWeights
from prism_meta.training.outer.schedules import go_to
from prism_meta.training.processes.agreement import Processes
from prism_meta.training.processes.communication import mean_meta_gradient
from prism_meta.training.stopping import TrainingStopped
from prism_meta.training.validation.selection import Selection
from prism_meta.training.validation.validation import Validation

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

#: Losses are read every N steps; each read synchronises the device.
_STEPS_PER_READING = 10


class Trainer:
    """Runs a ``MetaLearner`` over episodes and writes checkpoints from which a run can resume.

    Use ``fit`` unless you build the learner yourself.

    Args:
        learner: its model is on the device of ``fabric``, and so is its objective if that is
            ``Adaptive``; a checkpoint keeps the state of such an objective.
        episodes: item t is (D_train, D_meta) of episode t and depends on t only, except for those that
            follow losses (``AdaptiveEpisodes``). D_train may be ``StepBatches``.
        fabric: devices and processes, launched.
        scheduler: schedule of the learner's optimizer, one step per outer step. Defaults to a
            constant rate.
        folder: folder for ``checkpoint.pt``, ``metrics.jsonl`` and the best weights. Defaults to no files.
        inner_lr: the tensor that is the inner optimizer's rate, if it is to follow a schedule. Defaults
            to a constant inner rate.
        inner_schedule: see ``fit``.
        episodes_per_step: number of episodes that an outer step averages over.
        epoch: length of an epoch in outer steps. Defaults to no epochs.
        checkpoint_every: number of outer steps between checkpoints.
        workers: number of additional processes that load data. Defaults to ``default_workers``.
        validation: cases to validate on. Defaults to no validation.
        averaged: moving average of the weights, which follows each step. Defaults to none.
        loggers: get the lines of the log, in the first process. Defaults to none.
        cosine_every: see ``fit``.
        seed: seed of the model's own randomness (dropout).
    """

    def __init__(
        self,
        learner: MetaLearner,
        episodes: Dataset[tuple[Any, Batch]] | Sequence[tuple[Any, Batch]],
        *,
        fabric: Fabric,
        scheduler: LRScheduler | None = None,
        folder: Path | None = None,
        inner_lr: Tensor | None = None,
        inner_schedule: Callable[[int], float] | None = None,
        episodes_per_step: int = 1,
        epoch: int | None = None,
        checkpoint_every: int = 100,
        workers: int | None = 0,
        validation: Validation | None = None,
        averaged: AveragedWeights | None = None,
        loggers: Loggers | None = None,
        cosine_every: int = 0,
        seed: int = 0,
    ) -> None:
        self.learner, self.episodes, self.fabric = learner, episodes, fabric
        self.scheduler = scheduler or LambdaLR(learner.optimizer, lambda step: 1.0)
        self.checkpoint = None if folder is None else folder / "checkpoint.pt"
        self.journal = Journal(None if folder is None else folder / "metrics.jsonl", loggers)
        self.epoch, self.checkpoint_every = epoch, checkpoint_every
        self.objective = learner.objective if isinstance(learner.objective, Adaptive) else None
        self.inner_lr, self.inner_schedule = inner_lr, inner_schedule or self._of_outer_rate
        self._first_inner_lr = None if inner_lr is None else inner_lr.clone()
        self.episodes_per_step = episodes_per_step
        self.workers, self.seed = workers, seed
        self.processes = Processes(fabric)
        self.feedback = Feedback(episodes, episodes_per_step, self.processes)
        self.averaged = averaged
        self.alignment = Alignment(learner, fabric, cosine_every)
        self.selection: Selection | None = None
        if validation is not None:
            models = {"last": learner.model} | ({} if averaged is None else {"ema": averaged.model})
            self.selection = Selection(validation, models, self.processes, folder)

    def fit(
        self,
        *,
        steps: int | None = None,
        resume: bool = False,
        on_step: Callable[[int, dict[str, Any]], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[dict[str, Any]]:
        """Train to the last outer step, or until the validation makes no progress.

        Args:
            steps: number of outer steps. Defaults to as many as there are episodes for. If it differs
                from that of the checkpoint, the schedule is followed as if it had always been so long.
            resume: resume from the checkpoint; the result equals that of an uninterrupted run. If there
                is none yet, training starts at the first step.
            on_step: called every few steps with the step and the newest line of the log.
            should_stop: asked after every step, e.g. a ``StopRequest``. If it is true in any process,
                the state is saved and all of them stop.

        Returns:
            The lines of the log that this call produced, one per step.

        Raises:
            PrismError: the checkpoint cannot be used, a loss is not finite, or a file cannot be written.
            TrainingStopped: ``should_stop`` was true.
        """
        count = self.episodes_per_step
        total = len(self.episodes) // count if steps is None else steps  # type: ignore[arg-type]
        with self.processes.together():
            start = self._restore(total) if resume else 0
            if self.fabric.is_global_zero:
                self.journal.begin(start)
        if start == 0:
            self._save(0, total)  # so that every run can be resumed, whatever model it was given
        if self.selection is not None and self.selection.best.ended:
            return []
        self.learner.model.train()
        indices = range(start * count, total * count)
        workers = self.workers
        if workers is None:
            workers = default_workers(self.fabric, len(indices))
        loaded = load_episodes(
            self.episodes,
            indices,
            workers=self.feedback.most_workers(workers),
            pin=self.fabric.device.type == "cuda",
            give_way=self.fabric.device.type == "cpu",
            state_of=self.feedback.state_of,
        )
        with closing(loaded) as episodes:
            return self._train(episodes, range(start, total), on_step, should_stop)

    def _train(
        self,
        episodes: Iterator[Any],
        steps: range,
        on_step: Callable[[int, dict[str, Any]], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> list[dict[str, Any]]:
        history: list[dict[str, Any]] = []
        pending: list[log.Taken] = []
        total = steps.stop
        for step in steps:
            with self.processes.together():
                group = list(islice(episodes, self.episodes_per_step))
            lr = float(self.scheduler.get_last_lr()[0])
            pending.append(self._step(step, lr, group))
            done = step + 1
            if self.objective is not None and self.epoch is not None and done % self.epoch == 0:
                self._gather(self.objective)
                self.objective.end_epoch()
            stop = any(self.processes.gather(should_stop is not None and should_stop()))
            validate = self.selection is not None and self.selection.is_due(done, total)
            save = stop or done % self.checkpoint_every == 0 or done == total
            if save or validate or done % _STEPS_PER_READING == 0:
                history += self._log(pending, done if validate else None)
                pending.clear()
                self.feedback.read(done)
                if on_step is not None:
                    on_step(done, history[-1])
            ended = self.selection is not None and self.selection.best.ended
            if save or ended:
                self._save(done, total)
            if ended:
                break
            if stop and done < total:
                raise TrainingStopped(done, total)
        return history

    def _step(self, step: int, lr: float, episodes: Sequence[tuple[Any, Batch]]) -> log.Taken:
        torch.manual_seed(self.seed * 1_000_003 + step)
        if self.inner_lr is not None and self._first_inner_lr is not None:
            self.inner_lr.copy_(self._first_inner_lr * self.inner_schedule(step))
        with self.fabric.autocast():
            results = [
                self.learner.meta_gradient(
                    self.fabric.to_device(train), self.fabric.to_device(meta)
                )
                for train, meta in episodes
            ]
        result = MetaGradient.mean(results)
        if self.fabric.world_size > 1:
            result = mean_meta_gradient(self.learner.needed(result), self.fabric)
        result = replace(result, terms=without_samples(result.terms))
        if self.objective is not None:
            # Learned weights are not among the terms, because the meta loss does not use them.
            result = replace(result, terms={**self.objective.weights(), **result.terms})
        with self.fabric.autocast():
            cosine = self.alignment(step, result, episodes)
        norm = self.learner.apply(result)
        # Dropping the gradients frees a copy of the model per pending step.
        small = replace(result, gradient={}, adapted={}, buffers={}, inner_buffers={}, state={})
        taken = log.Taken(step, lr, small, norm, cosine)
        if self.averaged is not None:
            self.averaged.update(self.learner.model)
        if self.learner.scaler is not None and not norm.isfinite():
            return taken  # the scaler skipped the step in all processes
        if self.objective is not None:
            for each in results:
                self.objective.observe(each.terms)
        self.feedback.collect(results, episodes)
        self.scheduler.step()
        return taken

    def _of_outer_rate(self, step: int) -> float:
        """The outer rate of the current step relative to the first one."""
        return float(self.scheduler.get_last_lr()[0] / self.scheduler.base_lrs[0])

    def _gather(self, objective: Adaptive) -> None:
        """Give all processes the same state of the objective.

        Each process adds to its own sums, and their mean may be taken at any time.
        """
        if self.fabric.world_size > 1:
            objective.load_state_dict(
                self.fabric.all_reduce(objective.state_dict(), reduce_op="mean")
            )

    def _log(self, pending: Sequence[log.Taken], validated: int | None) -> list[dict[str, Any]]:
        """Write the lines of the ``pending`` steps, the last one with a validation after ``validated``."""
        lines = [log.line(taken, epoch=self.epoch) for taken in pending]
        lines = [log.mean(of_step) for of_step in zip(*self.processes.gather(lines), strict=True)]
        log.refuse_divergence(lines, self.learner.scaler)
        draw = None
        if self.selection is not None and validated is not None:
            lines[-1]["validation"] = self.selection(validated)
            draw = self.selection.draw
        with self.processes.together():
            if self.fabric.is_global_zero:
                self.journal.add(lines, draw)
        return lines

    def _save(self, step: int, total: int) -> None:
        if self.objective is not None:
            self._gather(self.objective)
        with self.processes.together():
            if self.checkpoint is not None and self.fabric.is_global_zero:
                save_checkpoint(self.checkpoint, self._state(step, total))

    def _state(self, step: int, total: int) -> dict[str, Any]:
        return {
            "step": step,
            "steps": total,
            "model": self.learner.model.state_dict(),
            "learner": self.learner.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "objective": {} if self.objective is None else self.objective.state_dict(),
            "episodes": self.feedback.state_dict(),
            "averaged": {} if self.averaged is None else self.averaged.state_dict(),
            "selection": {} if self.selection is None else self.selection.state_dict(),
        }

    def _restore(self, total: int) -> int:
        """Load the checkpoint if there is one; the number of steps that are done."""
        if self.checkpoint is None:
            raise PrismError(
                "resume: there is no checkpoint file; give the folder of the first run"
            )
        state = load_checkpoint(self.checkpoint, self.fabric.device)
        if state is None:
            return 0
        step = state.get("step")
        if not isinstance(step, int) or not 0 <= step <= total:
            raise PrismError(
                f"{self.checkpoint}: is from step {step}, but the training has {total} steps; restore the "
                "file, or give more steps"
            )
        first_lrs = [float(lr) for lr in self.scheduler.base_lrs]
        try:
            self.learner.model.load_state_dict(state["model"])
            self.learner.load_state_dict(state["learner"])
            self.learner.optimizer.load_state_dict(state["optimizer"])
            if self.objective is not None:
                self.objective.load_state_dict(state["objective"])
            self.feedback.load_state_dict(state.get("episodes", {}), step)
            if self.averaged is not None:
                self.averaged.load_state_dict(state["averaged"])
            if self.selection is not None:
                longer = total > state["steps"]
                self.selection.load_state_dict(state["selection"], longer=longer)
            if state["steps"] == total:
                self.scheduler.load_state_dict(state["scheduler"])
            else:
                go_to(self.scheduler, step, first_lrs)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise PrismError(
                f"{self.checkpoint}: does not fit the training ({reason}); restore the file and the "
                "configuration, or start a new run"
            ) from error
        return step
