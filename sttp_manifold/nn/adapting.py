r"""Adapters: a frozen network, and spectral updates of its weights that are trained in its place.

:math:`W + \alpha\, U \operatorname{diag}(s) V^\top` with orthonormal chains ``U`` and ``V``, and
``s = 0`` at the start (docs/decisions/0012-adapters.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError, SpectrumError
from sttp_manifold.nn.adapted_layer import (
    AdaptedLayer,
    SpectralUpdate,
    adapted_layers,
    place_in,
    view_for,
)
from sttp_manifold.nn.initial import INITS
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.modules import Owners, naming, replace, show
from sttp_manifold.nn.recipe import KernelOptions, Recipe, takes
from sttp_manifold.nn.stack import WeightStack, parts_of
from sttp_manifold.nn.stock import row_of
from sttp_manifold.nn.targets import Targets, layers_meant
from sttp_manifold.nn.together import together as compute_together
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.spectrum import CONSTANT
from sttp_manifold.tt.spectral import SpectralTT

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "DEFAULT",
    "adapt",
    "adapters",
    "attach",
    "can_adapt",
    "check_name",
    "check_options",
    "merge",
    "remove_adapter",
    "set_adapter",
    "set_to_zero",
    "unmerge",
    "without_adapters",
    "zero_at",
    "zero_update",
]

DEFAULT = "default"


@explained
@takes(KernelOptions, init="random", spectrum="full")
def adapt(
    model: nn.Module,
    rank: int,
    targets: Targets = None,
    *,
    name: str = DEFAULT,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
    together: bool = True,
    **options: Unpack[KernelOptions],
) -> nn.Module:
    r"""Freeze a network, and put a trainable spectral update beside the weights of its layers.

    Each target layer becomes an :class:`AdaptedLayer`, in place, that adds
    :math:`\alpha\, U \operatorname{diag}(s) V^\top` to the weight. The update is zero at the start,
    so that the network computes what it did. All parameters are frozen but those of the update;
    what is to be trained as well, such as a new head, is set so afterwards by ``requires_grad_()``.
    Called again with another name, it adds a second adapter, which is the active one then, and
    freezes nothing but the first. Optimizers have to be built after this call.

    Args:
        model: the network, dense or compressed; a single layer is accepted.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        targets: the layers, by names (``"encoder.0.query"``), ends of names (``"query"``),
            wildcards (``"*.query"``), classes, or functions of name and module; by default all
            that have an update.
        name: of the adapter.
        alpha: factor in front of the update. The frames are orthonormal, so that its singular
            values are ``alpha * |s|`` at every rank and size.
        dtype: of the update; by default that of the weight, and float32 for one of half precision.
        together: whether a forward of this model computes all updates together; see
            :func:`together`.
        **options: those of a weight (:class:`Recipe`): ``kind``, ``kernel``, ``method``,
            ``spectrum``, ``init`` (of the frames: ``"random"``, ``"eye"``, ``"noisy_eye"``),
            ``bound``, ``init_std``. By default a full bond with frames from the Haar measure.

    Returns:
        The model; the adapted layer if the model itself is a layer.

    Raises:
        ConversionError: a target that means no layer or one without update, a name that is there
            already, ``alpha`` that is no finite number but zero.
        SpectrumError: a spectrum that does not hold zero.
        ShapeError: a bad rank.

    References:
        Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2022 (adapters of low
        rank); [STTP] Sec. 3 (the weights).

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> model = adapt(model, rank=4, targets=["0"])
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.updates.default.weight.coordinates']
    """
    recipe = Recipe.of("adapt", KernelOptions, options, init="random", spectrum="full", rank=rank)
    check_options(name, alpha, recipe)
    bases = {layer.base for layer in adapted_layers(model).values()}
    layers = layers_meant(model, targets, lambda m: can_adapt(m) and m not in bases)
    updates: dict[nn.Module, SpectralUpdate] = {}
    for layer, at in layers.items():
        with naming(at):
            base = layer.base if isinstance(layer, AdaptedLayer) else layer
            if isinstance(layer, AdaptedLayer):
                layer.check_new(name)
            updates[layer] = zero_update(base, recipe, alpha, dtype)
    is_first = not adapted_layers(model)
    adapted = attach(model, name, updates, freeze=is_first)
    return compute_together(adapted) if together else adapted


def attach(
    model: nn.Module, name: str, updates: dict[nn.Module, SpectralUpdate], *, freeze: bool
) -> nn.Module:
    """Put updates beside layers, as the adapter of a name, which is the active one then."""
    held = {m for update in updates.values() for m in update.modules()}
    new: dict[nn.Module, nn.Module] = {}
    for layer in updates:
        if not isinstance(layer, AdaptedLayer):
            new[layer] = AdaptedLayer(layer)
    adapted = replace(model, new)
    for old, wrapper in new.items():  # `replace` puts the wrapper into itself as well
        wrapper._modules["base"] = old
    if freeze:
        for module in adapted.modules():
            if module not in held:
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad_(False)
    for layer, update in updates.items():
        wrapper = new.get(layer, layer)
        assert isinstance(wrapper, AdaptedLayer)
        wrapper.add(name, update)
    return set_adapter(adapted, name)


def can_adapt(module: nn.Module) -> bool:
    """Whether a layer can have updates: it is in the table with one weight, or is spectral."""
    if isinstance(module, AdaptedLayer):
        return True
    if isinstance(module, SpectralLayer):
        return list(module.holds) == ["weight"]
    row = row_of(module)
    return row is not None and row.spectral is not None and list(row.spectral.holds) == ["weight"]


def zero_update(
    base: nn.Module, recipe: Recipe, alpha: float = 1.0, dtype: torch.dtype | None = None
) -> SpectralUpdate:
    """An update for a layer that is zero, with the frames that a recipe asks for."""
    own, device = place_in(base)
    held = recipe.make_all(
        view_for(base),
        dtype=torch.promote_types(own, torch.float32) if dtype is None else dtype,
        device=device,
    )
    set_to_zero(held)
    return SpectralUpdate(held, alpha)


@torch.no_grad()
def set_to_zero(held: SpectralWeight | WeightStack) -> None:
    """Keep the frames of weights, and put zeros in place of their spectra."""
    for weight in parts_of(held):
        if has_values(*weight._tensors()):
            value = weight.tt()
            weight.encode_(zero_at(value))


def zero_at(value: SpectralTT) -> SpectralTT:
    """Zero, by the frames of a value."""
    return SpectralTT(value.left, torch.zeros_like(value.spectrum), value.right, value.shape)


def check_options(name: str, alpha: float, recipe: Recipe) -> None:
    """Raise for what an adapter cannot have.

    Raises:
        ConversionError: a bad name or ``alpha``, or an ``init`` that is none of frames.
        SpectrumError: a spectrum that does not hold zero.
    """
    check_name(name)
    if not 0 < abs(alpha) < float("inf"):
        raise ConversionError(f"alpha is a finite number but zero, as in alpha=1.0; got {alpha!r}")
    if recipe.spectrum in CONSTANT or recipe.spectrum == "normalized":
        raise SpectrumError(
            f"an update starts at zero, which spectrum={recipe.spectrum!r} does not hold; take "
            "'full', 'free', or 'bounded' (singular values below alpha * bound)"
        )
    if recipe.init not in INITS:
        raise ConversionError(
            f"init says where the frames of an update start: {', '.join(map(repr, INITS))}; got "
            f"{recipe.init if isinstance(recipe.init, str) else type(recipe.init).__name__!r}. "
            "align_adapters(model, loss) aligns them with a gradient"
        )


def check_name(name: str) -> None:
    """Raise for what is no name of an adapter.

    Raises:
        ConversionError: such a name.
    """
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ConversionError(
            f"the name of an adapter is a word without dots that nn.ModuleDict has no use for, as "
            f"'default'; got {name!r}"
        )


def _known(model: nn.Module, names: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names of adapters, each checked."""
    there = adapters(model)
    if not there:
        raise ConversionError("the network has no adapters; adapt(model, rank=8) adds one")
    several = (names,) if isinstance(names, str) else tuple(names or ())
    for name in several:
        if name not in there:
            raise ConversionError(
                f"there is no adapter {name!r}; the network has {', '.join(map(repr, there))}"
            )
    return tuple(dict.fromkeys(several))


@explained
def adapters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Adapters of a network by name, each with the names of its layers.

    Args:
        model: any network.
    """
    found: dict[str, list[str]] = {}
    for at, layer in adapted_layers(model).items():
        for name in layer.updates:
            found.setdefault(name, []).append(at)
    return {name: tuple(layers) for name, layers in found.items()}


@explained
def set_adapter(model: nn.Module, names: str | Iterable[str] | None) -> nn.Module:
    """Choose which adapters a network adds: one, several, or none.

    Those that are added are trained, the parameters of the others are frozen.

    Args:
        model: the network.
        names: of the adapters; None or an empty list for none.

    Returns:
        The model.

    Raises:
        ConversionError: an unknown name, or an adapter that is merged and is to be left out.
    """
    chosen = _known(model, names)
    layers = adapted_layers(model)
    for at, layer in layers.items():
        for name in layer.merged:
            if name not in chosen:
                raise ConversionError(
                    f"{name!r} is merged into the weight of {show(at)}; unmerge(model) first"
                )
    for layer in layers.values():
        layer.active = tuple(name for name in chosen if name in layer.updates)
        for name, update in layer.updates.items():
            update.requires_grad_(name in chosen)
    return model


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The network as it was before its adapters, for the time of a block.

    Args:
        model: the network.

    Yields:
        The model.

    Raises:
        ConversionError: no adapters, or some that are merged.

    Example:
        >>> model = adapt(nn.Sequential(nn.Linear(8, 6)), rank=2)
        >>> with without_adapters(model):
        ...     y = model(torch.randn(3, 8))
    """
    _known(model, ())
    layers = adapted_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise ConversionError("adapters are merged into the weights; unmerge(model) first")
    before = {layer: layer.active for layer in layers.values()}
    try:
        for layer in before:
            layer.active = ()
        yield model
    finally:
        for layer, active in before.items():
            layer.active = active


@explained
@torch.no_grad()
def merge(model: nn.Module, names: str | Iterable[str] | None = None) -> nn.Module:
    """Add adapters to the weights of their layers, so that a forward costs what it did before them.

    The sum is computed in float32 at least and rounded to the dtype of the weight once. Updates
    stay where they are and are not added twice; :func:`unmerge` takes back what was added, and
    :func:`remove_adapter` leaves stock layers with the sum. If a layer fails, nothing has changed.

    Args:
        model: the network.
        names: of the adapters; by default those that are active.

    Returns:
        The model.

    Raises:
        ConversionError: an unknown name or no adapter, a weight that is shared with another module
            or is spectral itself, or a sum that is not finite in the dtype of the weight.
    """
    layers, owners = adapted_layers(model), Owners(model)
    chosen = None if names is None else _known(model, names)
    _known(model, ())
    done: list[tuple[AdaptedLayer, str]] = []
    try:
        for at, layer in layers.items():
            with naming(at):
                for name in layer.active if chosen is None else chosen:
                    if name in layer.updates and name not in layer.merged:
                        _check_alone(layer, owners)
                        layer.put(name, layer.fold(name), 1)
                        done.append((layer, name))
    except ConversionError:
        for layer, name in reversed(done):
            layer.put(name, layer.fold(name, -1), -1)
        raise
    for layer in layers.values():  # what is merged acts, whether it was active or not
        layer.active = tuple(dict.fromkeys((*layer.active, *layer.merged)))
    return model


def _check_alone(layer: AdaptedLayer, owners: Owners) -> None:
    weight = layer.base._parameters.get("weight")
    others = [] if weight is None else owners.of(weight)
    others = [owner for owner in others if owner != (layer.base, "weight")]
    if others:
        raise ConversionError(
            f"its weight is shared with {', '.join(map(owners.name, others))}, which would change "
            "as well; give it one of its own first: layer.base.weight = "
            "torch.nn.Parameter(layer.base.weight.detach().clone())"
        )


@explained
@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Take back what :func:`merge` has added, to the rounding of the weights' dtype.

    Args:
        model: the network.

    Returns:
        The model.

    Raises:
        ConversionError: no adapters.
    """
    _known(model, ())
    for at, layer in adapted_layers(model).items():
        with naming(at):
            for name in reversed(layer.merged):
                layer.put(name, layer.fold(name, -1), -1)
    return model


@explained
def remove_adapter(model: nn.Module, names: str | Iterable[str] | None = None) -> nn.Module:
    """Take adapters away; a layer without any is the layer again that it was before.

    What is merged stays in the weights. Parameters that were frozen stay so.

    Args:
        model: the network.
        names: of the adapters; by default all.

    Returns:
        The model; the layer if the model itself is an adapted one.

    Raises:
        ConversionError: an unknown name or no adapters.
    """
    chosen = _known(model, tuple(adapters(model)) if names is None else names)
    new: dict[nn.Module, nn.Module] = {}
    for layer in adapted_layers(model).values():
        for name in chosen:
            if name in layer.updates:
                layer.drop(name)
        if not layer.updates:
            new[layer] = layer.base
    plain = replace(model, new)
    if not any(isinstance(module, SpectralWeight) for module in plain.modules()):
        compute_together(plain, False)
    return plain
