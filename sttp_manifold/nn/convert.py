"""Conversion of whole networks: `compress`, `decompress`, `switch`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Container, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn.carry import carry_over, check_weight, mark_like
from sttp_manifold.nn.counts import count_elements, largest_rank
from sttp_manifold.nn.held import HeldWeight, let_go
from sttp_manifold.nn.layer import (
    SpectralLayer,
    check_replaceable,
    dense_parameter,
    held_of,
    views_of,
    weights_of,
)
from sttp_manifold.nn.methods import make_weight, plain_weight, weight_class
from sttp_manifold.nn.modules import naming, replace
from sttp_manifold.nn.recipe import PRETRAINED, KernelOptions, Recipe, takes
from sttp_manifold.nn.sharing import check_sharing
from sttp_manifold.nn.stock import TABLE, Group, groups_of, put_in_place, stock_layers
from sttp_manifold.nn.together import together as compute_together
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.nn.weight import SpectralWeight, nearest_frames
from sttp_manifold.optim.successors import succeed
from sttp_manifold.spectrum import CONSTANT
from sttp_manifold.tt.precision import computing_dtype
from sttp_manifold.tt.spectral import SpectralTT

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SkippedLayerWarning", "compress", "decompress", "switch"]


class SkippedLayerWarning(UserWarning):
    """Layers that `compress` left as they were, with the reason for each."""


@explained
@takes(KernelOptions, init=PRETRAINED)
def compress(
    model: nn.Module,
    rank: int | None = None,
    *,
    budget: float | None = None,
    skip: Iterable[str] = (),
    grow: str = "skip",
    together: bool = True,
    **options: Unpack[KernelOptions],
) -> nn.Module:
    """Hold the weights of all linear and convolution layers of a network in spectral form.

    Every ``nn.Linear`` and ``nn.Conv2d`` becomes a spectral layer, in place; subclasses of them
    and layers that are spectral already stay. Dtype, device, training mode, hooks, biases (the
    same objects), frozen weights, modules used twice and tied weights are kept. If any layer
    fails, nothing has changed. Optimizers have to be built after this call.

    Args:
        model: the network; a single layer is accepted.
        rank: one rank for all bonds of all layers, lowered where a bond cannot carry it; or
        budget: the largest such rank at which the network keeps at most this fraction of its
            elements, as the published ratio ``Z / 100`` counts them: the dimension of the
            weights, and in full what is not compressed (biases, norms with their running
            statistics, skipped layers).
        skip: qualified names of layers to leave, or of modules whose layers to leave.
        grow: ``"skip"`` leaves layers that would store more than their dense weight, with a
            warning; ``"allow"`` converts them.
        together: whether a forward of this model computes all spectral weights in it together,
            which is faster and gives the same; see :func:`together` to change it later.
        **options: those of a weight (:class:`Recipe`): ``kind``, ``kernel``, ``method``,
            ``spectrum``, ``init``, ``bound``, ``init_std``, ``project``, ``values``. By default
            ``init="pretrained"`` takes the weights by TT-SVD; with ``spectrum="fixed"`` each then
            keeps its own singular values.

    Returns:
        The model; the new layer if the model itself is a layer.

    Raises:
        ConversionError: neither or both of ``rank`` and ``budget``, a budget out of reach,
            nothing to compress, an unknown name in ``skip``, an unknown option, a layer that has
            no weight yet, or computes it from other parameters, or has something on it that cannot
            be carried over, such as a ``forward`` of its own.
        SpectrumError: a pretrained weight that the spectrum cannot hold, unless ``project``.
        ShapeError: a bad rank, or a weight with entries that are not finite.

    Warns:
        SkippedLayerWarning: once, listing the layers that would grow or whose weight is tied to
            something that cannot be compressed.

    References:
        [STTP] Sec. 3; Z as in its tables.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> model = compress(model, rank=4, skip=["2"])
        >>> model[0]
        SpectralLinear(
          in_features=64, out_features=32, bias=True, rank=4, method='householder', spectrum='free'
          (spectral_weight): HouseholderWeight(...)
        )
    """
    if (rank is None) == (budget is None):
        raise ConversionError(
            f"give either rank=16 or budget=0.05; got rank={rank!r} and budget={budget!r}"
        )
    if grow not in ("skip", "allow"):
        raise ConversionError(f"grow must be 'skip' or 'allow', got {grow!r}")
    recipe = Recipe.of("compress", KernelOptions, options, init=PRETRAINED)
    groups, left = groups_of(model, stock_layers(model, skip))
    if not groups:
        raise _nothing(left)
    if rank is None:
        assert budget is not None
        rank = _rank_within(budget, model, groups, recipe, grow)
    recipe = recipe.at(rank)
    growing = {} if grow == "allow" else _growing(groups, recipe)
    left += [
        f"{group} would grow from {group.numel} to {size} stored numbers at rank {rank}"
        for group, size in growing.items()
    ]
    new: dict[nn.Module, nn.Module | dict[str, HeldWeight]] = {}
    for group in groups:
        if group not in growing:
            new |= group.convert(recipe)
    if not new:
        raise _nothing(left)
    if left:
        warnings.warn(
            f"left as they are: {'; '.join(left)}"
            + (". A lower rank shrinks them, grow='allow' converts them anyway" if growing else ""),
            SkippedLayerWarning,
            stacklevel=3,  # past the decorator, to the line that calls compress
        )
    converted = put_in_place(model, new)
    if together and converted is model:
        compute_together(model)
    return converted


def _nothing(left: list[str]) -> ConversionError:
    kinds = " or ".join(f"nn.{row.stock.__name__}" for row in TABLE)
    return ConversionError(f"nothing to compress: {'; '.join(left) or f'no {kinds} is left'}")


def _growing(groups: Iterable[Group], recipe: Recipe) -> dict[Group, int]:
    """Layers that would store more than their dense weights, with what they would store."""
    count = weight_class(recipe.method).count
    sizes = {g: sum(count(plan, recipe.spectrum) for plan in g.plans(recipe)) for g in groups}
    return {group: size for group, size in sizes.items() if size > group.numel}


def _rank_within(
    budget: float, model: nn.Module, groups: list[Group], recipe: Recipe, grow: str
) -> int:
    """The largest rank at which a network keeps to a budget."""
    dense = count_elements(model)
    outside = dense - sum(group.numel for group in groups)
    limits = {g: max(max(p.ranks) for p in g.plans(recipe.at(g.numel))) for g in groups}

    @cache
    def kept(group: Group, rank: int) -> int:
        at = recipe.at(rank)
        if grow == "skip" and _growing([group], at):
            return group.numel
        return sum(plan.num_parameters(recipe.spectrum) for plan in group.plans(at))

    return largest_rank(
        lambda rank: outside + sum(kept(g, min(rank, limits[g])) for g in groups),
        max(limits.values()),
        dense,
        budget,
        # More rank is more dimensions, but not under orthogonality nor beyond skipped layers.
        monotone=recipe.spectrum not in CONSTANT and recipe.method == "householder",
    )


@explained
def decompress(model: nn.Module, form: str = "dense") -> nn.Module:
    """Stock layers in place of spectral ones, with the same outputs to rounding.

    The inverse of :func:`compress`, in place: dtype, device, training mode, hooks, biases (the
    same objects), frozen weights, modules used twice and tied weights are kept. A network
    without spectral layers stays as it is. Optimizers have to be built after this call.

    Args:
        model: the network; a single layer is accepted.
        form: ``"dense"`` gives the stock layers that :func:`compress` takes. ``"factors"`` gives
            two thin ones in an ``nn.Sequential`` wherever that takes fewer multiplications: a
            linear layer for ``V^T`` without bias and one for ``U diag(s)`` with it; for a
            convolution one with the kernel sizes and stride onto ``r`` channels, then a 1 x 1. The
            others are dense: grouped convolutions, layers at ranks that are too high, those with
            submodules on them or a bias that is no parameter, and what shares a weight with them.
            Code that reads ``layer.weight`` of a thin pair finds ``layer[0].weight`` and
            ``layer[1].weight``.

    Returns:
        The model; the new layer if the model itself is a layer.

    Raises:
        ConversionError: an unknown ``form``, a weight whose sharing stock layers cannot express,
            something on a layer that cannot be carried over, or a subclass with a ``forward`` of
            its own.

    Example:
        >>> model = compress(nn.Sequential(nn.Linear(64, 32)), rank=4)
        >>> decompress(model, form="factors")
        Sequential(
          (0): Sequential(
            (0): Linear(in_features=64, out_features=4, bias=False)
            (1): Linear(in_features=4, out_features=32, bias=True)
          )
        )
    """
    if form not in ("dense", "factors"):
        raise ConversionError(f"form must be 'dense' or 'factors', got {form!r}")
    made = {layer: name for name, layer in model.named_modules() if held_of(layer)}
    check_sharing(model, made)
    own = {layer: name for layer, name in made.items() if isinstance(layer, SpectralLayer)}
    thin = _thin(own, made) if form == "factors" else {}
    new: dict[nn.Module, nn.Module] = {}
    behind: dict[nn.Module, dict[str, nn.Parameter]] = {}
    shared: dict[tuple[nn.Module, str], nn.Parameter | None] = {}
    for layer, name in made.items():
        with naming(name):
            if not isinstance(layer, SpectralLayer):
                behind[layer] = _dense_again(layer, shared)
                continue
            stock = thin.get(layer) or layer.dense_layer()
            for key, held in held_of(layer).items():
                holders = [(stock, key, "W")]
                if layer in thin:
                    roles = zip(stock, layer.thin_roles, strict=True)
                    holders = [(part, "weight", role) for part, role in roles]
                for part, at, role in holders:
                    part._parameters[at] = shared.setdefault((held, role), part._parameters[at])
            new[layer] = layer.hand_over(stock)
    converted = replace(model, new)
    for module, parameters in behind.items():
        let_go(module, parameters)
    pairs = set(thin.values())
    for module in converted.modules():
        compute_together(module, False)
        _leave_fast_path(module, pairs)
    return converted


@torch.inference_mode(False)
def _dense_again(
    module: nn.Module, shared: dict[tuple[nn.Module, str], nn.Parameter | None]
) -> dict[str, nn.Parameter]:
    """The dense parameters of a module that has spectral weights behind them."""
    for weight in weights_of(module).values():
        check_replaceable(weight)
    views, found = views_of(module), {}
    for name, held in held_of(module).items():
        if (held, "W") not in shared:
            shared[held, "W"] = dense_parameter(held, views[name])
        parameter = shared[held, "W"]
        assert parameter is not None
        found[name] = parameter
    return found


def _leave_fast_path(module: nn.Module, thin: Container[nn.Module]) -> None:
    """Tell torch's transformers not to read dense weights where there are pairs of thin layers."""
    if isinstance(module, nn.TransformerEncoderLayer):
        if module.linear1 in thin or module.linear2 in thin:
            module.activation_relu_or_gelu = 0
    elif isinstance(module, nn.TransformerEncoder) and any(m in thin for m in module.modules()):
        module.use_nested_tensor = False


def _thin(
    layers: Mapping[SpectralLayer, str], others: Iterable[nn.Module]
) -> dict[SpectralLayer, nn.Sequential]:
    """Two thin layers for each layer; none for those that share a weight with one that stays."""
    found: dict[SpectralLayer, nn.Sequential] = {}
    for layer, name in layers.items():
        with naming(name):
            two = layer.thin_layers()
        if two is not None:
            found[layer] = two
    dense = {held for m in others if m not in found for held in held_of(m).values()}
    return {k: two for k, two in found.items() if dense.isdisjoint(held_of(k).values())}


@explained
def switch(model: nn.Module, method: str) -> nn.Module:
    """Hold every spectral weight of a network by another method, without loss, in place.

    The dense weights stay the same to rounding; weights that are held so already are not touched.
    Parameters are new objects: **build the optimizer anew** after this call, a Riemannian one for
    ``"riemannian"``.

    Args:
        model: the network, a spectral layer, or a spectral weight.
        method: ``"householder"`` or ``"riemannian"``.

    Returns:
        The model; the new weight if the model itself is one.

    Raises:
        ConversionError: an unknown method, a network without spectral weights, or something on a
            weight that cannot be carried over.
        ShapeError: parameters that are not finite.

    Example:
        >>> model = compress(nn.Sequential(nn.Linear(64, 32)), rank=4)
        >>> switch(model, "riemannian")[0].spectral_weight.method
        'riemannian'
    """
    weight_class(method)
    weights = {m: name for name, m in model.named_modules() if isinstance(m, SpectralWeight)}
    if not weights:
        raise ConversionError(
            "nothing to switch: the network has no spectral weights; "
            f"compress(model, rank=16, method={method!r}) makes them"
        )
    new: dict[nn.Module, nn.Module] = {}
    for weight, name in weights.items():
        if weight.method != method:
            with naming(name):
                new[weight] = _switched(weight, method)
    changed = replace(model, new)
    for before, after in new.items():
        succeed(before.parameters(), after.parameters())
    return changed


@torch.no_grad()
def _switched(weight: SpectralWeight, method: str) -> SpectralWeight:
    plain = plain_weight(weight)
    check_weight(weight, weight_class(weight.method), plain)
    has = has_values(*weight.parameters(), *weight.buffers())
    new = make_weight(
        method,
        weight.shape,
        weight.spectrum,
        exact_value(weight) if has else "eye",
        weight.bound,
        values=None if has else weight.map.values,
        dtype=weight.dtype,
        device=weight.device,
    )
    mark_like(weight.parameters(), new.parameters())
    carry_over(weight, new, plain)
    return new.requires_grad_(weight.trainable)


def exact_value(weight: SpectralWeight) -> SpectralTT:
    """What a weight holds, with orthonormal frames, in float64.

    In float32 a spectrum near its bound would be rounded onto it.
    """
    broken = [name for name, p in weight.named_parameters() if not p.isfinite().all()]
    if broken:
        raise ShapeError(f"{', '.join(broken)} has entries that are not finite")
    value = copy.deepcopy(weight).double().tt()
    is_half = computing_dtype(weight.dtype) != weight.dtype
    return nearest_frames(value) if is_half else value
