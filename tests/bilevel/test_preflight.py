"""What preflight finds, and that it finds nothing where there is nothing."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from helpers import mlp, mse, prism, randn, relative_error
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention
from torch.nn.attention import SDPBackend, sdpa_kernel

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.preflight import Preflight, preflight
from prism_meta.bilevel.strategies import (
    FirstOrder,
    HiddenParameterError,
    SecondDerivativeError,
    SecondOrder,
    SingleLevel,
)

BATCH = randn(3, 5, 4, seed=1).float(), randn(3, 5, 2, seed=2).float()
NO_SECOND = "scaled_dot_product_flash_attention_for_cpu has no second derivative"


class Attention(nn.Module):
    """Attention that insists on the fused kernel, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.backend: SDPBackend | None = SDPBackend.FLASH_ATTENTION

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)[:, None].chunk(3, -1)
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Net(nn.Module):
    """Attention that has no second derivative, BatchNorm, an unused branch, a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(5)
        self.blocks = nn.Sequential(Attention(), nn.Tanh(), Attention())
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.norm(self.stem(x))))
        return out


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * (1 - x.tanh() ** 2)


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Once.apply(x)  # type: ignore[no-untyped-call]
        return out


def lines(report: Preflight) -> list[str]:
    return [str(finding) for finding in report.findings]


def test_all_findings_of_a_net_at_once() -> None:
    torch.manual_seed(0)
    report = preflight(Net(), mse, BATCH, steps=3)
    advice = (
        "call it through torch.nn.functional.scaled_dot_product_attention without choosing a backend, "
        "or use FiniteDifference or FirstOrder, which need none"
    )
    assert not report.ok
    assert lines(report) == [
        f"error: blocks.0 (Attention): blocks SecondOrder: {NO_SECOND}; {advice}",
        f"error: blocks.2 (Attention): blocks SecondOrder: {NO_SECOND}; {advice}",
        "warning: branch.*: 4 parameters have no part in the loss of this batch; expected where the "
        "batch lacks a modality; else they will never learn",
        "note: SecondOrder: attention runs its math backend, whose memory grows with the square of the "
        "tokens; first-order strategies keep the fast kernel",
        "note: head.bias: frozen: neither adapted nor given a gradient",
        "note: norm: BatchNorm1d keeps running statistics; MetaLearner takes those of the meta batch "
        "(buffers='outer'); for small batches, or subsets that differ within a batch, use InstanceNorm or "
        "GroupNorm",
    ]


def test_what_it_calls_an_error_is_one_and_its_advice_helps() -> None:
    torch.manual_seed(0)
    net = Net()
    strategy = SecondOrder(SGD(0.1))
    with pytest.raises(SecondDerivativeError, match="has no second derivative"):
        strategy.meta_gradient(net, mse, BATCH, BATCH)
    for module in net.modules():
        if isinstance(module, Attention):
            module.backend = None
    assert preflight(net, mse, BATCH).ok
    assert strategy.meta_gradient(net, mse, BATCH, BATCH).gradient["stem.weight"].abs().sum() > 0


def test_a_blocker_beside_activations_that_work_in_place() -> None:
    """They may change no leaf: the input that the module is tried with is a copy."""
    net = nn.Sequential(
        nn.Linear(4, 8),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)),
        nn.Sequential(
            nn.LeakyReLU(inplace=True), Attention(), nn.Linear(8, 8), nn.LeakyReLU(inplace=True)
        ),
        nn.Linear(8, 2),
    )
    finding, note = preflight(net, mse, BATCH).findings
    assert (note.level, note.where) == ("note", "SecondOrder")
    assert (finding.level, finding.where) == ("error", "2.1 (Attention)")
    assert finding.what == f"blocks SecondOrder: {NO_SECOND}"


def test_a_function_that_is_differentiable_once() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Custom(), nn.Linear(3, 2))
    (finding,) = preflight(model, mse, BATCH).findings
    assert (finding.level, finding.where) == ("error", "1 (Custom)")
    assert finding.what == (
        "blocks SecondOrder: a function marked once_differentiable cuts the second derivative off "
        "without an error"
    )
    assert finding.advice.startswith("write its backward pass with differentiable operations")


def test_an_operation_of_the_objective_is_named_as_such() -> None:
    def objective(forward: object, batch: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = Once.apply(forward(batch[0]))  # type: ignore[no-untyped-call, operator]
        return out.square().mean()

    (finding,) = preflight(nn.Linear(4, 2), objective, BATCH).findings
    assert (finding.level, finding.where) == ("error", "objective")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite(bad: float) -> None:
    x = BATCH[0].clone()
    x[0, 0, 0] = bad
    report = preflight(nn.Linear(4, 2), mse, (x, BATCH[1]))
    assert lines(report) == [
        "error: loss: is not finite on this batch; check the images and the targets",
        "error: gradient: is not finite on this batch; check the images and the targets",
    ]


def test_nothing_to_find() -> None:
    problem = mlp()
    report = preflight(problem.model, problem.objective, problem.train)
    assert report.ok and report.findings == ()
    assert str(report).startswith("no findings\nmemory at K = 1, estimated:\n  SingleLevel: ")


def test_the_encoder_of_a_modality_that_the_batch_lacks_is_unused() -> None:
    problem = prism()
    report = preflight(problem.model, problem.objective, problem.train)
    assert [f.where for f in report.findings] == ["encoders.2.*"]
    assert not preflight(problem.model, problem.objective, problem.meta).findings


def test_the_model_and_the_random_numbers_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Net(), nn.Dropout(0.5))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    random = torch.get_rng_state()
    preflight(net, mse, BATCH)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_memory_grows_with_the_steps_only_where_graphs_are_stored() -> None:
    problem = prism()
    one, ten = (
        preflight(problem.model, problem.objective, problem.train, steps=k).memory for k in (1, 10)
    )
    stored, recomputed = "SecondOrder(graph='stored')", "SecondOrder(graph='recomputed')"
    size = sum(p.numel() * p.element_size() for p in problem.model.parameters())
    assert ten["FirstOrder"] == one["FirstOrder"]
    # Freed memory that is used again makes the count of a graph differ by some bytes.
    assert ten[recomputed] - one[recomputed] == pytest.approx(9 * size, rel=5e-3)
    assert ten[stored] > 5 * one[stored]


def test_memory_counts_what_the_graph_saves() -> None:
    """A chain of tanh saves one activation per layer, and nothing of it is counted twice."""
    model = nn.Sequential(nn.Linear(1, 64, bias=False), *(nn.Tanh() for _ in range(5)))
    x = torch.randn(32, 1)

    def total(forward: object, batch: Tensor) -> Tensor:
        out: Tensor = forward(batch)  # type: ignore[operator]
        return out.sum()

    report = preflight(model, total, x)
    activations = 5 * 32 * 64 * 4
    assert report.memory["SingleLevel"] == activations + x.numel() * 4 + 64 * 4


def test_it_prints_as_tables() -> None:
    torch.manual_seed(0)
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(preflight(Net(), mse, BATCH))
    text = capture.get()
    assert "blocks.0 (Attention)" in text
    assert "SecondOrder(graph='recomputed')" in text


# ---------------------------------------------------------------- what is reached behind its back


class Hidden(nn.Module):
    """A layer whose gain is also kept outside of its registration."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.ones(2))
        self.kept = {
            "list": [self.gain],
            "product": [2 * self.gain],
            "closure": [lambda: self_gain],
            "detached": [self.gain.detach()],
        }[kind]
        self_gain = self.gain

    def forward(self, x: Tensor) -> Tensor:
        (kept,) = self.kept
        out: Tensor = self.layer(x) * (kept() if callable(kept) else kept)
        return out


HIDDEN = (
    "error: gain: reached other than through the model's registered parameters, so that no inner step "
    "can replace it and it would never be trained; read it as an attribute of its module in forward (not "
    "from a list, a closure or a product computed earlier); in an objective use forward.parameters, not "
    "model.parameters()"
)


@pytest.mark.parametrize("kind", ["list", "product", "closure"])
def test_a_parameter_outside_its_registration_is_named(kind: str) -> None:
    net = Hidden(kind)
    report = preflight(net, mse, BATCH)
    assert not report.ok and lines(report) == [HIDDEN]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for strategy in (SingleLevel(), FirstOrder(SGD(0.1)), SecondOrder(SGD(0.1), 2)):
        learner = MetaLearner(net, mse, strategy, optimizer)
        for call in (
            learner.step,
            lambda train, meta, s=strategy: s.meta_gradient(net, mse, train, meta),
        ):
            with pytest.raises(HiddenParameterError) as caught:
                call(BATCH, BATCH)
            assert f"error: {caught.value}" == HIDDEN


def test_a_detached_copy_is_seen_as_an_unused_parameter() -> None:
    (finding,) = preflight(Hidden("detached"), mse, BATCH).findings
    assert (finding.level, finding.where) == ("warning", "gain")


def test_a_penalty_on_the_models_own_parameters_is_an_error() -> None:
    net = nn.Linear(4, 2)

    def own(forward: Any, batch: Any) -> Tensor:
        return mse(forward, batch) + sum(p.square().sum() for p in net.parameters())

    def current(forward: Any, batch: Any) -> Tensor:
        return mse(forward, batch) + sum(p.square().sum() for p in forward.parameters.values())

    (finding,) = preflight(net, own, BATCH).findings
    assert (finding.level, finding.where) == ("error", "weight, bias")
    assert preflight(net, current, BATCH).findings == ()
    problem = replace(mlp(), objective=current)
    for strategy in (FirstOrder(SGD(0.1), 2), SecondOrder(SGD(0.1), 2)):
        result = strategy.meta_gradient(problem.model, current, problem.train, problem.meta)
        oracle = oracles.first_order if isinstance(strategy, FirstOrder) else oracles.second_order
        assert relative_error(result.gradient, oracle(problem, 0.1, 2)) <= 1e-9


def test_a_loss_of_no_parameter_is_an_error() -> None:
    net = nn.Linear(4, 2)

    def lost(forward: Any, batch: Any) -> Tensor:
        return mse(lambda x: forward(x).detach(), batch)

    message = (
        "objective: the loss depends on no parameter of the model; compute it from what forward(...) "
        "returns, without detach() or torch.no_grad()"
    )
    assert lines(preflight(net, lost, BATCH)) == [f"error: {message}"]
    learner = MetaLearner(net, lost, SingleLevel(), torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(HiddenParameterError, match=f"^{re.escape(message)}$"):
        learner.step(BATCH, BATCH)


def test_a_tensor_of_nobodys_is_warned_of() -> None:
    extra = torch.ones(2, requires_grad=True)

    def scaled(forward: Any, batch: Any) -> Tensor:
        return mse(lambda x: forward(x) * extra, batch)

    (finding,) = preflight(nn.Linear(4, 2), scaled, BATCH).findings
    assert str(finding) == (
        "warning: objective: the loss depends on a tensor of shape (2,) that requires a gradient and is "
        "no parameter of the model; it is never trained; register it as a parameter of the model, or "
        "detach it"
    )


def test_hooks_on_parameters_are_warned_of() -> None:
    net = nn.Linear(4, 2)
    net.bias.register_hook(lambda g: 2 * g)
    (finding,) = preflight(net, mse, BATCH).findings
    assert (finding.level, finding.where) == ("warning", "bias")
    with pytest.warns(UserWarning, match=r"^model: hooks on bias \(register_hook\) do not run"):
        MetaLearner(net, mse, SingleLevel(), torch.optim.SGD(net.parameters(), lr=0.1))
