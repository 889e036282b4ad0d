"""The tables and buffers by which fused kernels step parameters.

A kernel finds points and gradients by their addresses. The state of all parameters lies in flat
buffers, one for each kind of it, and that of one parameter is a view, in ``optimizer.state`` at all
times and at one address: a captured graph needs nothing else. Where a state has been loaded, or a
parameter has moved in memory, the tables are made anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sttp_manifold.optim._blocks import (
    frame_shapes,
    scalars_shape,
    spectrum_slice,
    working_dtype,
)
from sttp_manifold.optim._direction import POLYNOMIALS
from sttp_manifold.optim._fused_rules import Rule
from sttp_manifold.optim._moments import fitted

__all__ = ["FusedStep"]

_BLOCK = 128


class _Table(NamedTuple):
    """Frames of a width; or, of width 0, coordinates."""

    width: int
    rows: Tensor
    scratch: Tensor


class FusedStep:
    """Framed parameters of one dtype and device that fused kernels step.

    Args:
        params: the parameters; they have gradients.
        rule: the optimizer's rule.

    Attributes:
        params: the same.
    """

    def __init__(self, params: Sequence[Tensor], rule: Rule) -> None:
        self.params = list(params)
        self._names = rule.arrays, rule.scalars, rule.counted
        self.dtype, self.device = params[0].dtype, params[0].device
        self._addresses = [p.data_ptr() for p in params]
        self._starts = [0, *accumulate(p.numel() for p in params)]
        shapes = [scalars_shape(p) for p in params]
        self._scalar_starts = [0, *accumulate(map(math.prod, shapes))]
        self._shapes = {
            **{name: [tuple(p.shape) for p in params] for name in rule.arrays},
            **{name: shapes for name in rule.scalars},
        }
        self.buffers: dict[str, Tensor] = {}
        self._views: dict[str, list[Tensor]] = {}
        wide = working_dtype(params[0])
        self._work = torch.empty(self._starts[-1], dtype=wide, device=self.device)
        self._none = torch.zeros(1, dtype=wide, device=self.device)
        self._polynomials = torch.tensor(POLYNOMIALS, dtype=wide).to(self.device)
        self._small = 2 if rule.of_turns is None else 12
        self._make_tables(per_frame=bool(rule.scalars))
        self._seen: list[int] | None = None
        self._gradients = torch.empty(len(self._places), dtype=torch.int64, device=self.device)
        # What a captured graph copies from must not change nor go.
        self._captured: list[Tensor] = []
        self._held: list[Tensor] = []

    def _make_tables(self, *, per_frame: bool) -> None:
        frames: dict[int, list[list[int]]] = {}
        coordinates: list[list[int]] = []
        # Where each row's gradient is: the parameter, and the element in it.
        self._places: list[tuple[int, int]] = []
        size = self.params[0].element_size()
        for k, p in enumerate(self.params):
            points, groups = frame_shapes(p)
            at, scalar = 0, self._scalar_starts[k]
            part = spectrum_slice(p)
            for _ in range(points):
                for count, d, r in groups:
                    for _ in range(count):
                        place = self._starts[k] + at
                        frames.setdefault(_width(r), []).append(
                            [p.data_ptr() + size * at, place, d, r, len(self._places), k]
                            + [scalar if per_frame else place]
                        )
                        self._places.append((k, at))
                        at, scalar = at + d * r, scalar + 1
                if part is not None:
                    many = part.stop - part.start
                    place = self._starts[k] + at
                    coordinates.append(
                        [p.data_ptr() + size * at, place, many, len(self._places), k]
                        + [scalar if per_frame else place]
                    )
                    self._places.append((k, at))
                    at, scalar = at + many, scalar + many
        # The longest first: what starts last decides when a launch ends.
        self.tables = [
            self._table(width, sorted(rows, key=lambda row: -row[2]))
            for width, rows in sorted(frames.items())
        ]
        if coordinates:
            self.tables.append(self._table(0, coordinates))

    def _table(self, width: int, rows: list[list[int]]) -> _Table:
        scratch = torch.empty(
            len(rows) * self._small * width * width, dtype=self._work.dtype, device=self.device
        )
        return _Table(width, torch.tensor(rows, dtype=torch.int64).to(self.device), scratch)

    # -- State. -------------------------------------------------------------------------------

    def fits(self, params: Sequence[Tensor], rule: Rule) -> bool:
        """Whether these are the same parameters, where they were, with the same kinds of state."""
        return (
            len(params) == len(self.params)
            and (rule.arrays, rule.scalars, rule.counted) == self._names
            and all(p is q for p, q in zip(params, self.params, strict=True))
            and all(
                p.data_ptr() == address and p.dtype == self.dtype
                for p, address in zip(params, self._addresses, strict=True)
            )
        )

    def hold(self, states: Sequence[dict[str, Any]]) -> None:
        """Let the buffers be the state of each parameter: what it has now, zeros where it has none.

        Raises:
            OptimizerError: for the state of another parameter.
        """
        for name, shapes in self._shapes.items():
            views = self._views.get(name)
            if views is not None and all(
                state.get(name) is view for state, view in zip(states, views, strict=True)
            ):
                continue
            self._join(name, shapes, states)
        if self._names[2]:
            self._join_counts(states)

    def _join(
        self, name: str, shapes: Sequence[tuple[int, ...]], states: Sequence[dict[str, Any]]
    ) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        flat = torch.zeros(sum(sizes), dtype=self._work.dtype, device=self.device)
        views = [
            part.view(shape)
            for part, shape in zip(flat.split_with_sizes(sizes), shapes, strict=True)
        ]
        for p, state, view in zip(self.params, states, views, strict=True):
            if name in state:
                view.copy_(fitted(p, name, state[name], tuple(view.shape)))
            state[name] = view
        self.buffers[name], self._views[name] = flat, views

    def _join_counts(self, states: Sequence[dict[str, Any]]) -> None:
        views = self._views.get("step")
        if views is not None and all(
            state.get("step") is view for state, view in zip(states, views, strict=True)
        ):
            return
        counts = torch.zeros(len(states), dtype=torch.float32, device=self.device)
        self._views["step"] = list(counts.unbind())
        for state, view in zip(states, self._views["step"], strict=True):
            if "step" in state:
                view.copy_(torch.as_tensor(state["step"]))
            state["step"] = view
        self.buffers["step"] = counts

    # -- A step. ------------------------------------------------------------------------------

    def _look_for_gradients(self) -> None:
        """Tell the kernels where the gradients are, if they are not where they were."""
        # Copies of gradients that have gaps are held until the next step has replaced them.
        held = [p.grad.contiguous().to(self.dtype) for p in self.params]  # type: ignore[union-attr]
        seen = [gradient.data_ptr() for gradient in held]
        self._held = held
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if seen == self._seen and not capturing:
            return
        size = self.params[0].element_size()
        found = torch.tensor([seen[k] + size * at for k, at in self._places], dtype=torch.int64)
        if self.device.type == "cuda":
            found = found.pin_memory()
        if capturing:
            # A replay copies it again: whatever steps came between, it finds its own gradients.
            self._captured.append(found)
        self._gradients.copy_(found, non_blocking=True)
        # Pinned memory is given back by torch only when the copy is done.
        self._seen = None if capturing else seen

    def step(self, rule: Rule, of_frames: float | Tensor, of_others: float | Tensor) -> None:
        """Step all parameters, by one launch for each table.

        Args:
            rule: the optimizer's.
            of_frames: the rate of frames, a number, or a tensor of one element on the device; and
            of_others: that of coordinates.
        """
        from sttp_manifold.optim._fused import step_coordinates

        self._look_for_gradients()
        counts = self._none
        if rule.counted:
            counts = self.buffers["step"].add_(1)
        momentum, second, peak = self._kept(rule)
        shared = (self._gradients, momentum, second, peak)
        with torch.cuda.device_of(self.params[0]):
            for table in self.tables:
                if table.width and rule.of_turns is not None:
                    self._turn(table, momentum, rule.of_turns, of_frames)
                elif table.width:
                    self._step_frames(table, shared, counts, rule, of_frames)
                else:
                    rate, how = self._arguments(rule, of_others)
                    step_coordinates[(len(table.rows),)](
                        table.rows, *shared, counts, rate, **rule.of_coordinates, **how,
                        BLOCK=_BLOCK, num_warps=4,
                    )  # fmt: skip

    def _arguments(self, rule: Rule, lr: float | Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The rate as a kernel finds it on the device, and what else kernels take of a rule."""
        on_device = isinstance(lr, Tensor)
        how = {**rule.numbers, **rule.flags, "LR_TENSOR": on_device, "lr": 0.0 if on_device else lr}
        return (lr if isinstance(lr, Tensor) else self._none), how | {"DTYPE": self._triton_dtype}

    def _step_frames(
        self, table: _Table, shared: tuple[Tensor, ...], counts: Tensor, rule: Rule,
        lr: float | Tensor,
    ) -> None:  # fmt: skip
        from sttp_manifold.frames._tiles import SIZES
        from sttp_manifold.optim._fused import step_frames

        rate, how = self._arguments(rule, lr)
        step_frames[(len(table.rows),)](
            table.rows, *shared, self._work, table.scratch, counts, rate,
            **how, R=table.width, **SIZES[table.width],
        )  # fmt: skip

    def _turn(
        self, table: _Table, momentum: Tensor, how: Mapping[str, Any], angle: float | Tensor
    ) -> None:
        from sttp_manifold.frames._tiles import SIZES
        from sttp_manifold.optim._fused_muon import turn_frames

        turn, cos, sin = self._none, 0.0, 0.0
        if isinstance(angle, Tensor):
            turn = torch.stack((angle.cos(), angle.sin()))
        else:
            cos, sin = math.cos(angle), math.sin(angle)
        turn_frames[(len(table.rows),)](
            table.rows, self._gradients, momentum, self._work, table.scratch, self._polynomials,
            turn, cos=cos, sin=sin, last=len(POLYNOMIALS) - 1, ON_DEVICE=isinstance(angle, Tensor),
            DTYPE=self._triton_dtype, **how, R=table.width, **SIZES[table.width],
        )  # fmt: skip

    @property
    def _triton_dtype(self) -> Any:
        import triton.language as tl

        known = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        return known[self.dtype]

    def _kept(self, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers of the momentum and of second moments; anything where the rule has none."""
        names = [*rule.arrays, *rule.scalars]
        found = [self.buffers[name] for name in names]
        momentum, second, peak = (*found, self._none, self._none, self._none)[:3]
        return momentum, second, peak


def _width(r: int) -> int:
    from sttp_manifold.frames._tiles import padded

    return padded(r)
