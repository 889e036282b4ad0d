r"""The geometry of fixed TT rank, on cores: tangent vectors, projections, retractions, curves.

Everything here takes a :class:`Point`, two halves and the bond between them, and
:class:`Vector`, cores of a tangent vector; both have the right side written like the left one.
:class:`~sttp_manifold.FixedTTRankManifold` lays them out flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold.frames.orthonormal import orthonormalize
from sttp_manifold.manifolds.bond_sets import FullBond
from sttp_manifold.manifolds.interfaces import (
    Half,
    derivative_cores,
    gauged,
    round_outwards,
    tangent_cores,
)
from sttp_manifold.tt.contract import (
    digits_of,
    environments,
    left_frame,
    left_matrix,
    mirror,
    right_matrix,
    rows_of_digits,
)
from sttp_manifold.tt.decompose import qr_sweep

__all__ = [
    "Point",
    "Vector",
    "chain_inner",
    "core_wise_qr",
    "curve",
    "derivative_chain",
    "polar_part",
    "project_chain",
    "project_entries",
    "project_matrix",
    "round_chain",
    "tangent_chain",
    "tangent_part",
]


class Vector(NamedTuple):
    """Cores of a point, a tangent vector or any chain; the right ones from their outer end.

    Attributes:
        left: ``(*b, R_{k-1}, n_k, R_k)``, outermost first.
        bond: ``(*b, r, r)``.
        right: like ``left``, for the other side.
    """

    left: tuple[Tensor, ...]
    bond: Tensor
    right: tuple[Tensor, ...]


class Point(NamedTuple):
    """A point: its bond, and the two halves that share it."""

    left: Half
    bond: Tensor
    right: Half

    @classmethod
    def of(cls, cores: Vector, damping: float = 0.0) -> Point:
        """The point of orthonormal cores and a bond."""
        return cls(
            Half(cores.left, cores.bond, damping),
            cores.bond,
            Half(cores.right, cores.bond.mT, damping),
        )


def project_matrix(point: Point, Z: Tensor) -> Vector:
    """Projection of a dense ``Z``, ``(*b, d_out, d_in)``, by ``Z V`` and ``Z^T U``."""
    U, V = left_matrix(point.left.cores), right_matrix(mirror(point.right.cores)).mT
    modes = [core.shape[-2] for core in reversed(point.right.cores)]
    columns = Z.mT @ U
    # The rows of the right half count its modes from its outer end.
    lead, sides = columns.ndim - 2, range(len(modes))
    turned = columns.unflatten(-2, modes).permute(
        *range(lead), *(lead + k for k in reversed(sides)), lead + len(modes)
    )
    return Vector(
        tuple(point.left.project_rows(Z @ V)),
        U.mT @ Z @ V,
        tuple(point.right.project_rows(turned.reshape(columns.shape))),
    )


def project_chain(point: Point, chain: Vector) -> Vector:
    """Projection of a chain of any ranks on the same modes, never formed."""
    left_end = environments(point.left.cores, chain.left)[-1]
    right_end = environments(point.right.cores, chain.right)[-1]
    return Vector(
        tuple(point.left.project_chain(chain.left, chain.bond @ right_end.mT)),
        left_end @ chain.bond @ right_end.mT,
        tuple(point.right.project_chain(chain.right, chain.bond.mT @ left_end.mT)),
    )


def project_entries(point: Point, i: Tensor, j: Tensor, values: Tensor) -> Vector:
    """Projection of a sparse ``Z``, in ``O(P (D + E) r^2)`` for ``P`` entries.

    Shape:
        - i, j: ``(P,)``
        - values: ``(*b, P)``
    """
    rows = digits_of(point.left.cores, i)
    columns = digits_of(point.right.cores, j, reverse=True)
    u = rows_of_digits(point.left.cores, rows)
    v = rows_of_digits(point.right.cores, columns)
    return Vector(
        tuple(point.left.project_entries(rows, values, v)),
        (u * values.unsqueeze(-1)).mT @ v,
        tuple(point.right.project_entries(columns, values, u)),
    )


def tangent_chain(point: Point, vector: Vector, *, moved: bool = False) -> Vector:
    """A tangent vector as a chain of ranks ``2R``; with ``moved``, the point plus it."""
    corner = point.bond + vector.bond if moved else vector.bond
    eye = torch.eye(corner.shape[-1], dtype=corner.dtype, device=corner.device).expand_as(corner)
    return Vector(
        tuple(tangent_cores(point.left, vector.left)),
        _corner(eye, corner),
        tuple(tangent_cores(point.right, vector.right)),
    )


def derivative_chain(cores: Vector, velocities: Vector) -> Vector:
    """The derivative of a product of cores along velocities of them, as a chain of ranks ``2R``."""
    return Vector(
        tuple(derivative_cores(cores.left[1:], cores.left, velocities.left)),
        _corner(cores.bond, velocities.bond),
        tuple(derivative_cores(cores.right[1:], cores.right, velocities.right)),
    )


def _corner(arm: Tensor, corner: Tensor) -> Tensor:
    """The bond ``[[0, arm], [arm, corner]]``."""
    top, bottom = torch.cat((torch.zeros_like(arm), arm), -1), torch.cat((arm, corner), -1)
    return torch.cat((top, bottom), -2)


def chain_inner(a: Vector, b: Vector) -> Tensor:
    """Frobenius inner product of two chains on the same modes, ``(*b,)``."""
    left, right = environments(a.left, b.left)[-1], environments(a.right, b.right)[-1]
    return (left * (a.bond @ right @ b.bond.mT)).sum((-2, -1))


def round_chain(chain: Vector, like: Point, centre: FullBond) -> Vector:
    """Quasi-nearest point of a chain: TT-SVD from the bond outwards, to the ranks of ``like``.

    QR inwards on either side, a truncated SVD at the bond (whose singular values the centre puts
    right), truncated SVDs outwards, and QR back.
    """
    left, a = qr_sweep(chain.left)
    right, b = qr_sweep(chain.right)
    r = like.bond.shape[-1]
    u, s, vt = torch.linalg.svd(a @ chain.bond @ b.mT, full_matrices=False)
    bond = centre.nearest(torch.diag_embed(s[..., :r]))
    ranks = [core.shape[-1] for core in like.left.cores[:-1]]
    left, end = round_outwards(left, u[..., :r] @ bond, ranks)
    ranks = [core.shape[-1] for core in like.right.cores[:-1]]
    right, end = round_outwards(right, vt[..., :r, :].mT @ end.mT, ranks)
    return Vector(tuple(left), centre.nearest(end.mT), tuple(right))


def core_wise_qr(point: Point, vector: Vector, centre: FullBond) -> Vector:
    """Move every core along its velocity and take its Q factor; first order."""
    sides = (
        tuple(
            orthonormalize(left_frame(core + velocity)).unflatten(-2, core.shape[-3:-1])
            for core, velocity in zip(half.cores, half.velocities(vectors), strict=True)
        )
        for half, vectors in ((point.left, vector.left), (point.right, vector.right))
    )
    left, right = sides
    return Vector(left, centre.nearest(point.bond + vector.bond), right)


def curve(point: Point, vector: Vector, centre: FullBond) -> Vector:
    r"""A curve in the manifold with velocity ``vector``, to second order, at time one.

    Cores go to :math:`(U + D)(I + D^\top D)^{-1/2} \approx U + D - \tfrac12 U D^\top D` along
    their velocities ``D``, so that they stay orthonormal to third order: a cost may read the
    spectrum off the bond.
    """
    sides = []
    for half, vectors in ((point.left, vector.left), (point.right, vector.right)):
        moved = []
        for core, velocity in zip(half.cores, half.velocities(vectors), strict=True):
            frame, d = left_frame(core), left_frame(velocity)
            moved.append((frame + d - frame @ (d.mT @ d) / 2).unflatten(-2, core.shape[-3:-1]))
        sides.append(tuple(moved))
    return Vector(sides[0], centre.curve(point.bond, vector.bond), sides[1])


def polar_part(point: Point, vector: Vector, centre: FullBond) -> Vector:
    r"""Projection of the polar factor of the matrix that a tangent vector stands for.

    Scaled to spectral norm one; zero for zero. In orthonormal bases of its row and column spaces
    the matrix is one of ``2r x 2r``, whose polar factor is taken.
    """
    left, bond, right = _core_of(tangent_chain(point, vector))
    u, s, vt = torch.linalg.svd(bond, full_matrices=False)
    least = s.shape[-1] * torch.finfo(s.dtype).eps * s[..., :1]
    sign = (u * (s > least).to(s.dtype).unsqueeze(-2)) @ vt
    projected = project_chain(point, Vector(left, sign, right))
    projected = projected._replace(bond=centre.project(point.bond, projected.bond))
    size = torch.linalg.matrix_norm(_core_of(tangent_chain(point, projected)).bond, 2)
    scale = torch.where(size == 0, 0, 1 / size)[..., None, None]
    return Vector(
        tuple(scale[..., None] * core for core in projected.left),
        scale * projected.bond,
        tuple(scale[..., None] * core for core in projected.right),
    )


def _core_of(chain: Vector) -> Vector:
    """The same chain with orthonormal sides."""
    left, a = qr_sweep(chain.left)
    right, b = qr_sweep(chain.right)
    return Vector(tuple(left), a @ chain.bond @ b.mT, tuple(right))


def tangent_part(point: Point, vector: Sequence[Tensor] | Vector, centre: FullBond) -> Vector:
    """Nearest tangent coordinates."""
    left, bond, right = vector
    return Vector(
        tuple(map(gauged, point.left.cores, left)),
        centre.project(point.bond, bond),
        tuple(map(gauged, point.right.cores, right)),
    )
