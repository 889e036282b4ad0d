"""Conversion of whole networks: `compress`, `decompress`, `switch`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.conv import SpectralConv2d
from sttp_manifold.nn.counts import count_elements, largest_rank
from sttp_manifold.nn.layer import SpectralLayer, check_stock
from sttp_manifold.nn.linear import SpectralLinear
from sttp_manifold.nn.methods import make_weight, weight_class
from sttp_manifold.nn.modules import Owners, carry_over, naming, replace, show
from sttp_manifold.nn.scope import together as compute_together
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.shape import TTShape, check_spectrum

__all__ = ["SkippedLayerWarning", "compress", "decompress", "switch"]

Stock = nn.Linear | nn.Conv2d


class SkippedLayerWarning(UserWarning):
    """Layers that `compress` left as they were, with the reason for each."""


@dataclass(frozen=True)
class _Group:
    """Layers that share one weight; mostly one layer."""

    names: tuple[str, ...]
    layers: tuple[Stock, ...]

    @property
    def numel(self) -> int:
        return self.layers[0].weight.numel()

    def shape(self, rank: int, kind: str, kernel: str) -> TTShape:
        return TTShape.for_conv(tuple(self.layers[0].weight.shape), rank, kernel, kind)

    def __str__(self) -> str:
        return " and ".join(map(show, self.names))


def compress(
    model: nn.Module,
    rank: int | None = None,
    *,
    budget: float | None = None,
    kind: str = "sttp",
    method: str = "householder",
    spectrum: str = "free",
    init: str = "pretrained",
    skip: Iterable[str] = (),
    kernel: str = "flat",
    bound: float = 1.0,
    project: bool = False,
    grow: str = "skip",
    together: bool = True,
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
        kind: ``"sttp"`` or ``"svdp"``.
        method: ``"householder"`` (any optimizer) or ``"riemannian"`` (a Riemannian one).
        spectrum: one of ``identity``, ``free``, ``normalized``, ``bounded``, ``full``.
        init: ``"pretrained"`` takes the weights by TT-SVD; ``"eye"``, ``"noisy_eye"`` and
            ``"random"`` start anew.
        skip: qualified names of layers to leave, or of modules whose layers to leave.
        kernel: ``"flat"`` or ``"factored"``, for the modes of convolution kernels.
        bound: bound of the spectrum ``"bounded"``.
        project: take the nearest weights that the spectrum can hold, instead of raising.
        grow: ``"skip"`` leaves layers that would store more than their dense weight, with a
            warning; ``"allow"`` converts them.
        together: whether a forward of this model computes all spectral weights in it together,
            which is faster and gives the same; see :func:`together` to change it later.

    Returns:
        The model; the new layer if the model itself is a layer.

    Raises:
        ConversionError: neither or both of ``rank`` and ``budget``, a budget out of reach,
            nothing to compress, an unknown name in ``skip``, an unknown option, a layer that has
            no weight yet or computes it from other parameters.
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
    weight, spectrum = weight_class(method), check_spectrum(spectrum)
    layers = _layers(model, (skip,) if isinstance(skip, str) else tuple(skip))
    groups, left = _groups(model, layers)
    if not groups:
        raise _nothing(left)

    def stored(group: _Group, at: int) -> int:
        return weight.count(group.shape(at, kind, kernel), spectrum)

    @cache
    def kept(group: _Group, at: int) -> int:
        if grow == "skip" and stored(group, at) > group.numel:
            return group.numel
        return group.shape(at, kind, kernel).num_parameters(spectrum)

    if rank is None:
        assert budget is not None
        dense = count_elements(model)
        outside = dense - sum(group.numel for group in groups)
        limits = {group: max(group.shape(group.numel, kind, kernel).ranks) for group in groups}
        rank = largest_rank(
            lambda at: outside + sum(kept(g, min(at, limits[g])) for g in groups),
            max(limits.values()),
            dense,
            budget,
            # More rank is more dimensions, but not under orthogonality nor beyond skipped layers.
            monotone=spectrum != "identity" and method == "householder",
        )
    growing = {g: stored(g, rank) for g in groups if grow == "skip" and stored(g, rank) > g.numel}
    left += [
        f"{group} would grow from {group.numel} to {size} stored numbers at rank {rank}"
        for group, size in growing.items()
    ]
    how = {"kind": kind, "method": method, "spectrum": spectrum, "init": init, "bound": bound}
    new: dict[nn.Module, nn.Module] = {}
    for group in groups:
        if group not in growing:
            new |= _converted(group, rank, kernel, project, how)
    if not new:
        raise _nothing(left)
    if left:
        warnings.warn(
            f"left as they are: {'; '.join(left)}"
            + (". A lower rank shrinks them, grow='allow' converts them anyway" if growing else ""),
            SkippedLayerWarning,
            stacklevel=2,
        )
    converted = replace(model, new)
    if together and converted is model:
        compute_together(model)
    return converted


def _nothing(left: list[str]) -> ConversionError:
    reasons = "; ".join(left) or "no nn.Linear or nn.Conv2d is left"
    return ConversionError(f"nothing to compress: {reasons}")


def _converted(
    group: _Group, rank: int, kernel: str, project: bool, how: dict[str, Any]
) -> dict[nn.Module, nn.Module]:
    """A spectral layer for each layer of a group, all with one weight."""
    new: dict[nn.Module, nn.Module] = {}
    weight = None
    for name, layer in zip(group.names, group.layers, strict=True):
        with naming(name):
            made: SpectralLayer
            if isinstance(layer, nn.Conv2d):
                made = SpectralConv2d.from_layer(
                    layer, rank, kernel=kernel, project=project, weight=weight, **how
                )
            else:
                made = SpectralLinear.from_layer(layer, rank, project=project, weight=weight, **how)
        weight = made.spectral_weight
        new[layer] = carry_over(layer, made)
    return new


def _layers(model: nn.Module, skip: tuple[str, ...]) -> dict[Stock, str]:
    """Stock layers that are not skipped, with their first names."""
    names = dict(model.named_modules(remove_duplicate=False))
    kinds = (nn.Linear, nn.Conv2d)
    unknown = [name for name in skip if name not in names]
    if unknown:
        there = [name for name, m in names.items() if isinstance(m, (*kinds, SpectralLayer))]
        raise ConversionError(
            f"skip names {', '.join(map(repr, unknown))}, which this network does not have; its "
            f"layers are {', '.join(map(repr, there)) or 'none'}",
            layer=str(unknown[0]),
        )
    skipped = {module for name in skip for module in names[name].modules()}
    layers: dict[Stock, str] = {}
    for name, module in model.named_modules():
        if module in skipped:
            continue
        kind = parametrize.type_before_parametrizations(module)
        if kind in (*kinds, nn.LazyLinear, nn.LazyConv2d):
            with naming(name):
                check_stock(module, nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d)
            assert isinstance(module, kinds)
            layers[module] = name
    return layers


def _groups(model: nn.Module, layers: dict[Stock, str]) -> tuple[list[_Group], list[str]]:
    """Layers by the weight that they share, and why others cannot be compressed."""
    owners, groups, left = Owners(model), [], []
    seen: set[nn.Module] = set()
    for layer in layers:
        if layer in seen:
            continue
        holders = owners.of(layer.weight)
        tied = [m for m, name in holders if m in layers and name == "weight"]
        others = [o for o in holders if o[0] not in tied or o[1] != "weight"]
        others += owners.aliases(layer.weight)
        members = tuple(m for m in layers if m in tied)
        seen.update(members)
        group = _Group(tuple(layers[m] for m in members), members)
        if others:
            names = ", ".join(repr(owners.name(owner)) for owner in others)
            left.append(f"{group} shares its weight with {names}, which is not compressed")
        else:
            groups.append(group)
    return groups, left


def decompress(model: nn.Module) -> nn.Module:
    """Stock layers in place of spectral ones, with the same outputs to rounding.

    The inverse of :func:`compress`, in place: dtype, device, training mode, hooks, biases (the
    same objects), frozen weights, modules used twice and tied weights are kept. A network
    without spectral layers stays as it is. Optimizers have to be built after this call.

    Returns:
        The model; the new layer if the model itself is a layer.

    Raises:
        ConversionError: a weight whose sharing stock layers cannot express.

    Example:
        >>> model = compress(nn.Sequential(nn.Linear(64, 32)), rank=4)
        >>> decompress(model)
        Sequential(
          (0): Linear(in_features=64, out_features=32, bias=True)
        )
    """
    new: dict[nn.Module, nn.Module] = {}
    shared: dict[SpectralWeight, tuple[str, tuple[int, ...], Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SpectralLayer):
            layer, shape = module.to_layer(), module.weight_shape
            first, other, weight = shared.setdefault(
                module.spectral_weight, (name, shape, layer.weight)
            )
            if other != shape:
                raise ConversionError(
                    f"{show(name)} and {show(first)} share a weight that stock layers would hold "
                    f"in two shapes, {shape} and {other}; give one of them a weight of its own",
                    layer=name,
                )
            layer.weight = weight
            new[module] = carry_over(module, layer)
    for name, module in model.named_modules():
        if module in new:
            continue
        for child in module._modules.values():
            if isinstance(child, SpectralWeight) and child in shared:
                raise ConversionError(
                    f"{show(name)} shares the weight of {show(shared[child][0])} and is no layer "
                    "of this package; give it a weight of its own",
                    layer=name,
                )
    for module in model.modules():
        compute_together(module, False)
    return replace(model, new)


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
        ConversionError: an unknown method, or a network without spectral weights.

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
                new[weight] = carry_over(weight, _switched(weight, method))
    return replace(model, new)


@torch.no_grad()
def _switched(weight: SpectralWeight, method: str) -> SpectralWeight:
    # In float64: near its bound, float32 would round a spectrum onto it.
    value = copy.deepcopy(weight).double().tt()
    new = make_weight(
        method,
        weight.shape,
        weight.spectrum,
        value,
        weight.bound,
        dtype=weight.dtype,
        device=weight.device,
    )
    return new.requires_grad_(weight.trainable)
