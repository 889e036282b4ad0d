"""Contractions of spectral tensor trains.

Every function takes raw cores with any leading batch dimensions: left cores ``(*b, R, n, R')``
from the outermost inwards, right cores ``(*b, R, m, R')`` from the centre outwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "bond_of_difference",
    "contract",
    "digits_of",
    "environments",
    "form_last",
    "frobenius",
    "group_cores",
    "left_frame",
    "left_matrix",
    "mirror",
    "mirrored_frame",
    "regroup_cores",
    "right_frame",
    "right_matrix",
    "rows_at",
    "rows_of_digits",
    "rows_times_u",
    "rows_times_ut",
    "rows_times_v",
    "rows_times_vt",
    "scaled_left",
    "times_bond",
    "triangle_of_sum",
]


def left_matrix(cores: Sequence[Tensor]) -> Tensor:
    """Product of left cores as a matrix, ``(*b, n_1 ... n_D, R_D)``."""
    product = cores[0].flatten(-3, -2)
    for core in cores[1:]:
        rows, rank = product.shape[-2] * core.shape[-2], core.shape[-1]
        product = _times(product, core.flatten(-2)).reshape(*product.shape[:-2], rows, rank)
    return product


def right_matrix(cores: Sequence[Tensor]) -> Tensor:
    """Product of right cores as a matrix, ``(*b, R_D, m_1 ... m_E)``."""
    product = cores[-1].flatten(-2)
    for core in reversed(cores[:-1]):
        rank, columns = core.shape[-3], core.shape[-2] * product.shape[-1]
        product = _times(core.flatten(-3, -2), product)
        product = product.reshape(*product.shape[:-2], rank, columns)
    return product


def _times(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, without the five views, each a node of the graph, that torch makes for a batch."""
    return torch.bmm(a, b) if a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] else a @ b


def mirror(cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Right cores written like left ones, outermost first, each read from its outer end."""
    return tuple(core.transpose(-1, -3) for core in reversed(cores))


def left_frame(core: Tensor) -> Tensor:
    """Left unfolding ``(*b, R n, R')`` of a left core."""
    return core.flatten(-3, -2)


def right_frame(core: Tensor) -> Tensor:
    """Right unfolding of a right core, transposed: ``(*b, m R', R)``."""
    return core.flatten(-2).mT


def mirrored_frame(core: Tensor) -> Tensor:
    """As :func:`right_frame`, of a right core that :func:`mirror` has turned."""
    return core.transpose(-3, -2).flatten(-3, -2)


def times_bond(matrix: Tensor, bond: Tensor, batch_dims: int) -> Tensor:
    """``matrix @ diag(bond)`` or ``matrix @ bond``, for a spectrum or a full bond."""
    if bond.ndim - batch_dims == 1:
        return matrix * bond.unsqueeze(-2)
    return matrix @ bond


def scaled_left(cores: Sequence[Tensor], bond: Tensor) -> tuple[Tensor, ...]:
    """Left cores, the last one times the spectrum or the full bond."""
    *outer, inner = cores
    scaled = times_bond(left_frame(inner), bond, inner.ndim - 3)
    return (*outer, scaled.reshape(inner.shape))


def form_last(cores: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """Right cores whose last ``count`` have been contracted to one, ``(*b, R, m_k ... m_E, 1)``."""
    if count < 2:
        return tuple(cores)
    return (*cores[:-count], right_matrix(cores[-count:]).unsqueeze(-1))


def rows_times_v(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """Core-by-core ``x @ V`` for ``x`` of shape ``(*b, X, d_in)``: ``(*b, X, R_D)``."""
    # Sizes are spelt out, here and below: torch cannot infer one when another is zero.
    lead, count = x.shape[:-2], x.shape[-2]
    for core in reversed(cores):
        unfolding = core.flatten(-2).mT
        size = unfolding.shape[-2]
        x = x.reshape(*lead, x.shape[-2] * x.shape[-1] // size, size) @ unfolding
    return x.reshape(*lead, count, cores[0].shape[-3])


def rows_times_vt(cores: Sequence[Tensor], z: Tensor) -> Tensor:
    """Core-by-core ``z @ V^T`` for ``z`` of shape ``(*b, X, R_D)``: ``(*b, X, d_in)``."""
    lead, count = z.shape[:-2], z.shape[-2]
    for core in cores:
        size = core.shape[-3]
        z = z.reshape(*lead, z.shape[-2] * z.shape[-1] // size, size) @ core.flatten(-2)
    return z.reshape(*lead, count, math.prod(core.shape[-2] for core in cores))


def rows_times_u(cores: Sequence[Tensor], y: Tensor) -> Tensor:
    """Core-by-core ``y @ U`` for ``y`` of shape ``(*b, X, d_out)``: ``(*b, X, R_D)``.

    The rows are permuted once, to have the outermost mode last, and then every step is a product
    of two matrices: the cores, which are small, are read with their mode before their rank. The
    other way, a product of a core with each row as a matrix, leaves it to torch whether to fold
    the rows, which it does differently with and without a gradient, and sums its gradient over
    copies of the core.
    """
    lead, count = y.shape[:-2], y.shape[-2]
    y = _reversed_modes(y, [core.shape[-2] for core in cores])
    for core in cores:
        unfolding = core.transpose(-3, -2).flatten(-3, -2)
        size = unfolding.shape[-2]
        y = y.reshape(*lead, y.shape[-2] * y.shape[-1] // size, size) @ unfolding
    return y.reshape(*lead, count, cores[-1].shape[-1])


def rows_times_ut(cores: Sequence[Tensor], z: Tensor) -> Tensor:
    """Core-by-core ``z @ U^T`` for ``z`` of shape ``(*b, X, R_D)``: ``(*b, X, d_out)``.

    As :func:`rows_times_u`, with the permutation at the end.
    """
    lead, count = z.shape[:-2], z.shape[-2]
    for core in reversed(cores):
        unfolding = core.transpose(-3, -2).flatten(-3, -2).mT
        size = unfolding.shape[-2]
        z = z.reshape(*lead, z.shape[-2] * z.shape[-1] // size, size) @ unfolding
    modes = [core.shape[-2] for core in cores]
    z = z.reshape(*lead, count, math.prod(modes))
    return _reversed_modes(z, modes[::-1])


def _reversed_modes(rows: Tensor, modes: Sequence[int]) -> Tensor:
    """Rows with their modes in the opposite order."""
    if len(modes) < 2:
        return rows
    lead = rows.ndim - 1
    order = (*range(lead), *range(lead + len(modes) - 1, lead - 1, -1))
    return rows.reshape(*rows.shape[:-1], *modes).permute(order).reshape(rows.shape)


def rows_at(cores: Sequence[Tensor], index: Tensor, *, reverse: bool = False) -> Tensor:
    """Rows ``index`` of the product of left cores, ``(*b, P, R)``.

    With ``reverse`` the cores come from the last mode to the first, and the index is still
    row-major over the modes in their original order.
    """
    sizes = [core.shape[-2] for core in cores]
    if math.prod(sizes) > len(index):
        return rows_of_digits(cores, digits_of(cores, index, reverse=reverse))
    # No more rows than are asked for: the whole product costs less than a chain for each of them.
    matrix = left_matrix(cores)
    if reverse:
        batch, order = matrix.ndim - 2, range(matrix.ndim - 2, matrix.ndim - 2 + len(sizes))
        matrix = matrix.unflatten(-2, sizes).permute(*range(batch), *order[::-1], order.stop)
        matrix = matrix.flatten(batch, order[-1])
    return matrix[..., index, :]


def digits_of(
    cores: Sequence[Tensor], index: Tensor, *, reverse: bool = False
) -> tuple[Tensor, ...]:
    """Index into each mode, in the order of the cores; ``reverse`` as in :func:`rows_at`."""
    sizes = [core.shape[-2] for core in cores]
    digits: tuple[Tensor, ...] = torch.unravel_index(index, sizes[::-1] if reverse else sizes)
    return digits[::-1] if reverse else digits


def rows_of_digits(cores: Sequence[Tensor], digits: Sequence[Tensor]) -> Tensor:
    """Rows of the product of left cores, ``(*b, P, R)``, each given by its index in each mode."""
    rows = cores[0][..., 0, :, :].index_select(-2, digits[0])
    for core, digit in zip(cores[1:], digits[1:], strict=True):
        rows = torch.einsum("...pr,...rps->...ps", rows, core.index_select(-2, digit))
    return rows


def group_cores(
    cores: Sequence[Tensor], shapes: Sequence[tuple[int, int, int]]
) -> tuple[Tensor, ...]:
    """Contract neighbouring cores until they have ``shapes``."""
    grouped, rest = [], list(cores)
    for k, shape in enumerate(shapes):
        core = rest.pop(0)
        # Cores of mode one and equal ranks change no shape, and none may be left over.
        while tuple(core.shape[-3:]) != shape or (rest and k + 1 == len(shapes)):
            core = contract(core, rest.pop(0))
        grouped.append(core)
    return tuple(grouped)


def regroup_cores(cores: Sequence[Tensor], modes: Sequence[int]) -> tuple[Tensor, ...]:
    """The same product on other modes, coarser or finer, of one row-major index.

    Neighbours are contracted where a mode is too small; where it is too large, the core is split
    by an identity on the side that needs the lower rank.
    """

    def identity(rank: int, *size: int) -> Tensor:
        eye = torch.eye(rank, dtype=cores[0].dtype, device=cores[0].device)
        return eye.reshape(size).expand(*cores[0].shape[:-3], *size)

    grouped: list[Tensor] = []
    rest = list(cores)
    for k, mode in enumerate(modes):
        if not rest:
            # Modes of size one are left, which the cores had merged away.
            r = grouped[-1].shape[-1]
            rest = [identity(r, r, 1, r)]
        core = rest.pop(0)
        while core.shape[-2] < mode or (rest and k + 1 == len(modes)):
            core = contract(core, rest.pop(0))
        a, n, b = core.shape[-3:]
        if n > mode:
            tail = n // mode
            if a * mode <= tail * b:
                rest.insert(0, core.unflatten(-2, (mode, tail)).flatten(-4, -3))
                core = identity(a * mode, a, mode, a * mode)
            else:
                rest.insert(0, identity(tail * b, tail * b, tail, b))
                core = core.unflatten(-2, (mode, tail)).flatten(-2)
        grouped.append(core)
    return tuple(grouped)


def contract(core: Tensor, following: Tensor) -> Tensor:
    """Two neighbours as one core."""
    product = core.flatten(-3, -2) @ following.flatten(-2)
    size = core.shape[-2] * following.shape[-2]
    return product.reshape(*product.shape[:-2], core.shape[-3], size, following.shape[-1])


def environments(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """``A_{<=k}^T B_{<=k}`` of two products of left cores on equal modes, ``k = 0, ..., D``.

    Shape:
        - first, second: cores ``(*b, A_{k-1}, n_k, A_k)`` and ``(*b, B_{k-1}, n_k, B_k)``
        - output: ``D + 1`` matrices ``(*b, A_k, B_k)``
    """
    swept = [torch.ones(1, 1, dtype=first[0].dtype, device=first[0].device)]
    for a, b in zip(first, second, strict=True):
        pushed = (swept[-1] @ b.flatten(-2)).unflatten(-1, b.shape[-2:])
        swept.append(left_frame(a).mT @ left_frame(pushed))
    return swept


def triangle_of_sum(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Triangular factor of ``[A, B]`` for two products ``A`` and ``B`` of left cores."""
    triangle = torch.cat((first[0], second[0]), -1).flatten(-3, -2)
    triangle = torch.linalg.qr(triangle, mode="r").R
    for a, b in zip(first[1:], second[1:], strict=True):
        split = a.shape[-3]
        blocks = (
            triangle[..., :split] @ a.flatten(-2),
            triangle[..., split:] @ b.flatten(-2),
        )
        parts = [
            block.unflatten(-1, core.shape[-2:]).flatten(-3, -2)
            for block, core in zip(blocks, (a, b), strict=True)
        ]
        triangle = torch.linalg.qr(torch.cat(parts, -1), mode="r").R
    return triangle


def bond_of_difference(
    first: tuple[Sequence[Tensor], Tensor, Sequence[Tensor]],
    second: tuple[Sequence[Tensor], Tensor, Sequence[Tensor]],
) -> Tensor:
    """A matrix with the Frobenius norm of ``W - W'``, of two weights with orthonormal frames.

    ``W - W'`` is a chain of ranks ``R + R'``; its triangular factors are swept to the centre by
    QR, so that the norm of a small difference is accurate to rounding of the weights.

    Args:
        first: left cores, full bond and right cores of ``W``.
        second: those of ``W'``, with the same batch dimensions.
    """
    (left_a, bond_a, right_a), (left_b, bond_b, right_b) = first, second
    if _modes(left_a) == _modes(left_b) and _modes(right_a) == _modes(right_b):
        left = triangle_of_sum(left_a, left_b)
        right = triangle_of_sum(mirror(right_a), mirror(right_b))
    else:
        u = torch.cat((left_matrix(left_a), left_matrix(left_b)), -1)
        v = torch.cat((right_matrix(right_a).mT, right_matrix(right_b).mT), -1)
        left, right = (torch.linalg.qr(frames, mode="r").R for frames in (u, v))
    r = bond_a.shape[-1]
    bond = left[..., :r] @ bond_a @ right[..., :r].mT
    return bond - left[..., r:] @ bond_b @ right[..., r:].mT


def _modes(cores: Sequence[Tensor]) -> list[int]:
    return [core.shape[-2] for core in cores]


def frobenius(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm over ``dims``, whose squares neither overflow nor vanish."""
    scale = x.detach().abs().amax(dims, keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    norm = torch.linalg.vector_norm(x / scale, dim=dims, keepdim=True) * scale
    result: Tensor = norm.squeeze(dims)
    return result
