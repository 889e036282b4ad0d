r"""Spectrum maps, from stored coordinates to the spectrum ``s``, and spectral penalties.

========== ================== ============================== =====================================
name       coordinates        spectrum                       notes
========== ================== ============================== =====================================
identity   none               ones (up to constant signs)    every singular value is 1
free       ``r`` numbers      the coordinates                singular values ``|s|``
normalized ``r`` numbers      ``theta / max |theta|``        Lipschitz 1 ([STTP] Sec. 3.4);
                                                             redundant by one, its scale
bounded    ``r`` numbers      ``L theta / sqrt(1+theta^2)``  smooth, ``|s| < L``, not redundant
full       ``r x r`` numbers  a full bond ``S``              regular where singular values meet
fixed      none               given values, constant         singular values stay; redundant where
                                                             given values coincide
========== ================== ============================== =====================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from sttp_manifold._arguments import explained, explained_class
from sttp_manifold.errors import ShapeError, SpectrumError
from sttp_manifold.tt.factors import positive_integer
from sttp_manifold.tt.precision import is_half, widened
from sttp_manifold.tt.shape import check_spectrum
from sttp_manifold.tt.spectral import SpectralTT

__all__ = [
    "CONSTANT",
    "PENALTIES",
    "SpectrumMap",
    "check_values",
    "d_optimal",
    "divergence",
    "hold_spectrum",
    "spectrum_map",
]

# Where a spectrum is projected onto the open interval of "bounded", it stays this far inside,
# relative to the bound: closer to it the map is so flat that training could not leave.
_MARGIN = 1e-3

CONSTANT = ("identity", "fixed")  # whose spectrum is constant, up to signs


@explained_class
@dataclass(frozen=True)
class SpectrumMap:
    r"""A map from stored coordinates to a spectrum, and its inverse.

    Args:
        name: one of :data:`sttp_manifold.tt.SPECTRA`.
        rank: length ``r`` of the spectrum.
        bound: ``L``, the open bound on ``|s|`` of ``"bounded"``; the other maps have none.
        values: the singular values of ``"fixed"``, in any order, kept in descending order;
            evenly spread, ``1, (r - 1) / r, ..., 1 / r``, if absent. The other maps have none.

    Raises:
        SpectrumError: an unknown name, a bound that is not positive and finite or not for
            ``"bounded"``, or values that are not ``r`` positive finite numbers, or are not for
            ``"fixed"``.

    Example:
        >>> chart = SpectrumMap("bounded", rank=3, bound=2.0)
        >>> bool(chart(torch.tensor([0.0, 1.0, -50.0])).abs().max() < 2)
        True
    """

    name: str
    rank: int
    bound: float = 1.0
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_spectrum(self.name)
        positive_integer(self.rank, "the rank of a spectrum")
        bound: object = self.bound
        if (
            isinstance(bound, bool)
            or not isinstance(bound, (int, float))
            or not 0 < bound < math.inf
        ):
            raise SpectrumError(f"bound must be a positive finite number, got {bound!r}")
        if self.name != "bounded" and bound != 1.0:
            raise SpectrumError(
                f"bound={bound!r} is of spectrum='bounded', and would do nothing with "
                f"spectrum={self.name!r}; take spectrum='bounded', or no bound"
            )
        values = check_values(self.name, self.values)
        if self.name == "fixed":
            if values is None:
                values = tuple((self.rank - i) / self.rank for i in range(self.rank))
            if len(values) != self.rank:
                raise SpectrumError(
                    f"rank {self.rank} has {self.rank} singular values, got {len(values)} values"
                )
        object.__setattr__(self, "values", values)

    @property
    def is_constant(self) -> bool:
        """Whether there is nothing to train: ``"identity"`` and ``"fixed"``, up to signs."""
        return self.name in CONSTANT

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        """Shape of the coordinates: ``(0,)``, ``(r,)`` or ``(r, r)``."""
        if self.name == "full":
            return (self.rank, self.rank)
        return (0,) if self.is_constant else (self.rank,)

    def __call__(self, theta: Tensor) -> Tensor:
        """Spectrum of coordinates.

        Shape:
            - theta: ``(*b, *coordinate_shape)``
            - output: ``(*b, r)``, for ``"full"`` ``(*b, r, r)``

        Raises:
            ShapeError: coordinates of another shape.
        """
        self._check_shape(theta, self.coordinate_shape, "coordinates")
        if self.name == "identity":
            return theta.new_ones(*theta.shape[:-1], self.rank)
        if self.name == "fixed":
            return self._given(theta).expand(*theta.shape[:-1], self.rank)
        if self.name == "normalized":
            wide = widened(theta)  # the floor is zero in float16
            return (wide / wide.abs().amax(-1, keepdim=True).clamp_min(1e-12)).to(theta.dtype)
        if self.name == "bounded":
            # The sine of an angle: theta^2 of theta / sqrt(1 + theta^2) would overflow.
            return self.bound * theta.atan().sin()
        return theta

    def _given(self, like: Tensor) -> Tensor:
        return torch.tensor(self.values, dtype=like.dtype, device=like.device)

    def _check_shape(self, x: Tensor, wanted: tuple[int, ...], what: str) -> None:
        if x.ndim < len(wanted) or x.shape[x.ndim - len(wanted) :] != wanted:
            raise ShapeError(
                f"{what} of spectrum={self.name!r} and rank {self.rank} are of shape "
                f"(*b, {', '.join(map(str, wanted))}), got {tuple(x.shape)}"
            )

    def inverse(self, spectrum: Tensor, *, project: bool = False) -> Tensor:
        """Coordinates of a spectrum.

        Args:
            spectrum: the spectrum; for ``"identity"`` and ``"fixed"``, signs are accepted and left
                to the caller, for ``"fixed"`` any order as well.
            project: take the nearest spectrum that the map can hold, instead of raising.

        Shape:
            - spectrum: ``(*b, r)``, for ``"full"`` ``(*b, r, r)``
            - output: ``(*b, *coordinate_shape)``

        Raises:
            SpectrumError: a spectrum that is not finite, or that the map cannot hold, unless
                ``project``.
            ShapeError: a spectrum of another shape.
        """
        held = self.nearest(spectrum)
        if not _is_finite(spectrum):
            raise SpectrumError("the spectrum has entries that are not finite")
        if not project:
            self._check(spectrum, held)
            held = spectrum
        if self.is_constant:
            return spectrum.new_zeros(*spectrum.shape[:-1], 0)
        if self.name == "bounded":
            ratio = held / self.bound
            return ratio * torch.rsqrt((1 - ratio) * (1 + ratio))
        return held.clone()

    def nearest(self, spectrum: Tensor) -> Tensor:
        """Nearest spectrum that the map can hold, in the Euclidean norm, signs kept.

        For ``"bounded"``, which is open, the nearest one that stays a thousandth inside; for
        ``"fixed"`` the largest given value goes where the largest entry is, and so on.

        Shape:
            - spectrum, output: ``(*b, r)``, for ``"full"`` ``(*b, r, r)``

        Raises:
            ShapeError: a spectrum of another shape.
        """
        wanted = (self.rank, self.rank) if self.name == "full" else (self.rank,)
        self._check_shape(spectrum, wanted, "singular values")
        sign = torch.where(spectrum < 0, -1.0, 1.0).to(spectrum.dtype)
        if self.name == "identity":
            return sign
        if self.name == "fixed":
            order = spectrum.detach().abs().argsort(dim=-1, descending=True, stable=True)
            given = self._given(spectrum).expand(spectrum.shape)
            return sign * torch.zeros_like(spectrum).scatter(-1, order, given)
        if self.name == "normalized":
            largest = spectrum.abs().argmax(-1, keepdim=True)
            clipped = spectrum.clamp(-1, 1)
            return clipped.scatter(-1, largest, sign.gather(-1, largest))
        if self.name == "bounded":
            edge = self.bound * (1 - _MARGIN)
            return spectrum.clamp(-edge, edge)
        return spectrum

    def initial(
        self,
        *batch: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Coordinates to start from: a spectrum of ones, or ``L / sqrt 2`` for ``"bounded"``.

        A constant spectrum has none.

        Args:
            batch: batch dimensions.
            dtype: floating dtype, torch's default if absent.
            device: device of the result.

        Shape:
            - output: ``(*batch, *coordinate_shape)``
        """
        if self.name == "full":
            eye = torch.eye(self.rank, dtype=dtype, device=device)
            return eye.expand(*batch, self.rank, self.rank).clone()
        return torch.ones(*batch, *self.coordinate_shape, dtype=dtype, device=device)

    def _check(self, spectrum: Tensor, held: Tensor) -> None:
        if spectrum.is_meta:
            return
        tolerance = 1e-9 if spectrum.dtype == torch.float64 else 1e-4
        tolerance = max(tolerance, 2 * torch.finfo(spectrum.dtype).eps)
        if self.values is not None:
            tolerance *= self.values[0]
        if self.name == "bounded":
            fits = bool((spectrum.abs() < self.bound).all())
        else:
            fits = bool(((spectrum - held).abs() <= tolerance).all())
        if not fits:
            given = shorten(", ".join(f"{v:.4g}" for v in self.values or ()), 60)
            wanted = {
                "identity": "singular values of 1",
                "normalized": "a largest singular value of 1",
                "bounded": f"singular values below {self.bound}",
                "fixed": f"the singular values {given} and no others",
            }.get(self.name, "finite singular values")
            sizes = spectrum.detach().abs()
            anew = (
                ", or start anew by init='random' (in compress with grow='allow', which leaves no "
                "layer out)"
                if self.name == "identity"
                else ""
            )
            raise SpectrumError(
                f"spectrum={self.name!r} holds {wanted}, but this weight has singular values from "
                f"{float(sizes.min()):.3g} to {float(sizes.max()):.3g}; pass project=True for the "
                f"nearest weight that it can hold, or use spectrum='free'{anew}"
            )


@explained
def spectrum_map(
    name: str, rank: int, bound: float = 1.0, values: Sequence[float] | None = None
) -> SpectrumMap:
    """The map called ``name``; see :class:`SpectrumMap`."""
    return SpectrumMap(name, rank, bound, check_values(name, values))


def check_values(name: str, values: object) -> tuple[float, ...] | None:
    """Given singular values in descending order; None where none are given.

    Raises:
        SpectrumError: values that are not positive finite numbers, or are not for ``"fixed"``.
    """
    if values is None:
        return None
    if name != "fixed":
        raise SpectrumError(f"spectrum={name!r} has no values; take spectrum='fixed', or no values")
    numbers: list[float] = []
    with suppress(TypeError, ValueError):
        listed: Any = values.tolist() if isinstance(values, Tensor) else values
        if not isinstance(listed, (str, bytes)):
            numbers = sorted(map(float, listed), reverse=True)
    if not numbers or not all(0 < v < math.inf for v in numbers):
        raise SpectrumError(
            "values are positive finite singular values, as in spectrum='fixed', "
            f"values=[3.0, 2.0, 1.0]; got {values!r}. A lower rank stands for those that are zero"
        )
    return tuple(numbers)


@explained
def hold_spectrum(tt: SpectralTT, spectrum: SpectrumMap, *, project: bool = False) -> SpectralTT:
    """Bring the centre of a weight to the form and range of a spectrum map.

    A full bond becomes a vector by an SVD, or a vector a full bond, as the map needs it; for
    ``"fixed"`` singular values and vectors are put in descending order. Half precision is computed
    in float32.

    Raises:
        SpectrumError: a weight that is not finite, or that the map cannot hold, unless
            ``project``.
    """
    if is_half(tt.dtype) and tt.is_full:
        return hold_spectrum(tt.to(torch.float32), spectrum, project=project).to(tt.dtype)
    tt = tt.merged()
    if not all(map(_is_finite, (*tt.left, tt.spectrum, *tt.right))):
        raise SpectrumError("this weight has entries that are not finite")
    if spectrum.name == "full":
        return SpectralTT(tt.left, tt.bond, tt.right, tt.shape)
    if tt.is_full:
        a, s, bt = torch.linalg.svd(tt.spectrum)
        inner = (bt @ tt.right[0].flatten(-2)).unflatten(-1, tt.right[0].shape[-2:])
        tt = SpectralTT(
            (*tt.left[:-1], tt.left[-1] @ a.unsqueeze(-3)), s, (inner, *tt.right[1:]), tt.shape
        )
    if spectrum.name == "fixed":
        tt = _descending(tt)
    spectrum.inverse(tt.spectrum, project=project)
    held = spectrum.nearest(tt.spectrum) if project or spectrum.is_constant else tt.spectrum
    return SpectralTT(tt.left, held, tt.right, tt.shape)


def _descending(tt: SpectralTT) -> SpectralTT:
    """The same weight, its spectrum in descending order of size."""
    order = tt.spectrum.detach().abs().argsort(dim=-1, descending=True, stable=True)
    last = tt.left[-1].take_along_dim(order[..., None, None, :], -1)
    first = tt.right[0].take_along_dim(order[..., :, None, None], -3)
    s = tt.spectrum.take_along_dim(order, -1)
    return SpectralTT((*tt.left[:-1], last), s, (first, *tt.right[1:]), tt.shape)


def _is_finite(x: Tensor) -> bool:
    return x.is_meta or bool(x.isfinite().all())


def _relative(s: Tensor) -> Tensor:
    """Singular values over the largest one, in at least float32; a zero spectrum stays zero."""
    if s.ndim < 1 or not s.shape[-1]:
        raise ShapeError(f"singular values are (*b, r) with r >= 1, got {tuple(s.shape)}")
    sizes = widened(s).abs()
    return sizes / sizes.amax(-1, keepdim=True).clamp_min(1e-12)


def _mean_log(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Mean of ``log x``, smooth at zero and exactly zero where all of ``x`` is one."""
    if not 0 <= eps <= 1:
        raise SpectrumError(f"eps is a number from 0 to 1, as in eps=1e-6; got {eps!r}")
    # In float16 the slope at zero, 1 / (2 eps), has to stay below its largest number.
    eps = max(eps, 64 / torch.finfo(dtype).max)
    return 0.5 * torch.log((x.square() + eps**2) / (1 + eps**2)).mean(-1)


@explained
def d_optimal(s: Tensor, eps: float = 1e-6) -> Tensor:
    r"""D-optimal penalty, :math:`-\tfrac1r \sum_i \log(\sigma_i / \sigma_{max})`.

    The regularizer :math:`-\tfrac12 \log\det(W^\top W)` of Jiang et al., *On Computation and
    Generalization of GANs under Spectrum Control* (ICLR 2019), of the weight at unit spectral
    norm, and per singular value: invariant to scale, and zero exactly when all singular values
    are equal. ``log x`` is taken as :math:`\tfrac12 \log\frac{x^2 + \epsilon^2}{1 + \epsilon^2}`,
    so that value and gradient are finite at zero. Computed in float32 at least; for float16 the
    :math:`\epsilon` is 1e-3 at least.

    Shape:
        - s: ``(*b, r)``, singular values in any order, with signs or without
        - output: ``(*b,)``, in float32 for half precision

    Raises:
        ShapeError: no singular values.
        SpectrumError: an ``eps`` that is not from 0 to 1.
    """
    return -_mean_log(_relative(s), eps, s.dtype)


@explained
def divergence(s: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Divergence penalty: how far the spectrum is from a uniform one, as a relative entropy.

    Let :math:`1 = \sigma_1 \ge \dots \ge \sigma_r` be the singular values over the largest one,
    and ``p`` the density that puts mass :math:`1/(r-1)` on every gap
    :math:`\Delta_i = \sigma_i - \sigma_{i+1}`. The penalty is the Kullback-Leibler divergence of
    ``p`` from the uniform density on ``[0, 1]``,
    :math:`-\tfrac{1}{r-1} \sum_i \log((r-1)\,\Delta_i)`: smallest for evenly spread singular
    values, large where they crowd. The family (a divergence of the empirical spectrum from a
    reference) is that of Jiang et al. (ICLR 2019); the reference used here is the uniform one.
    ``log x`` and precision are those of :func:`d_optimal`, so that value and gradient are finite
    where singular values meet. Zero for ``r = 1``.

    Shape:
        - s: ``(*b, r)``, singular values in any order, with signs or without
        - output: ``(*b,)``, in float32 for half precision

    Raises:
        ShapeError: no singular values.
        SpectrumError: an ``eps`` that is not from 0 to 1.
    """
    relative = _relative(s)
    count = s.shape[-1] - 1
    if count == 0:
        return (relative * 0).sum(-1)
    gaps = -relative.sort(dim=-1, descending=True).values.diff(dim=-1)
    return -_mean_log(count * gaps, eps, s.dtype)


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "d_optimal": d_optimal,
    "divergence": divergence,
}
"""Penalties by name, as :func:`sttp_manifold.nn.spectral_penalty` takes them."""
