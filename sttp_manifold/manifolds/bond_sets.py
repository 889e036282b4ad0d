r"""What the bond of a weight may be: any matrix, orthogonal, or of given singular values.

========== ========================= ================================= ====================
spectrum   bonds ``S``               tangent ``dS``                    dimensions lost
========== ========================= ================================= ====================
full       invertible                any                               none
identity   orthogonal                ``S`` times a skew matrix         ``r (r + 1) / 2``
given      singular values ``s``     ``A S - S B``, ``A``, ``B`` skew  one for each, and
                                                                       ``m (m - 1) / 2`` for
                                                                       each ``m`` equal ones
========== ========================= ================================= ====================

Each is the nearest-point projection of its set (the last by von Neumann's trace inequality), and
each knows a curve in it that is right to second order, which is what a Hessian needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sttp_manifold.errors import SpectrumError

__all__ = ["FullBond", "GivenBond", "OrthogonalBond", "bond_set", "skew_pair"]


class FullBond:
    """Any invertible bond."""

    lost = 0

    def nearest(self, bond: Tensor) -> Tensor:
        """Nearest bond of the set."""
        return bond

    def project(self, bond: Tensor, vector: Tensor) -> Tensor:
        """Orthogonal projection onto the tangent space of the set at ``bond``."""
        return vector

    def curve(self, bond: Tensor, vector: Tensor) -> Tensor:
        """A curve in the set through ``bond`` with velocity ``vector``, to second order, at 1."""
        return bond + vector

    def distance(self, bond: Tensor) -> Tensor:
        """Largest entry of the difference to the set, a scalar."""
        return (bond - self.nearest(bond)).abs().amax()


class OrthogonalBond(FullBond):
    """An orthogonal bond: all singular values are one."""

    def __init__(self, rank: int) -> None:
        self.lost = rank * (rank + 1) // 2

    def nearest(self, bond: Tensor) -> Tensor:
        """The polar factor."""
        a, _, bt = torch.linalg.svd(bond)
        return a @ bt

    def project(self, bond: Tensor, vector: Tensor) -> Tensor:
        """``S skew(S^T dS)``."""
        turn = bond.mT @ vector
        return bond @ (turn - turn.mT) / 2

    def curve(self, bond: Tensor, vector: Tensor) -> Tensor:
        """``S (I + K + K^2 / 2)`` with ``K = S^T dS`` skew, the exponential to second order."""
        return bond + vector - bond @ (vector.mT @ vector) / 2


class GivenBond(FullBond):
    """A bond of given singular values.

    Args:
        values: positive numbers; kept in descending order.

    Raises:
        SpectrumError: numbers that are not positive and finite.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.values = sorted((float(v) for v in values), reverse=True)
        if not all(0 < v < float("inf") for v in self.values):
            raise SpectrumError(
                f"given singular values must be positive and finite, got {list(values)}; "
                "lower the rank where one is zero"
            )
        equal = [self.values.count(v) for v in dict.fromkeys(self.values)]
        self.lost = len(self.values) + sum(m * (m - 1) // 2 for m in equal)

    def _sigma(self, like: Tensor) -> Tensor:
        return torch.tensor(self.values, dtype=like.dtype, device=like.device)

    def nearest(self, bond: Tensor) -> Tensor:
        """The singular vectors of ``bond`` with the given values."""
        a, _, bt = torch.linalg.svd(bond)
        return (a * self._sigma(bond)) @ bt

    def _rotated(self, bond: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Singular vectors of the bond, which entries belong to equal values, and the vector."""
        a, _, bt = torch.linalg.svd(bond)
        sigma = self._sigma(bond)
        return a, bt, sigma[:, None] == sigma, a.mT @ vector @ bt.mT

    def project(self, bond: Tensor, vector: Tensor) -> Tensor:
        """Skew where singular values are equal (so zero on the diagonal), anything elsewhere."""
        a, bt, equal, rotated = self._rotated(bond, vector)
        return a @ torch.where(equal, (rotated - rotated.mT) / 2, rotated) @ bt

    def curve(self, bond: Tensor, vector: Tensor) -> Tensor:
        """``exp(A) S exp(-B)`` to second order, with the skew ``A`` and ``B`` of the vector."""
        a, bt, equal, rotated = self._rotated(bond, vector)
        sigma = self._sigma(bond)
        left, right = skew_pair(sigma, rotated, equal)
        middle = torch.diag(sigma)
        second = left @ left @ middle - 2 * left @ middle @ right + middle @ right @ right
        moved: Tensor = a @ (middle + rotated + second / 2) @ bt
        return moved


def skew_pair(s: Tensor, vector: Tensor, equal: Tensor) -> tuple[Tensor, Tensor]:
    """Skew ``A`` and ``B`` with ``A diag(s) - diag(s) B`` equal to ``vector`` off the diagonal.

    One pair of entries ``(ij, ji)`` at a time. Where singular values are equal, only ``A - B``
    matters and only the skew part of ``vector`` can be had; it is shared by the two.

    Shape:
        - s: ``(*b, r)``
        - vector, equal, outputs: ``(*b, r, r)``; ``equal`` says which pairs count as equal
    """
    row, column = s.unsqueeze(-1), s.unsqueeze(-2)
    gap = torch.where(equal, 1.0, column.square() - row.square())
    left = (column * vector + row * vector.mT) / gap
    right = (row * vector + column * vector.mT) / gap
    shared = (vector - vector.mT) / (4 * row)
    return torch.where(equal, shared, left), torch.where(equal, -shared, right)


def bond_set(spectrum: str | Sequence[float], rank: int) -> FullBond:
    """The set of bonds of a spectrum: ``"full"``, ``"identity"``, or given singular values.

    Raises:
        SpectrumError: an unknown name, or not as many positive numbers as the rank.
    """
    if isinstance(spectrum, str):
        if spectrum == "full":
            return FullBond()
        if spectrum == "identity":
            return OrthogonalBond(rank)
        raise SpectrumError(
            f"spectrum={spectrum!r} is no submanifold of fixed TT rank; expected 'full', "
            f"'identity', or {rank} positive singular values, as in spectrum=[3.0, 2.0, 1.0]"
        )
    if len(spectrum) != rank:
        raise SpectrumError(
            f"a centre of rank {rank} has {rank} singular values, got {len(spectrum)}"
        )
    return GivenBond(spectrum)
