"""The MONAI Bundle of a run: MONAI verifies it, and it predicts what ``prism-meta predict`` does."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from commands import run
from niftis import write_cases
from shaken import NETS, shaken_run

import prism_meta
from prism_meta.errors import CaseError, ConfigError, OutputError, PrismError
from prism_meta.export.bundle import INFERENCE, METADATA, MODEL, README, write_bundle
from prism_meta.export.bundled import LabelVolumes
from prism_meta.training.cleanup.file import CLEANUP
from prism_meta.training.folder.weights import Kind, save_weights
from prism_meta.training.run import Run

#: MONAI warns of every bundle that it runs what the configuration names.
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file .*:UserWarning")
GRID = ("data.spacing=[1, 1, 1]", "evaluation.overlap=0.25", "training.ema=0")
SLICES, VOLUMES = (*GRID, "data.patch=[16, 16]"), (*GRID, "data.patch=[16, 16, 16]")
SMALL = (*VOLUMES, *NETS["region_aware"])
every_net = pytest.mark.parametrize(
    "settings",
    [
        pytest.param((*grid, *NETS[name]), id=name)
        for name, grid in {
            "region_aware": VOLUMES, "mean": SLICES, "attention": SLICES, "unet": VOLUMES,
            "conditioned_unet": SLICES, "SegResNet": VOLUMES,
        }.items()
    ],
)  # fmt: skip
#: The fields that MONAI's specification of bundles requires, and those of a tensor. The schema that
#: ``metadata.json`` names is on the network.
SCHEMA = {
    "type": "object",
    "required": [
        "schema", "version", "monai_version", "pytorch_version", "numpy_version",
        "required_packages_version", "task", "description", "authors", "copyright",
        "network_data_format",
    ],
    "additionalProperties": {"type": "string"},
    "properties": {
        "changelog": {"type": "object", "additionalProperties": {"type": "string"}},
        "required_packages_version": {"type": "object", "additionalProperties": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "additionalProperties": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": {
                    "type": "object",
                    "required": [
                        "type", "format", "num_channels", "spatial_shape", "dtype", "value_range",
                    ],
                    "properties": {
                        "num_channels": {"type": "integer"},
                        "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
                        "value_range": {"type": "array", "items": {"type": "number"}},
                        "is_patch_data": {"type": "boolean"},
                        "channel_def": {"type": "object"},
                    },
                },
            },
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases: one lacks t2, one has t1 only, and one is complete. They have no labels."""
    root = write_cases(tmp_path_factory.mktemp("cases"), 3)
    for file in root.glob("*/*.nii.gz"):
        case, _, name = file.name.removesuffix(".nii.gz").partition("_")
        if name == "seg" or (case, name) == ("p0", "t2") or (case == "p1" and name != "t1"):
            file.unlink()
    return root


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


def written(made: Run, out: Path, weights: Kind | None = None) -> Path:
    out.mkdir()
    write_bundle(made, out, weights=weights)
    return out


def volumes(folder: Path) -> dict[str, Any]:
    return {file.name: nib.load(file) for file in sorted(folder.glob("*.nii.gz"))}


def assert_same_volumes(ours: Path, theirs: Path, *, count: int) -> None:
    """Values, types and grids; and something was found in each."""
    found, expected = volumes(ours), volumes(theirs)
    assert list(found) == list(expected) and len(found) == count
    for name, image in found.items():
        values = np.asanyarray(image.dataobj)
        assert values.dtype == np.asanyarray(expected[name].dataobj).dtype
        assert np.array_equal(values, np.asanyarray(expected[name].dataobj)), name
        assert np.array_equal(image.affine, expected[name].affine)
        assert len(np.unique(values)) > 1
    assert (ours / "predictions.csv").read_text().splitlines()[1:]


@every_net
def test_its_label_volumes_are_those_of_predict(
    settings: tuple[str, ...], incomplete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shaken_run(tmp_path / "run", *settings)
    assert run("predict", made.folder, incomplete, tmp_path / "expected")[0] == 0
    monkeypatch.chdir(written(made, tmp_path / "bundle"))
    monai.bundle.run(
        config_file=INFERENCE, dataset_dir=str(incomplete), output_dir=str(tmp_path / "labels")
    )
    assert_same_volumes(tmp_path / "labels", tmp_path / "expected", count=3)


@every_net
def test_monai_verifies_it(
    settings: tuple[str, ...], schema: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = written(shaken_run(tmp_path / "run", *settings), tmp_path / "bundle")
    files = {"meta_file": str(out / METADATA), "config_file": str(out / INFERENCE)}
    digest = hashlib.sha256(schema.read_bytes()).hexdigest()
    with caplog.at_level(logging.INFO):
        monai.bundle.verify_metadata(
            meta_file=files["meta_file"], filepath=str(schema), hash_val=digest, hash_type="sha256"
        )
        monai.bundle.verify_net_in_out("network_def", **files, device="cpu")
    assert "metadata is verified with no error." in caplog.messages
    assert "data shape of network is verified with no error." in caplog.messages


@pytest.mark.slow
def test_the_commands_of_monai(incomplete: Path, schema: Path, tmp_path: Path) -> None:
    """As its README says, in a process of its own, without this package's folder as the current one."""
    made = shaken_run(tmp_path / "run", *SMALL)
    assert run("predict", made.folder, incomplete, tmp_path / "expected")[0] == 0
    out = written(made, tmp_path / "bundle")
    readme = (out / README).read_text()
    (line,) = (
        line for line in readme.splitlines() if line.startswith("python -m monai.bundle run")
    )
    line = line.replace("CASES", str(incomplete)).replace("LABELS", str(tmp_path / "labels"))
    verify = f"--meta_file {METADATA}"
    for command in (
        line,
        f"python -m monai.bundle verify_metadata {verify} --filepath {schema}",
        f"python -m monai.bundle verify_net_in_out network_def {verify} --config_file {INFERENCE}",
    ):
        words = [sys.executable, *command.split()[1:]]
        path = os.pathsep.join([str(Path(prism_meta.__file__).parents[1]), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(words, cwd=out, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "error" not in done.stderr.replace("with no error", "").lower()
    assert_same_volumes(tmp_path / "labels", tmp_path / "expected", count=3)


def test_its_files_name_no_case_and_no_path(tmp_path: Path) -> None:
    settings = ("data.cache=/secret/cache", 'data.test_cases=["Mustermann"]')
    out = written(shaken_run(tmp_path / "run", *SMALL, *settings), tmp_path / "bundle")
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {METADATA, INFERENCE, MODEL, README}
    for file in files:
        content = (out / file).read_bytes()
        for word in (b"secret", b"Mustermann", str(tmp_path).encode(), str(Path.home()).encode()):
            assert word not in content, (file, word)


def test_the_metadata_are_those_of_the_run(tmp_path: Path) -> None:
    made = shaken_run(tmp_path / "run", *SMALL, "data.patch=[16, 8]", "data.labels={lesion = 3}")
    found = json.loads((written(made, tmp_path / "bundle") / METADATA).read_text())
    image, pred = (
        found["network_data_format"][key][name]
        for key, name in (("inputs", "image"), ("outputs", "pred"))
    )
    assert [image["num_channels"], image["spatial_shape"]] == [4, [16, 8]]
    assert image["channel_def"] == {"0": "flair", "1": "t1ce", "2": "t1", "3": "t2"}
    assert [pred["num_channels"], pred["channel_def"]] == [2, {"0": "background", "1": "lesion"}]
    assert found["label_classes"] == "0 background, 3 lesion"
    assert found["monai_version"] == monai.__version__
    assert found["required_packages_version"]["nibabel"] == nib.__version__


def test_weights_and_clean_up_are_those_of_the_run(
    incomplete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shaken_run(tmp_path / "run", *SMALL, "training.ema=0.9")
    shutil.copy(made.weights(), made.weights("ema"))
    last = made.load_model(weights="last")
    with torch.no_grad():
        for parameter in last.parameters():
            parameter *= 0.9
    save_weights(made.weights("last"), last)
    rule = {"largest": True, "component_ml": 0.0, "total_ml": 0.0}
    cleanup = {"regions": {"WT": rule}, "cases": ["p9"], "dice": 0.5, "cleaned_dice": 0.6}
    (made.folder / CLEANUP).write_text(json.dumps(cleanup))
    for kind in ("ema", "last"):
        out = written(made, tmp_path / kind, weights=kind)
        expected, labels = tmp_path / f"{kind}-expected", tmp_path / f"{kind}-labels"
        assert run("predict", made.folder, incomplete, expected, "--weights", kind)[0] == 0
        monkeypatch.chdir(out)
        monai.bundle.run(config_file=INFERENCE, dataset_dir=str(incomplete), output_dir=str(labels))
        assert_same_volumes(labels, expected, count=3)
    state = torch.load(tmp_path / "last" / MODEL, weights_only=True)
    torch.testing.assert_close(
        state, {f"model.{n}": value for n, value in last.state_dict().items()}, rtol=0, atol=0
    )
    raw = tmp_path / "raw"
    assert run("predict", made.folder, incomplete, raw, "--clean-up", "none")[0] == 0
    pairs = zip(volumes(raw).values(), volumes(tmp_path / "ema-expected").values(), strict=True)
    assert any(not np.array_equal(a.dataobj, b.dataobj) for a, b in pairs)


def test_a_faulty_case_does_not_stop_the_others(incomplete: Path, tmp_path: Path) -> None:
    cases = tmp_path / "cases"
    shutil.copytree(incomplete, cases)
    image = nib.load(cases / "p1" / "p1_t1.nii.gz")
    values = np.asarray(image.dataobj, dtype=np.float32)
    values[8, 8, 8] = np.nan
    nib.save(nib.Nifti1Image(values, image.affine), cases / "p1" / "p1_t1.nii.gz")
    made = shaken_run(tmp_path / "run", *SMALL)
    labels = LabelVolumes(made.predictor("cpu"), made.config, cases, tmp_path / "labels")
    with pytest.raises(CaseError, match=r"^case p1: .*NaN"):
        labels.run()
    assert sorted(volumes(tmp_path / "labels")) == ["p0.nii.gz", "p2.nii.gz"]


def test_label_volumes_do_not_go_among_the_cases(incomplete: Path, tmp_path: Path) -> None:
    made = shaken_run(tmp_path / "run", *SMALL)
    labels = LabelVolumes(made.predictor("cpu"), made.config, incomplete, incomplete / ".")
    with pytest.raises(OutputError) as error:
        labels.run()
    assert str(error.value) == f"output_dir: {incomplete} holds the cases; give another folder"


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ('data.labels={"$lesion" = 1}', "$lesion"),
        ('data.labels={"lesion#1" = 1}', "lesion#1"),
        ('data.files={t1 = ["@T1*"]}', "@T1*"),
    ],
)
def test_a_name_that_monai_would_interpret_is_refused(
    setting: str, name: str, tmp_path: Path
) -> None:
    made = shaken_run(tmp_path / "run", *SMALL, setting)
    with pytest.raises(ConfigError) as error:
        written(made, tmp_path / "bundle")
    assert str(error.value) == (
        f"{made.folder}: the name {name!r} has another meaning in a configuration of MONAI; train with a "
        "name of letters and digits, or use another format"
    )
    assert not list((tmp_path / "bundle").iterdir())


def test_a_network_of_your_own_object_is_refused(tmp_path: Path) -> None:
    made = shaken_run(tmp_path / "run", *SMALL)
    own = Run(made.folder, made.config, {**made.facts, "own": {"model": "Net"}})
    with pytest.raises(PrismError, match="trained a model of its own"):
        written(own, tmp_path / "bundle")
    assert not list((tmp_path / "bundle").iterdir())


def test_the_command_writes_all_of_it_or_nothing(tmp_path: Path) -> None:
    made = shaken_run(tmp_path / "run", *SMALL)
    export = ("export", "--format", "bundle", "--out", tmp_path / "bundle")
    assert run(*export, made.folder) == (0, f"exported to {tmp_path / 'bundle'}\n")
    assert (tmp_path / "bundle" / MODEL).exists()
    refused = shaken_run(tmp_path / "refused", *SMALL, 'data.labels={"$lesion" = 1}')
    before = sorted(tmp_path.iterdir())
    code, output = run(*export[:-1], tmp_path / "other", refused.folder)
    assert code == 2 and "the name '$lesion' has another meaning" in output
    assert sorted(tmp_path.iterdir()) == before
