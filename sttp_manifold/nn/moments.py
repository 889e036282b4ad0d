r"""Second moments of what the weights of a network are multiplied with, from a few batches.

A network is run as it is, and each product of torch that reads one of its weights adds
:math:`\sum x x^\top` of the other factor: linear layers, products written out by hand, convolutions
of any dimension by their patches, rows of tables by how often they are looked up. No hook is set:
what a product reads is known by its memory, so that ties, slices (query, key and value of one
parameter) and functional calls are seen as well.

The cost is that of one forward of the data and of ``n d_in^2`` multiplications for each weight, in
float64 where the device has it, and ``8 d_in^2`` bytes for each; for a table of embeddings one
number a row.

Padding is no input: where the mask of a batch is known (:meth:`Moments.only`), a product with a row
for each of its places counts those that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Moments", "Part", "widest"]

# Elements of an input that are widened at a time.
_CHUNK = 1 << 22

Axes = tuple[tuple[int, int], ...]  # size and stride of the dimensions that a product sums over

aten = torch.ops.aten


def widest(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Part:
    """A part of a parameter as a product reads it.

    Attributes:
        parameter: number of the parameter.
        first: its first element in the parameter's memory.
        last: its last.
        axes: the dimensions that the product sums over.
    """

    parameter: int
    first: int
    last: int
    axes: Axes


class Moments(TorchDispatchMode):
    """Adds up second moments while it is entered.

    Args:
        parameters: those to watch; ordinary tensors with memory of their own.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = list(parameters)
        self._number = {id(p): k for k, p in enumerate(self._parameters)}
        self._memory = {_memory(p): (k, p) for k, p in enumerate(self._parameters)}
        self._sums: dict[Part, Tensor] = {}
        self._last: tuple[Any, Tensor] | None = None
        self._mask: Tensor | None = None

    @contextmanager
    def only(self, mask: Tensor | None) -> Iterator[None]:
        """Count what a mask keeps, of what has a row for each of its places; None for all.

        Shape:
            - mask: any, boolean
        """
        self._mask, self._last = mask, None
        try:
            yield
        finally:
            self._mask = self._last = None

    def watches(self, parameters: Iterable[Tensor]) -> bool:
        """Whether it was made to watch these very parameters.

        Shape:
            - parameters: any
        """
        return all(id(p) in self._number for p in parameters)

    def of(self, parameter: Tensor, matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Moments on both sides of a matrix that is a part of a parameter; None if not seen.

        Shape:
            - matrix: ``(d_out, d_in, *kernel)``, a view of ``parameter``
            - first: ``(d_out, d_out)`` or ``(d_out,)``, of what is multiplied from the left
            - second: ``(d_in, d_in)`` of flattened ``d_in`` and kernel
        """
        number = self._number[id(parameter)]
        start, end = _span(matrix, parameter)
        axes = list(zip(matrix.shape, matrix.stride(), strict=True))
        sides = (_without_ones(axes[:1]), _without_ones(axes[1:]))
        found: list[Tensor | None] = [None, None]
        for part, moment in self._sums.items():
            if part.parameter != number or part.last < start or part.first > end:
                continue
            for k, side in enumerate(sides):
                if part.axes == side:
                    found[k] = moment if found[k] is None else _added(found[k], moment)
                    break
        return found[0], found[1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        reader = _READERS.get(func)
        if reader is not None:
            reader(self, *args, **(kwargs or {}))
        elif func in _COPIES and isinstance(args[0], Tensor):
            known = self._known(args[0])
            if known is not None and result.is_contiguous() and args[0].is_contiguous():
                # A copy in another dtype, as of autocast; held, so that its memory is not reused.
                number, parameter = known
                if args[0].numel() == parameter.numel():
                    self._memory[_memory(result)] = (number, result)
        return result

    def _known(self, tensor: Tensor) -> tuple[int, Tensor] | None:
        if tensor.is_meta or not tensor.numel():
            return None
        return self._memory.get(_memory(tensor))

    def product(self, x: Callable[[], Tensor], weight: Tensor, dims: tuple[int, ...]) -> None:
        """``x``, rows of the size of some dimensions of a weight, is multiplied with it."""
        known = self._known(weight)
        if known is None:
            return
        number, base = known
        axes = _without_ones([(weight.shape[d], weight.stride(d)) for d in dims])
        first, last = _span(weight, base)
        self._add(Part(number, first, last, axes), x())

    def _add(self, part: Part, rows: Tensor) -> None:
        mask = self._mask
        if mask is not None and rows.shape[:-1] == (mask.numel(),):
            rows = rows[mask.flatten()]
        self.take(part, rows)

    def take(self, part: Part, rows: Tensor) -> None:
        """Rows that a part of a parameter is multiplied with."""
        key = (rows.data_ptr(), rows.shape, rows.stride(), rows._version, rows.dtype)
        if self._last is not None and self._last[0][0] == key:
            moment = self._last[1]
        else:
            moment = _moment(rows)
            self._last = ((key, rows), moment)  # rows are held, so that their memory is not reused
        self.sum_up(part, moment)

    def sum_up(self, part: Part, moment: Tensor) -> None:
        """Add a moment to those of a part of a parameter."""
        self._sums[part] = _added(self._sums.get(part), moment)

    def counted(self, indices: Tensor, table: Tensor, padding: int = -1) -> None:
        """Rows of a table are looked up; one of them may be padding, which is not counted."""
        known = self._known(table)
        if known is None:
            return
        number, base = known
        first, last = _span(table, base)
        part = Part(number, first, last, ((table.shape[0], table.stride(0)),))
        if self._mask is not None and self._mask.shape == indices.shape:
            indices = indices[self._mask]
        indices = indices if padding < 0 else indices[indices != padding]
        counts = torch.bincount(indices.flatten(), minlength=table.shape[0])
        self._sums[part] = _added(self._sums.get(part), counts.to(widest(counts.device)))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor, base: Tensor) -> tuple[int, int]:
    """First and last element in the memory of a parameter, from its own first on."""
    first = int(tensor.storage_offset() - base.storage_offset())
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return first, first + sum((size - 1) * stride for size, stride in steps)


def _without_ones(axes: Iterable[tuple[int, int]]) -> Axes:
    """Dimensions that are summed over, neighbours that lie one after the other as one."""
    found: list[tuple[int, int]] = []
    for size, stride in axes:
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return tuple(found)


def _added(a: Tensor | None, b: Tensor) -> Tensor:
    if a is None:
        return b.clone()
    if a.ndim < b.ndim:
        a = torch.diag(a)
    elif b.ndim < a.ndim:
        b = torch.diag(b)
    return a + b.to(a.device)


def _moment(rows: Tensor) -> Tensor:
    """``rows.mT @ rows`` of the last two dimensions, in the widest dtype."""
    dtype = widest(rows.device)
    size = rows.shape[-1]
    total = torch.zeros(*rows.shape[:-2], size, size, dtype=dtype, device=rows.device)
    for chunk in rows.split(max(1, _CHUNK // max(1, size)), dim=-2):
        wide = chunk.to(dtype)
        total += wide.mT @ wide
    return total


# -- what reads a weight -------------------------------------------------------------------------


def _two(moments: Moments, a: Tensor, b: Tensor) -> None:
    """``a @ b`` of matrices or of batches of them."""
    if b.ndim == a.ndim == 2:
        moments.product(lambda: a, b, (0,))
        moments.product(lambda: b.mT, a, (1,))
        return
    for x, y in zip(a, b, strict=True):
        _two(moments, x, y)


def _bmm(moments: Moments, a: Tensor, b: Tensor, **_: Any) -> None:
    if moments._known(a) is not None or moments._known(b) is not None:
        _two(moments, a, b)


def _mm(moments: Moments, a: Tensor, b: Tensor, **_: Any) -> None:
    _two(moments, a, b)


def _addmm(moments: Moments, bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> None:
    _bmm(moments, a, b)


def _mv(moments: Moments, a: Tensor, x: Tensor, **_: Any) -> None:
    _two(moments, a, x.unsqueeze(-1))


def _addmv(moments: Moments, bias: Tensor, a: Tensor, x: Tensor, **_: Any) -> None:
    _mv(moments, a, x)


def _linear(moments: Moments, x: Tensor, weight: Tensor, bias: Any = None) -> None:
    moments.product(lambda: x.reshape(-1, x.shape[-1]), weight, (1,))


def _embedding(
    moments: Moments, table: Tensor, indices: Tensor, padding: int = -1, *_: Any
) -> None:
    moments.counted(indices, table, padding)


def _bag(moments: Moments, table: Tensor, indices: Tensor, *_: Any, **__: Any) -> None:
    moments.counted(indices, table)


def _convolution(
    moments: Moments,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> None:
    if moments._known(weight) is None:
        return
    spatial = weight.ndim - 2
    if x.ndim == spatial + 1:
        x = x.unsqueeze(0)
    several = weight.unflatten(0, (groups, -1))
    if transposed:
        rows = x.movedim(1, -1).reshape(-1, groups, x.shape[1] // groups)
        _grouped(moments, [rows], several, (0,))
        return
    each = [(n * spatial)[:spatial] if len(n) == 1 else n for n in (stride, padding, dilation)]
    patches = _patches(x, tuple(weight.shape[2:]), each, groups)
    _grouped(moments, patches, several, tuple(range(1, weight.ndim)))


def _grouped(
    moments: Moments, chunks: Iterable[Tensor], weight: Tensor, dims: tuple[int, ...]
) -> None:
    """Rows ``(n, groups, d)``, each group with its own part of a weight."""
    for rows in chunks:
        for group, part in zip(rows.unbind(1), weight, strict=True):
            moments.product(lambda group=group: group, part, dims)  # type: ignore[misc]


def _patches(
    x: Tensor,
    kernel: tuple[int, ...],
    settings: Sequence[Sequence[int]],
    groups: int,
) -> Iterator[Tensor]:
    """What a convolution multiplies with its kernel, ``(n, groups, c_in / groups k_1 ...)``.

    ``settings`` are stride, padding and dilation.
    """
    stride, padding, dilation = settings
    x = nn.functional.pad(x, [p for p in reversed(padding) for _ in range(2)]).contiguous()
    sizes = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    out = [max(0, (size - d * (k - 1) - 1) // s + 1) for size, k, s, d in sizes]
    n, channels, *steps = x.stride()
    places = [step * s for step, s in zip(steps, stride, strict=True)]
    inside = [step * d for step, d in zip(steps, dilation, strict=True)]
    window = x.as_strided((x.shape[0], *out, x.shape[1], *kernel), (n, *places, channels, *inside))
    per = max(1, window[:1].numel())
    for part in window.split(max(1, _CHUNK // per)):
        yield part.reshape(-1, groups, part.shape[len(out) + 1 :].numel() // groups)


_READERS: dict[Any, Callable[..., None]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.mv.default: _mv,
    aten.addmv.default: _addmv,
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten._embedding_bag.default: _bag,
    aten._embedding_bag_forward_only.default: _bag,
    aten.convolution.default: _convolution,
}
_COPIES = {aten._to_copy.default, aten.clone.default}
