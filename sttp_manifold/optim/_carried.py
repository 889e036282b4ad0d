r"""What an optimizer knows of a spectral tensor train, carried to one of other ranks.

Two points on the same modes have frames :math:`U_{\le k}` and :math:`U'_{\le k}` at every bond, and
overlaps :math:`P_k = U_{\le k}^\top U'_{\le k}`. Where directions were dropped, ``P`` has
orthonormal columns; where they were added, orthonormal rows; under a change of gauge it is
orthogonal. A core goes to :math:`P_{k-1}^\top U_k P_k`, so a velocity of it goes to
:math:`P_{k-1}^\top \delta U_k P_k`: directions that are gone are dropped, those that are new get
zero. What is left is made tangent at the new point; where directions are new, by turning these
against those that move into them, so that what was known of the old ones stays whole. Second
moments go by the squares of the overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.manifolds import SpectralTTManifold
from sttp_manifold.optim._blocks import full_precision, working_dtype
from sttp_manifold.tt.contract import (
    contract,
    environments,
    left_frame,
    mirror,
    regroup_cores,
    right_frame,
)

__all__ = ["Carrier", "carried_state"]


@torch.no_grad()
def carried_state(
    old: Tensor, new: Tensor, state: Mapping[str, Any], *, momentum: str, tangent: bool = True
) -> dict[str, Any] | None:
    """State of a parameter for its successor; None where it has to start anew.

    Args:
        old: the parameter that was.
        new: the one in its place.
        state: what an optimizer of ours knows of the old one.
        momentum: the name of its momentum.
        tangent: whether that is a tangent vector.
    """
    manifolds = getattr(old, "manifold", None), getattr(new, "manifold", None)
    if not Carrier.fits(*manifolds) or old.shape[:-1] != new.shape[:-1]:
        return None
    dtype, device = working_dtype(new), new.device
    x, y = (p.detach().as_subclass(Tensor).to(device, dtype) for p in (old, new))
    with full_precision([y]):
        carrier = Carrier(*manifolds, x, y)  # type: ignore[arg-type]
        carried: dict[str, Any] = {}
        for name, value in state.items():
            if not isinstance(value, Tensor) or not value.ndim:
                # A count of steps, on the host or where the parameter is.
                moves = isinstance(value, Tensor) and value.device == old.device
                carried[name] = value.to(device, copy=True) if moves else value
                continue
            value = value.to(y)
            if name == momentum:
                carried[name] = carrier.vector(value, tangent=tangent)
            else:
                take = carrier.squares if value.shape == old.shape else carrier.scalars
                carried[name] = take(value)
    return carried


class Carrier:
    """Takes vectors from one point to another of the same modes.

    Args:
        old: manifold of the point ``x``.
        new: manifold of the point ``y``, with the same modes and kind of spectrum.
        x: where the vectors are.
        y: where they are to go.

    Shape:
        - x: ``(*b, old.n_elements)``
        - y: ``(*b, new.n_elements)``
    """

    def __init__(
        self, old: SpectralTTManifold, new: SpectralTTManifold, x: Tensor, y: Tensor
    ) -> None:
        self._old, self._new = old, new
        self._cores = _halves(new, y)
        self._overlaps = [
            environments(first, second)
            for first, second in zip(_halves(old, x), self._cores, strict=True)
        ]

    @staticmethod
    def fits(old: object, new: object) -> bool:
        """Whether vectors can be carried from points of one manifold to those of another."""
        return (
            isinstance(old, SpectralTTManifold)
            and isinstance(new, SpectralTTManifold)
            and old.spectrum == new.spectrum
            and _modes(old) == _modes(new)
        )

    def vector(self, u: Tensor, *, tangent: bool = True) -> Tensor:
        """A velocity of the point, as a tangent vector if asked for."""
        return self._moved(u, squares=False, tangent=tangent)

    def squares(self, v: Tensor) -> Tensor:
        """Second moments, one for each element."""
        return self._moved(v, squares=True, tangent=False)

    def scalars(self, v: Tensor) -> Tensor:
        """Second moments, one for each frame and one for each coordinate.

        That of a frame goes to all frames on its modes, where it falls apart.
        """
        old, new = self._old, self._new
        parents = [
            k + (len(old.shape.merged.out_modes) if side else 0)
            for side in (0, 1)
            for k in _parents(_spans(old, side), _spans(new, side))
        ]
        columns = [old._order.index(parents[k]) for k in new._order]
        rest = self._spectrum(v[..., len(old._order) :], squares=True)
        return torch.cat([v[..., columns], rest], -1)

    def _moved(self, u: Tensor, *, squares: bool, tangent: bool) -> Tensor:
        left, _, right = self._old.cores(u, lambda theta: theta)
        frames: list[Tensor] = []
        for side, velocities in enumerate((left, right)):
            cores, overlaps = self._cores[side], self._overlaps[side]
            if squares:
                cores, overlaps = ([t.square() for t in ts] for ts in (cores, overlaps))
            moved: list[Tensor] = []
            for velocity, (start, end) in self._outwards(velocities, side):
                pushed = _between(overlaps[start], velocity, overlaps[end])
                moved += _shared(pushed, cores[start:end], orthonormal=not squares)
            found = []
            for start, end in _spans(self._new, side):
                core, velocity = _merged(cores[start:end], moved[start:end])
                if tangent:
                    velocity = _tangent(core, velocity, overlaps[end])
                if side:  # stored as it is read from the centre
                    velocity = _turned(velocity, _modes(self._new)[1][::-1][start:end])
                found.append(velocity)
            frames += map(right_frame, mirror(found)) if side else map(left_frame, found)
        spectrum = self._spectrum(u[..., self._old.spectrum_slice], squares=squares)
        return self._new.join(frames, spectrum)

    def _outwards(
        self, cores: Sequence[Tensor], side: int
    ) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Cores of a side from its outer end, like left ones, and the modes that each has."""
        spans = _spans(self._old, side)
        if not side:
            yield from zip(cores, spans, strict=True)
            return
        modes = _modes(self._old)[1][::-1]
        for core, (a, b) in zip(mirror(cores), spans, strict=True):
            yield _turned(core, modes[a:b][::-1]), (a, b)

    def _spectrum(self, v: Tensor, *, squares: bool) -> Tensor:
        """Coordinates of a spectrum or of a full bond, which are flat."""
        if not v.shape[-1]:
            return v
        left, right = (overlaps[-1] for overlaps in self._overlaps)
        if self._old.spectrum == "full":
            if squares:
                left, right = left.square(), right.square()
            return (left.mT @ v.unflatten(-1, (left.shape[-2], -1)) @ right).flatten(-2)
        # The diagonal of P^T diag(v) P'.
        weights = left * right
        return (v.unsqueeze(-2) @ (weights.square() if squares else weights)).squeeze(-2)


def _modes(manifold: SpectralTTManifold) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return manifold.shape.out_modes, manifold.shape.in_modes


def _halves(manifold: SpectralTTManifold, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Cores of both sides on the modes of the plan, each from its outer end, like left ones."""
    left, _, right = manifold.cores(x, lambda theta: theta)
    out_modes, in_modes = _modes(manifold)
    return regroup_cores(left, out_modes), mirror(regroup_cores(right, in_modes))


def _spans(manifold: SpectralTTManifold, side: int) -> list[tuple[int, int]]:
    """Which modes of a side, from its outer end, each core of the stored chain has."""
    fine, coarse = _modes(manifold)[side], _modes_of_merged(manifold)[side]
    if side:
        fine, coarse = fine[::-1], coarse[::-1]
    spans, end = [], 0
    for k, mode in enumerate(coarse):
        start, end = end, end + 1
        while math.prod(fine[start:end]) < mode:
            end += 1
        if k + 1 == len(coarse):
            end = len(fine)
        spans.append((start, end))
    return spans


def _modes_of_merged(manifold: SpectralTTManifold) -> tuple[tuple[int, ...], tuple[int, ...]]:
    plan = manifold.shape.merged
    return plan.out_modes, plan.in_modes


def _turned(core: Tensor, modes: Sequence[int]) -> Tensor:
    """The same core with the digits of its index, ``modes``, in the opposite order."""
    if len(modes) < 2:
        return core
    lead = core.ndim - 3
    digits = core.unflatten(-2, list(modes))
    order = [*range(lead + 1), *range(lead + len(modes), lead, -1), lead + len(modes) + 1]
    return digits.permute(order).flatten(lead + 1, -2)


def _between(before: Tensor, core: Tensor, after: Tensor) -> Tensor:
    """``P^T core P'``, core ``(*b, a, n, c)``."""
    pushed = (before.mT @ core.flatten(-2)).unflatten(-1, core.shape[-2:])
    return pushed @ after.unsqueeze(-3)


def _shared(velocity: Tensor, cores: Sequence[Tensor], *, orthonormal: bool) -> list[Tensor]:
    """Velocities of neighbours whose product moves by one that is given, or as near as they can.

    Each but the last is orthogonal to its core, as in :mod:`~sttp_manifold.manifolds.interfaces`.
    Second moments have no such thing, and go to the last.
    """
    products = list(cores[-1:])  # of all that follow a core
    for core in reversed(cores[1:-1]):
        products.insert(0, contract(core, products[0]))
    shared, rest = [], velocity
    for core, product in zip(cores[:-1], products, strict=False):
        rows = rest.unflatten(-2, (core.shape[-2], -1)).flatten(-2).flatten(-3, -2)
        frame = left_frame(core)
        along = frame.mT @ rows
        moved = torch.zeros_like(core)
        if orthonormal:
            moved = (rows - frame @ along) @ torch.linalg.pinv(product.flatten(-2))
            moved = moved.unflatten(-2, core.shape[-3:-1])
        shared.append(moved)
        rest = along.unflatten(-1, (-1, rest.shape[-1]))
    return [*shared, rest]


def _merged(cores: Sequence[Tensor], velocities: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The product of neighbours, and its velocity."""
    product, velocity = cores[0], velocities[0]
    for core, its in zip(cores[1:], velocities[1:], strict=True):
        velocity = contract(velocity, core) + contract(product, its)
        product = contract(product, core)
    return product, velocity


def _tangent(core: Tensor, velocity: Tensor, overlap: Tensor) -> Tensor:
    """Make the velocity of a frame tangent at the expense of the columns that are new."""
    X, u = left_frame(core), left_frame(velocity)
    kept = overlap.mT @ overlap
    new = torch.eye(kept.shape[-1], dtype=kept.dtype, device=kept.device) - kept
    normal = X.mT @ u
    normal = (normal + normal.mT) / 2
    rows = kept @ normal
    u = u - X @ (rows @ kept + 2 * rows @ new + new @ normal @ new)
    return u.unflatten(-2, core.shape[-3:-1])


def _parents(old: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]]) -> list[int]:
    """For each span of modes that which had its last mode."""
    return [next(k for k, (_, stop) in enumerate(old) if stop >= end) for _, end in new]
