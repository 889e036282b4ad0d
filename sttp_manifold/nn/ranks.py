r"""Ranks that change: `truncate_` lowers those of a network, `grow_` raises them.

A weight of other ranks is another plan, so both put a new spectral weight in the place of the old
one: layers, names and ties stay, parameters do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError, SpectrumError
from sttp_manifold.nn.carry import carry_over, check_weight, mark_like
from sttp_manifold.nn.methods import make_weight, plain_weight, weight_class
from sttp_manifold.nn.modules import naming, replace
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.nn.value import exact_value
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.optim.successors import succeed
from sttp_manifold.tt.contract import mirror, regroup_cores
from sttp_manifold.tt.decompose import truncate
from sttp_manifold.tt.factors import positive_integer
from sttp_manifold.tt.ranks import clip_ranks
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["grow_", "remade", "truncate_", "unfolding_values"]


@explained
def truncate_(
    model: nn.Module,
    energy: float | None = None,
    *,
    rank: int | None = None,
    tol: float | None = None,
) -> nn.Module:
    r"""Lower the ranks of every spectral weight of a network, in place.

    The spectrum says what a rank is worth: at the centre the smallest singular values are dropped,
    which is the best approximation of that rank; at the other bonds those of the unfolding. Every
    bond may lose the same, the most (found by trial, to a fifth) at which the weight as a whole
    keeps its energy. With one mode a side (SVDP) the result is the lowest rank there is for that
    energy, and the best approximation of that rank.

    Dtype, device, method, frozen state, hooks and tied weights are kept, and layers are the same
    objects. Weights whose ranks change have new parameters: **call**
    ``optimizer.follow(model)`` (:func:`sttp_manifold.optim.follow` for torch's own optimizers), or
    build the optimizer anew, of which :func:`sttp_manifold.optim.check_optimizer` reminds. If any
    weight fails, nothing has changed.

    Args:
        model: the network, a layer, or a weight.
        energy: the fraction of :math:`|W|^2` (Frobenius) that each weight keeps at least; or
        rank: the highest rank of any bond; or
        tol: the highest relative error :math:`|W - W'| / |W|`, that is ``energy = 1 - tol ** 2``.

    Returns:
        The model; the new weight if the model itself is one.

    Raises:
        ConversionError: not exactly one of the three, an ``energy`` outside ``(0, 1]``, a ``tol``
            outside ``[0, 1)``, no spectral weights, weights without numbers, or something on a
            weight that cannot be carried over.
        SpectrumError: an identity spectrum that would lose rank: all its directions weigh the
            same. ``"normalized"`` takes the nearest weight of norm one, which costs more than the
            energy says; ``"fixed"`` keeps the singular values that are left.
        ShapeError: parameters that are not finite, or a bad rank.

    References:
        Oseledets, *Tensor-train decomposition*, 2011 (a share of the error for each bond).

    Example:
        >>> from sttp_manifold.nn import compress
        >>> model = compress(nn.Sequential(nn.Linear(64, 32)), rank=8, kind="svdp")
        >>> truncate_(model, rank=3)[0].spectral_weight.shape.rank
        3
    """
    if (energy is not None) + (rank is not None) + (tol is not None) != 1:
        raise ConversionError(
            f"give one of energy=0.99, rank=8 and tol=0.1; got energy={energy!r}, rank={rank!r}, "
            f"tol={tol!r}"
        )
    if energy is not None and not 0 < energy <= 1:
        raise ConversionError(f"energy is a fraction above 0 up to 1, got {energy!r}")
    if tol is not None:
        if not 0 <= tol < 1:
            raise ConversionError(f"tol is a relative error from 0 to below 1, got {tol!r}")
        energy = 1 - tol**2
    if rank is not None:
        positive_integer(rank, "rank")

    def lowered(weight: SpectralWeight, tt: SpectralTT) -> SpectralTT:
        if energy is None:
            return truncate(tt, rank)
        return _keeping(tt, energy, torch.finfo(weight.dtype).eps)

    return _change(model, lowered, "truncate_", ("identity",))


@explained
def grow_(model: nn.Module, rank: int, *, generator: torch.Generator | None = None) -> nn.Module:
    r"""Raise the ranks of every spectral weight of a network and leave it the same, in place.

    Each frame gets further columns, random ones orthonormal to those it has, and the spectrum
    zeros for them, so that ``W`` stays the same to rounding. Training moves the new singular
    values at once, since their gradients are not zero for random directions, and the directions
    themselves as soon as their singular values are no longer zero.

    What is kept, and that optimizers have to follow, is as for :func:`truncate_`.

    Args:
        model: the network, a layer, or a weight.
        rank: the rank of all bonds, lowered where a bond cannot carry it; bonds of higher rank
            stay.
        generator: source of the new directions, on the CPU.

    Returns:
        The model; the new weight if the model itself is one.

    Raises:
        SpectrumError: a weight with ``"identity"`` or ``"fixed"`` spectrum that would grow: it has
            no singular values of zero.
        ConversionError: no spectral weights, weights without numbers, or something on a weight that
            cannot be carried over.
        ShapeError: parameters that are not finite, or a bad rank.

    Example:
        >>> from sttp_manifold.nn import compress
        >>> model = compress(nn.Sequential(nn.Linear(64, 32)), rank=3, kind="svdp")
        >>> grow_(model, rank=5)[0].spectral_weight.tt().singular_values()[3:].abs().max() < 1e-6
        tensor(True)
    """
    positive_integer(rank, "rank")

    def grown(weight: SpectralWeight, tt: SpectralTT) -> SpectralTT:
        modes = tt.shape.out_modes + tt.shape.in_modes
        bounds = clip_ranks(modes, (1, *[rank] * (len(modes) - 1), 1))
        wanted = [max(a, b) for a, b in zip(tt.shape.ranks, bounds, strict=True)]
        plan = TTShape(tt.shape.out_modes, tt.shape.in_modes, ranks=clip_ranks(modes, wanted))
        return tt if plan == tt.shape else _padded(tt, plan, generator)

    return _change(model, grown, "grow_", ("identity", "fixed"))


def _change(
    model: nn.Module,
    other: Callable[[SpectralWeight, SpectralTT], SpectralTT],
    verb: str,
    refused: Sequence[str],
) -> nn.Module:
    """Put a weight of another plan in the place of each one that gets another plan."""
    weights = {m: name for name, m in model.named_modules() if isinstance(m, SpectralWeight)}
    if not weights:
        raise ConversionError(
            f"{verb} found no spectral weights; compress(model, rank=16) makes them"
        )
    new: dict[nn.Module, nn.Module] = {}
    with torch.no_grad():
        for weight, name in weights.items():
            with naming(name):
                made = remade(weight, partial(other, weight), verb, refused)
                if made is not None:
                    new[weight] = made
    changed = replace(model, new)
    for before, after in new.items():
        succeed(before.parameters(), after.parameters())
    return changed


def remade(
    weight: SpectralWeight,
    other: Callable[[SpectralTT], SpectralTT],
    verb: str,
    refused: Sequence[str],
) -> SpectralWeight | None:
    """A weight of another plan, with what hangs on the old one; None where the plan stays.

    Args:
        weight: the weight.
        other: its value on another plan.
        verb: the function that does it, for errors.
        refused: spectra that it cannot do it under.

    Raises:
        ConversionError: a weight without numbers, or something on it that cannot be carried over.
        SpectrumError: a spectrum of ``refused``.
    """
    if not has_values(*weight.parameters(), *weight.buffers()):
        raise ConversionError(
            f"{verb} needs numbers, and this weight has none (device {weight.device}); "
            "load the model first"
        )
    tt = exact_value(weight)
    value = other(tt)
    if value.shape == tt.shape:
        return None
    if weight.spectrum in refused:
        raise SpectrumError(
            f"{verb} cannot change the rank under spectrum={weight.spectrum!r}: "
            "switching to spectrum='free' first, as in make_weight(weight.method, "
            "weight.shape, 'free', weight.tt()), makes a weight that can"
        )
    plain = plain_weight(weight)
    check_weight(weight, weight_class(weight.method), plain)
    new = make_weight(
        weight.method,
        value.shape,
        weight.spectrum,
        value,
        weight.bound,
        project=True,
        dtype=weight.dtype,
        device=weight.device,
    )
    mark_like(weight.parameters(), new.parameters())
    carry_over(weight, new, plain)
    return new.requires_grad_(weight.trainable)


def _chain(tt: SpectralTT) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Cores of both sides on the modes of the plan, outermost first, all like left ones."""
    plan = tt.shape
    left = regroup_cores(tt.left, plan.out_modes)
    right, modes = [], list(plan.in_modes)
    for core in tt.right:
        group: list[int] = []
        while math.prod(group) < core.shape[1]:
            group.append(modes.pop(0))
        if len(group) > 1:  # the index of a merged mode runs the other way as well
            order = (0, *range(len(group), 0, -1), len(group) + 1)
            core = core.unflatten(1, group).permute(order).flatten(1, -2)
        right.append(core)
    return left, regroup_cores(mirror(right), plan.in_modes[::-1])


# -- lower ---------------------------------------------------------------------------------------


def unfolding_values(tt: SpectralTT) -> list[Tensor]:
    """Singular values of ``W`` at every inner bond, in the order of the chain."""
    left, right = _chain(tt)
    outer_left = _values_outwards(left, tt.bond)
    outer_right = _values_outwards(right, tt.bond.mT)
    return [*reversed(outer_left), torch.linalg.svdvals(tt.bond), *outer_right]


def _values_outwards(cores: Sequence[Tensor], bond: Tensor) -> list[Tensor]:
    found, rest = [], bond
    for core in reversed(cores[1:]):
        unfolding = (core @ rest).flatten(-2)
        rest = torch.linalg.qr(unfolding.mT).R.mT
        found.append(torch.linalg.svdvals(rest))
    return found


def _keeping(tt: SpectralTT, energy: float, eps: float) -> SpectralTT:
    """The truncation that keeps a part of the energy, of low ranks."""
    plan, values = tt.shape, unfolding_values(tt)
    modes = plan.out_modes + plan.in_modes
    whole = float(tt.norm()) ** 2
    # What is rounding in the dtype of the weight is no rank; each bond that is cut rounds anew.
    allowed = whole * max(1 - energy, sum(plan.ranks) * (8 * eps) ** 2)
    share = allowed
    while True:
        wanted = [_needed(v, share) for v in values]
        kept = [min(a, b) for a, b in zip((1, *wanted, 1), plan.ranks, strict=True)]
        lower = truncate(tt, ranks=clip_ranks(modes, kept))
        # How the tails of the bonds add up is not known beforehand.
        if lower.shape == plan or float(lower.distance(tt)) ** 2 <= allowed or share == 0:
            return tt if lower.shape == plan else lower
        share = 0.8 * share if share > allowed * 1e-6 else 0.0


def _needed(values: Tensor, share: float) -> int:
    """The fewest singular values that leave a tail of at most ``share``, squared."""
    tails = values.square().flip(0).cumsum(0).flip(0)
    return max(1, int((tails > share).sum()))


# -- raise ---------------------------------------------------------------------------------------


def _padded(tt: SpectralTT, plan: TTShape, generator: torch.Generator | None) -> SpectralTT:
    """The same weight on a plan of higher ranks."""
    left, right = _chain(tt)
    centre, r = len(plan.out_modes), plan.rank
    sides = (
        _completed(left, plan.ranks[: centre + 1], generator),
        _completed(right, plan.ranks[centre:][::-1], generator),
    )
    more = r - tt.shape.rank
    pad = (0, more, 0, more) if tt.is_full else (0, more)
    spectrum = nn.functional.pad(tt.spectrum, pad)
    return SpectralTT(sides[0], spectrum, mirror(sides[1]), plan)


def _completed(
    cores: Sequence[Tensor], ranks: Sequence[int], generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    """Left cores of higher ranks; the old columns of their product come first."""
    completed = []
    for core, a, b in zip(cores, ranks[:-1], ranks[1:], strict=True):
        old = nn.functional.pad(core, (0, 0, 0, 0, 0, a - core.shape[0])).flatten(0, 1)
        more = torch.randn(old.shape[0], b - old.shape[1], dtype=old.dtype, generator=generator).to(
            old.device
        )
        for _ in range(2):  # once is not enough where little of a column is left
            more = torch.linalg.qr(more - old @ (old.mT @ more)).Q
        completed.append(torch.cat([old, more], -1).unflatten(0, (a, core.shape[1])))
    return tuple(completed)
