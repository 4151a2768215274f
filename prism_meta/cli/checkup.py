"""The self-test of ``doctor``: gradients against finite differences, a NIfTI file, and a prediction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import FirstOrder, MetaStrategy, SecondOrder
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.nifti import read_header, read_voxels
from prism_meta.data.phantom import write_phantoms
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.evaluation.saving import save_labels
from prism_meta.evaluation.shortcuts import predict
from prism_meta.networks.prism import PrismNet

Params = dict[str, Tensor]

#: The inner rate, and the half width of a finite difference.
_RATE, _WIDTH = 0.1, 1e-5
#: The largest relative error of a derivative in float64.
_BOUND = 1e-6
_SHAPE, _SPACING = (40, 48, 36), 4.0


@dataclass(frozen=True)
class Tested:
    """One part of the self-test.

    Args:
        name: what was tested.
        seconds: how long that took.
        fault: what went wrong; None if it passed.
    """

    name: str
    seconds: float
    fault: str | None = None


def self_test(tests: Mapping[str, Callable[[], None]] | None = None) -> Iterator[Tested]:
    """Run tests one after the other; each raises an exception if it fails.

    Args:
        tests: name -> test. Defaults to ``TESTS``.

    Example:
        >>> def broken():
        ...     raise ValueError("no luck")
        >>> [(test.name, test.fault) for test in self_test({"luck": broken})]
        [('luck', 'ValueError: no luck')]
    """
    for name, test in (TESTS if tests is None else tests).items():
        start, fault = time.perf_counter(), None
        try:
            test()
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        yield Tested(name, time.perf_counter() - start, fault)


class _Problem:
    """Two losses of a tiny net in float64: L_train and L_meta as functions of its parameters."""

    def __init__(self) -> None:
        numbers = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=numbers, dtype=torch.float64)

        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        for parameter in self.net.parameters():
            parameter.data = draw(*parameter.shape)
        self.train, self.meta = ((draw(6, 3), draw(6, 2)) for _ in range(2))
        self.direction = {name: draw(*p.shape) for name, p in self.net.named_parameters()}

    def loss(self, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean squared error at ``params``."""
        predicted: Tensor = functional_call(self.net, params, (batch[0],))
        return (predicted - batch[1]).square().mean()

    def adapted(self, params: Params) -> Params:
        """phi~ after one step of SGD on the train batch (E1)."""
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        slopes = torch.autograd.grad(self.loss(leaves, self.train), list(leaves.values()))
        return {
            name: p.detach() - _RATE * g
            for (name, p), g in zip(leaves.items(), slopes, strict=True)
        }

    def check(self, strategy: MetaStrategy, loss: Callable[[Params], Tensor], at: Params) -> None:
        """Compare a strategy's gradient with the finite difference of ``loss`` along one direction."""

        def objective(forward: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            return (forward(batch[0]) - batch[1]).square().mean()

        gradient = strategy.meta_gradient(self.net, objective, self.train, self.meta).gradient
        slope = sum(float((gradient[name] * v).sum()) for name, v in self.direction.items())
        ends = [
            float(loss({name: at[name] + sign * _WIDTH * v for name, v in self.direction.items()}))
            for sign in (-1, 1)
        ]
        expected = (ends[1] - ends[0]) / (2 * _WIDTH)
        if not abs(slope - expected) <= _BOUND * abs(expected):
            raise ArithmeticError(f"the derivative is {slope:.9g}, expected {expected:.9g}")


def _first_order() -> None:
    """E3 is the derivative of L_meta at phi~."""
    problem = _Problem()
    at = problem.adapted(dict(problem.net.named_parameters()))
    problem.check(FirstOrder(SGD(_RATE)), lambda p: problem.loss(p, problem.meta), at)


def _second_order() -> None:
    """E4 is the derivative of L_meta(phi~(phi)) at phi."""
    problem = _Problem()
    at = {name: p.detach() for name, p in problem.net.named_parameters()}
    problem.check(
        SecondOrder(SGD(_RATE)), lambda p: problem.loss(problem.adapted(p), problem.meta), at
    )


def _nifti() -> None:
    """A file has the voxels and the affine that were written."""
    voxels = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    affine = np.array([[0, -2, 0, 5], [1, 0, 0, -3], [0, 0, 3, 7], [0, 0, 0, 1]], dtype=float)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii.gz"
        nib.save(nib.Nifti1Image(voxels, affine), path)
        header = read_header(path)
        np.testing.assert_array_equal(read_voxels(path, header), voxels)
        np.testing.assert_allclose(header.affine, affine, atol=1e-5)


def _prediction() -> None:
    """A network without training predicts labels on the grid of a phantom, and they are written."""
    net = PrismNet(spatial_dims=2, width=2)
    with TemporaryDirectory() as folder:
        write_phantoms(folder, [[True, False, True, True]], shape=_SHAPE, spacing=_SPACING)
        [case] = load_cases(folder)
        labels = predict(
            net, case, preprocessing=Preprocessing((_SPACING,) * 3), patch=(32, 32), subset="flair"
        )
        path = Path(folder) / "labels.nii.gz"
        save_labels(path, labels, case)
        header = read_header(path)
        np.testing.assert_array_equal(read_voxels(path, header), labels)
        np.testing.assert_allclose(header.affine, read_header(case.reference).affine)


TESTS: Mapping[str, Callable[[], None]] = MappingProxyType(
    {
        "first-order gradient against finite differences, float64": _first_order,
        "second-order gradient against finite differences, float64": _second_order,
        "writing and reading a NIfTI file": _nifti,
        "predicting a phantom from one modality": _prediction,
    }
)
