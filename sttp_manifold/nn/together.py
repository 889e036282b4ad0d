"""Weights of a network formed together, once in each forward pass of its root.

Two hooks on the root open and close a scope (:mod:`sttp_manifold.nn.formed`) for the time of its
forward. At the first request for a weight all those of the root are formed, by the calls of one
(:mod:`sttp_manifold.nn.frame_batch`): weights of layers in the form in which the layer applies them
where forming costs nothing, all others in the form of the first request. Nothing is learnt from
earlier forwards: the first one after loading a state computes what later ones do, bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import FrameOverflowError
from sttp_manifold.nn.adapted_tensor import AdaptedTensor
from sttp_manifold.nn.batch_plan import Plan
from sttp_manifold.nn.formed import Entry, Scope, close_scope, open_scope
from sttp_manifold.nn.frame_batch import Ticket, Wanted, form
from sttp_manifold.nn.held import HeldWeight
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.layout import Layout
from sttp_manifold.nn.stack import parts_of
from sttp_manifold.nn.torch_state import Circumstances, circumstances
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.precision import computing_dtype

__all__ = ["is_together", "together"]

# Elements of dense weights that a forward without gradient holds at a time; others are formed one
# by one.
_HELD = 1 << 24
# Plans that are kept for a root: a network whose parts are frozen and thawed has some.
_PLANS = 8


class _Member(NamedTuple):
    weight: SpectralWeight
    form: str
    layout: Layout
    tensors: tuple[Tensor, ...]


# Beside the modules and not in them: copies and pickles take no tables along.
_plans: weakref.WeakKeyDictionary[nn.Module, list[Plan]] = weakref.WeakKeyDictionary()


class _Forward(Scope):
    """A forward of a network."""

    def __init__(self, root: nn.Module, state: Circumstances) -> None:
        super().__init__(root, state)
        self._weights: dict[int, tuple[SpectralWeight, str | None]] = {}
        self._tickets: list[Ticket] = []

    def forms(self) -> dict[int, str | None]:
        """Walk the network; see the base class."""
        root = self.root()
        assert isinstance(root, nn.Module)
        loose = []
        for module in _modules(root):
            found: Any = module
            kinds = type(module).__mro__  # isinstance of abstract classes takes ten times as long
            if SpectralLayer in kinds:
                for attribute in found.holds.values():
                    held: Any = module._modules.get(attribute)
                    for weight in () if held is None else parts_of(held):
                        self._weights.setdefault(id(weight), (weight, found.form_together(weight)))
            elif HeldWeight in kinds:
                for weight in parts_of(found.weight):
                    self._weights.setdefault(id(weight), (weight, "dense"))
            elif AdaptedTensor in kinds:
                for update in found.updates.values():
                    for weight in parts_of(update.weight):
                        self._weights.setdefault(id(weight), (weight, "dense"))
            elif SpectralWeight in kinds:
                loose.append(found)
        for weight in loose:
            self._weights.setdefault(id(weight), (weight, None))
        return {key: how for key, (_, how) in self._weights.items()}

    def form_all(self, form: str | None) -> dict[int, Entry]:
        """See the base class."""
        members = []
        for weight, own in self._weights.values():
            if (own is None) == (form is not None):
                layout, tensors = weight.layout, weight._tensors()
                if layout is not None and weight._is_plain(tensors):
                    members.append(_Member(weight, own or form or "", layout, tensors))
        recorded = torch.is_grad_enabled()
        if not recorded:
            members = _within(members, _HELD)
        runs: dict[object, list[_Member]] = {}
        for member in members:
            vector = member.tensors[0]
            key = (recorded and vector.requires_grad, vector.dtype, vector.device)
            runs.setdefault(key, []).append(member)
        entries: dict[int, Entry] = {}
        for some in runs.values():
            entries |= self._run(some)
        return entries

    def _run(self, members: Sequence[_Member]) -> dict[int, Entry]:
        plan = _plan_for(self.root(), members)
        try:
            found, ticket = form(plan, [Wanted(m.tensors, m.weight._in_form) for m in members])
        except FrameOverflowError:
            return {}  # the weight at fault says so when it is asked for, if it is
        self._tickets.append(ticket)
        return {
            id(member.weight): Entry(member.tensors, outputs, partial(ticket.give, i))
            for i, (member, outputs) in enumerate(zip(members, found, strict=True))
        }

    def finish(self) -> None:
        """No more will be handed out."""
        for ticket in self._tickets:
            ticket.closed = True


def _modules(root: nn.Module) -> list[nn.Module]:
    """The modules of a network, parents first; without their names, in a third of torch's time."""
    found = {root: None}
    for module in (waiting := [root]):
        new = [m for m in module._modules.values() if m is not None and m not in found]
        found.update(dict.fromkeys(new))
        waiting += new
    return waiting


def _within(members: list[_Member], limit: int) -> list[_Member]:
    """The first weights, as long as their matrices have no more elements than the limit."""
    within, held = [], 0
    for member in members:
        size = member.layout.shape.numel if member.form == "dense" else 0
        if held + size <= limit:
            within.append(member)
            held += size
    return within


def _plan_for(root: object, members: Sequence[_Member]) -> Plan:
    layouts = tuple(member.layout for member in members)
    forms = tuple(member.form for member in members)
    vector = members[0].tensors[0]
    dtype, device = computing_dtype(vector.dtype), vector.device
    assert isinstance(root, nn.Module)
    plans = _plans.setdefault(root, [])
    for plan in plans:
        # Layouts of one weight are one object, which is found equal at once.
        if plan.layouts == layouts and plan.forms == forms and plan.kind == (dtype, device):
            return plan
    plan = Plan(layouts, forms, dtype, device)
    if len(plans) >= _PLANS:
        del plans[0]
    plans.append(plan)
    return plan


def enter(module: nn.Module, args: object) -> None:
    """Forward pre-hook of a root: open a scope."""
    # A replica of DataParallel lives for one forward, which a plan would not pay for.
    if torch.compiler.is_compiling() or getattr(module, "_is_replica", False):
        return
    state = circumstances()
    if state is not None:
        open_scope(_Forward(module, state))


def leave(module: nn.Module, args: object, output: object) -> None:
    """Forward hook of a root: close its scope."""
    if not torch.compiler.is_compiling():
        close_scope(module)


def is_together(module: nn.Module) -> bool:
    """Whether a forward of this module forms the weights in it together."""
    return enter in module._forward_pre_hooks.values()


@explained
def together(model: nn.Module, on: bool = True) -> nn.Module:
    """Form all spectral weights of a network together, once in each of its forwards; or stop.

    :func:`compress` does this for the model that it is given; call it for networks made of
    spectral layers by hand, or with ``on=False`` to have each layer form its own weight. The
    numbers are the same to rounding, for every use that torch allows: a weight is handed out only
    if its parameters have not changed since it was formed, and in the rest of cases (layers called
    on their own, gradient checkpointing, ``torch.compile``, ``torch.func``, tracing) each layer
    forms its own.

    Four things differ. The gradients of all parameters of spectral weights arrive at the end of
    the backward pass, so that ``DistributedDataParallel`` cannot send them earlier. All weights of
    a forward are formed, used or not, and held until its end (without gradient at most 16 million
    elements of dense ones). A layer applies its weight as is cheapest where forming costs nothing.
    And a write through ``.data`` into a parameter, *after* the first weight of a forward has been
    asked for, is not seen by that forward: nothing but the value would tell. All other writes are.

    Args:
        model: the module whose forward is to be the unit, by which its layers are called.
        on: whether to form them together.

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
        _plans.pop(model, None)
    return model
