"""A run's clean-up: chosen on validation cases, written with the run, and checked when it is read."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

import prism_meta as pm
from prism_meta.data.cache import CachedCase
from prism_meta.errors import PrismError
from prism_meta.evaluation.cleanup import Cleanup, RegionRule
from prism_meta.training.cleanup.choice import CANDIDATES, candidate_dice, choose_cleanup
from prism_meta.training.cleanup.file import CLEANUP, Chosen, read_cleanup, write_cleanup
from prism_meta.training.processes.agreement import Processes
from prism_meta.training.validation.validation import Validation

WATCHED = pm.load_config(overrides=["validation.cases=1"])


def dice(classes: Tensor, truth: Tensor) -> float:
    """The mean over the regions of BraTS, by definition."""
    values = []
    for region in pm.BRATS_LABELS.regions:
        p, t = (pm.BRATS_LABELS.region(c, region) for c in (classes, truth))
        both = int(p.sum() + t.sum())
        values.append(2 * int((p & t).sum()) / both if both else 1.0)
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(4))
def test_the_sums_of_components_give_the_dice_of_cleaned_labels(seed: int) -> None:
    random = np.random.default_rng(seed)
    share = (0.0, 0.01, 0.05, 0.2)[seed]
    shares = [1 - 3 * share, share, share, share]
    classes, truth = (
        random.choice(np.arange(4, dtype=np.uint8), (10, 9, 8), p=shares) for _ in range(2)
    )
    for region in pm.BRATS_LABELS.regions:
        found = candidate_dice(classes, truth, pm.BRATS_LABELS, region, voxel=40.0)
        for rule, value in zip(CANDIDATES, found, strict=True):
            cleaned = Cleanup({region: rule})(
                torch.from_numpy(classes), pm.BRATS_LABELS, voxel=40.0
            )
            assert value == pytest.approx(dice(cleaned, torch.from_numpy(truth)), abs=1e-12)


class Drawn(Validation):
    """Has predictions that were drawn for it, by the name of the case and of the subset."""

    def predictions(self, model: nn.Module, case: CachedCase) -> Iterator[tuple[str, Tensor]]:
        yield from model.drawn[case.id].items()  # type: ignore[union-attr, operator]


def drawn_case(name: str, truth: Tensor) -> CachedCase:
    case: Any = SimpleNamespace(
        id=name, shape=tuple(truth.shape), availability=torch.tensor([True]),
        patch=lambda corner, size, *, shown: (None, truth.long()),
    )  # fmt: skip
    return case  # type: ignore[no-any-return]


def choose(
    drawn: dict[str, dict[str, Tensor]], truths: dict[str, Tensor], processes: Any = None
) -> Chosen:
    validation = Drawn(
        [drawn_case(name, truth) for name, truth in truths.items()],
        modalities=("a",), labels=pm.BRATS_LABELS, patch=(4, 4),
    )  # fmt: skip
    model = nn.Identity()
    model.drawn = drawn  # type: ignore[assignment]
    processes = processes or Processes(Fabric(accelerator="cpu", devices=1))
    return choose_cleanup(validation, model, voxel=8.0, processes=processes)


def tumour() -> Tensor:
    """1000 voxels of 8 mm^3, each class in a part."""
    classes = torch.zeros(24, 24, 24, dtype=torch.uint8)
    classes[1:11, 1:11, 1:11] = 2
    classes[3:9, 3:9, 3:9] = 1
    classes[4:7, 4:7, 4:7] = 3
    return classes


def test_a_far_blob_on_validation_cases_is_removed_by_the_mildest_rule() -> None:
    truth, blob = tumour(), tumour()
    blob[20:22, 20:22, 20] = 2  # 4 voxels, 0.032 ml
    chosen = choose({"p": {"a": blob}}, {"p": truth})
    assert chosen.cleanup == Cleanup(
        {"WT": RegionRule(component_ml=0.05), "TC": RegionRule(), "ET": RegionRule()}
    )
    assert chosen.raw == pytest.approx(dice(blob, truth)) and chosen.cleaned == 1.0


def test_no_rule_without_a_gain() -> None:
    truth = tumour()
    truth[20:22, 20:22, 20] = 3  # a second lesion that is there
    chosen = choose({"p": {"a": truth}}, {"p": truth})
    assert not chosen.cleanup.is_on and chosen.raw == chosen.cleaned == 1.0


def test_the_mean_over_cases_decides() -> None:
    """The blob is right in one case. It helps there less than it harms in the two others."""
    truth, blob = tumour(), tumour()
    blob[18:21, 18:22, 18:22] = 2
    drawn = {name: {"a": blob} for name in ("p", "q", "r")}
    chosen = choose(drawn, {"p": truth, "q": truth, "r": blob})
    assert chosen.cleanup.rules["WT"] == RegionRule(component_ml=0.5)  # 48 voxels, 0.384 ml
    chosen = choose(drawn, {"p": truth, "q": blob, "r": blob})
    assert not chosen.cleanup.is_on


def test_an_inner_region_is_decided_on_what_the_outer_one_left() -> None:
    truth, found = tumour(), tumour()
    found[20:22, 20:22, 20] = 3  # far: WT removes it, and ET needs no rule
    found[2, 2, 2] = (
        3  # in the oedema: a false enhancing voxel that becomes necrosis, then TC's oedema
    )
    chosen = choose({"p": {"a": found}}, {"p": truth})
    rule = RegionRule(component_ml=0.05)
    assert chosen.cleanup == Cleanup({"WT": rule, "TC": RegionRule(), "ET": rule})
    cleaned = chosen.cleanup(found, pm.BRATS_LABELS, voxel=8.0)
    assert int(cleaned[2, 2, 2]) == 1 and int(cleaned[20, 20, 20]) == 0
    assert chosen.cleaned == pytest.approx(dice(cleaned, truth))


class Rank:
    """One of two processes, which is a thread."""

    def __init__(self, rank: int, barrier: threading.Barrier, told: dict[int, Any]) -> None:
        self.fabric: Any = SimpleNamespace(global_rank=rank, world_size=2)
        self.rank, self.barrier, self.told = rank, barrier, told

    def gather(self, value: Any) -> list[Any]:
        self.told[self.rank] = value
        self.barrier.wait(60)
        found = [self.told[0], self.told[1]]
        self.barrier.wait(60)
        return found


def test_two_processes_choose_what_one_does() -> None:
    truths = {name: tumour() for name in "pqr"}
    drawn = {name: {"a": truth.clone()} for name, truth in truths.items()}
    for name, k in zip("pqr", (2, 3, 3), strict=True):
        drawn[name]["a"][20:22, 20:22, 20] = k
        drawn[name]["a"][2, 2, 2] = k
    alone = choose(drawn, truths)
    assert alone.cleanup.is_on
    barrier, told = threading.Barrier(2), dict[int, Any]()
    with ThreadPoolExecutor(2) as threads:
        ranks = [Rank(k, barrier, told) for k in (0, 1)]
        both = list(threads.map(lambda rank: choose(drawn, truths, rank), ranks))
    assert both == [alone, alone]


# ------------------------------------------------------------------------------------------- the file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    cleanup = Cleanup({"WT": RegionRule(True, 0.5, 1.5), "TC": RegionRule(), "ET": RegionRule()})
    write_cleanup(tmp_path, Chosen(cleanup, 0.5, 0.75), cases=["p1", "日本"])
    assert read_cleanup(tmp_path, WATCHED) == cleanup
    stored = json.loads((tmp_path / CLEANUP).read_text())
    assert (stored["dice"], stored["cleaned_dice"], stored["cases"]) == (0.5, 0.75, ["p1", "日本"])


def test_a_run_without_validation_has_none(tmp_path: Path) -> None:
    assert read_cleanup(tmp_path, pm.load_config()) == Cleanup()


WHOLE: dict[str, Any] = {
    "regions": {"WT": {"largest": True, "component_ml": 0.0, "total_ml": 0.0}},
    "cases": ["p1"], "dice": 0.5, "cleaned_dice": 0.6,
}  # fmt: skip


def changed(*path: str, value: object) -> bytes:
    content = json.loads(json.dumps(WHOLE))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is damaged (Expecting value: line 1 column 1 (char 0))"),
        (b"\xff\x00", "is damaged ("),
        (json.dumps(WHOLE).encode()[:-4], "is damaged (Expecting"),
        (b"[]", "is damaged (the file: input should be a valid dictionary or instance of _file)"),
        (b"{}", "is damaged (regions: field required)"),
        (changed("regions", "WT", "largest", value=1),
         "is damaged (regions.WT.largest: input should be a valid boolean)"),
        (changed("regions", "WT", "component_ml", value=-1.0),
         "is damaged (regions.WT.component_ml: input should be greater than or equal to 0)"),
        (changed("regions", "WT", "total_ml", value=float("nan")),
         "is damaged (regions.WT.total_ml: input should be a finite number)"),
        (changed("regions", "WT", "smallest", value=1.0),
         "is damaged (regions.WT.smallest: extra inputs are not permitted)"),
        (changed("regions", "XX", value=WHOLE["regions"]["WT"]),
         "has rules for XX, but the run has the regions WT, TC, ET"),
        (None, "is missing"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_fault(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / CLEANUP).write_bytes(content)
    with pytest.raises(PrismError) as caught:
        read_cleanup(tmp_path, WATCHED)
    (fault,) = caught.value.faults
    assert fault.startswith(f"{tmp_path / CLEANUP}: {reason}")
    assert fault.endswith(
        f"; choose it again with prism-meta train --resume {tmp_path}, or use --clean-up none"
    )


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / CLEANUP).mkdir()
    with pytest.raises(PrismError, match=r"cannot be read \(is a directory\); choose it again"):
        read_cleanup(tmp_path, WATCHED)


def test_names_of_files(tmp_path: Path) -> None:
    (tmp_path / CLEANUP).write_text("{}")
    with pytest.raises(
        PrismError, match=r"has a postprocessing.json, which the run would overwrite"
    ):
        pm.Run.check_new(tmp_path)
