"""A strategy's outer step in MONAI's engines, which are those of PyTorch Ignite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from monai.engines.trainer import Trainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys

from prism_meta.bilevel.learner import MetaLearner
from prism_meta.integrations import load

INSTALL = "pip install 'prism-meta[monai]'"
#: Where an iteration stands when gradients exist and parameters have not moved.
_BEFORE = (
    IterationEvents.FORWARD_COMPLETED,
    IterationEvents.LOSS_COMPLETED,
    IterationEvents.BACKWARD_COMPLETED,
)


class MetaTrainer(Trainer):  # type: ignore[misc] # MONAI has no types
    """A MONAI trainer whose iteration is ``MetaLearner.step``, E2 with any strategy.

    Each item of the dataloader is one episode, a pair (D_train, D_meta), e.g. of
    ``DataLoader(episodes, batch_size=None, collate_fn=tuple)``, which leaves batches as they are. The numbers
    equal those of a loop over ``learner.step``. MONAI's handlers work as with ``SupervisedTrainer``:
    ``StatsHandler``, ``ValidationHandler``, ``LrScheduleHandler`` and ``CheckpointSaver``, whose
    ``save_dict`` should have the learner beside the network and the optimizer, because it keeps the state
    of the inner optimizer.

    After an iteration, ``engine.state.output`` is a list of one dictionary, as MONAI's other trainers leave
    it: the ``loss`` (the meta loss), ``train_loss``, ``grad_norm`` (of the meta-gradient, before it is
    clipped) and the scalar components of the meta loss by their names, all as tensors.

    Args:
        device: device of the network; episodes are moved to it.
        max_epochs: number of passes over the dataloader.
        train_data_loader: gives the episodes.
        learner: model, objective, strategy and outer optimizer. The model is on ``device``.
        epoch_length: iterations per epoch. Defaults to the length of the dataloader.
        prepare_batch: ``prepare_batch(episode, device, non_blocking)`` returns the episode on the device.
            Defaults to moving everything that has a method ``to``.
        train_handlers: MONAI's or Ignite's handlers.

    Raises:
        MissingPackageError: pytorch-ignite is not installed.
        NonFiniteError: in a step, see ``MetaLearner.apply``.

    Example:
        ```python
        import torch
        from prism_meta import SGD, FirstOrder, MetaLearner
        from prism_meta.integrations.monai import MetaTrainer

        model = torch.nn.Linear(2, 1)
        mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        learner = MetaLearner(model, mse, FirstOrder(SGD(0.1)), optimizer, clip_norm=1.0)
        batch = (torch.ones(4, 2), torch.zeros(4, 1))
        trainer = MetaTrainer("cpu", 2, [(batch, batch)] * 10, learner)
        trainer.run()
        assert trainer.state.iteration == 20
        assert trainer.state.output[0]["loss"] < 0.1
        ```
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable[tuple[Any, Any]],
        learner: MetaLearner,
        *,
        epoch_length: int | None = None,
        prepare_batch: Callable[..., tuple[Any, Any]] | None = None,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        load("ignite", INSTALL)
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            epoch_length=epoch_length,
            prepare_batch=moved if prepare_batch is None else prepare_batch,
            handlers=train_handlers,
            decollate=False,  # an episode is no batch of samples
        )
        self.learner = learner

    @property
    def network(self) -> torch.nn.Module:
        """The learner's model, as handlers expect it."""
        return self.learner.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The learner's outer optimizer, as handlers expect it."""
        return self.learner.optimizer

    def _iteration(self, engine: Any, episode: tuple[Any, Any]) -> list[dict[str, torch.Tensor]]:
        """One outer step; Ignite keeps what it returns in ``engine.state.output``."""
        train, meta = self.prepare_batch(episode, engine.state.device, engine.non_blocking)
        self.learner.model.train()  # a validator leaves it in evaluation mode
        result = self.learner.meta_gradient(train, meta)
        output = {name: term for name, term in result.terms.items() if term.ndim == 0}
        output |= {CommonKeys.LOSS: result.meta_loss, "train_loss": result.train_loss}
        engine.state.output = [output]
        for event in _BEFORE:
            engine.fire_event(event)
        output["grad_norm"] = self.learner.apply(result)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return [output]


def moved(episode: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """An episode on a device: everything in it that has a method ``to``.

    Example:
        >>> train, meta = moved(((torch.ones(1), "a"), [torch.ones(1)]), torch.device("meta"))
        >>> train[0].device.type, train[1], meta[0].device.type
        ('meta', 'a', 'meta')
    """
    from lightning_fabric.utilities import move_data_to_device  # it takes two seconds to import

    return move_data_to_device(episode, device)
