"""Contractions of spectral tensor trains, and the plan of a linear map by its cost.

Every function takes raw cores with any leading batch dimensions: left cores ``(*b, R, n, R')``
from the outermost inwards, right cores ``(*b, R, m, R')`` from the centre outwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sttp_manifold.tt.shape import TTShape

__all__ = [
    "conv_plan",
    "digits_of",
    "environments",
    "frobenius",
    "group_cores",
    "left_frame",
    "left_matrix",
    "linear_plan",
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
    "times_bond",
    "triangle_of_sum",
]

Plan = Literal["dense", "lowrank", "cores"]

# Cost of a contraction on a CPU in units of one floating-point operation: a kernel call, an
# element that a matrix product touches, and an element that is permuted. FLOPs alone choose badly.
_CALL, _TOUCH, _PERMUTE = 4e5, 8.0, 60.0
# Output channels that a convolution computes at once.
_CHANNELS = 16


def left_matrix(cores: Sequence[Tensor]) -> Tensor:
    """Product of left cores as a matrix, ``(*b, n_1 ... n_D, R_D)``."""
    product = cores[0].flatten(-3, -2)
    for core in cores[1:]:
        rows, rank = product.shape[-2] * core.shape[-2], core.shape[-1]
        product = (product @ core.flatten(-2)).reshape(*product.shape[:-2], rows, rank)
    return product


def right_matrix(cores: Sequence[Tensor]) -> Tensor:
    """Product of right cores as a matrix, ``(*b, R_D, m_1 ... m_E)``."""
    product = cores[-1].flatten(-2)
    for core in reversed(cores[:-1]):
        rank, columns = core.shape[-3], core.shape[-2] * product.shape[-1]
        product = (core.flatten(-3, -2) @ product).reshape(*product.shape[:-2], rank, columns)
    return product


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
    """Core-by-core ``y @ U`` for ``y`` of shape ``(*b, X, d_out)``: ``(*b, X, R_D)``."""
    lead = y.shape[:-1]
    y = y.unsqueeze(-2)
    for core in cores:
        unfolding = core.flatten(-3, -2).mT
        size = unfolding.shape[-1]
        y = y.reshape(*lead, size, y.shape[-2] * y.shape[-1] // size)
        y = unfolding.unsqueeze(-3) @ y
    return y.squeeze(-1)


def rows_times_ut(cores: Sequence[Tensor], z: Tensor) -> Tensor:
    """Core-by-core ``z @ U^T`` for ``z`` of shape ``(*b, X, R_D)``: ``(*b, X, d_out)``."""
    lead = z.shape[:-1]
    z = z.unsqueeze(-1)
    for core in reversed(cores):
        z = core.flatten(-3, -2).unsqueeze(-3) @ z
        size = core.shape[-3]
        z = z.reshape(*lead, size, z.shape[-2] * z.shape[-1] // size)
    return z.flatten(-2)


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
    for shape in shapes:
        core = rest.pop(0)
        while tuple(core.shape[-3:]) != shape:
            core = _contract(core, rest.pop(0))
        grouped.append(core)
    return tuple(grouped)


def regroup_cores(cores: Sequence[Tensor], modes: Sequence[int]) -> tuple[Tensor, ...]:
    """The same product on other modes, coarser or finer, of one row-major index.

    Neighbours are contracted where a mode is too small; where it is too large, the core is split
    by an identity on the side that needs the lower rank.
    """
    grouped, rest = [], list(cores)
    for mode in modes:
        core = rest.pop(0)
        while core.shape[-2] < mode:
            core = _contract(core, rest.pop(0))
        a, n, b = core.shape[-3:]
        if n > mode:
            tail = n // mode
            if a * mode <= tail * b:
                eye = torch.eye(a * mode, dtype=core.dtype, device=core.device)
                rest.insert(0, core.unflatten(-2, (mode, tail)).flatten(-4, -3))
                core = eye.reshape(a, mode, a * mode)
            else:
                eye = torch.eye(tail * b, dtype=core.dtype, device=core.device)
                rest.insert(0, eye.reshape(tail * b, tail, b))
                core = core.unflatten(-2, (mode, tail)).flatten(-2)
        grouped.append(core)
    return tuple(grouped)


def _contract(core: Tensor, following: Tensor) -> Tensor:
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


def frobenius(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm over ``dims``, whose squares neither overflow nor vanish."""
    scale = x.detach().abs().amax(dims, keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    norm = torch.linalg.vector_norm(x / scale, dim=dims, keepdim=True) * scale
    result: Tensor = norm.squeeze(dims)
    return result


def _gemm(rows: int, inner: int, columns: int) -> float:
    touched = rows * inner + inner * columns + rows * columns
    return 2.0 * rows * inner * columns + _CALL + _TOUCH * touched


@lru_cache(maxsize=4096)
def linear_plan(shape: TTShape, count: int) -> Plan:
    """Cheapest way to apply ``W`` to ``count`` vectors, by a cost model.

    Args:
        shape: the plan of the weight; its merged chain is what is contracted.
        count: how many vectors are multiplied at once.

    Returns:
        ``"dense"`` (form ``W``), ``"lowrank"`` (form ``U`` and ``V``), or ``"cores"`` (form
        nothing). The result of the map is the same up to rounding.
    """
    merged = shape.merged
    r = merged.rank
    form = core_by_core = 0.0
    size = 1
    for k, (a, n, b) in enumerate(merged.left_core_shapes):
        form += _gemm(size, a, n * b) if k else 0.0
        size *= n
        core_by_core += _gemm(a * n, b, count * (merged.d_out // size)) + _PERMUTE * count * (
            a * merged.d_out // (size // n)
        )
    size = 1
    for k, (a, m, b) in enumerate(reversed(merged.right_core_shapes)):
        form += _gemm(a * m, b, size) if k else 0.0
        size *= m
        core_by_core += _gemm(count * merged.d_in // size, m * b, a)
    low_rank = _gemm(count, merged.d_in, r) + _gemm(count, r, merged.d_out)
    dense = _gemm(merged.d_out, r, merged.d_in) + _gemm(count, merged.d_in, merged.d_out)
    # Comparisons, not min(key=...): torch.compile traces this with a symbolic count.
    if dense <= low_rank and form + dense <= core_by_core:
        return "dense"
    return "lowrank" if form + low_rank <= core_by_core else "cores"


@lru_cache(maxsize=4096)
def conv_plan(shape: TTShape, positions: int) -> Literal["dense", "factorized"]:
    """Cheapest way to convolve with a kernel ``W`` read as ``c_out x (c_in k)``.

    Args:
        shape: the plan of the kernel.
        positions: places of the output, over the batch, at which the kernel is applied.

    Returns:
        ``"dense"`` (form ``W``), or ``"factorized"`` (``r`` kernels from ``V^T``, then a pointwise
        convolution by ``U S``). The result is the same up to rounding.
    """
    d_out, d_in, r = shape.d_out, shape.d_in, shape.rank
    dense = _gemm(d_out, r, d_in) + _convolution(positions, d_in, d_out)
    factorized = _convolution(positions, d_in, r) + _convolution(positions, r, d_out)
    return "dense" if dense <= factorized else "factorized"


def _convolution(positions: int, inner: int, channels: int) -> float:
    # Kernels compute output channels in blocks: four cost as much as sixteen.
    blocked = -(-channels // _CHANNELS) * _CHANNELS
    return positions * (2.0 * inner * blocked + 2 * _TOUCH * channels) + _CALL
