"""`SpectralWeight`, what the two ways to hold a weight have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold._geoopt import ManifoldParameter
from sttp_manifold.chart import ChartPoint, HouseholderChart
from sttp_manifold.errors import ShapeError
from sttp_manifold.nn import formed, frame_batch
from sttp_manifold.nn.batch_plan import Plan
from sttp_manifold.nn.initial import initial_point, kept_values, kind_of
from sttp_manifold.nn.layout import Layout
from sttp_manifold.nn.nearest import nearest_frames
from sttp_manifold.nn.torch_state import circumstances, has_values, outside_autocast
from sttp_manifold.nn.weight_state import StatefulWeight
from sttp_manifold.spectrum import spectrum_map
from sttp_manifold.tt.contract import left_matrix, right_matrix, times_bond
from sttp_manifold.tt.precision import computing_dtype
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["SpectralWeight", "formed_each"]

# A value farther from orthonormal than this is no SpectralTT, whatever its rounding; that of
# bfloat16 alone comes to 4e-3.
_ORTHONORMAL = 1e-3
# Types of tensors of which all is known.
_ORDINARY = (Tensor, nn.Parameter, ManifoldParameter)
# Forms that are each other's transposes.
_TRANSPOSED = {"factors": "rows", "rows": "factors"}


class SpectralWeight(StatefulWeight, ABC):
    r"""A trainable matrix :math:`W = U \operatorname{diag}(s) V^\top` in spectral TT form.

    Base of the two ways to hold one; made by :func:`make_weight`. Each call computes it anew, for
    its caller to keep.

    Args:
        shape: the plan.
        spectrum: one of ``identity``, ``free``, ``normalized``, ``bounded``, ``full``, ``fixed``.
        init: ``"eye"`` (all frame coordinates zero: truncated identities up to sign),
            ``"noisy_eye"`` (normal with deviation ``init_std`` around it), ``"random"`` (frames
            from the Haar measure), each with a unit spectrum; or a value to take over. At one seed
            all methods start from one weight.
        bound: bound of ``"bounded"``.
        init_std: deviation for ``"noisy_eye"``.
        values: singular values of ``"fixed"``; by default those of a value as ``init``, else
            evenly spread up to 1.
        project: with a value as ``init``, take the nearest one that the spectrum can hold.
        dtype: floating dtype; that of the value, or torch's default.
        device: likewise.

    Attributes:
        shape: the plan.
        spectrum: name of the spectrum map.
        bound: bound of the spectrum map ``"bounded"``.
        values: the constant singular values of ``"fixed"``, perhaps with signs, a buffer; None
            for the others. A state that is loaded brings its own.
        method: name of the way, ``"householder"`` or ``"riemannian"``.

    Raises:
        ShapeError: ``shape`` is no TTShape, an unknown ``init``, or a value on another plan.
        SpectrumError: an unknown spectrum, a value that it cannot hold, or ``values`` that are not
            ``r`` positive numbers.

    References:
        [STTP] Sec. 3.
    """

    @explained
    def __init__(
        self,
        shape: TTShape,
        spectrum: str = "free",
        init: str | SpectralTT = "noisy_eye",
        bound: float = 1.0,
        init_std: float = 1e-4,
        *,
        values: Sequence[float] | None = None,
        project: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(shape, TTShape):
            raise ShapeError(
                f"{type(self).__name__} takes a TTShape, got {shape!r}; call "
                f"{type(self).__name__}(TTShape.for_matrix(d_out, d_in, rank=16))"
            )
        self.shape, self.spectrum, self.bound = shape, spectrum, bound
        values = kept_values(shape, spectrum, init, values)
        self.map = spectrum_map(spectrum, shape.rank, bound, values)
        self.register_buffer("values", None)
        dtype, device = kind_of(init, dtype, device)
        chart = HouseholderChart(shape, spectrum, bound, self.map.values)
        point = initial_point(chart, init, init_std, dtype, device)
        self._begin(chart, point, dtype, device)
        self._keep_values(point, dtype, device)
        if isinstance(init, SpectralTT) and has_values(init.spectrum, *self._tensors()):
            self.encode_(init, project=project)

    @abstractmethod
    def _begin(
        self, chart: HouseholderChart, point: ChartPoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make the parameters, of a weight that is given in coordinates of a chart."""

    def _keep_values(self, point: ChartPoint, dtype: torch.dtype, device: torch.device) -> None:
        """Hold the singular values of a fixed spectrum as a buffer, which then decides."""
        if self.map.values is not None:
            self.values = torch.tensor(self.map.values, dtype=dtype, device=device)
            self._follow_values()

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the parameters."""

    @property
    def layout(self) -> Layout | None:
        """Where its numbers lie in its vector; None for a weight that is always formed alone."""
        return None

    @abstractmethod
    def _tensors(self) -> tuple[Tensor, ...]:
        """What the weight is computed from, as it is stored now: its vector, perhaps signs."""

    @abstractmethod
    def _value_of(self, tensors: Sequence[Tensor]) -> SpectralTT:
        """The weight of such tensors by plain operations, in float32 at least."""

    @abstractmethod
    def _set(self, tt: SpectralTT, project: bool) -> None:
        """Move the parameters to an orthonormal, unbatched value."""

    @abstractmethod
    def bond(self) -> Tensor:
        """The spectrum, or the full bond, without computing a frame.

        Shape:
            - output: ``(r,)``, for a full bond ``(r, r)``
        """

    @property
    def trainable(self) -> bool:
        """Whether any parameter is; a weight without parameters counts as trainable."""
        parameters = list(self.parameters())
        return not parameters or any(p.requires_grad for p in parameters)

    def tt(self) -> SpectralTT:
        """The weight as a value, differentiable in the parameters."""
        cores = self._formed("cores")
        split = len(self.shape.merged.out_modes)
        return SpectralTT(cores[:split], cores[split], cores[split + 1 :], self.shape)

    def forward(self) -> Tensor:
        """The dense weight ``W``.

        Shape:
            - output: ``(d_out, d_in)``
        """
        return self._formed("dense")[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two factors of the weight, ``U diag(s)`` and ``V^T``; not to be written into.

        Shape:
            - first: ``(d_out, r)``
            - second: ``(r, d_in)``
        """
        us, vt = self._formed("factors")
        return us, vt

    def row_factors(self) -> tuple[Tensor, Tensor]:
        """The same two as a batch of rows is multiplied by them, ``V`` and ``diag(s) U^T``.

        Not to be written into. As a rule they are transposes of what :meth:`factors` gives, made
        without a node of the graph.

        Shape:
            - first: ``(d_in, r)``
            - second: ``(r, d_out)``
        """
        if type(self).factors is not SpectralWeight.factors:  # a value of its own
            us, vt = self.factors()
            return vt.t(), us.t()
        v, su = self._formed("rows")
        return v, su

    def _formed(self, form: str) -> tuple[Tensor, ...]:
        """The weight in a form: of the running forward, or formed now."""
        return formed_each([self], form)[0]

    def _read(self) -> Tensor:
        """The dense weight for who only reads it: in a forward, one for all that ask so.

        Foreign code reads `layer.weight` up to twelve times a forward. It is formed once, and kept
        under the same conditions as what is formed for all.
        """
        tensors, layout = self._tensors(), self.layout
        if torch.compiler.is_compiling() or layout is None or not self._is_plain(tensors):
            return self._formed("dense")[0]
        state = circumstances()
        scope = None if state is None else formed.running(self)
        if state is None or scope is None:
            return self._formed("dense")[0]
        self._look()
        found = formed.take(self, "dense", tensors, state) or scope.kept(self, "dense", tensors)
        if found is None:
            plan = _plan_of((layout,), "dense", computing_dtype(self.dtype), self.device)
            (found,), ticket = frame_batch.form(plan, [frame_batch.Wanted(tensors, self._in_form)])
            ticket.give(0)
            entry = formed.Entry(tensors, found, partial(ticket.give, 0), taken=True)
            scope.keep(self, "dense", entry, partial(setattr, ticket, "closed", True))
        return found[0]

    def _look(self) -> None:
        """Look at the parameters before the weight is formed; nothing to see here."""

    def _is_plain(self, tensors: Sequence[Tensor]) -> bool:
        """Whether nothing but these tensors, ordinary ones, decides what the weight is.

        A subclass may depend on more, as a parametrized module does, and of a subclass of Tensor
        nobody knows what it does.
        """
        layout, first = self.layout, tensors[0]
        return (
            layout is not None
            and type(self).__mro__[1] is SpectralWeight
            and first.shape == (layout.size,)
            and all(
                type(t) in _ORDINARY
                and t.dtype == first.dtype
                and t.device == first.device
                and t.layout == torch.strided
                and not t.is_meta
                and not t.is_inference()
                for t in tensors
            )
        )

    def _in_form(self, tensors: Sequence[Tensor], form: str) -> tuple[Tensor, ...]:
        """The weight of such tensors in a form, by plain operations."""
        dtype = tensors[0].dtype
        with outside_autocast(tensors[0].device):
            tt = self._value_of(tensors)
            if form == "dense":
                return (tt.to_matrix().to(dtype),)
            if form == "factors":
                us = times_bond(left_matrix(tt.left), tt.spectrum, 0)
                return us.to(dtype), right_matrix(tt.right).to(dtype)
            if form == "rows":
                return _transposed(self._in_form(tensors, "factors"))
            return tuple(t.to(dtype) for t in (*tt.left, tt.spectrum, *tt.right))

    @explained
    @torch.no_grad()
    def encode_(self, tt: SpectralTT, project: bool = False) -> SpectralWeight:
        """Take over a weight, in place, exact to rounding.

        The weight keeps its own dtype and device. An optimizer's state (momentum) speaks of the
        old coordinates and does not follow.

        Args:
            tt: the value, on the same plan.
            project: take the nearest weight that the spectrum can hold.

        Returns:
            The module itself.

        Raises:
            ShapeError: a value on another plan, with batch dimensions, or whose cores are not
                orthonormal.
            SpectrumError: a value that the spectrum cannot hold, unless ``project``.
        """
        if not isinstance(tt, SpectralTT):
            raise ShapeError(
                f"encode_ takes a SpectralTT, got {type(tt).__name__}; for a matrix call "
                "weight.encode_(tt_svd(W, weight.shape))"
            )
        if not has_values(tt.spectrum, *self._tensors()):
            raise ShapeError(
                f"encode_ needs values: the weight is on {self.device}, the value on {tt.device}; "
                "call weight.to_empty(device='cpu') first, or load_state_dict(..., assign=True)"
            )
        if tt.batch_shape:
            raise ShapeError(
                f"a weight is one matrix, got a batch of shape {tuple(tt.batch_shape)}"
            )
        with outside_autocast(self.device):
            self._take_over(tt, project)
        return self

    def _take_over(self, tt: SpectralTT, project: bool) -> None:
        given = tt.dtype
        self._follow_values()
        wide = torch.promote_types(computing_dtype(self.dtype), tt.dtype)
        tt = tt.detach().to(self.device, wide)
        error = float(tt.orthonormality_error())
        if not error <= max(_ORTHONORMAL, 2 * torch.finfo(given).eps):
            raise ShapeError(
                f"the cores are not orthonormal (error {error:.2g}): they hold no spectral form; "
                "orthogonalize(tt.left, tt.spectrum, tt.right) makes one"
            )
        if given != wide:
            tt = nearest_frames(tt)
            if self.spectrum == "bounded":  # half precision rounds singular values onto the bound
                limit = self.bound * (1 + torch.finfo(given).eps)
                project = project or bool((tt.singular_values() <= limit).all())
        if self.map.values is not None and tt.shape.merged == self.shape.merged:
            # Their own rounding, and that of the value, is no other spectrum.
            own = torch.tensor(self.map.values, dtype=wide, device=tt.device)
            near = 2 * max(torch.finfo(dtype).eps for dtype in (given, self.dtype)) * own[0]
            project = project or bool(((tt.singular_values() - own).abs() <= near).all())
        self._set(tt, project)

    def extra_repr(self) -> str:
        """Size, plan and spectrum, for printing."""
        bound = f", bound={self.bound}" if self.spectrum == "bounded" else ""
        return (
            f"{self.shape.d_out} x {self.shape.d_in}, modes {self.shape}, "
            f"spectrum={self.spectrum!r}{bound}"
        )


def formed_each(weights: Sequence[SpectralWeight], form: str) -> list[tuple[Tensor, ...]]:
    """Weights in a form: each of the running forward, and the others formed now by one call.

    Args:
        weights: the weights, of one method, dtype and device.
        form: ``"dense"``, ``"factors"``, ``"rows"`` (the same two factors as a batch of rows is
            multiplied by them, ``V`` and ``diag(s) U^T``) or ``"cores"``.
    """
    found: list[tuple[Tensor, ...] | None] = [None] * len(weights)
    alone: list[tuple[int, Layout, tuple[Tensor, ...]]] = []
    state = None if torch.compiler.is_compiling() else circumstances()
    for k, weight in enumerate(weights):
        weight._look()
        tensors = weight._tensors()
        if state is not None:
            found[k] = formed.take(weight, form, tensors, state)
            if found[k] is None and form in _TRANSPOSED:
                other = formed.take(weight, _TRANSPOSED[form], tensors, state)
                found[k] = None if other is None else _transposed(other)
        if found[k] is not None:
            continue
        layout = weight.layout if state is not None and weight._is_plain(tensors) else None
        if layout is None or layout.is_views:
            found[k] = weight._in_form(tensors, form)
        else:
            alone.append((k, layout, tensors))
    if alone:
        layouts = tuple(layout for _, layout, _ in alone)
        first = weights[alone[0][0]]
        plan = _plan_of(layouts, form, computing_dtype(first.dtype), first.device)
        wanted = [frame_batch.Wanted(tensors, weights[k]._in_form) for k, _, tensors in alone]
        made, ticket = frame_batch.form(plan, wanted)
        for i, (k, _, _) in enumerate(alone):
            found[k] = made[i]
            ticket.give(i)
        ticket.closed = True
    return [one for one in found if one is not None]


def _transposed(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(factor.t() for factor in reversed(factors))


@lru_cache(maxsize=256)
def _plan_of(
    layouts: tuple[Layout, ...], form: str, dtype: torch.dtype, device: torch.device
) -> Plan:
    return Plan(layouts, (form,) * len(layouts), dtype, device)
