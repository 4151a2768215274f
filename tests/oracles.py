"""Meta-gradients, unrolled by hand. Nothing here is imported from prism_meta.bilevel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import Problem
from torch import Tensor, nn
from torch.func import functional_call

Values = dict[str, Tensor]
#: The optimizer of one unrolling: from parameters and gradients to parameters. It keeps its own state.
Move = Callable[[Values, Values], Values]
#: Starts such an optimizer with a fresh state.
Rule = Callable[[], Move]
Moves = Callable[[str], bool]


def sgd(lr: Any, momentum: Any = 0.0) -> Rule:
    """phi - lr * v with v = momentum * v + g, from v = 0."""

    def start() -> Move:
        velocity: Values = {}

        def move(params: Values, grads: Values) -> Values:
            for n, g in grads.items():
                velocity[n] = momentum * velocity.get(n, 0.0) + g
            return {n: p - lr * velocity[n] for n, p in params.items()}

        return move

    return start


def adam(
    lr: Any,
    beta1: Any = 0.9,
    beta2: Any = 0.999,
    eps: Any = 1e-8,
    l2: Any = 0.0,
    decay: Any = 0.0,
) -> Rule:
    """Adam with an L2 penalty and AdamW's decay, written as in the papers."""

    def root(square: Tensor) -> Tensor:
        zero = (square == 0).to(square.dtype)  # at 0 the root has no derivative
        return (square + zero).sqrt() * (1 - zero)

    def start() -> Move:
        first: dict[str, Any] = {}
        second: dict[str, Any] = {}
        steps: dict[str, int] = {}

        def one(n: str, p: Tensor, g: Tensor) -> Tensor:
            g = g + l2 * p
            steps[n] = steps.get(n, 0) + 1
            first[n] = beta1 * first.get(n, 0.0) + (1 - beta1) * g
            second[n] = beta2 * second.get(n, 0.0) + (1 - beta2) * g**2
            mean = first[n] / (1 - beta1 ** steps[n])
            square = second[n] / (1 - beta2 ** steps[n])
            moved: Tensor = p - lr * decay * p - lr * mean / (root(square) + eps)
            return moved

        return lambda params, grads: {n: one(n, p, grads[n]) for n, p in params.items()}

    return start


def rates(values: Values) -> Rule:
    """Meta-SGD: phi - rate * g, elementwise."""
    return lambda: lambda params, grads: {n: p - values[n] * grads[n] for n, p in params.items()}


def every(name: str) -> bool:
    return True


def leaves(values: Values) -> Values:
    return {n: v.detach().clone().requires_grad_() for n, v in values.items()}


def phi_of(problem: Problem) -> Values:
    """The trainable parameters phi, as fresh leaves."""
    return leaves({n: p for n, p in problem.model.named_parameters() if p.requires_grad})


def loss(problem: Problem, params: Values, batch: Any) -> Tensor:
    """The objective on ``batch`` at ``params``, on copies of the model's buffers."""
    buffers = {n: b.clone() for n, b in problem.model.named_buffers()}

    def forward(*args: Any) -> Any:
        return functional_call(problem.model, {**params, **buffers}, args)

    forward.parameters = params  # type: ignore[attr-defined]
    value = problem.objective(forward, batch)
    return value if isinstance(value, Tensor) else value.loss


def derivatives(scalar: Tensor, inputs: Values, *, create_graph: bool = False) -> Values:
    """d scalar / d inputs, by name."""
    grads = torch.autograd.grad(
        scalar, list(inputs.values()), create_graph=create_graph, materialize_grads=True
    )
    return dict(zip(inputs, grads, strict=True))


def adapt(
    problem: Problem, phi: Values, rule: float | Rule, steps: int, moves: Moves = every
) -> Values:
    """phi~ with the graph of every step. A float as ``rule`` is the rate of plain SGD."""
    move = sgd(rule)() if isinstance(rule, float) else rule()
    batches = problem.train if type(problem.train).__name__ == "StepBatches" else [problem.train]
    params = dict(phi)
    for k in range(steps):
        chosen = {n: p for n, p in params.items() if moves(n)}
        grads = torch.autograd.grad(
            loss(problem, params, batches[k % len(batches)]),
            list(chosen.values()),
            create_graph=True,
            allow_unused=True,
        )
        # Like torch's optimizers: a parameter without a gradient gets no step, decay or momentum.
        given = {n: g for n, g in zip(chosen, grads, strict=True) if g is not None}
        params |= move({n: params[n] for n in given}, given)
    return params


def meta_loss(
    problem: Problem, phi: Values, rule: float | Rule, steps: int, moves: Moves = every
) -> Tensor:
    """L_meta(phi~(phi)), with its graph."""
    return loss(problem, adapt(problem, phi, rule, steps, moves), problem.meta)


def first_order(problem: Problem, rule: float | Rule, steps: int, moves: Moves = every) -> Values:
    """E3, unrolled."""
    adapted = leaves(adapt(problem, phi_of(problem), rule, steps, moves))
    return derivatives(loss(problem, adapted, problem.meta), adapted)


def second_order(problem: Problem, rule: float | Rule, steps: int, moves: Moves = every) -> Values:
    """E4, unrolled."""
    phi = phi_of(problem)
    return derivatives(meta_loss(problem, phi, rule, steps, moves), phi)


def hyper(problem: Problem, rule: Rule, steps: int, inputs: Values) -> Values:
    """d L_meta(phi~) / d inputs: the hyper-parameters that ``rule`` was made from."""
    return derivatives(meta_loss(problem, phi_of(problem), rule, steps), inputs)


def adapted_parameters(
    problem: Problem, rule: float | Rule, steps: int, moves: Moves = every
) -> Values:
    """phi~, detached."""
    adapted = adapt(problem, phi_of(problem), rule, steps, moves)
    return {n: p.detach() for n, p in adapted.items()}


def gradient(problem: Problem, params: Values, batch: Any) -> Values:
    """Gradient of the objective on ``batch`` at ``params``."""
    given = leaves(params)
    return derivatives(loss(problem, given, batch), given)


def hessian_vector(problem: Problem, params: Values, vector: Values) -> Values:
    """H_train v, as the derivative of <grad L_train, v>. It involves no inner step."""
    given = leaves(params)
    grads = derivatives(loss(problem, given, problem.train), given, create_graph=True)
    return derivatives(torch.stack([(grads[n] * v).sum() for n, v in vector.items()]).sum(), given)


def flat(values: Values) -> Tensor:
    return torch.cat([v.flatten() for v in values.values()])


def shaped(vector: Tensor, like: Values) -> Values:
    """The inverse of ``flat``."""
    parts = vector.split([v.numel() for v in like.values()])
    return {n: part.reshape(like[n].shape) for (n, part) in zip(like, parts, strict=True)}


def hessian(problem: Problem, params: Values, moves: Moves = every) -> Tensor:
    """The full matrix H_train of the adapted parameters."""
    chosen = {n: p.detach() for n, p in params.items() if moves(n)}

    def of_vector(vector: Tensor) -> Tensor:
        return loss(problem, {**params, **shaped(vector, chosen)}, problem.train)

    return torch.autograd.functional.hessian(of_vector, flat(chosen))


def implicit(problem: Problem, adapted: Values, proximal: float) -> Values:
    """(I + H_train(phi~) / lambda)^-1 grad L_meta(phi~), by a dense solver (iMAML)."""
    system = hessian(problem, adapted) / proximal
    system += torch.eye(len(system), dtype=system.dtype)
    right = flat(gradient(problem, adapted, problem.meta))
    return shaped(torch.linalg.solve(system, right), adapted)


def proximal_minimum(
    problem: Problem, phi: Values, proximal: float, moves: Moves = every
) -> Values:
    """argmin over the adapted p of L_train(p) + lambda / 2 ||p - phi||^2, by Newton's method."""
    start = {n: p.detach() for n, p in phi.items() if moves(n)}
    params = {n: p.detach() for n, p in phi.items()}
    for _ in range(12):
        here = {n: params[n] for n in start}
        slope = gradient(problem, params, problem.train)
        pulled = flat({n: slope[n] + proximal * (here[n] - start[n]) for n in start})
        system = hessian(problem, params, moves)
        system += proximal * torch.eye(len(system), dtype=system.dtype)
        params.update(shaped(flat(here) - torch.linalg.solve(system, pulled), start))
    return params


def mlp_second_order(model: nn.Sequential, train: Any, meta: Any, lr: float) -> list[Tensor]:
    """E4 for one SGD step of the tanh MLP; the forward pass and L_train's gradient are written by hand."""
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
