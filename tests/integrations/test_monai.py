"""The strategies in MONAI's engines: the parameters are those of a loop over MetaLearner.step."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import monai
import pytest
import torch
from helpers import run_example
from outer_steps import (
    RESUMED,
    STRATEGIES,
    Make,
    assert_same,
    episodes,
    learner,
    looped,
    prism_episodes,
    prism_learner,
)
from torch.optim.lr_scheduler import StepLR

from prism_meta.integrations import MissingPackageError
from prism_meta.integrations.monai import INSTALL, MetaTrainer

ignite = pytest.importorskip("ignite", reason=f"needs pytorch-ignite: {INSTALL}")

from ignite.metrics import MeanSquaredError  # noqa: E402, after the check above
from monai.engines import SupervisedEvaluator  # noqa: E402
from monai.handlers import (  # noqa: E402
    CheckpointLoader,
    CheckpointSaver,
    LrScheduleHandler,
    StatsHandler,
    ValidationHandler,
    from_engine,
)


def saved(own: Any) -> dict[str, Any]:
    return {"net": own.model, "optimizer": own.optimizer, "learner": own}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_steps_are_those_of_the_learner(name: str) -> None:
    own = learner(STRATEGIES[name], clip_norm=0.5)
    trainer = MetaTrainer("cpu", 1, episodes(), own)
    trainer.run()
    assert trainer.state.iteration == len(episodes())
    assert_same(own, looped(learner(STRATEGIES[name], clip_norm=0.5)))


def test_a_prism_step_is_the_learners() -> None:
    own, every = prism_learner(), prism_episodes()
    trainer = MetaTrainer("cpu", 1, every, own)
    trainer.run()
    assert_same(own, looped(prism_learner(), every))
    (output,) = trainer.state.output
    assert {"loss", "train_loss", "grad_norm", "fuse"} <= output.keys()
    assert all(value.ndim == 0 for value in output.values())


def test_losses_are_logged_and_rates_fall(caplog: pytest.LogCaptureFixture) -> None:
    own = learner(STRATEGIES["second-order"])
    scheduler = StepLR(own.optimizer, step_size=1, gamma=0.1)
    handlers = [
        LrScheduleHandler(scheduler, print_lr=True, name="rates"),
        StatsHandler(name="stats", output_transform=from_engine(["loss"], first=True)),
        StatsHandler(name="every"),
    ]
    for name in ("stats", "every"):  # MONAI's loggers do not propagate
        logging.getLogger(name).addHandler(caplog.handler)
    with caplog.at_level(logging.INFO):
        MetaTrainer("cpu", 2, episodes(3), own, train_handlers=handlers).run()

    other = learner(STRATEGIES["second-order"])
    rates, expected = StepLR(other.optimizer, step_size=1, gamma=0.1), []
    for _ in range(2):
        expected += [other.step(*episode).meta_loss.item() for episode in episodes(3)]
        rates.step()
    assert_same(own, other)
    lines = [record.message for record in caplog.records if record.name == "stats"]
    assert [float(line.split("Loss: ")[1]) for line in lines] == pytest.approx(expected, abs=6e-5)
    assert lines[0].startswith("Epoch: 1/2, Iter: 1/3 -- ")
    every = [record.message for record in caplog.records if record.name == "every"]
    assert all(word in every[0] for word in ("grad_norm: ", "loss: ", "train_loss: "))
    told = [record.message for record in caplog.records if record.name == "rates"]
    assert told == ["Current learning rate: 0.001", "Current learning rate: 0.0001"]


def test_the_best_network_on_a_validation_set_is_saved(tmp_path: Path) -> None:
    """Validation changes no step, although it puts the network into evaluation mode."""
    own = learner(STRATEGIES["first-order"])
    values = [{"image": x, "label": y} for (x, y), _ in episodes(2)]
    key = {"mse": MeanSquaredError(output_transform=lambda out: (out["pred"], out["label"]))}
    best = CheckpointSaver(
        tmp_path, {"net": own.model}, save_key_metric=True, key_metric_negative_sign=True,
        key_metric_filename="best.pt",
    )  # fmt: skip
    seen: list[tuple[float, dict[str, Any]]] = []
    validator = SupervisedEvaluator(
        "cpu", values, own.model, key_val_metric=key, decollate=False, val_handlers=[best],
        metric_cmp_fn=lambda now, before: before == -1 or now < before,
    )  # fmt: skip

    def keep(engine: Any) -> None:
        state = {name: value.clone() for name, value in own.model.state_dict().items()}
        seen.append((engine.state.metrics["mse"], state))

    validator.add_event_handler(ignite.engine.Events.COMPLETED, keep)
    trainer = MetaTrainer(
        "cpu", 3, episodes(3), own, train_handlers=[ValidationHandler(1, validator)]
    )
    trainer.run()
    assert_same(own, looped(learner(STRATEGIES["first-order"]), episodes(3) * 3))
    assert [len(seen), validator.state.best_metric] == [3, min(value for value, _ in seen)]
    expected = min(seen, key=lambda pair: pair[0])[1]
    torch.testing.assert_close(
        torch.load(tmp_path / "best.pt", weights_only=True), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize(("make", "inner_state"), RESUMED)
def test_a_resumed_training_is_an_uninterrupted_one(
    make: Make, inner_state: str, tmp_path: Path
) -> None:
    every = episodes(2)
    cut = learner(make, inner_state=inner_state)
    saver = CheckpointSaver(tmp_path, saved(cut), save_final=True, final_filename="two.pt")
    MetaTrainer("cpu", 2, every, cut, train_handlers=[saver]).run()

    resumed = learner(make, inner_state=inner_state)
    loader = CheckpointLoader(str(tmp_path / "two.pt"), saved(resumed))
    MetaTrainer("cpu", 1, every, resumed, train_handlers=[loader]).run()
    assert_same(resumed, looped(learner(make, inner_state=inner_state), every * 3))


def test_episodes_are_prepared_by_a_function_of_your_own() -> None:
    own, numbers = learner(STRATEGIES["single-level"]), iter(range(9))

    def prepare(episode: int, device: torch.device, non_blocking: bool) -> Any:
        assert (device, non_blocking) == (torch.device("cpu"), False)
        assert episode == next(numbers)
        return episodes()[episode]

    MetaTrainer("cpu", 1, range(6), own, prepare_batch=prepare, epoch_length=4).run()
    assert_same(own, looped(learner(STRATEGIES["single-level"]), episodes()[:4]))


def test_handlers_find_network_and_optimizer() -> None:
    own = learner(STRATEGIES["first-order"])
    trainer = MetaTrainer("cpu", 1, episodes(), own)
    assert trainer.network is own.model
    assert trainer.optimizer is own.optimizer


def test_the_package_monai_is_not_shadowed() -> None:
    ours = importlib.import_module("prism_meta.integrations.monai")
    assert importlib.import_module("monai") is monai is not ours
    assert issubclass(MetaTrainer, monai.engines.Trainer)


def test_the_example_runs() -> None:
    run_example(MetaTrainer)


def test_without_ignite_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ignite", None)
    with pytest.raises(MissingPackageError) as error:
        MetaTrainer("cpu", 1, episodes(), learner(STRATEGIES["first-order"]))
    assert str(error.value).endswith("install it with: pip install 'prism-meta[monai]'")
