"""Label volumes and their table: what one damaged case, an old table or a full disk do to them."""

from __future__ import annotations

import csv
import errno
import gzip
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from broken import whole
from broken.predictions import IMAGES, LABELS, arguments
from commands import errors, run
from niftis import write_case
from safetensors.torch import load_file, save_file

from prism_meta.evaluation.predictor import Predictor


def rows(folder: Path) -> dict[str, list[str]]:
    """The rows of a table of predictions, by case."""
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["case", "file", "subset", "WT_ml", "TC_ml", "ET_ml"]
    return {line[0]: line[1:] for line in lines}


def labels(folder: Path) -> dict[str, bytes]:
    """The label volumes of a folder, header and voxels; nothing else may be in it but the table."""
    assert (folder / "predictions.csv").is_file()
    paths = [path for path in folder.iterdir() if path.name != "predictions.csv"]
    return {path.name: gzip.decompress(path.read_bytes()) for path in paths}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The label volumes and rows of p0 and p2, without p1."""
    folder = tmp_path_factory.mktemp("expected")
    root, _ = whole.cases(folder), whole.trained(folder)
    (root / "p1").rename(folder / "p1")
    assert run(*arguments("predict", folder))[0] == 0
    return labels(folder / "labels"), rows(folder / "labels")


@pytest.mark.parametrize("what", IMAGES)
def test_others_are_predicted_as_if_the_damaged_case_were_not_there(
    tmp_path: Path, expected: tuple[dict[str, bytes], dict[str, Any]], what: str
) -> None:
    root, _ = whole.cases(tmp_path), whole.trained(tmp_path)
    IMAGES[what](root / "p1")
    code, output = run(*arguments("predict", tmp_path))
    assert code == 2 and all(fault.startswith("case p1: ") for fault in errors(output))
    assert (labels(tmp_path / "labels"), rows(tmp_path / "labels")) == expected


@pytest.mark.parametrize("what", LABELS)
def test_a_damaged_label_does_not_stop_a_prediction(tmp_path: Path, what: str) -> None:
    root, _ = whole.cases(tmp_path), whole.trained(tmp_path)
    LABELS[what](root / "p1")
    code, output = run(*arguments("predict", tmp_path))
    assert (code, errors(output)) == (0, [])
    assert sorted(labels(tmp_path / "labels")) == ["p0.nii.gz", "p1.nii.gz", "p2.nii.gz"]


def test_the_table_has_the_volumes_of_the_regions(tmp_path: Path) -> None:
    whole.trained(tmp_path)
    write_case(tmp_path / "cases" / "n", spacing=(1, 1, 2), codes="LPS", missing=("t1",))
    assert run(*arguments("predict", tmp_path))[0] == 0
    voxels = np.asarray(nib.load(tmp_path / "labels" / "n.nii.gz").dataobj)
    counts = [np.isin(voxels, values).sum() for values in ([1, 2, 4], [1, 4], [4])]
    assert counts[0] > 0
    volumes = [f"{2 * count / 1000:.3f}" for count in counts]
    assert rows(tmp_path / "labels") == {"n": ["n.nii.gz", "flair+t1ce+t2", *volumes]}


def test_labels_below_the_cases_are_no_cases(tmp_path: Path) -> None:
    root, trained = whole.cases(tmp_path), whole.trained(tmp_path)
    for _ in range(2):  # the second time there are labels and a table
        code, output = run("predict", trained, root, root / "labels")
        assert code == 0 and "3 label volumes" in output
    assert sorted(rows(root / "labels")) == ["p0", "p1", "p2"]


def test_rows_of_other_cases_are_kept_and_those_of_the_same_case_replaced(tmp_path: Path) -> None:
    root, trained = whole.cases(tmp_path), whole.trained(tmp_path)
    out = tmp_path / "labels"
    assert run("predict", trained, root, out)[0] == 0
    before = rows(out)
    assert run("predict", trained, root / "p1", out, "--subset", "t1")[0] == 0
    after = rows(out)
    assert after["p1"][:2] == ["p1.nii.gz", "t1"] and before["p1"][1] == "flair+t1ce+t1+t2"
    assert [after[name] for name in ("p0", "p2")] == [before[name] for name in ("p0", "p2")]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@sum", "a,b", 'a"b', "ä", "日本"])
def test_a_name_is_no_formula(tmp_path: Path, name: str) -> None:
    root, trained = whole.cases(tmp_path), whole.trained(tmp_path)
    (root / "p1").rename(root / name)
    for _ in range(2):  # the row is found again
        assert run("predict", trained, root / name, tmp_path / "labels")[0] == 0
    ((case, row),) = rows(tmp_path / "labels").items()
    assert case.lstrip("'") == name and row[0].lstrip("'") == f"{name}.nii.gz"
    assert not case.startswith(("=", "+", "-", "@")) and not row[0].startswith(("=", "+", "-", "@"))


def test_a_file_of_the_user_is_never_replaced(tmp_path: Path) -> None:
    root, trained = whole.cases(tmp_path), whole.trained(tmp_path)
    out = tmp_path / "truth"
    out.mkdir()
    (out / "p1.nii.gz").write_bytes(b"drawn by hand")
    code, output = run("predict", trained, root, out)
    assert (code, errors(output)) == (
        2,
        [
            f"case p1: {out / 'p1.nii.gz'} exists, and is no output of predict; move it away, or give "
            "another OUT"
        ],
    )
    assert (out / "p1.nii.gz").read_bytes() == b"drawn by hand"
    assert sorted(rows(out)) == ["p0", "p2"]


def test_images_are_never_replaced(tmp_path: Path) -> None:
    """Even if OUT has a table, and the files of the case are links into it."""
    root, trained = whole.cases(tmp_path), whole.trained(tmp_path)
    out = tmp_path / "labels"
    assert run("predict", trained, root, out)[0] == 0
    image = root / "p1" / "p1_t1.nii.gz"
    image.replace(out / "p1.nii.gz")
    image.symlink_to(out / "p1.nii.gz")
    content = (out / "p1.nii.gz").read_bytes()
    code, output = run("predict", trained, root, out)
    (fault,) = errors(output)
    assert code == 2 and fault.startswith(f"case p1: {out / 'p1.nii.gz'} exists")
    assert (out / "p1.nii.gz").read_bytes() == content


def test_a_full_disk_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, trained = whole.cases(tmp_path), whole.trained(tmp_path)
    out, save = tmp_path / "labels", nib.save

    def full(image: Any, path: Path) -> None:
        save(image, path)
        if len(list(out.glob("p*.nii.gz"))) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    IMAGES["with a NaN"](root / "p0")
    code, output = run("predict", trained, root, out)
    first, second = errors(output)
    assert code == 2 and first.startswith("case p0: p0_t1.nii.gz has 1 voxels")
    assert second.startswith("cannot write ") and "no space left on device; " in second
    assert list(labels(out)) == ["p1.nii.gz"] and list(rows(out)) == ["p1"]


_LIMITED = """
import resource, sys
from prism_meta.cli.commands import main
resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
sys.argv[0] = "prism-meta"
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_files_that_do_not_fit_leave_nothing(tmp_path: Path, command: str) -> None:
    pytest.importorskip("resource")
    whole.cases(tmp_path), whole.trained(tmp_path)
    given = [str(argument) for argument in arguments(command, tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, *given], capture_output=True, text=True, check=False
    )
    (fault,) = errors(done.stderr)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert fault.startswith("cannot write ") and "file too large; " in fault
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cases", "run"]


def test_the_run_is_read_before_the_first_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, trained = whole.cases(tmp_path), whole.trained(tmp_path)
    monkeypatch.setattr(Predictor, "predict", None)
    (trained / "weights/last.safetensors").write_bytes(b"no weights")
    code, output = run("predict", trained, root, tmp_path / "labels")
    assert code == 2 and "weights/last.safetensors" in errors(output)[0]
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("shape", [(1, 24, 16), (20, 1, 16), (20, 24, 1), (3, 3, 3)], ids=str)
def test_thin_and_small_cases(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    trained = whole.trained(tmp_path)
    write_case(tmp_path / "cases" / "p", shape=shape)
    assert run(*arguments("predict", tmp_path))[0] == 0
    assert nib.load(tmp_path / "labels" / "p.nii.gz").shape == shape
    code, output = run("evaluate", trained, tmp_path / "cases", "--out", tmp_path / "report")
    assert (code, errors(output)) == (0, [])


def test_an_output_among_folders_of_cases_would_hide_them(tmp_path: Path) -> None:
    root, trained = whole.cases(tmp_path), whole.trained(tmp_path)
    (root / "site").mkdir()
    (root / "p1").rename(root / "site" / "p1")
    code, output = run("predict", trained, root, root / "site")
    (fault,) = errors(output)
    assert code == 2 and fault.startswith(f"{root / 'site'}: holds the cases, or some of them; ")
    assert run("predict", trained, root, root / "site" / "labels")[0] == 0
    assert run("predict", trained, root, root / "site" / "labels")[0] == 0


def test_cases_that_were_predicted_before_are_skipped(tmp_path: Path) -> None:
    root, run_folder, out = whole.cases(tmp_path), whole.trained(tmp_path), tmp_path / "labels"
    command = arguments("predict", tmp_path)
    assert run(*command)[0] == 0
    first, table = labels(out), rows(out)
    said = "3 of 3 cases were predicted before; delete"
    marked = nib.load(out / "p1.nii.gz").header["descrip"].item()
    assert re.fullmatch(rb"prism-meta [0-9a-f]{32}", marked)

    def again(*options: object) -> tuple[int, bool]:
        """How many were predicted anew, and whether all files are as at first."""
        times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
        code, output = run(*command, *options)
        assert code == 0, output
        new = sum(path.stat().st_mtime_ns != times.get(path.name) for path in out.glob("*.nii.gz"))
        assert (said in output) == (new == 0)
        return new, (labels(out), rows(out)) == (first, table)

    assert again() == (0, True)
    # What a prediction depends on makes it anew, in the cases that it concerns.
    (out / "p1.nii.gz").unlink()
    assert again() == (1, True)
    (out / "p1.nii.gz").write_bytes(b"damaged")
    assert again() == (1, True)
    content = [
        line for line in (out / "predictions.csv").read_text().splitlines(True) if line[:2] != "p2"
    ]
    (out / "predictions.csv").write_text("".join(content))
    assert again() == (1, True)
    image = root / "p0" / "p0_t1.nii.gz"
    voxels = gzip.decompress(image.read_bytes())
    image.write_bytes(gzip.compress(voxels, mtime=1))  # other bytes, the same voxels
    new, _ = again()
    assert new == 1
    assert again("--subset", "t1")[0] == 3 and again("--subset", "t1")[0] == 0
    assert again("--subset", "t1", "--flips")[0] == 3
    weights = run_folder / "weights" / "last.safetensors"
    state = load_file(weights)
    save_file({name: 0.5 * value for name, value in state.items()}, weights)
    assert again("--subset", "t1", "--flips")[0] == 3
