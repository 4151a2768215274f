"""The tables of a profile, and the notes below them that say what was measured and what estimated."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table

from prism_meta.training.profiling.result import (
    PredictionProfile,
    Profile,
    StrategyProfile,
    TrainingProfile,
    Work,
)
from prism_meta.training.profiling.timing import Seconds

#: Prefixes for numbers of operations, each 1000 times the one before.
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def profile_tables(made: Profile) -> Iterator[RenderableType]:
    """What a profile says, part by part."""
    yield _head(made)
    if made.prediction is not None:
        yield from _prediction(made.prediction)
    if made.training is not None:
        yield from _training(made.training)
    yield (
        "Times are measured: medians, with the range of all repeats. FLOPs are counted: convolutions and "
        "matrix products, a product and its sum as two. Memory is estimated without computing, from the "
        "sizes of all tensors that are alive together; what kernels allocate inside comes on top."
    )


def _head(made: Profile) -> Table:
    machine = made.machine
    table = _table(f"Profile of {made.run}")
    table.add_column("what")
    table.add_column("value")
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("python", "torch"))
    for name, value in {
        "network": f"{made.network}, {made.parameters:,} parameters, weights: {made.weights}",
        "device": f"{machine['device']} ({machine['name']}), {machine['threads']} threads",
        "versions": f"prism-meta {machine['versions']['prism-meta']}, {versions}",
        "repeats": f"{made.rounds}, in turns; seed {made.seed}; 32-bit precision",
    }.items():
        table.add_row(name, value)
    return table


def _prediction(made: PredictionProfile) -> Iterator[RenderableType]:
    measured = made.subsets[0].work.allocated is not None
    table = _table(f"Prediction: a window of {_size(made.patch)}, a case of {_size(made.shape)}")
    table.add_column("subset", overflow="fold")
    case = "case" if made.measured else "case, estimated"
    for name in ("window", "range", case, "ratio", "FLOPs, window", "case", "memory"):
        table.add_column(name, justify="right")
    if measured:
        table.add_column("on the GPU", justify="right")
    largest = made.subsets[-1]
    for each in made.subsets:
        table.add_row(
            each.subset,
            _time(each.window.median),
            _range(each.window),
            _time(each.case_seconds),
            f"{each.case_seconds / largest.case_seconds:.2f}",
            _flops(each.window_flops),
            _flops(each.case_flops),
            *_memory(each.work),
        )
    yield table
    yield (
        f"A case has {made.windows} windows ({made.shape_source}), {made.batch} in each call of the network; "
        f"memory is that of a call. The ratio compares cases with {largest.subset}. The time of a case is "
        + (
            "measured."
            if made.measured
            else "estimated from that of some windows; --limit gives more time to measure it."
        )
        + " Reading, resampling and writing are not in it."
    )


def _training(made: TrainingProfile) -> Iterator[RenderableType]:
    title = (
        f"Training: an outer step with patches of {_size(made.patch)}, {made.batch_size} per batch, "
        f"K = {made.inner_steps}"
    )
    table = _table(title)
    table.add_column("strategy")
    for name in ("step", "range", "x first order", "FLOPs", "memory"):
        table.add_column(name, justify="right")
    done = [each for each in made.strategies if each.work is not None]
    if done and done[0].work is not None and done[0].work.allocated is not None:
        table.add_column("on the GPU", justify="right")
    for each in made.strategies:
        table.add_row(each.strategy, *_cells(each))
    yield table
    for each in made.strategies:
        if each.fault is not None:
            yield f"{each.strategy} cannot train this network: {each.fault}"
    yield (
        f"Episodes in a step: {made.episodes}. Every modality of every sample is shown, which takes longest. "
        "FLOPs are those of forward and backward passes; finite_difference "
        "computes in float64. Memory has the weights, the optimizer's state and the batches in it."
    )


def _cells(each: StrategyProfile) -> list[str]:
    if each.step is None or each.work is None:
        return ["-"]
    ratio = "-" if each.ratio is None else f"{each.ratio:.2f}"
    step = each.step
    return [_time(step.median), _range(step), ratio, _flops(each.work.flops), *_memory(each.work)]


def _memory(work: Work) -> list[str]:
    there = [] if work.allocated is None else [decimal(work.allocated)]
    return [decimal(work.memory), *there]


def _table(title: str) -> Table:
    return Table(box=None, pad_edge=False, title=title, title_justify="left")


def _size(voxels: tuple[int, ...]) -> str:
    return " x ".join(map(str, voxels))


def _flops(number: int) -> str:
    """Three digits, with the prefixes of the SI.

    Example:
        >>> _flops(171008), _flops(27 * 10**9), _flops(0)
        ('171 k', '27 G', '0 ')
    """
    power = min(len(_PREFIXES) - 1, (len(str(number)) - 1) // 3)
    return f"{number / 1000**power:.3g} {_PREFIXES[power]}"


def _time(seconds: float) -> str:
    """Three digits, in a unit that suits.

    Example:
        >>> _time(0.01234), _time(1.5), _time(340)
        ('12.3 ms', '1.50 s', '5 min 40 s')
    """
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s" if seconds >= 10 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _range(times: Seconds) -> str:
    return f"{_time(times.low)} - {_time(times.high)}"
