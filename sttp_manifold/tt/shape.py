"""`TTShape`, the static plan: modes, ranks, merged chain, and the counts that follow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from sttp_manifold._arguments import check_among
from sttp_manifold.display import box_html, table_html
from sttp_manifold.errors import ShapeError, SpectrumError
from sttp_manifold.tt.diagram import diagram_svg, diagram_text
from sttp_manifold.tt.factors import positive_integer, prime_factors
from sttp_manifold.tt.ranks import check_ranks, clip_ranks, merge_square

__all__ = ["KERNELS", "KINDS", "SPECTRA", "TTShape", "check_spectrum"]

KINDS = ("sttp", "svdp")
KERNELS = ("flat", "factored")

SPECTRA = ("identity", "free", "normalized", "bounded", "full", "fixed")
"""Names of the spectrum maps; :mod:`sttp_manifold.spectrum` implements them."""


if TYPE_CHECKING:
    _cached = cached_property
else:

    class _cached(cached_property):  # noqa: N801
        """Without the lock that is taken before Python 3.12, which torch.compile does not trace.

        Nor does it trace in torch 2.6 that something is kept.
        """

        def __get__(self, instance, owner=None):
            if instance is None:
                return self
            if torch.compiler.is_compiling():
                return self.func(instance)
            value = instance.__dict__[self.attrname] = self.func(instance)
            return value


def check_spectrum(spectrum: object) -> str:
    """Return ``spectrum`` if it is one of :data:`SPECTRA`.

    Raises:
        SpectrumError: for any other name; the message lists the names there are.
    """
    if not isinstance(spectrum, str) or spectrum not in SPECTRA:
        raise SpectrumError(
            f"unknown spectrum {spectrum!r}; expected one of {', '.join(SPECTRA)}, "
            "as in shape.dim(spectrum='free')"
        )
    return spectrum


def _integers(values: Iterable[int], what: str, each: str) -> tuple[int, ...]:
    try:
        entries = tuple(values)
    except TypeError:
        raise ShapeError(f"{what} must be a sequence of integers, got {values!r}") from None
    return tuple(positive_integer(v, f"every {each} in {what}") for v in entries)


def _modes(values: Iterable[int], what: str) -> tuple[int, ...]:
    modes = _integers(values, what, "mode")
    if not modes:
        raise ShapeError(f"{what} must hold at least one mode, as in {what}=(3, 4, 2); got none")
    return modes


@dataclass(frozen=True, init=False, repr=False)
class TTShape:
    r"""Plan of a spectral tensor train :math:`W = U \operatorname{diag}(s) V^\top`.

    A matrix ``W`` of shape ``(d_out, d_in)`` is read as a tensor of shape
    ``(n_1, ..., n_D, m_1, ..., m_E)`` (row-major multi-indices). Bond ``k`` between neighbouring
    modes carries the TT rank ``R_k``; the bond between ``n_D`` and ``m_1`` is the *centre* and
    carries the spectrum, of length ``r = R_D``. Core ``k`` has shape ``(R_{k-1}, mode_k, R_k)``.

    Modes, ranks and sizes of a ``TTShape`` are those of the chain that it names. The chain that is
    *stored* by weights and manifolds is :attr:`merged`, in which every core whose unfolding is
    square has been absorbed by its neighbour (such a core carries no information of its own).
    ``dim`` and ``num_parameters`` are the same for both; ``total_dim`` and ``gauge_dim`` are not,
    only their difference is.

    Args:
        out_modes: ``(n_1, ..., n_D)``, positive integers whose product is ``d_out``.
        in_modes: ``(m_1, ..., m_E)``, positive integers whose product is ``d_in``.
        rank: one rank for every bond, lowered where a bond cannot carry it.
        ranks: all ranks ``(1, R_1, ..., R_{D+E-1}, 1)``, taken literally. Give either this or
            ``rank``.

    Raises:
        ShapeError: modes or sizes that are empty or not positive integers, or a wrong number of
            ranks.
        RankError: an explicit rank that is over what its bond can carry: ``R_k`` is at most
            ``R_{k-1} * mode_k`` and at most ``mode_{k+1} * R_{k+1}``.

    References:
        Obukhov et al., *Spectral Tensor Train Parameterization of Deep Learning Layers*, 2021,
        Sec. 3; Holtz, Rohwedder & Schneider, *On manifolds of tensors of fixed TT-rank*, 2012
        (dimension and gauge).

    Example:
        >>> shape = TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4)
        >>> shape.ranks
        (1, 3, 4, 4, 4, 3, 1)
        >>> shape.merged.out_modes, shape.merged.in_modes
        ((12, 2), (2, 15))
        >>> shape.dim("free")
        124
    """

    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    ranks: tuple[int, ...]

    def __init__(
        self,
        out_modes: Iterable[int],
        in_modes: Iterable[int],
        rank: int | None = None,
        *,
        ranks: Iterable[int] | None = None,
    ) -> None:
        out_modes, in_modes = _modes(out_modes, "out_modes"), _modes(in_modes, "in_modes")
        modes = out_modes + in_modes
        if (rank is None) == (ranks is None):
            raise ShapeError(
                "give either rank=4 (one rank, lowered where a bond cannot carry it) or "
                f"ranks=(1, ..., 1); got rank={rank!r} and ranks={ranks!r}"
            )
        if ranks is None:
            inner = positive_integer(rank, "rank")
            chosen = clip_ranks(modes, (1, *[inner] * (len(modes) - 1), 1))
        else:
            chosen = _integers(ranks, "ranks", "rank")
            check_ranks(modes, chosen)
        object.__setattr__(self, "out_modes", out_modes)
        object.__setattr__(self, "in_modes", in_modes)
        object.__setattr__(self, "ranks", chosen)

    # -- constructors ---------------------------------------------------------------------------

    @classmethod
    def for_matrix(cls, d_out: int, d_in: int, rank: int) -> TTShape:
        """Plan of a ``(d_out, d_in)`` matrix with the prime factors of each side as modes.

        Example:
            >>> TTShape.for_matrix(64, 64, rank=16).num_parameters("free")
            1280
        """
        return cls(prime_factors(d_out), prime_factors(d_in), rank)

    @classmethod
    def svd(cls, d_out: int, d_in: int, rank: int) -> TTShape:
        """Plan of SVDP: one mode on each side, an SVD with orthonormal factors.

        Example:
            >>> TTShape.svd(64, 64, rank=16).num_parameters("identity")
            1656
        """
        return cls((d_out,), (d_in,), rank)

    @classmethod
    def for_weight(
        cls, size: Sequence[int], rank: int, *, kind: str = "sttp", kernel: str = "flat"
    ) -> TTShape:
        """Plan of the weight of a stock layer, of any size, read as a matrix with its first rows.

        Args:
            size: ``(d_out, d_in)`` of a linear layer, ``(c_out, c_in, k_1, ...)`` of a
                convolution, which is read as ``c_out x (c_in k)``.
            rank: one rank for all bonds, lowered where needed.
            kind: ``"sttp"``, the prime factors of ``size`` as modes, or ``"svdp"``, one mode a
                side.
            kernel: ``"flat"`` keeps the product of the kernel sizes as the last mode, as in the
                published tables; ``"factored"`` uses the prime factors of each kernel size, as in
                the paper's text.

        Raises:
            ShapeError: a size of fewer than two numbers, or an unknown ``kind`` or ``kernel``.

        Example:
            >>> TTShape.for_weight((64, 576), rank=16) == TTShape.for_matrix(64, 576, rank=16)
            True
            >>> TTShape.for_weight((16, 8, 3, 3), rank=4).num_parameters("free")
            116
        """
        sizes = _integers(size, "size", "number")
        if len(sizes) < 2:
            raise ShapeError(
                "the size of a weight is (d_out, d_in) or (c_out, c_in, k_1, ...), as in "
                f"TTShape.for_weight((16, 8, 3, 3), rank=4); got {sizes}"
            )
        check_among("kind", kind, KINDS)
        check_among("kernel", kernel, KERNELS)
        d_out, d_in, *window = sizes
        if kind == "svdp":
            return cls.svd(d_out, d_in * math.prod(window), rank)
        modes = [math.prod(window)]
        if kernel == "factored":
            modes = [p for k in window for p in prime_factors(k)]
        in_modes = (*prime_factors(d_in), *(m for m in modes if m > 1))
        return cls(prime_factors(d_out), in_modes, rank)

    @classmethod
    def for_conv(
        cls,
        kernel_shape: Sequence[int],
        rank: int,
        kernel: str = "flat",
        kind: str = "sttp",
    ) -> TTShape:
        """Plan of a convolution kernel: :meth:`for_weight` of ``(c_out, c_in, k_1, ...)``.

        Raises:
            ShapeError: as :meth:`for_weight`.

        Example:
            >>> TTShape.for_conv((16, 8, 3, 3), rank=4).in_modes
            (2, 2, 2, 9)
        """
        return cls.for_weight(kernel_shape, rank, kind=kind, kernel=kernel)

    # -- sizes ----------------------------------------------------------------------------------

    @property
    def d_out(self) -> int:
        """Rows of ``W``, the product of ``out_modes``."""
        return math.prod(self.out_modes)

    @property
    def d_in(self) -> int:
        """Columns of ``W``, the product of ``in_modes``."""
        return math.prod(self.in_modes)

    @property
    def rank(self) -> int:
        """Centre rank ``r``, the length of the spectrum."""
        return self.ranks[len(self.out_modes)]

    @property
    def numel(self) -> int:
        """Elements of the dense weight, ``d_out * d_in``."""
        return self.d_out * self.d_in

    @property
    def left_core_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes ``(R_{k-1}, n_k, R_k)`` of the cores of ``U``."""
        return self.core_shapes[: len(self.out_modes)]

    @property
    def right_core_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes ``(R_{k-1}, m_k, R_k)`` of the cores of ``V^T``."""
        return self.core_shapes[len(self.out_modes) :]

    @_cached
    def core_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes of all cores of this chain, in its order."""
        modes = self.out_modes + self.in_modes
        return tuple(zip(self.ranks[:-1], modes, self.ranks[1:], strict=True))

    @_cached
    def frame_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes ``(d, r)`` of the orthonormal frames behind the cores, in the chain's order.

        A left core gives its left unfolding ``(R_{k-1} n_k, R_k)``, a right core the transpose of
        its right unfolding, ``(m_k R_k, R_{k-1})``.
        """
        left = tuple((a * n, b) for a, n, b in self.left_core_shapes)
        return left + tuple((m * b, a) for a, m, b in self.right_core_shapes)

    @_cached
    def merged(self) -> TTShape:
        """The stored chain: square cores absorbed by their inner neighbour.

        The core next to the centre stays, for its neighbour is the spectrum.
        """
        centre = len(self.out_modes)
        out_modes, out_ranks = merge_square(self.out_modes, self.ranks[: centre + 1])
        in_modes, in_ranks = merge_square(self.in_modes[::-1], self.ranks[centre:][::-1])
        return TTShape(out_modes, in_modes[::-1], ranks=out_ranks + in_ranks[:-1][::-1])

    # -- counts ---------------------------------------------------------------------------------

    def spectrum_size(self, spectrum: str = "free") -> int:
        """Stored coordinates of the spectrum: ``r``, ``r * r`` if full, none if constant."""
        check_spectrum(spectrum)
        return {"identity": 0, "fixed": 0, "full": self.rank**2}.get(spectrum, self.rank)

    def dim(self, spectrum: str = "free", values: Sequence[float] | None = None) -> int:
        r"""Dimension of the set of weights that this plan can hold.

        The manifold of fixed TT rank has
        :math:`\sum R_{k-1} n_k R_k - \sum_{k=1}^{D+E-1} R_k^2` dimensions (Holtz, Rohwedder &
        Schneider 2012, Theorem 4.2 and its corollary). A spectrum of ones takes away
        :math:`r(r+1)/2`, the normalized one its scale, a fixed one :math:`r`, and
        :math:`m(m-1)/2` for each ``m`` of its values that coincide.

        Args:
            spectrum: name of the spectrum map.
            values: singular values of ``"fixed"``; distinct ones if absent.

        Raises:
            SpectrumError: an unknown spectrum, values for another one than ``"fixed"``, or not as
                many of them as the rank.

        Example:
            >>> shape = TTShape.svd(8, 6, rank=3)
            >>> shape.dim("free"), shape.dim("fixed"), shape.dim("fixed", values=[2.0, 2.0, 1.0])
            (33, 30, 29)
        """
        coinciding = self._coinciding(spectrum, values)
        full = sum(a * n * b for a, n, b in self.core_shapes) - sum(r * r for r in self.ranks[1:-1])
        r = self.rank
        lost = {"identity": r * (r + 1) // 2, "normalized": 1, "fixed": r + coinciding}
        return full - lost.get(spectrum, 0)

    def _coinciding(self, spectrum: str, values: Sequence[float] | None) -> int:
        """Dimensions of the rotations among fixed singular values that coincide."""
        check_spectrum(spectrum)
        if values is None:
            return 0
        if spectrum != "fixed" or len(values) != self.rank:
            raise SpectrumError(
                f"values are the {self.rank} singular values of spectrum='fixed', got "
                f"{len(values)} for spectrum={spectrum!r}"
            )
        return sum(m * (m - 1) // 2 for m in Counter(map(float, values)).values())

    def num_parameters(self, spectrum: str = "free") -> int:
        """Numbers stored by the Householder chart: ``dim``, and one more for ``"normalized"``.

        The normalized spectrum of [STTP] Sec. 3.4 is redundant by its scale. A fixed one is
        redundant where its values coincide: for them ``dim`` is less, these numbers are not.
        """
        return self.dim(spectrum) + (spectrum == "normalized")

    def total_dim(self, spectrum: str = "free") -> int:
        r"""Dimension of the total space of this chain: Stiefel factors times spectrum.

        :math:`\sum (d_k r_k - r_k(r_k+1)/2)` over the frames, plus :meth:`spectrum_size`.
        """
        frames = sum(d * r - r * (r + 1) // 2 for d, r in self.frame_shapes)
        return frames + self.spectrum_size(spectrum)

    def gauge_dim(self, spectrum: str = "free", values: Sequence[float] | None = None) -> int:
        r"""Dimension of the gauge of this chain: ``total_dim - dim``.

        :math:`O(R_k)` acts at every bond but the centre. At the centre it acts once with an
        identity spectrum, on both sides of a full bond, and the normalized spectrum adds its
        scale. A fixed spectrum leaves it the rotations among the values that coincide.

        Args:
            spectrum: name of the spectrum map.
            values: as for :meth:`dim`.

        Raises:
            SpectrumError: as :meth:`dim`.
        """
        coinciding = self._coinciding(spectrum, values)
        orthogonal = [r * (r - 1) // 2 for r in self.ranks]
        centre = orthogonal.pop(len(self.out_modes))
        extra = {"identity": centre, "full": 2 * centre, "normalized": 1, "fixed": coinciding}
        return sum(orthogonal) + extra.get(spectrum, 0)

    def __repr__(self) -> str:
        return f"TTShape(out_modes={self.out_modes}, in_modes={self.in_modes}, ranks={self.ranks})"

    def __str__(self) -> str:
        out_modes, in_modes = ("·".join(map(str, m)) for m in (self.out_modes, self.in_modes))
        return f"{out_modes} | {in_modes}, ranks {'-'.join(map(str, self.ranks))}"

    def diagram(self) -> str:
        """Tensor diagram as text, for ``print``: modes, cores and ranks of this chain.

        Example:
            >>> print(TTShape.svd(6, 5, rank=2).diagram())
            6
            │
            ▶─2─◆─2─◀
                    │
                    5
        """
        return diagram_text(self.out_modes, self.in_modes, self.ranks)

    def _repr_html_(self) -> str:
        """For a notebook: the diagram, and the counts for two spectra."""
        rows = [
            (name, f"{self.dim(name):,}", f"{self.num_parameters(name):,}", f"{self.numel:,}")
            for name in ("free", "identity")
        ]
        titles = ("spectrum", "dimension", "stored by a chart", "dense")
        return box_html(
            f"<b>TTShape</b> {self.d_out} x {self.d_in}, rank {self.rank}",
            diagram_svg(self.out_modes, self.in_modes, self.ranks),
            table_html(titles, rows, right=(1, 2, 3)),
        )
