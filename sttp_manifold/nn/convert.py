"""Conversion of whole networks: `compress`, `decompress`, `switch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.adapted_tensor import make_dense
from sttp_manifold.nn.calibration import repeatable
from sttp_manifold.nn.carry import carry_over, check_weight, mark_like
from sttp_manifold.nn.choose import Choice, Ranks, chosen, rank_rule
from sttp_manifold.nn.dense_parameter import check_replaceable, dense_parameter
from sttp_manifold.nn.fast_path import FAST, leave_fast_path, take_fast_path
from sttp_manifold.nn.in_turn import fit_in_turn
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.left import warn_of_left
from sttp_manifold.nn.methods import make_weight, plain_weight, weight_class
from sttp_manifold.nn.modules import naming, replace
from sttp_manifold.nn.recipe import PRETRAINED, KernelOptions, Recipe, takes
from sttp_manifold.nn.selection import (
    find_units,
    left_dense,
    made_of,
    nothing_to_compress,
    ranks_by_rule,
    ranks_within,
    stock_to_fit,
)
from sttp_manifold.nn.sharing import check_sharing
from sttp_manifold.nn.stock import put_in_place
from sttp_manifold.nn.thin import thin_pairs
from sttp_manifold.nn.together import together as compute_together
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.nn.value import exact_value
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.nn.weights_of import held_of, views_of, weights_of
from sttp_manifold.optim.successors import succeed

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["compress", "decompress", "switch"]


@explained
@takes(KernelOptions, init=PRETRAINED)
def compress(
    model: nn.Module,
    rank: Ranks | None = None,
    *,
    budget: float | None = None,
    of: str = "treated",
    allocate: str = "uniform",
    data: Any = None,
    in_turn: bool = False,
    skip: Choice = (),
    only: Choice | None = None,
    grow: str = "skip",
    together: bool = True,
    **options: Unpack[KernelOptions],
) -> nn.Module:
    """Hold the weights of a network in spectral form.

    Every layer of the table (linear, convolutions, and so on: docs/compress.md) becomes a spectral
    one, in place; weights that are spectral already get lower ranks. Dtype, device, training mode,
    hooks, biases (the same objects), frozen weights, modules used twice and tied weights are kept.
    Layers that cannot be converted are left and named in one warning, with whatever else stays
    dense. If anything fails, nothing has changed. Optimizers have to be built after this call.

    Args:
        model: the network; a single layer is accepted.
        rank: one rank for all bonds of all layers, lowered where a bond cannot carry it; or a dict
            of names or wildcards, of which the first that means the layer (or a module around it)
            counts; or a function of name and layer. Layers that get none (no entry, None) are left
            as they are.
        budget: in place of ranks: the fraction of elements to keep at most, counted by the
            dimension of the weights.
        of: of what: ``"treated"``, the dense elements of the layers that are compressed; or
            ``"model"``, all of the network, as the published ratio ``Z / 100`` counts it, with
            what is not compressed in full (biases, norms with running statistics, other layers).
        allocate: how a budget is spread: ``"uniform"`` is the largest common rank, ``"energy"``
            gives most to the weights that lose most (by their singular values), ``"balanced"`` is
            half-way between. Uniform is the better one where much is kept, balanced where little.
        data: a few batches of inputs: a list or a loader of them (a tensor; a mapping of arguments;
            of a tuple the first), or a function that runs the model. Pretrained weights then lose
            as little as can be of their *outputs* on these, instead of themselves
            (:func:`tt_fit`). What an ``attention_mask`` of a mapping leaves out is no input; other
            padding counts, so leave it out of the batches.
        in_turn: fit the weights one after the other on the data, each to the outputs of the dense
            network on what the truncated ones before it give. Much nearer where little is kept, at
            two runs of the data for each input of layers, and a copy of the network.
        skip: what to leave: a qualified name, a wildcard over names, a class, a function of name
            and module, or several of them; each means all layers within.
        only: likewise what alone to compress; by default everything.
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
        ConversionError: neither or both of ``rank`` and ``budget``, a budget out of reach (with the
            largest things in its way), nothing to compress, a name that the network does not have,
            an unknown option, different ranks for layers that share a weight, options that
            contradict a weight that is spectral already, or ``data`` that is none or would not be
            used.
        SpectrumError: a pretrained weight that the spectrum cannot hold, unless ``project``.
        ShapeError: a bad rank, or a weight with entries that are not finite.

    Warns:
        SkippedLayerWarning: once, listing what is left dense and was not to be: layers that would
            grow, whose weight is tied to something that stays, that cannot be converted, or that no
            row of the table is for; and layers whose inputs were not seen in ``data``.

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
        >>> x = torch.randn(100, 64)
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> model = compress(model, budget=0.4, allocate="balanced", data=[x], kind="svdp")
    """
    if (rank is None) == (budget is None):
        raise ConversionError(
            f"give either rank=16 or budget=0.05; got rank={rank!r} and budget={budget!r}"
        )
    if grow not in ("skip", "allow"):
        raise ConversionError(f"grow must be 'skip' or 'allow', got {grow!r}")
    recipe = Recipe.of("compress", KernelOptions, options, init=PRETRAINED)
    meant = set(model.modules()) if only is None else chosen(model, "only", only)
    meant -= chosen(model, "skip", skip)
    data = repeatable(data) if in_turn else data
    found = find_units(model, meant, recipe, grow, data, options)
    if rank is None:
        assert budget is not None
        ranks = ranks_within(budget, of, allocate, model, found.units)
    else:
        if (of, allocate) != ("treated", "uniform"):
            raise ConversionError(
                f"of={of!r} and allocate={allocate!r} say how to spend a budget, as in "
                f"compress(model, budget=0.2, allocate={allocate!r}); got rank={rank!r}"
            )
        ranks = ranks_by_rule(rank_rule(model, rank), found.units)
    if in_turn:
        fit_in_turn(model, stock_to_fit(ranks, data), data)
    new = made_of(ranks, found.left)
    if not new:
        raise nothing_to_compress(found)
    left = found.left + left_dense(model, meant, new, ranks, found.units)
    warn_of_left(left)
    converted = put_in_place(model, new)
    for before, after in new.items():
        if isinstance(before, SpectralWeight) and isinstance(after, SpectralWeight):
            succeed(before.parameters(), after.parameters())
    if together and converted is model:
        compute_together(model)
    return converted


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
            submodules on them or a bias that is no parameter, modules that compute with a tensor
            themselves (attention, recurrent layers), and what shares a weight with any of these.
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
    thin = thin_pairs(own, made) if form == "factors" else {}
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
        make_dense(module, parameters)
    pairs = set(thin.values())
    for module in converted.modules():
        compute_together(module, False)
        take_fast_path(module)
        if isinstance(module, FAST) and any(m in pairs for m in module.modules()):
            leave_fast_path(module)
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
