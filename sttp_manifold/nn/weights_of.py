"""Spectral weights of any module: of a layer of this package, or behind tensors of another one."""

from __future__ import annotations

from torch import nn

from sttp_manifold._arguments import explained
from sttp_manifold.nn.held import held_in
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.stack import MatrixView, WeightStack, named_parts
from sttp_manifold.nn.weight import SpectralWeight

__all__ = ["held_of", "views_of", "weights_of"]


@explained
def held_of(module: nn.Module) -> dict[str, SpectralWeight | WeightStack]:
    """What stands for each parameter that a module holds in spectral form, by the stock names.

    Args:
        module: a layer of this package, or any module with spectral weights behind its tensors
            (:mod:`sttp_manifold.nn.held`); any other has none.
    """
    if isinstance(module, SpectralLayer):
        return module.held
    return {name: held.weight for name, held in held_in(module).items()}


@explained
def views_of(module: nn.Module) -> dict[str, MatrixView]:
    """How each parameter of :func:`held_of` is read as matrices.

    Args:
        module: any module.
    """
    if isinstance(module, SpectralLayer):
        return {name: module.view_of(name) for name in held_of(module)}
    return {name: held.view for name, held in held_in(module).items()}


@explained
def weights_of(module: nn.Module) -> dict[str, SpectralWeight]:
    """Spectral weights of a module, by the names of the stock layer's parameters.

    A parameter that is a stack of them has one name for each, as ``weight.0``.

    Args:
        module: a layer of this package, or any module with spectral weights behind its tensors; any
            other has none.

    Example:
        >>> from sttp_manifold.nn import SpectralLinear
        >>> list(weights_of(SpectralLinear(20, 12, rank=4)))
        ['weight']
    """
    return dict(named_parts(held_of(module)))
