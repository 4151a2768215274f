"""What several processes send, and that it gives the update of one process with the same episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batch_norm, mse, prism_batch, prism_net, randn
from lightning_fabric import Fabric
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD, AdamW
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import FirstOrder, SecondOrder
from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import LearnedWeights
from prism_meta.training.processes.communication import mean_over_processes, mean_state
from prism_meta.training.trainer import Trainer

pytestmark = pytest.mark.slow

STEPS, RANKS = 3, 2
#: Modalities that each process's episodes show: no process uses the encoders of all three.
MASKS = ([[True, True, False], [True, False, False]], [[False, True, True], [False, False, True]])
#: alpha, inner state, the inner optimizer, episodes per process and step.
SCENARIOS: dict[str, tuple[float, str, str, int]] = {
    "gradients only": (0.0, "fresh", "sgd", 1),
    "pull": (0.5, "fresh", "sgd", 1),
    "accumulated": (0.5, "fresh", "sgd", 2),
    "carried momentum": (0.0, "carried", "momentum", 1),
    "carried adamw": (0.5, "carried", "adamw", 2),
    "shared adamw": (0.0, "shared", "adamw", 1),
}


def episodes_of(rank: int, count: int) -> list[Any]:
    """The episodes of one process: ``count`` per step."""
    seeds = [1000 * rank + 10 * t for t in range(STEPS * count)]
    return [tuple(prism_batch(MASKS[rank], 6, 6, seed=s + k) for k in (0, 5)) for s in seeds]


def trained(fabric: Fabric, name: str, episodes: list[Any], per_step: int) -> dict[str, Tensor]:
    """All numbers that training changes: the model's, and the learned weights of the objective."""
    alpha, state, kind, _ = SCENARIOS[name]
    inner = {
        "sgd": lambda: SGD(0.1),
        "momentum": lambda: SGD(0.1, momentum=0.9),
        "adamw": lambda: AdamW(0.01, eps=1e-3),
    }[kind]()
    model, objective = prism_net(), PrismObjective(weighting=LearnedWeights(3, beta=0.5, delta=0.2))
    groups = [{"params": list(model.parameters())}]
    groups += [{"params": [w], "lr": 0.1} for w in objective.hyper_parameters().values()]
    optimizer = torch.optim.AdamW(groups, lr=0.01, eps=1e-3)
    learner = MetaLearner(
        model,
        objective,
        SecondOrder(inner, 2),
        optimizer,
        alpha=alpha,
        inner_state=state,  # type: ignore[arg-type]
        clip_norm=1.0,
    )
    Trainer(learner, episodes, fabric=fabric, episodes_per_step=per_step).fit()
    return {**model.state_dict(), **objective.state_dict()}


class Counting:
    """A fabric that writes down the sizes of the buffers it sends."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.sent = fabric, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fabric, name)

    def all_reduce(self, values: Tensor, **options: Any) -> Tensor:
        self.sent.append(values.numel())
        return self.fabric.all_reduce(values, **options)  # type: ignore[return-value]


def sizes(fabric: Fabric, **options: Any) -> tuple[list[int], int, int]:
    """Buffers sent in one step of a model with BatchNorm, its parameters, and its averaged buffers."""
    problem, counting = batch_norm(), Counting(fabric)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    learner = MetaLearner(problem.model, mse, FirstOrder(SGD(0.1)), optimizer, **options)
    episode = (problem.train, problem.meta)
    Trainer(learner, [episode], fabric=counting).fit()  # type: ignore[arg-type]
    buffers = [b.numel() for b in problem.model.buffers() if b.is_floating_point()]
    params = [p.numel() for p in problem.model.parameters()]
    return counting.sent, sum(params), sum(buffers)


def one_rank(fabric: Fabric, folder: str) -> None:
    """What each of the two processes does; each writes down what it found."""
    torch.set_num_threads(1)
    rank = fabric.global_rank
    found: dict[str, Any] = {
        name: trained(fabric, name, episodes_of(rank, count), count)
        for name, (*_, count) in SCENARIOS.items()
    }
    values = [randn(5, 7, seed=rank), randn(4, seed=3 + rank).float(), torch.tensor(rank)]
    found["flat"] = mean_over_processes({"a": values}, fabric)["a"]
    found["each"] = [fabric.all_reduce(v.clone()) for v in values[:2]]
    state = {"both": {"m": torch.tensor([2.0 + rank])}, "one": {}}
    if rank == 1:
        state["one"]["m"] = torch.tensor([7.0])
    found["state"] = mean_state(state, fabric)
    for policy in ("isolated", "outer", "inner"):
        found[f"sizes {policy}"] = sizes(fabric, alpha=0.0, buffers=policy)
    found["sizes pull"] = sizes(fabric, alpha=0.5, buffers="isolated")
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    fabric = Fabric(accelerator="cpu", devices=RANKS, strategy="ddp_spawn")
    fabric.launch(one_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_equal_one_with_the_same_episodes(name: str, both: Any) -> None:
    first, second = (found[name] for found in both)
    assert all(torch.equal(first[n], second[n]) for n in first)
    count = SCENARIOS[name][3]
    ranks = [episodes_of(rank, count) for rank in range(RANKS)]
    steps = [of[t * count : (t + 1) * count] for t in range(STEPS) for of in ranks]
    one = Fabric(accelerator="cpu", devices=1)
    expected = trained(one, name, [e for step in steps for e in step], RANKS * count)
    start = {**prism_net().state_dict()}
    assert any(not torch.equal(expected[n], start[n]) for n in start)
    for key, value in expected.items():
        torch.testing.assert_close(first[key], value, rtol=0, atol=1e-6, msg=key)


def test_one_buffer_gives_the_same_bits_as_one_message_per_tensor(both: Any) -> None:
    for found in both:
        *averaged, whole = found["flat"]
        assert all(torch.equal(a, b) for a, b in zip(averaged, found["each"], strict=True))
        assert averaged[0].dtype == torch.float64
        assert averaged[1].dtype == torch.float32
        assert not whole.is_floating_point()
    assert [found["flat"][2].item() for found in both] == [0, 1]  # left as they are


def test_a_state_is_the_mean_over_the_processes_that_have_it(both: Any) -> None:
    for found in both:
        assert found["state"] == {
            "both": {"m": torch.tensor([2.5])},
            "one": {"m": torch.tensor([7.0])},
        }


def test_only_what_the_outer_step_reads_is_sent(both: Any) -> None:
    for found in both:
        sent, params, buffers = found["sizes isolated"]
        flags = len(list(batch_norm().model.parameters()))
        # One buffer of float64 for two losses and the model, one of float32 for the flags of unused
        # parameters.
        assert sent == [2 + params, flags]
        assert found["sizes outer"][0] == [2 + params + buffers, flags]
        assert found["sizes inner"][0] == [2 + params + buffers, flags]
        assert found["sizes pull"][0] == [2 + 2 * params, flags]


@pytest.mark.parametrize("inner_state", ["fresh", "carried"])
def test_with_alpha_0_an_infinite_pull_changes_nothing(inner_state: Any) -> None:
    """0 times infinity is not a number."""
    model, batch = nn.Linear(2, 1), (torch.ones(3, 2), torch.zeros(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learner = MetaLearner(
        model, mse, FirstOrder(SGD(0.1)), optimizer, alpha=0.0, inner_state=inner_state
    )
    result = learner.meta_gradient(batch, batch)
    result.adapted["weight"].fill_(torch.inf)
    learner.apply(result)
    assert all(p.isfinite().all() for p in model.parameters())
