"""Cases that cannot be predicted or evaluated among others that can, and outputs that cannot be written."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from niftis import cut, save

from broken import Broken, whole

#: Changes the folder of case p1.
Damage = Callable[[Path], object]


def _image(folder: Path, name: str = "t1") -> Path:
    return folder / f"{folder.name}_{name}.nii.gz"


def _change(change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], name: str) -> Damage:
    """Writes other voxels into a file; its affine is kept."""

    def damage(folder: Path) -> None:
        image = nib.load(_image(folder, name))
        save(change(np.array(image.dataobj)), _image(folder, name), image.affine)

    return damage


def _voxel(value: float, name: str = "t1") -> Damage:
    """Sets one voxel."""

    def change(voxels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        voxels = voxels.astype(np.float32)
        voxels[8, 9, 7] = value
        return voxels

    return _change(change, name)


def _affine(change: Callable[[np.ndarray[Any, Any]], object], name: str = "t1") -> Damage:
    def damage(folder: Path) -> None:
        image = nib.load(_image(folder, name))
        affine = image.affine.copy()
        change(affine)
        save(np.array(image.dataobj), _image(folder, name), affine)

    return damage


def _bytes(content: bytes, name: str = "t1") -> Damage:
    return lambda folder: _image(folder, name).write_bytes(content)


def _header(offset: int, layout: str, *values: float, name: str = "t1") -> Damage:
    """Overwrites bytes of the header of a file, which becomes an uncompressed one."""

    def damage(folder: Path) -> None:
        path = _image(folder, name)
        nib.save(nib.load(path), plain := path.with_suffix(""))
        path.unlink()
        content = bytearray(plain.read_bytes())
        struct.pack_into(f"<{layout}", content, offset, *values)
        plain.write_bytes(content)

    return damage


def _flip(name: str) -> Damage:
    """Flips a bit of the compressed voxels; not every one changes them."""

    def damage(folder: Path) -> None:
        content = bytearray(_image(folder, name).read_bytes())
        content[len(content) // 3] ^= 16
        _image(folder, name).write_bytes(content)

    return damage


def _link(folder: Path) -> None:
    _image(folder).unlink()
    _image(folder).symlink_to(folder / "nowhere.nii.gz")


def _twice(folder: Path) -> None:
    shutil.copy(_image(folder), folder / "other_t1.nii.gz")


def _bare(folder: Path) -> None:
    for path in folder.iterdir():
        if "_seg" not in path.name:
            path.unlink()


def _axes(shape: Sequence[int]) -> Damage:
    return lambda folder: save(np.ones(shape, np.float32), _image(folder))


_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])

#: Damages to an image, which neither command can do without.
IMAGES: dict[str, Damage] = {
    "truncated": lambda folder: cut(_image(folder)),
    "with a flipped bit": _flip("t1"),
    "empty": _bytes(b""),
    "of text": _bytes(b"not an image"),
    "of zeros that are no NIfTI": _bytes(bytes(2000)),
    "with a NaN": _voxel(np.nan),
    "with an infinite voxel": _voxel(np.inf),
    "with a negative infinite voxel": _voxel(-np.inf),
    "of another shape": _change(lambda voxels: voxels[:-1], "t1"),
    "of another place": _affine(lambda affine: affine[:3, 3].__iadd__(5)),
    "of another voxel size": _affine(lambda affine: affine.__imul__(1.5)),
    "that is mirrored": _affine(lambda affine: affine[0].__imul__(-1)),
    "without volume": _header(280, "12f", *[0.0] * 12),
    "with an affine of NaN": _header(280, "12f", *[np.nan] * 12),
    "of four axes": _axes((20, 24, 16, 2)),
    "of two axes": _axes((20, 24)),
    "of colours": _change(lambda voxels: np.zeros(voxels.shape, _RGB), "t1"),
    "that promises 30000 cubed voxels": _header(40, "8h", 3, 30000, 30000, 30000, 1, 1, 1, 1),
    "of no voxels": _header(40, "8h", 3, 20, 0, 16, 1, 1, 1, 1),
    "of negative size": _header(40, "8h", 3, 20, -24, 16, 1, 1, 1, 1),
    "of an unknown type": _header(70, "2h", 12345, 16),
    "with voxels at infinity": _header(108, "f", np.inf),
    "that links to nothing": _link,
    "that exists twice": _twice,
    "that is missing, like all others": _bare,
}

#: Damages to a label, which only evaluation needs.
LABELS: dict[str, Damage] = {
    "truncated": lambda folder: cut(_image(folder, "seg")),
    "with a flipped bit": _flip("seg"),
    "missing": lambda folder: _image(folder, "seg").unlink(),
    "empty": _bytes(b"", "seg"),
    "of text": _bytes(b"not a label", "seg"),
    "with an unknown value": _voxel(3, "seg"),
    "with a value between two": _voxel(1.5, "seg"),
    "with a negative value": _voxel(-1, "seg"),
    "with a NaN": _voxel(np.nan, "seg"),
    "of another shape": _change(lambda voxels: voxels[:-1], "seg"),
    "of another place": _affine(lambda affine: affine[:3, 3].__iadd__(5), "seg"),
    "that exists twice": lambda folder: shutil.copy(_image(folder, "seg"), folder / "b_seg.nii.gz"),
}


def arguments(command: str, folder: Path) -> list[object]:
    """The arguments that predict or evaluate the cases below ``folder``."""
    if command == "predict":
        return ["predict", folder / "run", folder / "cases", folder / "labels"]
    return ["evaluate", folder / "run", folder / "cases", "--out", folder / "report"]


def damaged(command: str, damage: Damage, *names: str) -> Callable[[Path], Sequence[object]]:
    """Write three cases and a run, and damage the cases ``names``."""

    def write(folder: Path) -> Sequence[object]:
        root, _ = whole.cases(folder), whole.trained(folder)
        for name in names:
            damage(root / name)
        return arguments(command, folder)

    return write


def _named(command: str, name: bytes) -> Callable[[Path], Sequence[object]]:
    """Give case p1 another name."""

    def write(folder: Path) -> Sequence[object]:
        root, _ = whole.cases(folder), whole.trained(folder)
        (root / "p1").rename(root / os.fsdecode(name))
        return arguments(command, folder)

    return write


def _occupied(
    command: str, occupy: Callable[[Path], object], *, out: str = ""
) -> Callable[[Path], Sequence[object]]:
    """Put something into the place of an output; ``out`` is another OUT."""

    def write(folder: Path) -> Sequence[object]:
        whole.cases(folder), whole.trained(folder)
        occupy(folder)
        given = arguments(command, folder)
        return [*given[:-1], folder / out] if out else given

    return write


def _file(name: str, content: str = "kept") -> Callable[[Path], object]:
    def occupy(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return occupy


def _folder(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).mkdir(parents=True)


def _absent(folder: Path) -> Sequence[object]:
    """A case lacks the modality that is asked for."""
    root, _ = whole.cases(folder), whole.trained(folder)
    _image(root / "p1").unlink()
    return [*arguments("predict", folder), "--subset", "t1+t2"]


_COMMANDS = ("predict", "evaluate")
_HEADER = "case,file,subset,WT_ml,TC_ml,ET_ml\n"

BROKEN = [
    *(
        Broken(f"{command}: an image {what}", damaged(command, damage, "p1"), ("case p1:",), keeps=True)
        for i, (what, damage) in enumerate(IMAGES.items())
        # Evaluation takes ten times as long, and finds the same faults in the same place.
        for command in (_COMMANDS if i % 4 == 0 else _COMMANDS[:1])
    ),
    *(
        Broken(f"evaluate: a label {what}", damaged("evaluate", damage, "p1"), ("case p1:",), keeps=True)
        for what, damage in LABELS.items()
    ),
    *(
        Broken(
            f"{command}: all images with a NaN",
            damaged(command, IMAGES["with a NaN"], "p0", "p1", "p2"),
            ("case p0: p0_t1.nii.gz", "case p1: p1_t1.nii.gz", "case p2: p2_t1.nii.gz"),
        )
        for command in _COMMANDS
    ),
    Broken(
        "evaluate: no labels",
        damaged("evaluate", LABELS["missing"], "p0", "p1", "p2"),
        ("case p0: no label file", "case p1: no label file", "case p2: no label file"),
    ),
    *(
        Broken(f"{command}: a name that is not UTF-8", _named(command, b"p\xff"), ("case ",), keeps=True)
        for command in _COMMANDS
    ),
    Broken("predict: a name of 252 bytes", _named("predict", b"p" * 252), ("case ppp",), keeps=True),
    Broken("predict: a case without t1", _absent, ("case p1: has no t1",), keeps=True),
    *(
        Broken(
            f"{command}: the output is a file",
            _occupied(command, _file(out)),
            (f"{out}: file exists",),
        )
        for command, out in (("predict", "labels"), ("evaluate", "report"))
    ),
    *(
        Broken(
            f"{command}: the output is below a file",
            _occupied(command, _file("file"), out="file/out"),
            ("file/out: not a directory",),
        )
        for command in _COMMANDS
    ),
    *(
        Broken(
            f"{command}: the name of the output is too long",
            _occupied(command, lambda folder: None, out="o" * 300),
            ("file name too long",),
        )
        for command in _COMMANDS
    ),
    *(
        Broken(
            f"{command}: the output is {what}",
            _occupied(command, lambda folder: None, out=out),
            (f"{out}: holds the cases, or some of them",),
        )
        for what, out in (("the folder of the cases", "cases"), ("a case", "cases/p1"))
        for command in _COMMANDS
    ),
    *(
        Broken(
            f"{command}: the output is a link to itself",
            _occupied(command, lambda folder: (folder / "out").symlink_to(folder / "out"), out="out"),
            ("/out",),
        )
        for command in _COMMANDS
    ),
    Broken(
        "predict: the output is a link to the folder of the cases",
        _occupied("predict", lambda folder: (folder / "labels").symlink_to(folder / "cases")),
        ("labels: holds the cases",),
    ),
    *(
        Broken(f"predict: the table is {what}", _occupied("predict", occupy), ("predictions.csv",))
        for what, occupy in {
            "a folder": _folder("labels/predictions.csv"),
            "empty": _file("labels/predictions.csv", ""),
            "of other columns": _file("labels/predictions.csv", "case,dice\np0,1\n"),
            "cut off": _file("labels/predictions.csv", f"{_HEADER}p0,p0.nii.gz"),
        }.items()
    ),
    Broken(
        "predict: a file of the user's has the name of a label volume",
        _occupied("predict", _file("labels/p1.nii.gz")),
        ("case p1:", "p1.nii.gz exists"),
        keeps=True,
    ),
    Broken(
        "predict: a folder has the name of a label volume",
        _occupied("predict", _folder("labels/p1.nii.gz")),
        ("case p1:", "p1.nii.gz: is a directory"),
        keeps=True,
    ),
    *(
        Broken(f"evaluate: {name} is a folder", _occupied("evaluate", _folder(f"report/{name}")), (name,))
        for name in ("records.csv", "summary.json", "report.html")
    ),
]  # fmt: skip
