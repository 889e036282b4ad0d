"""Where a check is carried out: a point, directions, and the yardsticks there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.checks.ambient import Ambient
from sttp_manifold.checks.result import CheckResult, Law
from sttp_manifold.checks.slopes import Slope, measure_slope
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.contract import HasLength, OfWeights
from sttp_manifold.manifolds.geometry import geometry_of, plain, wide

__all__ = ["Place", "norm", "place_at"]

_TINY = 1e-300


# Beyond 10 to plus or minus this, vectors are brought to the size of one before they are squared.
_DECADES = {torch.float32: 12, torch.float64: 100}


def norm(u: Tensor) -> float:
    """Root of the sum of all squares, batch included; also of squares that no dtype holds."""
    size = _size(u)
    return size * float(torch.linalg.vector_norm(wide(u / size)))


def _size(u: Tensor) -> float:
    """The largest entry of a vector that is very long or short; one for others."""
    largest = float(torch.linalg.vector_norm(u, torch.inf)) if u.numel() else 0.0
    decades = _DECADES.get(u.dtype, 2)
    usual = largest == 0 or 10.0**-decades <= largest <= 10.0**decades
    return 1.0 if usual or not math.isfinite(largest) else largest


class Place:
    """A point on a manifold with what is drawn there, and the laws measured so far.

    Args:
        manifold: a geoopt manifold, or one of this package.
        x: the point; drawn by ``manifold.random`` if absent.
        size: what ``random`` takes; manifolds that know their own need none.
        dtype: of the point that is drawn; if absent, that of the manifold's own parameters, else
            ``float64``.
        device: of the point that is drawn.
        seed: of everything that is drawn; torch's global generators are left as they were.

    Raises:
        ManifoldError: a point off the manifold, complex or of another dtype than asked for, or no
            point and no size where one is needed.
    """

    def __init__(
        self,
        manifold: Any,
        x: Tensor | None,
        size: tuple[int, ...] | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        seed: int,
    ) -> None:
        self.manifold = manifold
        self.seed = seed
        self.ambient = Ambient(manifold)
        self.laws: list[Law] = []
        self.skipped: list[tuple[str, str]] = []
        self.notes: list[str] = []
        if x is None:
            x = self._random(size, dtype, device)
        else:
            _refuse_conflicts(manifold, x, size, dtype, device)
        self.x = plain(x)
        eps = float(torch.finfo(self.x.dtype).eps)
        self.eps = eps
        self.tol = eps**0.6
        # Not the stream of the point: a manifold may draw it by normalizing these very numbers.
        self._generator = torch.Generator().manual_seed(seed ^ 0x7A6E)
        self._projects: bool | None = None

    # -- what is drawn --------------------------------------------------------------------------

    def _random(
        self,
        size: tuple[int, ...] | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> Tensor:
        manifold = self.manifold
        base = geometry_of(manifold).base
        if size is None and isinstance(base, HasLength):
            size = (base.n_elements,)
        if size is None and not isinstance(base, OfWeights):
            example = {0: "()", 1: "(5,)", 2: "(5, 5)"}.get(manifold.ndim, "(5, 5)")
            raise ManifoldError(
                f"{type(manifold).__name__} has points of any shape: give a point, as x=..., or "
                f"the shape of a random one, as in check_manifold(M, size={example})"
            )
        # A manifold with parameters, such as a curvature, has points of their dtype only.
        dtype = dtype or getattr(manifold, "dtype", None) or torch.float64
        device = getattr(manifold, "device", None) if device is None else device
        try:
            with self.seeded(device):
                return self.random(size, dtype, device)
        except NotImplementedError:
            raise ManifoldError(
                f"{type(manifold).__name__} draws no random points: give one, as x=..."
            ) from None

    def random(
        self,
        size: tuple[int, ...] | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        """A random point, plain."""
        return plain(self.manifold.random(*(size or ()), dtype=dtype, device=device))

    @contextlib.contextmanager
    def seeded(self, device: torch.device | str | None) -> Iterator[None]:
        """Torch's global generators at the seed, and back where they were afterwards."""
        where = torch.device("cpu" if device is None else device)
        devices = [] if where.type == "cpu" else [where]
        with torch.random.fork_rng(devices, device_type=where.type):
            torch.manual_seed(self.seed)
            yield

    def normal(self, like: Tensor | None = None) -> Tensor:
        """Standard normal numbers of a tensor's or the point's shape, equal on every device."""
        like = self.x if like is None else like
        drawn = torch.randn(like.shape, dtype=torch.float64, generator=self._generator)
        return drawn.to(like.dtype).to(like.device)

    def tangent(self) -> Tensor:
        """A random unit tangent vector; zero where the tangent space is."""
        e = self.normal()
        u = plain(self.manifold.proju(self.x, e))
        return self.unit(u) if norm(u) > self.tol * norm(e) else torch.zeros_like(u)

    def unit(self, u: Tensor) -> Tensor:
        """A vector in units of its own length, so that the steps mean the same everywhere."""
        length = math.sqrt(max(self.inner(u, u), 0.0))
        return u / length if length > 0 else u

    def direction(self, u: Tensor | None, name: str = "u") -> Tensor:
        """A unit tangent vector: the one that was given, or a random one.

        Raises:
            ManifoldError: a given vector that is not tangent, or zero.
        """
        if u is None:
            return self.tangent()
        u = plain(u)
        if u.shape != self.x.shape or u.dtype != self.x.dtype or norm(u) == 0:
            raise ManifoldError(
                f"{name} is to be a tangent vector at x other than zero, of shape "
                f"{tuple(self.x.shape)} and {self.x.dtype}; got {tuple(u.shape)}, {u.dtype}, of "
                f"norm {norm(u):.1e}"
            )
        tangent, reason = self.manifold.check_vector_on_tangent(self.x, u / norm(u), explain=True)
        if not tangent:
            raise ManifoldError(f"{name} is not tangent at x, M.proju(x, {name}) is: {reason}")
        return self.unit(u)

    # -- what is measured -----------------------------------------------------------------------

    def inner(self, u: Tensor, v: Tensor, x: Tensor | None = None) -> float:
        """The metric, summed over the batch."""
        # keepdim: without it, PoincareBall of geoopt 0.5 returns every pair of a batch.
        a, b = _size(u), _size(v)
        at = self.x if x is None else x
        return float(self.manifold.inner(at, u / a, v / b, keepdim=True).sum()) * a * b

    def velocity(self, u: Tensor) -> Tensor:
        """The ambient vector of a tangent vector at the point."""
        return self.ambient.velocity(self.x, u)

    def same(self, a: Tensor, b: Tensor, size: float | None = None) -> float:
        """Difference of two tensors, relative to the larger one or to ``size``."""
        gap = norm(a - b)
        return gap / max(norm(a), norm(b), _TINY) if size is None else gap / max(size, _TINY)

    def off_manifold(self, x: Tensor) -> float:
        """The smallest tolerance at which the manifold accepts a point, to a factor of ten."""
        return self._level(lambda tol: self.manifold.check_point_on_manifold(x, atol=tol, rtol=tol))

    def off_tangent(self, y: Tensor, v: Tensor, size: float | None = None) -> float:
        """How far a vector is from the tangent space at ``y``, relative to its length or ``size``.

        By the manifold's own judgement; and by what the projection does to it, provided that the
        projection is one at all.
        """
        size = norm(v) if size is None else size
        if size == 0:
            return norm(v)
        v = v / size
        own = self._level(
            lambda tol: self.manifold.check_vector_on_tangent(
                y, v, ok_point=True, atol=tol, rtol=tol
            )
        )
        moved = norm(self.manifold.proju(y, v) - v) if self.projects else 0.0
        return max(own, moved)

    @property
    def projects(self) -> bool:
        """Whether ``proju`` is idempotent here."""
        if self._projects is None:
            u = self.manifold.proju(self.x, self.normal())
            self._projects = self.same(self.manifold.proju(self.x, u), u) <= self.tol
        return self._projects

    def _level(self, accepts: Callable[[float], bool]) -> float:
        first = math.floor(math.log10(self.eps))
        for power in range(first, 2):
            if accepts(10.0**power):
                return 10.0**power
        return math.inf

    def is_euclidean(self, u: Tensor) -> bool:
        """Whether the metric is that of the ambient space, at the point and near it."""
        y = plain(self.manifold.retr(self.x, 0.3 * u))
        for z in (self.x, y):
            a, b = (plain(self.manifold.proju(z, self.normal())) for _ in range(2))
            va, vb = self.ambient.velocity(z, a), self.ambient.velocity(z, b)
            for first, second, v, w in ((a, a, va, va), (a, b, va, vb)):
                gap = abs(self.inner(first, second, z) - float((v * w).sum()))
                if gap > self.tol * (norm(va) * norm(vb) + norm(v) * norm(w)):
                    return False
        return True

    def law(self, name: str, measure: Callable[[], float], detail: str = "") -> None:
        """Measure a law.

        One whose method the manifold does not implement is skipped, one that cannot be evaluated
        has failed.
        """
        try:
            self.laws.append(Law(name, measure(), self.tol, detail))
        except NotImplementedError:
            self.skipped.append((name, "not implemented"))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            self.laws.append(Law(name, math.inf, self.tol, str(error).splitlines()[0]))

    @property
    def floor(self) -> float:
        """What a vector may be off the tangent space, times this, is rounding of its ingredients.

        A vector that is zero but for rounding has no direction of its own: to measure it, this
        part of the size of what it is computed from is added to its length.
        """
        return 1000 * self.eps / self.tol

    def slope(
        self, name: str, error: Callable[[float], tuple[float, float]], order: float
    ) -> Slope:
        """Measure a slope in the dtype of the point."""
        return measure_slope(name, error, expected=order, dtype=self.x.dtype)

    def result(self, check: str, *slopes: Slope) -> CheckResult:
        """Everything that was measured, as a result."""
        subject = f"{self.manifold!r}, {self.x.dtype}"
        return CheckResult(
            check, subject, tuple(self.laws), slopes, tuple(self.skipped), tuple(self.notes)
        )


def _refuse_conflicts(
    manifold: Any,
    x: Tensor,
    size: tuple[int, ...] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    if size is not None:
        raise ManifoldError("size is that of a random point: give x or size, not both")
    if not x.numel():
        raise ManifoldError(f"the checks take at least one point, x is {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise ManifoldError(f"the checks take points of real numbers, x is {x.dtype}")
    if dtype not in (None, x.dtype) or (
        device is not None and torch.device(device).type != x.device.type
    ):
        raise ManifoldError(
            f"dtype and device are those of a random point: x is {x.dtype} on {x.device}, and a "
            f"point rounded to {dtype or x.dtype} would be off the manifold"
        )
    fits, reason = manifold.check_point_on_manifold(plain(x), explain=True)
    if not fits:
        raise ManifoldError(f"x is no point of {manifold!r}, M.projx(x) is near it: {reason}")


def place_at(
    manifold: Any,
    x: Tensor | None,
    u: Tensor | None,
    size: tuple[int, ...] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    seed: int,
) -> tuple[Place, Tensor]:
    """A place, and a unit tangent vector there.

    Raises:
        ManifoldError: a vector without its point; and as :class:`Place`.
    """
    if u is not None and x is None:
        raise ManifoldError("u is tangent at a point: give x as well")
    place = Place(manifold, x, size, dtype, device, seed)
    return place, place.direction(u)
