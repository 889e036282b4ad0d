"""Many weights at once: their vectors joined, equal frames as one call, equal chains as another.

The vectors of all weights are joined once; one gather fetches from there what is used as it is
(spectra, cores of points, full bonds) and the reflectors of all frames, a bucket of them for each
call. Frames go to the levels of a forest (:mod:`sttp_manifold.nn.chain_forest`), where chains are
contracted (:mod:`sttp_manifold.nn.chain_products`).

With a gradient the whole is one node of the autograd graph, so that a weight that gets no gradient
gives its parameters none, as if it had been formed alone, and several backward passes through
different weights do not get in each other's way. The derivative is written out: that of the frames
in :mod:`sttp_manifold.frames`, that of the chains beside their products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sttp_manifold.frames._wy_form import Parts, chart_of, refuse_overflow
from sttp_manifold.nn.batch_plan import Bucket, Plan
from sttp_manifold.nn.chain_products import Trace, contracted, pulled_back
from sttp_manifold.nn.torch_state import graph_is_kept, is_batched, outside_autocast

__all__ = ["Ticket", "Wanted", "form"]

Forms = tuple[Tensor, ...]
Plain = Callable[[Sequence[Tensor], str], Forms]


class Wanted(NamedTuple):
    """A weight of a batch.

    Attributes:
        tensors: its vector, and signs if it has any.
        plain: the same weight by plain operations, of tensors and in a form.
    """

    tensors: tuple[Tensor, ...]
    plain: Plain


class Ticket:
    """How often each weight of one computation was given out, and whether more may be."""

    __slots__ = ("closed", "given")

    def __init__(self) -> None:
        self.given: Counter[int] = Counter()
        self.closed = False

    def give(self, weight: int) -> None:
        """Note that a weight has been given out."""
        self.given[weight] += 1


def form(plan: Plan, weights: Sequence[Wanted]) -> tuple[list[Forms], Ticket]:
    """All weights of a plan, each in its form.

    Args:
        plan: the plan.
        weights: the weights, in its order.

    Returns:
        For each weight ``(W,)``, ``(U diag(s), V^T)``, the transposes of these from the last to the
        first, or its cores with the spectrum between them;
        and the ticket of this computation, in which the caller notes what he gives out.

    Raises:
        FrameOverflowError: as :func:`~sttp_manifold.frames.full_frame`.
    """
    run = _Run(plan, weights)
    tensors = [t for weight in weights for t in weight.tensors]
    vectors = [weight.tensors[0] for weight in weights]
    if torch.is_grad_enabled() and any(z.requires_grad for z in vectors):
        flat: Sequence[Tensor] = _Together.apply(run, *tensors)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            flat = run.forward(tensors)
    found, start = [], 0
    for width in plan.widths:
        found.append(tuple(flat[start : start + width]))
        start += width
    return found, run.ticket


class _Run:
    """One computation of a plan, and what its backward pass needs until it is done."""

    def __init__(self, plan: Plan, weights: Sequence[Wanted]) -> None:
        self.plan = plan
        self.ticket = Ticket()
        self.plain = [weight.plain for weight in weights]
        self.counts = [len(weight.tensors) for weight in weights]
        self.dtype, self.wide = weights[0].tensors[0].dtype, plan.constants.dtype
        self.done: Counter[int] = Counter()
        self.saved: tuple[_Saved, Trace] | None = None

    def forward(self, tensors: Sequence[Tensor], recorded: bool = False) -> list[Tensor]:
        """The tensors of all weights, one after another; called without gradient."""
        with outside_autocast(tensors[0].device):
            leaves, saved = _leaves(self.plan, self._joined(tensors))
            outputs, trace = contracted(self.plan, leaves)
            if recorded:
                self.saved = saved, trace
            # .data: views made without gradient may not be written into with one, and views would
            # share one version counter, and forbid what is allowed alone.
            return self._cast([t.data for t in outputs], self.dtype)

    def _cast(self, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        # Each call counts here, also one that does nothing.
        return tensors if self.dtype == self.wide else [t.to(dtype) for t in tensors]

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        vectors: list[Tensor] = []
        signs: list[Tensor] = []
        start = 0
        for count in self.counts:
            vectors.append(tensors[start])
            signs += tensors[start + 1 : start + count]
            start += count
        if self.dtype == self.wide:
            return torch.cat([*vectors, *signs, self.plan.constants])
        return torch.cat([torch.cat([*vectors, *signs]).to(self.wide), self.plan.constants])

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the vectors, None where a weight has got none; called without gradient."""
        if self.saved is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: the weights were formed "
                "together, and what that saved has been freed. Specify retain_graph=True if you "
                "need to backward through the graph a second time"
            )
        plan, (frames, trace) = self.plan, self.saved
        reached = [k for k, g in enumerate(gradients) if g is not None]
        with outside_autocast(plan.constants.device):
            if self.dtype != self.wide:
                gradients = [None if g is None else g.to(self.wide) for g in gradients]
            flat = _pull_back(plan, frames, *pulled_back(plan, trace, gradients))
            # Views would share one version counter, and each gradient is its parameter's; vmap, as
            # of a batch of cotangents, knows of nothing but views.
            (flat,) = self._cast([flat], self.dtype)
            batched = is_batched(flat)
            split = Tensor.split_with_sizes if batched else Tensor.unsafe_split_with_sizes
            each = iter(split(flat, plan.sizes))
        used = {self.plan.owners[k] for k in reached}
        results: list[Tensor | None] = []
        for i, count in enumerate(self.counts):
            gradient = next(each)
            results += [gradient if i in used else None, *[None] * (count - 1)]
        self.done.update(reached)
        if self.ticket.closed and not self._awaited() and not graph_is_kept():
            self.saved = None
        return results

    def _awaited(self) -> bool:
        """Whether a part of a weight may still get a gradient, by a backward pass of its own."""
        given = self.ticket.given
        return any(self.done[k] < given[owner] for k, owner in enumerate(self.plan.owners))

    def differentiable_backward(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The same by plain operations, one weight after another: for the second derivative."""
        results: list[Tensor | None] = []
        start = at = 0
        for i, (count, width) in enumerate(zip(self.counts, self.plan.widths, strict=True)):
            mine, heads = tensors[start : start + count], gradients[at : at + width]
            start, at = start + count, at + width
            results += [None] * count
            if not mine[0].requires_grad or all(g is None for g in heads):
                continue
            with outside_autocast(mine[0].device):
                values = self.plain[i](mine, self.plan.forms[i])
            pairs = [
                (v, g)
                for v, g in zip(values, heads, strict=True)
                if g is not None and v.requires_grad
            ]
            results[-count] = torch.autograd.grad(
                [v for v, _ in pairs],
                mine[0],
                [g for _, g in pairs],
                create_graph=True,
                allow_unused=True,
            )[0]
        return results


class _Together(torch.autograd.Function):
    """All weights of a run as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(run.forward(tensors, recorded=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return (None, *ctx.run.differentiable_backward(ctx.saved_tensors, gradients))
        return (None, *ctx.run.backward(gradients))


# --- Frames, without a graph. ---


class _Saved(NamedTuple):
    """What the derivative of frames needs.

    Attributes:
        parts: of each bucket, those excepted that kernels form.
        kernels: the joined vectors, and what the kernels have kept.
    """

    parts: list[Parts]
    kernels: tuple[Tensor, Tensor] | None


def _leaves(plan: Plan, joined: Tensor) -> tuple[list[Tensor], _Saved]:
    """What chains are contracted from: coordinates of the spectra, and the leaves of the plan."""
    fetched = joined.index_select(0, plan.fetch).split_with_sizes(plan.cuts)
    at = len(fetched) - len(plan.buckets)
    leaves, reflectors = list(fetched[:at]), fetched[at:]
    saved, kernels = [], None
    if plan.table is not None:
        frames, kept = plan.table.frames(joined)
        kernels = joined, kept
        formed = iter(frames.split_with_sizes([b.entries for b in plan.buckets if b.entries]))
    for bucket, numbers in zip(plan.buckets, reflectors, strict=True):
        if bucket.entries:
            leaves.append(next(formed))
            continue
        chart = chart_of(bucket.full)
        Y = numbers.view(bucket.count, bucket.rows, bucket.r)
        parts = chart.parts(Y, refuse_overflow)
        saved.append(parts)
        Q = chart.assemble(parts, bucket.right)
        leaves.append(Q if bucket.take is None else Q.view(-1).index_select(0, bucket.take))
    return leaves, _Saved(saved, kernels)


def _pull_back(
    plan: Plan, saved: _Saved, theta: Tensor, of_leaves: Sequence[list[Tensor]]
) -> Tensor:
    """Cotangent of the joined vectors, from those of what chains are contracted from."""
    at, each = len(of_leaves) - len(plan.buckets), iter(saved.parts)
    flat = [theta, *(part for parts in of_leaves[:at] for part in parts)]
    by_kernels: list[Tensor] = []
    for bucket, cotangents in zip(plan.buckets, of_leaves[at:], strict=True):
        if bucket.entries:
            by_kernels += cotangents
        else:
            flat.append(_pull_back_frames(bucket, next(each), cotangents, plan.zero))
    joined = torch.cat(flat) if len(flat) > 1 else flat[0]
    pulled = joined.index_select(0, plan.scatter)
    if plan.table is None or saved.kernels is None:
        return pulled
    vector, kept = saved.kernels
    return plan.table.pulled_back(pulled, vector, torch.cat(by_kernels), kept)


def _pull_back_frames(
    bucket: Bucket, parts: Parts, cotangents: list[Tensor], zero: Tensor
) -> Tensor:
    if bucket.give is not None:
        G = torch.cat((*cotangents, zero)).index_select(0, bucket.give)
    else:
        G = torch.cat(cotangents) if len(cotangents) > 1 else cotangents[0]
    if bucket.right:
        G = G.view(bucket.count, bucket.r, bucket.d).transpose(1, 2)
    else:
        G = G.view(bucket.count, bucket.d, bucket.r)
    chart = chart_of(bucket.full)
    return chart.pull_back(parts, G).reshape(-1)
