r"""`SpectralTTManifold`: the total space of spectral tensor trains, as a geoopt product.

Set: :math:`St(d_1, r_1) \times \dots \times St(d_n, r_n) \times \mathbb{R}^m`, one Stiefel factor
for each core of the merged chain and a Euclidean factor for the coordinates of the spectrum.

Representation: geoopt's flat vector, laid out by
:class:`~sttp_manifold.manifolds.grouped.GroupedProduct`: frames of equal shape lie next to each
other and are handled as one batch; the spectrum comes last.

Tangent space and metric: those of the factors; the Euclidean metric everywhere, for which the
tangent projection of a frame is :math:`u - x \operatorname{sym}(x^\top u)`. (geoopt's default
``Stiefel()`` is the canonical variant, whose retraction is not of first order.)

The map to weights, :math:`(U_k, \theta, V_k) \mapsto W`, is constant on the orbits of the gauge;
the metric is invariant under it, so that the Riemannian gradient of a cost of ``W`` is horizontal
by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sttp_manifold._arguments import explained, explained_class
from sttp_manifold._geoopt import ManifoldTensor
from sttp_manifold.errors import ShapeError
from sttp_manifold.frames.gauge import haar_frame
from sttp_manifold.manifolds.grouped import GroupedProduct
from sttp_manifold.manifolds.horizontal import vertical_part
from sttp_manifold.manifolds.weight_points import WeightPoints, broadcast_vectors
from sttp_manifold.spectrum import hold_spectrum, spectrum_map
from sttp_manifold.tt.contract import left_frame, right_frame
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["SpectralTTManifold"]


@explained_class
class SpectralTTManifold(WeightPoints, GroupedProduct):
    r"""Product of the Stiefel manifolds of all cores and a Euclidean spectrum.

    Args:
        shape: the plan; its merged chain gives the factors.
        spectrum: name of the spectrum map whose coordinates are the Euclidean factor:
            ``"identity"`` has none, ``"free"`` the spectrum itself, ``"bounded"`` coordinates of
            the open box ``|s| < bound``, ``"normalized"`` and ``"full"`` as in
            :mod:`sttp_manifold.spectrum`; ``"fixed"`` has none.
        bound: the bound ``L`` of ``"bounded"``.
        values: the singular values of ``"fixed"``, evenly spread up to 1 if absent; kept in
            descending order.

    Shape:
        - points and vectors: ``(*b, n_elements)``

    Raises:
        SpectrumError: an unknown spectrum, a bound that is not positive, or values that are not
            ``r`` positive numbers.

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

    @explained
    def __init__(
        self,
        shape: TTShape,
        spectrum: str = "free",
        bound: float = 1.0,
        values: Sequence[float] | None = None,
    ) -> None:
        plan = shape.merged
        map_ = spectrum_map(spectrum, plan.rank, bound, values)
        super().__init__(plan.frame_shapes, map_.coordinate_shape)
        self.shape = shape
        self.spectrum = spectrum
        self.bound = bound
        self.values = map_.values
        self.map = map_

    # -- counts ---------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """Dimension of the set of weights, ``shape.dim(spectrum, values)``."""
        return self.shape.dim(self.spectrum, self.values)

    @property
    def total_dim(self) -> int:
        """Dimension of this product: the total space of the merged chain."""
        return self.shape.merged.total_dim(self.spectrum)

    @property
    def gauge_dim(self) -> int:
        """Dimension of the gauge orbits, ``total_dim - dim``."""
        return self.shape.merged.gauge_dim(self.spectrum, self.values)

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
        return SpectralTT(*self.cores(x, self.map), shape=self.shape)

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
        if self.map.is_constant:  # what is not one of it are signs
            first = torch.where(s < 0, -1.0, 1.0).to(s.dtype)[..., None, None] * first
        frames = [*map(left_frame, tt.left), right_frame(first), *map(right_frame, tt.right[1:])]
        coordinates = self.map.inverse(s, project=self.spectrum != "bounded")
        return self.join(frames, coordinates.flatten(len(tt.batch_shape)))

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
        parts = [
            haar_frame(
                g.d, g.r, *batch, g.copies, dtype=dtype, device=device, generator=generator
            ).flatten(-3)
            for g in self.frame_groups
        ]
        count = self.spectrum_slice.stop - self.spectrum_slice.start
        parts.append(
            torch.rand(*batch, count, dtype=dtype, device=device, generator=generator) + 0.5
        )
        return ManifoldTensor(torch.cat(parts, -1), manifold=self)

    def origin(
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> ManifoldTensor:
        """The point of truncated identities and unit spectrum coordinates.

        Args:
            size: as for :meth:`random`.
            dtype: floating dtype, torch's default if absent.
            device: device of the result.
            seed: has no effect; geoopt's signature has it.

        Raises:
            ShapeError: a size that does not end in ``n_elements``.
        """
        batch = self._batch_of(size, "origin")
        eyes = [
            torch.eye(g.d, g.r, dtype=dtype, device=device)
            .expand(*batch, g.copies, g.d, g.r)
            .flatten(-3)
            for g in self.frame_groups
        ]
        spectrum = self.map.initial(*batch, dtype=dtype, device=device).flatten(len(batch))
        return ManifoldTensor(torch.cat([*eyes, spectrum], -1), manifold=self)

    def weight_decay_grad(self, x: Tensor) -> Tensor:
        """Gradient of ``|W(x)|^2 / 2``, the Frobenius norm, in the total space.

        The norm depends on the spectrum alone; the frames' part is zero.
        """
        (x,) = broadcast_vectors(self.n_elements, x)
        gradient = torch.zeros_like(x)
        coordinates = x[..., self.spectrum_slice].detach()
        if self.spectrum in ("free", "full"):
            gradient[..., self.spectrum_slice] = coordinates
        elif not self.map.is_constant:
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
        x, u = broadcast_vectors(self.n_elements, x, u)
        bonds = list(range(1, len(self._starts)))
        centre = len(self.shape.merged.out_modes)
        cores, vectors = self._chain(x), self._chain(u)
        if self.spectrum == "full":
            bonds.append(len(self._starts))
        elif self.spectrum != "identity":
            bonds.remove(centre)
        acting = {}
        if self.values is not None and len(set(self.values)) < len(self.values):
            bonds.append(centre)
            values = torch.tensor(self.values, dtype=torch.float64, device=x.device)
            acting = {centre: values[:, None] == values}
        parts = vertical_part(cores, vectors, bonds, acting)
        along = torch.zeros_like(u[..., self.spectrum_slice])
        if self.spectrum == "full":
            along = parts.pop(centre).squeeze(-2).flatten(-2)
        elif self.spectrum == "normalized":
            theta, v = x[..., self.spectrum_slice], u[..., self.spectrum_slice]
            along = theta * ((theta * v).sum(-1, True) / theta.square().sum(-1, True))
        frames = [*map(left_frame, parts[:centre]), *map(right_frame, parts[centre:])]
        return self.join(frames, along)

    def horizontal(self, x: Tensor, u: Tensor) -> Tensor:
        """Part of a tangent vector orthogonal to the gauge orbit of ``x``.

        The Riemannian gradient of a cost of the weight is horizontal already.

        Shape:
            - x, u: ``(*b, n_elements)``
        """
        return u - self.vertical(x, u)

    def _chain(self, x: Tensor) -> list[Tensor]:
        """Cores in the order of the chain, with a full bond as a core of mode one."""
        left, bond, right = self.cores(x, lambda theta: theta)
        if self.spectrum == "full":
            return [*left, bond.unsqueeze(-2), *right]
        return [*left, *right]

    def cores(
        self, x: Tensor, spectrum: Callable[[Tensor], Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
        """Cores of ``U``, ``spectrum`` of the coordinates, and cores of ``V^T``, as views."""
        plan = self.shape.merged
        cores = []
        for k, ((a, mode, b), (d, r)) in enumerate(
            zip(plan.core_shapes, plan.frame_shapes, strict=True)
        ):
            frame = x.narrow(-1, self._starts[k], d * r).unflatten(-1, (d, r))
            if k < len(plan.out_modes):
                cores.append(frame.unflatten(-2, (a, mode)))
            else:
                cores.append(frame.mT.unflatten(-1, (mode, b)))
        coordinates = x[..., self.spectrum_slice]
        if self.spectrum == "full":
            coordinates = coordinates.unflatten(-1, self.map.coordinate_shape)
        split = len(plan.out_modes)
        return tuple(cores[:split]), spectrum(coordinates), tuple(cores[split:])
