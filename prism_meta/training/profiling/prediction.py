"""``profile_prediction``: time, memory and FLOPs of a prediction, for subsets of modalities.

Images are random and have the sizes of the run, so that no case is needed. Times are measured. FLOPs are
counted, and memory is followed, on torch's meta device, where the same operators run without values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prism_meta.evaluation.predictor import Predictor
from prism_meta.evaluation.windows import evaluation_mode
from prism_meta.modalities import subset_name
from prism_meta.training.profiling.flops import flop_counter
from prism_meta.training.profiling.result import PredictionProfile, SubsetProfile, Work
from prism_meta.training.profiling.timing import PeakMemory, Seconds, interleaved
from prism_meta.training.shapes import LiveBytes, on_meta

#: Called with the number of calls that were made, the number of all calls, and a note.
OnCall = Callable[[int, int, str], None]


class CaseSize(NamedTuple):
    """The size of a case in voxels (D, H, W) of the model's grid, and where it comes from."""

    shape: tuple[int, ...]
    source: str


def profile_prediction(
    predictor: Predictor,
    subsets: Tensor,
    size: CaseSize,
    *,
    rounds: int,
    limit: float,
    on_call: OnCall = lambda done, total, note: None,
) -> PredictionProfile:
    """Profile what the network does for a prediction from each of several subsets of modalities.

    Reading, resampling and writing are not in it, and hardly depend on the subset.

    Args:
        predictor: the trained model, with the names of its modalities.
        subsets: bool (S, M), each with at least one True.
        size: of a case.
        rounds: how often each call is timed.
        limit: seconds that timing whole cases may take. If it would take longer, the time of a case is
            estimated: that of one call of the model with several windows, or of one window if such calls
            take too long as well, times their number.
        on_call: called after each timed call.

    Example:
        >>> from prism_meta.networks.prism import PrismNet
        >>> net = PrismNet(num_modalities=2, spatial_dims=2, width=2, depth=2)
        >>> predictor = Predictor(net, modalities=("flair", "t1"), patch=(16, 16))
        >>> made = profile_prediction(predictor, torch.tensor([[True, False], [True, True]]),
        ...                           CaseSize((16, 24, 5), "given"), rounds=2, limit=60)
        >>> [each.subset for each in made.subsets], made.windows, made.measured
        (['flair', 'flair+t1'], 10, True)
        >>> one, both = (each.window_flops for each in made.subsets)
        >>> one < 0.8 * both
        True
    """
    model, windows = predictor.model, predictor.windows
    modalities = predictor.modalities or tuple(map(str, range(subsets.shape[1])))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows = {subset_name(row.tolist(), modalities): row[None].to(device) for row in subsets}
    number = windows.count(size.shape)
    batch = min(number, windows.batch_size)
    done, total = 0, len(rows) * (1 + rounds)

    def advance(note: str) -> None:
        nonlocal done
        done += 1
        on_call(done, total, note)

    image = torch.randn(batch, len(modalities), *windows.patch, device=device)
    peaks = {name: PeakMemory(device) for name in rows}
    alone = {name: partial(_segment, model, image[:1], row) for name, row in rows.items()}
    timed = partial(interleaved, device=device, on_call=advance)
    whole: dict[str, Seconds] = {}
    with torch.inference_mode(), evaluation_mode(model):
        timed(alone, rounds=1)  # first calls are slow
        one = timed(alone, rounds=rounds)
        estimates = {name: each.median * number for name, each in one.items()}
        if sum(estimates.values()) * batch <= limit * number:
            total += len(rows)
            for name, row in rows.items():
                with peaks[name]:
                    call = {name: partial(_segment, model, image, row)}
                    estimates |= {name: timed(call, rounds=1)[name].median * number / batch}
        if sum(estimates.values()) * rounds <= limit:
            total += len(rows) * rounds
            volume = torch.randn(len(modalities), *size.shape, device=device)
            small = volume[(slice(None), *(slice(n) for n in (*windows.patch, 1)[:3]))]
            windows.logits(small, next(iter(rows.values())))  # imports what the first call needs
            cases = {name: partial(windows.logits, volume, row) for name, row in rows.items()}
            whole = timed(cases, rounds=rounds)
    profiles = []
    for name, row in rows.items():
        flops, memory = call_work(model, image, row.cpu())
        case = whole.get(name)
        profiles.append(
            SubsetProfile(
                name,
                modalities=int(row.sum()),
                window=one[name],
                case=case,
                case_seconds=estimates[name] if case is None else case.median,
                window_flops=flops // batch,
                case_flops=flops * number // batch,
                work=Work(flops, memory, peaks[name].bytes),
            )
        )
    return PredictionProfile(
        tuple(profiles), size.shape, size.source, windows.patch, windows=number, batch=batch
    )


def call_work(model: nn.Module, image: Tensor, subset: Tensor) -> tuple[int, int]:
    """FLOPs and peak bytes of one prediction, with the weights and the image.

    Args:
        model: a ``SegmentationModel``.
        image: (B, M, *S), of which only the shape is used.
        subset: bool (1, M).
    """
    stand_in = on_meta(model).eval()
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    with torch.no_grad(), flop_counter() as counter, LiveBytes() as live:
        _segment(stand_in, torch.empty(image.shape, device="meta"), subset)
    return counter.get_total_flops(), live.peak + weights


def _segment(model: nn.Module, image: Tensor, subset: Tensor) -> Tensor:
    logits: Tensor = model.segment_subsets(image, subset)  # type: ignore[operator]
    return logits
