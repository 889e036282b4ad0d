r"""`SpectralTTManifold`: the total space of spectral tensor trains, as a geoopt product.

Set: :math:`St(d_1, r_1) \times \dots \times St(d_n, r_n) \times \mathbb{R}^m`, one Stiefel factor
for each core of the merged chain and a Euclidean factor for the coordinates of the spectrum.

Representation: geoopt's flat vector. Frames of equal shape lie next to each other, so that every
operation treats them as one batch, without a copy; the spectrum comes last.

Tangent space and metric: those of the factors; the Euclidean metric everywhere, for which the
tangent projection of a frame is :math:`u - x \operatorname{sym}(x^\top u)`. (geoopt's default
``Stiefel()`` is the canonical variant, whose retraction is not of first order.)

The map to weights, :math:`(U_k, \theta, V_k) \mapsto W`, is constant on the orbits of the gauge;
the metric is invariant under it, so that the Riemannian gradient of a cost of ``W`` is horizontal
by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold._geoopt import (
    Euclidean,
    EuclideanStiefel,
    ManifoldParameter,
    ManifoldTensor,
    ProductManifold,
)
from sttp_manifold.errors import ShapeError
from sttp_manifold.frames.gauge import haar_frame
from sttp_manifold.frames.retractions import cholesky_qr, polar, project_tangent
from sttp_manifold.manifolds.horizontal import vertical_part
from sttp_manifold.spectrum import SpectrumMap, hold_spectrum
from sttp_manifold.tt.contract import left_frame, right_frame
from sttp_manifold.tt.decompose import tt_svd
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["FrameGroup", "SpectralTTManifold"]

BatchMap = Callable[..., Tensor]


class FrameGroup(NamedTuple):
    """Frames of equal shape, adjacent in the flat vector.

    Attributes:
        span: where they lie: ``x[..., span].unflatten(-1, (count, d, r))`` is their batch.
        count: how many frames.
        d: rows of each.
        r: columns of each.
    """

    span: slice
    count: int
    d: int
    r: int


class SpectralTTManifold(ProductManifold):
    r"""Product of the Stiefel manifolds of all cores and a Euclidean spectrum.

    Args:
        shape: the plan; its merged chain gives the factors.
        spectrum: name of the spectrum map whose coordinates are the Euclidean factor:
            ``"identity"`` has none, ``"free"`` the spectrum itself, ``"bounded"`` coordinates of
            the open box ``|s| < bound``, ``"normalized"`` and ``"full"`` as in
            :mod:`sttp_manifold.spectrum`.
        bound: the bound ``L`` of ``"bounded"``.

    Shape:
        - points and vectors: ``(*b, n_elements)``

    Raises:
        SpectrumError: an unknown spectrum, or a bound that is not positive.

    Note:
        ``dist`` and ``logmap`` raise ``NotImplementedError``, as geoopt's Euclidean Stiefel does:
        there is no closed form. :meth:`weight_dist` compares the weights that points stand for.

    Example:
        >>> M = SpectralTTManifold(TTShape.for_matrix(12, 10, rank=3))
        >>> x = M.random_parameter()
        >>> M.unpack(x).to_matrix().shape
        torch.Size([12, 10])
        >>> M.total_dim - M.gauge_dim == M.dim
        True
    """

    def __init__(self, shape: TTShape, spectrum: str = "free", bound: float = 1.0) -> None:
        plan = shape.merged
        frames = plan.frame_shapes
        spectrum_map = SpectrumMap(spectrum, plan.rank, bound)
        kinds = list(dict.fromkeys(frames))
        order = sorted(range(len(frames)), key=lambda k: kinds.index(frames[k]))
        stiefel = EuclideanStiefel()
        factors = [(stiefel, frames[k]) for k in order]
        size = math.prod(spectrum_map.coordinate_shape)
        if size:
            coordinates = spectrum_map.coordinate_shape
            factors.append((Euclidean(ndim=len(coordinates)), coordinates))
        super().__init__(*factors)
        self.shape = shape
        self.spectrum = spectrum
        self.bound = bound
        self.map = spectrum_map
        self.frame_groups: list[FrameGroup] = []
        self._start = [0] * len(frames)
        position = 0
        for d, r in kinds:
            members = [k for k in order if frames[k] == (d, r)]
            for offset, k in enumerate(members):
                self._start[k] = position + offset * d * r
            span = slice(position, position + len(members) * d * r)
            self.frame_groups.append(FrameGroup(span, len(members), d, r))
            position = span.stop
        self.spectrum_slice = slice(position, position + size)

    # -- counts ---------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """Dimension of the set of weights, ``shape.dim(spectrum)``."""
        return self.shape.dim(self.spectrum)

    @property
    def total_dim(self) -> int:
        """Dimension of this product: the total space of the merged chain."""
        return self.shape.merged.total_dim(self.spectrum)

    @property
    def gauge_dim(self) -> int:
        """Dimension of the gauge orbits, ``total_dim - dim``."""
        return self.shape.merged.gauge_dim(self.spectrum)

    def extra_repr(self) -> str:
        """Plan and spectrum, for printing."""
        bound = f", bound={self.bound}" if self.spectrum == "bounded" else ""
        return f"{self.shape}, spectrum={self.spectrum!r}{bound}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    # -- points and weights ---------------------------------------------------------------------

    def unpack(self, x: Tensor) -> SpectralTT:
        """The weight that a point stands for; differentiable, and views where possible.

        Shape:
            - x: ``(*b, n_elements)``

        Raises:
            ShapeError: a vector of another length.
        """
        self._assert_length(x, "unpack(x)")
        return SpectralTT(*self._cores(x, self.map), shape=self.shape)

    def pack(self, tt: SpectralTT, *, project: bool = False) -> Tensor:
        """Point that stands for a weight.

        Args:
            tt: a weight on the same plan.
            project: take the nearest weight that the spectrum can hold.

        Returns:
            A plain tensor ``(*b, n_elements)``.

        Raises:
            ShapeError: a weight on another plan.
            SpectrumError: a weight that the spectrum cannot hold, unless ``project``.
        """
        if tt.shape.merged != self.shape.merged:
            raise ShapeError(
                f"a weight on {tt.shape!r} is not a point over {self.shape!r}; "
                "M.from_matrix(tt.to_matrix()) finds one that is near"
            )
        tt = hold_spectrum(tt, self.map, project=project)
        first, s = tt.right[0], tt.spectrum
        if self.spectrum == "identity":
            first = s[..., None, None] * first
        frames = [*map(left_frame, tt.left), right_frame(first), *map(right_frame, tt.right[1:])]
        order = sorted(range(len(frames)), key=lambda k: self._start[k])
        parts = [frames[k].flatten(-2) for k in order]
        coordinates = self.map.inverse(s, project=self.spectrum != "bounded")
        return torch.cat([*parts, coordinates.flatten(len(tt.batch_shape))], -1)

    def from_matrix(self, W: Tensor, *, project: bool = False) -> ManifoldTensor:
        """Point whose weight is the TT-SVD of a matrix.

        Shape:
            - W: ``(*b, d_out, d_in)``
            - output: ``(*b, n_elements)``

        Raises:
            ShapeError: a matrix of another size, or not finite.
            SpectrumError: a matrix that the spectrum cannot hold, unless ``project``.
        """
        return ManifoldTensor(self.pack(tt_svd(W, self.shape), project=project), manifold=self)

    def random(
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> ManifoldTensor:
        """Random point: every frame from the Haar measure, spectrum coordinates from U(1/2, 3/2).

        Args:
            size: shape of the point as in geoopt, ending in ``n_elements``; nothing for one point.
            dtype: floating dtype, torch's default if absent.
            device: device of the result.
            generator: source of randomness.

        Raises:
            ShapeError: a size that does not end in ``n_elements``.
        """
        batch = self._batch_of(size, "random")
        options = {"dtype": dtype, "device": device, "generator": generator}
        parts = [
            haar_frame(g.d, g.r, *batch, g.count, **options).flatten(-3)  # type: ignore[arg-type]
            for g in self.frame_groups
        ]
        spectrum = self.spectrum_slice.stop - self.spectrum_slice.start
        parts.append(torch.rand(*batch, spectrum, **options) + 0.5)  # type: ignore[call-overload]
        return ManifoldTensor(torch.cat(parts, -1), manifold=self)

    def random_parameter(
        self,
        *batch: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> ManifoldParameter:
        """Random point as a trainable ``geoopt.ManifoldParameter``, ``(*batch, n_elements)``."""
        point = self.random(
            *batch, self.n_elements, dtype=dtype, device=device, generator=generator
        )
        return ManifoldParameter(point, manifold=self)

    def origin(
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> ManifoldTensor:
        """The point of truncated identities and unit spectrum coordinates; ``seed`` has no effect.

        Raises:
            ShapeError: a size that does not end in ``n_elements``.
        """
        batch = self._batch_of(size, "origin")
        eyes = [
            torch.eye(g.d, g.r, dtype=dtype, device=device)
            .expand(*batch, g.count, g.d, g.r)
            .flatten(-3)
            for g in self.frame_groups
        ]
        spectrum = self.map.initial(*batch, dtype=dtype, device=device).flatten(len(batch))
        return ManifoldTensor(torch.cat([*eyes, spectrum], -1), manifold=self)

    def weight_dist(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Gauge-invariant distance of points: :math:`\|W(x) - W(y)\|_F`, ``(*b,)``."""
        return self.unpack(x).distance(self.unpack(y))

    def same_weight(
        self, x: Tensor, y: Tensor, rtol: float | None = None, atol: float = 0.0
    ) -> bool:
        """Whether points differ by a gauge only; see :meth:`SpectralTT.allclose`."""
        return self.unpack(x).allclose(self.unpack(y), rtol=rtol, atol=atol)

    def weight_decay_grad(self, x: Tensor) -> Tensor:
        r"""Gradient of :math:`\tfrac12 \|W(x)\|_F^2` in the total space.

        The norm depends on the spectrum alone; the frames' part is zero.
        """
        gradient = torch.zeros_like(x)
        coordinates = x[..., self.spectrum_slice].detach()
        if self.spectrum in ("free", "full"):
            gradient[..., self.spectrum_slice] = coordinates
        elif self.spectrum != "identity":
            with torch.enable_grad():
                theta = coordinates.clone().requires_grad_()
                energy = self.map(theta).square().sum() / 2
                gradient[..., self.spectrum_slice] = torch.autograd.grad(energy, theta)[0]
        return gradient

    # -- gauge ----------------------------------------------------------------------------------

    def vertical(self, x: Tensor, u: Tensor) -> Tensor:
        """Part of a tangent vector along the gauge orbit of ``x``: it does not move the weight.

        Shape:
            - x, u: ``(*b, n_elements)``
        """
        x, u = torch.broadcast_tensors(x, u)
        bonds = list(range(1, len(self._start)))
        centre = len(self.shape.merged.out_modes)
        cores, vectors = self._chain(x), self._chain(u)
        if self.spectrum == "full":
            bonds.append(len(self._start))
        elif self.spectrum != "identity":
            bonds.remove(centre)
        parts = vertical_part(cores, vectors, bonds)
        along = torch.zeros_like(u[..., self.spectrum_slice])
        if self.spectrum == "full":
            along = parts.pop(centre).squeeze(-2).flatten(-2)
        elif self.spectrum == "normalized":
            theta, v = x[..., self.spectrum_slice], u[..., self.spectrum_slice]
            along = theta * ((theta * v).sum(-1, True) / theta.square().sum(-1, True))
        frames = [*map(left_frame, parts[:centre]), *map(right_frame, parts[centre:])]
        order = sorted(range(len(frames)), key=lambda k: self._start[k])
        return torch.cat([*(frames[k].flatten(-2) for k in order), along], -1)

    def horizontal(self, x: Tensor, u: Tensor) -> Tensor:
        """Part of a tangent vector orthogonal to the gauge orbit of ``x``.

        The Riemannian gradient of a cost of the weight is horizontal already.

        Shape:
            - x, u: ``(*b, n_elements)``
        """
        return u - self.vertical(x, u)

    def _chain(self, x: Tensor) -> list[Tensor]:
        """Cores in the order of the chain, with a full bond as a core of mode one."""
        left, bond, right = self._cores(x, lambda theta: theta)
        if self.spectrum == "full":
            return [*left, bond.unsqueeze(-2), *right]
        return [*left, *right]

    def _cores(
        self, x: Tensor, spectrum: Callable[[Tensor], Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
        plan = self.shape.merged
        cores = []
        for k, ((a, mode, b), (d, r)) in enumerate(
            zip(plan.core_shapes, plan.frame_shapes, strict=True)
        ):
            frame = x.narrow(-1, self._start[k], d * r).unflatten(-1, (d, r))
            if k < len(plan.out_modes):
                cores.append(frame.unflatten(-2, (a, mode)))
            else:
                cores.append(frame.mT.unflatten(-1, (mode, b)))
        coordinates = x[..., self.spectrum_slice]
        if self.spectrum == "full":
            coordinates = coordinates.unflatten(-1, self.map.coordinate_shape)
        split = len(plan.out_modes)
        return tuple(cores[:split]), spectrum(coordinates), tuple(cores[split:])

    # -- geoopt's contract, equal frames as one batch ---------------------------------------------

    def _on_factors(self, on_frames: BatchMap, on_spectrum: BatchMap, *tensors: Tensor) -> Tensor:
        """Apply maps to the batches of equal frames and to the spectrum, and join the results."""
        tensors = torch.broadcast_tensors(*tensors)
        parts = []
        for span, count, d, r in self.frame_groups:
            batches = (t[..., span].unflatten(-1, (count, d, r)) for t in tensors)
            parts.append(on_frames(*batches).flatten(-3))
        parts.append(on_spectrum(*(t[..., self.spectrum_slice] for t in tensors)))
        return torch.cat(parts, -1)

    def projx(self, x: Tensor) -> Tensor:
        """Nearest point: the polar factor of every frame; the spectrum stays."""
        return self._on_factors(
            lambda frame: polar(frame, torch.zeros_like(frame)), lambda theta: theta, x
        )

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Orthogonal projection onto the tangent space of the product."""
        return self._on_factors(project_tangent, _second, x, u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient of a Euclidean one: the tangent projection."""
        return self.proju(x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retraction by the Q factor of ``x + u`` in every frame, first order."""
        return self._on_factors(cholesky_qr, torch.add, x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map of the product, by matrix exponentials of size ``2r``."""
        return self._on_factors(EuclideanStiefel().expmap, torch.add, x, u)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport to ``y`` by tangent projection."""
        return self.proju(y, v)

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Retraction of ``u`` and transport of ``v`` to the new point."""
        y = self.retr(x, u)
        return y, self.proju(y, v)

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport of ``v`` along the retraction of ``u``."""
        return self.retr_transp(x, u, v)[1]

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Exponential map of ``u`` and transport of ``v`` to the new point."""
        y = self.expmap(x, u)
        return y, self.proju(y, v)

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport of ``v`` along the exponential map of ``u``."""
        return self.expmap_transp(x, u, v)[1]

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Euclidean inner product of tangent vectors, ``(*b,)``."""
        x, u, v = torch.broadcast_tensors(x, u, u if v is None else v)
        return (u * v).sum(-1, keepdim=keepdim)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Inner products factor by factor, spread over the elements of each frame."""
        return self._on_factors(
            lambda a, b: (a * b).sum((-2, -1), keepdim=True).expand_as(a),
            torch.mul,
            *torch.broadcast_tensors(u, u if v is None else v, x)[:2],
        )

    def _batch_of(self, size: tuple[int | tuple[int, ...], ...], name: str) -> tuple[int, ...]:
        flat: list[int] = []
        for entry in size:
            flat.extend([entry] if isinstance(entry, int) else entry)
        if flat and flat[-1] != self.n_elements:
            raise ShapeError(
                f"{name}(*size) takes a shape ending in n_elements = {self.n_elements}, got "
                f"{tuple(flat)}; M.{name}() gives one point, "
                f"M.{name}(8, {self.n_elements}) a batch of eight"
            )
        return tuple(flat[:-1])

    def _assert_length(self, x: Tensor, call: str) -> None:
        if x.ndim < 1 or x.shape[-1] != self.n_elements:
            raise ShapeError(
                f"{call} takes a flat point (*b, {self.n_elements}), got {tuple(x.shape)}"
            )


def _second(_: Tensor, u: Tensor) -> Tensor:
    return u
