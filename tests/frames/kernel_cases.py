"""Frames by kernels in Triton's interpreter, beside the charts in float64: prints JSON.

Run by `test_frame_kernels.py` in a process of its own. Memory that torch does not fill is NaN.
"""

from __future__ import annotations

import copy
import json
import math
import sys

import torch
from kernels.poisoned_memory import poisoned
from torch import nn

from sttp_manifold.frames import full_frame, reduced_frame
from sttp_manifold.frames._kernel_table import FrameTable, Placed
from sttp_manifold.frames.compiled import all_frames
from sttp_manifold.nn import HouseholderWeight, compress


def length(d, r, full):
    return d * r - r * (r + 1) // 2 if full else r * (d - r)


# Rows, columns, full chart, transposed.
CASES = {
    "one column": [(1, 1, True, False), (5, 1, True, True), (7, 1, False, False)],
    "narrow": [(16, 16, True, False), (27, 16, False, True), (9, 5, True, True)],
    "and reduced": [(9, 4, False, False), (16, 1, False, True), (4, 4, True, True)],
    "of two widths": [(70, 17, True, False), (40, 10, True, True), (33, 20, False, True)],
    "wide": [(70, 64, True, False), (100, 50, False, False)],
    "more rows than a block": [(600, 6, True, True), (530, 3, False, False)],
}  # fmt: skip


def relative(a, b):
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) if b.numel() else 0.0


def compare(frames, scale):
    torch.manual_seed(0)
    gap = 3  # what lies between frames is left alone
    placed, start, place = [], gap, 0
    for d, r, full, turned in frames:
        placed.append(Placed(start, place, d, r, full, turned))
        start, place = start + length(d, r, full) + gap, place + d * r
    vector = torch.randn(start) * scale
    table = FrameTable(placed, vector.device)
    Q, kept = torch.empty(place), torch.empty(table.kept)
    table.form(vector, Q, kept)
    G = torch.randn(place)
    gradient = torch.full((start,), 7.0)
    table.pull_back(vector, G, kept, gradient)
    worst = {"value": 0.0, "gradient": 0.0, "orthonormality": 0.0}
    mine = torch.zeros(start, dtype=torch.bool)
    for start, place, d, r, full, turned in placed:
        n = length(d, r, full)
        mine[start : start + n] = True
        p = vector[start : start + n].double().requires_grad_()
        frame = (full_frame if full else reduced_frame)(p, d, r)
        size = (r, d) if turned else (d, r)
        got, g = (t[place : place + d * r].view(size) for t in (Q, G))
        got, g = (t.mT if turned else t for t in (got, g))
        worst["value"] = max(worst["value"], relative(got, frame.detach()))
        if n:
            (right,) = torch.autograd.grad(frame, p, g.double())
            worst["gradient"] = max(worst["gradient"], relative(gradient[start : start + n], right))
        off = got.double().mT @ got.double() - torch.eye(r, dtype=torch.float64)
        worst["orthonormality"] = max(worst["orthonormality"], float(off.abs().max()))
    worst["left alone"] = float((gradient[~mine] - 7).abs().max())
    return worst


def overflown():
    """A reflector whose square overflows makes its own frame NaN, and no other."""
    vector = torch.full((2 * length(9, 4, True),), 0.1)
    vector[5] = 1e30
    table = FrameTable(
        [Placed(0, 0, 9, 4, True, False), Placed(length(9, 4, True), 36, 9, 4, True, False)],
        vector.device,
    )
    Q, kept = torch.empty(72), torch.empty(table.kept)
    table.form(vector, Q, kept)
    return [bool(Q[:36].isnan().any()), bool(Q[36:].isnan().any())]


def network():
    """Gradients of all weights of a network, formed together, beside those in float64."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 24), nn.ReLU()]
    model = compress(nn.Sequential(*layers, nn.Linear(24, 10)), 5, grow="allow", init="random")
    reference = copy.deepcopy(model).double()
    x = torch.randn(4, 3, 8, 8)
    for _ in range(2):  # from the second forward on together
        for net, batch in ((model, x), (reference, x.double())):
            net.zero_grad()
            net(batch).square().mean().backward()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    worst = {"gradient": max(relative(p.grad, q.grad) for p, q in pairs)}
    # Several cotangents at once, and the derivative of a gradient, which goes by plain operations.
    weight = next(m for m in model.modules() if isinstance(m, HouseholderWeight))
    W = weight()
    heads = torch.randn(3, *W.shape)
    vector = next(weight.parameters())
    (batched,) = torch.autograd.grad(W, vector, heads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(W, vector, head, retain_graph=True)[0] for head in heads]
    worst["batched"] = relative(batched, torch.stack(single).double())
    slopes = []
    for net in (model, reference):
        parameters = list(net.parameters())
        loss = net(x.to(parameters[0].dtype)).square().mean()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
        slopes.append(torch.cat([g.flatten() for g in second]))
    worst["second"] = relative(slopes[0], slopes[1])
    return worst


def operator():
    """The operator that `torch.compile` sees: what torch asks of one, its frames, its gradient."""
    sizes = [(7, 3, True), (5, 2, False), (4, 4, True), (30, 20, True)]
    torch.manual_seed(0)
    vector = torch.randn(sum(length(*size) for size in sizes)).requires_grad_()
    arguments = (vector, *([size[k] for size in sizes] for k in range(3)))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sttp_manifold.frames, arguments, test_utils=checks)
    shapes, full = [(d, r) for d, r, _ in sizes], [whole for *_, whole in sizes]
    frames = all_frames(vector, shapes, full)
    double = vector.detach().double().requires_grad_()
    right = all_frames(double, shapes, full)
    loss, theirs = (sum(q.sin().sum() for q in some) for some in (frames, right))
    (mine,), (wanted,) = torch.autograd.grad(loss, vector), torch.autograd.grad(theirs, double)
    worst = max(relative(a.detach(), b.detach()) for a, b in zip(frames, right, strict=True))
    return {"value": worst, "gradient": relative(mine, wanted)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.empty = poisoned
    _like = torch.empty_like
    torch.empty_like = lambda x: _like(x).fill_(math.nan)
    found = {f"{name}, {scale}": compare(case, scale) for name, case in CASES.items()
             for scale in (0.1, 2.0)}  # fmt: skip
    also = {"network": network(), "operator": operator(), "overflown": overflown()}
    json.dump({"cases": found, **also}, sys.stdout)
