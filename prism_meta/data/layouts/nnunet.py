"""nnU-Net's raw data: a file per modality, numbered, in one folder for all cases."""

from __future__ import annotations

import re
from pathlib import Path

from prism_meta.data.layouts.base import Found, Layout, build_case, is_folder
from prism_meta.data.layouts.dataset_json import CONTENTS, DatasetJson, read_contents
from prism_meta.data.layouts.names import FileNames
from prism_meta.data.layouts.search import SUFFIXES
from prism_meta.errors import CaseError, Fault

_IMAGE = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})\.nii(\.gz)?", re.IGNORECASE)
#: Folder of images -> folder of their labels.
_LABELS = {"imagesTr": "labelsTr", "imagesTs": "labelsTs"}


class NnUNet(Layout):
    """``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz`` and ``dataset.json``.

    The table ``channel_names`` of ``dataset.json`` (``modality`` in version 1) names the channels. A file
    that is absent is a missing modality. Training and evaluation use ``imagesTr``, predictions also
    ``imagesTs``; either folder may be given instead of the whole data set.

    Source: Isensee et al., Nature Methods 18:203 (2021).
    """

    name = "nnunet"
    title = "nnU-Net raw data"

    def matches(self, root: Path, names: FileNames) -> bool:
        return any(
            _IMAGE.fullmatch(file)
            for folder in _folders(root)
            if folder.name in _LABELS or (folder / CONTENTS).exists()
            for file in _niftis(folder)
        )

    def find(self, root: Path, names: FileNames) -> Found:
        found = Found(self.title)
        folders = _folders(root)
        if names.label is not None and len(folders) > 1:
            folders = folders[:1]
            found.only_predicted = True
        if not folders:
            message = f"{root}: no such folder, expected nnU-Net's raw data; give its folder"
            found.faults.append(Fault(message, "layout"))
            return found
        path = folders[0].parent / CONTENTS
        if not path.exists() and (folders[0] / CONTENTS).exists():
            path = folders[0] / CONTENTS
        try:
            contents = read_contents(path, lists_training=False)
        except CaseError as error:
            found.faults.extend(error.faults)
            return found
        channels = contents.assign(names, found)
        for folder in folders if channels else ():
            _find_in(folder, contents, channels, names, found)
        found.cases.sort(key=lambda case: case.id)
        if not found.cases and not found.faults:
            found.faults.append(
                f"{root}: no case found; expected files like imagesTr/CASE_0000.nii.gz"
            )
        return found


def _find_in(
    folder: Path, contents: DatasetJson, channels: dict[str, int], names: FileNames, found: Found
) -> None:
    """Add the cases in one folder of images."""
    by_case: dict[str, dict[int, list[Path]]] = {}
    for file in _niftis(folder):
        match = _IMAGE.fullmatch(file)
        if match is None or int(match["channel"]) >= len(contents.channels):
            expected = f"a channel from 0000 to {len(contents.channels) - 1:04d}"
            found.faults.append(
                f"{folder / file}: expected a name that ends in _ and {expected}, as {contents.path} "
                "has them; rename or remove the file"
            )
            continue
        files = by_case.setdefault(match["case"], {})
        files.setdefault(int(match["channel"]), []).append(folder / file)
    labels = folder.with_name(_LABELS.get(folder.name, "labelsTr"))
    for name, files in sorted(by_case.items()):
        owned = {m: files[index] for m, index in channels.items() if index in files}
        if names.label is not None:
            there = [labels / f"{name}{suffix}" for suffix in SUFFIXES]
            owned[names.label] = [path for path in there if path.exists()]
        case, faults = build_case(name, names, owned)
        if not case.files:
            expected = " or ".join(f"{name}_{index:04d}.nii.gz" for index in channels.values())
            shown = ", ".join(path.name for listed in files.values() for path in listed)
            faults.append(
                f"case {name}: no modality; expected {expected}, found {shown}; add a file or remove "
                "these"
            )
        found.add(case, faults)
    if names.label is not None and is_folder(labels):
        found.faults.extend(
            f"{labels / file}: is the label of no case, expected images like {folder.name}/"
            f"{_stem(file)}_0000.nii.gz; add them or remove the label"
            for file in _niftis(labels)
            if _stem(file) not in by_case
        )


def _folders(root: Path) -> list[Path]:
    """The folders of images, that for training first."""
    if not is_folder(root):
        return []
    inner = [root / name for name in _LABELS if is_folder(root / name)]
    return inner or [root]


def _niftis(folder: Path) -> list[str]:
    """Names of the NIfTI files in a folder; none if it cannot be read."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
    return [n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]


def _stem(file: str) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", file, flags=re.IGNORECASE)
