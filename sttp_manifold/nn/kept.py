"""Weights that layers keep from one forward without gradient to the next, on the CPU.

The first forward without gradient only notes which tensors the weight is made of. The second one
that finds the same tensors keeps the weight, with a copy of the bytes of each parameter; later ones
compare all bytes before each use, since torch has ways to write that leave no other trace. A
parameter that differs in any byte, in shape or in dtype ends it, and so does a forward with
gradient: training keeps nothing.

On an accelerator nothing is kept. Comparing values there would make each layer wait for the device,
and a version counter does not see a write through ``.data``.

What is kept is for layers alone, which do nothing but multiply by it: no caller sees it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold.nn.methods import EXACT_TENSORS, EXACT_WEIGHTS
from sttp_manifold.nn.scope import in_scope, noted
from sttp_manifold.nn.torch_state import circumstances, is_hooked, outside_autocast
from sttp_manifold.nn.weight import SpectralWeight, factors_of

__all__ = ["is_kept", "kept"]

# Forwards that may have to find the same tensors before another weight is kept, where those that
# were kept have been of no use.
_LONGEST_WAIT = 64


class Bytes(NamedTuple):
    """A copy of a tensor, as its bytes lie."""

    dtype: torch.dtype
    shape: torch.Size
    array: type[ctypes.Array[ctypes.c_char]]
    content: bytearray

    @classmethod
    def of(cls, tensor: Tensor) -> Bytes:
        """Copy a tensor that has an address."""
        array = ctypes.c_char * tensor.nbytes
        content = bytearray(array.from_address(_address(tensor)))
        return cls(tensor.dtype, tensor.shape, array, content)


def _address(tensor: Tensor, size: int = 0) -> int:
    """Where all bytes of a tensor lie, as it is; 0 if they do not, or are not its value.

    Args:
        tensor: the tensor.
        size: how many bytes, where that is known.
    """
    if (
        type(tensor) not in EXACT_TENSORS
        or not tensor.is_cpu
        or tensor.layout is not torch.strided
        or not tensor.is_contiguous()
        or tensor.is_neg()
    ):
        return 0
    # Sharded training frees the memory of parameters and leaves them their sizes.
    space = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize
    return tensor.data_ptr() if space >= (size or tensor.nbytes) else 0


class Snapshot(NamedTuple):
    """Parameters of a weight at one time, and the weight by form."""

    copies: tuple[Bytes, ...]
    forms: dict[str, tuple[Tensor, ...]]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors in every bit; six times as fast as ``torch.equal``."""
        if len(tensors) != len(self.copies):
            return False
        for (dtype, shape, array, content), tensor in zip(self.copies, tensors, strict=True):
            if tensor.dtype is not dtype or tensor.shape != shape:
                return False
            address = _address(tensor, len(content))
            if not address or content != memoryview(array.from_address(address)):
                return False
        return True


Forms = Callable[[bool], str]
"""The form in which a layer wants its weight: if it has to be formed, and if it is at hand."""
Seen = tuple[tuple[int, int], ...]
"""Identity and version of tensors: a hint that they are the same, and no more than that."""


class _Record:
    """What is known of a weight. Threads share it: each looks at the snapshot once."""

    __slots__ = ("count", "seen", "snapshot", "useful", "wait")

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.seen: Seen = ()
        self.count = 0
        self.wait = 1
        self.useful = False

    def see(self, seen: Seen) -> bool:
        """Whether the same tensors were there often enough for the weight to be kept."""
        self.count = self.count + 1 if seen == self.seen else 0
        self.seen = seen
        return self.count >= self.wait

    def drop(self) -> None:
        """Keep nothing, and wait the longer if it was of no use."""
        self.wait = 1 if self.useful else min(2 * self.wait, _LONGEST_WAIT)
        self.snapshot, self.seen, self.count, self.useful = None, (), 0, False


# Beside the modules and not in them: copies and pickles of a weight take nothing along.
_records: weakref.WeakKeyDictionary[SpectralWeight, _Record] = weakref.WeakKeyDictionary()


def kept(weight: SpectralWeight, form: Forms) -> tuple[Tensor, ...] | None:
    """A weight for use by its layer, which writes into it never; None if the layer is to form it.

    Args:
        weight: the weight.
        form: the form in which the layer would ask for it (``"dense"``, ``"factors"`` or
            ``"cores"``), and with True that in which it wants it at hand (one of the first two).

    Returns:
        ``(W,)`` or ``(U diag(s), V^T)``.
    """
    if torch.compiler.is_compiling():
        return None
    record = _records.get(weight)
    if torch.is_grad_enabled() or type(weight) not in EXACT_WEIGHTS:
        if record is not None:
            _records.pop(weight, None)
        return None
    if circumstances() is None or is_hooked(weight):
        return None
    tensors = weight._tensors()
    snapshot = None if record is None else record.snapshot
    if record is not None and snapshot is not None:
        if snapshot.fits(tensors):
            record.useful = True
            return _from(snapshot, weight, form)
        record.drop()
    seen = _seen(tensors)
    if seen is None or not tensors[0].is_cpu:
        return None
    if record is None:
        record = _records.setdefault(weight, _Record())
    if not record.see(seen) or not all(map(_address, tensors)):
        return None
    snapshot = Snapshot(tuple(map(Bytes.of, tensors)), {})
    found = _from(snapshot, weight, form)
    if snapshot.forms:
        record.snapshot = snapshot
    return found


def is_kept(weight: SpectralWeight) -> bool:
    """Whether a layer is likely to use what is kept; a write through ``.data`` is not seen here."""
    record = _records.get(weight)
    snapshot = None if record is None else record.snapshot
    if record is None or snapshot is None:
        return False
    tensors = weight._tensors()
    seen = _seen(tensors)
    if seen is not None and seen != record.seen and snapshot.fits(tensors):
        record.seen = seen
    return seen is not None and seen == record.seen


def _seen(tensors: Sequence[Tensor]) -> Seen | None:
    """What tells tensors from others at a glance; None if one has no version."""
    seen = []
    for tensor in tensors:
        if tensor.is_inference():
            return None
        seen.append((id(tensor), tensor._version))
    return tuple(seen)


def _from(snapshot: Snapshot, weight: SpectralWeight, form: Forms) -> tuple[Tensor, ...]:
    """The weight in the form that the layer wants at hand, formed now if it has not been yet."""
    wanted = form(True)
    found = snapshot.forms.get(wanted)
    if found is not None:
        if in_scope():
            noted(weight, form(False))
        return found
    found = _owned(_formed(weight, form(False), wanted))
    # Another thread may have written meanwhile.
    if snapshot.fits(weight._tensors()):
        snapshot.forms[wanted] = found
    return found


def _formed(weight: SpectralWeight, asked: str, wanted: str) -> tuple[Tensor, ...]:
    """The weight in a form, from that in which a batch may have it."""
    if asked == wanted == "dense":
        return (weight(),)
    with outside_autocast(weight.device):
        us, vt = factors_of(weight.tt()) if asked == "cores" else weight.factors()
        return (us, vt) if wanted == "factors" else (us @ vt,)


def _owned(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies in memory of their own, fit for use inside of inference mode and outside."""
    with torch.inference_mode(False), torch.no_grad():
        return tuple(t.clone(memory_format=torch.contiguous_format) for t in tensors)
