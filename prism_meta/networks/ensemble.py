"""The mean of several predictions: of several models, and of mirrored images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Averages the class probabilities of models, and of mirrored images if asked.

    It predicts, and is not trained. Its logits are the logarithm of the mean probabilities.

    Args:
        models: ``SegmentationModel`` objects for the same modalities and classes.
        flips: predict the image mirrored along every combination of its axes, too, which takes
            2^axes times as long.

    Raises:
        ValueError: there is no model, or their numbers of axes differ.

    Example:
        >>> from prism_meta.networks.prism import PrismNet
        >>> models = [PrismNet(num_modalities=2, spatial_dims=2, width=2) for _ in range(2)]
        >>> image, mask = torch.randn(1, 2, 16, 16), torch.ones(1, 2, dtype=torch.bool)
        >>> mean = sum(model.segment(image, mask).softmax(1) for model in models) / 2
        >>> bool(torch.allclose(Ensemble(models).segment(image, mask).exp(), mean, atol=1e-6))
        True
    """

    def __init__(self, models: Sequence[nn.Module], *, flips: bool = False) -> None:
        super().__init__()
        dims = {model.spatial_dims for model in models}
        if len(dims) != 1:
            found = ", ".join(map(str, sorted(map(str, dims)))) or "none"
            raise ValueError(
                f"models: have {found} axes, expected at least one model, and the same for all"
            )
        self.models = nn.ModuleList(models)
        self.flips = flips
        self.spatial_dims: Any = dims.pop()

    def forward(self, *arguments: Any, **options: Any) -> NoReturn:
        raise TypeError("Ensemble: predicts, and cannot be trained; train its models")

    def segment(self, image: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, K, *S), see ``SegmentationModel``."""
        return self._mean(image, 1, lambda model, x: model.segment(x, mask))

    def segment_subsets(self, image: Tensor, subsets: Tensor) -> Tensor:
        """Logits (S, B, K, *S), see ``SegmentationModel``."""
        return self._mean(image, 2, lambda model, x: model.segment_subsets(x, subsets))

    def _mean(self, image: Tensor, classes: int, logits: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """The logarithm of the mean probabilities; ``classes`` is the axis of the classes."""
        axes = range(-1, 1 - image.ndim, -1)
        flips = [some for n in range(len(axes) + 1) for some in combinations(axes, n)]
        total: Any = 0.0
        for model in self.models:
            for flip in flips if self.flips else [()]:
                total = total + logits(model, image.flip(flip)).flip(flip).softmax(classes)
        mean: Tensor = total / (len(self.models) * (len(flips) if self.flips else 1))
        # A probability may be rounded to 0, whose logarithm is not finite.
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
