"""Preflight: what would go wrong in meta-training, found on one batch before it starts."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn

from prism_meta.bilevel.blockers import blockers, failure_of
from prism_meta.bilevel.functional import checks, kernels, trees
from prism_meta.bilevel.functional.errors import (
    CheckpointError,
    HiddenParameterError,
    advice,
    operation,
    reentrant,
    translated,
)
from prism_meta.bilevel.functional.model import Evaluation, FunctionalModel
from prism_meta.bilevel.functional.protocols import Objective
from prism_meta.bilevel.functional.recompute import placeholders
from prism_meta.bilevel.strategies.base import GraphSizes, gradients_on
from prism_meta.bilevel.strategies.registry import ALL_STRATEGIES


@dataclass(frozen=True)
class Finding:
    """One thing to know before training.

    Args:
        level: ``error`` stops a strategy, ``warning`` changes what is learned, ``note`` is for information.
        where: name of the module or parameters.
        what: the finding.
        advice: what to do about it; empty if nothing needs doing.
    """

    level: Literal["error", "warning", "note"]
    where: str
    what: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.level}: {self.where}: {self.what}{advice}"


@dataclass(frozen=True)
class Preflight:
    """The result of ``preflight``: print it, or ask it.

    Args:
        findings: all of them, errors first.
        memory: per strategy, an estimate of the bytes that its graphs and copies keep alive beyond the
            model, at ``steps`` inner steps.
        steps: K.
    """

    findings: tuple[Finding, ...]
    memory: Mapping[str, int]
    steps: int

    @property
    def ok(self) -> bool:
        """Whether every strategy can run."""
        return not any(finding.level == "error" for finding in self.findings)

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or ["no findings"]
        lines.append(f"memory at K = {self.steps}, estimated:")
        lines += [f"  {name}: {decimal(size)}" for name, size in self.memory.items()]
        return "\n".join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colours = {"error": "red", "warning": "yellow", "note": "cyan"}
        findings = Table(title="preflight", title_justify="left", expand=False)
        for column in ("", "where", "what", "advice"):
            findings.add_column(column, overflow="fold")
        for f in self.findings:
            findings.add_row(f"[{colours[f.level]}]{f.level}[/]", f.where, f.what, f.advice)
        memory = Table(title=f"memory at K = {self.steps}, estimated", title_justify="left")
        memory.add_column("strategy")
        memory.add_column("beyond the model", justify="right")
        for name, size in self.memory.items():
            memory.add_row(name, decimal(size))
        yield findings if self.findings else "preflight: no findings"
        yield memory


def preflight(model: nn.Module, objective: Objective, batch: Any, *, steps: int = 1) -> Preflight:
    """Look for what would go wrong in meta-training, on one batch; all findings at once.

    It names the modules that block a second derivative and what to use instead, parameters that are
    unused, frozen or reached behind the engine's back, kernels that a second derivative replaces,
    BatchNorm layers, a loss or gradient that is not finite, the strategies that checkpointing excludes,
    and how much memory each strategy would need (unknown if none can run). The model is not changed.

    Args:
        model: any module.
        objective: ``objective(forward, batch)``, see ``MetaStrategy``.
        batch: as large as in training.
        steps: K, the number of inner steps.

    Returns:
        The findings, worst first, and the memory of each strategy in bytes; ``print`` it.

    Raises:
        ValueError: the model cannot be trained, or the loss is not a scalar.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> report = preflight(model, mse, (torch.randn(8, 2), torch.randn(8, 1)))
        >>> report.ok, [finding.where for finding in report.findings]
        (True, ['1'])
    """
    with gradients_on():
        functional = FunctionalModel(model, objective)
        of_model = [*_hooks(model), *_frozen(model), *_statistics(model)]
        try:
            findings, memory = _of_batch(functional, batch, steps)
        except CheckpointError as refusal:
            what = f"{refusal.module} {refusal.what}"
            findings, memory = [Finding("error", "model", what, refusal.advice)], {}
        except HiddenParameterError as hidden:
            findings, memory = [Finding("error", hidden.where, hidden.what, hidden.advice)], {}
    rank = {"error": 0, "warning": 1, "note": 2}
    ordered = sorted([*findings, *of_model], key=lambda f: rank[f.level])
    return Preflight(tuple(ordered), memory, steps)


def _of_batch(
    model: FunctionalModel, batch: Any, steps: int
) -> tuple[list[Finding], dict[str, int]]:
    """What one batch shows: findings, and the memory of each strategy."""
    phi, random = model.leaves(), model.random_state()
    own = {t.untyped_storage().data_ptr() for t in (*phi.values(), *model.model.buffers())}
    with random.replayed(), _SavedBytes(own) as forward, _no_lost_gradient():
        value = model.evaluate(phi, batch)
    replaced = _replaced_kernels(value.loss)
    checks.refuse_constant(phi, value.loss)
    foreign = list(_foreign(model, value))
    checkpoints = list(_checkpoint(model, value))
    del value
    with random.replayed(), _SavedBytes(own) as both:
        value = model.evaluate(phi, batch, twice=True)
        gradient = value.gradient(phi, create_graph=True)
    failure = failure_of(value, gradient)
    findings = [
        *_not_finite(value.loss, gradient.values()),
        *checkpoints,
        *([] if failure is None else _blocking(blockers(model, batch, failure, random))),
        *_unused({name: name in gradient for name in phi}),
        *foreign,
        *replaced,
    ]
    sizes = GraphSizes(
        forward=sum(forward.values()),
        backward=sum(both.values()) - sum(forward.values()),
        params=sum(p.numel() * p.element_size() for p in phi.values()),
        float64=_growth_in_float64(phi.values()),
    )
    memory: dict[str, int] = {}
    for kind in ALL_STRATEGIES:
        memory |= kind.memory(sizes, steps)
    return findings, memory


def _growth_in_float64(params: Iterable[Tensor]) -> float:
    sizes = [(p.numel() * max(8, p.element_size()), p.numel() * p.element_size()) for p in params]
    return sum(wide for wide, _ in sizes) / sum(own for _, own in sizes)


@contextmanager
def _no_lost_gradient() -> Iterator[None]:
    """Raise if a reentrant checkpoint loses gradients, which torch only warns of."""
    warning = "None of the inputs have requires_grad=True"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=warning)
        try:
            yield
        except UserWarning as caught:
            if not str(caught).startswith(warning):
                raise
            raise reentrant() from caught


class _SavedBytes:
    """Bytes per storage that autograd saves within the context, except those of ``known``."""

    def __init__(self, known: set[int]) -> None:
        self.known = known
        self.sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved)

    def __enter__(self) -> dict[int, int]:
        self._hooks.__enter__()
        return self.sizes

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known and tensor.ndim:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def _not_finite(loss: Tensor, gradient: Iterable[Tensor]) -> Iterator[Finding]:
    for name, values in (("loss", [loss]), ("gradient", gradient)):
        if not all(bool(v.isfinite().all()) for v in values):
            yield Finding(
                "error", name, "is not finite on this batch", "check the images and the targets"
            )


def _checkpoint(model: FunctionalModel, value: Evaluation) -> Iterator[Finding]:
    """Finds checkpointed modules by differentiating with placeholders for the parameters."""
    stand_ins = placeholders(model.substitution.names.values())
    one = torch.ones_like(value.loss)
    try:
        with translated():
            model.substitution.run(
                stand_ins, lambda: trees.vjp(value.loss, one, value.params, retain_graph=True)
            )
    except CheckpointError as refusal:
        what = f"blocks SecondOrder(graph='stored'): {refusal.what}"
        yield Finding("error", refusal.module, what, refusal.advice)


def _blocking(found: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    for where, failure in found:
        what = f"blocks SecondOrder: {operation(failure)}"
        yield Finding("error", where, what, advice(failure))


def _replaced_kernels(loss: Tensor) -> list[Finding]:
    """Kernels of a first-order evaluation that a second derivative replaces."""
    names = {node.name() for node in checks.graph_nodes(loss)}
    return [
        Finding("note", "SecondOrder", what, "first-order strategies keep the fast kernel")
        for part, what in kernels.REPLACED.items()
        if any(part in name for name in names)
    ]


def _foreign(model: FunctionalModel, value: Evaluation) -> Iterator[Finding]:
    for leaf in checks.foreign_leaves(value.params, model.weights.values(), value.loss):
        yield Finding(
            "warning",
            "objective",
            f"the loss depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient and is "
            "no parameter of the model",
            "it is never trained; register it as a parameter of the model, or detach it",
        )


def _hooks(model: nn.Module) -> Iterator[Finding]:
    hooked = checks.parameters_with_hooks(model)
    if hooked:
        yield Finding(
            "warning",
            ", ".join(hooked),
            "hooks (register_hook) do not run, as gradients are taken at copies of the parameters",
            "change MetaGradient.gradient between meta_gradient() and apply()",
        )


def _unused(used: Mapping[str, bool]) -> Iterator[Finding]:
    """Unused parameters, by the largest modules of which none is used."""
    groups: Counter[str] = Counter()
    for name, is_used in used.items():
        if is_used:
            continue
        parts = name.split(".")
        prefixes = [".".join(parts[:depth]) + "." for depth in range(1, len(parts))]
        whole = next(
            (p for p in prefixes if not any(u for n, u in used.items() if n.startswith(p))), None
        )
        groups[f"{whole}*" if whole else name] += 1
    for where, count in groups.items():
        plural = "parameters have" if count > 1 else "parameter has"
        yield Finding(
            "warning",
            where,
            f"{count} {plural} no part in the loss of this batch",
            "expected where the batch lacks a modality; else they will never learn",
        )


def _frozen(model: nn.Module) -> Iterator[Finding]:
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
        yield Finding(
            "note", ", ".join(frozen[:3]) + more, "frozen: neither adapted nor given a gradient"
        )


def _statistics(model: nn.Module) -> Iterator[Finding]:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            yield Finding(
                "note",
                name or "model",
                f"{type(module).__name__} keeps running statistics; MetaLearner takes those of the meta "
                "batch (buffers='outer')",
                "for small batches, or subsets that differ within a batch, use InstanceNorm or GroupNorm",
            )
