"""Data sets of every layout, written from the same three small cases of two modalities."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import niftis
import numpy as np
from niftis import FloatArray, affine_of, save

#: The modalities; the second is missing in the last case, if the layout can say so.
NAMES = ("flair", "t1ce")
AFFINE = affine_of((1, 1, 1))


def image(case: int, modality: int) -> FloatArray:
    """The voxels of a modality of a case."""
    return niftis.draw_image(index=modality, seed=case)


@dataclass(frozen=True)
class Written:
    """A layout, and what must be found in it.

    Args:
        name: value of ``data.layout``.
        title: what is said of it.
        write: writes the data set into a new folder, and returns what is given to the commands.
        ids: names of the cases.
        patients: whose they are. Defaults to the ids.
        sites: where they come from. Defaults to unknown.
        complete: whether no modality can be missing.
    """

    name: str
    title: str
    write: Callable[[Path], Path]
    ids: tuple[str, ...] = ("p0", "p1", "p2")
    patients: tuple[str, ...] = ()
    sites: tuple[str | None, ...] = (None,) * 3
    complete: bool = False


def _files(modalities: Sequence[str], label: str, pattern: str) -> Callable[[Path], Path]:
    """A file for each modality and label; ``pattern`` says where, with case k of patient p = 0, 0, 1."""

    def write(root: Path) -> Path:
        for k in range(3):
            for m, name in enumerate(modalities):
                if (k, m) != (2, 1):
                    save(image(k, m), root / pattern.format(k=k, p=k // 2, name=name), AFFINE)
            save(niftis.draw_label(), root / pattern.format(k=k, p=k // 2, name=label), AFFINE)
        return root

    return write


def _dicom(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """The same with folders in each case that are no cases."""

    def written(root: Path) -> Path:
        write(root)
        for folder in [path for path in root.iterdir() if path.is_dir()]:
            for inner in ("dicom", "derivatives/mni", "xfm"):
                (folder / inner).mkdir(parents=True)
            (folder / "dicom" / "IM0001").write_bytes(b"DICM")
            save(image(0, 0), folder / "derivatives" / "mni" / "flair.nii.gz", AFFINE)
        return root

    return written


def decathlon(root: Path, **more: Any) -> Path:
    """Two channels in each image, ``dataset.json``; ``more`` replaces its entries."""
    for k in range(3):
        both = np.stack([image(k, 0), image(k, 1)], -1)
        save(both, root / "imagesTr" / f"BRATS_{k:03d}.nii.gz", AFFINE)
        save(niftis.draw_label(), root / "labelsTr" / f"BRATS_{k:03d}.nii.gz", AFFINE)
    save(np.stack([image(3, 0), image(3, 1)], -1), root / "imagesTs" / "BRATS_900.nii.gz", AFFINE)
    content = {
        "name": "BRATS", "modality": {"0": "FLAIR", "1": "t1gd"}, "labels": {"0": "background"},
        "training": [
            {"image": f"./imagesTr/BRATS_{k:03d}.nii.gz", "label": f"./labelsTr/BRATS_{k:03d}.nii.gz"}
            for k in range(3)
        ],
        "test": ["./imagesTs/BRATS_900.nii.gz"],
    }  # fmt: skip
    return contents(root, {**content, **more})


def nnunet(root: Path, **more: Any) -> Path:
    """A file for each channel, ``dataset.json``; ``more`` replaces its entries."""
    for k in range(3):
        for m in range(2):
            if (k, m) != (2, 1):
                save(image(k, m), root / "imagesTr" / f"p{k}_{m:04d}.nii.gz", AFFINE)
        save(niftis.draw_label(), root / "labelsTr" / f"p{k}.nii.gz", AFFINE)
    content = {
        "channel_names": {"0": "FLAIR", "1": "T1ce"}, "labels": {"background": 0, "tumour": 1},
        "numTraining": 3, "file_ending": ".nii.gz",
    }  # fmt: skip
    return contents(root, {**content, **more})


def contents(root: Path, content: dict[str, Any]) -> Path:
    """Write ``dataset.json`` without the entries that are None."""
    kept = {key: value for key, value in content.items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(kept))
    return root


def bids(root: Path) -> Path:
    """Two subjects, the first with two sessions; labels in derivatives, and the sites of the subjects."""
    sessions = ("sub-01/ses-1", "sub-01/ses-2", "sub-02/ses-1")
    for k, place in enumerate(sessions):
        stem = place.replace("/", "_")
        save(image(k, 0), root / place / "anat" / f"{stem}_FLAIR.nii.gz", AFFINE)
        if k < 2:
            save(image(k, 1), root / place / "anat" / f"{stem}_ce-gadolinium_T1w.nii.gz", AFFINE)
        label = root / "derivatives" / "masks" / place / "anat" / f"{stem}_dseg.nii.gz"
        save(niftis.draw_label(), label, AFFINE)
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    (root / "participants.tsv").write_text("participant_id\tsite\nsub-01\tA\nsub-02\tB\n")
    return root


def rows() -> list[dict[str, str]]:
    """The rows of a manifest of ``plain`` files."""
    return [
        {
            "case": f"p{k}", "flair": f"files/{k}/flair.nii.gz",
            "t1ce": f"files/{k}/t1ce.nii.gz" if k < 2 else "", "label": f"files/{k}/seg.nii.gz",
            "site": "AAB"[k], "patient": ("x", "x", "y")[k],
        }
        for k in range(3)
    ]  # fmt: skip


def manifest_files(root: Path) -> Path:
    """The files that ``rows`` lists."""
    _files(NAMES, "seg", "files/{k}/{name}.nii.gz")(root)
    return root


def csv_text(listed: Sequence[dict[str, str]]) -> str:
    lines = [",".join(listed[0]), *(",".join(row.values()) for row in listed)]
    return "\n".join(lines) + "\n"


def _csv(root: Path) -> Path:
    path = manifest_files(root) / "list.csv"
    path.write_text(csv_text(rows()))
    return path


def _json(root: Path) -> Path:
    listed = [{key: value or None for key, value in row.items()} for row in rows()]
    (manifest_files(root) / "manifest.json").write_text(json.dumps({"cases": listed}))
    return root


FOLDERS = "a folder per case"
MANIFEST = {"patients": ("x", "x", "y"), "sites": ("A", "A", "B")}
LAYOUTS = {
    "BraTS 2018-2021": Written(
        "folders", FOLDERS, _files(NAMES, "seg", "HGG/p{k}/p{k}_{name}.nii.gz")
    ),
    "BraTS 2018, patients": Written(
        "folders",
        FOLDERS,
        _files(NAMES, "seg", "Brats18_TCIA0{k}_9_1/Brats18_TCIA0{k}_9_1_{name}.nii.gz"),
        ids=tuple(f"Brats18_TCIA0{k}_9_1" for k in range(3)),
        patients=tuple(f"Brats18_TCIA0{k}_9" for k in range(3)),
        sites=("TCIA00", "TCIA01", "TCIA02"),
    ),
    "BraTS 2023": Written(
        "folders",
        FOLDERS,
        _files(("t2f", "t1c"), "seg", "BraTS-GLI-{p}-00{k}/BraTS-GLI-{p}-00{k}-{name}.nii.gz"),
        ids=tuple(f"BraTS-GLI-{k // 2}-00{k}" for k in range(3)),
        patients=tuple(f"BraTS-GLI-{k // 2}" for k in range(3)),
    ),
    "folders with others inside": Written(
        "folders", FOLDERS, _dicom(_files(NAMES, "seg", "p{k}/{name}.nii.gz"))
    ),
    "WMH": Written(
        "folders", FOLDERS, _dicom(_files(("pre/FLAIR", "t1ce"), "wmh", "p{k}/{name}.nii.gz"))
    ),
    "ISLES 2015": Written(
        "folders",
        FOLDERS,
        _files(("XX.O.MR_Flair.7/VSD.XX.O.MR_Flair.7", "t1ce"), "seg", "p{k}/{name}.nii"),
    ),
    "one folder": Written(
        "flat", "one folder for all cases", _files(NAMES, "seg", "p{k}_{name}.nii.gz")
    ),
    "Decathlon": Written(
        "decathlon",
        "Medical Segmentation Decathlon",
        decathlon,
        ids=("BRATS_000", "BRATS_001", "BRATS_002"),
        complete=True,
    ),
    "nnU-Net": Written("nnunet", "nnU-Net raw data", nnunet),
    "BIDS": Written(
        "bids",
        "BIDS",
        bids,
        ids=("sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1"),
        patients=("sub-01", "sub-01", "sub-02"),
        sites=("A", "A", "B"),
    ),
    "BIDS without sessions": Written(
        "bids",
        "BIDS",
        _files(("FLAIR", "ce-gd_T1w"), "seg", "sub-0{k}/anat/sub-0{k}_{name}.nii.gz"),
        ids=("sub-00", "sub-01", "sub-02"),
    ),
    "CSV": Written("manifest", "manifest", _csv, **MANIFEST),
    "JSON": Written("manifest", "manifest", _json, **MANIFEST),
}  # type: ignore[arg-type]
