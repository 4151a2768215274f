"""``profile_run``: how long predictions and outer steps of a run take, and how much they need."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prism_meta.errors import PrismError
from prism_meta.evaluation.faults import is_out_of_memory
from prism_meta.training.folder.facts import versions
from prism_meta.training.folder.weights import Kind
from prism_meta.training.profiling.prediction import CaseSize, OnCall, profile_prediction
from prism_meta.training.profiling.result import Profile
from prism_meta.training.profiling.size import typical_size
from prism_meta.training.profiling.steps import profile_training
from prism_meta.training.run import Run


def profile_run(
    run: Run,
    *,
    subsets: Tensor | None,
    strategies: Sequence[str],
    size: CaseSize | None = None,
    rounds: int = 5,
    limit: float = 120.0,
    weights: Kind | None = None,
    on_predict: OnCall = lambda done, total, note: None,
    on_train: OnCall = lambda done, total, note: None,
) -> Profile:
    """Profile the network of a run on the device that ``evaluate`` uses. No case is read.

    Args:
        run: a run whose training has ended.
        subsets: bool (S, M); None profiles no prediction.
        strategies: names in the registry; none profiles no training.
        size: of a case. Defaults to ``typical_size``.
        rounds: how often everything is timed.
        limit: see ``profile_prediction``.
        weights: see ``Run.load_model``.
        on_predict: called after each prediction.
        on_train: called after each outer step.

    Raises:
        PrismError: see ``Run.load_model``, or memory ran out.
    """
    predictor = run.predictor(weights=weights)
    model = predictor.model
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seed = run.config.seed
    prediction = training = None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if subsets is not None:
            size = size or typical_size(run)
            with _memory_as_error(run):
                prediction = profile_prediction(
                    predictor, subsets, size, rounds=rounds, limit=limit, on_call=on_predict
                )
        if strategies:
            training = profile_training(
                run.config, model, strategies, device=device, rounds=rounds, on_call=on_train
            )
    return Profile(
        run=str(run.folder),
        weights=weights or run.kinds[0],
        network=type(getattr(model, "net", model)).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        machine=_machine(device),
        seed=seed,
        rounds=rounds,
        prediction=prediction,
        training=training,
    )


@contextmanager
def _memory_as_error(run: Run) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise PrismError(
            f"{run.folder}: predictions need more memory than is free; profile it on a machine with more "
            "memory, or give a smaller --shape or --limit"
        ) from error


def _machine(device: torch.device) -> dict[str, Any]:
    """The device, the threads that torch computes with, and the versions."""
    processor = platform.processor() or platform.machine()
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else processor,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
