"""The common suite of all strategies, and what holds only for some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    EXACT,
    F64,
    LR,
    PROBLEMS,
    Corners,
    Problem,
    average,
    copies,
    corners,
    equal,
    meta_gradient,
    mlp,
    mse,
    norm,
    prism,
    randn,
    relative_error,
    trainable,
)
from torch import Tensor, nn
from variants import ORACLES, bound, every_adapting, every_kind, every_variant, make

from prism_meta.bilevel.strategies import (
    GraphSizes,
    MetaGradient,
    MetaStrategy,
    SecondOrder,
    SingleLevel,
    StepBatches,
)

every_problem = pytest.mark.parametrize("make_problem", PROBLEMS)


def tensors(result: MetaGradient) -> dict[str, Tensor]:
    """All that a result holds, under one name each."""
    found: dict[str, Tensor] = {"train_loss": result.train_loss, "meta_loss": result.meta_loss}
    for part in ("gradient", "adapted", "terms", "buffers", "inner_buffers", "diagnostics"):
        found |= {f"{part} {n}": t for n, t in getattr(result, part).items()}
    for name, values in result.state.items():
        found |= {f"state {name} {n}": t for n, t in values.items()}
    return found


@every_problem
@every_variant
def test_one_entry_per_parameter_and_nothing_requires_grad(
    strategy: MetaStrategy, make_problem: Callable[[], Problem]
) -> None:
    problem = make_problem()
    result = meta_gradient(strategy, problem)
    phi = trainable(problem.model)
    for values in (result.gradient, result.adapted):
        assert list(values) == list(phi)
        for name, value in values.items():
            assert (value.shape, value.dtype) == (phi[name].shape, phi[name].dtype), name
    assert norm(result.gradient) > 0
    assert result.train_loss.shape == result.meta_loss.shape == ()
    assert all(t.shape == () for t in result.diagnostics.values())
    assert result.hyper_gradient == {}
    assert list(result.state) == (list(phi) if strategy.adapts else [])
    assert not any(t.requires_grad for t in tensors(result).values())


@pytest.mark.parametrize("make_problem", [corners, average])
@every_variant
def test_the_model_is_not_changed(
    strategy: MetaStrategy, make_problem: Callable[[], Problem]
) -> None:
    problem = make_problem()
    for param in problem.model.parameters():
        param.grad = torch.full_like(param, 7)
    before = copies(problem.model.state_dict())
    meta_gradient(strategy, problem)
    assert equal(problem.model.state_dict(), before)
    assert all(bool((p.grad == 7).all()) for p in problem.model.parameters() if p.grad is not None)
    assert not any(t.requires_grad for t in problem.model.buffers())


@every_variant
def test_the_result_shares_no_memory_with_the_model(strategy: MetaStrategy) -> None:
    problem = corners()
    result = meta_gradient(strategy, problem)
    kept = copies(tensors(result))
    with torch.no_grad():
        for tensor in (*problem.model.parameters(), *problem.model.buffers()):
            tensor.add_(1)
    assert equal(tensors(result), kept)


@every_variant
def test_buffers_that_carry_a_graph_come_back_detached(strategy: MetaStrategy) -> None:
    result = meta_gradient(strategy, average())
    for buffers in (result.buffers, result.inner_buffers):
        assert list(buffers) == ["average"]
        assert not buffers["average"].requires_grad
        assert norm(buffers) > 0


@every_variant
def test_frozen_unused_and_tied_parameters(strategy: MetaStrategy) -> None:
    problem = corners()
    result = meta_gradient(strategy, problem)
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
    assert torch.equal(result.adapted["unused"], trainable(problem.model)["unused"])


@every_variant
def test_the_gradient_is_what_the_class_says(strategy: MetaStrategy) -> None:
    problem = mlp()
    result = meta_gradient(strategy, problem)
    expected = ORACLES[strategy.equation](problem, strategy, result)
    assert relative_error(result.gradient, expected) <= bound(strategy)


@every_kind
def test_a_class_describes_itself(kind: type[MetaStrategy]) -> None:
    assert kind.name and kind.units and kind.equation in ORACLES
    memory = kind.memory(GraphSizes(forward=1000, backward=3000, params=10, float64=2.0), 2)
    assert memory and all(name.startswith(kind.__name__) for name in memory)
    assert all(size > 1000 for size in memory.values())


@every_variant
def test_a_tied_weight_gets_the_sum_over_its_uses(strategy: MetaStrategy) -> None:
    problem = corners()
    result = meta_gradient(strategy, problem)
    expected = ORACLES[strategy.equation](problem, strategy, result)
    assert relative_error(result.gradient, expected) <= bound(strategy)


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

    plain = meta_gradient(strategy, problem)
    result = meta_gradient(strategy, replace(problem, objective=with_terms))
    assert relative_error(result.gradient, plain.gradient) == 0
    assert plain.terms == {}
    # The terms are those of the meta batch at phi~.
    assert result.terms["half"].item() == pytest.approx(result.meta_loss.item() / 2, rel=1e-12)


@every_variant
def test_losses_are_the_train_loss_before_and_the_meta_loss_after(strategy: MetaStrategy) -> None:
    problem = mlp()
    result = meta_gradient(strategy, problem)
    before = oracles.loss(problem, trainable(problem.model), problem.train)
    after = oracles.loss(problem, result.adapted, problem.meta)
    assert result.train_loss.item() == pytest.approx(before.item(), rel=1e-12)
    assert result.meta_loss.item() == pytest.approx(after.item(), rel=1e-12)


@every_variant
def test_keyword_arguments_reach_the_model(strategy: MetaStrategy) -> None:
    problem = mlp()

    def by_keyword(forward: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (forward(input=batch[0]) - batch[1]).square().mean()

    result = meta_gradient(strategy, replace(problem, objective=by_keyword))
    assert relative_error(result.gradient, meta_gradient(strategy, problem).gradient) == 0


@every_variant
def test_one_batch_for_all_steps_or_one_for_each(strategy: MetaStrategy) -> None:
    problem = mlp()
    expected = meta_gradient(strategy, problem).gradient
    for train in (list(problem.train), StepBatches([problem.train])):
        assert equal(meta_gradient(strategy, replace(problem, train=train)).gradient, expected)


@every_variant
def test_no_batch_is_refused(strategy: MetaStrategy) -> None:
    message = "train: got StepBatches without a batch, expected at least one"
    with pytest.raises(ValueError, match=f"^{message}$"):
        meta_gradient(strategy, replace(mlp(), train=StepBatches()))


@every_variant
def test_a_loss_that_is_not_a_scalar_is_refused(strategy: MetaStrategy) -> None:
    def per_sample(forward: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
        return (forward(batch[0]) - batch[1]).square().mean(1)

    with pytest.raises(
        ValueError, match=r"^objective: got a loss of shape \(6,\), expected a scalar$"
    ):
        meta_gradient(strategy, replace(mlp(), objective=per_sample))


@every_variant
def test_a_model_without_trainable_parameters_is_refused(strategy: MetaStrategy) -> None:
    with pytest.raises(
        ValueError,
        match=r"^model: Linear has no trainable parameter; "
        r"set requires_grad=True on those to learn$",
    ):
        meta_gradient(strategy, replace(mlp(), model=nn.Linear(3, 2).requires_grad_(False)))


@every_adapting
def test_no_inner_step_is_refused(kind: type[MetaStrategy]) -> None:
    with pytest.raises(ValueError, match=r"^steps: got 0, expected at least 1 inner step$"):
        make(kind, steps=0)


@every_adapting
def test_adapting_nothing_is_refused(kind: type[MetaStrategy]) -> None:
    with pytest.raises(
        ValueError,
        match=r"^adapt: is False for every parameter; the model's are "
        r"0.weight, 0.bias, 2.weight, 2.bias$",
    ):
        meta_gradient(make(kind, adapt=lambda name: False), mlp())


@every_adapting
def test_parameters_that_are_not_adapted_stay(kind: type[MetaStrategy]) -> None:
    problem = mlp()
    result = meta_gradient(make(kind, 2, adapt=lambda name: name.startswith("2.")), problem)
    assert list(result.state) == ["2.weight", "2.bias"]
    for name, param in trainable(problem.model).items():
        assert torch.equal(result.adapted[name], param) is name.startswith("0."), name


@every_variant
def test_two_calls_give_the_same(strategy: MetaStrategy) -> None:
    problem = prism()
    one, two = (tensors(meta_gradient(strategy, problem)) for _ in range(2))
    assert equal(one, two)


@every_variant
def test_buffers_start_from_the_models_own_and_see_one_batch(strategy: MetaStrategy) -> None:
    problem = corners()
    batch = problem.meta if strategy.adapts else problem.train
    result = meta_gradient(strategy, problem)
    assert result.buffers["norm.num_batches_tracked"].item() == 1
    assert result.inner_buffers["norm.num_batches_tracked"].item() == getattr(strategy, "steps", 1)
    # BatchNorm's own statistics of one batch at the parameters that the batch was run with.
    net, weights = problem.model, {**trainable(problem.model), **result.adapted}
    assert isinstance(net, Corners)
    frozen = batch[0] @ net.frozen.weight.T + net.frozen.bias
    x = torch.tanh(frozen @ weights["square.weight"].T + weights["square.bias"])
    torch.testing.assert_close(
        result.buffers["norm.running_mean"], 0.1 * x.mean(0).detach(), rtol=1e-12, atol=1e-16
    )
    torch.testing.assert_close(
        result.buffers["norm.running_var"], 0.9 + 0.1 * x.var(0).detach(), rtol=1e-12, atol=0
    )


# ---------------------------------------------------------------- the mean over episodes


@every_variant
def test_the_mean_over_episodes_is_that_of_every_tensor(strategy: MetaStrategy) -> None:
    problem = corners()
    other = replace(problem, train=problem.meta, meta=(randn(3, 3, seed=70), randn(3, 2, seed=71)))
    one, two = meta_gradient(strategy, problem), meta_gradient(strategy, other)
    mean, first, second = (tensors(r) for r in (MetaGradient.mean([one, two]), one, two))
    assert list(mean) == list(first)
    for name, value in mean.items():
        if value.is_floating_point():
            expected = (first[name] + second[name]) / 2
            torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-17)
        else:
            assert torch.equal(value, first[name]), name
    assert not torch.equal(mean["train_loss"], first["train_loss"])


def test_the_mean_over_one_episode_is_itself() -> None:
    result = meta_gradient(make(SecondOrder), corners())
    assert equal(tensors(MetaGradient.mean([result])), tensors(result))


# ---------------------------------------------------------------- single level


@every_problem
def test_single_level_is_the_gradient_of_the_train_loss(
    make_problem: Callable[[], Problem],
) -> None:
    problem = make_problem()
    result = meta_gradient(SingleLevel(), problem)
    phi = trainable(problem.model)
    expected = oracles.gradient(problem, phi, problem.train)
    assert relative_error(result.gradient, expected) <= EXACT
    assert equal(result.adapted, phi)


def test_single_level_learns_from_the_first_of_several_batches() -> None:
    problem = mlp()
    result = meta_gradient(
        SingleLevel(), replace(problem, train=StepBatches([problem.train, problem.meta]))
    )
    assert equal(result.gradient, meta_gradient(SingleLevel(), problem).gradient)


def test_the_objective_of_another_batch_form_works() -> None:
    """A batch is whatever the objective takes, here a number of zeros."""

    def objective(forward: Callable[..., Any], batch: int) -> Tensor:
        return mse(forward, (torch.ones(batch, 3, dtype=F64), torch.zeros(batch, 2, dtype=F64)))

    problem = replace(mlp(), objective=objective, train=2, meta=4)
    result = meta_gradient(make(SecondOrder), problem)
    assert relative_error(result.gradient, oracles.second_order(problem, LR, 1)) <= EXACT
