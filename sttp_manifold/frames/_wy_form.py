r"""The two charts of frames in compact WY form: value and derivative, written out.

In the notation of :mod:`~sttp_manifold.frames.householder`, with :math:`M = T^{-1}` and
:math:`Z = M^{-1} Y_{top}^\top`, the frame is :math:`Q = E - Y Z`. For a cotangent :math:`G` of the
frame,

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
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from sttp_manifold.errors import FrameOverflowError

__all__ = [
    "Chart",
    "FullChart",
    "Parts",
    "ReducedChart",
    "chart_of",
    "explain_overflow",
    "is_watched",
    "poison_overflow",
    "refuse_overflow",
    "strictly_lower",
    "transforms_active",
]


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
        one: a one, which is added by fewer calls than a number.
    """

    unpack: Tensor
    pack: Tensor
    lower: Tensor
    upper: Tensor
    minus: Tensor
    eye: Tensor
    one: Tensor


_KEPT: dict[tuple[int, torch.dtype, torch.device], _Constants] = {}
_KEEP = 256


# Not public, but what autograd.Function itself asks; where it is absent, Function refuses to work
# under a transform, with an error of its own.
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_watched() -> bool:
    """Whether a compiler or the tracer of TorchScript writes down what is done."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _constants(r: int, like: Tensor) -> _Constants | _Made:
    key = (r, like.dtype, like.device)
    if is_watched() or isinstance(like, FakeTensor):
        return _Made(*key)
    kept = _KEPT.get(key)
    if kept is None:
        # A tensor born in inference mode could not be used for a gradient later.
        with torch.inference_mode(False), torch.no_grad():
            made = _Made(*key)
            kept = _Constants(*(getattr(made, name) for name in _Constants._fields))
        if type(kept.eye) is Tensor:  # not those of a tracer
            if len(_KEPT) >= _KEEP:
                _KEPT.clear()
            _KEPT[key] = kept
    return kept


class _Made:
    """The same, each made when it is asked for: a graph holds no more of them than it needs."""

    def __init__(self, r: int, dtype: torch.dtype, device: torch.device) -> None:
        self._r, self._dtype, self._device = r, dtype, device

    @property
    def unpack(self) -> Tensor:
        i = torch.arange(self._r, device=self._device)
        return torch.where(i[:, None] > i, (i * (i - 1) // 2)[:, None] + i, 0).flatten()

    @property
    def pack(self) -> Tensor:
        # By arithmetic, which a compiler puts into the gather.
        k = torch.arange(self._r * (self._r - 1) // 2, device=self._device)
        i = ((8 * k + 1).float().sqrt() / 2 + 0.5).long()  # row i begins at i (i - 1) / 2
        i = i + (i * (i + 1) // 2 <= k).long() - (i * (i - 1) // 2 > k).long()  # rounded by one
        return i * self._r + k - i * (i - 1) // 2

    @property
    def lower(self) -> Tensor:
        return self._ones.tril(-1)

    @property
    def upper(self) -> Tensor:
        return self._ones.triu(1) + self.eye / 2

    @property
    def minus(self) -> Tensor:
        return -(self._ones.tril(-1) + self.eye / 2)

    @property
    def eye(self) -> Tensor:
        return torch.eye(self._r, dtype=self._dtype, device=self._device)

    @property
    def one(self) -> Tensor:
        return torch.ones((), dtype=self._dtype, device=self._device)

    @property
    def _ones(self) -> Tensor:
        return torch.ones(self._r, self._r, dtype=self._dtype, device=self._device)


def strictly_lower(r: int, like: Tensor) -> Tensor:
    """Flat positions of the strictly lower triangle of an ``r x r`` matrix, row by row."""
    return _constants(r, like).pack


# --- Overflow. ---


def refuse_overflow(M: Tensor, d: int) -> Tensor:
    """Raise if a squared norm overflowed, where looking is free; else make its frame NaN."""
    if M.device.type != "cpu" or isinstance(M, FakeTensor):
        return poison_overflow(M, d)
    if not math.isfinite(float(M.detach().sum())):
        # The squared norms bound all other entries.
        explain_overflow(M.detach().diagonal(dim1=-2, dim2=-1), d, M.shape[-1])
    return M


def poison_overflow(M: Tensor, d: int) -> Tensor:
    # Infinity would drop its reflector without a trace, since 1 / inf = 0. NaN stays visible.
    return M + (M - M)


def explain_overflow(squares: Tensor, d: int, r: int) -> None:
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


class Parts(NamedTuple):
    """What a frame is assembled from, and what its backward needs.

    Attributes:
        Y: the reflectors with their ones, ``(b, d, r)``; of a reduced chart ``B``, the rows below
            those, ``(b, d - r, r)``.
        M: minus ``T^{-T}``, lower triangular, ``(b, r, r)``.
        Zt: ``-Z^T``, ``(b, r, r)``.
    """

    Y: Tensor
    M: Tensor
    Zt: Tensor


_Guard = Callable[[Tensor, int], Tensor]


class Chart:
    """From parameters to reflectors to parts to a frame, and from its cotangent back."""

    @staticmethod
    def size(d: int, r: int) -> int:
        """Parameters of a frame."""
        raise NotImplementedError

    @staticmethod
    def unpack(parameters: Tensor, d: int, r: int) -> Tensor:
        """Reflectors without their ones, ``(b, d, r)``; of a reduced chart ``(b, d - r, r)``."""
        raise NotImplementedError

    @staticmethod
    def pack(Y: Tensor, d: int, r: int) -> Tensor:
        """Parameters, or their cotangent, of reflectors, or of theirs."""
        raise NotImplementedError

    @staticmethod
    def from_lapack(Y: Tensor, r: int) -> Tensor:
        """Reflectors as LAPACK takes them, ``(b, d, r)``."""
        raise NotImplementedError

    @staticmethod
    def parts(Y: Tensor, guard: _Guard) -> Parts:
        """Everything but the frame; ``guard`` sees ``M`` before it is divided by.

        Args:
            Y: reflectors without their ones, which are written into it if nothing is recorded.
            guard: given ``M`` and ``d``, returns ``M``.
        """
        raise NotImplementedError

    @staticmethod
    def assemble(parts: Parts, transposed: bool) -> Tensor:
        """The frame, ``(b, d, r)``, or ``(b, r, d)``."""
        raise NotImplementedError

    @staticmethod
    def pull_back(parts: Parts, G: Tensor) -> Tensor:
        """Cotangent of the reflectors, from that of the frame, ``(b, d, r)``."""
        raise NotImplementedError


def _add_product(C: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``C + A B``, into ``C`` unless under vmap, which has no rule for that."""
    return torch.baddbmm(C, A, B) if transforms_active() else C.baddbmm_(A, B)


def _t(X: Tensor) -> Tensor:
    return X.transpose(1, 2)  # mT is one more call each time


def _symmetric_factor(W: Tensor, Zt: Tensor, upper: Tensor) -> Tensor:
    K = torch.bmm(_t(W), Zt).mul_(upper)
    return K + _t(K)


class FullChart(Chart):
    """Reflectors that are unit lower trapezoidal."""

    @staticmethod
    def size(d: int, r: int) -> int:
        """See the base class."""
        return d * r - r * (r + 1) // 2

    @staticmethod
    def unpack(parameters: Tensor, d: int, r: int) -> Tensor:
        """See the base class."""
        b, split = parameters.shape[0], r * (r - 1) // 2
        constants = _constants(r, parameters)
        if split:
            top = parameters.index_select(-1, constants.unpack).view(b, r, r).mul_(constants.lower)
        else:
            top = torch.zeros_like(constants.eye).repeat(b, 1, 1)
        if d == r > 1:
            return top
        return torch.cat((top, parameters[:, split:].reshape(b, d - r, r)), 1)

    @staticmethod
    def pack(Y: Tensor, d: int, r: int) -> Tensor:
        """See the base class."""
        b = Y.shape[0]
        top = Y[:, :r].reshape(b, r * r).index_select(-1, _constants(r, Y).pack)
        return top if d == r else torch.cat((top, Y[:, r:].reshape(b, (d - r) * r)), -1)

    @staticmethod
    def from_lapack(Y: Tensor, r: int) -> Tensor:
        """See the base class."""
        return Y

    @staticmethod
    def parts(Y: Tensor, guard: _Guard) -> Parts:
        """See the base class."""
        d, r = Y.shape[-2:]
        constants = _constants(r, Y)
        # The Gram matrix of Y with its ones and its linear part added last: summed with the rest,
        # a one would round away small entries, at ten times the loss of orthogonality.
        gram = torch.bmm(_t(Y), Y)
        if torch.is_grad_enabled() or transforms_active() or is_watched():
            Y = Y + pad(constants.eye, (0, 0, 0, d - r))
        else:
            Y.diagonal(dim1=-2, dim2=-1).add_(constants.one)
        top = Y[:, :r]
        M = guard(gram.add_(top).mul_(constants.minus), d)
        # A solve from the right takes row-major operands without a copy.
        return Parts(Y, M, torch.linalg.solve_triangular(M, top, upper=False, left=False))

    @staticmethod
    def assemble(parts: Parts, transposed: bool) -> Tensor:
        """See the base class."""
        Y, _, Zt = parts
        Q = torch.bmm(Zt, _t(Y)) if transposed else torch.bmm(Y, _t(Zt))
        constants, below = _constants(Zt.shape[-1], Zt), Y.shape[1] - Y.shape[2]
        if is_watched():  # inductor warns where it takes a diagonal
            return Q + pad(constants.eye, (0, below, 0, 0) if transposed else (0, 0, 0, below))
        Q.diagonal(dim1=-2, dim2=-1).add_(constants.one)
        return Q

    @staticmethod
    def pull_back(parts: Parts, G: Tensor) -> Tensor:
        """See the base class."""
        Y, M, Zt = parts
        r = Y.shape[-1]
        # W^T with the sign of M; its operand is column-major, as the solve likes it.
        W = torch.linalg.solve_triangular(
            _t(M),
            _t(torch.bmm(_t(Y), G)),
            upper=True,
            left=False,
        )
        K = _symmetric_factor(W, Zt, _constants(r, Y).upper)
        gradient = _add_product(torch.bmm(Y, K), G, Zt)
        gradient[:, :r].add_(W)
        return gradient


class ReducedChart(Chart):
    """Reflectors ``[I; B]``."""

    @staticmethod
    def size(d: int, r: int) -> int:
        """See the base class."""
        return r * (d - r)

    @staticmethod
    def unpack(parameters: Tensor, d: int, r: int) -> Tensor:
        """See the base class."""
        return parameters.view(parameters.shape[0], d - r, r)

    @staticmethod
    def pack(Y: Tensor, d: int, r: int) -> Tensor:
        """See the base class."""
        return Y.reshape(Y.shape[0], (d - r) * r)

    @staticmethod
    def from_lapack(Y: Tensor, r: int) -> Tensor:
        """See the base class."""
        return torch.cat((Y.new_zeros(Y.shape[0], r, r), Y), 1)

    @staticmethod
    def parts(Y: Tensor, guard: _Guard) -> Parts:
        """See the base class."""
        r = Y.shape[-1]
        constants = _constants(r, Y)
        M = guard(
            torch.bmm(_t(Y), Y).add_(constants.eye).mul_(constants.minus),
            Y.shape[-2] + r,
        )
        eye = constants.eye.expand(Y.shape[0], r, r)
        return Parts(Y, M, torch.linalg.solve_triangular(M, eye, upper=False, left=False))

    @staticmethod
    def assemble(parts: Parts, transposed: bool) -> Tensor:
        """See the base class."""
        B, _, Zt = parts
        eye = _constants(Zt.shape[-1], Zt).eye
        # Few rows times a square, in either case: few columns would take several times as long.
        bottom = torch.bmm(B, _t(Zt))
        if transposed:
            return torch.cat((Zt + eye, _t(bottom)), 2)
        return torch.cat((_t(Zt) + eye, bottom), 1)

    @staticmethod
    def pull_back(parts: Parts, G: Tensor) -> Tensor:
        """See the base class."""
        B, _, Zt = parts
        r = B.shape[-1]
        top, bottom = G[:, :r], G[:, r:]
        # Zt is the inverse of M here, which the frame itself was made of: a product will do.
        W = torch.bmm(_t(torch.baddbmm(top, _t(B), bottom)), _t(Zt))
        K = _symmetric_factor(W, Zt, _constants(r, B).upper)
        return _add_product(torch.bmm(B, K), bottom, Zt)


def chart_of(full: bool) -> type[Chart]:
    """The full chart, or the reduced one."""
    return FullChart if full else ReducedChart
