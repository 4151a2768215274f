"""Cases that cannot be read: each file of a case with each damage, and folders that are no cases."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from broken import Broken, damage, whole
from broken.damage import Damage

IMAGE, LABEL = "p1/p1_t1.nii.gz", "p1/p1_seg.nii.gz"
FILES = {"image": IMAGE, "label": LABEL}
Command = Callable[[Path], Sequence[object]]


def training(change: Damage, *options: str) -> Command:
    """Train on three cases after a change of their folder."""

    def command(folder: Path) -> Sequence[object]:
        root = whole.cases(folder)
        change(root)
        settings = [part for option in options for part in ("--set", option)]
        return whole.train(folder, root, *settings)

    return command


def predicting(change: Damage) -> Command:
    """Predict three cases after a change of their folder."""

    def command(folder: Path) -> Sequence[object]:
        root = whole.cases(folder)
        change(root)
        return ["predict", whole.trained(folder), root, folder / "labels"]

    return command


def evaluating(change: Damage) -> Command:
    """Evaluate on three cases after a change of their folder."""

    def command(folder: Path) -> Sequence[object]:
        root = whole.cases(folder)
        change(root)
        return ["evaluate", whole.trained(folder), root, "--out", folder / "report"]

    return command


def at(file: str, change: Damage) -> Damage:
    """Change one file of the root."""
    return lambda root: change(root / file)


def uncompressed(file: str, change: Callable[[bytes], bytes]) -> Damage:
    """Change the content of a file and store it uncompressed, as .nii."""

    def damaged(root: Path) -> None:
        damage.unpacked(change)(root / file)
        plain = gzip.decompress((root / file).read_bytes())
        (root / file).unlink()
        (root / file).with_suffix("").write_bytes(plain)

    return damaged


def of_files(kind: str, damages: Mapping[str, Damage], files: Mapping[str, str]) -> list[Broken]:
    return [
        Broken(
            f"{which}, {kind}{name}", training(at(file, change)), (f"case p1: {Path(file).name}",)
        )
        for which, file in files.items()
        for name, change in damages.items()
    ]


def of_headers(kind: str, fields: Mapping[str, Callable[[bytes], bytes]]) -> list[Broken]:
    """Headers of compressed and of uncompressed files."""
    packed = {name: damage.unpacked(change) for name, change in fields.items()}
    return [
        *of_files(kind, packed, FILES),
        *(
            Broken(
                f"uncompressed image, {kind}{name}",
                training(uncompressed(IMAGE, change)),
                ("case p1: p1_t1.nii ",),
            )
            for name, change in fields.items()
        ),
    ]


def blank(root: Path) -> None:
    for path in (root / "p1").glob("*_[ft]*.nii.gz"):
        damage.voxels(np.zeros_like)(path)


def without(*files: str) -> Damage:
    return lambda root: [(root / file).unlink() for file in files]


def _rename(target: bytes) -> Damage:
    return lambda root: (root / "p1").rename(root / os.fsdecode(target))


def _only_labels(root: Path) -> None:
    for path in (root / "p1").glob("*_[ft]*.nii.gz"):
        path.unlink()


FOLDERS = {
    "an empty folder": (lambda root: (root / "p3").mkdir(), "case p3: no modality"),
    "only a label": (_only_labels, "case p1: no modality; expected a file like *flair.nii.gz"),
    "no label": (without(LABEL), "case p1: no label file"),
    "two files for a modality": (
        damage.copy(IMAGE, "p1/other_t1.nii.gz"), "case p1: 2 files for 't1'"
    ),
    "two files by another name": (damage.copy(IMAGE, "p1/x-t1n.nii.gz"), "case p1: 2 files for 't1'"),
    "two labels": (damage.copy(LABEL, "p1/seg.nii.gz"), "case p1: 2 files for 'seg'"),
    "two folders of one name": (damage.copy("p1", "more/p1"), "case p1: 2 folders of this name"),
    "a name that is not UTF-8": (_rename(b"p\xff1"), r"case p\udcff1: the name of the folder"),
    "a name with a new line": (_rename(b"p\n1"), r"case p\n1: the name of the folder"),
    "a name with an escape": (_rename(b"p\x1b[2J1"), r"case p\x1b[2J1: the name of the folder"),
    "compressed, but its name does not say so": (
        lambda root: (root / IMAGE).rename(root / "p1/p1_t1.nii"),
        "case p1: p1_t1.nii is compressed, which its name does not say; rename it to p1_t1.nii.gz",
    ),
    "not compressed, but its name says so": (
        at(IMAGE, damage.content(gzip.decompress)), "case p1: p1_t1.nii.gz is not compressed"
    ),
    "a name of 240 bytes": (_rename(b"p" * 240), "the name has 240 bytes, expected at most 200"),
    "no voxels but 0": (blank, "case p1: all voxels are 0 in p1_flair.nii.gz"),
    "no cases": (lambda root: [shutil.rmtree(root / p) for p in ("p0", "p1", "p2")], "no case found"),
    "no folder": (shutil.rmtree, "no such folder"),
    **{
        f"an output with {mark}": (
            lambda root, mark=mark: (root / mark).write_text(""),
            f"has {mark}, so it is an output of prism-meta",
        )
        for mark in ("run.json", "records.csv", "unfinished.jsonl", "predictions.csv")
    },
}  # fmt: skip


def _huge(root: Path) -> None:
    """Voxels of 99 mm, whose model grid of 0.02 mm is beyond any memory."""
    rows = (*(99, 0, 0, 0), *(0, 99, 0, 0), *(0, 0, 99, 0))
    for path in (root / "p1").glob("*.nii.gz"):
        damage.unpacked(damage.field(280, "12f", *rows))(path)


def _missing_root(folder: Path) -> Sequence[object]:
    return whole.train(folder, folder / ("x" * 300))


#: One damage of each family, through the commands that use a trained run.
SOME: dict[str, Damage] = {
    **{f"flipped {n}": at(IMAGE, damage.FLIPS[n]) for n in ("bit 5 of 24", "bit 23 of 24")},
    "truncated": at(IMAGE, damage.CUTS["cut to 0.7"]),
    "empty": at(IMAGE, damage.GARBAGE["nothing"]),
    "longer": at(IMAGE, damage.GARBAGE["a longer volume"]),
    "pipe": at(IMAGE, damage.PLACES["a pipe"]),
    "complex": at(IMAGE, damage.TYPES["complex"]),
    "another shape": at(IMAGE, damage.SHAPES["another shape"]),
    "huge": at(IMAGE, damage.unpacked(damage.FIELDS["30000 voxels along each axis"])),
    "microns": at(IMAGE, damage.unpacked(damage.AFFINES["of 4 microns"])),
    "nan": at(IMAGE, damage.VALUES["nan"]),
    "two files": damage.copy(IMAGE, "p1/other_t1.nii.gz"),
}
LABELS: dict[str, Damage] = {
    "flipped label": at(LABEL, damage.FLIPS["bit 12 of 24"]),
    "label of another shape": at(LABEL, damage.SHAPES["another shape"]),
    "label in colour": at(LABEL, damage.TYPES["colour"]),
    "unknown label": at(LABEL, damage.VALUES["3"]),
    "no label": without(LABEL),
}
BROKEN = [
    *of_files("", damage.FLIPS, FILES),
    *of_files("", damage.CUTS, FILES),
    *of_files("", damage.GARBAGE, FILES),
    *of_files("", damage.PLACES, FILES),
    *of_files("", damage.TYPES, FILES),
    *of_files("", damage.SHAPES, FILES),
    *of_files("value ", damage.VALUES, {"label": LABEL}),
    *of_files("value ", {n: damage.VALUES[n] for n in ("nan", "-inf")}, {"image": IMAGE}),
    *of_headers("header with ", damage.FIELDS),
    *of_headers("affine ", damage.AFFINES),
    *(Broken(f"folders: {n}", training(change), (said,)) for n, (change, said) in FOLDERS.items()),
    Broken("folders: a name that is too long", _missing_root, ("no such folder",)),
    Broken(
        "a grid beyond the memory",
        training(_huge, "data.spacing=[0.02,0.02,0.02]"),
        ("case p1: measures 1980 x 2376 x 1584 mm and, at a spacing", "(set data.spacing)"),
    ),
    *(
        Broken(f"predict, {n}", predicting(change), ("case p1: ",), keeps=True)
        for n, change in SOME.items()
    ),
    *(
        Broken(f"evaluate, {n}", evaluating(change), ("case p1: ",), keeps=True)
        for n, change in {**SOME, **LABELS}.items()
    ),
]
