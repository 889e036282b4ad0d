"""What `compress` treats as one: stock layers that share weights, or a spectral weight.

Both say what they keep at a rank, how far they are then from what they are now, and become
something of that rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.held import HeldWeight
from sttp_manifold.nn.methods import weight_class
from sttp_manifold.nn.modules import naming, show
from sttp_manifold.nn.moments import Moments, widest
from sttp_manifold.nn.ranks import remade, unfolding_values
from sttp_manifold.nn.recipe import PRETRAINED, Recipe
from sttp_manifold.nn.stack import WeightStack, parts_of
from sttp_manifold.nn.stock import Group
from sttp_manifold.nn.torch_state import has_values, outside_autocast
from sttp_manifold.nn.value import exact_value
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.nn.weights_of import held_of
from sttp_manifold.tt.decompose import truncate
from sttp_manifold.tt.fit import tt_fit
from sttp_manifold.tt.metric import Metric
from sttp_manifold.tt.ranks import clip_ranks
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["Made", "SpectralUnit", "StockUnit", "ridged", "spectral_units"]

Made: TypeAlias = "dict[nn.Module, nn.Module | dict[str, HeldWeight]]"

# Inputs of a few batches say little of directions that they hardly have: this part of their mean
# square is added to all.
_RIDGE = 1e-3
_SWEEPS, _TOL = 8, 1e-2


@dataclass(frozen=True, eq=False)
class StockUnit:
    """Stock layers that share weights.

    Args:
        group: the layers.
        recipe: the options of their weights.
        grow: whether layers that would grow are left: ``"skip"`` or ``"allow"``.
        moments: what is known of their inputs.
        fitted: values of weights that are there already, one for each matrix.
    """

    group: Group
    recipe: Recipe
    grow: str
    moments: Moments | None = None
    fitted: dict[Tensor, list[SpectralTT]] = field(default_factory=dict)

    @property
    def layers(self) -> dict[nn.Module, str]:
        """The layers, each with its first name."""
        return self.group.layers

    @property
    def numel(self) -> int:
        """Elements of the dense weights."""
        return self.group.numel

    @property
    def limit(self) -> int:
        """The rank from which on nothing changes."""
        return max(max(plan.ranks) for plan in self.group.plans(self.recipe.at(self.numel)))

    def grown(self, rank: int) -> int | None:
        """Numbers stored at a rank, where they are more than dense ones and not allowed."""
        if self.grow == "allow":
            return None
        count = weight_class(self.recipe.method).count
        plans = self.group.plans(self.recipe.at(rank))
        size = sum(count(plan, self.recipe.spectrum) for plan in plans)
        return size if size > self.numel else None

    def kept(self, rank: int) -> int:
        """Parameters of the non-redundant charts at a rank, or of the dense weights if left."""
        if self.grown(rank) is not None:
            return self.numel
        plans = self.group.plans(self.recipe.at(rank))
        return sum(plan.num_parameters(self.recipe.spectrum) for plan in plans)

    def unseen(self) -> list[str]:
        """Names of layers whose weights the data did not reach."""
        moments = self.moments
        if moments is None:
            return []
        return [
            name
            for weight, name in self.group.weights.items()
            if any(
                moments.of(weight, matrix) == (None, None)
                for matrix in self.group.views[weight].split(weight.detach())
            )
        ]

    @torch.no_grad()
    def errors(self, ranks: Sequence[int]) -> Tensor:
        """Relative squared error at ranks, by the tails of the singular values at every bond.

        Shape:
            - output: ``(len(ranks),)``
        """
        total = torch.zeros(len(ranks), dtype=torch.float64)
        for weight in self.group.weights:
            for matrix, *sides in self._matrices(weight):
                plan = self.recipe.at(max(ranks)).plan(matrix.shape)
                total += _tails(_bonds(matrix.flatten(1), plan, *sides), ranks)
        left = torch.tensor([self.grown(rank) is not None for rank in ranks])
        return torch.where(left, 0.0, total)

    def _matrices(
        self, weight: Tensor, matrices: Iterable[Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Each matrix of a weight with the moments of its two sides, in the widest dtype."""
        dtype = widest(weight.device)
        found = []
        for matrix in matrices or self.group.views[weight].split(weight.detach()):
            sides: tuple[Tensor | None, ...] = (None, None)
            if self.moments is not None:
                sides = self.moments.of(weight, matrix)
            left, right = (None if m is None else ridged(m.to(weight.device)) for m in sides)
            found.append((matrix.to(dtype), left, right))
        return found

    @torch.no_grad()
    def _values(self, rank: int) -> dict[Tensor, list[SpectralTT]]:
        """Weights of a rank that are closest on the data."""
        values: dict[Tensor, list[SpectralTT]] = {}
        for weight, name in self.group.weights.items():
            if not has_values(weight):
                continue  # which the recipe refuses by name
            if weight in self.fitted:
                values[weight] = self.fitted[weight]
                continue
            with naming(name), outside_autocast(weight.device):
                values[weight] = self.fit(weight, rank)
        return values

    def fit(
        self, weight: Tensor, rank: int, matrices: Iterable[Tensor] | None = None
    ) -> list[SpectralTT]:
        """Values of a rank that are closest to the matrices of a weight, or to some, on the data.

        Shape:
            - weight: any
            - matrices: each ``(d_out, d_in, *kernel)``, a view of ``weight``
        """
        return [
            self.nearest(matrix.flatten(1), matrix.shape, rank, left, right)
            for matrix, left, right in self._matrices(weight, matrices)
        ]

    def nearest(
        self,
        matrix: Tensor,
        size: Sequence[int],
        rank: int,
        left: Tensor | None,
        right: Tensor | None,
    ) -> SpectralTT:
        """The value closest to a matrix, on the plan of a weight of a size and a rank.

        Shape:
            - matrix: ``(d_out, d_in)``
            - left: ``(d_out, d_out)`` or ``(d_out,)``
            - right: ``(d_in, d_in)`` or ``(d_in,)``
        """
        plan = self.recipe.at(rank).plan(tuple(size))
        return tt_fit(matrix, plan, left=left, right=right, max_sweeps=_SWEEPS, tol=_TOL)

    def made(self, rank: int) -> Made:
        """What takes the place of the layers, or of their parameters."""
        fitted = self.recipe.init == PRETRAINED and self.moments is not None
        return self.group.convert(self.recipe.at(rank), self._values(rank) if fitted else {})

    def __str__(self) -> str:
        return str(self.group)


def ridged(moment: Tensor) -> Tensor:
    """A moment with a part of the mean square added in all directions.

    Shape:
        - moment: ``(d, d)`` or ``(d,)``
    """
    if moment.ndim == 1:
        return moment + _RIDGE * moment.mean()
    more = _RIDGE * moment.diagonal().mean()
    return moment + more * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _bonds(
    matrix: Tensor, plan: TTShape, left: Tensor | None, right: Tensor | None
) -> list[Tensor]:
    """Squared singular values of the unfoldings at the inner bonds of a plan, largest first.

    On the right side of the centre a metric of the columns mixes the modes, and is left out.
    """
    white = Metric.of(left).whitened(matrix)
    white = Metric.of(right).whitened(white.mT).mT
    modes, found, rows = plan.out_modes + plan.in_modes, [], 1
    for bond, mode in enumerate(modes[:-1], 1):
        rows *= mode
        tensor = white if bond <= len(plan.out_modes) else matrix
        unfolded = tensor.reshape(rows, -1)
        gram = unfolded @ unfolded.mT if rows <= unfolded.shape[1] else unfolded.mT @ unfolded
        values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
        found.append(values / values.sum().clamp_min(torch.finfo(values.dtype).tiny))
    return found


def _tails(bonds: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Sum over bonds of what is left beyond each rank."""
    total = torch.zeros(len(ranks), dtype=torch.float64)
    for values in bonds:
        tails = values.flip(0).cumsum(0).flip(0)
        tails = torch.cat([tails, tails.new_zeros(1)]).cpu().double()
        total += tails[torch.tensor(ranks).clamp_max(len(values))]
    return total


@dataclass(frozen=True, eq=False)
class SpectralUnit:
    """A spectral weight, or a stack of equal ones, whose ranks may be lowered.

    Args:
        held: the weight or the stack.
        name: its name in the network.
        layers: the layer that it is in, by name; empty for one in no layer.
    """

    held: SpectralWeight | WeightStack
    name: str
    layers: dict[nn.Module, str]

    @property
    def parts(self) -> list[SpectralWeight]:
        """The different weights."""
        return list(dict.fromkeys(parts_of(self.held)))

    @property
    def numel(self) -> int:
        """Elements of the dense weights."""
        return sum(part.shape.numel for part in self.parts)

    @property
    def stored(self) -> int:
        """Numbers that the weights store now."""
        return sum(p.numel() for part in self.parts for p in part.parameters())

    @property
    def limit(self) -> int:
        """The rank from which on nothing changes: the one it has."""
        return max(self.parts[0].shape.ranks)

    def grown(self, rank: int) -> None:
        """None: lower ranks never store more."""

    def _plan(self, rank: int) -> TTShape:
        old = self.parts[0].shape
        ranks = clip_ranks(old.out_modes + old.in_modes, [min(rank, r) for r in old.ranks])
        return TTShape(old.out_modes, old.in_modes, ranks=ranks)

    def kept(self, rank: int) -> int:
        """Parameters of the non-redundant charts at a rank."""
        return self._plan(rank).num_parameters(self.parts[0].spectrum) * len(self.parts)

    def is_lowered(self, rank: int) -> bool:
        """Whether a rank is below one that it has."""
        return self._plan(rank) != self.parts[0].shape

    @torch.no_grad()
    def errors(self, ranks: Sequence[int]) -> Tensor:
        """Relative squared error at ranks, by the tails of the singular values at every bond.

        Shape:
            - output: ``(len(ranks),)``
        """
        total = torch.zeros(len(ranks), dtype=torch.float64)
        for part in self.parts:
            squares = [values.square() for values in unfolding_values(exact_value(part))]
            total += _tails([v / v.sum().clamp_min(1e-300) for v in squares], ranks)
        return total

    @torch.no_grad()
    def made(self, rank: int) -> Made:
        """Weights of a lower rank in the place of those there are."""
        if not self.is_lowered(rank):
            return {}
        with naming(self.name):
            return {
                part: remade(part, lambda tt: truncate(tt, rank), "compress", ("identity",)) or part
                for part in self.parts
            }

    def __str__(self) -> str:
        return show(self.name)


def spectral_units(
    model: nn.Module, meant: set[nn.Module], options: Mapping[str, object]
) -> list[SpectralUnit]:
    """Spectral weights of the modules that are meant, each once.

    Raises:
        ConversionError: options that say otherwise than what a weight is.
    """
    units: dict[nn.Module, SpectralUnit] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        for held in held_of(module).values():
            inside.update((held, *parts_of(held)))
            if module in meant:
                unit = SpectralUnit(held, name, {module: name})
                units.setdefault(held, unit).layers.setdefault(module, name)
    for name, module in model.named_modules():
        if isinstance(module, SpectralWeight) and module not in inside and module in meant:
            units[module] = SpectralUnit(module, name, {module: name})
    for unit in units.values():
        _check_options(unit, options)
    return list(units.values())


def _check_options(unit: SpectralUnit, options: Mapping[str, object]) -> None:
    weight = unit.parts[0]
    is_svdp = len(weight.shape.out_modes) == len(weight.shape.in_modes) == 1
    own = {
        "kind": "svdp" if is_svdp else "sttp",
        "method": weight.method,
        "spectrum": weight.spectrum,
    }
    for name, value in own.items():
        if options.get(name, value) != value:
            raise ConversionError(
                f"{unit} is in spectral form already, with {name}={value!r}, and compress would "
                f"lower its rank only: leave {name}={options[name]!r} out, leave the layer out by "
                "skip=, or call decompress(model) first",
                layer=unit.name,
            )
