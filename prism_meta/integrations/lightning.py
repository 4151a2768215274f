"""A strategy's outer step in PyTorch Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies.base import MetaGradient
from prism_meta.errors import ConfigError
from prism_meta.integrations import MissingPackageError, load

INSTALL = "pip install 'prism-meta[loggers]'"
#: Key of the learner's state in a checkpoint of Lightning.
STATE = "prism_meta_learner"

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule as BaseModule
else:
    try:
        BaseModule = load("pytorch_lightning", INSTALL).LightningModule
    except MissingPackageError:
        BaseModule = nn.Module  # the class can be read; making an instance raises


class MetaModule(BaseModule):  # type: ignore[misc] # Lightning's types are not followed
    """A ``LightningModule`` whose training step is ``MetaLearner.step``, E2 with any strategy.

    Each batch of the training dataloader is one episode, a pair (D_train, D_meta), e.g. of
    ``DataLoader(episodes, batch_size=None, collate_fn=tuple)``, which leaves batches as they are.
    Optimization is manual, so the numbers equal those of a loop over ``learner.step``. Lightning does the
    rest: devices, checkpoints, callbacks, loggers, limits of steps and of time. Its checkpoints have the
    state of the inner optimizer, too, so ``Trainer.fit(ckpt_path=...)`` resumes an interrupted training.

    It logs ``train_loss``, ``meta_loss``, ``grad_norm`` (of the meta-gradient, before it is clipped) and,
    with their names after ``terms/``, the scalar components of the meta loss. Add ``validation_step`` in a
    subclass. ``forward`` is the model's.

    In manual optimization, Lightning refuses ``gradient_clip_val`` and ``accumulate_grad_batches``; use
    ``MetaLearner(clip_norm=...)`` to clip. Several processes and precision ``16-mixed`` are refused, too,
    because Lightning would neither average meta-gradients nor unscale them.

    Args:
        learner: model, objective, strategy and outer optimizer. If the objective is a module, it is
            registered, and checkpoints have its state.
        scheduler: of the learning rate of ``learner.optimizer``; it is stepped after each outer step.

    Raises:
        MissingPackageError: pytorch_lightning is not installed.
        ConfigError: when training starts: the trainer has several processes or precision ``16-mixed``.
        NonFiniteError: in a step, see ``MetaLearner.apply``.

    Example:
        ```python
        import pytorch_lightning as pl
        import torch
        from prism_meta import SGD, FirstOrder, MetaLearner
        from prism_meta.integrations.lightning import MetaModule

        model = torch.nn.Linear(2, 1)
        mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        learner = MetaLearner(model, mse, FirstOrder(SGD(0.1)), optimizer, clip_norm=1.0)
        batch = (torch.ones(4, 2), torch.zeros(4, 1))
        episodes = torch.utils.data.DataLoader([(batch, batch)] * 20, batch_size=None, collate_fn=tuple)
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.fit(MetaModule(learner), episodes)
        assert trainer.global_step == 20
        assert trainer.callback_metrics["meta_loss"] < 0.1
        ```
    """

    def __init__(self, learner: MetaLearner, *, scheduler: LRScheduler | None = None) -> None:
        load("pytorch_lightning", INSTALL)
        super().__init__()
        self.automatic_optimization = False
        self.learner, self.scheduler = learner, scheduler
        self.model = learner.model
        if isinstance(learner.objective, nn.Module):
            self.objective = learner.objective

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return self.model(*args, **kwargs)

    def training_step(self, batch: tuple[Any, Any], batch_idx: int) -> None:
        """One outer step from the episode ``batch``."""
        train, meta = batch
        result = self.learner.meta_gradient(train, meta)
        with self._counted():
            norm = self.learner.apply(result)
        if self.scheduler is not None:
            self.scheduler.step()
        self._log(result, norm)

    def configure_optimizers(self) -> Any:
        """The learner's optimizer, and the scheduler, if there is one."""
        found: dict[str, Any] = {"optimizer": self.learner.optimizer}
        if self.scheduler is not None:
            found["lr_scheduler"] = {"scheduler": self.scheduler, "interval": "step"}
        return found

    def on_fit_start(self) -> None:
        """Move what Lightning does not know of to the device: learned rates, state of the inner optimizer."""
        trainer: Any = self.trainer
        if trainer.world_size > 1:
            raise ConfigError(
                f"trainer: got {trainer.world_size} processes, whose meta-gradients Lightning does not "
                "average; use devices=1, or prism_meta.train"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ConfigError(
                f"trainer: got precision {trainer.precision}, which would unscale the meta-gradient, "
                "although it is not scaled; use bf16-mixed or 32-true"
            )
        for group in self.learner.optimizer.param_groups:
            for param in group["params"]:
                param.data = param.data.to(self.device)
        self.learner.load_state_dict(move_data_to_device(self.learner.state_dict(), self.device))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the learner's state."""
        checkpoint[STATE] = self.learner.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue from the learner's state.

        Raises:
            ConfigError: the checkpoint has none.
        """
        if STATE not in checkpoint:
            raise ConfigError(
                "checkpoint: has no state of a MetaLearner; give one that a training of MetaModule wrote"
            )
        self.learner.load_state_dict(checkpoint[STATE])

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """The learner steps through Lightning's wrapper of its optimizer, which counts ``global_step``."""
        own, self.learner.optimizer = self.learner.optimizer, self.optimizers()
        try:
            yield
        finally:
            self.learner.optimizer = own

    def _log(self, result: MetaGradient, norm: Tensor) -> None:
        terms = {f"terms/{name}": term for name, term in result.terms.items() if term.ndim == 0}
        self.log_dict({"train_loss": result.train_loss, "grad_norm": norm, **terms})
        self.log("meta_loss", result.meta_loss, prog_bar=True)
