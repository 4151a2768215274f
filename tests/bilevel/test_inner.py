"""Inner optimizers: against torch.optim, their purity, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import F64, copies, derivative, equal, mlp, mse, randn, relative_error, trainable
from torch import Tensor, nn
from torch.optim import Optimizer

from prism_meta.bilevel.functional.trees import Params, State
from prism_meta.bilevel.inner import SGD, Adam, AdamW, InnerOptimizer, MetaSGD

OPTIONS: list[tuple[type[InnerOptimizer], type[Optimizer], dict[str, Any]]] = [
    (SGD, torch.optim.SGD, {}),
    (SGD, torch.optim.SGD, {"momentum": 0.9}),
    (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (SGD, torch.optim.SGD, {"weight_decay": 0.3}),
    (SGD, torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.3}),
    (SGD, torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.3, "nesterov": True}),
    (Adam, torch.optim.Adam, {}),
    (Adam, torch.optim.Adam, {"betas": (0.5, 0.9), "eps": 1e-3}),
    (Adam, torch.optim.Adam, {"betas": (0.0, 0.0), "weight_decay": 0.3}),
    (AdamW, torch.optim.AdamW, {}),
    (AdamW, torch.optim.AdamW, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.7}),
]
every_option = pytest.mark.parametrize(("kind", "torch_kind", "options"), OPTIONS)
#: Each hyper-parameter at a value where it matters; eps is large, or its effect would be rounding.
HYPER: dict[type[InnerOptimizer], dict[str, float]] = {
    SGD: {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.2},
    Adam: {"lr": 0.1, "beta1": 0.6, "beta2": 0.7, "eps": 0.1, "weight_decay": 0.2},
    AdamW: {"lr": 0.1, "beta1": 0.6, "beta2": 0.7, "eps": 0.1, "weight_decay": 0.2},
}
every_hyper = pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, values in HYPER.items() for name in values]
)


def build(kind: type[InnerOptimizer], **values: Any) -> InnerOptimizer:
    """``kind`` with its usual values of HYPER, but for ``values``."""
    given: dict[str, Any] = {**HYPER[kind], **values}
    if kind is SGD:
        return SGD(given.pop("lr"), **given, nesterov=True)
    betas = given.pop("beta1"), given.pop("beta2")
    return kind(given.pop("lr"), betas, **given)


def torch_step(model: nn.Module, optimizer: Optimizer, batch: Any) -> Params:
    """One step of torch's optimizer; the gradients it was made with."""
    optimizer.zero_grad()
    mse(model, batch).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return grads


def torch_state(model: nn.Module, optimizer: Optimizer) -> State:
    """The state that torch keeps, by the names of the parameters."""
    return {
        name: {k: v.clone() for k, v in optimizer.state[p].items() if v is not None}
        for name, p in model.named_parameters()
    }


def close(state: State, expected: State) -> None:
    """The form is exactly torch's; the numbers differ by rounding."""
    assert list(state) == list(expected)
    for name, values in expected.items():
        assert set(state[name]) == set(values), name
        for key, value in values.items():
            torch.testing.assert_close(state[name][key], value, rtol=1e-12, atol=1e-15)


@every_option
def test_five_steps_and_states_equal_torch(
    kind: type[InnerOptimizer], torch_kind: type[Optimizer], options: dict[str, Any]
) -> None:
    problem = mlp()
    reference = torch_kind(problem.model.parameters(), lr=0.07, **options)  # type: ignore[call-arg]
    inner = kind(0.07, **options)
    assert inner.torch_optimizer is torch_kind
    params = copies(trainable(problem.model))
    state = inner.init(params)
    for _ in range(5):
        before = copies(trainable(problem.model))
        grads = torch_step(problem.model, reference, problem.train)
        new, state = inner.update(grads, state, params)
        expected = {n: p - before[n] for n, p in trainable(problem.model).items()}
        assert relative_error({n: new[n] - params[n] for n in params}, expected) <= 1e-12
        close(state, torch_state(problem.model, reference))
        params = new


@every_option
def test_it_goes_on_from_a_torch_optimizer(
    kind: type[InnerOptimizer], torch_kind: type[Optimizer], options: dict[str, Any]
) -> None:
    problem = mlp()
    reference = torch_kind(problem.model.parameters(), lr=0.07, **options)  # type: ignore[call-arg]
    for _ in range(3):
        torch_step(problem.model, reference, problem.train)
    before, state = copies(trainable(problem.model)), torch_state(problem.model, reference)
    grads = torch_step(problem.model, reference, problem.meta)
    new, state = kind(0.07, **options).update(grads, state, before)
    expected = {n: p - before[n] for n, p in trainable(problem.model).items()}
    assert relative_error({n: new[n] - before[n] for n in before}, expected) <= 1e-12
    close(state, torch_state(problem.model, reference))


@every_option
def test_arguments_are_not_changed(
    kind: type[InnerOptimizer], torch_kind: type[Optimizer], options: dict[str, Any]
) -> None:
    inner = kind(0.07, **options)
    params = {"w": randn(3, seed=0), "b": randn(2, seed=1)}
    grads = {"w": randn(3, seed=2), "b": randn(2, seed=3)}
    _, state = inner.update(grads, inner.init(params), params)
    kept_grads, kept_params = copies(grads), copies(params)
    kept_state = {n: copies(values) for n, values in state.items()}
    first = inner.update(grads, state, params)
    second = inner.update(grads, state, params)  # nothing on self either
    assert equal(grads, kept_grads)
    assert equal(params, kept_params)
    assert all(equal(state[n], kept_state[n]) for n in kept_state)
    assert equal(first[0], second[0])
    assert all(equal(first[1][n], second[1][n]) for n in state)
    assert not any(torch.equal(first[0][n], params[n]) for n in params)


@every_hyper
def test_a_tensor_gets_the_right_gradient(kind: type[InnerOptimizer], name: str) -> None:
    target = randn(4, seed=9)

    def loss(value: Any) -> Tensor:
        inner = build(kind, **{name: value})
        params = {"w": randn(4, seed=8)}
        state = inner.init(params)
        for _ in range(3):
            params, state = inner.update({"w": torch.cos(params["w"])}, state, params)
        return (params["w"] - target).square().sum()

    learned = torch.tensor(HYPER[kind][name], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(learned), learned)
    expected = derivative(lambda value: loss(value).item(), HYPER[kind][name], 1e-4)
    assert abs(expected) > 1e-3
    assert gradient.item() == pytest.approx(expected, rel=1e-8)


@every_hyper
def test_a_tensor_and_a_number_make_the_same_step(kind: type[InnerOptimizer], name: str) -> None:
    number, tensor = (
        build(kind, **{name: value})
        for value in (HYPER[kind][name], torch.tensor(HYPER[kind][name], dtype=F64))
    )
    params = other = {"w": randn(4, seed=8)}
    state, other_state = number.init(params), tensor.init(params)
    for seed in (1, 2):
        grads = {"w": randn(4, seed=seed)}
        params, state = number.update(grads, state, params)
        other, other_state = tensor.update(grads, other_state, other)
    torch.testing.assert_close(params["w"], other["w"], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(SGD, "lr"), (SGD, "momentum"), (SGD, "weight_decay")]
    + [(kind, name) for kind in (Adam, AdamW) for name in ("lr", "beta1", "beta2", "weight_decay")],
)
def test_a_tensor_that_is_zero_still_gets_a_gradient(kind: type[InnerOptimizer], name: str) -> None:
    """A learned rate may start at 0; that must not switch it off."""
    zero = torch.zeros((), dtype=F64, requires_grad=True)
    inner = build(kind, **{name: zero})
    params = {"w": randn(4, seed=8)}
    state = inner.init(params)
    for seed in (1, 2):
        params, state = inner.update({"w": randn(4, seed=seed)}, state, params)
    (gradient,) = torch.autograd.grad(params["w"].sum(), zero)
    assert gradient.isfinite()
    assert gradient.item() != 0


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_a_gradient_that_is_zero_has_a_finite_derivative(kind: type[Adam]) -> None:
    """d phi~ / d g at g = 0 is -lr / eps per step: the first moment over eps."""
    lr, eps = 0.1, 1e-3
    inner = kind(lr, eps=eps, weight_decay=0.0)
    params = {"w": randn(3, seed=1)}
    grad = torch.tensor([0.0, 0.5, 0.0], dtype=F64, requires_grad=True)
    one, state = inner.update({"w": grad}, inner.init(params), params)
    two, _ = inner.update({"w": grad}, state, one)
    for steps, new in ((1, one), (2, two)):
        (slope,) = torch.autograd.grad(new["w"].sum(), grad, retain_graph=True)
        assert slope.isfinite().all()
        expected = torch.full((2,), -steps * lr / eps, dtype=F64)
        torch.testing.assert_close(slope[[0, 2]], expected, rtol=1e-12, atol=0)


def test_the_derivative_by_the_state_is_finite_where_everything_is_zero() -> None:
    adam = Adam(0.1)
    params = {"w": torch.zeros(2, dtype=F64)}
    state = adam.init(params)
    leaves = {k: v.requires_grad_() for k, v in state["w"].items() if k != "step"}
    new, _ = adam.update({"w": torch.zeros(2, dtype=F64)}, {"w": {**state["w"], **leaves}}, params)
    slopes = torch.autograd.grad(new["w"].sum(), list(leaves.values()))
    assert all(bool(s.isfinite().all()) for s in slopes)


def test_a_tensor_rate_may_differ_per_entry() -> None:
    lr = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    params, grads = {"w": randn(3, seed=1)}, {"w": randn(3, seed=2)}
    sgd = SGD(lr)
    new, _ = sgd.update(grads, sgd.init(params), params)
    assert torch.equal(new["w"], params["w"] - lr * grads["w"])


@pytest.mark.parametrize("shape", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("make", [SGD, Adam, AdamW, lambda lr: SGD(lr, 0.9)])
def test_types_of_parameters_are_kept(
    make: Callable[[float], InnerOptimizer], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    inner = make(0.1)
    params = {"w": torch.ones(shape, dtype=dtype)}
    state = inner.init(params)
    for _ in range(2):
        params, state = inner.update({"w": torch.ones(shape, dtype=dtype)}, state, params)
    assert params["w"].dtype == dtype
    assert all(v.dtype == dtype for k, v in state["w"].items() if k != "step")


# ---------------------------------------------------------------- learned hyper-parameters


def test_parameters_are_learned_and_other_tensors_are_not() -> None:
    lr, decay = nn.Parameter(torch.tensor(0.1)), torch.tensor(0.2, requires_grad=True)
    assert SGD(0.1).hyper_parameters() == {}
    learned = AdamW(
        lr, (nn.Parameter(torch.tensor(0.5)), 0.9), weight_decay=decay
    ).hyper_parameters()
    assert set(learned) == {"lr", "beta1"}
    assert learned["lr"] is lr
    lr.requires_grad_(False)
    assert SGD(lr).hyper_parameters() == {}


def test_meta_sgd_has_a_rate_per_entry() -> None:
    model = mlp().model
    inner = MetaSGD(model, lr=0.2)
    assert inner.torch_optimizer is None
    params, rates = trainable(model), inner.hyper_parameters()
    assert sorted(rates) == sorted(f"rates.{n.replace('.', '/')}" for n in params)
    for name, param in params.items():
        expected = torch.full_like(param, 0.2)
        assert torch.equal(rates[f"rates.{name.replace('.', '/')}"], expected)


def test_meta_sgd_steps_by_its_rates_and_gives_them_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(2, 1)).double()
    inner = MetaSGD(trainable(model))
    params = trainable(model)
    grads = {n: randn(*p.shape, seed=i) for i, (n, p) in enumerate(params.items())}
    rates = {"0.weight": inner.rates["0/weight"], "0.bias": inner.rates["0/bias"]}
    with torch.no_grad():
        for i, rate in enumerate(rates.values()):
            rate.copy_(randn(*rate.shape, seed=10 + i))
    new, state = inner.update(grads, inner.init(params), params)
    assert state == {"0.weight": {}, "0.bias": {}}
    assert equal(new, {n: params[n] - rates[n] * grads[n] for n in params})
    slopes = torch.autograd.grad([p.sum() for p in new.values()], list(rates.values()))
    assert equal(dict(zip(rates, slopes, strict=True)), {n: -g for n, g in grads.items()})


def test_meta_sgd_knows_the_parameters_it_was_made_from() -> None:
    inner = MetaSGD(nn.Linear(2, 1))
    with pytest.raises(
        ValueError, match=r"^MetaSGD: no rate for 0.w, b; make it from the model that is adapted$"
    ):
        inner.init({"0.w": torch.ones(1), "weight": torch.ones(1, 2), "b": torch.ones(1)})


# ---------------------------------------------------------------- numbers out of range


@pytest.mark.parametrize("value", [-0.5, float("nan")])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, values in HYPER.items() for name in values if name[0] in "lmw"],
)
def test_a_negative_number_is_refused(kind: type[InnerOptimizer], name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got {value}, expected a number >= 0$"):
        build(kind, **{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_a_beta_out_of_range_is_refused(kind: type[Adam], index: int, value: float) -> None:
    with pytest.raises(
        ValueError, match=rf"^betas\[{index}\]: got {value}, expected a number in \[0, 1\)$"
    ):
        build(kind, **{f"beta{index + 1}": value})


@pytest.mark.parametrize("value", [0.0, -1e-8, float("nan")])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_an_eps_that_is_not_positive_is_refused(kind: type[Adam], value: float) -> None:
    with pytest.raises(ValueError, match=f"^eps: got {value}, expected a number > 0$"):
        kind(0.1, eps=value)


def test_a_negative_rate_of_meta_sgd_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^lr: got -0.1, expected a number >= 0$"):
        MetaSGD(nn.Linear(2, 1), lr=-0.1)


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^nesterov: needs momentum > 0; give SGD\(lr, momentum=0.9, nesterov=True\)$",
    ):
        SGD(0.1, nesterov=True)
