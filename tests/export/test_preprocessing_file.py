"""``preprocessing.json`` says what ``predict`` does."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from shaken import NETS, shaken_run

from prism_meta.export.preprocessing import preprocessing
from prism_meta.training.setup.cases import file_names

LGE = ('data.modalities=["lge", "t1", "t1ce"]', 'data.files={ lge = ["*_DE*", "late_*.nii.gz"] }')


def test_settings_of_the_run(tmp_path: Path) -> None:
    run = shaken_run(
        tmp_path / "run",
        *NETS["region_aware"],
        *LGE,
        "data.labels={ scar = 7, blood = 300 }",
        "data.spacing=[1.5, 1.5, 8]",
        "data.patch=[16, 24]",
        "evaluation.overlap=0.25",
    )
    rule = {"largest": True, "component_ml": 0.1, "total_ml": 0.5}
    (run.folder / "postprocessing.json").write_text(
        json.dumps({"regions": {"scar": rule}, "cases": [], "dice": 0.5, "cleaned_dice": 0.6})
    )
    found = preprocessing(run, multiple=2)
    json.dumps(found)
    assert found["modalities"] == ["lge", "t1", "t1ce"]
    assert found["spacing"]["mm"] == [1.5, 1.5, 8]
    assert found["window"]["patch"] == [16, 24] and found["window"]["overlap"] == 0.25
    assert found["labels"] == {"background": 0, "scar": 7, "blood": 300}
    assert found["dtype"] == "int16" and found["weights"] == "last"
    (cleaned,) = found["clean_up"]
    assert (cleaned["classes"], cleaned["becomes"], cleaned["largest"]) == ([1], 0, True)
    assert cleaned["component_mm3"] == pytest.approx(100, rel=1e-5) and cleaned[
        "total_mm3"
    ] == pytest.approx(500, rel=1e-5)


def test_files_belong_to_the_modality_that_predict_reads_them_as(tmp_path: Path) -> None:
    run = shaken_run(tmp_path / "run", *NETS["region_aware"], *LGE)
    rules, names = preprocessing(run)["files"], file_names(run.config, label=False)
    for stem in ("T1", "p_t1", "p-T1ce", "p_t1n", "p-t1c", "p_t1w", "late_1", "p_DE2", "p_lge", "p_t2", "de",
                 "p_t1post"):  # fmt: skip
        fits = [r["modality"] for r in rules if fnmatchcase(stem.lower(), r["pattern"])]
        assert fits[:1] == list(names.assign([f"{stem}.nii.gz"])), stem
