"""What a profile says: time, memory and FLOPs of predictions and of outer steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from prism_meta.training.profiling.timing import Seconds


@dataclass(frozen=True)
class Work:
    """What a computation needs, apart from its time.

    Args:
        flops: of convolutions and matrix products; a product and its sum are two.
        memory: bytes of all tensors alive together at the peak, estimated on torch's meta device. What
            kernels allocate inside is not in it.
        allocated: bytes at the peak, measured on a GPU; None on other devices.
    """

    flops: int
    memory: int
    allocated: int | None = None


@dataclass(frozen=True)
class SubsetProfile:
    """Predictions from one subset of modalities.

    Args:
        subset: its name.
        modalities: the number of modalities in it.
        window: seconds of one window in a call of its own.
        case: seconds of all windows of a case; None if they are not measured.
        case_seconds: the median of ``case``, or the estimate that replaces it.
        window_flops: FLOPs of one window.
        case_flops: FLOPs of all windows of a case.
        work: of one call of the model, with as many windows as a prediction gives it.
    """

    subset: str
    modalities: int
    window: Seconds
    case: Seconds | None
    case_seconds: float
    window_flops: int
    case_flops: int
    work: Work


@dataclass(frozen=True)
class PredictionProfile:
    """Predictions from several subsets, the largest last. See ``profile_prediction``.

    Args:
        subsets: one per subset, in the order given.
        shape: (D, H, W), size of a case in voxels of the model's grid.
        shape_source: where the shape comes from.
        patch: voxels of a window.
        windows: number of windows of a case.
        batch: windows per call of the model.
    """

    subsets: tuple[SubsetProfile, ...]
    shape: tuple[int, ...]
    shape_source: str
    patch: tuple[int, ...]
    windows: int
    batch: int

    @property
    def measured(self) -> bool:
        """Whether whole cases were timed."""
        return all(each.case is not None for each in self.subsets)


@dataclass(frozen=True)
class StrategyProfile:
    """Outer steps with one strategy.

    Args:
        strategy: its name in configurations.
        fault: why it cannot train this model; None if it can. The other values are then None.
        step: seconds of an outer step.
        ratio: the median of the ratios to first order in each round; None without first order.
        work: FLOPs and memory of an outer step.
    """

    strategy: str
    fault: str | None = None
    step: Seconds | None = None
    ratio: float | None = None
    work: Work | None = None


@dataclass(frozen=True)
class TrainingProfile:
    """Outer steps with several strategies. See ``profile_training``.

    Args:
        strategies: one per strategy.
        patch: voxels of a patch.
        batch_size: patches per batch.
        inner_steps: K.
        episodes: episodes per outer step.
    """

    strategies: tuple[StrategyProfile, ...]
    patch: tuple[int, ...]
    batch_size: int
    inner_steps: int
    episodes: int


@dataclass(frozen=True)
class Profile:
    """What ``prism-meta profile`` shows and stores.

    Args:
        run: the run folder.
        weights: kind of the weights.
        network: its class.
        parameters: number of its parameters.
        machine: device, threads and versions.
        seed: of the random images, labels and initial states.
        rounds: how often everything was timed.
        prediction: None if it was not asked for.
        training: None if it was not asked for.
    """

    run: str
    weights: str
    network: str
    parameters: int
    machine: dict[str, Any]
    seed: int
    rounds: int
    prediction: PredictionProfile | None
    training: TrainingProfile | None

    def as_dict(self) -> dict[str, Any]:
        """The profile as numbers, texts and lists; each time also has its median and range."""
        told: dict[str, Any] = _plain(asdict(self, dict_factory=dict), self)
        if self.prediction is not None:
            told["prediction"]["case_measured"] = self.prediction.measured
        return told


def _plain(values: Any, source: Any) -> Any:
    """``values`` of ``source`` with each ``Seconds`` spelled out."""
    if isinstance(source, Seconds):
        return {
            "median": source.median,
            "low": source.low,
            "high": source.high,
            "rounds": list(source.rounds),
        }
    if isinstance(source, tuple):
        return [_plain(value, each) for value, each in zip(values, source, strict=True)]
    if isinstance(values, dict) and not isinstance(source, dict):
        return {name: _plain(value, getattr(source, name)) for name, value in values.items()}
    return values
