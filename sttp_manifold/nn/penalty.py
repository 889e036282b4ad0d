"""`spectral_penalty`: a penalty on the singular values of a whole network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import SpectrumError
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.spectrum import PENALTIES
from sttp_manifold.tt.precision import widened

__all__ = ["spectral_penalty"]


@explained
def spectral_penalty(model: nn.Module, name: str) -> Tensor:
    r"""Mean penalty of all singular values of a network, :math:`\sum r_l p_l / \sum r_l`.

    The penalties :math:`p_l` are means over the singular values of a weight
    (:mod:`sttp_manifold.spectrum`), so that each singular value of the network weighs the same,
    and the scale does not change with the number or size of layers. A shared weight counts once.
    No frame is computed; a full bond costs its SVD. Half precision is computed in float32.

    Args:
        model: a network, layer or weight.
        name: ``"d_optimal"`` or ``"divergence"``.

    Shape:
        - output: a scalar, differentiable, in float32 for half precision

    Raises:
        SpectrumError: an unknown name, or a network without spectral weights.

    References:
        Jiang et al., *On Computation and Generalization of GANs under Spectrum Control*, 2019;
        [STTP] Sec. 3.4.

    Example:
        >>> from sttp_manifold.nn import SpectralLinear
        >>> penalty = spectral_penalty(SpectralLinear(20, 12, rank=4), "d_optimal")
        >>> bool(penalty < 1e-6)  # all singular values are one
        True
    """
    if name not in PENALTIES:
        raise SpectrumError(
            f"unknown penalty {name!r}; expected one of {', '.join(map(repr, PENALTIES))}"
        )
    weights = [module for module in model.modules() if isinstance(module, SpectralWeight)]
    if not weights:
        raise SpectrumError(
            "the network has no spectral weights to penalize; compress(model, rank=16) makes them"
        )
    parts = []
    for weight in weights:
        bond = weight.bond()
        s = torch.linalg.svdvals(widened(bond)) if bond.ndim == 2 else bond
        parts.append(weight.shape.rank * PENALTIES[name](s))
    total = torch.stack([part.to(parts[0]) for part in parts]).sum()
    return total / sum(weight.shape.rank for weight in weights)
