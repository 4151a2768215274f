"""Losses (E5-E9), their weights (E11, E12) and their sum (E10).

An objective is any function of ``forward`` and a batch that returns a scalar. ``forward`` runs the model
at the parameters that a strategy asks for. To penalise parameters, use ``forward.parameters``, a mapping
from names to their current values.

Example:
    >>> import torch
    >>> import prism_meta as pm
    >>> def objective(forward, batch):
    ...     fused = forward(batch.image, batch.mask).fused
    ...     size = sum(p.square().sum() for p in forward.parameters.values())
    ...     return pm.losses.soft_dice(fused, batch.target).mean() + 1e-4 * size
    >>> model = pm.wrap(torch.nn.Conv2d(2, 3, 1), ("t1", "t2"))
    >>> mask, target = torch.ones(2, 2).bool(), torch.zeros(2, 8, 8).long()
    >>> batch = pm.Batch(torch.randn(2, 2, 8, 8), mask, target)
    >>> strategy = pm.SecondOrder(pm.SGD(0.1))
    >>> sorted(strategy.meta_gradient(model, objective, batch, batch).gradient)
    ['net.bias', 'net.weight']
"""

from prism_meta.objective import losses

__all__ = ["losses"]
