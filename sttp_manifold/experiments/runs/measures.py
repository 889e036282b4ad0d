"""What is recorded of a network while it trains: its weights, spectra, drift and counts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sttp_manifold.experiments.models import weights
from sttp_manifold.experiments.runs.trace import MAX_SINGULAR_VALUES
from sttp_manifold.nn import SpectralWeight
from sttp_manifold.nn.counts import count_elements

__all__ = ["counts", "drift", "matrices", "spectra"]

# Of all layers and epochs together, in a record: a network of thirty layers has fewer of each.
_MOST_VALUES = 40_000
_LEAST_OF_A_LAYER = 4


def _held(model: nn.Module) -> dict[str, SpectralWeight]:
    return {
        name.removesuffix(".spectral_weight"): module
        for name, module in model.named_modules()
        if isinstance(module, SpectralWeight)
    }


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Every weight matrix of a model, in order, however it is held.

    Shape:
        - output: each ``(d_out, d_in)``
    """
    held = {name: weight() for name, weight in _held(model).items()}
    for name, layer in weights(model).items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        held[name] = weight.flatten(1)
    return held


def spectra(model: nn.Module, entries: int) -> dict[str, list[float]]:
    """The largest singular values of every weight.

    Args:
        model: with weights held in one way.
        entries: how often they are recorded in all: of many, fewer each.
    """
    held = {name: weight.tt().singular_values() for name, weight in _held(model).items()}
    found = held or {
        name: torch.linalg.svdvals(matrix.double()) for name, matrix in matrices(model).items()
    }
    share = _MOST_VALUES // max(1, len(found) * entries)
    most = min(MAX_SINGULAR_VALUES, max(_LEAST_OF_A_LAYER, share))
    return {name: s[:most].tolist() for name, s in found.items()}


def drift(model: nn.Module) -> float | None:
    """Largest ``|Q^T Q - I|`` over the frames of all layers; None where there are none."""
    errors = [
        float(weight.tt().to(dtype=torch.float64).orthonormality_error())
        for weight in _held(model).values()
    ]
    return max(errors) if errors else None


def counts(model: nn.Module, dense: int) -> dict[str, int]:
    """Numbers of a network, as records have them.

    Args:
        model: with weights held in one way.
        dense: elements of the same weights when dense.
    """
    held = _held(model)
    total = sum(p.numel() for p in model.parameters())
    stored = dimension = dense
    if held:
        stored = sum(p.numel() for weight in held.values() for p in weight.parameters())
        dimension = sum(weight.shape.dim(weight.spectrum) for weight in held.values())
    return {
        "stored_parameters": stored,
        "dimension": dimension,
        "dense_elements": dense,
        "other_parameters": total - stored,
        "running_statistics": count_elements(model) - total,
    }
