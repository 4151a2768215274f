"""``profile_training``: time, memory and FLOPs of an outer step, with each strategy of the registry."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from prism_meta.bilevel.strategies import FirstOrder
from prism_meta.bilevel.strategies.registry import strategy_named
from prism_meta.training.config import Config
from prism_meta.training.config.meta import INNER_KEYS
from prism_meta.training.profiling.flops import flop_counter
from prism_meta.training.profiling.memory import step_memory
from prism_meta.training.profiling.prediction import OnCall
from prism_meta.training.profiling.result import StrategyProfile, TrainingProfile, Work
from prism_meta.training.profiling.timing import PeakMemory, interleaved
from prism_meta.training.profiling.trial import random_episode, trial_learner


def profile_training(
    config: Config,
    model: nn.Module,
    strategies: Sequence[str],
    *,
    device: torch.device,
    rounds: int,
    on_call: OnCall = lambda done, total, note: None,
) -> TrainingProfile:
    """Profile outer steps of a configuration with each of several strategies, on random patches.

    Every modality of every sample is shown, which takes longest. Precision is 32 bits. A strategy that
    cannot train the model has a fault instead of numbers.

    Args:
        config: patch, batch size, inner steps, objective and inner optimizer.
        model: the trained model, which stays as it is.
        strategies: names in the registry.
        device: where the steps are taken.
        rounds: how often a step of each strategy is timed; they take turns.
        on_call: called after each step, and after each count of FLOPs.

    Example:
        >>> from prism_meta.networks.wrapped import wrap
        >>> from prism_meta.training.config import load_config
        >>> config = load_config(overrides=["data.patch=[16, 16]", "data.batch_size=1"])
        >>> model = wrap(nn.Conv2d(4, 4, 3, padding=1))
        >>> made = profile_training(config, model, ["first_order", "second_order"],
        ...                         device=torch.device("cpu"), rounds=2)
        >>> first, second = (each.work.flops for each in made.strategies)
        >>> made.strategies[0].ratio, second / first > 1.5
        (1.0, True)
    """
    total, done = len(strategies) * (2 + rounds), 0

    def advance(note: str) -> None:
        nonlocal done
        done += 1
        on_call(done, total, note)

    steps, works, faults = {}, {}, {}
    for name in strategies:
        try:
            own = _with_strategy(config, name)
            steps[name], allocated = _first_step(own, model, device)
            advance(name)
            works[name] = _step_work(own, model, allocated)
        except (
            ValueError,
            TypeError,
            RuntimeError,
            MemoryError,
        ) as error:  # a model of any kind may refuse
            steps.pop(name, None)
            faults[name] = _reason(error)
        advance(name)
    total = done + len(steps) * rounds
    times = interleaved(steps, rounds=rounds, device=device, on_call=advance)
    base = times.get(FirstOrder.name)
    profiles = [
        StrategyProfile(name, fault=faults[name])
        if name in faults
        else StrategyProfile(
            name,
            step=times[name],
            ratio=None if base is None else times[name].ratio(base),
            work=works[name],
        )
        for name in strategies
    ]
    return TrainingProfile(
        tuple(profiles),
        patch=tuple(config.data.patch),
        batch_size=config.data.batch_size,
        inner_steps=config.meta.inner_steps,
        episodes=config.meta.episodes,
    )


def _with_strategy(config: Config, name: str) -> Config:
    values: dict[str, Any] = config.model_dump()
    values["meta"] |= {"strategy": name}
    if not strategy_named(name).adapts:
        values["meta"] = {k: v for k, v in values["meta"].items() if k not in INNER_KEYS}
    return Config.model_validate(values)


def _first_step(
    config: Config, model: nn.Module, device: torch.device
) -> tuple[partial[Any], int | None]:
    """A function that takes an outer step, and the peak of the first one, which is slow."""
    inner_steps = config.meta.inner_steps if config.meta.kind.adapts else 1
    shown = torch.ones(config.data.batch_size, len(config.data.modalities), dtype=torch.bool)
    with PeakMemory(device) as peak:
        learner = trial_learner(config, device=device, model=copy.deepcopy(model).train())
        episode = random_episode(config, [shown] * (inner_steps + 1), device)
        step = partial(learner.step_episodes, [episode] * config.meta.episodes)
        step()
    return step, peak.bytes


def _step_work(config: Config, model: nn.Module, allocated: int | None) -> Work:
    """FLOPs and memory. The first step was taken, so that what is computed once is not counted."""
    with flop_counter() as counter:
        memory = step_memory(config, model=model)
    return Work(counter.get_total_flops() * config.meta.episodes, memory.total, allocated)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(str(each["msg"]).removeprefix("Value error, ") for each in error.errors())
    return (str(error).splitlines() or [type(error).__name__])[0]
