"""``fit`` takes objects only: models, objectives, optimizers and datasets of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import prism_batch, prism_net
from niftis import write_cases
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import FirstOrder, Reptile
from prism_meta.data.cache import prepare
from prism_meta.data.labels import BRATS_LABELS
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.errors import CaseError
from prism_meta.modalities import Batch
from prism_meta.networks.wrapped import wrap
from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import LearnedWeights
from prism_meta.training.fit import fit
from prism_meta.training.outer.optimizer import outer_step

EPISODES = [
    (prism_batch([[True] * 3], 4, 4, seed=t), prism_batch([[True] * 3], 4, 4, seed=50 + t))
    for t in range(4)
]


class Net(nn.Module):
    """A net that is no segmentation net."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x)


def squared(forward: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (forward(batch[0]) - batch[1]).square().mean()


def test_any_model_and_objective_train_as_in_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    model, again = Net(), Net()
    again.load_state_dict(model.state_dict())
    data = [((torch.randn(4, 2), torch.randn(4, 1)),) * 2 for _ in range(6)]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps: list[int] = []
    log = fit(
        model,
        squared,
        FirstOrder(SGD(0.05)),
        data,
        optimizer=optimizer,
        alpha=0.25,
        clip_norm=None,
        on_step=lambda step, line: steps.append(step),
    )
    learner = MetaLearner(
        again,
        squared,
        FirstOrder(SGD(0.05)),
        torch.optim.SGD(again.parameters(), lr=0.1),
        alpha=0.25,
    )
    losses = [float(learner.step(*episode).meta_loss) for episode in data]
    assert [line["meta_loss"] for line in log] == losses and steps == [6]
    assert [line["lr"] for line in log] == [0.1] * 6, "an optimizer of one's own keeps its rate"
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not model.training


def test_a_folder_keeps_the_log_and_a_checkpoint_to_resume_from(tmp_path: Path) -> None:
    whole, cut = prism_net(), prism_net()
    cut.load_state_dict(whole.state_dict())
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    strategy, objective = FirstOrder(SGD(0.1)), PrismObjective()
    log = fit(whole, objective, strategy, EPISODES, folder=tmp_path / "whole")

    def stop(step: int, line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            cut,
            objective,
            strategy,
            EPISODES,
            folder=tmp_path / "cut",
            checkpoint_every=2,
            on_step=stop,
        )
    assert fit(cut, objective, strategy, EPISODES, folder=tmp_path / "cut", resume=True) == log
    for name, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), (
            f"{name}: the first checkpoint is of step 0"
        )
    cut.load_state_dict(start)
    fit(cut, objective, strategy, EPISODES, folder=tmp_path / "again", steps=4, checkpoint_every=2)
    rest = fit(cut, objective, strategy, EPISODES, folder=tmp_path / "again", resume=True)
    assert rest == [], "all steps are made"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), name
    text = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == log


def test_what_is_learned_beside_the_model_is_in_the_default_optimizer() -> None:
    model, objective = prism_net(), PrismObjective(weighting=LearnedWeights(3))
    rate = nn.Parameter(torch.tensor(0.1))
    outer = outer_step(model, objective, FirstOrder(SGD(rate)), steps=5)
    _, group = outer.optimizer.param_groups
    wanted = {id(rate), *map(id, objective.hyper_parameters().values())}
    assert {id(p) for p in group["params"]} == wanted and group["weight_decay"] == 0
    assert (outer.alpha, outer.prescribed) == (0.5, False)


def test_a_strategy_that_prescribes_its_outer_step_gets_it() -> None:
    model = prism_net()
    log = fit(model, PrismObjective(), Reptile(SGD(0.1), steps=2), EPISODES)
    torch.testing.assert_close([line["lr"] for line in log], [0.1, 0.4, 0.7, 1.0])


def test_prepared_cases_are_drawn_from(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases", 2)
    cases = prepare(
        load_cases(tmp_path / "cases"),
        tmp_path / "cache",
        preprocessing=Preprocessing((1.0, 1.0, 1.0)),
        labels=BRATS_LABELS,
    )
    model = wrap(nn.Conv2d(4, 4, 1))
    options: dict[str, Any] = {"patch": (8, 8), "batch_size": 2}
    log = fit(model, PrismObjective(), FirstOrder(SGD(0.1)), cases, steps=3, **options)
    assert [line["step"] for line in log] == [1, 2, 3] and log[-1]["epoch"] == 3
    with pytest.raises(ValueError, match=r"^patch: WrappedNet does not say whether it works"):
        fit(wrap(nn.Linear(4, 4)), PrismObjective(), FirstOrder(SGD(0.1)), cases, steps=3)


def test_too_few_episodes_for_the_steps() -> None:
    message = (
        "steps: got 3, expected 1 to 2: 4 episodes, 2 per step; give more episodes or fewer steps"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        fit(
            prism_net(),
            PrismObjective(),
            FirstOrder(SGD(0.1)),
            EPISODES,
            steps=3,
            episodes_per_step=2,
        )


class Damaged(torch.utils.data.Dataset[Any]):
    """Its third episode cannot be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, step: int) -> tuple[Batch, Batch]:
        if step == 2:
            raise CaseError("case p7: p7_t1.nii.gz is damaged; restore it")
        return EPISODES[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_cannot_read_is_one_line(workers: int) -> None:
    with pytest.raises(CaseError) as caught:
        fit(prism_net(), PrismObjective(), FirstOrder(SGD(0.1)), Damaged(), workers=workers)
    assert caught.value.faults == ("case p7: p7_t1.nii.gz is damaged; restore it",)
