"""Exported networks equal those of the run over all subsets, in ONNX Runtime and in torch.export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from shaken import NETS, shaken_run
from torch import Tensor

from prism_meta.errors import PrismError
from prism_meta.export.programs import write_onnx, write_program
from prism_meta.modalities import subsets
from prism_meta.training.run import Run

#: Those that take a few seconds; the others are exported in the long tests.
FAST = {("unet", 2)}


def by_onnx(folder: Path) -> Any:
    net = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in net.get_inputs()] == ["image", "mask"]
    assert [one.name for one in net.get_outputs()] == ["logits"]

    def logits(image: Tensor, mask: Tensor) -> Tensor:
        found = net.run(None, {"image": image.numpy(), "mask": mask.numpy()})
        return torch.from_numpy(found[0])

    return logits


def by_program(folder: Path) -> Any:
    return torch.export.load(folder / "model.pt2").module()


def check(run: Run, exported: Any, *sizes: tuple[int, ...]) -> None:
    """All subsets together and one by itself, with NaN where a modality is hidden."""
    model: Any = run.load_model()
    mask = subsets(4)
    for size in sizes:
        image = torch.randn(15, 4, *size)
        damaged = image.clone()
        damaged[~mask] = torch.nan
        with torch.no_grad():
            wanted = model.segment(image, mask)
            together, alone = exported(damaged, mask), exported(damaged[5:6], mask[5:6])
        assert wanted.std() > 0.05
        torch.testing.assert_close(together, wanted, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(alone, wanted[5:6], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("net", "dims"),
    [
        pytest.param(net, dims, marks=[] if (net, dims) in FAST else pytest.mark.slow)
        for net in NETS
        for dims in (2, 3)
    ],
)
def test_logits_of_every_subset(net: str, dims: int, tmp_path: Path) -> None:
    run = shaken_run(tmp_path / "run", *NETS[net], f"data.patch={[16] * dims}")
    for write in (write_onnx, write_program):
        write(run, tmp_path)
    assert {"model.onnx", "model.pt2", "preprocessing.json", "predict.py"} < {
        path.name for path in tmp_path.iterdir()
    }
    multiple = json.loads((tmp_path / "preprocessing.json").read_text())["network"]["multiple"]
    assert multiple == (8 if net == "SegResNet" else 2)
    for file in ("model.onnx", "model.pt2"):
        assert b"network.py" not in (tmp_path / file).read_bytes()  # no path of this computer
    sizes = (16,) * dims, (16, *[16 + 2 * multiple] * (dims - 1))
    for exported in (by_onnx(tmp_path), by_program(tmp_path)):
        check(run, exported, *sizes)


def own(name: str) -> tuple[str, ...]:
    return (f"model.network=shaken:{name}", "data.patch=[16, 16]")


def test_a_network_of_one_size_is_exported_with_it(tmp_path: Path) -> None:
    run = shaken_run(tmp_path / "run", *own("Fixed"))
    write_program(run, tmp_path)
    assert json.loads((tmp_path / "preprocessing.json").read_text())["network"]["multiple"] is None
    check(run, by_program(tmp_path), (16, 16))


def test_a_network_that_no_graph_can_hold_is_one_line(tmp_path: Path) -> None:
    run = shaken_run(tmp_path / "run", *own("Choosing"))
    with pytest.raises(
        PrismError, match=r"network shaken:Choosing cannot be exported \(.*\); use"
    ) as error:
        write_program(run, tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "model.pt2").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    run = shaken_run(tmp_path / "run", *NETS["unet"], "data.patch=[16, 16]")
    with pytest.raises(PrismError, match=r"pip install 'prism-meta\[export\]'"):
        write_onnx(run, tmp_path)
