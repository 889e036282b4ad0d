r"""The non-redundant Householder chart of a whole spectral tensor train.

Reduced frames for every core except the two beside the spectrum, full frames for those two; with
an identity spectrum the left one of the two is reduced as well ([STTP] Sec. 3.3); with a full
bond all cores are. The number of parameters is then the dimension of the set of weights, and the
Jacobian has full rank at generic points. A fixed spectrum keeps both full frames, and only signs
are left of the gauge at the centre, as long as its values are distinct; ``m`` of them that coincide
make ``m (m - 1) / 2`` parameters redundant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold._arguments import explained_class
from sttp_manifold.errors import ShapeError
from sttp_manifold.frames._wy_form import chart_of
from sttp_manifold.frames.compiled import all_frames
from sttp_manifold.frames.gauge import push_rotation
from sttp_manifold.frames.householder import (
    full_frame,
    full_reflectors,
    reduced_frame,
    reduced_reflectors,
    unsigned_reflectors,
)
from sttp_manifold.spectrum import SpectrumMap, hold_spectrum, spectrum_map
from sttp_manifold.tt.contract import left_frame, mirror, mirrored_frame
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT
from sttp_manifold.tt.validate import check_type

__all__ = ["ChartPoint", "HouseholderChart"]


class ChartPoint(NamedTuple):
    """Coordinates of a weight.

    Attributes:
        frames: one vector ``(*b, size)`` for each core, in the order of the merged chain.
        spectrum: coordinates of the spectrum map, ``(*b, *coordinate_shape)``.
        signs: constant signs ``(*b, r)`` of an identity or fixed spectrum (ones for the others),
            which carry no information but keep the inverse chart well conditioned.
    """

    frames: tuple[Tensor, ...]
    spectrum: Tensor
    signs: Tensor


@explained_class
@dataclass(frozen=True)
class HouseholderChart:
    """The chart of a plan: coordinates to :class:`~sttp_manifold.SpectralTT` and back.

    Args:
        shape: the plan; its merged chain is what the chart covers.
        spectrum: name of the spectrum map.
        bound: bound of the spectrum map ``"bounded"``.
        values: singular values of ``"fixed"``, evenly spread up to 1 if absent; see
            :class:`~sttp_manifold.spectrum.SpectrumMap`.

    Raises:
        ShapeError: a plan that is none.
        SpectrumError: an unknown spectrum, a bound that is not positive and finite, or values that
            are not ``r`` positive numbers.

    References:
        [STTP] Sec. 3.2-3.3.

    Example:
        >>> chart = HouseholderChart(TTShape.for_matrix(8, 6, rank=3), "free")
        >>> sum(chart.frame_sizes) + 3 == chart.shape.num_parameters("free")
        True
    """

    shape: TTShape
    spectrum: str = "free"
    bound: float = 1.0
    values: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_type(self.shape, TTShape, "HouseholderChart(shape): shape")
        made = spectrum_map(self.spectrum, self.shape.rank, self.bound, self.values)
        object.__setattr__(self, "values", made.values)

    @cached_property
    def map(self) -> SpectrumMap:
        """The spectrum map."""
        return spectrum_map(self.spectrum, self.shape.rank, self.bound, self.values)

    @cached_property
    def is_full(self) -> tuple[bool, ...]:
        """For each core of the merged chain, whether its frame is full rather than reduced."""
        plan = self.shape.merged
        flags = [False] * len(plan.core_shapes)
        centre = len(plan.out_modes)
        if self.spectrum != "full":
            flags[centre - 1] = self.spectrum != "identity"
            flags[centre] = True
        return tuple(flags)

    @cached_property
    def frame_sizes(self) -> tuple[int, ...]:
        """Parameters of each core; zero for a constant one."""
        return tuple(
            chart_of(full).size(d, r)
            for (d, r), full in zip(self.shape.merged.frame_shapes, self.is_full, strict=True)
        )

    def decode(self, point: ChartPoint) -> SpectralTT:
        """Weight of coordinates.

        Args:
            point: a vector for each core, spectrum coordinates, and signs.
        """
        left, right = self.cores(point.frames)
        s = self.map(point.spectrum)
        if self.map.is_constant:
            s = s * point.signs
        return SpectralTT(left, s, right, self.shape)

    def cores(self, frames: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Cores of ``U`` and of ``V^T`` of the merged chain, without the spectrum.

        Args:
            frames: a vector for each core, as in a :class:`ChartPoint`.

        Shape:
            - frames: ``(*b, size)`` each
            - outputs: ``(*b, R_{k-1}, n_k, R_k)`` each
        """
        plan = self.shape.merged
        left: list[Tensor] = []
        right: list[Tensor] = []
        for k, (vector, (d, r)) in enumerate(zip(frames, plan.frame_shapes, strict=True)):
            chart = full_frame if self.is_full[k] else reduced_frame
            a, mode, b = plan.core_shapes[k]
            if k < len(plan.out_modes):
                left.append(chart(vector, d, r).unflatten(-2, (a, mode)))
            else:
                right.append(chart(vector, d, r, transposed=True).unflatten(-1, (mode, b)))
        return tuple(left), tuple(right)

    def _cores_at_once(self, vector: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The same of joined coordinates, as a compiler is given them.

        Shape:
            - vector: ``(sum(frame_sizes),)``, in float32 or float64
            - outputs: ``(R_{k-1}, n_k, R_k)`` each
        """
        plan, split = self.shape.merged, len(self.shape.merged.out_modes)
        frames = all_frames(vector, plan.frame_shapes, self.is_full)
        left, right = [], []
        for k, (frame, (a, mode, b)) in enumerate(zip(frames, plan.core_shapes, strict=True)):
            if k < split:
                left.append(frame.unflatten(-2, (a, mode)))
            else:
                right.append(frame.mT.unflatten(-1, (mode, b)))
        return tuple(left), tuple(right)

    def unpack(self, z: Tensor, signs: Tensor | None = None) -> SpectralTT:
        """The weight that a vector of coordinates stands for; differentiable.

        The verbs of the manifolds: ``chart.unpack(chart.pack(tt))`` is the weight ``tt``.

        Args:
            z: frames in the order of the merged chain, then coordinates of the spectrum.
            signs: constant signs of an identity or fixed spectrum, ones if absent.

        Shape:
            - z: ``(*b, n_elements)``
            - signs: ``(*b, r)``

        Raises:
            ShapeError: a vector of another length.
        """
        return self.decode(self.unflatten(z, signs))

    def pack(self, tt: SpectralTT, *, project: bool = False) -> Tensor:
        """Coordinates of a weight as one vector, exact to rounding.

        Args:
            tt: a weight on the same plan.
            project: take the nearest weight that the spectrum can hold.

        Shape:
            - output: ``(*b, n_elements)``

        Raises:
            ShapeError: a weight on another plan; or one of an identity or fixed spectrum that needs
                signs beside its coordinates, which :meth:`encode` gives: half of those whose left
                centre frame (fixed: both of them) is square, and hardly any other.
            SpectrumError: a weight that the spectrum cannot hold, unless ``project``.

        Example:
            >>> chart = HouseholderChart(TTShape.for_matrix(12, 10, rank=3))
            >>> z = 0.1 * torch.randn(chart.n_elements, dtype=torch.float64)
            >>> bool(chart.unpack(chart.pack(chart.unpack(z))).allclose(chart.unpack(z)))
            True
        """
        point = self.encode(tt, project=project)
        return self.flatten(self._without_signs(point) if self.map.is_constant else point)

    def _without_signs(self, point: ChartPoint) -> ChartPoint:
        """The same weight of a constant spectrum, its signs taken up by a frame at the centre."""
        k = len(self.shape.merged.out_modes) - 1
        d, r = self.shape.merged.frame_shapes[k]
        if self.spectrum == "fixed":
            if d == r:  # a square frame takes up an even number of signs at most
                k += 1
                d, r = self.shape.merged.frame_shapes[k]
            Q = full_frame(point.frames[k], d, r) * point.signs.unsqueeze(-2)
            vector, pivots = unsigned_reflectors(Q)
            self._assert_signs_fit(pivots > torch.finfo(Q.dtype).eps ** 0.5)
            frames = (*point.frames[:k], vector, *point.frames[k + 1 :])
            return ChartPoint(frames, point.spectrum, torch.ones_like(point.signs))
        Q = reduced_frame(point.frames[k], d, r) * point.signs.unsqueeze(-2)
        T = torch.eye(r, dtype=Q.dtype, device=Q.device) - Q[..., :r, :]
        pivots = T.diagonal(dim1=-2, dim2=-1)
        # A square frame is the constant -I, which takes up no sign.
        fits = pivots > torch.finfo(Q.dtype).eps ** 0.5 if d > r else point.signs > 0
        self._assert_signs_fit(fits)
        vector = torch.linalg.solve_triangular(T, -Q[..., r:, :], upper=True, left=False)
        frames = (*point.frames[:k], vector.flatten(-2), *point.frames[k + 1 :])
        return ChartPoint(frames, point.spectrum, torch.ones_like(point.signs))

    @staticmethod
    def _assert_signs_fit(fits: Tensor) -> None:
        if not bool(fits.all()):
            raise ShapeError(
                "this weight has no coordinates without signs; encode(tt) gives both, and "
                "unpack(flatten(point), point.signs) the weight"
            )

    @property
    def n_elements(self) -> int:
        """Length of the flat coordinates, ``shape.num_parameters(spectrum)``."""
        return sum(self.frame_sizes) + self.shape.spectrum_size(self.spectrum)

    def flatten(self, point: ChartPoint) -> Tensor:
        """Coordinates as one vector: frames in the order of the chain, then the spectrum's.

        The constant signs of an identity or fixed spectrum are no coordinates and stay behind.

        Shape:
            - output: ``(*b, n_elements)``
        """
        spectrum = point.spectrum.flatten(point.signs.ndim - 1)
        return torch.cat([*point.frames, spectrum], -1)

    def unflatten(self, z: Tensor, signs: Tensor | None = None) -> ChartPoint:
        """Coordinates of a vector: the inverse of :meth:`flatten`.

        Args:
            z: the vector.
            signs: constant signs of an identity or fixed spectrum, ones if absent.

        Shape:
            - z: ``(*b, n_elements)``
            - signs: ``(*b, r)``

        Raises:
            ShapeError: a vector of another length.
        """
        if z.ndim < 1 or z.shape[-1] != self.n_elements:
            raise ShapeError(
                f"coordinates on {self.shape!r} with spectrum={self.spectrum!r} are "
                f"(*b, {self.n_elements}), got {tuple(z.shape)}"
            )
        *frames, spectrum = z.split([*self.frame_sizes, z.shape[-1] - sum(self.frame_sizes)], -1)
        if signs is None:
            signs = z.new_ones(*z.shape[:-1], self.shape.rank)
        return ChartPoint(tuple(frames), spectrum.unflatten(-1, self.map.coordinate_shape), signs)

    def encode(self, tt: SpectralTT, *, project: bool = False) -> ChartPoint:
        """Coordinates of a weight, exact to rounding and well conditioned.

        Rotations that the reduced charts ask for are pushed towards the centre, signs that the
        full ones ask for are taken up by the spectrum; ``W`` does not change.

        Args:
            tt: a weight on the same plan.
            project: take the nearest weight that the spectrum map can hold.

        Raises:
            ShapeError: a weight on another plan.
            SpectrumError: a weight that the spectrum map cannot hold, unless ``project``.
        """
        if tt.shape.merged != self.shape.merged:
            raise ShapeError(
                f"a weight on {tt.shape!r} cannot be encoded on {self.shape!r}; "
                "tt_svd(tt.to_matrix(), shape) makes one that can"
            )
        tt = hold_spectrum(tt, self.map, project=project)
        left, right = list(tt.left), list(mirror(tt.right))
        outer_left = [self._reduce(left, k, left_frame) for k in range(len(left) - 1)]
        outer_right = [self._reduce(right, k, mirrored_frame) for k in range(len(right) - 1)]
        inner_left, inner_right = left_frame(left[-1]), mirrored_frame(right[-1])
        s = tt.spectrum
        signs = s.new_ones(*tt.batch_shape, self.shape.rank)
        if self.spectrum == "full":
            left_vector, left_turn = reduced_reflectors(inner_left)
            right_vector, right_turn = reduced_reflectors(inner_right)
            s = left_turn.mT @ s @ right_turn
        elif self.spectrum == "identity":
            left_vector, turn = reduced_reflectors(inner_left)
            # W = U' O^T diag(s) V^T: the right frame takes up both.
            inner_right = (inner_right * s.unsqueeze(-2)) @ turn
            right_vector, signs = full_reflectors(inner_right)
        else:
            left_vector, left_signs = full_reflectors(inner_left)
            right_vector, right_signs = full_reflectors(inner_right)
            s = left_signs * s * right_signs
            if self.spectrum == "fixed":
                signs = torch.where(s < 0, -1.0, 1.0).to(s.dtype)
        return ChartPoint(
            (*outer_left, left_vector, right_vector, *reversed(outer_right)),
            # Held already: what remains between s and the map's range is rounding.
            self.map.inverse(s, project=self.spectrum != "bounded"),
            signs,
        )

    @staticmethod
    def _reduce(cores: list[Tensor], k: int, frame: Callable[[Tensor], Tensor]) -> Tensor:
        """Reduced parameters of core ``k``, whose rotation goes into core ``k + 1``, in place."""
        vector, rotation = reduced_reflectors(frame(cores[k]))
        push_rotation(cores, k, rotation)
        return vector
