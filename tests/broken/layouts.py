"""Data sets of other layouts that cannot be used: broken manifests, ``dataset.json`` and folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import layouts
import niftis
import numpy as np
from commands import settings

from broken import Broken

Change = Callable[[Path], object]
COLUMNS = "case,flair,t1ce,label,site,patient\n"
ROW = "p0,files/0/flair.nii.gz,files/0/t1ce.nii.gz,files/0/seg.nii.gz,A,x\n"
REST = layouts.csv_text(layouts.rows()[1:]).partition("\n")[2]
UNREADABLE = "cannot be read as "


def training(root: Path, folder: Path, *options: str) -> Sequence[object]:
    names = 'data.modalities=["flair", "t1ce"]'
    return ["train", root, "--out", folder / "out", *settings("training.steps=2", names, *options)]


def changed(write: Callable[[Path], Path], change: Change, *options: str) -> Any:
    """Train on a data set after a change of its folder."""

    def command(folder: Path) -> Sequence[object]:
        root = write(folder / "data")
        change(folder / "data")
        return training(root, folder, *options)

    return command


def listed(name: str, content: str | bytes) -> Any:
    """Train on a manifest of this content."""

    def command(folder: Path) -> Sequence[object]:
        path = layouts.manifest_files(folder / "data") / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return training(path, folder)

    return command


def tabled(write: Callable[..., Path], **entries: Any) -> Any:
    """Train on a data set with these entries of ``dataset.json``; None removes one."""

    def command(folder: Path) -> Sequence[object]:
        return training(write(folder / "data", **entries), folder)

    return command


def replaced(name: str, content: bytes) -> Change:
    return lambda root: (root / name).write_bytes(content)


def _json(change: Callable[[list[dict[str, Any]]], object]) -> str:
    """The rows of a manifest after a change."""
    rows: list[dict[str, Any]] = list(layouts.rows())
    change(rows)
    return json.dumps(rows)


GARBAGE = {
    "nothing": b"", "zeros": bytes(3000), "noise": bytes(range(256)) * 8, "an archive": b"PK\x03\x04\xff",
    "latin-1": '{"case": "Jos\u00e9"}'.encode("latin-1"), "half": b'[{"case": "p0", "flair"',
    "brackets": b"[" * 100_000, "digits": b'[{"case": ' + b"9" * 5000 + b"}]",
}  # fmt: skip

CSV: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "list.csv: has no columns, expected a line for each case"),
    "only columns": (COLUMNS, "list.csv: has no line below the columns"),
    "no columns": (ROW + REST, "expected one called case"),
    "no column of cases": (COLUMNS.replace("case", "name") + ROW, "expected one called case"),
    "semicolons": (COLUMNS.replace(",", ";") + ROW.replace(",", ";"), "separate columns by commas"),
    "no modality": (
        "case,adc,label\np0,files/0/flair.nii.gz,\n",
        "expected one for each of flair, t1ce; name the modalities so, or give patterns "
        "(set data.modalities or data.files)",
    ),
    "a modality that no case has": (
        COLUMNS.replace("t1ce", "contrast") + ROW + REST,
        "none of 3 cases has 't1ce'",
    ),
    "a column twice": (COLUMNS.replace("t1ce", "flair") + ROW, "has the column flair twice"),
    "two columns of one modality": (
        COLUMNS.replace("t1ce", "t2f") + ROW, "the columns flair, t2f all mean flair"
    ),
    "a case twice": (COLUMNS + ROW + ROW + REST, "case p0: 2 lines of this name in "),
    "no name": (COLUMNS + ROW.replace("p0", "", 1) + REST, "line 2: has no name of a case"),
    "a name with a slash": (COLUMNS + ROW.replace("p0", "a/b", 1) + REST, "case a/b: its name in "),
    "a name that is a folder": (COLUMNS + ROW.replace("p0", "..", 1) + REST, "case ..: its name in "),
    "a name that is too long": (
        COLUMNS + ROW.replace("p0", "p" * 300, 1) + REST, "the name has 300 bytes, expected at most 200"
    ),
    "no such file": (
        COLUMNS + ROW.replace("flair", "lost", 1) + REST,
        "line 2 (case p0): flair is files/0/lost.nii.gz, but there is no such file",
    ),
    "no such label": (
        COLUMNS + ROW.replace("seg", "lost", 1) + REST, "label is files/0/lost.nii.gz, but there is no"
    ),
    "a folder for a file": (
        COLUMNS + ROW.replace("files/0/flair.nii.gz", "files/0") + REST, "case p0: 0 is a folder"
    ),
    "another kind of file": (
        COLUMNS + ROW.replace("files/0/flair.nii.gz", "list.csv") + REST, "case p0: list.csv "
    ),
    "a path that is too long": (
        COLUMNS + ROW.replace("files/0/flair", "x" * 300) + REST, "but there is no such file"
    ),
    "a home that is unknown": (
        COLUMNS + ROW.replace("files/0/flair", "~nobody-here/x") + REST, "but there is no such file"
    ),
    "one file for two modalities": (
        COLUMNS + ROW.replace("t1ce", "flair") + REST, "lists flair.nii.gz 2 times"
    ),
    "the label as a modality": (
        COLUMNS + ROW.replace("t1ce", "seg") + REST, "lists seg.nii.gz 2 times"
    ),
    "a case without modalities": (
        COLUMNS + "p0,,,files/0/seg.nii.gz,A,x\n" + REST, "line 2 (case p0): no modality"
    ),
    "a cell more": (COLUMNS + ROW.strip() + ",1\n" + REST, "has 7 cells for 6 columns"),
    "an open quote": (COLUMNS + '"p0,1\n' + REST, UNREADABLE),
    "UTF-16": ((COLUMNS + ROW).encode("utf-16"), UNREADABLE),
    "noise": (GARBAGE["noise"], UNREADABLE),
}  # fmt: skip

JSON: dict[str, tuple[str | bytes, str]] = {
    **{name: (content, UNREADABLE) for name, content in GARBAGE.items()},
    "no list": ('{"p0": "flair.nii.gz"}', "has no list of cases"),
    "a number": ("3", "has no list of cases"),
    "an empty list": ("[]", "has no list of cases"),
    "a list of names": ('["p0", "p1"]', "entry 1: is no object"),
    "a list for a file": (
        _json(lambda rows: rows[0].update(flair=["a.nii.gz"])), "entry 1: flair is \"['a.nii.gz']\""
    ),
    "true for a file": (_json(lambda rows: rows[0].update(flair=True)), "entry 1: flair is 'True'"),
    "a number for a case": (_json(lambda rows: rows[0].update(case=1.5)), "entry 1: case is '1.5'"),
    "a control character": (
        _json(lambda rows: rows[0].update(case="p\n0")), "entry 1: case is 'p\\n0'"
    ),
    "a key twice": ('[{"case": "p0", "case": "p1"}]', "the key 'case' occurs twice"),
    "a case twice": (_json(lambda rows: rows.append(rows[0])), "case p0: 2 lines of this name"),
    "no case": (_json(lambda rows: rows[0].pop("case")), "entry 1: has no name of a case"),
    "no such file": (
        _json(lambda rows: rows[0].update(flair="lost.nii")), "entry 1 (case p0): flair is lost.nii"
    ),
}  # fmt: skip

#: Tables of channels, and what is said of them.
CHANNELS: dict[str, tuple[Any, str]] = {
    "empty": ({}, " is {}, expected the name of each channel by its number"),
    "of numbers": ({"0": 1}, "expected the name of each channel by its number"),
    "with a gap": ({"0": "FLAIR", "2": "T1ce"}, "from 0 without a gap"),
    "from 1": ({"1": "FLAIR", "2": "T1ce"}, "from 0 without a gap"),
    "by name": ({"FLAIR": 0, "T1ce": 1}, "expected the name of each channel by its number"),
    "as text": ("FLAIR", "expected the name of each channel by its number"),
    "with an empty name": ({"0": "FLAIR", "1": " "}, "expected the name of each channel by its number"),
    "with a name twice": ({"0": "FLAIR", "1": "FLAIR"}, "has the name 'FLAIR' twice"),
    "with two of one modality": (
        {"0": "FLAIR", "1": "T2f"}, "the channels 'FLAIR' and 'T2f' both mean flair"
    ),
    "of other modalities": ({"0": "CT", "1": "PET"}, "has the channels CT, PET, expected some of flair"),
    "with another": ({"0": "FLAIR", "1": "T1"}, "none of 3 cases has 't1ce'"),
    "absent": (None, "has no channel_names (nnU-Net) and no modality (Decathlon)"),
}  # fmt: skip

ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "no training cases": ({"training": []}, "training is [], expected a list of images and labels"),
    "training that is absent": ({"training": None}, "training is null, expected a list"),
    "training of names": ({"training": ["imagesTr/BRATS_000.nii.gz"]}, "training, entry 1: is "),
    "an image without a label": (
        {"training": [{"image": "imagesTr/BRATS_000.nii.gz"}]}, "training, entry 1: is "
    ),
    "a number for an image": ({"training": [{"image": 1, "label": 2}]}, "training, entry 1: is "),
    "a test image that is a number": ({"test": [1]}, "test, entry 1: is 1"),
    "tests as text": ({"test": "imagesTs"}, 'test is "imagesTs", expected a list'),
    "an image that is not there": (
        {"training": [{"image": "imagesTr/x.nii.gz", "label": "labelsTr/BRATS_000.nii.gz"}]},
        "case x: ",
    ),
    "a label that is not there": (
        {"training": [{"image": "imagesTr/BRATS_000.nii.gz", "label": "labelsTr/x.nii.gz"}]},
        "lists labelsTr/x.nii.gz, but there is no such file",
    ),
    "an image twice": (
        {"training": [{"image": "imagesTr/BRATS_000.nii.gz", "label": "labelsTr/BRATS_000.nii.gz"}] * 2},
        "case BRATS_000: 2 entries of this name",
    ),
    "three channels": (
        {"modality": {"0": "FLAIR", "1": "T2", "2": "T1gd"}},
        "BRATS_000.nii.gz has 2 channels, expected t1ce in channel 2",
    ),
    "one channel": ({"modality": {"0": "FLAIR"}}, "has shape (20, 24, 16, 2), expected 3-D"),
}  # fmt: skip


def _flat_image(root: Path) -> None:
    """A 3-D image where the table promises two channels."""
    niftis.save(layouts.image(0, 0), root / "imagesTr" / "BRATS_000.nii.gz", layouts.AFFINE)


def _another_kind(root: Path) -> None:
    (root / "imagesTr" / "scan.nii.gz").write_bytes(b"")


def _other_grid(root: Path) -> None:
    small = np.zeros((4, 4, 4), np.float32)
    niftis.save(small, root / "imagesTr" / "p0_0001.nii.gz", layouts.AFFINE)


def _twice(place: str, name: str) -> Change:
    return lambda root: niftis.save(layouts.image(0, 0), root / place / name, layouts.AFFINE)


FOLDERS: dict[str, tuple[Callable[[Path], Path], Change, str]] = {
    "Decathlon, an image of three axes": (
        layouts.decathlon, _flat_image, "BRATS_000.nii.gz has 1 channels, expected t1ce in channel 1"
    ),
    "nnU-Net, a channel that is not in the table": (
        layouts.nnunet, _twice("imagesTr", "p0_0007.nii.gz"), "a channel from 0000 to 0001"
    ),
    "nnU-Net, an image without a channel": (
        layouts.nnunet, _another_kind, "scan.nii.gz: expected a name that ends in _ and a channel"
    ),
    "nnU-Net, a label of no case": (
        layouts.nnunet, _twice("labelsTr", "p9.nii.gz"), "p9.nii.gz: is the label of no case"
    ),
    "nnU-Net, a channel twice": (
        layouts.nnunet, _twice("imagesTr", "p0_0000.nii"), "case p0: 2 files for 'flair'"
    ),
    "nnU-Net, another grid": (layouts.nnunet, _other_grid, "case p0: p0_0001.nii.gz has shape (4, 4, 4)"),
    "nnU-Net, no labels": (
        layouts.nnunet, lambda root: shutil.rmtree(root / "labelsTr"), "data.label: only 0 of 3 cases have"
    ),
    "nnU-Net, no dataset.json": (
        layouts.nnunet, lambda root: (root / "dataset.json").unlink(), "dataset.json: cannot be read"
    ),
    "BIDS, two runs": (
        layouts.bids,
        _twice("sub-01/ses-1/anat", "sub-01_ses-1_run-2_FLAIR.nii.gz"),
        "case sub-01_ses-1: 2 files for 'flair' (",
    ),
    "BIDS, labels of two raters": (
        layouts.bids,
        _twice("derivatives/other/sub-01/ses-1", "sub-01_ses-1_dseg.nii.gz"),
        "case sub-01_ses-1: 2 files for 'seg' (",
    ),
    "BIDS, participants that are no text": (
        layouts.bids, replaced("participants.tsv", bytes(range(256))), "participants.tsv: cannot be read"
    ),
    "BIDS, no labels": (
        layouts.bids, lambda root: shutil.rmtree(root / "derivatives"), "data.label: only 0 of 3 cases have"
    ),
}  # fmt: skip

#: Layouts that are asked for, where another one is.
WRONG = {
    "bids": "has no folder sub-*, expected BIDS",
    "decathlon": "dataset.json: cannot be read as dataset.json",
    "nnunet": "dataset.json: cannot be read as dataset.json",
    "manifest": "manifest.csv: cannot be read as a manifest",
}

BROKEN = [
    *(Broken(f"manifest in CSV: {n}", listed("list.csv", c), (s,)) for n, (c, s) in CSV.items()),
    *(Broken(f"manifest in JSON: {n}", listed("list.json", c), (s,)) for n, (c, s) in JSON.items()),
    *(
        Broken(f"Decathlon: dataset.json of {n}", changed(layouts.decathlon, replaced("dataset.json", c)),
               (f"dataset.json: {UNREADABLE}",))
        for n, c in GARBAGE.items() if n != "digits"
    ),
    *(
        Broken(f"nnU-Net: dataset.json of {n}", changed(layouts.nnunet, replaced("dataset.json", c)),
               (f"dataset.json: {UNREADABLE}",))
        for n, c in GARBAGE.items() if n != "digits"
    ),
    *(
        Broken(f"Decathlon: channels {n}", tabled(layouts.decathlon, modality=table), (said,))
        for n, (table, said) in CHANNELS.items()
    ),
    *(
        Broken(f"nnU-Net: channels {n}", tabled(layouts.nnunet, channel_names=table), (said,))
        for n, (table, said) in CHANNELS.items()
    ),
    *(
        Broken(f"Decathlon: {n}", tabled(layouts.decathlon, **entries), (said,))
        for n, (entries, said) in ENTRIES.items()
    ),
    *(
        Broken(f"nnU-Net: files that end in {ending}", tabled(layouts.nnunet, file_ending=ending),
               (f"file_ending is {ending!r}, expected .nii.gz or .nii",))
        for ending in (".png", ".mha", ".tif", "", 3, ["x"])
    ),
    Broken("Decathlon: a list", changed(layouts.decathlon, replaced("dataset.json", b"[]")),
           ("dataset.json: has a list, expected an object",)),
    *(Broken(n, changed(write, change), (said,)) for n, (write, change, said) in FOLDERS.items()),
    *(
        Broken(f"a folder per case, asked for as {name}",
               changed(layouts.LAYOUTS["BraTS 2018-2021"].write, lambda root: None, f"data.layout={name}"),
               (said,))
        for name, said in WRONG.items()
    ),
    Broken("a manifest that is not there", lambda folder: training(folder / "no.csv", folder),
           ("no.csv: cannot be read as a manifest (No such file",)),
]  # fmt: skip
