"""What cannot be trained functionally, and parameters that a loss reaches in another way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from prism_meta.bilevel.functional.errors import HiddenParameterError
from prism_meta.bilevel.functional.trees import Params


def check_model(
    model: nn.Module, modules: Sequence[nn.Module], params: Mapping[str, Tensor]
) -> None:
    """Refuse models whose parameters cannot be replaced for an evaluation.

    Args:
        model: to be trained.
        modules: all modules in it.
        params: all its parameters, by name.

    Raises:
        ValueError: a scripted module, ``DataParallel``, a lazy module that was not run yet, parameters
            made in inference mode, or no trainable parameter.
    """
    name = type(model).__name__
    replicated = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    parallel = next((type(m).__name__ for m in modules if isinstance(m, replicated)), None)
    if parallel is not None:
        raise ValueError(
            f"model: got {parallel}, whose replicas hold other parameters than the model; pass the module "
            "inside it, and run one process per device (Lightning Fabric does)"
        )
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        raise ValueError(
            f"model: {name} is scripted (torch.jit), and its parameters cannot be replaced; pass the "
            "module that was given to torch.jit.script"
        )
    lazy = [n for n, p in params.items() if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"model: {', '.join(lazy[:3])} {'have' if len(lazy) > 1 else 'has'} no shape yet (a lazy "
            "module); run the model once on a batch before training"
        )
    trainable = [p for p in params.values() if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"model: {name} has no trainable parameter; set requires_grad=True on those to learn"
        )
    if any(p.is_inference() for p in trainable):
        raise ValueError(
            f"model: {name} was made in torch.inference_mode(); make it outside of that context"
        )


def refuse_hidden_parameters(model: nn.Module, loss: Tensor) -> None:
    """Raise if ``loss`` depends on the model's own parameters, although others were put in their place.

    Raises:
        HiddenParameterError: the message names them.
    """
    leaves = {id(leaf) for leaf in graph_leaves(loss)}
    hidden = [n for n, p in model.named_parameters() if id(p) in leaves]
    if hidden:
        more = f" and {len(hidden) - 5} more" if len(hidden) > 5 else ""
        raise HiddenParameterError(
            ", ".join(hidden[:5]) + more,
            "reached other than through the model's registered parameters, so that no inner step can "
            "replace it and it would never be trained",
            "read it as an attribute of its module in forward (not from a list, a closure or a product "
            "computed earlier); in an objective use forward.parameters, not model.parameters()",
        )


def refuse_constant(params: Mapping[str, Tensor], loss: Tensor) -> None:
    """Raise if ``loss`` depends on none of the leaves ``params``.

    Raises:
        HiddenParameterError: it does not.
    """
    leaves = {id(leaf) for leaf in graph_leaves(loss)}
    if not any(id(p) in leaves for p in params.values()):
        raise HiddenParameterError(
            "objective",
            "the loss depends on no parameter of the model",
            "compute it from what forward(...) returns, without detach() or torch.no_grad()",
        )


def parameters_with_hooks(model: nn.Module) -> list[str]:
    """Names of the parameters with hooks, which an evaluation at other tensors does not run."""
    return [
        n for n, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks
    ]


def foreign_leaves(
    params: Mapping[str, Tensor], known: Iterable[Tensor], loss: Tensor
) -> list[Tensor]:
    """Leaves that require a gradient and are neither ``params`` nor ``known``: they are never trained."""
    given = {id(t) for t in (*params.values(), *known)}
    return [leaf for leaf in graph_leaves(loss) if id(leaf) not in given]


def not_finite(
    scalars: Mapping[str, Tensor], terms: Mapping[str, Tensor], groups: Mapping[str, Params]
) -> list[str]:
    """What is not finite, by name: all scalars and terms, and the first tensor of each group.

    It synchronises the device once if everything is finite. A norm that overflows counts as not finite.
    """
    norms = {kind: torch.nn.utils.get_total_norm(g.values()) for kind, g in groups.items() if g}
    every = [*scalars.values(), *norms.values()]
    if torch.stack([v.isfinite().to(every[0].device) for v in every]).all():
        return []
    named = {**scalars, **{f"term {n}": t for n, t in terms.items()}}
    wrong = [n for n, t in named.items() if not t.isfinite().all()]
    for kind, group in groups.items():
        wrong += [f"{kind} {n}" for n, t in group.items() if not t.isfinite().all()][:1]
    return wrong or [f"the norm of the {kind.split()[0]}" for kind in norms]


def graph_nodes(tensor: Tensor) -> Iterator[Any]:
    """All nodes of the graph of ``tensor``."""
    nodes = [] if tensor.grad_fn is None else [tensor.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)


def graph_leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The leaves that the graph of ``tensor`` ends at."""
    if tensor.grad_fn is None and tensor.requires_grad:
        yield tensor
    for node in graph_nodes(tensor):
        if (
            not node.next_functions
        ):  # the nodes that accumulate gradients are ends, and few others are
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor):
                yield leaf
