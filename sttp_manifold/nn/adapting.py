r"""Adapters: a frozen network, and spectral updates of its weights that are trained in its place.

:math:`W + \alpha\, U \operatorname{diag}(s) V^\top` with orthonormal chains ``U`` and ``V``, and
``s = 0`` at the start (docs/decisions/0012-adapters.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError, SpectrumError
from sttp_manifold.nn.adapted import Adapted
from sttp_manifold.nn.adapted_layer import AdaptedLayer
from sttp_manifold.nn.adapted_tensor import adapt_tensors
from sttp_manifold.nn.adapter_places import Place, adapted_of
from sttp_manifold.nn.adapter_switches import set_adapter
from sttp_manifold.nn.initial import INITS
from sttp_manifold.nn.left import warn_of_left
from sttp_manifold.nn.modules import naming, replace
from sttp_manifold.nn.recipe import KernelOptions, Recipe, takes
from sttp_manifold.nn.spectral_update import SpectralUpdate
from sttp_manifold.nn.stack import MatrixView, WeightStack, parts_of
from sttp_manifold.nn.targets import Targets, places_meant
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
    "attach",
    "check_name",
    "check_options",
    "set_to_zero",
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
    :math:`\alpha\, U \operatorname{diag}(s) V^\top` to the weight. A module that computes with its
    matrices itself (attention, recurrent layers, bilinear forms, stacks of experts) stays, and
    reads sums of each of them and an update (:class:`AdaptedTensor`). The update is zero at the
    start, so that the network computes what it did. All parameters are frozen but those of the
    update; what is to be trained as well, such as a new head, is set so afterwards by
    ``requires_grad_()``.
    Called again with another name, it adds a second adapter, which is the active one then, and
    freezes nothing but the first. Optimizers have to be built after this call.

    Args:
        model: the network, dense or compressed; a single layer is accepted.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        targets: the layers, by names (``"encoder.0.query"``), ends of names (``"query"``),
            wildcards (``"*.query"``), classes, or functions of name and module, each with all
            inside; the same for single tensors of modules that stay (``"in_proj_weight"``,
            ``"*.weight_hh_*"``), and for any matrix that a module of yours holds itself. By default
            all layers of the table of ``compress`` but an ``nn.EmbeddingBag`` that takes maxima,
            which is not linear in its weight.
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

    Warns:
        SkippedLayerWarning: once, naming the layers that the default leaves out, and why.

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
    meant, left = places_meant(model, targets)
    updates: dict[Place, SpectralUpdate] = {}
    for place, at in meant.items():
        with naming(at):
            if place.adapted is not None:
                place.adapted.check_new(name)
            updates[place] = zero_update(place, recipe, alpha, dtype)
    warn_of_left(left)
    is_first = not adapted_of(model)
    adapted = attach(model, name, updates, freeze=is_first)
    return compute_together(adapted) if together else adapted


def attach(
    model: nn.Module, name: str, updates: Mapping[Place, SpectralUpdate], *, freeze: bool
) -> nn.Module:
    """Put updates in their places, as the adapter of a name, which is the active one then."""
    held = {m for update in updates.values() for m in update.modules()}
    behind: dict[nn.Module, dict[str, MatrixView]] = {}
    new: dict[nn.Module, nn.Module] = {}
    for place in updates:
        if place.tensor is not None:
            behind.setdefault(place.module, {})[place.tensor] = place.view
        elif place.adapted is None:
            new[place.module] = AdaptedLayer(place.module)
    adapted = replace(model, new)
    for old, wrapper in new.items():  # `replace` puts the wrapper into itself as well
        wrapper._modules["base"] = old
    for module, views in behind.items():
        adapt_tensors(module, views)
    if freeze:
        for module in adapted.modules():
            if module not in held:
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad_(False)
    for place, update in updates.items():
        there = new.get(place.module) if place.tensor is None else None
        there = place.adapted if there is None else there
        assert isinstance(there, Adapted)
        there.add(name, update)
    return set_adapter(adapted, name)


def zero_update(
    place: Place, recipe: Recipe, alpha: float = 1.0, dtype: torch.dtype | None = None
) -> SpectralUpdate:
    """An update for a place that is zero, with the frames that a recipe asks for."""
    own, device = place.where
    held = recipe.make_all(
        place.view,
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
