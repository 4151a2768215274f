"""The cache: cases are preprocessed once, stored on disk, and read patch by patch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from prism_meta.data.cases import Case
from prism_meta.data.labels import LabelSet
from prism_meta.data.preprocessing import Prepared, Preprocessing
from prism_meta.errors import CaseError, raise_faults
from prism_meta.files import atomic

#: Candidate centres of patches stored per class. More would only make the cache larger.
_CENTRES_PER_CLASS = 10_000
#: Increase it when preprocessing changes, so that old caches are not used.
_VERSION = 4


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case on disk. Only the requested patches are read.

    Args:
        id: name of the case.
        availability: bool (M,), which modalities exist.
        shape: (D, H, W) on the model's grid.
        path: the safetensors file.
    """

    id: str
    availability: Tensor
    shape: tuple[int, int, int]
    path: Path

    def centres(self) -> list[Tensor]:
        """Flat voxel indices to centre patches on: in the brain, then in each foreground class."""
        with safe_open(self.path, framework="pt") as stored:
            count = int(stored.metadata()["centres"])
            return [stored.get_tensor(f"centres_{k}") for k in range(count)]

    def patch(
        self, corner: Sequence[int], size: Sequence[int], *, shown: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read one patch.

        Args:
            corner: first voxel of the patch along each axis.
            size: of the patch in voxels, three numbers.
            shown: bool (M,). The other modalities are not read, and their channels are 0.

        Returns:
            Image (M, *size) float32 and target (*size) long.
        """
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        image = torch.zeros(len(shown), *size)
        with safe_open(self.path, framework="pt") as stored:
            for m in shown.nonzero().flatten().tolist():
                image[m] = stored.get_slice(f"image_{m}")[box]
            return image, stored.get_slice("target")[box].long()


def prepare(
    cases: Sequence[Case],
    cache: Path | str,
    *,
    preprocessing: Preprocessing,
    labels: LabelSet,
    on_case: Callable[[str], None] | None = None,
) -> list[CachedCase]:
    """Preprocess cases and cache them on disk. Cases that are in the cache are not computed again.

    Args:
        cases: cases with label files.
        cache: folder of the preprocessed cases. It is created if needed, and runs may share it.
        preprocessing: applied to every case.
        labels: label set of the cases.
        on_case: called with the id of each finished case, e.g. for a progress bar.

    Returns:
        The cached cases, in the order of ``cases``.

    Raises:
        CaseError: a case has no label file, cannot be read, is empty, has NaN voxels or unknown
            label values (the faults of all cases together).
        OutputError: the cache cannot be written.
    """
    prepared: list[CachedCase] = []
    faults: list[str] = []
    for case in cases:
        try:
            prepared.append(_prepare_case(case, preprocessing, labels, Path(cache)))
        except CaseError as error:
            faults.extend(error.faults)
        if on_case is not None:
            on_case(case.id)
    raise_faults(CaseError, faults)
    return prepared


def _prepare_case(
    case: Case, preprocessing: Preprocessing, labels: LabelSet, cache: Path
) -> CachedCase:
    if case.label is None:
        raise CaseError(f"case {case.id}: no label file; training and evaluation need one")
    path = cache / f"{case.id}-{_fingerprint(case, preprocessing, labels)}.safetensors"
    if not path.exists():
        ready = preprocessing(case.read(), labels)
        _store(path, case, ready, num_classes=len(labels.names))
    with safe_open(path, framework="pt") as stored:
        d, h, w = stored.get_slice("target").get_shape()
    return CachedCase(case.id, case.availability, (d, h, w), path)


def _store(path: Path, case: Case, ready: Prepared, *, num_classes: int) -> None:
    if ready.target is None:
        raise CaseError(f"case {case.id}: no label was read; give a case with a label file")
    if not ready.brain.any():
        names = ", ".join(p.name for p in case.files.values())
        raise CaseError(
            f"case {case.id}: all voxels are 0 in {names}; restore the files or remove the case"
        )
    # One tensor per modality, so that hidden ones are not read. Half precision halves the reading time.
    tensors = {
        f"image_{case.modalities.index(name)}": image.half().contiguous()
        for name, image in zip(ready.names, ready.image, strict=True)
    }
    tensors["target"] = ready.target.contiguous()
    inside = [ready.brain, *(ready.target == k for k in range(1, num_classes))]
    for k, voxels in enumerate(inside):
        flat = voxels.flatten().nonzero().flatten()
        every = max(1, len(flat) // _CENTRES_PER_CLASS)
        tensors[f"centres_{k}"] = flat[::every].contiguous() if k else _sample_slices_evenly(voxels)
    content = save(tensors, metadata={"case": case.id, "centres": str(len(inside))})
    with atomic(path) as partial:
        # Not save_file: its errors are no OSError, so ``atomic`` could not explain them.
        partial.write_bytes(content)


def _sample_slices_evenly(brain: Tensor) -> Tensor:
    """Draw flat indices of brain voxels so that each axial slice gets about the same number.

    Uniform draws over voxels would rarely hit the small slices at the top and bottom of the brain.
    A model of axial slices then predicts false tumours there.
    """
    flat = brain.flatten().nonzero().flatten()
    slices = flat % brain.shape[2]
    weights = 1 / torch.bincount(slices)[slices].double()
    drawn = torch.multinomial(
        weights, _CENTRES_PER_CLASS, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    return flat[drawn]


def _fingerprint(case: Case, preprocessing: Preprocessing, labels: LabelSet) -> str:
    """Hash of everything that the cached file depends on: files, modalities, preprocessing, labels."""
    files = [*case.files.items(), ("label", case.label)]
    stats = [(n, str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for n, p in files if p]
    facts = (
        _VERSION, case.modalities, stats, preprocessing.spacing, preprocessing.percentiles,
        list(labels.values.items()),  # the order gives the class indices
    )  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
