"""``predict.py`` writes the labels that ``prism-meta predict`` writes, voxel for voxel."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from commands import run
from numpy.typing import NDArray
from shaken import NETS, shaken_run

from prism_meta.data.phantom import write_phantoms
from prism_meta.export.formats import export_run
from prism_meta.modalities import BRATS
from prism_meta.training.setup.cases import find_configured

Array = NDArray[Any]


def rotation() -> Array:
    """A rotation about two axes, as an affine."""
    a, b = np.radians([14, 9])
    first = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    second = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return nib.affines.from_matvec(first @ second, (20, -15, 30))


def flipped(voxels: Array, affine: Array) -> tuple[Array, Array]:
    flip = nib.affines.from_matvec(
        np.diag([-1, 1, -1]), [voxels.shape[0] - 1, 0, voxels.shape[2] - 1]
    )
    return voxels[::-1, :, ::-1], affine @ flip


#: Name of a case -> its modalities, and what becomes of a phantom with voxels of 4 mm.
CASES: dict[str, tuple[tuple[str, ...], Callable[[Array, Array], tuple[Array, Array]]]] = {
    "plain": (BRATS, lambda voxels, affine: (voxels, affine)),
    "flipped": (("t1", "t2"), flipped),
    "permuted": (("flair",), lambda v, a: (v.transpose(2, 0, 1), a[:, [2, 0, 1, 3]])),
    "oblique": (("flair", "t1ce", "t2"), lambda v, a: (v, rotation() @ a)),
    "thick": (("t2",), lambda v, a: (v[:, ::3], a @ np.diag([1.0, 3, 1, 1]))),
    "finer": (
        ("t1ce", "t1"),
        lambda v, a: (v[:, :, ::-1], rotation() @ a @ np.diag([0.7, 0.7, 0.9, 1])),
    ),
    "small": (BRATS[:2], lambda v, a: (v[16:26, 20:29, 15:21], a)),
}
#: The clean-up of a run.
RULES = {
    "WT": {"largest": True, "component_ml": 0.0, "total_ml": 0.0},
    "ET": {"largest": False, "component_ml": 0.5, "total_ml": 2.0},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cases")
    (phantom,) = write_phantoms(root / "phantom", [[True] * 4], shape=(40, 48, 36), spacing=4.0)
    for name, (modalities, change) in CASES.items():
        (root / "cases" / name).mkdir(parents=True)
        for modality in modalities:
            file: Any = nib.load(phantom / f"{modality}.nii.gz")
            voxels, affine = change(np.asarray(file.dataobj), file.affine)
            image = nib.Nifti1Image(np.ascontiguousarray(voxels), affine)
            nib.save(image, root / "cases" / name / f"{name}_{modality}.nii.gz")
    return root / "cases"


def script(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("standalone", folder / "predict.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "dims", "exact"),
    [
        ("region_aware", 2, True),
        ("SegResNet", 3, True),
        # torch's GroupNorm is less exact in the memory layout that PrismNet has in 3-D.
        ("region_aware", 3, False),
    ],
)
def test_labels_are_those_of_predict(
    net: str, dims: int, exact: bool, cases: Path, tmp_path: Path
) -> None:
    made = shaken_run(
        tmp_path / "run", *NETS[net], f"data.patch={[16] * dims}", "data.spacing=[4, 4, 4]"
    )
    if exact and dims == 3:
        content = {"regions": RULES, "cases": [], "dice": 0.5, "cleaned_dice": 0.6}
        (made.folder / "postprocessing.json").write_text(json.dumps(content))
    export_run(made, tmp_path / "exported")
    assert run("predict", made.folder, cases, tmp_path / "labels")[0] == 0
    standalone, predictor = script(tmp_path / "exported"), made.predictor("cpu")
    found, _ = find_configured(made.config, cases, label=False)
    assert [case.id for case in found] == sorted(CASES)
    for case in found:
        standalone.main(cases / case.id, tmp_path / f"{case.id}.nii.gz")
        ours: Any = nib.load(tmp_path / "labels" / f"{case.id}.nii.gz")
        theirs: Any = nib.load(tmp_path / f"{case.id}.nii.gz")
        assert theirs.get_data_dtype() == ours.get_data_dtype()
        assert np.allclose(theirs.affine, ours.affine)
        labels = np.asarray(ours.dataobj)
        differ = np.asarray(theirs.dataobj) != labels
        assert len(np.unique(labels)) > 1, case.id
        assert not (exact and differ.any()), case.id
        if differ.any():
            best, second = predictor.predict_maps(case).probabilities.sort(0, descending=True)[0][
                :2
            ]
            assert (best - second).numpy()[differ].max() < 1e-4, case.id


@pytest.mark.slow
def test_it_needs_nothing_but_numpy_nibabel_and_onnxruntime(cases: Path, tmp_path: Path) -> None:
    made = shaken_run(
        tmp_path / "run", *NETS["unet"], "data.patch=[16, 16]", "data.spacing=[8, 8, 8]"
    )
    export_run(made, tmp_path / "exported")
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; "
        "sys.modules.update(dict.fromkeys(('torch', 'monai', 'scipy', 'prism_meta'))); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [tmp_path / "exported" / "predict.py", cases / "small", tmp_path / "small.nii.gz"]
    call = [sys.executable, "-c", code, *words]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small.nii.gz").exists()
