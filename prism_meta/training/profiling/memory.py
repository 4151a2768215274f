"""``step_memory``: the bytes that an outer step needs, found without taking one.

The strategy itself runs on torch's meta device, with the model, the objective and the inner steps of the
configuration. The peak of the tensors alive together is what a real step allocates, known savings included:
it differs by what convolutions allocate inside (``benchmarks/planning.py`` measures by how much).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prism_meta.modalities import Batch
from prism_meta.step_batches import StepBatches
from prism_meta.training.build import build_model, build_objective, build_strategy
from prism_meta.training.config import Config
from prism_meta.training.shapes import LiveBytes, on_meta

#: AdamW keeps two moments per parameter; the gradient is freed after each step.
_MOMENTS = 2
#: What stays of an episode until the others of its outer step are done: its gradient and phi~.
_KEPT = 2


@dataclass(frozen=True)
class StepMemory:
    """Bytes that training needs on its device, in three parts.

    Args:
        model: parameters, buffers, and the optimizer's state.
        batches: the train batches and the meta batch of an episode.
        graphs: at the peak of a step: activations, copies of the parameters and gradients.
    """

    model: int
    batches: int
    graphs: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.model + self.batches + self.graphs


def step_memory(
    config: Config, masks: Sequence[Tensor] | None = None, *, model: nn.Module | None = None
) -> StepMemory:
    """The memory of an outer step, in 32-bit precision; mixed precision needs less.

    No random numbers are drawn from the global generators, and nothing is computed.

    Args:
        config: all sizes, the objective and the strategy.
        masks: (B, M) bool, one per train batch and one for the meta batch, as ``most_shown`` finds them.
            Defaults to all modalities of all samples, which needs the most.
        model: a model of your own, which replaces the configured one.

    Raises:
        ValueError: the patch does not fit the model.

    Example:
        >>> from prism_meta.training.config import load_config
        >>> sizes = ["data.patch=[32, 32]", "model.network=unet"]
        >>> small = [load_config(overrides=[*sizes, f"meta.strategy={order}"])
        ...          for order in ("first_order", "second_order")]
        >>> first, second = (step_memory(config) for config in small)
        >>> first.model == second.model, second.graphs > 2 * first.graphs
        (True, True)
    """
    with torch.random.fork_rng(devices=[]):
        if model is None:
            with torch.device("meta"):
                model = build_model(config)
        else:
            model = on_meta(model)
        inner_lr = torch.tensor(config.meta.inner_lr)
        strategy = build_strategy(config.meta, inner_lr, weight_decay=config.training.weight_decay)
        train, meta = _episode(config, masks)
        objective = _OnMeta(config)
        with LiveBytes() as live:
            result = strategy.meta_gradient(model, objective, train, meta)
        del result
    parameters = sum(_size(p) for p in model.parameters())
    kept = (config.meta.episodes - 1) * _KEPT * parameters
    copies = 1 + _MOMENTS + (config.training.ema > 0)
    return StepMemory(
        model=copies * parameters + sum(_size(b) for b in model.buffers()),
        batches=sum(_size(_image(b)) + _size(b.target) for b in (*StepBatches.of(train), meta)),
        graphs=live.peak + kept,
    )


def _episode(config: Config, masks: Sequence[Tensor] | None) -> tuple[Any, Batch]:
    """An episode whose masks have values, because models choose with them what they compute."""
    data, kind = config.data, config.meta.kind
    shape = (data.batch_size, len(data.modalities))
    if masks is None:
        steps = config.meta.inner_steps if kind.adapts else 1
        masks = [torch.ones(shape, dtype=torch.bool)] * (steps + 1)
    target = torch.empty(shape[0], *data.patch, dtype=torch.long, device="meta")
    # Autocast knows no meta device, and the objective asks for that of its image: a view of one number.
    image = torch.zeros(()).expand(*shape, *data.patch)
    *train, meta = (Batch(image, mask, target) for mask in masks)
    return (train[0] if len(train) == 1 else StepBatches(train)), meta


class _OnMeta:
    """The configured objective, whose model sees an image on the meta device."""

    def __init__(self, config: Config) -> None:
        self.objective = build_objective(config.objective, [0.0] * len(config.data.modalities))

    def __call__(self, forward: Any, batch: Batch) -> Any:
        def on_meta_image(image: Tensor, mask: Tensor, **options: Any) -> Any:
            return forward(_image(batch), mask, **options)

        return self.objective(on_meta_image, batch)


def _image(batch: Batch) -> Tensor:
    return torch.empty(batch.image.shape, device="meta")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
