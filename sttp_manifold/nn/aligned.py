"""`align_adapters`: frames of updates that point where the loss falls fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn.adapted import Adapted
from sttp_manifold.nn.adapter_places import adapted_of
from sttp_manifold.nn.adapting import zero_at
from sttp_manifold.nn.modules import naming
from sttp_manifold.nn.spectral_update import SpectralUpdate
from sttp_manifold.nn.stack import parts_of
from sttp_manifold.nn.torch_state import has_values, outside_autocast
from sttp_manifold.tt.decompose import tt_svd
from sttp_manifold.tt.precision import computing_dtype

__all__ = ["align_adapters"]


@explained
def align_adapters(
    model: nn.Module, loss: Callable[[], Tensor] | Iterable[Callable[[], Tensor]]
) -> nn.Module:
    r"""Let the active adapters start in the leading singular subspaces of the gradient.

    Frames of an update become those of the TT-SVD of :math:`G = \partial f / \partial W` on its
    plan, while the update stays zero. Of all weights of the plan's ranks the first step along them
    lowers the loss fastest for its length, to first order: for one mode a side it is
    :math:`-U_r \Sigma_r V_r^\top` of the SVD of ``G``. Costs a dense gradient of each adapted
    layer, once.

    Args:
        model: the network, with an active adapter that has not been trained.
        loss: computes the loss of a batch with the network and returns it, a scalar; or several
            such, whose gradients are added up.

    Returns:
        The model.

    Raises:
        ConversionError: no active adapter, one that is not zero any more, or a loss that does not
            depend on an adapted layer.
        ShapeError: a loss that is no scalar, or a gradient that is not finite.

    References:
        Bogachev et al., *LoRA meets Riemannion*, 2025 (arXiv 2507.12142; the locally optimal
        start, there for a nonzero update that is taken from the weight).

    Example:
        >>> from sttp_manifold.nn import adapt
        >>> model = adapt(nn.Sequential(nn.Linear(8, 6)), rank=2)
        >>> x, y = torch.randn(16, 8), torch.randn(16, 6)
        >>> model = align_adapters(model, lambda: nn.functional.mse_loss(model(x), y))
    """
    losses = (loss,) if callable(loss) else tuple(loss)
    for one in losses:
        if not callable(one):
            raise ConversionError(
                "loss is a function without arguments that computes the loss of a batch, as "
                f"lambda: mse_loss(model(x), y); got {type(one).__name__}"
            )
    layers = {at: layer for at, layer in adapted_of(model).items() if any(layer.added())}
    if not layers:
        raise ConversionError(
            "no adapter is active; adapt(model, rank=8) adds one, set_adapter(model, name) "
            "chooses among several"
        )
    for at, layer in layers.items():
        with naming(at):
            _check_zero(layer)
    for (at, layer), gradient in zip(
        layers.items(), _gradients(list(layers.items()), losses), strict=True
    ):
        with naming(at):
            for update in layer.added():
                _align(update, layer.view.split(gradient).flatten(2))
    return model


def _check_zero(layer: Adapted) -> None:
    for update in layer.added():
        for weight in parts_of(update.weight):
            if not has_values(*weight._tensors()) or bool((weight.bond() != 0).any()):
                raise ConversionError(
                    "its update is not zero, or holds no numbers; align adapters once, before "
                    "they are trained"
                )


def _gradients(
    layers: list[tuple[str, Adapted]], losses: Iterable[Callable[[], Tensor]]
) -> list[Tensor]:
    """Gradients of a sum of losses in the dense weights of layers."""
    sums: list[Tensor | None] = [None] * len(layers)
    probes = []
    try:
        for _, layer in layers:
            dtype, device = layer.place
            probes.append(
                torch.zeros(layer.view.shape, dtype=dtype, device=device).requires_grad_()
            )
            layer.probe = probes[-1]
        for loss in losses:
            with torch.enable_grad():
                value = _checked(loss())
            for i, gradient in enumerate(torch.autograd.grad(value, probes, allow_unused=True)):
                if gradient is not None:
                    wide = gradient.to(computing_dtype(gradient.dtype))
                    before = sums[i]
                    sums[i] = wide if before is None else before + wide
    finally:
        for _, layer in layers:
            layer.probe = None
    unused = [at for (at, _), gradient in zip(layers, sums, strict=True) if gradient is None]
    if unused:
        raise ConversionError(
            f"the loss does not depend on {', '.join(map(repr, unused))}; give one that uses every "
            "adapted layer, or adapt without them (targets=[...])"
        )
    return [gradient for gradient in sums if gradient is not None]


def _checked(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim:
        raise ShapeError(
            f"loss gives a scalar tensor, got {type(value).__name__} "
            f"{tuple(getattr(value, 'shape', ()))}; take its mean()"
        )
    if not value.requires_grad:
        raise ConversionError("the loss does not depend on any adapted layer")
    return value


@torch.no_grad()
def _align(update: SpectralUpdate, gradients: Tensor) -> None:
    for weight, gradient in zip(parts_of(update.weight), gradients, strict=True):
        wide = gradient.to(computing_dtype(weight.dtype))
        # Frames do not depend on the length of a gradient, and sums of squares may overflow.
        longest = wide.abs().amax()
        with outside_autocast(gradient.device):
            value = tt_svd(wide / torch.where(longest > 0, longest, 1.0), weight.shape)
        weight.encode_(zero_at(value))
