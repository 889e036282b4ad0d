r"""Weights fitted one after the other, each to what the dense network computes there.

Once the first layers are truncated, the next one gets other inputs: ``y`` in place of ``x``. What
it is to give are still the outputs ``W x`` of the dense network, so that it is fitted by

.. math:: \min_{\hat W} \sum |W x - \hat W y|^2
   = \min_{\hat W} |(T - \hat W)\, C^{1/2}|_F^2 + \text{const}, \quad C = \sum y y^\top,
   \quad T = W \Big(\sum x y^\top\Big) C^{-1}

Both networks run side by side, once for each input that weights read: a weight takes errors back
that those before it have made.

References:
    Frantar et al., *GPTQ*, 2022 (layer after layer, on the inputs that the compressed ones give).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.calibration import runs_of, undisturbed
from sttp_manifold.nn.modules import naming
from sttp_manifold.nn.moments import Moments, Part, widest
from sttp_manifold.nn.torch_state import outside_autocast
from sttp_manifold.nn.units import StockUnit, ridged
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["fit_in_turn"]


class _Enough(Exception):  # noqa: N818
    """A run that has gone as far as it is looked at."""


class _Rows(Moments):
    """Keeps what weights are multiplied with, in order.

    Attributes:
        wanted: numbers of the weights to keep it of.
        ends: whether a run ends at the first of the others that comes behind them.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters)
        self.wanted: set[int] = set(range(len(parameters)))
        self.ends = False
        self.rows: list[tuple[Part, Tensor]] = []

    def take(self, part: Part, rows: Tensor) -> None:
        """See the base class."""
        if part.parameter in self.wanted:
            self.rows.append((part, rows))
        elif self.ends and self.rows:
            raise _Enough

    def counted(self, *_: Any) -> None:
        """Lookups are of no interest: their inputs are indices."""

    def run(self, run: Callable[[], object], mask: Tensor | None) -> list[tuple[Part, Tensor]]:
        """What one batch gives."""
        self.rows = []
        with self, self.only(mask), suppress(_Enough):
            run()
        return self.rows


def fit_in_turn(model: nn.Module, ranks: Mapping[StockUnit, int], data: Any) -> None:
    """Fit the weights of units at their ranks in turn; each unit keeps its values.

    Args:
        model: the network, which is not changed.
        ranks: the units, each with its rank.
        data: as for :func:`compress`.

    Raises:
        ConversionError: data that is a sum of moments already, or a network that multiplies other
            inputs once weights are truncated (as by routing), so that they cannot be compared.
    """
    if isinstance(data, Moments):
        raise ConversionError(
            "in_turn=True runs the network for each layer: give the batches, not their moments"
        )
    of = {weight: unit for unit in ranks for weight in unit.group.weights}
    weights = list(of)
    twin = copy.deepcopy(model)
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    others = [twin.get_parameter(names[id(weight)]) for weight in weights]
    with undisturbed(model), undisturbed(twin):
        pair = (_Rows(weights), _Rows(others))
        stages, alone = _stages(pair[0], model, data)
        for stage in stages:
            for rows in pair:
                rows.wanted, rows.ends = stage, alone
            seen = _Both(weights, pair, (model, twin), data)
            for number in stage:
                weight = weights[number]
                unit = of[weight]
                with naming(unit.group.weights[weight]), outside_autocast(weight.device):
                    values = seen.fitted(unit, weight, ranks[unit])
                unit.fitted[weight] = values
                view = unit.group.views[weight]
                matrices = torch.stack([value.to_matrix() for value in values])
                others[number].copy_(view.joined(matrices))


def _stages(rows: _Rows, model: nn.Module, data: Any) -> tuple[list[set[int]], bool]:
    """Numbers of weights that read one input, in the order of the run; whether none comes back."""
    run, mask = next(iter(runs_of(model, data)))
    order: list[set[int]] = []
    done: set[int] = set()
    alone, last = True, None
    for part, x in rows.run(run, mask):
        place = (x.data_ptr(), x.shape, x.stride())
        if part.parameter in done:
            alone = alone and part.parameter in order[-1]
            last = None
        elif place == last:
            order[-1].add(part.parameter)
        else:
            order.append({part.parameter})
        done.add(part.parameter)
        last = place
    return order, alone


class _Both:
    """Moments of inputs of the truncated network, and of both networks' with each other."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        pair: tuple[_Rows, _Rows],
        models: tuple[nn.Module, nn.Module],
        data: Any,
    ) -> None:
        self.own, self.cross = Moments(weights), Moments(weights)
        both = zip(*(runs_of(model, data) for model in models), strict=True)
        for (run, mask), (again, _) in both:
            dense, truncated = pair[0].run(run, mask), pair[1].run(again, mask)
            if [(p, x.shape) for p, x in dense] != [(p, y.shape) for p, y in truncated]:
                raise ConversionError(
                    "in_turn=True compares inputs of the dense and of the truncated network, and "
                    "this one multiplies others once its weights change (as by routing); leave "
                    "in_turn out"
                )
            for (part, x), (_, y) in zip(dense, truncated, strict=True):
                x, y = x.to(widest(x.device)), y.to(widest(y.device))
                self.own.sum_up(part, y.mT @ y)
                self.cross.sum_up(part, x.mT @ y)

    def fitted(self, unit: StockUnit, weight: Tensor, rank: int) -> list[SpectralTT]:
        """The values of a weight, one for each of its matrices."""
        found: list[SpectralTT] = []
        for matrix in unit.group.views[weight].split(weight.detach()):
            left, right = self.own.of(weight, matrix)
            crossed = self.cross.of(weight, matrix)[1]
            if left is not None or right is None or crossed is None:
                found += unit.fit(weight, rank, [matrix])
                continue
            C = ridged(right)
            W = matrix.flatten(1).to(C.dtype)
            # What the ridge stands for are inputs that have not moved.
            target = W @ (crossed + (C - right))
            target = torch.linalg.solve(C, target.mT).mT
            found.append(unit.nearest(target, matrix.shape, rank, None, C))
        return found
