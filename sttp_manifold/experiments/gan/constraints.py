"""What keeps the singular values of a dense discriminator: by parametrization, or by a penalty."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sttp_manifold.experiments.models import weights

__all__ = [
    "SpectralRegularization",
    "orthogonal_start",
    "orthogonality_penalty",
    "spectrally_normalized",
    "spectrally_regularized",
]


def spectrally_normalized(model: nn.Module) -> nn.Module:
    """Divide every weight by its largest singular value, in place, by torch's own means.

    References:
        Miyato et al., *Spectral normalization for generative adversarial networks*, 2018.
    """
    for layer in weights(model).values():
        parametrizations.spectral_norm(layer)
    return model


class SpectralRegularization(nn.Module):
    """A weight whose leading singular values are lifted to the largest, which then is divided by.

    The lifting is a constant for the gradient, as in the paper. Each call computes an SVD.

    Args:
        share: part of the singular values that is lifted.

    Shape:
        - weight: ``(d_out, ...)``
        - output: as the weight

    References:
        Liu et al., *Spectral regularization for combating mode collapse in GANs*, 2019.
    """

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with.

        Shape:
            - weight: ``(d_out, ...)``
            - output: as the weight
        """
        matrix = weight.flatten(1)
        with torch.no_grad():
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
            lifted = s.clone()
            lifted[: max(1, int(self.share * len(s)))] = s[0]
            added = (u * (lifted - s)) @ vt
        top = u[:, 0] @ matrix @ vt[0]
        return ((matrix + added) / top).view_as(weight)


def spectrally_regularized(model: nn.Module) -> nn.Module:
    """Put :class:`SpectralRegularization` on every weight, in place."""
    for layer in weights(model).values():
        parametrize.register_parametrization(layer, "weight", SpectralRegularization())
    return model


@torch.no_grad()
def orthogonal_start(model: nn.Module) -> nn.Module:
    """Draw every weight, as a matrix, with all singular values one, in place."""
    for layer in weights(model).values():
        weight = layer.get_parameter("weight")
        matrix = torch.empty_like(weight.flatten(1))
        nn.init.orthogonal_(matrix)
        weight.copy_(matrix.view_as(weight))
    return model


def orthogonality_penalty(model: nn.Module) -> Tensor:
    r"""Sum over weights of :math:`|W W^T - I|^2`, on the smaller side of each.

    Shape:
        - output: a scalar

    References:
        Brock et al., *Neural photo editing with introspective adversarial networks*, 2017.
    """
    parts = []
    for layer in weights(model).values():
        matrix = layer.get_parameter("weight").flatten(1)
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        parts.append((gram - one).square().sum())
    return torch.stack(parts).sum()
