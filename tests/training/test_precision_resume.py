"""Half precision and several episodes per step: what a scaler does, and that a run resumes bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import equal, prism_batch, prism_net
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD, AdamW
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import FirstOrder, MetaStrategy, SecondOrder
from prism_meta.errors import ConfigError, PrismError
from prism_meta.modalities import Batch
from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import RelativePreference
from prism_meta.training.build import build_fabric
from prism_meta.training.config.schema import load_config
from prism_meta.training.fit import fit

pytestmark = pytest.mark.slow

STEPS = 6
MASK = [[True, True, False], [True, False, True], [False, True, True]]


def full() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def bfloat16() -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")


def float16(**options: Any) -> Fabric:
    """float16 on the CPU, which Fabric offers only as a plugin; the scale grows every second step."""
    options = {"init_scale": 1024.0, "growth_interval": 2, **options}
    scaler = torch.amp.GradScaler("cpu", **options)
    return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])


def scale_of(fabric: Fabric) -> float:
    return float(fabric.strategy.precision.scaler.get_scale())  # type: ignore[attr-defined]


def episodes(count: int) -> list[tuple[Batch, Batch]]:
    def batch(seed: int) -> Batch:
        drawn = prism_batch(MASK, 8, 8, seed=seed)
        return replace(drawn, image=drawn.image.float())

    return [(batch(900 + 9 * t), batch(904 + 9 * t)) for t in range(count)]


def train(
    folder: Path | None,
    fabric: Fabric,
    *,
    data: list[Any] | None = None,
    per_step: int = 1,
    strategy: MetaStrategy | None = None,
    plain: bool = False,
    **options: Any,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The numbers that training changes, and the log."""
    model = prism_net().float()
    objective = PrismObjective(weighting=RelativePreference((0.2, 0.5, 0.0), gamma=0.5))
    if plain:
        options["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.05)
    log = fit(
        model,
        objective,
        strategy or SecondOrder(SGD(0.05), 2),
        data or episodes(STEPS * per_step),
        episodes_per_step=per_step,
        epoch=3,
        fabric=fabric,
        folder=folder,
        checkpoint_every=4,
        **options,
    )
    return {**model.state_dict(), **objective.state_dict()}, log


def stop(step: int, line: dict[str, Any]) -> None:
    """After the checkpoint of step 4, before that of step 6."""
    if step == 6:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("per_step", "inner"), [(2, "fresh sgd"), (1, "carried adamw")])
@pytest.mark.parametrize("make", [full, bfloat16, float16])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, make: Callable[[], Fabric], per_step: int, inner: str
) -> None:
    options: dict[str, Any] = {"per_step": per_step}
    if inner == "carried adamw":
        options |= {"inner_state": "carried", "strategy": FirstOrder(AdamW(1e-3), 2)}
    fabric = make()
    expected, _ = train(tmp_path / "whole", fabric, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", make(), **options, on_step=stop)
    again = make()
    resumed, log = train(tmp_path / "cut", again, **options, resume=True)
    assert [line["step"] for line in log] == [5, 6]
    assert equal(resumed, expected)
    if make is float16:
        assert scale_of(again) == scale_of(fabric) == 8192  # three times doubled
    whole, cut = ((tmp_path / f / "metrics.jsonl").read_text() for f in ("whole", "cut"))
    assert whole == cut


@pytest.mark.parametrize("make", [bfloat16, float16])
def test_half_precision_trains_near_full_precision(make: Callable[[], Fabric]) -> None:
    exact, exact_log = train(None, full(), plain=True)
    half, log = train(None, make(), plain=True)
    assert not equal(half, exact)  # it is another precision
    assert all(value.isfinite().all() for value in half.values())
    for ours, theirs in zip(log, exact_log, strict=True):
        assert ours["meta_loss"] == pytest.approx(theirs["meta_loss"], rel=1e-3)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=0.1)


@pytest.mark.parametrize("make", [full, bfloat16, float16])
def test_episodes_per_step_are_averaged(make: Callable[[], Fabric]) -> None:
    """Two equal episodes give the step of one."""
    data = episodes(STEPS)
    one, _ = train(None, make(), data=data)
    two, _ = train(None, make(), data=[e for e in data for _ in range(2)], per_step=2)
    names = prism_net().state_dict()
    for name in names:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- steps that are skipped


def test_a_scale_that_is_too_large_is_lowered_and_training_goes_on(tmp_path: Path) -> None:
    fabric = float16(init_scale=2.0**24, growth_interval=1000)
    numbers, log = train(tmp_path, fabric, data=episodes(30))
    skipped = [line["step"] for line in log if line.get("skipped")]
    assert skipped[0] == 1
    assert 1 < len(skipped) < 29
    assert scale_of(fabric) == 2.0 ** (24 - len(skipped))
    assert all(value.isfinite().all() for value in numbers.values())
    # The schedule does not move on a step that was not taken.
    assert all(log[k]["lr"] == log[0]["lr"] for k in range(len(skipped)))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))


def test_a_scaler_that_skips_every_step_ends_the_run() -> None:
    data = episodes(30)
    bad = [(replace(t, image=t.image * float("nan")), m) for t, m in data]
    # 1024 is halved to less than 1 by the eleventh step, and no loss was ever finite.
    with pytest.raises(PrismError, match="training diverged at step 11: losses nan and nan"):
        train(None, float16(), data=bad)


def test_a_pull_that_is_not_finite_is_skipped_although_the_gradient_is_finite() -> None:
    """The train batch uses a parameter that the meta batch does not, and its inner step overflows."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

        def forward(self, weights: Tensor) -> Tensor:
            return weights[0] * self.a + (weights[1] * self.b if weights[1] else 0)

    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    learner = MetaLearner(
        model, lambda forward, batch: forward(batch).sum(), FirstOrder(SGD(1e6)), optimizer,
        alpha=0.5, scaler=scaler,
    )  # fmt: skip
    train, meta = torch.tensor([1.0, 1e38]), torch.tensor([1.0, 0.0])
    result = learner.meta_gradient(train, meta)
    assert result.adapted["b"].isinf()
    assert all(g.isfinite() for g in result.gradient.values())
    assert learner.apply(result).isinf()
    assert [p.item() for p in model.parameters()] == [1.0, 1.0]
    assert scaler.get_scale() == 4


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_float16_on_the_cpu_is_refused(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    config = load_config(
        overrides=["fabric.precision=16-mixed", f"fabric.accelerator={accelerator}"]
    )
    with pytest.raises(ConfigError) as caught:
        build_fabric(config.fabric)
    assert caught.value.faults == (
        "fabric.precision: got '16-mixed' on a CPU, where Lightning Fabric uses bfloat16 instead; use "
        "bf16-mixed or 32-true, or a GPU",
    )


def test_float16_has_a_scaler_and_bfloat16_has_none() -> None:
    assert float16().strategy.precision.scaler is not None  # type: ignore[attr-defined]
    config = load_config(overrides=["fabric.precision=bf16-mixed", "fabric.accelerator=cpu"])
    assert build_fabric(config.fabric).strategy.precision.scaler is None  # type: ignore[attr-defined]
