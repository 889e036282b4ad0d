"""What the forward that is running has formed: tensors by owner and form, while they hold.

A forward of a root opens a scope, in its own thread. At the first request for one of its weights
all of them are formed, and each request gets what was formed, as long as nothing has changed since:
every tensor that it was formed from is the same object, as trainable, at the same version and in
the same memory; what was handed out has not been written into, and has no hook on its gradient; and
torch is doing the same (:func:`~sttp_manifold.nn.torch_state.circumstances`). Nothing outlives the
forward, but for one that was interrupted: torch calls no hook after a ``KeyboardInterrupt``, and
what was formed is held until the next forward of its root.

A write through ``.data`` after the first request changes no version, and is not seen before the
next forward of the root.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold.nn.torch_state import Circumstances, circumstances

__all__ = [
    "Entry",
    "Scope",
    "any_running",
    "close_scope",
    "form_of",
    "once",
    "open_scope",
    "running",
    "take",
]

Make = Callable[[], Tensor]


class _Stamp(NamedTuple):
    """A tensor as it was; ``memory`` keeps its place taken."""

    tensor: Tensor
    trainable: bool
    version: int
    memory: torch.UntypedStorage
    pointer: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Stamp:
        return cls(
            tensor,
            tensor.requires_grad,
            tensor._version,
            tensor.untyped_storage(),
            tensor.data_ptr(),
        )

    def fits(self, tensor: Tensor) -> bool:
        return (
            tensor is self.tensor
            and tensor.requires_grad == self.trainable
            and tensor._version == self.version
            and tensor.data_ptr() == self.pointer
        )


class Entry:
    """A weight in one form.

    Args:
        tensors: what it was formed from.
        outputs: what it consists of.
        given: called each time it is handed out.
        taken: whether somebody has it already.
    """

    __slots__ = ("_given", "_marks", "_outputs", "_stamps", "_taken")

    def __init__(
        self,
        tensors: Sequence[Tensor],
        outputs: tuple[Tensor, ...],
        given: Callable[[], None],
        taken: bool = False,
    ) -> None:
        self._stamps = [_Stamp.of(tensor) for tensor in tensors]
        self._outputs = outputs
        self._marks = [_mark(tensor) for tensor in outputs]
        self._given = given
        self._taken = taken

    def take(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The outputs, unless anything has changed.

        From the second time on they are views, for hooks on their gradients to tell whose they are.
        """
        if len(tensors) != len(self._stamps):
            return None
        if self._marks != [_mark(tensor) for tensor in self._outputs]:
            return None
        for stamp, tensor in zip(self._stamps, tensors, strict=True):
            if not stamp.fits(tensor):
                return None
        self._given()
        if self._taken:
            return tuple(tensor.view_as(tensor) for tensor in self._outputs)
        self._taken = True
        return self._outputs


def _mark(tensor: Tensor) -> tuple[int, bool, bool, bool]:
    """What a caller may have done to a tensor that the next one must not see."""
    # Tensors born in inference mode count no writes.
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.requires_grad, tensor.retains_grad, bool(tensor._backward_hooks)


class Scope(ABC):
    """One forward of one root; its subclass knows which weights there are and forms them.

    Args:
        root: the root; no reference to it is held.
        state: what torch is doing.
    """

    def __init__(self, root: object, state: Circumstances) -> None:
        self.root = weakref.ref(root)
        self.state = state
        self._known: dict[int, str | None] | None = None
        self._entries: dict[int, Entry] = {}
        self._made: dict[int, Entry] = {}
        self._asked: str | None = None
        self._formed = False
        # Weights that were read in another form than their own; and what ends with the forward.
        self._others: dict[tuple[int, str], Entry] = {}
        self.closing: list[Callable[[], None]] = []

    @abstractmethod
    def forms(self) -> dict[int, str | None]:
        """Form of each weight by identity; None where the first request decides for all of them."""

    @abstractmethod
    def form_all(self, form: str | None) -> dict[int, Entry]:
        """Weights by identity: those with a form of their own, or in this form all others."""

    @abstractmethod
    def finish(self) -> None:
        """The forward has ended: no more will be handed out."""

    @property
    def known(self) -> dict[int, str | None]:
        """Form of each weight, looked up once."""
        if self._known is None:
            self._known = self.forms()
        return self._known

    def take(
        self, owner: object, form: str, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...] | None:
        """A weight in a form; None if it is to be formed alone."""
        key = id(owner)
        if key not in self.known:
            return None
        own = self.known[key]
        if own is None:
            if self._asked is None:
                self._asked = form
                self._entries |= self.form_all(form)
            own = self._asked
        elif not self._formed:
            self._formed = True
            self._entries |= self.form_all(None)
        entry = self._entries.get(key)
        return None if entry is None or own != form else entry.take(tensors)

    def kept(
        self, owner: object, form: str, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...] | None:
        """What :meth:`keep` has for a weight, under the same conditions."""
        entry = self._others.get((id(owner), form))
        return None if entry is None else entry.take(tensors)

    def keep(self, owner: object, form: str, entry: Entry, close: Callable[[], None]) -> None:
        """Hand out a weight in another form until the forward ends, and call ``close`` then."""
        self._others[id(owner), form] = entry
        self.closing.append(close)

    def once(
        self, owner: object, parts: Sequence[object], tensors: Sequence[Tensor], make: Make
    ) -> Tensor:
        """What an owner makes of weights, made at its first request; see :func:`once`."""
        made = self._made.get(id(owner))
        found = None if made is None else made.take(tensors)
        if found is not None:
            return found[0]
        output = make()
        entries = [self._entries.get(id(part)) for part in parts]
        givers = [entry._given for entry in entries if entry is not None]
        if len(givers) == len(parts):

            def given() -> None:
                for give in givers:
                    give()

            made = Entry(tensors, (output,), given)
            made._taken = True
            self._made[id(owner)] = made
        return output


class _Stack(threading.local):
    def __init__(self) -> None:
        self.scopes: list[Scope] = []


_stack = _Stack()


def open_scope(scope: Scope) -> None:
    """Begin a forward; what an interrupt has left of an earlier one of its root is dropped."""
    root = scope.root()
    for k, other in enumerate(_stack.scopes):
        if other.root() in (root, None):
            del _stack.scopes[k:]
            break
    _stack.scopes.append(scope)


def close_scope(root: object) -> None:
    """End the forward of a root, and those inside of it that an interrupt has left."""
    for k, scope in enumerate(_stack.scopes):
        if scope.root() is root:
            for ended in _stack.scopes[k:]:
                ended.finish()
                for close in ended.closing:
                    close()
            del _stack.scopes[k:]
            return


def any_running() -> bool:
    """Whether this thread is in a forward of any root."""
    return bool(_stack.scopes)


def running(owner: object) -> Scope | None:
    """The scope that would hand out a weight; None outside of a forward."""
    if not _stack.scopes:
        return None
    state = circumstances()
    for scope in _stack.scopes:
        if state == scope.state and id(owner) in scope.known:
            return scope
    return None


def form_of(owner: object) -> str | None:
    """Form in which the running forward forms a weight; None if it is formed alone.

    It is advice: whether what was formed may be handed out is for :func:`take` to say.
    """
    key = id(owner)
    for scope in _stack.scopes:
        known = scope.known
        if key in known:
            return known[key]
    return None


def take(
    owner: object, form: str, tensors: Sequence[Tensor], state: Circumstances
) -> tuple[Tensor, ...] | None:
    """A weight of the running forward in a form; None if it is to be formed alone.

    The outermost root gives it, of which most are formed at once.
    """
    for scope in _stack.scopes:
        if state == scope.state:
            found = scope.take(owner, form, tensors)
            if found is not None:
                return found
    return None


def once(owner: object, parts: Sequence[object], tensors: Sequence[Tensor], make: Make) -> Tensor:
    """What is made of several weights, once in the running forward; made anew outside of one.

    Args:
        owner: what makes it.
        parts: the weights that it is made of.
        tensors: all that they are formed from.
        make: makes it, of what :func:`take` gives for each of them.

    Shape:
        - tensors: any
        - output: as that of ``make``
    """
    if _stack.scopes:
        state = circumstances()
        for scope in _stack.scopes:
            if state == scope.state and all(id(part) in scope.known for part in parts):
                return scope.once(owner, parts, tensors, make)
    return make()
