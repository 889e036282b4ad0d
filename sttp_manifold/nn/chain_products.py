"""Chains of many weights contracted along a forest, and the derivative of that, written out.

A node multiplies its stack of cores with what came before them; its derivative is two products of
the same shapes. What torch would do on a graph is the same arithmetic, with a node for each view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold.nn.batch_plan import Plan
from sttp_manifold.nn.chain_forest import Node

__all__ = ["Trace", "contracted", "pulled_back"]

Gradients = Sequence[Tensor | None]


class Trace(NamedTuple):
    """What the derivative needs.

    Attributes:
        theta: coordinates of the spectra.
        spectra: the spectra, on a graph from ``theta`` where a map is applied.
        stacks: for each node its cores, ``(n, rows, columns)``, multiplied by the spectrum where
            that is done.
        scaled: for each scaled leaf, its numbers as they were and what multiplied them.
        columns: the same for each scaled node.
        before: for each node but the first of a chain, what came before.
        products: for each node, shape of one of its products.
        halves: for each dense weight, its two factors.
    """

    theta: Tensor
    spectra: Tensor
    stacks: list[Tensor]
    scaled: list[tuple[Tensor, Tensor]]
    columns: dict[int, tuple[Tensor, Tensor]]
    before: dict[int, Tensor]
    products: list[tuple[int, ...]]
    halves: dict[int, tuple[Tensor, Tensor]]


def contracted(plan: Plan, leaves: Sequence[Tensor]) -> tuple[list[Tensor], Trace]:
    """The tensors of all weights, one after another, and the trace.

    Args:
        plan: the plan.
        leaves: coordinates of the spectra, then the leaves of the plan; without gradient.

    Shape:
        - leaves: ``(n,)``, then as the plan's leaves have it
    """
    theta = spectra = leaves[0]
    if plan.maps:
        theta = theta.detach().requires_grad_()
        with torch.enable_grad():
            spectra = _spectra(plan, theta)
    scales: list[Tensor] = []
    if plan.scale_cuts:
        each = spectra.detach().index_select(0, plan.scale)
        scales = [each]
        if len(plan.scale_cuts) > 1:
            scales = list(each.split_with_sizes(plan.scale_cuts))
    trace = Trace(theta, spectra, [plan.constants] * len(plan.nodes), [], {}, {}, [], {})
    _stacks(plan, trace, leaves[1:], scales)
    rows = _products(plan, trace)
    out: list[Tensor] = []
    for i, (layout, form) in enumerate(zip(plan.layouts, plan.forms, strict=True)):
        parts = [rows[node][j] for node, j in plan.outputs[i]]
        if form == "cores":
            out += _cores(plan, i, parts, spectra.detach())
            continue
        first, second = parts[0].view(-1, plan.middle[i]), parts[1].view(plan.middle[i], -1)
        if form == "factors":
            out += [first, second]
        elif form == "rows":
            out += [second.t(), first.t()]
        else:
            trace.halves[i] = first, second
            out.append(torch.mm(first, second).view(layout.shape.d_out, layout.shape.d_in))
    return out, trace


def _spectra(plan: Plan, theta: Tensor) -> Tensor:
    """A one, then the spectra of all weights."""
    direct, *mapped = theta.split_with_sizes(
        [plan.direct, *(map_.rank * count for map_, count in plan.maps)]
    )
    values = [
        map_(part.view(count, map_.rank)).view(-1)
        for (map_, count), part in zip(plan.maps, mapped, strict=True)
    ]
    return torch.cat([direct, *values])


def _stacks(plan: Plan, trace: Trace, leaves: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """Note the cores of each node, multiplied by what is to multiply them."""
    stacks, each = trace.stacks, iter(scales)
    for leaf, numbers in zip(plan.leaves, leaves, strict=True):
        if leaf.scaled:
            scale = next(each).view_as(numbers)
            trace.scaled.append((numbers, scale))
            numbers = numbers * scale
        parts = numbers.split_with_sizes(leaf.cuts) if len(leaf.cuts) > 1 else (numbers,)
        for node, part in zip(leaf.nodes, parts, strict=True):
            stacks[node.number] = part.view(-1, node.rows, node.columns)
    for node in plan.constant_nodes:
        assert node.constant is not None
        stacks[node.number] = node.constant
    for node in plan.scaled_nodes:
        stack, columns = stacks[node.number], next(each).view(-1, 1, node.columns)
        trace.columns[node.number] = stack, columns
        stacks[node.number] = stack * columns


def _cores(plan: Plan, i: int, parts: Sequence[Tensor], spectra: Tensor) -> list[Tensor]:
    shape, split = plan.layouts[i].shape, len(plan.layouts[i].shape.out_modes)
    sizes: list[tuple[int, ...]] = list(shape.core_shapes)
    if plan.layouts[i].map.name == "full":
        sizes.insert(split, (shape.rank, shape.rank))
        return [part.view(size) for part, size in zip(parts, sizes, strict=True)]
    cores = [part.view(size) for part, size in zip(parts, sizes, strict=True)]
    s = spectra.narrow(0, plan.spectra[i], shape.rank)
    return [*cores[:split], s, *cores[split:]]


def _products(plan: Plan, trace: Trace) -> list[Sequence[Tensor]]:
    """For each node, the products that end there."""
    stacks = trace.stacks
    rows: list[Sequence[Tensor]] = []
    before = trace.before
    # Parents come first. No inner function that calls itself: it would be a cycle, and hold these
    # tensors until the next garbage collection.
    for node in plan.nodes:
        stack = product = stacks[node.number]
        if not node.first:
            product = _times(node, before[node.number], stack)
        trace.products.append(product.shape[1:])
        parts = product.split_with_sizes(node.cuts) if len(node.cuts) > 1 else [product]
        done = parts[0].unbind(0) if node.ends else ()
        rows.append(done)
        for child, part in zip(node.children, parts[node.ends > 0 :], strict=True):
            shape = (-1, child.rows) if child.kind == "L" else (child.columns, -1)
            before[child.number] = part.view(len(part), *shape)
    return rows


def _times(node: Node, before: Tensor, stack: Tensor) -> Tensor:
    return torch.bmm(before, stack) if node.kind == "L" else torch.bmm(stack, before)


# --- The derivative. ---


def pulled_back(
    plan: Plan, trace: Trace, gradients: Gradients
) -> tuple[Tensor, list[list[Tensor]]]:
    """Cotangents of what chains are contracted from.

    Args:
        plan: the plan.
        trace: what :func:`contracted` gave.
        gradients: those of the tensors of all weights; None counts as zero.

    Returns:
        Of the coordinates of the spectra; and for each leaf of the plan, in flat parts.

    Shape:
        - gradients: as the tensors that :func:`contracted` gave
    """
    ended: list[list[Tensor | None]] = [[None] * node.ends for node in plan.nodes]
    cores: list[tuple[int, Tensor]] = []  # spectra that were given out
    at = 0
    for i, width in enumerate(plan.widths):
        mine = list(gradients[at : at + width])
        at += width
        if plan.forms[i] == "cores":
            split = len(plan.layouts[i].shape.out_modes)
            s = mine.pop(split) if len(mine) > len(plan.outputs[i]) else None
            if s is not None:
                cores.append((plan.spectra[i], s))
        elif plan.forms[i] == "rows":
            mine = [None if g is None else g.t() for g in reversed(mine)]
        elif plan.forms[i] == "dense":
            mine = _of_factors(mine[0], *trace.halves[i])
        for (node, j), g in zip(plan.outputs[i], mine, strict=True):
            ended[node][j] = g
    of_stacks, of_columns = _through_products(plan, trace, ended)
    of_leaves, of_scales = [], []
    scaled = iter(trace.scaled)
    for leaf in plan.leaves:
        parts = [_or_zeros(of_stacks[node.number], trace, node) for node in leaf.nodes]
        if leaf.scaled:
            (numbers, scale), G = next(scaled), torch.cat(parts)
            of_scales.append(G * numbers.view(-1))
            parts = [G * scale.view(-1)]
        of_leaves.append(parts)
    return _of_theta(plan, trace, [*of_scales, *of_columns], cores), of_leaves


def _of_factors(g: Tensor | None, first: Tensor, second: Tensor) -> list[Tensor | None]:
    if g is None:
        return [None, None]
    G = g.reshape(len(first), -1) if g.shape[0] != len(first) else g
    return [torch.mm(G, second.t()), torch.mm(first.t(), G)]


def _or_zeros(found: Tensor | None, trace: Trace, node: Node) -> Tensor:
    return (torch.zeros_like(trace.stacks[node.number]) if found is None else found).reshape(-1)


def _through_products(
    plan: Plan, trace: Trace, ended: Sequence[Gradients]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Cotangents of the cores of each node, and of the spectrum in the scaled ones."""
    of_stacks: list[Tensor | None] = [None] * len(plan.nodes)
    of_before: list[Tensor | None] = [None] * len(plan.nodes)
    of_scales: list[Tensor] = []
    for node in reversed(plan.nodes):
        k = node.number
        G = _of_product(node, trace, ended[k], of_before)
        if G is not None and not node.first:
            before, stack = trace.before[k], trace.stacks[k]
            if node.kind == "L":
                of_before[k] = torch.bmm(G, stack.transpose(1, 2))
                G = torch.bmm(before.transpose(1, 2), G)
            else:
                of_before[k] = torch.bmm(stack.transpose(1, 2), G)
                G = torch.bmm(G, before.transpose(1, 2))
        if node.scaled:
            stack, columns = trace.columns[k]
            G = torch.zeros_like(stack) if G is None else G
            of_scales.append((G * stack).sum(1).view(-1))
            G = G * columns
        of_stacks[k] = G
    return of_stacks, of_scales[::-1]


def _of_product(node: Node, trace: Trace, ended: Gradients, of_before: Gradients) -> Tensor | None:
    """Cotangent of the products of a node, from those that end there and from its children."""
    shape = trace.products[node.number]
    found = [*ended, *(of_before[child.number] for child in node.children)]
    if len(found) == 1:
        return None if found[0] is None else found[0].reshape(-1, *shape)
    if all(g is None for g in found):
        return None
    counts = [1] * node.ends + node.cuts[node.ends > 0 :]
    parts = [
        trace.theta.new_zeros(count, *shape) if g is None else g.reshape(count, *shape)
        for g, count in zip(found, counts, strict=True)
    ]
    return torch.cat(parts)


def _of_theta(
    plan: Plan, trace: Trace, of_scales: Sequence[Tensor], cores: Sequence[tuple[int, Tensor]]
) -> Tensor:
    """Cotangent of the coordinates of the spectra."""
    spectra = torch.zeros_like(trace.spectra)
    if of_scales:
        each = torch.cat(list(of_scales)) if len(of_scales) > 1 else of_scales[0]
        spectra = spectra.index_add(0, plan.scale, each)
    for start, g in cores:
        after = len(spectra) - start - len(g)
        spectra = spectra + torch.nn.functional.pad(g, (start, after))
    if not plan.maps:
        return spectra
    (theta,) = torch.autograd.grad(trace.spectra, trace.theta, spectra, retain_graph=True)
    return theta
