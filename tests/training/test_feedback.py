"""Episodes that follow losses, and train batches for each inner step, through the trainer."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import faults_of
from niftis import write_cases
from torch import Tensor, nn

import prism_meta as pm
from prism_meta.bilevel.strategies import MetaGradient
from prism_meta.data.cache import CachedCase, prepare
from prism_meta.errors import ConfigError, PrismError
from prism_meta.training.episodes.feedback import BLOCK, SAMPLES, Feedback
from prism_meta.training.episodes.loader import default_workers, load_episodes

STEPS = 5 * BLOCK


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[CachedCase]:
    root = tmp_path_factory.mktemp("feedback")
    return prepare(
        pm.load_cases(write_cases(root / "cases", 4)),
        root / "cache",
        preprocessing=pm.Preprocessing((1.0, 1.0, 1.0)),
        labels=pm.BRATS_LABELS,
    )


def hard_episodes(pool: list[CachedCase], **options: Any) -> pm.Episodes:
    policy = pm.HardMask(4, power=8.0)
    return pm.Episodes(
        pool,
        patch=(6, 6),
        batch_size=3,
        train_mask=policy,
        meta_mask=policy,
        **{"steps": STEPS, **options},
    )


def fit(
    episodes: Any, folder: Path | None, *, workers: int = 0, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Tensor], list[tuple[str, ...]]]:
    """The log, the weights, and the shown subsets of all batches in order."""
    torch.manual_seed(0)
    model = pm.wrap(nn.Conv2d(4, 4, 1), modalities=pm.BRATS)
    inner = pm.PrismObjective(unimodal=False, sample_losses=True)
    shown: list[tuple[str, ...]] = []

    def objective(forward: Any, batch: pm.Batch) -> Any:
        shown.append(tuple(pm.subset_name(row, pm.BRATS) for row in batch.mask))
        return inner(forward, batch)

    log = pm.fit(
        model,
        objective,
        pm.FirstOrder(pm.SGD(0.1)),
        episodes,
        folder=folder,
        workers=workers,
        **options,
    )
    return log, model.state_dict(), shown


def test_hard_masks_are_the_same_with_workers_and_after_an_interruption(
    pool: list[CachedCase], tmp_path: Path
) -> None:
    whole = fit(hard_episodes(pool), tmp_path / "whole", checkpoint_every=7)
    ahead = fit(hard_episodes(pool), tmp_path / "ahead", workers=2)
    assert whole[0] == ahead[0] and whole[2] == ahead[2]
    assert all(torch.equal(whole[1][name], value) for name, value in ahead[1].items())
    for stop in (3, BLOCK, 2 * BLOCK + 4):  # in the first block, between two, and in a later one
        folder = tmp_path / f"cut{stop}"
        count = 0

        def should_stop(stop: int = stop) -> bool:
            nonlocal count
            count += 1
            return count == stop

        with pytest.raises(pm.training.stopping.TrainingStopped):
            fit(hard_episodes(pool), folder, should_stop=should_stop)
        _, weights, _ = fit(hard_episodes(pool), folder, resume=True)
        assert all(torch.equal(whole[1][name], value) for name, value in weights.items())
        lines = (folder / "metrics.jsonl").read_text()
        assert lines == (tmp_path / "whole" / "metrics.jsonl").read_text()
        states = [torch.load(tmp_path / name / "checkpoint.pt")["episodes"] for name in
                  ("whole", folder.name)]  # fmt: skip
        assert states[0].keys() == {"running", "now", "next"}
        for name, state in states[0].items():
            for key, value in state.items():
                assert torch.equal(value.nan_to_num(-1), states[1][name][key].nan_to_num(-1))


def test_masks_follow_the_losses_from_the_third_block_on(pool: list[CachedCase]) -> None:
    log, _, shown = fit(hard_episodes(pool), None)
    _, _, uniform = fit(hard_episodes(pool), None, steps=1)
    assert shown[:2] == uniform[:2]
    plain = pm.Episodes(
        pool, patch=(6, 6), batch_size=3, steps=STEPS, train_mask=pm.HardMask(4, power=0.0),
        meta_mask=pm.HardMask(4, power=0.0),
    )  # fmt: skip
    _, _, even = fit(plain, None)
    # The first call also checks the model, so there is one batch more.
    first = 1 + 2 * 2 * BLOCK
    assert shown[:first] == even[:first] and shown[first:] != even[first:]
    assert SAMPLES not in log[0]["terms"]


class Recorded:
    """Episodes whose state is the list of all losses."""

    follows_losses = True

    def __init__(self) -> None:
        self.seen: list[float] = []

    def observe(self, mask: Tensor, losses: Tensor) -> None:
        self.seen += losses.tolist()

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(self.seen)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"].tolist()


def step_of(losses: list[float], per_step: int = 1) -> tuple[list[MetaGradient], list[Any]]:
    zero, mask = torch.zeros(()), torch.ones(1, 2).bool()
    results = [
        MetaGradient({}, {}, zero, zero, terms={SAMPLES: torch.tensor([loss])}) for loss in losses
    ]
    return results, [(None, SimpleNamespace(mask=mask))] * len(results)


def alone(value: Any) -> list[Any]:
    return [value]


@pytest.mark.parametrize("chunk", [1, 3, BLOCK])
@pytest.mark.parametrize("per_step", [1, 2])
def test_a_block_is_drawn_with_what_was_known_a_block_before(chunk: int, per_step: int) -> None:
    feedback = Feedback(Recorded(), per_step, SimpleNamespace(gather=alone))  # type: ignore[arg-type]
    for step in range(4 * BLOCK):
        # What has been seen when the episodes of this step and of the next block are handed out.
        for ahead in (0, BLOCK - 1):
            state = feedback.state_of((step + ahead) * per_step + per_step - 1)
            known = max(0, (step + ahead) // BLOCK - 1) * BLOCK * per_step
            assert state is not None
            assert state["seen"].tolist() == [float(k) for k in range(known)]
        feedback.collect(*step_of([float(step * per_step + k) for k in range(per_step)]))
        if (step + 1) % chunk == 0 or (step + 1) % BLOCK == 0:
            feedback.read(step + 1)


def test_all_processes_add_the_losses_of_all_in_the_order_of_the_steps() -> None:
    def both(own: Any) -> list[Any]:
        """Rank 1 has the same losses plus 0.5."""
        return [own, [[(mask, losses + 0.5) for mask, losses in step] for step in own]]

    feedback = Feedback(Recorded(), 2, SimpleNamespace(gather=both))  # type: ignore[arg-type]
    for step in range(2):
        feedback.collect(*step_of([2.0 * step, 2.0 * step + 1]))
    feedback.read(2)
    seen = feedback.state_dict()["running"]["seen"].tolist()
    assert seen == [0.0, 1.0, 0.5, 1.5, 2.0, 3.0, 2.5, 3.5]


def test_workers_load_no_episode_whose_state_is_unknown(pool: list[CachedCase]) -> None:
    processes: Any = SimpleNamespace(gather=alone)
    assert Feedback(Recorded(), 1, processes).most_workers(256) == BLOCK // 2
    assert Feedback(Recorded(), 4, processes).most_workers(256) == 2 * BLOCK
    assert Feedback(Recorded(), 1, processes).most_workers(0) == 0
    plain = Feedback(pm.Episodes(pool, patch=(6, 6), batch_size=1, steps=1), 1, processes)
    assert plain.most_workers(256) == 256 and plain.state_of(3) is None and plain.state_dict() == {}


def test_an_objective_without_the_losses_of_samples_is_refused(pool: list[CachedCase]) -> None:
    model = pm.wrap(nn.Conv2d(4, 4, 1), modalities=pm.BRATS)
    with pytest.raises(
        PrismError, match="masks: a policy that follows losses needs the term 'samples'"
    ):
        pm.fit(model, pm.PrismObjective(), pm.FirstOrder(pm.SGD(0.1)), hard_episodes(pool))


@pytest.mark.parametrize("strategy", ["reptile", "joint", "second_order"])
def test_group_dro_from_the_configuration(cases: Path, tmp_path: Path, strategy: str) -> None:
    """It is fed the losses of meta batches with masks of their own, and resumes with them."""
    config = pm.load_config(
        overrides=[
            "data.spacing=[1,1,1]", "data.patch=[16,16]", "data.batch_size=2", "model.width=2",
            "model.depth=2", "training.steps=3", "masks.train=dro", "masks.step=0.5",
            f"meta.strategy={strategy}",
        ]
    )  # fmt: skip
    pm.train(cases, config, out=tmp_path / "run", progress=False)
    state = torch.load(tmp_path / "run" / "checkpoint.pt")["episodes"]["running"]
    assert list(state) == ["train.losses", "train.log_q"]
    assert state["train.log_q"].exp().sum().item() == pytest.approx(1)
    assert len(state["train.log_q"].unique()) > 1


@pytest.mark.parametrize(
    ("strategy", "steps"), [("reptile", 2), ("single_level", 1), ("second_order", 2)]
)
def test_hard_masks_from_the_configuration(
    cases: Path, tmp_path: Path, strategy: str, steps: int
) -> None:
    config = pm.load_config(
        overrides=[
            "data.spacing=[1,1,1]", "data.patch=[16,16]", "data.batch_size=2", "model.width=2",
            "model.depth=2", "training.steps=3", "masks.train=hard", "masks.power=2",
            f"meta.strategy={strategy}", f"meta.inner_steps={steps}",
        ]
    )  # fmt: skip
    trained = pm.train(cases, config, out=tmp_path / "run", progress=False)
    state = torch.load(tmp_path / "run" / "checkpoint.pt")["episodes"]["running"]
    assert list(state) == ["train.losses"] and (~state["train.losses"].isnan()).sum() > 0
    assert all(SAMPLES not in line["terms"] for line in trained.history)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_inner_step_gets_a_batch_of_its_own(cases: Path, tmp_path: Path, workers: int) -> None:
    """With the recipe that needs it: Reptile over subsets, one per inner step."""
    seen: list[pm.Batch] = []
    inner = pm.PrismObjective(unimodal=False)

    def objective(forward: Any, batch: pm.Batch) -> Any:
        seen.append(batch)
        return inner(forward, batch)

    settings = [
        "data.spacing=[1,1,1]", "data.patch=[16,16]", "data.batch_size=2", "model.width=2",
        "model.depth=2", "training.steps=4", "masks.train=one_subset", "meta.strategy=reptile",
        "meta.inner_steps=3", f"data.workers={workers}", "training.checkpoint_every=1",
    ]  # fmt: skip
    config = pm.load_config(overrides=settings)
    trained = pm.train(cases, config, objective=objective, out=tmp_path / "run", progress=False)
    # One check of the model, then three train batches and a meta batch per step.
    assert len(seen) == 1 + 4 * 4
    for step in range(4):
        *train, meta = seen[1 + 4 * step : 5 + 4 * step]
        assert all((batch.mask == batch.mask[0]).all() for batch in train)
        assert len({tuple(batch.mask[0].tolist()) for batch in train}) == 3
        assert not {name for batch in train for name in batch.case_ids} & set(meta.case_ids)
        for k, batch in enumerate(train):
            assert not any(torch.equal(batch.image, other.image) for other in train[:k])
    # A run that is cut off draws the same ones.
    assert trained.run is not None
    calls = 0

    def should_stop() -> bool:
        nonlocal calls
        calls += 1
        return calls == 4 + 2  # it is asked after each of the four cases, too

    with pytest.raises(pm.training.stopping.TrainingStopped):
        pm.train(
            cases, config, objective=objective, out=tmp_path / "cut", progress=False,
            should_stop=should_stop,
        )  # fmt: skip
    pm.train(cases, objective=objective, out=tmp_path / "cut", resume=True, progress=False)
    for name in ("weights/last.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_task_episodes_from_the_configuration(cases: Path) -> None:
    config = pm.load_config(
        overrides=[
            "data.spacing=[1,1,1]", "data.patch=[16,16]", "data.batch_size=2", "model.width=2",
            "model.depth=2", "training.steps=2", "episodes.kind=task", "episodes.support=2",
            "meta.strategy=first_order", "meta.inner_steps=2",
        ]
    )  # fmt: skip
    history = pm.train(cases, config, progress=False).history
    assert len(history) == 2 and json.dumps(history)
    wrong = config.model_copy(
        update={"episodes": config.episodes.model_copy(update={"support": 9})}
    )
    (fault,) = faults_of(lambda: pm.train(cases, wrong, progress=False), ConfigError)
    assert fault.endswith("use fewer support cases (set episodes.support)")


@pytest.mark.parametrize("meta", ["static", "full", "single"])
def test_hard_masks_need_meta_batches_of_all_subsets(meta: str) -> None:
    (fault,) = faults_of(
        lambda: pm.load_config(overrides=["masks.train=hard", f"masks.meta={meta}"]), ConfigError
    )
    assert fault == (
        f"masks: meta: hard masks follow the losses of the meta batches, and {meta} ones show few subsets "
        "there; use dynamic, balanced, one_subset or hard"
    )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["masks.power=2"], "masks: power: only hard masks have one; "),
        (["episodes.support=3"], "episodes: support: 3 support cases need kind = task; "),
        (
            ["episodes.kind=task", "masks.meta=full"],
            "masks, episodes.kind: all samples of a task show ",
        ),
    ],
)
def test_keys_that_would_do_nothing(overrides: list[str], says: str) -> None:
    (fault,) = faults_of(lambda: pm.load_config(overrides=overrides), ConfigError)
    assert fault.startswith(says) and "; " in fault


# ---------------------------------------------------------------- the loader


def test_pinned_episodes_keep_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    from prism_meta.training.episodes import loader

    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    image, mask = torch.rand(1, 2, 4, 4), torch.ones(1, 2).bool()
    batch = pm.Batch(image, mask, torch.zeros(1, 4, 4).long(), ("a",))
    train, meta = loader._Loaded((pm.StepBatches([batch, batch]), batch)).pin_memory().value
    assert isinstance(train, pm.StepBatches) and isinstance(meta, pm.Batch)
    for one in (*train, meta):
        assert one.image is not image and torch.equal(one.image, image)
        assert one.case_ids == ("a",) and one.valid is None


def test_an_error_of_an_episode_is_raised_with_its_message() -> None:
    class Broken:
        def __getitem__(self, index: int) -> Any:
            raise ConfigError("data: nothing here; add cases")

    with pytest.raises(ConfigError, match="nothing here"):
        next(load_episodes(Broken(), range(2), workers=0))


@pytest.mark.parametrize(
    ("cores", "device", "processes", "episodes", "expected"),
    [
        (2, "cpu", 1, 1000, 0),
        (3, "cpu", 1, 1000, 1),
        (1, "cpu", 1, 1000, 0),
        (64, "cpu", 1, 1000, 1),
        (2, "cpu", 2, 1000, 0),
        (4, "cpu", 2, 1000, 0),
        (8, "cpu", 2, 1000, 1),
        (4, "cpu", 1, 10, 0),
        (2, "cuda", 1, 1000, 1),
        (64, "cuda", 8, 1000, 4),
        (8, "cuda", 4, 1000, 1),
    ],
)
def test_workers_by_default(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    device: str,
    processes: int,
    episodes: int,
    expected: int,
) -> None:
    monkeypatch.setattr("prism_meta.training.episodes.loader._cores", lambda: cores)
    fabric: Any = SimpleNamespace(
        device=torch.device(device), world_size=processes, strategy=SimpleNamespace(num_nodes=1)
    )
    assert default_workers(fabric, episodes) == expected


class Priorities:
    """Items that say how nice the process is that loads them."""

    def __getitem__(self, index: int) -> int:
        return os.nice(0)


@pytest.mark.skipif(not hasattr(os, "nice"), reason="there is no niceness on Windows")
@pytest.mark.parametrize("give_way", [False, True])
def test_processes_give_way_to_the_training(give_way: bool) -> None:
    own = os.nice(0)
    with closing(load_episodes(Priorities(), range(1), workers=1, give_way=give_way)) as loaded:
        assert list(loaded) == [19 if give_way else own]
    assert os.nice(0) == own
