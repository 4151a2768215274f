"""Preflight: what would go wrong in meta-training, found on one batch before it starts."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn

from prism_meta.bilevel.inner import Params
from prism_meta.bilevel.strategies.base import Objective
from prism_meta.bilevel.strategies.differentiate import (
    CheckpointError,
    Stage,
    advice,
    operation,
    reentrant,
)
from prism_meta.bilevel.strategies.problem import Problem


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

    It tells which modules block a second derivative and what to use instead, which parameters are
    unused or frozen, whether BatchNorm statistics are at stake, whether loss and gradient are finite,
    which strategies checkpointing excludes, and how much memory each would need (which is not known
    where none can run). The model is not changed.

    Args:
        model: any module.
        objective: ``objective(forward, batch)``, see ``MetaStrategy``.
        batch: of the size that training will use.
        steps: K, the number of inner steps.

    Raises:
        ValueError: the model has no trainable parameter, or the loss is not a scalar.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> report = preflight(model, mse, (torch.randn(8, 2), torch.randn(8, 1)))
        >>> report.ok, [finding.where for finding in report.findings]
        (True, ['1'])
    """
    problem = Problem(model, objective)
    random = problem.random_state()
    try:
        with problem.replaying(random):
            first, second, used, finite, error = _probe(problem, batch)
    except CheckpointError as refusal:
        finding = Finding("error", "model", f"{refusal.module} {refusal.what}", refusal.advice)
        return Preflight((finding, *_statistics(model), *_frozen(model)), {}, steps)
    findings = [
        *_not_finite(finite),
        *_checkpoint(problem, batch, random),
        *_blockers(problem, batch, error, random),
        *_unused(used),
        *_frozen(model),
        *_statistics(model),
    ]
    rank = {"error": 0, "warning": 1, "note": 2}
    size = sum(p.numel() * p.element_size() for p in problem.trainable.values())
    wide = sum(p.numel() * max(8, p.element_size()) for p in problem.trainable.values()) / size
    return Preflight(
        tuple(sorted(findings, key=lambda f: rank[f.level])),
        _memory(first, second, size, wide, steps),
        steps,
    )


def _probe(
    problem: Problem, batch: Any
) -> tuple[int, int, dict[str, bool], dict[str, bool], str | None]:
    """Bytes of the graph and of that of its gradient, used parameters, finiteness, and what failed."""
    phi = problem.leaves()
    own = {t.untyped_storage().data_ptr() for t in (*phi.values(), *problem.model.buffers())}
    with _SavedBytes(own) as first, _no_lost_gradient():
        value = problem.evaluate(phi, batch)
    with _SavedBytes(own | first.keys()) as second:
        grads = problem.reached_gradient(value.loss, phi, at=value.at, create_graph=True)
    used = {name: name in grads for name in phi}
    finite = {
        "loss": bool(value.loss.isfinite()),
        "gradient": all(bool(g.isfinite().all()) for g in grads.values()),
    }
    error = problem.placed(value.at, lambda: _failure([*grads.values()], [*phi.values()]))
    return sum(first.values()), sum(second.values()), used, finite, error


@contextmanager
def _no_lost_gradient() -> Iterator[None]:
    """A reentrant checkpoint of an input without gradient has none for its parameters: torch warns."""
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
    """Bytes per storage that autograd saves within the context, without those of ``known``."""

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


def _memory(first: int, second: int, size: int, wide: float, steps: int) -> dict[str, int]:
    """What each strategy keeps alive at its peak: graphs, and copies of the parameters.

    ``wide`` is how much larger a tensor is in float64, in which FiniteDifference works.
    """
    both = first + second
    return {
        "SingleLevel": first + size,
        "FirstOrder": first + 3 * size,
        "Reptile": first + 2 * size,
        "SecondOrder(graph='stored')": steps * (both + 2 * size) + first,
        "SecondOrder(graph='recomputed')": both + (steps + 3) * size,
        "FiniteDifference": int(wide * (first + (2 * steps + 4) * size)),
        "ImplicitMAML": both + 6 * size,
    }


def _not_finite(finite: Mapping[str, bool]) -> Iterator[Finding]:
    for name, fine in finite.items():
        if not fine:
            yield Finding(
                "error", name, "is not finite on this batch", "check the images and the targets"
            )


def _checkpoint(problem: Problem, batch: Any, random: Any) -> Iterator[Finding]:
    """A part that runs again when the model is differentiated, by what happens if it does so elsewhere."""
    phi = problem.leaves()
    with problem.replaying(random):
        value = problem.evaluate(phi, batch)
        try:
            problem.reached_gradient(value.loss, phi, at=None)
        except CheckpointError as refusal:
            what = f"blocks SecondOrder(graph='stored'): {refusal.what}"
            yield Finding("error", refusal.module, what, refusal.advice)


def _blockers(problem: Problem, batch: Any, error: str | None, random: Any) -> Iterator[Finding]:
    """The smallest modules whose second derivative fails; the objective if none of them does."""
    if error is None:
        return
    calls: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name] = (module, _constants(args), _constants(kwargs))

        return hook

    handles = [
        # Before the module runs, which may change its input in place.
        module.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, module in problem.model.named_modules()
    ]
    with problem.replaying(random):
        try:
            problem.evaluate(problem.leaves(), batch)
        finally:
            for handle in handles:
                handle.remove()
        failing = {name: e for name, call in calls.items() if (e := _second_derivative(*call))}
    smallest = {
        name: e
        for name, e in failing.items()
        if not any(other != name and _inside(other, name) for other in failing)
    }
    for name, failure in (smallest or {"objective": error}).items():
        kind = f" ({type(calls[name][0]).__name__})" if name in calls else ""
        yield Finding(
            "error",
            f"{name or 'model'}{kind}",
            f"blocks SecondOrder: {operation(failure)}",
            advice(failure),
        )


def _inside(other: str, name: str) -> bool:
    return name == "" or other.startswith(f"{name}.")


def _second_derivative(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """What goes wrong in a second derivative of ``module`` at these inputs, if anything does."""
    params: Params = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
    state = {**params, **{n: b.detach().clone() for n, b in module.named_buffers()}}
    args, kwargs = _leaves(args), _leaves(kwargs)
    inputs = [*params.values(), *(t for t in _tensors((args, kwargs)) if t.requires_grad)]

    def failure() -> str | None:
        # Not the leaves themselves, which a module that works in place may not change.
        given = module(*_map(args, torch.clone), **_map(kwargs, torch.clone))
        outputs = [o for o in _tensors(given) if o.requires_grad]
        if not outputs or not inputs:
            return None
        # A square, for a linear module's second derivative is 0 and is never computed.
        loss = torch.stack([o.float().square().mean() for o in outputs]).sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        return _failure([g for g in grads if g is not None], inputs)

    return Stage(module).run(state, failure)


def _failure(gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> str | None:
    """What goes wrong when first derivatives are differentiated again, if anything does."""
    if _is_cut(gradients):
        return (
            "a function marked once_differentiable cuts the second derivative off without an error"
        )
    given = [g for g in gradients if g.requires_grad]
    if not given:
        return None
    try:
        torch.autograd.grad(given, inputs, [torch.ones_like(g) for g in given], allow_unused=True)
    except (RuntimeError, NotImplementedError) as failure:
        return str(failure)
    return None


def _is_cut(tensors: Sequence[Tensor]) -> bool:
    """Whether the graph holds a node that is there to raise: autograd.grad passes it by in silence."""
    nodes = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error":
            return True
        parents = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= parents
        nodes += parents
    return False


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name))


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(part, change) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map(part, change) for part in value)
    return value


def _constants(value: Any) -> Any:
    return _map(value, lambda t: t.detach().clone())


def _leaves(value: Any) -> Any:
    return _map(value, lambda t: t.requires_grad_() if t.is_floating_point() else t)


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
                "warning",
                name or "model",
                f"{type(module).__name__} keeps running statistics, which inner steps leave as they are",
                "give MetaLearner(buffers='outer') to use model.eval() later, or use InstanceNorm",
            )
