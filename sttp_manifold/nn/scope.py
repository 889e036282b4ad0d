"""Weights of a network computed together, once in each forward pass of its root.

Hooks on the root open a *scope* for the time of its forward. The first forward only writes down
which weights are asked for, and in which form; from the second on, those are computed at its
start, equal frames and equal chains as one batch each (:mod:`sttp_manifold.nn.batch`), and handed
out where they are asked for. Nothing outlives the forward.

A weight of the batch is handed out once, and only if nothing has changed since: every tensor that
it was computed from is the same object, as trainable as before, and of the same value on a CPU
(writes through ``.data`` leave no other trace), in the same memory at the same version elsewhere
(comparing values would wait for the device); and torch is doing the same
(:func:`~sttp_manifold.nn.torch_state.circumstances`). Otherwise it is computed on its own, as it
is outside of any scope.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.nn.torch_state import Circumstances, circumstances

if TYPE_CHECKING:
    from sttp_manifold.nn.weight import SpectralWeight

__all__ = ["is_together", "noted", "partners", "taken", "together"]

# After so many forwards in a row that asked for other weights than the one before, or from which a
# batch had nothing to gain, rest for a while; each time for longer, up to so many forwards.
_PATIENCE = 4
_LONGEST_REST = 256
# So many weights of one plan are a batch, whatever they are held by.
_FEW = 4
# Without gradient any part of the weights may be kept by their layers, and the others need a plan.
_LAYOUTS = 16


class Stamp(NamedTuple):
    """A tensor on an accelerator as it was before a weight was computed from it.

    ``memory`` keeps its place taken, so that no other tensor can have the same pointer.
    """

    tensor: Tensor
    trainable: bool
    memory: Tensor
    version: int
    pointer: int

    @classmethod
    def of(cls, tensor: Tensor) -> Stamp:
        """The stamp of a tensor now."""
        return cls(
            tensor, tensor.requires_grad, tensor.detach(), tensor._version, tensor.data_ptr()
        )

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor is this one, by everything but its value: nothing waits for it."""
        return (
            tensor is self.tensor
            and tensor.requires_grad == self.trainable
            and tensor._version == self.version
            and tensor.data_ptr() == self.pointer
        )


class Copy(NamedTuple):
    """A tensor on a CPU, and the value from which a weight was computed."""

    tensor: Tensor
    trainable: bool
    value: Tensor

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor is this one, with the same value."""
        return (
            tensor is self.tensor
            and tensor.requires_grad == self.trainable
            and tensor.dtype == self.value.dtype
            and torch.equal(tensor, self.value)
        )


class Ledger:
    """What of one computation has been given out; ``closed`` when no more will be."""

    __slots__ = ("closed", "given")

    def __init__(self) -> None:
        self.given: set[int] = set()
        self.closed = False


class Entry(NamedTuple):
    """A weight computed at the start of a forward.

    Attributes:
        stamps: the tensors that it was computed from.
        outputs: what it consists of, in its form.
        place: its place in the computation.
        ledger: the computation's.
    """

    stamps: Sequence[Stamp | Copy]
    outputs: tuple[Tensor, ...]
    place: int
    ledger: Ledger

    def take(self, weight: SpectralWeight) -> tuple[Tensor, ...] | None:
        """The outputs, unless anything has changed."""
        tensors = weight._tensors()
        if len(tensors) != len(self.stamps):
            return None
        for stamp, tensor in zip(self.stamps, tensors, strict=True):
            if not stamp.fits(tensor):
                return None
        self.ledger.given.add(self.place)
        return self.outputs


Asked = tuple["SpectralWeight", str]
"""A weight and the form in which it is wanted: ``"dense"``, ``"factors"`` or ``"cores"``."""
Entries = dict[tuple[int, str], list[Entry]]
"""Weights that a scope can give, by identity and form; the next one to give comes last."""


class _Scope:
    """One forward of one root, in one thread."""

    __slots__ = ("asked", "entries", "frame", "ledgers", "partners", "state")

    def __init__(self, frame: FrameType, state: Circumstances, partners: dict[int, int]) -> None:
        self.partners = partners
        self.frame = frame
        self.state = state
        self.asked: list[Asked] = []
        self.entries: Entries = {}
        self.ledgers: list[Ledger] = []


class _Memory:
    """What the last forward of a root asked for, in one training and grad mode.

    ``gained`` is whether the last batch that was thought of was worth it; ``partners`` is how many
    weights have the plan of each, by identity.
    """

    __slots__ = ("asked", "gained", "layouts", "left", "misses", "partners", "rest")

    def __init__(self) -> None:
        self.asked: tuple[tuple[weakref.ref[SpectralWeight], str], ...] = ()
        self.layouts: dict[object, Any] = {}
        self.gained = False
        self.partners: dict[int, int] = {}
        self.misses = 0
        self.rest = self.left = 0

    def learn(self, scope: _Scope) -> None:
        """Take down what a forward asked for, and whether it was worth it."""
        before = self.asked
        same = len(before) == len(scope.asked) and all(
            ref() is weight and old == form
            for (ref, old), (weight, form) in zip(before, scope.asked, strict=True)
        )
        if not same:
            self.layouts = {}
            self.asked = tuple((weakref.ref(weight), form) for weight, form in scope.asked)
            weights = {id(weight): weight for weight, _ in scope.asked}
            plans = {key: (type(w), w.shape.merged) for key, w in weights.items()}
            counts = Counter(plans.values())
            self.partners = {key: counts[plan] for key, plan in plans.items()}
        if same and self.gained:
            self.misses = self.rest = 0
            return
        self.misses += 1
        if self.misses > _PATIENCE:
            self.left = self.rest = min(2 * self.rest + 1, _LONGEST_REST)

    def rests(self) -> bool:
        """Whether to let this forward pass by."""
        self.left -= self.left > 0
        return self.left > 0


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Scope] = []


_scopes = _Scopes()
_memories: weakref.WeakKeyDictionary[nn.Module, dict[tuple[bool, bool], _Memory]] = (
    weakref.WeakKeyDictionary()
)


def taken(weight: SpectralWeight, form: str) -> tuple[Tensor, ...] | None:
    """A weight from the scope of the forward that is running, or None if it has none to give.

    Args:
        weight: the weight.
        form: ``"dense"``, ``"factors"`` or ``"cores"``.
    """
    if torch.compiler.is_compiling() or not _scopes.stack:
        return None
    entry = noted(weight, form)
    return None if entry is None else entry.take(weight)


def partners(weight: SpectralWeight) -> int:
    """How many weights are formed by the same calls as this one, in the forward that is running.

    By what the last forward asked for; one outside of any, and where they are too few for a batch.
    """
    if torch.compiler.is_compiling() or not _scopes.stack:
        return 1
    scope = _top()
    if scope is None or circumstances() != scope.state:
        return 1
    count = scope.partners.get(id(weight), 1)
    return count if count >= _FEW else 1


def noted(weight: SpectralWeight, form: str) -> Entry | None:
    """Tell the scope that a weight is asked for; what the scope has of it is out of the scope."""
    scope = _top()
    if scope is None or circumstances() != scope.state:
        return None
    scope.asked.append((weight, form))
    entries = scope.entries.get((id(weight), form))
    return entries.pop() if entries else None


def _top() -> _Scope | None:
    """The innermost scope whose forward is running still; what an interrupt left is dropped."""
    stack = _scopes.stack
    while stack:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame is not stack[-1].frame:
            frame = frame.f_back
        if frame is not None:
            return stack[-1]
        stack.pop()
    return None


def enter(module: nn.Module, args: object) -> None:
    """Forward pre-hook of a root: open a scope, unless the one around it does as well."""
    if torch.compiler.is_compiling():
        return
    state = circumstances()
    if state is None:
        return
    around = _top()
    if around is not None and around.state == state:
        return
    memory = _memory(module, state)
    if memory.rests():
        return
    scope = _Scope(sys._getframe(1), state, memory.partners)
    asked = [(weight, form) for ref, form in memory.asked if (weight := ref()) is not None]
    if asked:
        from sttp_manifold.nn.batch import compute

        if len(memory.layouts) > _LAYOUTS:
            memory.layouts.clear()
        scope.entries, scope.ledgers = compute(asked, memory.layouts)
        if scope.ledgers or len(asked) == len(memory.asked):
            memory.gained = bool(scope.ledgers)  # a few left over by others say nothing
    _scopes.stack.append(scope)


def leave(module: nn.Module, args: object, output: object) -> None:
    """Forward hook of a root: close its scope, and learn from it.

    After an error the frame of the forward has gone, and :func:`_top` drops the scope: torch calls
    this hook after an ``Exception``, but not after an interrupt from the keyboard.
    """
    if torch.compiler.is_compiling() or not _scopes.stack:
        return
    scope = _top()
    if scope is None or scope.frame is not sys._getframe(1):
        return
    _scopes.stack.pop()
    for ledger in scope.ledgers:
        ledger.closed = True
    _memory(module, scope.state).learn(scope)


def _memory(module: nn.Module, state: Circumstances) -> _Memory:
    by_mode = _memories.get(module)
    if by_mode is None:
        by_mode = _memories.setdefault(module, {})
    return by_mode.setdefault((module.training, state[0]), _Memory())


def is_together(module: nn.Module) -> bool:
    """Whether a forward of this module computes the weights in it together."""
    return enter in module._forward_pre_hooks.values()


@explained
def together(model: nn.Module, on: bool = True) -> nn.Module:
    """Compute all spectral weights of a network together, once in each of its forwards; or stop.

    :func:`compress` does this for the model that it is given; call it for networks made of
    spectral layers by hand, or with ``on=False`` to have each layer compute its own weight. The
    numbers are the same to rounding, for every use that torch allows: a weight comes from the
    batch only if its parameters have not changed since the forward began, and in the rest of cases
    (layers called on their own, gradient checkpointing, ``torch.compile``, ``torch.func``, tracing)
    each layer computes its own. The first forward finds out which weights are worth it.

    Three things differ. The gradients of all parameters of spectral weights arrive at the end of
    the backward pass, so that ``DistributedDataParallel`` cannot send them earlier. All dense
    weights of a forward are held until its end (without gradient at most 16 million elements).
    And on an accelerator a write through ``.data`` into a parameter, *after* the model's forward
    has begun and before the layer is reached, is not seen by that forward: to compare values would
    wait for the device. On a CPU values are compared.

    Args:
        model: the module whose forward is to be the unit, by which its layers are called.
        on: whether to compute together.

    Returns:
        The model.

    Example:
        >>> from sttp_manifold.nn import SpectralLinear
        >>> model = nn.Sequential(*(SpectralLinear(20, 20, rank=4) for _ in range(3)))
        >>> together(model)(torch.randn(2, 20)).shape
        torch.Size([2, 20])
    """
    if on and not is_together(model):
        model.register_forward_pre_hook(enter, prepend=True)
        model.register_forward_hook(leave, always_call=True)
    if not on:
        for hooks, hook in ((model._forward_pre_hooks, enter), (model._forward_hooks, leave)):
            for key in [key for key, value in hooks.items() if value is hook]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)
        _memories.pop(model, None)
    return model
