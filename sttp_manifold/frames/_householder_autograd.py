r"""The charts of :mod:`~sttp_manifold.frames.householder`, with a backward of their own.

In the notation of that module, with :math:`M = T^{-1}` and :math:`Z = M^{-1} Y_{top}^\top`, the
frame is :math:`Q = E - Y Z`. For a cotangent :math:`G` of the frame,

.. math::
    W = M^{-\top} Y^\top G, \qquad
    K = \operatorname{triu}(W Z^\top) \text{ with halved diagonal}, \qquad
    \bar Y = Y (K + K^\top) - G Z^\top - E W^\top,

of which the entries are kept that are parameters: two large products for the value, three for the
gradient, and a triangular solve for each. The inverse of ``M`` is never formed in the full chart:
with nearly parallel reflectors it would lose a digit. The code keeps ``-M^T`` and ``-Z^T``,
which saves passes over the frame and transposed copies.

Every function here takes and returns stacks with exactly one batch dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sttp_manifold.errors import FrameOverflowError

__all__ = ["Pull", "full", "reduced", "strictly_lower", "vjp"]


Pull = Callable[[Tensor], Tensor]


class _Constants(NamedTuple):
    """What depends on ``r`` alone.

    Attributes:
        unpack: for each entry of an ``r x r`` matrix, which packed parameter it is; of the entries
            that are none, the first.
        pack: flat positions of the strictly lower triangle, row by row.
        lower: ones strictly below the diagonal.
        upper: ones above the diagonal, one half on it.
        minus: the negative of its transpose.
        eye: the identity.
    """

    unpack: Tensor
    pack: Tensor
    lower: Tensor
    upper: Tensor
    minus: Tensor
    eye: Tensor


_KEPT: dict[tuple[int, torch.dtype, torch.device], _Constants] = {}
_KEEP = 256


def _constants(r: int, like: Tensor) -> _Constants:
    if torch.compiler.is_compiling() or isinstance(like, FakeTensor):
        return _make_constants(r, like.dtype, like.device)
    key = (r, like.dtype, like.device)
    kept = _KEPT.get(key)
    if kept is None:
        # A tensor born in inference mode could not be used for a gradient later.
        with torch.inference_mode(False), torch.no_grad():
            kept = _make_constants(*key)
        if type(kept.eye) is Tensor:  # not those of a tracer
            if len(_KEPT) >= _KEEP:
                _KEPT.clear()
            _KEPT[key] = kept
    return kept


def _make_constants(r: int, dtype: torch.dtype, device: torch.device) -> _Constants:
    rows, columns = torch.tril_indices(r, r, -1, device=device)
    pack = rows * r + columns
    numbers = torch.arange(pack.shape[0], device=device)
    eye = torch.eye(r, dtype=dtype, device=device)
    ones = torch.ones(r, r, dtype=dtype, device=device)
    upper = ones.triu(1) + eye / 2
    return _Constants(
        torch.zeros(r * r, dtype=pack.dtype, device=device).index_copy(0, pack, numbers),
        pack,
        ones.tril(-1),
        upper,
        -upper.mT.contiguous(),
        eye,
    )


def strictly_lower(r: int, like: Tensor) -> Tensor:
    """Flat positions of the strictly lower triangle of an ``r x r`` matrix, row by row."""
    return _constants(r, like).pack


# --- The way to a frame is chosen here. ---


def full(parameters: Tensor, d: int, r: int, transposed: bool) -> Tensor:
    """Frames of the full chart.

    Shape:
        - parameters: ``(b, d r - r (r + 1) / 2)``
        - output: ``(b, d, r)``, or ``(b, r, d)`` if ``transposed``
    """
    return _frame(_Full, parameters, d, r, transposed)


def reduced(parameters: Tensor, d: int, r: int, transposed: bool) -> Tensor:
    """Frames of the reduced chart.

    Shape:
        - parameters: ``(b, r (d - r))``
        - output: ``(b, d, r)``, or ``(b, r, d)`` if ``transposed``
    """
    return _frame(_Reduced, parameters, d, r, transposed)


def vjp(parameters: Tensor, d: int, r: int, is_full: bool, transposed: bool) -> tuple[Tensor, Pull]:
    """Frames of a chart, and the map from their cotangents to those of the parameters.

    For whoever writes out a derivative of his own: nothing is recorded, and the map may be called
    any number of times. Takes autocast to be lifted and gradients to be off.
    """
    chart = _Full if is_full else _Reduced
    parts = chart.parts(parameters, d, r, _refuse_overflow)

    def pull(G: Tensor) -> Tensor:
        return chart.pull_back(parts, G.mT if transposed else G)

    return chart.assemble(parts, transposed), pull


def _frame(chart: type[_Chart], parameters: Tensor, d: int, r: int, transposed: bool) -> Tensor:
    kind = parameters.device.type
    if _is_autocast(kind):
        with torch.autocast(kind, enabled=False):
            return _frame(chart, parameters, d, r, transposed)
    if _is_traced(parameters):
        return _composite(chart, parameters, d, r, transposed)
    if torch.is_grad_enabled() and parameters.requires_grad:
        apply: Callable[..., Tensor] = _Frame.apply
        return apply(parameters, chart, d, r, transposed)
    if _lapack_is_faster(chart, parameters, d, r):
        Q = _by_lapack(chart.reflectors(parameters, d, r))
        return Q.mT if transposed else Q
    return chart.assemble(chart.parts(parameters, d, r, _refuse_overflow), transposed)


def _composite(chart: type[_Chart], parameters: Tensor, d: int, r: int, transposed: bool) -> Tensor:
    """The frame by plain operations: differentiable in every mode, and never looking at a value."""
    return chart.assemble(chart.parts(parameters, d, r, _poison_overflow), transposed)


def _is_autocast(kind: str) -> bool:
    # Of a device without any, as meta, torch refuses to say whether it is on.
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _is_traced(x: Tensor) -> bool:
    """Whether something else than the autograd engine wants to see every operation.

    A compiler, a transform of ``torch.func``, or forward-mode differentiation.
    """
    return (
        torch.compiler.is_compiling()
        or _transforms_active()
        or torch.autograd.forward_ad.unpack_dual(x).tangent is not None
    )


# Not public, but what autograd.Function itself asks; where it is absent, Function refuses to work
# under a transform, with an error of its own.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def _lapack_is_faster(chart: type[_Chart], x: Tensor, d: int, r: int) -> bool:
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
    if chart is _Reduced or torch.get_num_threads() > 1:
        return size < 2**13
    return size < 2**14 or (d < 4 * r and r > 32)


def _by_lapack(Y: Tensor) -> Tensor:
    squares = Y.square().sum(-2).add_(1)
    if not math.isfinite(float(squares.sum())):
        _explain_overflow(squares, *Y.shape[-2:])
    Q: Tensor = torch.linalg.householder_product(Y, squares.reciprocal_().mul_(2))
    return Q


class _Frame(torch.autograd.Function):
    """A chart with its backward written out."""

    @staticmethod
    def forward(
        ctx: Any, parameters: Tensor, chart: type[_Chart], d: int, r: int, transposed: bool
    ) -> Tensor:
        parts = chart.parts(parameters, d, r, _refuse_overflow)
        ctx.save_for_backward(parameters, *parts)
        ctx.chart, ctx.d, ctx.transposed = chart, d, transposed
        return chart.assemble(parts, transposed)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None, None, None]:
        kind = G.device.type
        if _is_autocast(kind):
            with torch.autocast(kind, enabled=False):
                return _Frame.backward(ctx, G)
        parameters, *saved = ctx.saved_tensors
        parts = _Parts(*saved)
        if torch.is_grad_enabled():
            # For a second derivative the parts are needed as functions of the parameters.
            parts = ctx.chart.parts(parameters, ctx.d, parts.M.shape[-1], _poison_overflow)
        gradient = ctx.chart.pull_back(parts, G.mT if ctx.transposed else G)
        return gradient, None, None, None, None


# --- Overflow. ---


def _refuse_overflow(M: Tensor, d: int) -> Tensor:
    """Raise if a squared norm overflowed, where looking is free; else make its frame NaN."""
    if M.device.type != "cpu" or isinstance(M, FakeTensor):
        return _poison_overflow(M, d)
    # The squared norms bound all other entries.
    squares = M.detach().diagonal(dim1=-2, dim2=-1)
    if not math.isfinite(float(squares.sum())):
        _explain_overflow(squares, d, M.shape[-1])
    return M


def _poison_overflow(M: Tensor, d: int) -> Tensor:
    # Infinity would drop its reflector without a trace, since 1 / inf = 0. NaN stays visible.
    return M + (M - M)


def _explain_overflow(squares: Tensor, d: int, r: int) -> None:
    bad = squares.isinf().any(-1)
    if not bool(bad.any()):
        return  # the sum alone overflowed, or there is a NaN, which is passed on
    limit = math.sqrt(torch.finfo(squares.dtype).max)
    raise FrameOverflowError(
        f"{int(bad.sum())} of {bad.numel()} frames of shape ({d}, {r}) have a reflector whose "
        f"squared norm overflows {squares.dtype}; parameters must stay below {limit:.0e}. They get "
        f"there when an optimizer diverges: lower lr, clip gradients, or call "
        f"full_frame(parameters.double(), d, r)"
    )


# --- The two charts. ---


class _Parts(NamedTuple):
    """What a frame is assembled from, and what its backward needs.

    Attributes:
        Y: the reflectors, ``(b, d, r)``; of a reduced chart the lower ``(b, d - r, r)``.
        M: minus ``T^{-T}``, lower triangular, ``(b, r, r)``.
        Zt: ``-Z^T``, ``(b, r, r)``.
    """

    Y: Tensor
    M: Tensor
    Zt: Tensor


_Guard = Callable[[Tensor, int], Tensor]


class _Chart:
    """From parameters to parts to a frame, and from a cotangent of the frame to parameters."""

    @staticmethod
    def reflectors(parameters: Tensor, d: int, r: int) -> Tensor:
        """``Y`` without its unit diagonal, as LAPACK takes it."""
        raise NotImplementedError

    @staticmethod
    def parts(parameters: Tensor, d: int, r: int, guard: _Guard) -> _Parts:
        """Everything but the frame; ``guard`` sees ``M`` before it is divided by."""
        raise NotImplementedError

    @staticmethod
    def assemble(parts: _Parts, transposed: bool) -> Tensor:
        """The frame, ``(b, d, r)``, or ``(b, r, d)``."""
        raise NotImplementedError

    @staticmethod
    def pull_back(parts: _Parts, G: Tensor) -> Tensor:
        """Cotangent of the parameters, from that of the frame, ``(b, d, r)``."""
        raise NotImplementedError


def _add_product(C: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``C + A B``, into ``C`` unless under vmap, which has no rule for that."""
    return torch.baddbmm(C, A, B) if _transforms_active() else C.baddbmm_(A, B)


def _symmetric_factor(W: Tensor, Zt: Tensor, upper: Tensor) -> Tensor:
    K = torch.bmm(W.mT, Zt).mul_(upper)
    return K + K.mT


class _Full(_Chart):
    @staticmethod
    def reflectors(parameters: Tensor, d: int, r: int) -> Tensor:
        P, bottom = _Full._blocks(parameters, d, r)
        return _stacked(P, bottom)

    @staticmethod
    def _blocks(parameters: Tensor, d: int, r: int) -> tuple[Tensor, Tensor | None]:
        """``Y`` without its unit diagonal: the top ``(b, r, r)``, and ``(b, d - r, r)`` if any."""
        b, split = parameters.shape[0], r * (r - 1) // 2
        constants = _constants(r, parameters)
        if not split:
            zero = torch.zeros_like(constants.eye).expand(b, r, r)
            return zero, parameters.reshape(b, d - r, r)
        bottom = parameters[:, split:].reshape(b, d - r, r) if d > r else None
        packed = parameters.index_select(-1, constants.unpack).view(b, r, r)
        return packed.mul_(constants.lower), bottom

    @staticmethod
    def parts(parameters: Tensor, d: int, r: int, guard: _Guard) -> _Parts:
        constants = _constants(r, parameters)
        P, bottom = _Full._blocks(parameters, d, r)
        top = P + constants.eye
        # The Gram matrix of Y with its ones and its linear part added last: summed with the rest,
        # a one would round away small entries, at ten times the loss of orthogonality.
        gram = torch.bmm(P.mT, P)
        if bottom is not None:
            gram = _add_product(gram, bottom.mT, bottom)
        M = guard(gram.add_(top).mul_(constants.minus), d)
        # A solve from the right takes row-major operands without a copy.
        Zt = torch.linalg.solve_triangular(M, top, upper=False, left=False)
        return _Parts(_stacked(top, bottom), M, Zt)

    @staticmethod
    def assemble(parts: _Parts, transposed: bool) -> Tensor:
        Y, _, Zt = parts
        Q = torch.bmm(Zt, Y.mT) if transposed else torch.bmm(Y, Zt.mT)
        Q.diagonal(dim1=-2, dim2=-1).add_(1)
        return Q

    @staticmethod
    def pull_back(parts: _Parts, G: Tensor) -> Tensor:
        Y, M, Zt = parts
        b, d, r = Y.shape
        constants = _constants(r, Y)
        # W^T with the sign of M; its operand is column-major, as the solve likes it.
        W = torch.linalg.solve_triangular(M.mT, torch.bmm(Y.mT, G).mT, upper=True, left=False)
        gradient = _add_product(torch.bmm(Y, _symmetric_factor(W, Zt, constants.upper)), G, Zt)
        top = (gradient[:, :r] + W).reshape(b, r * r).index_select(-1, constants.pack)
        if d == r:
            return top
        return torch.cat((top, gradient[:, r:].reshape(b, (d - r) * r)), -1)


def _stacked(top: Tensor, bottom: Tensor | None) -> Tensor:
    return top if bottom is None else torch.cat((top, bottom), 1)


class _Reduced(_Chart):
    @staticmethod
    def reflectors(parameters: Tensor, d: int, r: int) -> Tensor:
        b = parameters.shape[0]
        return torch.cat((parameters.new_zeros(b, r, r), parameters.view(b, d - r, r)), 1)

    @staticmethod
    def parts(parameters: Tensor, d: int, r: int, guard: _Guard) -> _Parts:
        constants, b = _constants(r, parameters), parameters.shape[0]
        B = parameters.view(b, d - r, r)
        M = guard(torch.bmm(B.mT, B).add_(constants.eye).mul_(constants.minus), d)
        eye = constants.eye.expand(b, r, r)
        return _Parts(B, M, torch.linalg.solve_triangular(M, eye, upper=False, left=False))

    @staticmethod
    def assemble(parts: _Parts, transposed: bool) -> Tensor:
        B, _, Zt = parts
        eye = _constants(Zt.shape[-1], Zt).eye
        # Few rows times a square, in either case: few columns would take several times as long.
        bottom = torch.bmm(B, Zt.mT)
        if transposed:
            return torch.cat((Zt + eye, bottom.mT), 2)
        return torch.cat((Zt.mT + eye, bottom), 1)

    @staticmethod
    def pull_back(parts: _Parts, G: Tensor) -> Tensor:
        B, _, Zt = parts
        b, rest, r = B.shape
        top, bottom = G[:, :r], G[:, r:]
        # Zt is the inverse of M here, which the frame itself was made of: a product will do.
        W = torch.bmm(torch.baddbmm(top, B.mT, bottom).mT, Zt.mT)
        K = _symmetric_factor(W, Zt, _constants(r, B).upper)
        return _add_product(torch.bmm(B, K), bottom, Zt).reshape(b, rest * r)
