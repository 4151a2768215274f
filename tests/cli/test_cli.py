"""The commands as a user runs them: the whole path, and each bad input with its message."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import errors, run, settings
from niftis import forbidden, write_case, write_cases

from prism_meta.bilevel.strategies import ALL_STRATEGIES
from prism_meta.data.cases import Case
from prism_meta.records import HEADER
from prism_meta.training import trainer
from prism_meta.training.folder.facts import command_line

VOLUMES = ("data.patch=[16,16,8]",)


@pytest.mark.parametrize("strategy", [kind.name for kind in ALL_STRATEGIES])
def test_every_strategy_trains(cases: Path, tmp_path: Path, strategy: str) -> None:
    options = settings("training.steps=2", f"meta.strategy={strategy}", "meta.cg_steps=1")
    assert run("train", cases, "--out", tmp_path / "run", *options)[0] == 0
    assert (tmp_path / "run" / "weights/last.safetensors").exists()


def test_one_branch_alone_trains(cases: Path, tmp_path: Path) -> None:
    options = settings("training.steps=2", "objective.unimodal=false")
    assert run("train", cases, "--out", tmp_path / "run", *options)[0] == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(lines[-1])["terms"]) == {"fuse", "prm"}


@pytest.fixture(scope="module")
def trained(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    options = settings('data.test_cases=["p3"]', "meta.strategy=second_order")
    assert run("train", cases, "--out", out, *options)[0] == 0
    return out


def test_a_run_folder_is_whole(trained: Path) -> None:
    facts = json.loads((trained / "run.json").read_text())
    assert facts["seed"] == 0 and facts["test"] == ["p3"]
    assert facts["train"]["p0"] == ["flair", "t1", "t1ce"]
    assert set(facts["versions"]) >= {"python", "torch", "monai", "prism-meta"}
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite([line["train_loss"], line["meta_loss"]]).all() for line in lines)
    assert 'strategy = "second_order"' in (trained / "config.toml").read_text()
    assert not list(trained.rglob("*.partial.*"))


def test_evaluate_covers_every_subset_and_compare_pairs_it(trained: Path, cases: Path) -> None:
    code, output = run("evaluate", trained)
    text = " ".join(output.split())  # tables are broken to the width of the terminal
    assert code == 0 and "Worst subset" in text and "both empty: Dice 1" in text
    rows = (trained / "evaluation" / "records.csv").read_text().splitlines()
    assert len(rows) == 1 + 15 * 3 and all(row.startswith("p3,") for row in rows[1:])
    page = (trained / "evaluation" / "report.html").read_text()
    assert "second_order" in page and "data:image/png;base64" in page
    again = f"prism-meta train {cases} --config {trained / 'config.toml'} --out repeated"
    assert f"<pre>{again}\nprism-meta evaluate repeated</pre>" in page
    assert 'alt="p3, sagittal: flair with outlines of the truth and the prediction"' in page
    assert '<th scope="row">training</th><td>3</td><td>3</td><td>3</td><td>3</td><td>2</td>' in page
    code, output = run("compare", trained, trained)
    assert code == 0 and "+0.0" in output


def test_predict_keeps_grid_and_values(trained: Path, cases: Path, tmp_path: Path) -> None:
    root = tmp_path / "new"
    write_case(root / "n", missing=("flair", "t1"), label=None, codes="LPS", spacing=(1, 1, 2))
    code, output = run("predict", trained, root, tmp_path / "labels")
    assert code == 0 and "1 label volumes" in output
    source = nib.load(root / "n" / "n_t2.nii.gz")
    written = nib.load(tmp_path / "labels" / "n.nii.gz")
    assert written.shape == source.shape and written.get_data_dtype() == np.int16
    np.testing.assert_array_equal(written.affine, source.affine)
    assert set(np.unique(written.dataobj)) <= {0, 1, 2, 4}
    code, output = run("predict", trained, root, tmp_path / "b", "--subset", "flair,t2")
    assert (code, errors(output)) == (2, ["case n: has no flair; leave it out of the subset"])
    code, output = run("predict", trained, root, tmp_path / "b", "--subset", "pet")
    assert (code, errors(output)) == (
        2, ["subset: unknown modality pet; use some of flair, t1ce, t1, t2"],
    )  # fmt: skip


def test_volumes_and_another_label_set(tmp_path: Path) -> None:
    names = ("flair", "t1", "t1post", "t2")
    root = write_cases(
        tmp_path / "ms",
        2,
        modalities=names,
        label="lesion",
        values=(1, 1, 1),
        names="{modality}.nii.gz",
    )
    options = settings(
        *VOLUMES,
        f"data.modalities={json.dumps(names)}",
        "data.label=lesion",
        "data.labels={lesion=1}",
    )
    assert run("train", root, "--out", tmp_path / "run", *options)[0] == 0
    assert run("evaluate", tmp_path / "run", root)[0] == 0
    head, first, *_ = (tmp_path / "run/evaluation/records.csv").read_text().splitlines()
    assert head == ",".join(HEADER) and first.startswith("p0,flair,lesion,")


@pytest.mark.parametrize(
    "meta",
    [
        ("meta.strategy=first_order", "meta.inner_steps=2"),
        ("meta.strategy=first_order", "meta.inner=adamw", "meta.inner_state=carried"),
        (
            "meta.strategy=first_order",
            "meta.inner=adamw",
            "meta.inner_state=shared",
            "meta.episodes=2",
        ),
        ("meta.episodes=2",),
        ("meta.strategy=reptile",),
        ("objective.weighting=preference", "objective.preference_rate=0.5"),
        ("objective.weighting=learned", "meta.strategy=second_order"),
    ],
    ids=" ".join,
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    cases: Path, tmp_path: Path, meta: tuple[str, ...]
) -> None:
    options = settings("training.checkpoint_every=2", *meta)
    assert run("train", cases, "--out", tmp_path / "whole", *options)[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    # As if it had been cut off in step 4: the checkpoint of step 2, lines up to step 3, no weights.
    (tmp_path / "cut" / "weights/last.safetensors").unlink()
    kept: dict[int, bytes] = {}
    save = trainer.Trainer._save

    def keeping(self: trainer.Trainer, step: int, total: int) -> None:
        save(self, step, total)
        kept[step] = self.checkpoint.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save", keeping)
        assert run("train", cases, "--out", tmp_path / "again", *options)[0] == 0
    assert sorted(kept) == [0, 2, 4]
    cut = tmp_path / "cut"
    (cut / "checkpoint.pt").write_bytes(kept[2])
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:3]))
    torch.manual_seed(99)  # another state of the global generator must not matter
    assert run("train", "--resume", cut)[0] == 0
    assert (cut / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    whole = (tmp_path / "whole" / "weights/last.safetensors").read_bytes()
    assert (cut / "weights/last.safetensors").read_bytes() == whole


def test_the_second_run_reads_no_voxels_of_nifti(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = settings(f"data.cache={tmp_path / 'cache'}")
    assert run("train", cases, "--out", tmp_path / "a", *options)[0] == 0

    def read(self: Case, **_: object) -> None:
        raise AssertionError(f"read {self.id}")

    monkeypatch.setattr(Case, "read", read)
    assert run("train", cases, "--out", tmp_path / "b", *options)[0] == 0


def test_python_m_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prism_meta", "evaluate", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (fault,) = errors(done.stderr)
    assert fault.startswith(f"{tmp_path}: no run in this folder")


@pytest.mark.parametrize(
    ("started", "told"),
    [
        ("/usr/bin/prism-meta", "prism-meta"),
        ("/lib/prism_meta/__main__.py", "python -m prism_meta"),
    ],
)
def test_a_run_tells_how_it_was_started(
    monkeypatch: pytest.MonkeyPatch, started: str, told: str
) -> None:
    monkeypatch.setattr(sys, "argv", [started, "train", "my cases"])
    assert shlex.join(command_line()) == f"{told} train 'my cases'"


@pytest.mark.parametrize(
    "command", ["", "demo", "train", "evaluate", "predict", "compare", "report"]
)
def test_help_has_examples(command: str) -> None:
    code, output = run(*([command] if command else []), "--help")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert code == 0 and (not command or f"prism-meta {command}" in plain)


# --- bad input: one line with the fix, exit code 2, nothing half-written --------------------------


def fails(root: Path, out: Path, *extra: str) -> list[str]:
    """The faults of a training that must not start; nothing may be left of it."""
    code, output = run("train", root, "--out", out / "run", *settings(*extra))
    assert code == 2
    assert not (out / "run" / "weights/last.safetensors").exists()
    assert not [p for p in out.rglob("*") if ".partial." in p.name]
    return errors(output)


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (fault,) = fails(tmp_path / "none", tmp_path)
    assert fault == (
        f"{tmp_path / 'none'}: no case found; expected folders with files like *flair.nii.gz or "
        "*t1ce.nii.gz or *t1.nii.gz or *t2.nii.gz"
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_case_without_any_modality(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 2)
    write_case(root / "bare", missing=("flair", "t1ce", "t1", "t2"))
    assert fails(root, tmp_path) == [
        "case bare: no modality; expected a file like *flair.nii.gz or *t1ce.nii.gz or *t1.nii.gz "
        "or *t2.nii.gz, found bare_seg.nii.gz; add a file or remove the folder"
    ]
    assert not (tmp_path / "run").exists()


def test_different_shapes_and_affines(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 2)
    path = root / "p0" / "p0_t1.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), path)
    other = root / "p1" / "p1_t2.nii.gz"
    image = nib.load(other)
    shifted = image.affine.copy()
    shifted[0, 3] += 5
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), shifted), other)
    first, second = fails(root, tmp_path)
    assert first == (
        "case p0: p0_t1.nii.gz has shape (4, 4, 4), but p0_flair.nii.gz has (20, 24, 16); "
        'resample them to one grid, or use align = "resample" (set data.align)'
    )
    assert second == (
        "case p1: p1_t2.nii.gz lies up to 5 voxels off the grid of p1_flair.nii.gz, expected at most 0.1; "
        'resample them to one grid, or use align = "resample" (set data.align)'
    )
    assert not (tmp_path / "run").exists()


def test_a_truncated_file_and_one_that_is_no_nifti(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 3)
    whole = (root / "p0" / "p0_t1.nii.gz").read_bytes()
    (root / "p0" / "p0_t1.nii.gz").write_bytes(whole[: len(whole) // 2])
    (fault,) = fails(root, tmp_path)
    assert re.fullmatch(
        r"case p0: p0_t1.nii.gz cannot be read as NIfTI \(.+\); restore it or remove it "
        r"\(a missing modality is allowed\)",
        fault,
    )
    (root / "p1" / "p1_t1.nii.gz").write_text("not an image")
    (fault,) = [f for f in fails(root, tmp_path / "two") if "p1" in f]
    assert "case p1: p1_t1.nii.gz cannot be read as NIfTI" in fault


def test_labels_outside_the_label_map(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 2, values=(2, 3, 4))
    assert fails(root, tmp_path) == [
        f"case p{k}: p{k}_seg.nii.gz: label values 3 are not in the label set {{0: background, "
        "1: necrotic, 2: oedema, 4: enhancing}; correct the file or the label set (set data.labels)"
        for k in (0, 1)
    ]


def test_a_nan_volume(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 2)
    path = root / "p1" / "p1_t1ce.nii.gz"
    image = nib.load(path)
    array = np.asarray(image.dataobj, np.float32)
    array[3, 4, 5] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), path)
    assert fails(root, tmp_path) == [
        "case p1: p1_t1ce.nii.gz has 1 voxels that are NaN or infinite; repair the file or remove it "
        "(a missing modality is allowed)"
    ]


def test_an_unknown_key(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 2)
    assert fails(root, tmp_path, "training.step=3") == [
        "training.step: unknown key; did you mean training.steps?"
    ]
    (tmp_path / "c.toml").write_text("[data]\npach = [8, 8]\n")
    code, output = run("train", root, "--config", tmp_path / "c.toml", "--out", tmp_path / "run")
    assert (code, errors(output)) == (2, ["data.pach: unknown key; did you mean data.patch?"])


def test_no_permission_to_write(trained: Path, tmp_path: Path) -> None:
    # Beside the locked folder, where everybody may read them.
    cases = write_cases(tmp_path / "cases", 2)
    trained = shutil.copytree(trained, tmp_path / "trained")
    locked = tmp_path / "locked"
    locked.mkdir()
    cache = f"data.cache={tmp_path / 'cache'}"
    with forbidden(locked):
        code, output = run("train", cases, "--out", locked / "run", *settings(cache))
        assert (code, errors(output)) == (
            2,
            [
                f"cannot write {locked / 'run'}: permission denied; choose a folder that you may write to"
            ],
        )
        code, output = run("evaluate", trained, cases, "--out", locked / "e")
        assert code == 2 and "permission denied" in errors(output)[0]
    (tmp_path / "file").write_text("")
    code, output = run("predict", trained, cases, tmp_path / "file" / "labels")
    assert code == 2 and errors(output)[0].startswith(
        f"cannot write {tmp_path / 'file' / 'labels'}: not a"
    )


def test_a_run_is_not_overwritten_and_bad_runs_are_named(
    cases: Path, trained: Path, tmp_path: Path
) -> None:
    code, output = run("train", cases, "--out", trained, *settings())
    assert (code, errors(output)) == (
        2, [f"{trained}: holds a run already; continue it with --resume, or give another --out"],
    )  # fmt: skip
    code, output = run("evaluate", tmp_path)
    assert code == 2 and errors(output)[0].startswith(f"{tmp_path}: no run in this folder")
    code, output = run("train")
    assert (code, errors(output)) == (
        2, ["train: got no cases; give a folder of cases, or --resume with a run folder"],
    )  # fmt: skip


def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 2)
    (root / "p0").chmod(0o700)
    with forbidden(tmp_path):
        if os.access(root / "p0", os.R_OK, effective_ids=True):
            pytest.skip("only root can become somebody who may not read its folders")
        code, output = run("train", root, "--out", tmp_path / "run", *settings())
    assert (code, errors(output)) == (
        2,
        [f"{root / 'p0'}: cannot be read (permission denied); make the folder readable"],
    )


def test_help_names_every_strategy_of_the_registry() -> None:
    code, output = run("train", "--help")
    plain = re.sub(r"\x1b\[[0-9;]*m|[│\s]+", " ", output)
    assert code == 0 and all(re.search(rf"\b{kind.name}\b", plain) for kind in ALL_STRATEGIES)
