"""`SpectralTT`, the value: left cores, spectrum, right cores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from sttp_manifold._arguments import explained_class
from sttp_manifold.display import bars_text, box_html, curves_svg
from sttp_manifold.errors import ShapeError
from sttp_manifold.tt.contract import (
    bond_of_difference,
    form_last,
    frobenius,
    group_cores,
    left_frame,
    left_matrix,
    mirror,
    right_frame,
    right_matrix,
    rows_at,
    rows_times_u,
    rows_times_ut,
    rows_times_v,
    rows_times_vt,
    scaled_left,
    times_bond,
)
from sttp_manifold.tt.diagram import diagram_svg, diagram_text
from sttp_manifold.tt.plans import LinearPlan, Plan, cheapest_cut, linear_steps
from sttp_manifold.tt.precision import closeness, widened
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.validate import (
    check_pair,
    check_parts,
    check_places,
    check_rows,
    common_batch,
    shape_of_cores,
)

__all__ = ["SpectralTT"]


@explained_class
@dataclass(frozen=True, eq=False, repr=False)
class SpectralTT:
    r"""A weight :math:`W = U \operatorname{diag}(s) V^\top` held as two orthonormal tensor trains.

    ``U`` is the product of ``left`` cores whose left unfoldings ``(R_{k-1} n_k, R_k)`` have
    orthonormal columns, ``V^T`` that of ``right`` cores whose right unfoldings
    ``(R_{k-1}, m_k R_k)`` have orthonormal rows; then ``U`` and ``V`` are orthonormal frames and
    the singular values of ``W`` are ``|s|`` ([STTP] Prop. 1). The spectrum may also be a *full
    bond* ``S``, an ``r x r`` matrix: then ``W = U S V^T``.

    The value is frozen and keeps dtype, device and batch dimensions of its tensors; nothing is
    copied. Cores are not checked to be orthonormal or finite: :func:`~sttp_manifold.tt_svd` and
    :func:`~sttp_manifold.orthogonalize` make values that have it, and
    :meth:`orthonormality_error` measures it.

    Args:
        left: cores of ``U``, outermost first.
        spectrum: ``s`` or the full bond ``S``.
        right: cores of ``V^T``, from the centre outwards.
        shape: the user's plan, whose merged chain the cores follow; derived from the cores if
            absent.

    Shape:
        - left: ``(*b, R_{k-1}, n_k, R_k)``
        - spectrum: ``(*b, r)`` or ``(*b, r, r)``
        - right: ``(*b, R_{k-1}, m_k, R_k)``

    Raises:
        ShapeError: cores that do not chain, or do not follow ``shape``; mixed dtypes or devices;
            numbers that are not real floating-point ones.

    Example:
        >>> W = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
        >>> from sttp_manifold import tt_svd
        >>> tt = tt_svd(W, TTShape.for_matrix(4, 3, rank=2))
        >>> bool(torch.allclose(tt.to_matrix(), W))
        True
    """

    left: tuple[Tensor, ...]
    spectrum: Tensor
    right: tuple[Tensor, ...]
    shape: TTShape = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        given = cast("TTShape | None", self.shape)
        try:
            object.__setattr__(self, "left", tuple(self.left))
            object.__setattr__(self, "right", tuple(self.right))
            if given is not None and self._follows(given.merged):
                return
        except (AttributeError, TypeError):
            check_parts(self.left, self.right, given)
        own = shape_of_cores(self.left, self.spectrum, self.right)
        if given is None:
            object.__setattr__(self, "shape", own)
        elif own.merged != given.merged:
            raise ShapeError(
                f"cores of shapes {own.core_shapes} do not follow {given!r}, whose stored "
                f"cores have shapes {given.merged.core_shapes}"
            )

    def _follows(self, plan: TTShape) -> bool:
        """Whether all fits a plan; cheap and without messages, since every forward asks."""
        s = self.spectrum
        batch = self.left[0].shape[:-3] if self.left else torch.Size()
        expected = [(*batch, *shape) for shape in plan.core_shapes]
        cores = (*self.left, *self.right)
        return (
            len(self.left) == len(plan.out_modes)
            and [tuple(core.shape) for core in cores] == expected
            and tuple(s.shape) in ((*batch, plan.rank), (*batch, plan.rank, plan.rank))
            and s.is_floating_point()
            and all(core.dtype == s.dtype and core.device == s.device for core in cores)
        )

    # -- what it is -----------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Common dtype of cores and spectrum."""
        return self.spectrum.dtype

    @property
    def device(self) -> torch.device:
        """Common device of cores and spectrum."""
        return self.spectrum.device

    @property
    def batch_shape(self) -> torch.Size:
        """Leading batch dimensions ``b``, shared by cores and spectrum."""
        return self.left[0].shape[:-3]

    @property
    def is_full(self) -> bool:
        """Whether the spectrum is a full ``r x r`` bond."""
        return self.spectrum.ndim - len(self.batch_shape) == 2

    @property
    def bond(self) -> Tensor:
        """The centre as a matrix ``(*b, r, r)``, diagonal unless the bond is full."""
        return self.spectrum if self.is_full else torch.diag_embed(self.spectrum)

    def singular_values(self) -> Tensor:
        """Singular values of ``W``, descending, ``(*b, r)``; the rest of its spectrum is zero."""
        if self.is_full:
            return torch.linalg.svdvals(widened(self.spectrum)).to(self.dtype)
        return self.spectrum.abs().sort(dim=-1, descending=True).values

    def norm(self) -> Tensor:
        """Frobenius norm of ``W``, ``(*b,)``."""
        return frobenius(self.spectrum, (-2, -1) if self.is_full else (-1,))

    def frames(self) -> tuple[Tensor, Tensor]:
        """Orthonormal frames ``U`` of shape ``(*b, d_out, r)`` and ``V``, ``(*b, d_in, r)``."""
        return left_matrix(self.left), right_matrix(self.right).mT

    def core_frames(self) -> tuple[Tensor, ...]:
        """Frames ``(*b, d, r)`` behind the cores: left unfoldings, then right ones transposed."""
        return (*map(left_frame, self.left), *map(right_frame, self.right))

    def orthonormality_error(self) -> Tensor:
        """Largest entry of ``|Q^T Q - I|`` over all core frames and batches, a scalar."""
        errors = []
        for frame in map(widened, self.core_frames()):  # products would be rounded again
            eye = torch.eye(frame.shape[-1], dtype=frame.dtype, device=self.device)
            error = (frame.mT @ frame - eye).abs()
            errors.append(error.amax() if error.numel() else error.sum())
        return torch.stack(errors).amax()

    # -- what it does ---------------------------------------------------------------------------

    def to_matrix(self) -> Tensor:
        """The dense weight ``W``, ``(*b, d_out, d_in)``."""
        cores = (*scaled_left(self.left, self.spectrum), *self.right)
        cut = cheapest_cut(self._stored)
        product = left_matrix(cores[:cut]) @ right_matrix(cores[cut:])
        return product.reshape(*self.batch_shape, self.shape.d_out, self.shape.d_in)

    def matvec(self, x: Tensor) -> Tensor:
        """``W x`` without forming ``W`` unless that is the cheapest way.

        Shape:
            - x: ``(*b, *n, d_in)`` with any ``n``
            - output: ``(*b, *n, d_out)``

        Raises:
            ShapeError: if ``x`` does not end in ``d_in``, does not start with ``b``, or has
                another dtype.
        """
        return self._multiply(x, "matvec", self.shape.d_in)

    def rmatvec(self, y: Tensor) -> Tensor:
        """``W^T y``, with the roles of the two sides exchanged.

        Shape:
            - y: ``(*b, *n, d_out)``
            - output: ``(*b, *n, d_in)``

        Raises:
            ShapeError: if ``y`` does not end in ``d_out``, does not start with ``b``, or has
                another dtype.
        """
        return self._multiply(y, "rmatvec", self.shape.d_out)

    def _multiply(self, x: Tensor, name: str, size: int) -> Tensor:
        batch = self.batch_shape
        check_rows(x, name, self.spectrum, batch, size)
        rows = x.reshape(*batch, math.prod(x.shape[len(batch) : -1]), size)
        plan = linear_steps(self._stored, rows.shape[-2])
        multiply = self._rows_times_wt if name == "matvec" else self._rows_times_w
        product = multiply(rows, plan)
        return product.reshape(*x.shape[:-1], product.shape[-1])

    def _rows_times_wt(self, rows: Tensor, plan: LinearPlan | Plan) -> Tensor:
        plan = LinearPlan.named(plan, len(self.right))
        bond = self.spectrum.mT if self.is_full else self.spectrum
        if plan.name == "dense":
            return rows @ self.to_matrix().mT
        inner = self._times_bond(rows_times_v(form_last(self.right, plan.formed), rows), bond)
        if plan.left:
            return inner @ left_matrix(self.left).mT
        return rows_times_ut(self.left, inner)

    def _rows_times_w(self, rows: Tensor, plan: LinearPlan | Plan) -> Tensor:
        plan = LinearPlan.named(plan, len(self.right))
        if plan.name == "dense":
            return rows @ self.to_matrix()
        inner = rows @ left_matrix(self.left) if plan.left else rows_times_u(self.left, rows)
        inner = self._times_bond(inner, self.spectrum)
        return rows_times_vt(form_last(self.right, plan.formed), inner)

    @property
    def _stored(self) -> TTShape:
        """The chain as its cores are stored: merged, or as the modes are written."""
        merged = self.shape.merged
        sizes = (len(self.left), len(self.right))
        is_merged = sizes == (len(merged.out_modes), len(merged.in_modes))
        return merged if is_merged else self.shape

    def _times_bond(self, matrix: Tensor, bond: Tensor) -> Tensor:
        return times_bond(matrix, bond, len(self.batch_shape))

    def entries(self, i: Tensor, j: Tensor) -> Tensor:
        """``W[i, j]`` for index tensors of one shape, without forming ``W``.

        Args:
            i: rows, of any integer dtype; negative ones count from the end.
            j: columns, likewise.

        Shape:
            - i, j: ``(*P)``, ``-d_out <= i < d_out`` and ``-d_in <= j < d_in``
            - output: ``(*b, *P)``

        Raises:
            ShapeError: index tensors of different shapes, or not of integers.
            PlaceError: places outside of ``W``; an ``IndexError`` as well.

        Example:
            >>> W = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
            >>> from sttp_manifold import tt_svd
            >>> tt_svd(W, TTShape.svd(4, 3, rank=2)).entries([0, -1], [2, 0])
            tensor([2.0000, 9.0000], dtype=torch.float64)
        """
        i, j = check_places(i, j, self.shape.d_out, self.shape.d_in, self.device)
        rows = rows_at(scaled_left(self.left, self.spectrum), i.flatten())
        found = (rows * rows_at(mirror(self.right), j.flatten(), reverse=True)).sum(-1)
        return found.reshape((*self.batch_shape, *i.shape))

    # -- other representatives ------------------------------------------------------------------

    def merged(self) -> SpectralTT:
        """The same weight on the merged chain: square cores absorbed by their inner neighbour."""
        plan = self.shape.merged
        if tuple(c.shape[-3:] for c in (*self.left, *self.right)) == plan.core_shapes:
            return self
        left = group_cores(self.left, plan.left_core_shapes)
        right = group_cores(self.right, plan.right_core_shapes)
        return SpectralTT(left, self.spectrum, right, self.shape)

    def distance(self, other: SpectralTT) -> Tensor:
        r"""Frobenius distance :math:`\|W - W'\|_F` of two weights, ``(*b,)``, never forming them.

        Two values are the same weight when they differ by a gauge; this distance cannot tell them
        apart. Small distances are accurate to rounding of the norms; half precision is computed
        in float32. Batch dimensions broadcast. Not differentiable: torch has no derivative of a
        triangular factor alone. A cost takes entries, products or the matrix instead.

        Raises:
            ShapeError: what is no weight; weights of different sizes, dtypes or devices, or of
                batch shapes that do not broadcast.
        """
        a, b = self.merged(), other.merged()
        check_pair("distance", (a.shape, b.shape), (a.spectrum, b.spectrum))
        batch = common_batch(a.batch_shape, b.batch_shape)
        a, b = (tt._expand(batch)._map(widened) for tt in (a, b))
        bond = bond_of_difference((a.left, a.bond, a.right), (b.left, b.bond, b.right))
        return frobenius(bond, (-2, -1)).to(self.dtype)

    def allclose(self, other: SpectralTT, rtol: float | None = None, atol: float = 0.0) -> bool:
        """Equality up to gauge: ``distance <= atol + rtol * max(norms)`` in every batch.

        ``rtol`` defaults to ``1e-10`` in float64, ``1e-5`` in float32 and 16 roundings in half
        precision. Weights that are not finite are equal to none.

        Raises:
            ShapeError: weights that have no :meth:`distance`.
        """
        if rtol is None:
            rtol = closeness(self.dtype)
        distance = self.distance(other)
        scale = torch.maximum(self.norm(), other.norm())
        return bool(((distance <= atol + rtol * scale) & distance.isfinite()).all())

    def _expand(self, batch: torch.Size) -> SpectralTT:
        single = len(self.batch_shape)
        return self._map(lambda t: t.expand(*batch, *t.shape[single:]))

    def to(self, *args: Any, **kwargs: Any) -> SpectralTT:
        """As :meth:`torch.Tensor.to`, applied to every core and the spectrum."""
        return self._map(lambda t: t.to(*args, **kwargs))

    def detach(self) -> SpectralTT:
        """The same value outside of the autograd graph."""
        return self._map(torch.Tensor.detach)

    def clone(self) -> SpectralTT:
        """A copy that shares no memory."""
        return self._map(torch.Tensor.clone)

    def _map(self, function: Callable[[Tensor], Tensor]) -> SpectralTT:
        return replace(
            self,
            left=tuple(map(function, self.left)),
            spectrum=function(self.spectrum),
            right=tuple(map(function, self.right)),
        )

    def __repr__(self) -> str:
        batch = f", batch {tuple(self.batch_shape)}" if self.batch_shape else ""
        bond = ", full bond" if self.is_full else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"SpectralTT({self.shape}{bond}{batch}, {dtype}, {self.device})"

    def __str__(self) -> str:
        """For a terminal: diagram of the merged chain, spectrum, counts."""
        chain = self.shape.merged
        drawing = diagram_text(chain.out_modes, chain.in_modes, chain.ranks, full=self.is_full)
        lines = [f"SpectralTT: {self._title()}", *drawing.split("\n")]
        if not self.batch_shape:
            bars = "on the meta device" if self.spectrum.is_meta else bars_text(*self._curves())
            lines.append(f"singular values  {bars}")
        lines.append(self._counts())
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        chain = self.shape.merged
        drawing = diagram_svg(chain.out_modes, chain.in_modes, chain.ranks, full=self.is_full)
        if not self.spectrum.is_meta and self.spectrum.numel():
            drawing += curves_svg(self._curves(), "singular values")
        return box_html(
            f"<b>SpectralTT</b> {self._title()}",
            f"<div style='white-space:nowrap'>{drawing}</div>",
            f"<small>{self._counts()}, modes {self.shape}</small>",
        )

    def _title(self) -> str:
        batch = f"batch {tuple(self.batch_shape)} of " if self.batch_shape else ""
        size = f"{self.shape.d_out} x {self.shape.d_in}, rank {self.shape.rank}"
        bond = ", full bond" if self.is_full else ""
        return f"{batch}{size}{bond}, {str(self.dtype).removeprefix('torch.')} on {self.device}"

    def _counts(self) -> str:
        dim = self.shape.dim("full" if self.is_full else "free")
        return f"dimension {dim:,}, dense {self.shape.numel:,}"

    def _curves(self) -> list[list[float]]:
        """Singular values of each batch, NaN where the weight is not finite."""
        tt = self.detach()
        if tt.is_full and not bool(tt.spectrum.isfinite().all()):
            values = tt.spectrum[..., 0] * math.nan  # LAPACK may refuse those
        else:
            values = tt.singular_values()
        return values.double().cpu().reshape(-1, values.shape[-1]).tolist()
