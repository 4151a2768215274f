"""How sure a prediction is: the entropy of its class probabilities, and how much several models disagree."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def normalized_entropy(probabilities: Tensor) -> Tensor:
    """The entropy of class probabilities, - sum_k p_k ln p_k / ln K.

    Args:
        probabilities: (K, D, H, W), in [0, 1], with sum 1 over the K classes.

    Returns:
        (D, H, W) in [0, 1]: 0 where one class is certain, 1 where all K are equally probable.

    Example:
        >>> normalized_entropy(torch.tensor([[0.5, 1.0], [0.5, 0.0]])).tolist()
        [1.0, 0.0]
    """
    # One class at a time, so that no second array of all classes is needed.
    total = torch.zeros_like(probabilities[0])
    for p in probabilities:
        total -= torch.xlogy(p, p)
    return (total / math.log(max(2, len(probabilities)))).clamp_(0, 1)


def mutual_information(members: Iterable[Tensor]) -> Tensor:
    """How much models disagree: the entropy of their mean probabilities minus the mean of their entropies.

    It is the mutual information between the class and the choice of the model. It is 0 where all models give
    the same probabilities, even if these are uncertain themselves.

    Args:
        members: the class probabilities of each model, see ``normalized_entropy``; at least one.

    Returns:
        (D, H, W) in [0, 1], as a share of ln K.

    Raises:
        ValueError: there is no model.

    Example:
        >>> sure, other = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
        >>> mutual_information([sure, other]).item(), mutual_information([sure, sure]).item()
        (1.0, 0.0)

    Source: Houlsby et al., Bayesian active learning for classification and preference learning, 2011;
    Depeweg et al., Decomposition of uncertainty in Bayesian deep learning, ICML 2018.
    """
    mean = entropy = None
    count = 0
    for probabilities in members:
        own = normalized_entropy(probabilities)
        mean = probabilities.clone() if mean is None else mean.add_(probabilities)
        entropy = own if entropy is None else entropy.add_(own)
        count += 1
    if mean is None or entropy is None:
        raise ValueError("members: got no model, expected at least one")
    # It is never negative, by convexity; rounding can make it so.
    return (normalized_entropy(mean / count) - entropy / count).clamp_(0, 1)
