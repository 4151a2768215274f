"""Group and instance normalisation with first and second derivatives in closed form.

With x^ = (x - mean) / deviation over each group of channels of a sample, y = w x^ + b and
P(v) = v - mean(v) - x^ mean(v x^), the derivatives for a cotangent g of y are

    dx = P(w g) / deviation,    dw = sum g x^,    db = sum g.

Torch has kernels for these, but none for their derivatives, which it composes of operations on whole
images. That is up to ten times slower than the formulas here. For the cotangents u of dx, p of dw and
q of db, the derivatives of <u, dx> + <p, dw> + <q, db> with respect to g and x are sums of u, g, x^ and
1. Their coefficients per sample and channel follow from five sums over voxels: of u, g, u x^, g x^ and
u g.

Source: Group Normalization (Wu and He, ECCV 2018); the second derivative is worked out here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.bilevel.functional.kernels import autocast_type

#: Devices that have the kernels; on "meta" the same tensors are made as on a CPU, without values.
DEVICES = ("cpu", "cuda", "meta")
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """The result with the derivatives of this module; None if torch should compute it."""
    if not _plain(x, weight, bias):
        return None
    if x.ndim < 3 or x.shape[1] % num_groups or x[:1].numel() <= num_groups:
        return None  # torch has the message
    y: Tensor = _GroupNorm.apply(x, weight, bias, num_groups, eps)
    return y


def _plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the derivatives here apply: plain tensors of one type, float32 or float64, on a device that
    has the kernels, outside of forward mode, torch.func's transforms and autocast."""
    given = [x, *(t for t in others if t is not None)]
    return (
        x.dtype in (torch.float32, torch.float64)
        and x.device.type in DEVICES
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype for t in given)
        and all(forward_ad.unpack_dual(t).tangent is None for t in given)
        and not torch.is_autocast_enabled(autocast_type(x.device))
        and not torch._C._are_functorch_transforms_active()
        and not _runs_again()
    )


def _runs_again() -> bool:
    """Whether this runs within torch.utils.checkpoint. It must do the same when it runs again, and then it
    is not intercepted. Torch 2.6 and 2.7 cannot be asked, so there the answer is always yes."""
    if _top_hooks is None:
        return True
    hooks = _top_hooks(True)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Groups of one channel."""
    if running_mean is not None or not use_input_stats or x.ndim < 3:
        return None
    return _group_norm(x, x.shape[1], weight, bias, eps)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
}


class _GroupNorm(Function):
    """(x, w, b) -> y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> Tensor:
        y, mean, scale = torch.native_group_norm(_dense(x), weight, bias, *_sizes(x), groups, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[:3]
        return (*_GroupNormDerivative.apply(g, *ctx.saved_tensors, ctx.eps, wanted), None, None)


class _GroupNormDerivative(Function):
    """(g, x, w) -> (dx, dw, db); mean and scale are functions of x, not variables."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        eps: float,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight, mean, scale)
        ctx.eps = eps
        dense = _dense(x)
        if not dense.is_contiguous():  # torch's kernel is slow for channels_last
            results = _first(g, _Groups(x, weight, mean, scale))
            return tuple(v if w else None for v, w in zip(results, wanted, strict=True))
        own: tuple[Tensor | None, ...] = torch.ops.aten.native_group_norm_backward(
            g.contiguous(), dense, mean, scale, weight, *_sizes(x), mean.shape[1], wanted
        )
        return own

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, p: Tensor | None, q: Tensor | None) -> tuple[Any, ...]:
        g, x, weight, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a third derivative
            var, mean = torch.var_mean(x.reshape(*mean.shape, -1), 2, correction=0)
            scale = (var + ctx.eps).rsqrt()
        groups = _Groups(x, weight, mean, scale)
        cotangents = (
            torch.zeros_like(g) if u is None else u,
            groups.per_channel(p, otherwise=0.0),
            groups.per_channel(q, otherwise=0.0),
        )
        by_g, by_x, by_weight = _second(*cotangents, g, groups)
        return by_g, by_x, None if weight is None else by_weight, *[None] * 4


class _Groups:
    """x with its mean and scale, from which x^ follows without being stored.

    Tensors like x are viewed as (samples, groups, channels of a group, voxels). Sums over voxels, and
    the coefficients that follow from them, lack the last axis.

    Args:
        x: shaped (samples, channels, *space).
        weight: one per channel, or None for 1.
        mean: of x, shaped (samples, groups).
        scale: the reciprocal of x's deviation, shaped (samples, groups).
    """

    def __init__(self, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor) -> None:
        self.count = mean.shape[1]
        self.x, self.mean, self.scale = self.split(x), mean[..., None], scale[..., None]
        self.weight = self.per_channel(weight, otherwise=1.0)

    def split(self, like_x: Tensor) -> Tensor:
        split: Tensor = like_x.unflatten(1, (self.count, -1)).flatten(3)
        return split

    def per_channel(self, values: Tensor | None, *, otherwise: float) -> Tensor | float:
        return otherwise if values is None else values.unflatten(0, (self.count, -1))

    def memory(self) -> Tensor | None:
        """Scratch memory shaped like x; None if a derivative may need what is computed in it."""
        return None if torch.is_grad_enabled() else torch.empty_like(self.x)

    def dot(self, v: Tensor, memory: Tensor | None) -> Tensor:
        """The sums of v x^."""
        product = torch.sub(self.x, self.mean[..., None], out=memory).mul_(v)
        return product.sum(3) * self.scale

    def average(self, sums: Tensor) -> Tensor:
        """The mean over a group of values with these sums."""
        channels, voxels = self.x.shape[2:]
        return sums.sum(2, keepdim=True) / (channels * voxels)

    def combined(
        self, constant: Tensor, by_x: Tensor, *parts: tuple[Tensor, Tensor], memory: Tensor | None
    ) -> Tensor:
        """constant + by_x x^ + the sum of coefficient * tensor over ``parts``."""
        by_x = by_x * self.scale
        constant = constant - by_x * self.mean
        total = torch.addcmul(constant[..., None], by_x[..., None], self.x, out=memory)
        for coefficient, tensor in parts:
            total.addcmul_(coefficient[..., None], tensor)
        return total


def _first(g: Tensor, x: _Groups) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw and db."""
    shape, g = g.shape, x.split(g)
    r, w, memory = x.scale, x.weight, x.memory()
    sum_g, sum_gx = g.sum(3), x.dot(g, memory)
    mean_a, mean_ax = x.average(w * sum_g), x.average(w * sum_gx)  # a = w g
    dx = x.combined(-r * mean_a, -r * mean_ax, (r * w, g), memory=memory)
    return dx.reshape(shape), sum_gx.sum(0).flatten(), sum_g.sum(0).flatten()


def _second(
    u: Tensor, p: Tensor | float, q: Tensor | float, g: Tensor, x: _Groups
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of <u, dx> + <p, dw> + <q, db> with respect to g, x and w."""
    shape, u, g = g.shape, x.split(u), x.split(g)
    r, w, memory = x.scale, x.weight, x.memory()
    sum_u, sum_ux = u.sum(3), x.dot(u, memory)
    sum_g, sum_gx = g.sum(3), x.dot(g, memory)
    sum_ug = torch.mul(u, g, out=memory).sum(3)
    mean_u, mean_ux = x.average(sum_u), x.average(sum_ux)
    mean_a, mean_ax = x.average(w * sum_g), x.average(w * sum_gx)  # a = w g
    # <u, dx> is r <u, P(a)>, where r = 1 / deviation and x^ are functions of x. By x^, together with <p, dw>,
    # it is v = p g - r (mean_ax u + mean_ux a); by r it is the size of a group times ``by_r``.
    by_r = x.average(w * sum_ug) - mean_u * mean_a - mean_ux * mean_ax
    mean_v = x.average(p * sum_g) - r * (mean_ax * mean_u + mean_ux * mean_a)
    mean_vx = x.average(p * sum_gx) - 2 * r * mean_ax * mean_ux
    of_g = p - r * w * mean_ux
    # By x: r P(v) - by_r r^2 x^.
    by_x = x.combined(
        -r * mean_v,
        -r * (mean_vx + r * by_r),
        (r * of_g, g),
        (-r * r * mean_ax, u),
        memory=memory,
    )
    by_g = x.combined(q - r * w * mean_u, of_g, (r * w, u), memory=x.memory())
    by_w = r * (sum_ug - mean_u * sum_g - mean_ux * sum_gx)
    return by_g.reshape(shape), by_x.reshape(shape), by_w.sum(0).flatten()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Samples, channels, voxels."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _dense(x: Tensor) -> Tensor:
    """``x`` in a memory format that torch's kernels accept."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last and x.device.type == "cpu" and x.is_contiguous(memory_format=last):
        return x
    return x.contiguous()
