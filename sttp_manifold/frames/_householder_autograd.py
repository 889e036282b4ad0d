"""How a frame is computed: by a function with a backward of its own, plainly, or by LAPACK.

Every function here takes and returns stacks with exactly one batch dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sttp_manifold.frames._wy_form import (
    Chart,
    FullChart,
    Parts,
    ReducedChart,
    explain_overflow,
    is_watched,
    poison_overflow,
    refuse_overflow,
    transforms_active,
)
from sttp_manifold.tt.precision import autocast_is_on

__all__ = ["full", "reduced"]


def full(parameters: Tensor, d: int, r: int, transposed: bool) -> Tensor:
    """Frames of the full chart.

    Shape:
        - parameters: ``(b, d r - r (r + 1) / 2)``
        - output: ``(b, d, r)``, or ``(b, r, d)`` if ``transposed``
    """
    return _frame(FullChart, parameters, d, r, transposed)


def reduced(parameters: Tensor, d: int, r: int, transposed: bool) -> Tensor:
    """Frames of the reduced chart.

    Shape:
        - parameters: ``(b, r (d - r))``
        - output: ``(b, d, r)``, or ``(b, r, d)`` if ``transposed``
    """
    return _frame(ReducedChart, parameters, d, r, transposed)


def _frame(chart: type[Chart], parameters: Tensor, d: int, r: int, transposed: bool) -> Tensor:
    kind = parameters.device.type
    if autocast_is_on(kind):
        with torch.autocast(kind, enabled=False):
            return _frame(chart, parameters, d, r, transposed)
    if _is_traced(parameters):
        return _composite(chart, parameters, d, r, transposed)
    if torch.is_grad_enabled() and parameters.requires_grad:
        apply: Callable[..., Tensor] = _Frame.apply
        return apply(parameters, chart, d, r, transposed)
    Y = chart.unpack(parameters, d, r)
    if _lapack_is_faster(chart, parameters, d, r):
        Q = _by_lapack(chart.from_lapack(Y, r))
        return Q.mT if transposed else Q
    return chart.assemble(chart.parts(Y, refuse_overflow), transposed)


def _composite(chart: type[Chart], parameters: Tensor, d: int, r: int, transposed: bool) -> Tensor:
    """The frame by plain operations: differentiable in every mode, and never looking at a value."""
    parts = chart.parts(chart.unpack(parameters, d, r), poison_overflow)
    return chart.assemble(parts, transposed)


def _is_traced(x: Tensor) -> bool:
    """Whether something else than the autograd engine wants to see every operation.

    A compiler, the tracer of TorchScript, a transform of ``torch.func``, or forward-mode
    differentiation.
    """
    return (
        is_watched()
        or transforms_active()
        or torch.autograd.forward_ad.unpack_dual(x).tangent is not None
    )


def _lapack_is_faster(chart: type[Chart], x: Tensor, d: int, r: int) -> bool:
    """Whether LAPACK's product of reflectors beats the compact WY form, without gradient.

    Measured: the products of the WY form pay off in float32, from some size of the whole stack on;
    of full frames, with one thread, for those only that are tall or thin. More threads gain LAPACK
    nothing, which takes one reflector at a time. In float64 they came out level at best.
    """
    if x.device.type != "cpu" or isinstance(x, FakeTensor):
        return False
    if x.dtype != torch.float32:
        return True
    size = x.shape[0] * d * r
    if chart is ReducedChart or torch.get_num_threads() > 1:
        return size < 2**13
    return size < 2**14 or (d < 4 * r and r > 32)


def _by_lapack(Y: Tensor) -> Tensor:
    squares = Y.square().sum(-2).add_(1)
    if not math.isfinite(float(squares.sum())):
        explain_overflow(squares, *Y.shape[-2:])
    Q: Tensor = torch.linalg.householder_product(Y, squares.reciprocal_().mul_(2))
    return Q


class _Frame(torch.autograd.Function):
    """A chart with its backward written out."""

    @staticmethod
    def forward(
        ctx: Any, parameters: Tensor, chart: type[Chart], d: int, r: int, transposed: bool
    ) -> Tensor:
        parts = chart.parts(chart.unpack(parameters, d, r), refuse_overflow)
        ctx.save_for_backward(parameters, *parts)
        ctx.chart, ctx.size, ctx.transposed = chart, (d, r), transposed
        return chart.assemble(parts, transposed)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None, None, None]:
        kind = G.device.type
        if autocast_is_on(kind):
            with torch.autocast(kind, enabled=False):
                return _Frame.backward(ctx, G)
        parameters, *saved = ctx.saved_tensors
        parts = Parts(*saved)
        if torch.is_grad_enabled():
            # For a second derivative the parts are needed as functions of the parameters.
            parts = ctx.chart.parts(ctx.chart.unpack(parameters, *ctx.size), poison_overflow)
        gradient = ctx.chart.pull_back(parts, G.mT if ctx.transposed else G)
        return ctx.chart.pack(gradient, *ctx.size), None, None, None, None
