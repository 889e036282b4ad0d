"""From the stacks of a layout to its weights, and back: the derivative of a batch, written out.

What autograd would do with some twenty nodes for each shape of frame and plan of chain, most of
them views, is done here by a handful of products each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sttp_manifold.frames import full_frame, reduced_frame
from sttp_manifold.frames.householder import frame_vjp
from sttp_manifold.nn.initial import computing_dtype
from sttp_manifold.nn.layout import Chain, FrameKey, Layout
from sttp_manifold.tt.plans import cheapest_cut
from sttp_manifold.tt.vjp import left_matrix_vjp, right_matrix_vjp, times_bond_vjp

__all__ = ["Pass"]

Parts = tuple[Tensor, ...]
Pull = Callable[[Tensor], Tensor]


class Pass:
    """One computation of the weights of a layout; call it without gradient, outside of autocast.

    Args:
        layout: the static plan.
        leaves: the tensors of each entry of ``layout.leaves``, stacked.
        wanted: for each of them, whether :meth:`pull_back` is to give a gradient; None if there
            will be no such call.

    Attributes:
        parts: for each chain two matrices, for factors ``U diag(s)`` and ``V^T``, for dense weights
            those whose product, reshaped, is ``W``; for cores, all cores with ``s`` in between.

    Shape:
        - leaves: ``(n, ...)``
        - parts: ``(n, ...)`` for the ``n`` rows of each chain
    """

    def __init__(
        self, layout: Layout, leaves: Sequence[Tensor], wanted: Sequence[bool] | None
    ) -> None:
        self._layout = layout
        self._wanted = wanted
        self._frames: dict[FrameKey, Sequence[Tensor]] = {}
        self._pulls: dict[FrameKey, Pull] = {}
        of_frames = leaves[layout.first_frame :]
        for (key, counts), leaf in zip(layout.groups.items(), of_frames, strict=True):
            frame = self._compute_frames(key, leaf)
            self._frames[key] = frame.split(counts) if len(counts) > 1 else (frame,)
        self._chains = [
            _Chain(chain, leaves[chain.leaf], self._frames, wanted is not None)
            for chain in layout.chains
        ]
        self.parts = [chain.parts for chain in self._chains]

    def _compute_frames(self, key: FrameKey, leaf: Tensor) -> Tensor:
        wide = leaf.to(computing_dtype(leaf.dtype))
        if self._wanted is None:
            chart = full_frame if key.full else reduced_frame
            return chart(wide, key.d, key.r, transposed=key.right).to(leaf.dtype)
        frame, pull = frame_vjp(wide, key.d, key.r, full=key.full, transposed=key.right)
        if wide is leaf:
            self._pulls[key] = pull
            return frame
        self._pulls[key] = lambda G: pull(G.to(wide.dtype)).to(leaf.dtype)
        return frame.to(leaf.dtype)

    def pull_back(self, gradients: Sequence[Parts | None]) -> list[Tensor | None]:
        """Gradients of the leaves, where they are wanted, from those of the parts.

        Args:
            gradients: as ``parts``; None for a chain that has no influence.
        """
        assert self._wanted is not None
        layout, wanted = self._layout, self._wanted
        found: list[Tensor | None] = [None] * len(wanted)
        cotangents: dict[FrameKey, list[Tensor | None]] = {
            key: [None] * len(counts) for key, counts in layout.groups.items()
        }
        for each, mine in zip(self._chains, gradients, strict=True):
            if mine is None:
                continue
            chain = each.chain
            of_frames, of_leaf = each.pull_back(mine, wanted[chain.leaf])
            found[chain.leaf] = of_leaf
            for piece, G in zip(chain.pieces, of_frames, strict=True):
                if piece is not None:
                    cotangents[piece[0]][piece[1]] = G
        for k, key in enumerate(layout.groups, layout.first_frame):
            if wanted[k] and any(G is not None for G in cotangents[key]):
                pieces = [
                    torch.zeros_like(frame) if G is None else G
                    for G, frame in zip(cotangents[key], self._frames[key], strict=True)
                ]
                found[k] = self._pulls[key](torch.cat(pieces) if len(pieces) > 1 else pieces[0])
        return found


class _Chain:
    """The weights of one chain of a layout.

    Right frames come as ``Q^T``, and so do their cotangents.
    """

    def __init__(
        self, chain: Chain, leaf: Tensor, frames: dict[FrameKey, Sequence[Tensor]], trainable: bool
    ) -> None:
        self.chain = chain
        plan, split = chain.plan, len(chain.plan.out_modes)
        self._given: list[Tensor]
        if chain.cuts is not None:
            *self._given, centre = _cut(chain, leaf)
        else:
            self._given = [
                _constant(len(chain.rows), r, leaf) if piece is None else frames[piece[0]][piece[1]]
                for piece, (_, r) in zip(chain.pieces, plan.frame_shapes, strict=True)
            ]
            centre = leaf
        s, self._pull_spectrum = _spectrum(chain, centre, trainable)
        cores = [
            frame.view(len(frame), *size)
            for frame, size in zip(self._given, plan.core_shapes, strict=True)
        ]
        if chain.form == "cores":
            self.parts: Parts = (*cores[:split], s, *cores[split:])
            return
        inner, self._pull_bond = times_bond_vjp(cores[split - 1].flatten(1, 2), s)
        cores[split - 1] = inner.view(cores[split - 1].shape)
        place = cheapest_cut(plan) if chain.form == "dense" else split
        first, self._pull_first = left_matrix_vjp(cores[:place])
        second, self._pull_second = right_matrix_vjp(cores[place:])
        self.parts = first, second

    def pull_back(self, gradients: Parts, wanted: bool) -> tuple[list[Tensor], Tensor | None]:
        """Gradients of the frames, none for a point, and of the leaf if it is wanted."""
        split = len(self.chain.plan.out_modes)
        if self.chain.form == "cores":
            of_cores, of_s = [*gradients[:split], *gradients[split + 1 :]], gradients[split]
        else:
            of_cores = [*self._pull_first(gradients[0]), *self._pull_second(gradients[1])]
            a, n, b = self.chain.plan.core_shapes[split - 1]
            # Not flatten, which torch cannot do for a batch of cotangents.
            inner = of_cores[split - 1].reshape(-1, a * n, b)
            of_cores[split - 1], of_s = self._pull_bond(inner)
        of_frames = [G.reshape(frame.shape) for G, frame in zip(of_cores, self._given, strict=True)]
        if self.chain.cuts is None:
            return of_frames, self._pull_spectrum(of_s) if wanted else None
        return [], _joined(self.chain, of_frames, self._pull_spectrum(of_s))


def _constant(count: int, r: int, like: Tensor) -> Tensor:
    """The frame of a core without parameters, which is its own transpose."""
    return -torch.eye(r, dtype=like.dtype, device=like.device).repeat(count, 1, 1)


def _cut(chain: Chain, points: Tensor) -> list[Tensor]:
    """Frames of points, right ones transposed, and coordinates of the spectrum."""
    assert chain.cuts is not None
    sizes, order = chain.cuts
    pieces = points.split(sizes, -1)
    *vectors, centre = (pieces[k] for k in order)
    frames = [
        vector.unflatten(-1, size)
        for vector, size in zip(vectors, chain.plan.frame_shapes, strict=True)
    ]
    split = len(chain.plan.out_modes)
    return [
        *frames[:split],
        *(frame.mT for frame in frames[split:]),
        centre.unflatten(-1, chain.map.coordinate_shape),
    ]


def _joined(chain: Chain, frames: Sequence[Tensor], centre: Tensor) -> Tensor:
    """Points of frames and coordinates: the inverse of :func:`_cut`."""
    assert chain.cuts is not None
    split = len(chain.plan.out_modes)
    parts = [*frames[:split], *(frame.mT for frame in frames[split:]), centre]
    lying = sorted(zip(chain.cuts[1], parts, strict=True), key=lambda entry: entry[0])
    return torch.cat([part.reshape(len(part), -1) for _, part in lying], 1)


def _spectrum(chain: Chain, centre: Tensor, trainable: bool) -> tuple[Tensor, Pull]:
    """Spectrum of its coordinates, and the pull-back."""
    name = chain.map.name
    if name == "identity":  # a chart has constant signs there, a point nothing
        s = chain.map(centre) if chain.cuts is not None else centre
        return s, lambda G: torch.zeros_like(centre)
    if name in ("free", "full"):
        return centre, lambda G: G
    # A chart's numbers are computed like its frames.
    wide = centre.to(computing_dtype(centre.dtype)) if chain.cuts is None else centre
    if not trainable:
        return chain.map(wide).to(centre.dtype), lambda G: G
    with torch.enable_grad():
        theta = wide.detach().requires_grad_()
        s = chain.map(theta).to(centre.dtype)

    def pull(G: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(s, theta, G, retain_graph=True)
        return found.to(centre.dtype)

    return s.detach(), pull
