r"""Points of fixed TT rank: their coordinates, and which coordinates are points.

A point is the flat vector of the total space ``SpectralTTManifold(shape, "full")``: cores of ``U``
and ``V`` with orthonormal unfoldings and the bond ``S`` between them. A weight has many such
vectors, which differ by a gauge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sttp_manifold._arguments import explained, explained_class
from sttp_manifold._geoopt import Manifold, ManifoldTensor
from sttp_manifold.errors import ManifoldError, SpectrumError
from sttp_manifold.frames.gauge import haar_frame
from sttp_manifold.manifolds.bond_sets import bond_set
from sttp_manifold.manifolds.fixed_tt_geometry import Point, Vector
from sttp_manifold.manifolds.geometry import plain
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.manifolds.weight_points import WeightPoints, broadcast_vectors
from sttp_manifold.spectrum import SpectrumMap, hold_spectrum
from sttp_manifold.tt.contract import left_frame, mirror, mirrored_frame
from sttp_manifold.tt.decompose import qr_sweep
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FixedTTPoints"]

RETRACTIONS = ("svd", "qr")


@explained_class
class FixedTTPoints(WeightPoints, Manifold):
    """The set and its coordinates; :class:`~sttp_manifold.FixedTTRankManifold` adds the geometry.

    The arguments are described there.
    """

    name = "FixedTTRank"
    ndim = 1
    reversible = False

    @explained
    def __init__(
        self,
        shape: TTShape,
        spectrum: str | Sequence[float] = "full",
        *,
        retraction: str | None = None,
        damping: float = 0.0,
    ) -> None:
        super().__init__()
        if retraction is not None and retraction not in RETRACTIONS:
            names = ", ".join(map(repr, RETRACTIONS))
            raise ManifoldError(f"unknown retraction {retraction!r}; expected one of {names}")
        if not 0 <= damping < 1:
            raise ManifoldError(
                f"damping is a fraction of the largest singular value, 0 <= damping < 1, as in "
                f"damping=1e-8; got {damping!r}"
            )
        self.shape = shape
        self.spectrum = spectrum if isinstance(spectrum, str) else tuple(map(float, spectrum))
        self.retraction = retraction or "svd"
        self._training_retraction = retraction or "qr"
        self.damping = float(damping)
        self.centre = bond_set(self.spectrum, shape.rank)
        self.total_space = SpectralTTManifold(shape, "full")
        self.n_elements = int(self.total_space.n_elements)

    # -- counts ---------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """Dimension: ``shape.dim("full")`` less what the spectrum takes away."""
        return self.shape.dim("full") - self.centre.lost

    def extra_repr(self) -> str:
        """Plan, spectrum and options, for printing."""
        damping = f", damping={self.damping:g}" if self.damping else ""
        return f"{self.shape}, spectrum={self.spectrum!r}, retraction={self.retraction!r}{damping}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    # -- points and weights ---------------------------------------------------------------------

    def unpack(self, x: Tensor) -> SpectralTT:
        """The weight of a point, with a full bond; differentiable, views where possible.

        Shape:
            - x: ``(*b, n_elements)``

        Raises:
            ShapeError: a vector of another length.
        """
        return self.total_space.unpack(x)

    def pack(self, tt: SpectralTT, *, project: bool = False) -> Tensor:
        """Point of a weight.

        Args:
            tt: a weight on the same plan, of its full TT rank.
            project: take the nearest singular values that the spectrum allows.

        Returns:
            A plain tensor ``(*b, n_elements)``.

        Raises:
            ShapeError: a weight on another plan.
            SpectrumError: singular values that the spectrum does not allow, unless ``project``.
            ManifoldError: a weight whose TT rank is lower than that of the plan.
        """
        tt = hold_spectrum(tt, SpectrumMap("full", self.shape.rank))
        bond = self.centre.nearest(tt.spectrum)
        if not project:
            error = float(self.centre.distance(tt.spectrum))
            if not error <= 1e4 * torch.finfo(tt.dtype).eps * max(1.0, float(bond.abs().amax())):
                raise SpectrumError(
                    f"spectrum={self.spectrum!r} does not hold this weight, which is {error:.2g} "
                    "away from it; pass project=True for the nearest singular values"
                )
            bond = tt.spectrum
        x = self.total_space.pack(SpectralTT(tt.left, bond, tt.right, tt.shape))
        ok, reason = self._check_rank(plain(x))
        if not ok:
            raise ManifoldError(
                f"{reason}; truncate(tt, rank=...) gives the plan that this weight fills"
            )
        return x

    def random(
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> ManifoldTensor:
        """Random point: Haar frames, singular values from U(1/2, 3/2) unless they are given.

        Args:
            size: shape of the point as in geoopt, ending in ``n_elements``; nothing for one point.
            dtype: floating dtype, torch's default if absent.
            device: device of the result.
            generator: source of randomness.

        Raises:
            ShapeError: a size that does not end in ``n_elements``.
        """
        options: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
        x = self.total_space.random(*size, **options).as_subclass(Tensor)
        r, batch = self.shape.rank, x.shape[:-1]
        values = torch.rand(*batch, r, **options) + 0.5
        turns = [haar_frame(r, r, *batch, **options) for _ in range(2)]
        bond = self.centre.nearest((turns[0] * values.unsqueeze(-2)) @ turns[1].mT)
        x[..., self.total_space.spectrum_slice] = bond.flatten(-2)
        return ManifoldTensor(x, manifold=self)

    def origin(
        self,
        *size: int | tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> ManifoldTensor:
        """A fixed point: :meth:`random` from a seed.

        Truncated identities would not do: chains of them have less than full TT rank.

        Raises:
            ShapeError: a size that does not end in ``n_elements``.
        """
        generator = torch.Generator().manual_seed(42 if seed is None else seed)
        # Drawn on the CPU, so that it is the same point on every device.
        x = self.random(*size, dtype=dtype, device="cpu", generator=generator)
        if device is None:
            device = torch.get_default_device()
        return ManifoldTensor(x.as_subclass(Tensor).to(device), manifold=self)

    def for_training(self) -> Self:
        """The same manifold with the retraction for training: QR, unless one was named."""
        return self.with_retraction(self._training_retraction)

    def with_retraction(self, retraction: str) -> Self:
        """The same manifold with a retraction of another name."""
        if retraction == self.retraction:
            return self
        return type(self)(self.shape, self.spectrum, retraction=retraction, damping=self.damping)

    def projx(self, x: Tensor) -> Tensor:
        """A point of the same weight where cores were not orthonormal; its nearest bond.

        Sweeps of QR factorizations move what is not orthonormal into the bond, where a spectrum
        that is not full takes its nearest value.
        """
        self._assert_length(x, "projx(x)")
        cores = self._cores(x)
        left, a = qr_sweep(cores.left)
        right, b = qr_sweep(cores.right)
        bond = self.centre.nearest(a @ cores.bond @ b.mT)
        return self._flat(Vector(tuple(left), bond, tuple(right)))

    # -- checks that geoopt calls ---------------------------------------------------------------

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if x.ndim < 1 or x.shape[-1] != self.n_elements:
            return False, f"a point has shape (*b, {self.n_elements}), not {tuple(x.shape)}"
        x = plain(x)
        error = float(self.unpack(x).orthonormality_error())
        if not error <= atol + rtol:
            return False, f"the cores are orthonormal to {error:.2g} only; F.projx(x) mends it"
        point = self._point(x)
        error = float(self.centre.distance(point.bond))
        if not error <= atol + rtol * float(point.bond.abs().amax()):
            return False, f"spectrum={self.spectrum!r} is missed by {error:.2g}"
        return self._check_rank(x)

    def _check_rank(self, x: Tensor) -> tuple[bool, str | None]:
        """Whether every unfolding has the rank of the plan, to rounding."""
        point = self._point(x)
        for side, half in (("left", point.left), ("right", point.right)):
            for k, gauge in enumerate(half.gauges, start=1):
                s = torch.linalg.svdvals(gauge)
                largest, smallest = s[..., 0], s[..., -1]
                if not bool((smallest > 8 * torch.finfo(x.dtype).eps * largest).all()):
                    where = "the bond" if k == len(half.gauges) else f"{side} bond {k}"
                    return False, (
                        f"{where} has singular values down to {float(smallest.min()):.2g} under a "
                        f"largest of {float(largest.max()):.2g}: a weight of lower rank"
                    )
        return True, None

    # -- layout ---------------------------------------------------------------------------------

    def _fit(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return broadcast_vectors(self.n_elements, *tensors)

    def _cores(self, x: Tensor) -> Vector:
        left, bond, right = self.total_space.cores(x, lambda bond: bond)
        return Vector(left, bond, mirror(right))

    def _point(self, x: Tensor) -> Point:
        return Point.of(self._cores(x), self.damping)

    def _flat(self, cores: Vector) -> Tensor:
        frames = [*map(left_frame, cores.left), *map(mirrored_frame, reversed(cores.right))]
        return self.total_space.join(frames, cores.bond.flatten(-2))
