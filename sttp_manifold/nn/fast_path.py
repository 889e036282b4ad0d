"""Torch's fast paths for transformers in inference, which read the weights of the layers inside.

``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` hand all dense weights to one kernel
when nothing is trained. Layers that apply factors have no dense weight at hand: forming it costs
more than the kernel saves, and thin pairs of layers have none.
"""

from __future__ import annotations

from torch import nn

from sttp_manifold.nn.weights_of import held_of

__all__ = ["FAST", "leave_fast_path", "leave_fast_paths", "take_fast_path"]

# Where the setting of a module waits for its return.
_KEPT = "_fast_path_before"
_SETTINGS: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
FAST = tuple(_SETTINGS)
"""Types of modules that have a fast path."""


def leave_fast_paths(model: nn.Module) -> None:
    """Let all transformers with spectral weights in them call the forwards of their layers."""
    for module in model.modules():
        if isinstance(module, FAST) and any(map(held_of, module.modules())):
            leave_fast_path(module)


def leave_fast_path(module: nn.Module) -> None:
    """Let a module call the forwards of its layers, in inference as well."""
    for kind, (name, off) in _SETTINGS.items():
        is_left = _KEPT in module.__dict__ or not hasattr(module, name)
        if isinstance(module, kind) and not is_left:
            module.__dict__[_KEPT] = getattr(module, name)
            setattr(module, name, off)


def take_fast_path(module: nn.Module) -> None:
    """Let a module do as before."""
    for kind, (name, _) in _SETTINGS.items():
        if isinstance(module, kind) and _KEPT in module.__dict__:
            setattr(module, name, module.__dict__.pop(_KEPT))
