"""What preflight finds, and that it finds nothing where there is nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import mlp, mse, prism, randn
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.preflight import Preflight, preflight
from prism_meta.bilevel.strategies import SecondDerivativeError, SecondOrder

BATCH = randn(3, 5, 4, seed=1).float(), randn(3, 5, 2, seed=2).float()
NO_SECOND = "scaled_dot_product_flash_attention_for_cpu has no second derivative"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)[:, None].chunk(3, -1)
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
        "run it within torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), "
        "or use FiniteDifference or FirstOrder, which need none"
    )
    assert not report.ok
    assert lines(report) == [
        f"error: blocks.0 (Attention): blocks SecondOrder: {NO_SECOND}; {advice}",
        f"error: blocks.2 (Attention): blocks SecondOrder: {NO_SECOND}; {advice}",
        "warning: branch.*: 4 parameters have no part in the loss of this batch; expected where the "
        "batch lacks a modality; else they will never learn",
        "warning: norm: BatchNorm1d keeps running statistics, which inner steps leave as they are; "
        "give MetaLearner(buffers='outer') to use model.eval() later, or use InstanceNorm",
        "note: head.bias: frozen: neither adapted nor given a gradient",
    ]


def test_what_it_calls_an_error_is_one_and_its_advice_helps() -> None:
    torch.manual_seed(0)
    net = Net()
    strategy = SecondOrder(SGD(0.1))
    with pytest.raises(SecondDerivativeError, match="has no second derivative"):
        strategy.meta_gradient(net, mse, BATCH, BATCH)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert preflight(net, mse, BATCH).ok
        assert (
            strategy.meta_gradient(net, mse, BATCH, BATCH).gradient["stem.weight"].abs().sum() > 0
        )


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
    (finding,) = preflight(net, mse, BATCH).findings
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
