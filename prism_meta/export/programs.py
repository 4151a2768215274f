"""The network of a run as a graph: ``model.onnx`` and ``model.pt2``, each with ``preprocessing.json``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prism_meta.errors import ConfigError, PrismError
from prism_meta.export.network import GraphNet
from prism_meta.export.preprocessing import PREPROCESSING, preprocessing_json
from prism_meta.files import atomic, write_whole
from prism_meta.modalities import subsets
from prism_meta.training.folder.weights import Kind
from prism_meta.training.run import Run

#: Names of the files.
ONNX, PROGRAM, SCRIPT = "model.onnx", "model.pt2", "predict.py"
#: Names of the inputs and of the output.
IMAGE, MASK, LOGITS = "image", "mask", "logits"
#: The largest multiple that the sizes of an image are tried in. Networks halve an image up to five times.
_LARGEST_MULTIPLE = 32


def write_onnx(run: Run, out: Path, /, *, weights: Kind | None = None) -> None:
    """Write ``model.onnx``, ``preprocessing.json`` and ``predict.py``, which uses the two.

    Args:
        run: a run whose training has ended.
        out: folder of the files.
        weights: see ``Run.existing_weights``.

    Raises:
        PrismError: see ``Run.load_model``; or a package is missing, or the network cannot be exported.
    """
    _check_onnx()
    program, multiple = _exported(run, weights)
    with _quiet(), _one_line(run), atomic(out / ONNX) as partial:
        graph = torch.onnx.export(
            program,
            input_names=[IMAGE, MASK],
            output_names=[LOGITS],
            dynamo=True,
            verbose=False,
        )
        if graph is None:  # only without dynamo
            raise PrismError(f"{run.folder}: torch.onnx.export returned no graph")
        graph.save(str(partial), external_data=False)
    write_whole(out / PREPROCESSING, preprocessing_json(run, weights, multiple=multiple))
    script = package_files("prism_meta.export").joinpath(f"{SCRIPT}.txt").read_text("utf-8")
    write_whole(out / SCRIPT, script)


def write_program(run: Run, out: Path, /, *, weights: Kind | None = None) -> None:
    """Write ``model.pt2`` and ``preprocessing.json``.

    Args:
        run: see ``write_onnx``.
        out: see ``write_onnx``.
        weights: see ``write_onnx``.

    Raises:
        PrismError: see ``Run.load_model``; or the network cannot be exported.
    """
    program, multiple = _exported(run, weights)
    with _quiet(), atomic(out / PROGRAM) as partial:
        torch.export.save(program, partial)
    write_whole(out / PREPROCESSING, preprocessing_json(run, weights, multiple=multiple))


def _exported(run: Run, weights: Kind | None) -> tuple[Any, int | None]:
    """The network as a ``torch.export.ExportedProgram``, and what the sizes of an image are multiples of.

    The multiple is None if the network works on images of the run's patch only.
    """
    net = GraphNet(run.load_model(weights=weights)).eval()
    patch = run.config.data.patch
    if len(patch) == 3:  # graphs know the default memory layout only
        net.to(memory_format=torch.contiguous_format)
    modalities = len(run.config.data.modalities)
    multiple = _multiple(run)
    with _quiet(), _one_line(run):
        if multiple is not None:
            # The exporter raises many kinds. A network of fixed sizes is exported with those of the patch.
            with suppress(Exception):
                sizes = [multiple * (axis + 2) for axis in range(len(patch))]
                return _traced(net, modalities, sizes, multiple), multiple
        return _traced(net, modalities, patch, None), None


def _traced(net: nn.Module, modalities: int, sizes: Sequence[int], multiple: int | None) -> Any:
    """Trace a network on an image of these sizes. Axes of ``multiple`` stay free, and so does the batch."""
    batch = torch.export.Dim("batch")
    shape: dict[int, Any] = {0: batch}
    if multiple is not None:
        for axis in range(len(sizes)):
            shape[axis + 2] = multiple * torch.export.Dim(f"size_{axis}", min=2)
    mask = subsets(modalities)[[0, -1, 0]]  # a batch of one would be a constant of the graph
    image = torch.zeros(3, modalities, *sizes)
    with torch.no_grad():
        program = torch.export.export(net, (image, mask), dynamic_shapes=(shape, {0: batch}))
    for node in program.graph.nodes:
        node.meta.pop(
            "stack_trace", None
        )  # it has the paths of this computer, and is most of a small file
    return program


def _multiple(run: Run) -> int | None:
    """The largest power of 2 that the network may need and of which each axis of the patch is a multiple."""
    model, patch = run.config.model, run.config.data.patch
    multiple = _LARGEST_MULTIPLE if model.is_named else 2 ** (model.depth - 1)
    while any(size % multiple or size < 2 * multiple for size in patch):
        multiple //= 2
        if not multiple:
            return None
    return multiple


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"format onnx: needs {error.name}, which is not installed; run pip install 'prism-meta[export]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of torch about its own exporters say nothing to users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _one_line(run: Run) -> Iterator[None]:
    """What the exporters raise is one line that names the network."""
    try:
        yield
    except (PrismError, OSError, MemoryError):
        raise
    except Exception as error:  # the exporters raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PrismError(
            f"{run.folder}: network {run.config.model.network} cannot be exported ({reason}); use another "
            "format, or a network whose graph does not depend on the values of its input"
        ) from error
