"""Many weights at once: frames of equal shape as one batch, chains of equal plan as another.

The parameters of all weights are stacked by shape, and everything after that is one operation for
many weights. The whole is one node of the autograd graph, whose outputs are the weights: so that a
weight that gets no gradient gives none to its parameters, as if it had been computed alone, and
several backward passes through different weights do not get in each other's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sttp_manifold.nn.layout import Layout, Member, partners
from sttp_manifold.nn.methods import EXACT_TENSORS
from sttp_manifold.nn.passes import Pass
from sttp_manifold.nn.riemannian import RiemannianWeight
from sttp_manifold.nn.scope import Asked, Copy, Entries, Entry, Ledger, Stamp
from sttp_manifold.nn.torch_state import graph_is_kept, outside_autocast
from sttp_manifold.nn.weight import factors_of

if TYPE_CHECKING:
    from sttp_manifold.nn.weight import SpectralWeight

__all__ = ["compute"]

# Elements of a weight from which on a batched product gains nothing over one product each, which
# needs no copy of the gradients.
_LARGE = 1 << 16
# Elements of dense weights that a forward without gradient may hold at a time.
_HELD = 1 << 24
# Frames and chains that have to be computed at once, on average, for a batch to pay, with a
# gradient and without: measured, so that small networks lose nothing.
_PARTNERS = {"householder": (2.0, 2.0), "riemannian": (4.0, 6.0)}


def compute(asked: Sequence[Asked], layouts: dict[object, Any]) -> tuple[Entries, list[Ledger]]:
    """Weights in the forms asked for, by identity and form; those that gain nothing are left out.

    Args:
        asked: weights and forms, in the order of their use; one asked for twice is there twice.
        layouts: where static plans are kept from one forward to the next.
    """
    with_gradient = torch.is_grad_enabled()
    members = [m for weight, form in asked if (m := _member(weight, form)) is not None]
    if not with_gradient:
        members = _within(members, _HELD)
    by_run: dict[tuple[bool, torch.device], list[Member]] = {}
    for m in members:
        by_run.setdefault((with_gradient and m.trainable, m.tensors[0].device), []).append(m)
    entries: Entries = {}
    ledgers = []
    for (trainable, device), some in by_run.items():
        key = (trainable, device, tuple((id(m.weight), m.form, m.tensors[0].dtype) for m in some))
        known = layouts.get(key)
        if known is None:
            gains = _gain(some, with_gradient)
            known = layouts[key] = gains, Layout(list(compress(some, gains)))
        gains, layout = known
        if any(gains):
            run = _Run(layout, list(compress(some, gains)), trainable)
            run.into(entries)
            ledgers.append(run.ledger)
    for queue in entries.values():
        queue.reverse()  # the first use takes from the end
    return entries, ledgers


def _member(weight: SpectralWeight, form: str) -> Member | None:
    """A weight with its tensors, unless they are not what this package stored there."""
    if type(weight) is not RiemannianWeight:
        return None
    tensors = weight._tensors()
    sizes: list[tuple[int, ...]] = [tuple(t.shape) for t in tensors]
    if len(tensors) != len(sizes):
        return None
    first = tensors[0]
    for tensor, size in zip(tensors, sizes, strict=True):
        if (
            type(tensor) not in EXACT_TENSORS
            or tensor.shape != size
            or tensor.dtype != first.dtype
            or tensor.device != first.device
            or tensor.layout != torch.strided
            or tensor.is_meta
            or tensor.is_inference()
        ):
            return None
    return Member(weight, form, tensors)


def _gain(members: Sequence[Member], with_gradient: bool) -> list[bool]:
    """For each weight, whether it shares enough with others for a batch to be worth a copy."""
    gains = [
        count >= _PARTNERS[m.weight.method][not with_gradient]
        # The cores of a point are views of it: there is nothing to compute.
        and (m.form != "cores" or m.weight.method == "householder")
        for m, count in zip(members, partners(members), strict=True)
    ]
    # What a batch costs by itself is paid by now, and charts are dearer alone.
    joins = any(gains)
    return [
        gain or (joins and m.weight.method == "householder")
        for m, gain in zip(members, gains, strict=True)
    ]


def _within(members: list[Member], limit: int) -> list[Member]:
    """The first weights, as long as their matrices have no more elements than the limit."""
    kept, held = [], 0
    for member in members:
        size = member.weight.shape.numel if member.form == "dense" else 0
        if held + size <= limit:
            kept.append(member)
            held += size
    return kept


class _Run:
    """One computation of a layout, and what its backward pass needs until it is done."""

    def __init__(self, layout: Layout, members: Sequence[Member], trainable: bool) -> None:
        self.layout = layout
        self.members = members
        self.trainable = trainable
        self.leaves: list[Tensor] = []
        self.passed: Pass | None = None
        self.ledger = Ledger()
        self.done: set[int] = set()

    def into(self, entries: Entries) -> None:
        """Compute, and add what came out."""
        members = self.members
        on_cpu = members[0].tensors[0].device.type == "cpu"
        stamps: list[list[Stamp | Copy]] = [
            [] if on_cpu else [Stamp.of(t) for t in member.tensors] for member in members
        ]
        if self.trainable:
            flat: tuple[Tensor, ...] = _Together.apply(  # type: ignore[no-untyped-call]
                self, *(t for member in members for t in member.tensors)
            )
        else:
            flat = self.forward()
        if on_cpu:
            values = [leaf.detach().unbind(0) for leaf in self.leaves]
            for member, mine, rows in zip(members, stamps, self.layout.rows, strict=True):
                for t, (leaf, row) in zip(member.tensors, rows, strict=True):
                    mine.append(Copy(t, t.requires_grad, values[leaf][row]))
        start = 0
        for i, member in enumerate(members):
            end = start + self.layout.widths[i]
            entry = Entry(stamps[i], flat[start:end], i, self.ledger)
            entries.setdefault((id(member.weight), member.form), []).append(entry)
            start = end
        # The graph is to keep neither the parameters nor, without gradient, anything.
        self.members = [member._replace(tensors=()) for member in members]
        if not self.trainable:
            self.leaves, self.passed = [], None

    def forward(self) -> tuple[Tensor, ...]:
        """The tensors of all weights, one after another, each with a version counter of its own."""
        members, places = self.members, self.layout.leaves
        wanted = [any(members[i].tensors[k].requires_grad for i, k in leaf) for leaf in places]
        with torch.no_grad(), outside_autocast(members[0].tensors[0].device):
            self.leaves = [torch.stack([members[i].tensors[k] for i, k in leaf]) for leaf in places]
            self.passed = Pass(self.layout, self.leaves, wanted if self.trainable else None)
            outputs: list[tuple[Tensor, ...]] = [()] * len(members)
            for chain, parts in zip(self.layout.chains, self.passed.parts, strict=True):
                batches = (
                    [_products(parts[0], parts[1], (chain.plan.d_out, chain.plan.d_in))]
                    if chain.form == "dense"
                    else map(_rows, parts)
                )
                for row, tensors in zip(chain.rows, zip(*batches, strict=True), strict=True):
                    outputs[row] = tensors
        return tuple(tensor for tensors in outputs for tensor in tensors)

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of all tensors of all weights; None where a weight has got none."""
        if self.passed is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: the weights were computed "
                "together, and what that saved has been freed. Specify retain_graph=True if you "
                "need to backward through the graph a second time"
            )
        given = self._by_member(gradients)
        used = {i for i, mine in enumerate(given) if any(g is not None for g in mine)}
        pulled: list[tuple[Tensor, ...] | None] = []
        with torch.no_grad(), outside_autocast(self.leaves[0].device):
            for chain, parts in zip(self.layout.chains, self.passed.parts, strict=True):
                if used.isdisjoint(chain.rows):
                    pulled.append(None)
                    continue
                columns = list(zip(*(given[i] for i in chain.rows), strict=True))
                pulled.append(
                    _pull_back(parts[0], parts[1], columns[0])
                    if chain.form == "dense"
                    else tuple(map(_stacked, parts, columns))
                )
            of_leaves = self.passed.pull_back(pulled)
        results: list[list[Tensor | None]] = [[None] * len(s) for s in self.layout.shapes]
        for of_leaf, places in zip(of_leaves, self.layout.leaves, strict=True):
            if of_leaf is not None:
                for row, (i, k) in zip(of_leaf.unbind(0), places, strict=True):
                    if i in used:
                        results[i][k] = row
        self.done |= used
        ledger = self.ledger
        if ledger.closed and ledger.given <= self.done and not graph_is_kept():
            self.leaves, self.passed = [], None
        return [tensor for mine in results for tensor in mine]

    def differentiable_backward(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The same, one weight after another, for derivatives of the derivative."""
        results: list[Tensor | None] = []
        rest = list(tensors)
        for member, count, mine in zip(
            self.members, map(len, self.layout.shapes), self._by_member(gradients), strict=True
        ):
            inputs, rest = rest[:count], rest[count:]
            wanted = [t for t in inputs if t.requires_grad]
            if not wanted or all(g is None for g in mine):
                results += [None] * count
                continue
            with outside_autocast(inputs[0].device):
                values = _alone(member, inputs)
            heads = [
                (v, g)
                for v, g in zip(values, mine, strict=True)
                if g is not None and v.requires_grad
            ]
            found = iter(
                torch.autograd.grad(
                    [v for v, _ in heads],
                    wanted,
                    [g for _, g in heads],
                    create_graph=True,
                    allow_unused=True,
                )
            )
            results += [next(found) if t.requires_grad else None for t in inputs]
        return results

    def _by_member(self, flat: Sequence[Tensor | None]) -> list[Sequence[Tensor | None]]:
        grouped, start = [], 0
        for width in self.layout.widths:
            grouped.append(flat[start : start + width])
            start += width
        return grouped


class _Together(torch.autograd.Function):
    """All weights of a run as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return run.forward()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return (None, *ctx.run.differentiable_backward(ctx.saved_tensors, gradients))
        return (None, *ctx.run.backward(gradients))


def _alone(member: Member, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A weight in its form, as it is computed outside of any batch."""
    tt = member.weight._value_of(tensors)
    if member.form == "cores":
        return (*tt.left, tt.spectrum, *tt.right)
    if member.form == "dense":
        return (tt.to_matrix(),)
    return factors_of(tt)


def _rows(batch: Tensor) -> list[Tensor]:
    # .data: views would share one version counter, and forbid what is allowed on a weight alone.
    return [row.data for row in batch.detach().unbind(0)]


def _products(first: Tensor, second: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """``first[i] @ second[i]`` for all ``i``, each reshaped."""
    if first.shape[-2] * second.shape[-1] < _LARGE:
        return _rows(torch.bmm(first, second).view(-1, *size))
    pairs = zip(first.unbind(0), second.unbind(0), strict=True)
    return [torch.mm(a, b).view(size).data for a, b in pairs]


def _pull_back(
    first: Tensor, second: Tensor, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Gradients of both factors from those of their reshaped products."""
    size = (first.shape[-2], second.shape[-1])
    if size[0] * size[1] < _LARGE:
        zero = first.new_zeros(()).expand(size)
        G = torch.stack([zero if g is None else g.reshape(size) for g in gradients])
        return torch.bmm(G, second.mT), torch.bmm(first.mT, G)
    a: list[Tensor | None] = [None] * len(gradients)
    b = a.copy()
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            G = gradient.reshape(size)
            # Not into one tensor at once, which torch cannot do for a batch of cotangents.
            a[i], b[i] = torch.mm(G, second[i].mT), torch.mm(first[i].mT, G)
    return _stacked(first, a), _stacked(second, b)


def _stacked(like: Tensor, gradients: Sequence[Tensor | None]) -> Tensor:
    """Gradients of the rows of a batch as one; zero where there is none."""
    zero = like.new_zeros(()).expand(like.shape[1:])
    return torch.stack([zero if gradient is None else gradient for gradient in gradients])
