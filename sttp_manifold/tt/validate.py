"""Checks of what users hand over: cores, vectors to be multiplied, places of entries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sttp_manifold.errors import PlaceError, ShapeError
from sttp_manifold.tt.shape import TTShape

__all__ = [
    "check_chain",
    "check_finite",
    "check_kinds",
    "check_pair",
    "check_parts",
    "check_places",
    "check_rows",
    "check_type",
    "common_batch",
    "shape_of_cores",
]

_INTEGERS = (
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


def check_type(value: object, kind: type, call: str) -> None:
    """Refuse an argument of another type.

    Args:
        value: what a user gave.
        kind: the type that is wanted.
        call: a call that works, with which the message begins.

    Raises:
        ShapeError: such an argument.
    """
    if not isinstance(value, kind):
        raise ShapeError(
            f"{call} takes a {kind.__name__}, got {type(value).__name__}: {value!r:.80}"
        )


def check_parts(left: object, right: object, shape: object) -> None:
    """Refuse what cannot be sides and plan of a value.

    Raises:
        ShapeError: sides that are no sequences, or a plan that is none.
    """
    check_type(left, Sequence, "SpectralTT(left, spectrum, right): left")
    check_type(right, Sequence, "SpectralTT(left, spectrum, right): right")
    if shape is not None:
        check_type(shape, TTShape, "SpectralTT(left, spectrum, right, shape): shape")


def check_chain(left: Sequence[Tensor], right: Sequence[Tensor]) -> torch.Size:
    """Refuse cores that do not chain on either side; their centre is left to the caller.

    Shape:
        - left, right: each ``(*b, R_{k-1}, mode_k, R_k)``

    Returns:
        The batch shape ``b``.

    Raises:
        ShapeError: what is no tensor of real floating-point numbers, mixed dtypes or devices, or
            neighbours of other ranks.
    """
    if not left or not right:
        raise ShapeError("at least one core is needed on each side of the spectrum")
    batch: torch.Size | None = None
    for name, cores, before in (("left", left, 0), ("right", right, len(left))):
        for k, core in enumerate(cores):
            check_type(core, Tensor, f"{name} core {k}")
            batch = core.shape[:-3] if batch is None else batch
            if core.ndim < 3 or core.shape[:-3] != batch or 0 in core.shape[-3:]:
                sizes = ", ".join(map(str, (*batch, "R", "mode", "R'")))
                raise ShapeError(
                    f"{name} core {k} has shape {tuple(core.shape)}; expected ({sizes})"
                )
        for bond, (a, b) in enumerate(pairwise(cores), start=before + 1):
            if a.shape[-1] != b.shape[-3]:
                raise ShapeError(
                    f"{name} cores disagree at bond {bond}: {a.shape[-1]} and {b.shape[-3]}"
                )
    check_kinds((*left, *right), "cores")
    assert batch is not None
    return batch


def check_kinds(tensors: Sequence[Tensor], what: str) -> None:
    """Refuse tensors of mixed dtypes or devices, or not of real floating-point numbers.

    Raises:
        ShapeError: such tensors.
    """
    kinds = {f"{t.dtype} on {t.device}" for t in tensors}
    if len(kinds) > 1:
        raise ShapeError(f"{what} must share dtype and device, got {', '.join(sorted(kinds))}")
    if not tensors[0].is_floating_point():
        raise ShapeError(
            f"{what} must be real floating-point tensors, got {tensors[0].dtype}; convert them "
            "first, as by core.double()"
        )


def check_finite(tensors: Sequence[Tensor], what: str) -> None:
    """Refuse numbers that are not finite, of which no factorization is defined.

    Raises:
        ShapeError: such numbers.
    """
    if not all(t.is_meta or bool(t.isfinite().all()) for t in tensors):
        raise ShapeError(f"{what} has entries that are not finite, so it has no singular values")


def shape_of_cores(left: Sequence[Tensor], spectrum: Tensor, right: Sequence[Tensor]) -> TTShape:
    """The plan that cores and a spectrum follow.

    Shape:
        - left, right: each ``(*b, R_{k-1}, mode_k, R_k)``
        - spectrum: ``(*b, r)`` or ``(*b, r, r)``

    Raises:
        ShapeError: as :func:`check_chain`, or a spectrum that does not fit between the sides.
        RankError: ranks that the modes cannot carry.
    """
    batch = check_chain(left, right)
    check_type(spectrum, Tensor, "the spectrum")
    check_kinds((*left, spectrum, *right), "cores and spectrum")
    r, following = left[-1].shape[-1], right[0].shape[-3]
    if r != following:
        raise ShapeError(f"the sides disagree at the centre: ranks {r} and {following}")
    if tuple(spectrum.shape) not in ((*batch, r), (*batch, r, r)):
        raise ShapeError(
            f"spectrum of shape {tuple(spectrum.shape)} does not fit a centre rank {r} "
            f"and batch shape {tuple(batch)}: expected {(*batch, r)} or {(*batch, r, r)}"
        )
    return TTShape(
        (core.shape[-2] for core in left),
        (core.shape[-2] for core in right),
        ranks=(left[0].shape[-3], *(core.shape[-1] for core in (*left, *right))),
    )


def check_rows(x: object, name: str, like: Tensor, batch: torch.Size, size: int) -> None:
    """Refuse what a weight cannot be multiplied by.

    Args:
        x: the vectors.
        name: the method that was called.
        like: a tensor of the weight, of its dtype and device.
        batch: batch shape of the weight.
        size: length of a vector.

    Raises:
        ShapeError: another size, batch, dtype or device.
    """
    # Messages are made where they are needed: torch.compile traces this.
    if not isinstance(x, Tensor):
        got = f"a {type(x).__name__}"
    elif x.ndim < len(batch) + 1 or x.shape[-1] != size or x.shape[: len(batch)] != batch:
        got = f"{tuple(x.shape)}"
    elif x.device != like.device:
        got = f"{x.device}; call tt.to({str(x.device)!r}).{name}(x)"
    elif x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        got = f"{x.dtype}; call tt.{name}(x.to(tt.dtype)) or tt.to(x.dtype).{name}(x)"
    else:
        return
    sizes = ", ".join(map(str, (*batch, "*", size)))
    raise ShapeError(f"tt.{name} takes ({sizes}) in {like.dtype} on {like.device}, got {got}")


def check_pair(name: str, shapes: tuple[TTShape, TTShape], tensors: tuple[Tensor, Tensor]) -> None:
    """Refuse two weights that no operation can take together.

    Args:
        name: the method that was called.
        shapes: their plans.
        tensors: one tensor of each, of its dtype and device.

    Raises:
        ShapeError: other sizes, dtypes or devices.
    """
    sizes = [f"{shape.d_out} x {shape.d_in}" for shape in shapes]
    if sizes[0] != sizes[1]:
        raise ShapeError(f"{name} between a {sizes[0]} and a {sizes[1]} weight is not defined")
    kinds = [f"{t.dtype} on {t.device}" for t in tensors]
    if kinds[0] != kinds[1]:
        raise ShapeError(
            f"{name} between weights in {kinds[0]} and {kinds[1]}; call "
            f"tt.{name}(other.to(tt.spectrum))"
        )


def common_batch(first: torch.Size, second: torch.Size) -> torch.Size:
    """The batch shape that two broadcast to.

    Raises:
        ShapeError: two that do not.
    """
    try:
        return torch.broadcast_shapes(first, second)
    except RuntimeError:
        raise ShapeError(
            f"batch shapes {tuple(first)} and {tuple(second)} do not broadcast"
        ) from None


def check_places(
    i: Tensor, j: Tensor, d_out: int, d_in: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Places of a matrix as two tensors of non-negative int64 on a device.

    Args:
        i: rows, of any integer dtype or as a list; negative ones count from the end.
        j: columns, likewise.
        d_out: rows of the matrix.
        d_in: its columns.
        device: device of the result.

    Shape:
        - i, j: ``(*P)``, of one shape
        - output: the same

    Raises:
        ShapeError: index tensors of different shapes, or not of integers.
        PlaceError: places outside of the matrix.
    """
    rows, columns = _indices(i, "i", device), _indices(j, "j", device)
    if rows.shape != columns.shape:
        raise ShapeError(
            "places are two integer tensors of one shape, as in tt.entries(i, j); got "
            f"{tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    return _wrapped(rows, "i", d_out), _wrapped(columns, "j", d_in)


def _indices(index: object, name: str, device: torch.device) -> Tensor:
    takes = f"places are two integer tensors of one shape, as in tt.entries(i, j); got {name} = "
    try:
        found = torch.as_tensor(index, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"{takes}{index!r} ({error})") from error
    if found.numel() == 0 and not isinstance(index, Tensor):
        found = found.long()  # an empty list, which torch takes for one of floats
    if found.dtype not in _INTEGERS:
        hint = "; a mask is turned into places by mask.nonzero(as_tuple=True)"
        raise ShapeError(f"{takes}{found.dtype}{hint if found.dtype == torch.bool else ''}")
    # Before anything is indexed: to torch, uint8 is a mask.
    if found.dtype == torch.uint64 and not found.is_meta and bool((found.long() < 0).any()):
        raise PlaceError(f"{name} holds numbers of 2**63 and more, over all sizes", index=name)
    return found.long()


def _wrapped(index: Tensor, name: str, size: int) -> Tensor:
    if index.is_meta or not index.numel():
        return index
    low, high = (int(bound) for bound in index.aminmax())
    if low < -size or high >= size:
        raise PlaceError(
            f"{name} runs from {low} to {high}, outside 0 <= {name} < {size} (or, from the end, "
            f"-{size} <= {name} < 0)",
            index=name,
        )
    return torch.where(index < 0, index + size, index) if low < 0 else index
