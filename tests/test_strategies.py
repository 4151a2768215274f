"""Meta-gradients: one suite for every strategy, then each against unrolled oracles in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    F64,
    PROBLEMS,
    Problem,
    conv,
    mlp,
    mse,
    norm,
    prism,
    randn,
    randomize,
    relative_error,
    trainable,
)
from torch import Tensor, nn

from prism_meta.inner import SGD
from prism_meta.strategies import (
    ALL_STRATEGIES,
    FirstOrder,
    MetaStrategy,
    SecondOrder,
    SingleLevel,
)

LR = 0.1
EXACT = 1e-9


def make(kind: type[MetaStrategy], steps: int = 1, lr: float = LR) -> MetaStrategy:
    """Any strategy of the list: those that adapt take an inner optimizer and a number of steps."""
    return kind() if kind is SingleLevel else kind(inner=SGD(lr), steps=steps)  # type: ignore[call-arg]


VARIANTS = [
    pytest.param(make(kind, steps), id=f"{kind.__name__}-{steps}")
    for kind in ALL_STRATEGIES
    for steps in ((1,) if kind is SingleLevel else (1, 2, 3))
]
every_variant = pytest.mark.parametrize("strategy", VARIANTS)
every_problem = pytest.mark.parametrize("make_problem", PROBLEMS)
TRAIN = randn(4, 3, seed=40), randn(4, 2, seed=41)
META = randn(4, 3, seed=42), randn(4, 2, seed=43)


class Corners(nn.Module):
    """A frozen layer, an unused parameter, a tied weight and BatchNorm, in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.square = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.again = nn.Linear(3, 3)
        self.again.weight = self.square.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(3, 2)
        randomize(self, seed=5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.square(self.frozen(x))))
        out: Tensor = self.head(torch.tanh(self.again(x)))
        return out


class Average(nn.Module):
    """A buffer that gathers activations with their graph, as no BatchNorm does."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("average", torch.zeros(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.linear(x))
        self.average.mul_(0.9).add_(0.1 * out.mean(0))
        return out - self.average


# ---------------------------------------------------------------- one suite for all


@every_problem
@every_variant
def test_one_entry_per_parameter_and_nothing_requires_grad(
    strategy: MetaStrategy, make_problem: Callable[[], Problem]
) -> None:
    problem = make_problem()
    result = strategy.meta_gradient(problem.model, problem.objective, problem.train, problem.meta)
    phi = trainable(problem.model)
    for values in (result.gradient, result.adapted):
        assert list(values) == list(phi)
        for name, value in values.items():
            assert (value.shape, value.dtype) == (phi[name].shape, phi[name].dtype), name
    assert norm(result.gradient) > 0
    assert result.train_loss.shape == result.meta_loss.shape == ()
    tensors = [
        *result.gradient.values(),
        *result.adapted.values(),
        *result.terms.values(),
        *result.buffers.values(),
        result.train_loss,
        result.meta_loss,
    ]
    assert not any(t.requires_grad for t in tensors)


@pytest.mark.parametrize("model", [Corners, Average])
@every_variant
def test_the_model_is_not_changed(strategy: MetaStrategy, model: type[nn.Module]) -> None:
    net = model()
    for param in net.parameters():
        param.grad = torch.full_like(param, 7)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    strategy.meta_gradient(net, mse, TRAIN, META)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert all(bool((p.grad == 7).all()) for p in net.parameters() if p.grad is not None)
    assert not any(t.requires_grad for t in net.buffers())


@every_variant
def test_the_result_shares_no_memory_with_the_model(strategy: MetaStrategy) -> None:
    net = Corners()
    result = strategy.meta_gradient(net, mse, TRAIN, META)
    kept = {n: t.clone() for n, t in {**result.adapted, **result.buffers}.items()}
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.add_(1)
    assert all(torch.equal(kept[n], t) for n, t in {**result.adapted, **result.buffers}.items())


@every_variant
def test_buffers_that_carry_a_graph_come_back_detached(strategy: MetaStrategy) -> None:
    result = strategy.meta_gradient(Average(), mse, TRAIN, META)
    assert list(result.buffers) == ["average"]
    assert not result.buffers["average"].requires_grad
    assert norm(result.buffers) > 0


@every_variant
def test_frozen_unused_and_tied_parameters(strategy: MetaStrategy) -> None:
    net = Corners()
    result = strategy.meta_gradient(net, mse, TRAIN, META)
    assert (
        list(result.gradient)
        == list(result.adapted)
        == [
            "unused",
            "square.weight",
            "square.bias",
            "norm.weight",
            "norm.bias",
            "again.bias",
            "head.weight",
            "head.bias",
        ]
    )  # no frozen.*, and again.weight under its first name
    assert torch.equal(result.gradient["unused"], torch.zeros(2, dtype=F64))
    assert torch.equal(result.adapted["unused"], net.unused)


@every_variant
def test_a_tied_weight_gets_the_sum_over_its_uses(strategy: MetaStrategy) -> None:
    tied = Corners()
    result = strategy.meta_gradient(tied, mse, TRAIN, META)
    steps = getattr(strategy, "steps", 0)
    problem = Problem("tied", tied, mse, TRAIN, META)
    if isinstance(strategy, SingleLevel):
        expected = oracles.gradient(problem, trainable(tied), TRAIN)
    elif isinstance(strategy, FirstOrder):
        expected = oracles.first_order(problem, LR, steps)
    else:
        expected = oracles.second_order(problem, LR, steps)
    assert relative_error(result.gradient, expected) <= EXACT


@dataclass
class Value:
    loss: Tensor
    terms: dict[str, Tensor]


@every_variant
def test_an_objective_may_return_a_loss_with_terms(strategy: MetaStrategy) -> None:
    problem = mlp()

    def with_terms(forward: Callable[..., Any], batch: Any) -> Value:
        loss = problem.objective(forward, batch)
        return Value(loss, {"half": loss / 2})

    model, train, meta = problem.model, problem.train, problem.meta
    plain = strategy.meta_gradient(model, problem.objective, train, meta)
    result = strategy.meta_gradient(model, with_terms, train, meta)
    assert relative_error(result.gradient, plain.gradient) == 0
    assert plain.terms == {}
    # The terms are those of the meta batch at phi~.
    assert result.terms["half"].item() == pytest.approx(result.meta_loss.item() / 2, rel=1e-12)


@every_variant
def test_losses_are_the_train_loss_before_and_the_meta_loss_after(strategy: MetaStrategy) -> None:
    problem = mlp()
    result = strategy.meta_gradient(problem.model, problem.objective, problem.train, problem.meta)
    _, phi, train, meta = oracles.losses_of(problem)
    assert result.train_loss.item() == pytest.approx(train(phi).item(), rel=1e-12)
    at_adapted = meta(list(result.adapted.values()))
    assert result.meta_loss.item() == pytest.approx(at_adapted.item(), rel=1e-12)


@every_variant
def test_keyword_arguments_reach_the_model(strategy: MetaStrategy) -> None:
    problem = mlp()

    def by_keyword(forward: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (forward(input=batch[0]) - batch[1]).square().mean()

    result = strategy.meta_gradient(problem.model, by_keyword, problem.train, problem.meta)
    plain = strategy.meta_gradient(problem.model, mse, problem.train, problem.meta)
    assert relative_error(result.gradient, plain.gradient) == 0


@every_variant
def test_a_loss_that_is_not_a_scalar_is_refused(strategy: MetaStrategy) -> None:
    problem = mlp()

    def per_sample(forward: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (forward(batch[0]) - batch[1]).square().mean(1)

    with pytest.raises(
        ValueError, match=r"objective: got a loss of shape \(6,\), expected a scalar"
    ):
        strategy.meta_gradient(problem.model, per_sample, problem.train, problem.meta)


@every_variant
def test_a_model_without_trainable_parameters_is_refused(strategy: MetaStrategy) -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(
        ValueError,
        match="model: Linear has no trainable parameter; set requires_grad=True on those to learn",
    ):
        strategy.meta_gradient(model, mse, TRAIN, META)


@pytest.mark.parametrize("kind", [k for k in ALL_STRATEGIES if k is not SingleLevel])
def test_no_inner_step_is_refused(kind: type[MetaStrategy]) -> None:
    with pytest.raises(ValueError, match="steps: got 0, expected at least 1 inner step"):
        make(kind, steps=0)


@every_variant
def test_two_calls_give_the_same(strategy: MetaStrategy) -> None:
    problem = prism()
    one, two = (
        strategy.meta_gradient(problem.model, problem.objective, problem.train, problem.meta)
        for _ in range(2)
    )
    assert all(torch.equal(one.gradient[n], two.gradient[n]) for n in one.gradient)


@every_variant
def test_buffers_start_from_the_models_own_and_see_one_batch(strategy: MetaStrategy) -> None:
    net = Corners()
    batch = TRAIN if isinstance(strategy, SingleLevel) else META
    result = strategy.meta_gradient(net, mse, TRAIN, META)
    assert result.buffers["norm.num_batches_tracked"].item() == 1
    # BatchNorm's own statistics of one batch at the parameters that the batch was run with.
    weights = {**trainable(net), **result.adapted}
    x = torch.tanh(
        (batch[0] @ net.frozen.weight.T + net.frozen.bias) @ weights["square.weight"].T
        + weights["square.bias"]
    )
    torch.testing.assert_close(
        result.buffers["norm.running_mean"], 0.1 * x.mean(0).detach(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        result.buffers["norm.running_var"], 0.9 + 0.1 * x.var(0).detach(), rtol=1e-12, atol=0
    )


# ---------------------------------------------------------------- against the oracles


@every_problem
def test_single_level_is_the_gradient_of_the_train_loss(
    make_problem: Callable[[], Problem],
) -> None:
    problem = make_problem()
    result = SingleLevel().meta_gradient(
        problem.model, problem.objective, problem.train, problem.meta
    )
    phi = trainable(problem.model)
    expected = oracles.gradient(problem, phi, problem.train)
    assert relative_error(result.gradient, expected) <= EXACT
    assert relative_error(result.adapted, phi) == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "oracle"),
    [(FirstOrder, oracles.first_order), (SecondOrder, oracles.second_order)],
)
@every_problem
def test_equals_the_unrolled_oracle(
    make_problem: Callable[[], Problem],
    kind: type[MetaStrategy],
    oracle: Callable[[Problem, float, int], dict[str, Tensor]],
    steps: int,
) -> None:
    problem = make_problem()
    result = make(kind, steps).meta_gradient(
        problem.model, problem.objective, problem.train, problem.meta
    )
    assert relative_error(result.gradient, oracle(problem, LR, steps)) <= EXACT
    phi = trainable(problem.model)
    expected = oracles.adapted_parameters(problem, LR, steps)
    moved = {n: expected[n] - phi[n] for n in phi}
    assert relative_error({n: result.adapted[n] - phi[n] for n in phi}, moved) <= EXACT


def test_second_order_equals_a_gradient_written_by_hand() -> None:
    problem = mlp()
    result = SecondOrder(SGD(LR)).meta_gradient(
        problem.model, problem.objective, problem.train, problem.meta
    )
    assert isinstance(problem.model, nn.Sequential)
    by_hand = oracles.mlp_second_order(problem.model, problem.train, problem.meta, LR)
    expected = dict(zip(result.gradient, by_hand, strict=True))
    assert relative_error(result.gradient, expected) <= EXACT


@every_problem
def test_one_step_is_the_hessian_formula(make_problem: Callable[[], Problem]) -> None:
    problem = make_problem()
    result = SecondOrder(SGD(LR)).meta_gradient(
        problem.model, problem.objective, problem.train, problem.meta
    )
    g = oracles.first_order(problem, LR, 1)
    names, phi, train, _ = oracles.losses_of(problem)
    product = oracles.hessian_vector(train, phi, list(g.values()))
    expected = {n: g[n] - LR * h for n, h in zip(names, product, strict=True)}
    assert relative_error(result.gradient, expected) <= EXACT


def test_one_step_is_the_hessian_formula_with_the_whole_hessian() -> None:
    problem = mlp()
    result = SecondOrder(SGD(LR)).meta_gradient(
        problem.model, problem.objective, problem.train, problem.meta
    )
    _, phi, train, _ = oracles.losses_of(problem)
    sizes, shapes = [p.numel() for p in phi], [p.shape for p in phi]

    def of_flat(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        return train([p.reshape(s) for p, s in zip(parts, shapes, strict=True)])

    flat = torch.cat([p.detach().flatten() for p in phi])
    hessian = torch.autograd.functional.hessian(of_flat, flat)
    g = torch.cat([v.flatten() for v in oracles.first_order(problem, LR, 1).values()])
    actual = torch.cat([v.flatten() for v in result.gradient.values()])
    expected = g - LR * hessian @ g
    assert ((actual - expected).norm() / expected.norm()).item() <= EXACT


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("make_problem", [mlp, conv])
def test_second_order_equals_finite_differences(
    make_problem: Callable[[], Problem], steps: int
) -> None:
    problem = make_problem()
    result = SecondOrder(SGD(LR), steps).meta_gradient(
        problem.model, problem.objective, problem.train, problem.meta
    )
    phi = list(trainable(problem.model).values())
    for seed in range(5):
        direction = [randn(*p.shape, seed=100 + 10 * seed + i) for i, p in enumerate(phi)]

        def along(step: float, direction: list[Tensor] = direction) -> float:
            moved = [p + step * d for p, d in zip(phi, direction, strict=True)]
            return oracles.meta_loss_after_adapting(problem, moved, LR, steps)

        # Fourth order, step 1e-3: truncation about 1e-12, rounding about 1e-16 / 1e-3.
        step = 1e-3 if problem.name == "mlp" else 1e-5  # LeakyReLU has kinks to stay away from
        near, far = along(step) - along(-step), along(2 * step) - along(-2 * step)
        expected = (8 * near - far) / (12 * step)
        actual = sum(
            (result.gradient[n] * d).sum().item()
            for n, d in zip(result.gradient, direction, strict=True)
        )
        assert actual == pytest.approx(expected, rel=1e-7, abs=1e-9)


@every_problem
def test_first_and_second_order_differ_on_a_curved_problem(
    make_problem: Callable[[], Problem],
) -> None:
    problem = make_problem()
    args = problem.model, problem.objective, problem.train, problem.meta
    first = FirstOrder(SGD(LR)).meta_gradient(*args)
    second = SecondOrder(SGD(LR)).meta_gradient(*args)
    assert relative_error(first.gradient, second.gradient) > 1e-2
    assert all(torch.equal(first.adapted[n], second.adapted[n]) for n in first.adapted)
    assert torch.equal(first.meta_loss, second.meta_loss)


@every_problem
def test_second_order_tends_to_first_at_the_rate_of_the_inner_step(
    make_problem: Callable[[], Problem],
) -> None:
    problem = make_problem()
    args = problem.model, problem.objective, problem.train, problem.meta
    gaps = []
    for lr in (1e-4, 5e-5):
        first = FirstOrder(SGD(lr)).meta_gradient(*args)
        second = SecondOrder(SGD(lr)).meta_gradient(*args)
        gaps.append(relative_error(first.gradient, second.gradient))
    assert 0 < gaps[0] < 1e-2
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_second_order_goes_through_momentum(momentum: float) -> None:
    problem = mlp()
    result = SecondOrder(SGD(LR, momentum=momentum), steps=3).meta_gradient(
        problem.model, problem.objective, problem.train, problem.meta
    )
    names, phi, train, meta = oracles.losses_of(problem)
    params, velocity = phi, [torch.zeros_like(p) for p in phi]
    for _ in range(3):
        grads = torch.autograd.grad(train(params), params, create_graph=True)
        velocity = [momentum * v + g for v, g in zip(velocity, grads, strict=True)]
        params = [p - LR * v for p, v in zip(params, velocity, strict=True)]
    expected = dict(zip(names, torch.autograd.grad(meta(params), phi), strict=True))
    assert relative_error(result.gradient, expected) <= EXACT


def test_a_modality_that_was_never_shown_gets_no_gradient() -> None:
    problem = prism()
    for strategy in (SingleLevel(), FirstOrder(SGD(LR)), SecondOrder(SGD(LR))):
        result = strategy.meta_gradient(
            problem.model, problem.objective, problem.train, problem.train
        )
        for name, gradient in result.gradient.items():
            if name.startswith("encoders.2."):
                assert torch.equal(gradient, torch.zeros_like(gradient)), name
        assert result.gradient["encoders.0.blocks.0.0.weight"].abs().sum() > 0
