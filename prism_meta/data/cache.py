"""The cache: cases are preprocessed once, stored on disk, and read patch by patch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prism_meta.data.cases import Case
from prism_meta.data.checks import no_brain, no_label
from prism_meta.data.labels import LabelSet
from prism_meta.data.preprocessing import Prepared, Preprocessing
from prism_meta.errors import CaseError, OutputError, one_line, raise_faults
from prism_meta.files import atomic

#: Candidate centres of patches stored per class. More would only make the cache larger.
_CENTRES_PER_CLASS = 10_000
#: Increase it when preprocessing changes, so that old caches are not used.
_VERSION = 6
#: Cached files that one process keeps mapped into memory.
_OPEN_CASES = 1024
#: Entry of a cached file's metadata.
_CHECKSUM = "sha256"
#: Bytes of a case's name in the name of its cached file. File systems take 255 in all.
_LONGEST_NAME = 100
#: Marks the folder as a cache for backup programs, and for the search for cases.
_TAG = "CACHEDIR.TAG"
_TAG_CONTENT = """Signature: 8a477f597d28d172789f06886806bc55
# Prepared cases of prism-meta, which can be made again. See https://bford.info/cachedir/
"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case on disk. Only the requested patches are read.

    Args:
        id: name of the case.
        availability: bool (M,), which modalities exist.
        shape: (D, H, W) on the model's grid.
        path: the safetensors file.
        meta_availability: bool (M,), which modalities exist when the case is in a meta batch. Defaults to
            ``availability``.
        site: the hospital or scanner that the case comes from. Defaults to None, unknown.
        patient: whose case it is. Defaults to the id.
    """

    id: str
    availability: Tensor
    shape: tuple[int, int, int]
    path: Path
    meta_availability: Tensor = None  # type: ignore[assignment]
    site: str | None = None
    patient: str = ""

    def __post_init__(self) -> None:
        if self.meta_availability is None:
            object.__setattr__(self, "meta_availability", self.availability)
        if not self.patient:
            object.__setattr__(self, "patient", self.id)

    def centres(self) -> list[Tensor]:
        """Flat voxel indices to centre patches on: in the brain, then in each foreground class.

        Raises:
            CaseError: see ``patch``.
        """
        stored = self._stored()
        return [stored[f"centres_{k}"] for k in range(int(stored.metadata["centres"]))]

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

        Raises:
            CaseError: the file was removed or damaged since ``prepare`` verified it.
        """
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        image = torch.zeros(len(shown), *size)
        stored = self._stored()
        for m, is_shown in enumerate(shown.tolist()):
            if is_shown:
                image[m] = stored.volume(f"image_{m}")[box]
        return image, stored.volume("target")[box].long().contiguous()

    def _stored(self) -> _Mapped:
        try:
            return _mapped(self.path)
        except (OSError, SafetensorError) as error:
            raise CaseError(
                f"case {self.id}: its prepared volume {one_line(str(self.path))} was removed or damaged "
                "since the training started; start again with --resume, which prepares it again"
            ) from error


class _Mapped:
    """A cached file that stays mapped into memory: only what is indexed is read.

    Opening it for each patch would take several times as long as reading the patch.
    """

    def __init__(self, path: Path) -> None:
        # No context: the file is closed at once, and the mapping ends with this object.
        self._stored = ExitStack().enter_context(safe_open(path, framework="pt"))
        self._tensors: dict[str, Tensor] = {}

    @property
    def metadata(self) -> dict[str, str]:
        found: dict[str, str] = self._stored.metadata()
        return found

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = self._stored.get_tensor(name)
        return self._tensors[name]

    def volume(self, name: str) -> Tensor:
        """A tensor that ``_by_slice`` arranged, with its axes in order."""
        return self[name].movedim(0, -1)


def _mapped(path: Path) -> _Mapped:
    found = os.stat(path)  # noqa: PTH116, Path.stat takes twice the time, for each patch
    return _open(path, (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=_OPEN_CASES)
def _open(path: Path, version: tuple[int, ...]) -> _Mapped:
    """The file, as long as no other one has its name."""
    return _Mapped(path)


def prepare(
    cases: Sequence[Case],
    cache: Path | str,
    *,
    preprocessing: Preprocessing,
    labels: LabelSet,
    on_case: Callable[[str], None] | None = None,
) -> list[CachedCase]:
    """Preprocess cases and cache them on disk. Cases that are in the cache are not computed again.

    A cached file is verified once, here, by its checksum. A damaged one is logged and made again.

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
        raise CaseError(no_label(case))
    path = cache / f"{_short(case.id)}-{_fingerprint(case, preprocessing, labels)}.safetensors"
    shape = _verified_shape(path)
    if shape is None:
        ready = preprocessing(case.read(), labels)
        shape = _store(path, case, ready, num_classes=len(labels.names))
    return CachedCase(case.id, case.availability, shape, path, site=case.site, patient=case.patient)


def _store(path: Path, case: Case, ready: Prepared, *, num_classes: int) -> tuple[int, int, int]:
    if ready.target is None:
        raise CaseError(f"case {case.id}: no label was read; give a case with a label file")
    if not ready.brain.any():
        raise CaseError(no_brain(case))
    # One tensor per modality, so that hidden ones are not read. Half precision halves the reading time.
    tensors = {
        f"image_{case.modalities.index(name)}": _by_slice(image.half())
        for name, image in zip(ready.names, ready.image, strict=True)
    }
    tensors["target"] = _by_slice(ready.target)
    inside = [ready.brain, *(ready.target == k for k in range(1, num_classes))]
    for k, voxels in enumerate(inside):
        flat = voxels.flatten().nonzero().flatten()
        every = max(1, len(flat) // _CENTRES_PER_CLASS)
        tensors[f"centres_{k}"] = flat[::every].contiguous() if k else _sample_slices_evenly(voxels)
    metadata = {"case": case.id, "centres": str(len(inside))}
    content = save(tensors, metadata={**metadata, _CHECKSUM: _checksum(save(tensors, metadata))})
    if path.is_dir():
        raise OutputError(f"{path}: is a folder, expected a prepared case; remove the folder")
    with atomic(path) as partial:
        # Not save_file: its errors are no OSError, so ``atomic`` could not explain them.
        partial.write_bytes(content)
    _tag(path.parent)
    d, h, w = ready.target.shape
    return d, h, w


def _by_slice(volume: Tensor) -> Tensor:
    """The slices one after the other, so that a patch of one slice is not spread over the whole file."""
    return volume.movedim(-1, 0).contiguous()


def _tag(folder: Path) -> None:
    """Mark a folder as a cache, unless it holds files of others."""
    others = (path for path in folder.iterdir() if not path.name.startswith("."))
    if all(path.suffix == ".safetensors" for path in others):
        with atomic(folder / _TAG) as partial:
            partial.write_text(_TAG_CONTENT, encoding="utf-8")


def _verified_shape(path: Path) -> tuple[int, int, int] | None:
    """The shape of the case in a cached file; None if there is none or it is damaged."""
    if not os.path.lexists(path):
        return None
    try:
        content = path.read_bytes()
        with safe_open(path, framework="pt") as stored:
            if stored.metadata()[_CHECKSUM] != _checksum(content):
                raise ValueError("its checksum differs")
            w, d, h = stored.get_slice("target").get_shape()
    # KeyError and TypeError: another program's metadata, or none.
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = one_line(" ".join(str(error).split())[:120])
        _log.warning("%s is damaged (%s); the case is prepared again", one_line(str(path)), reason)
        return None
    return d, h, w


def _checksum(content: bytes) -> str:
    """Checksum of a safetensors file without its own entry in the header."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"].pop(_CHECKSUM, None)
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    found.update(memoryview(content)[start:])
    return found.hexdigest()


def _short(name: str) -> str:
    """The start of a case's name, short enough for the name of a file; the fingerprint tells cases apart."""
    return name.replace("/", "_").encode(errors="replace")[:_LONGEST_NAME].decode(errors="ignore")


def _sample_slices_evenly(brain: Tensor) -> Tensor:
    """Draw flat indices of brain voxels so that each slice gets about the same number.

    Uniform draws over voxels would rarely hit the small slices at the top and bottom of the brain.
    A model of slices then predicts false tumours there.
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
        _VERSION, case.id, case.modalities, stats, dict(case.channels), case.align,
        preprocessing.spacing, preprocessing.percentiles,
        list(labels.values.items()),  # the order gives the class indices
    )  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
