"""The meta-gradients E3 and E4, unrolled by hand; nothing here comes from prism_meta.strategies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import Problem
from torch import Tensor, nn
from torch.func import functional_call

Scalar = Callable[[list[Tensor]], Tensor]


def losses_of(problem: Problem) -> tuple[list[str], list[Tensor], Scalar, Scalar]:
    """Names of phi, phi as fresh leaves, and L_train and L_meta as functions of a list."""
    names = [n for n, p in problem.model.named_parameters() if p.requires_grad]
    phi = [
        p.detach().clone().requires_grad_() for p in problem.model.parameters() if p.requires_grad
    ]

    def at(batch: Any) -> Scalar:
        def scalar(params: list[Tensor]) -> Tensor:
            given = dict(zip(names, params, strict=True))
            buffers = {n: b.clone() for n, b in problem.model.named_buffers()}

            def forward(*args: Any) -> Any:
                return functional_call(problem.model, {**given, **buffers}, args)

            value = problem.objective(forward, batch)
            return value if isinstance(value, Tensor) else value.loss

        return scalar

    return names, phi, at(problem.train), at(problem.meta)


def adapt(train: Scalar, phi: list[Tensor], lr: float, steps: int) -> list[Tensor]:
    """phi~ after ``steps`` of phi - lr * grad, with the graph of every step."""
    params = list(phi)
    for _ in range(steps):
        grads = torch.autograd.grad(
            train(params), params, create_graph=True, materialize_grads=True
        )
        params = [p - lr * g for p, g in zip(params, grads, strict=True)]
    return params


def first_order(problem: Problem, lr: float, steps: int) -> dict[str, Tensor]:
    """E3."""
    names, phi, train, meta = losses_of(problem)
    adapted = [p.detach().requires_grad_() for p in adapt(train, phi, lr, steps)]
    grads = torch.autograd.grad(meta(adapted), adapted, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def second_order(problem: Problem, lr: float, steps: int) -> dict[str, Tensor]:
    """E4."""
    names, phi, train, meta = losses_of(problem)
    grads = torch.autograd.grad(meta(adapt(train, phi, lr, steps)), phi, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def adapted_parameters(problem: Problem, lr: float, steps: int) -> dict[str, Tensor]:
    """phi~."""
    names, phi, train, _ = losses_of(problem)
    return {n: p.detach() for n, p in zip(names, adapt(train, phi, lr, steps), strict=True)}


def meta_loss_after_adapting(problem: Problem, phi: list[Tensor], lr: float, steps: int) -> float:
    """L_meta(phi~(phi)) at any phi, for finite differences."""
    _, _, train, meta = losses_of(problem)
    leaves = [p.detach().clone().requires_grad_() for p in phi]
    return meta(adapt(train, leaves, lr, steps)).item()


def hessian_vector(train: Scalar, phi: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    """H_train(phi) v as the derivative of <grad L_train, v>: neither a step nor its graph."""
    grads = torch.autograd.grad(train(phi), phi, create_graph=True, materialize_grads=True)
    inner = sum((g * v).sum() for g, v in zip(grads, vector, strict=True))
    return list(torch.autograd.grad(inner, phi, materialize_grads=True))


def gradient(problem: Problem, params: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
    """grad of the objective on ``batch`` at ``params``."""
    changed = Problem(problem.name, problem.model, problem.objective, batch, batch)
    names, _, loss, _ = losses_of(changed)
    leaves = [params[n].detach().clone().requires_grad_() for n in names]
    grads = torch.autograd.grad(loss(leaves), leaves, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def mlp_second_order(model: nn.Sequential, train: Any, meta: Any, lr: float) -> list[Tensor]:
    """E4 for one step of the tanh MLP with the forward pass and L_train's gradient by hand."""
    w1, b1, w2, b2 = (p.detach().clone().requires_grad_() for p in model.parameters())

    def hidden(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(x @ w.T + b)

    x, y = train
    h = hidden(x, w1, b1)
    error = 2 * (h @ w2.T + b2 - y) / y.numel()
    back = (error @ w2) * (1 - h * h)
    v1, c1 = w1 - lr * back.T @ x, b1 - lr * back.sum(0)
    v2, c2 = w2 - lr * error.T @ h, b2 - lr * error.sum(0)
    x, y = meta
    loss = (hidden(x, v1, c1) @ v2.T + c2 - y).square().mean()
    return list(torch.autograd.grad(loss, (w1, b1, w2, b2)))
