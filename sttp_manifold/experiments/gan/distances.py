"""Distances between two sets of features, and how far one covers the other.

On features of the Inception network these are FID, KID and improved precision and recall; on those
of another network they are other numbers, and go by their own names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sttp_manifold.errors import ConfigError

__all__ = ["coverage", "frechet_distance", "kernel_distance"]

_NEIGHBOURS = 3
_BLOCK = 2048


def _pair(first: Tensor, second: Tensor, least: int) -> tuple[Tensor, Tensor]:
    for features in (first, second):
        if features.ndim != 2 or len(features) < least or features.shape[1] != first.shape[1]:
            raise ConfigError(
                f"features of shapes {tuple(first.shape)} and {tuple(second.shape)}: expected two "
                f"sets of vectors of one length, {least} or more of each"
            )
    return first.double(), second.double()


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    r"""Squared Fréchet distance of the normal distributions that two sets of features have.

    .. math::
        |m_1 - m_2|^2 + \operatorname{tr}\bigl(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\bigr)

    Computed in float64, by eigenvalues of symmetric matrices only.

    Shape:
        - first: ``(n, d)``
        - second: ``(m, d)``

    Raises:
        ConfigError: other shapes, or fewer than two vectors.

    References:
        Heusel et al., *GANs trained by a two time-scale update rule converge to a local Nash
        equilibrium*, 2017.

    Example:
        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> abs(frechet_distance(x, x + 1) - 3) < 1e-9  # moved by one in each of three directions
        True
    """
    a, b = _pair(first, second, 2)
    c1, c2 = _covariance(a), _covariance(b)
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(first: Tensor, second: Tensor) -> float:
    r"""Squared maximum mean discrepancy under the kernel :math:`(x^T y / d + 1)^3`.

    The unbiased estimate over both whole sets, which may fall below zero.

    Shape:
        - first: ``(n, d)``
        - second: ``(m, d)``

    Raises:
        ConfigError: other shapes, or fewer than two vectors.

    References:
        Binkowski et al., *Demystifying MMD GANs*, 2018.
    """
    a, b = _pair(first, second, 2)

    def total(x: Tensor, y: Tensor) -> Tensor:
        # A product of three is many times faster than a power.
        parts = [block @ y.T / x.shape[1] + 1 for block in x.split(_BLOCK)]
        return torch.stack([(part * part * part).sum() for part in parts]).sum()

    def within(x: Tensor) -> Tensor:
        own = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
        return (total(x, x) - own) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


def coverage(real: Tensor, generated: Tensor, neighbours: int = _NEIGHBOURS) -> tuple[float, float]:
    """Precision and recall: which part of each set lies among the other one.

    A vector lies among a set when it is no farther from one of its vectors than that one's third
    nearest neighbour is.

    Args:
        real: features of real images.
        generated: features of generated ones.
        neighbours: which neighbour is meant.

    Returns:
        Precision, the part of the generated vectors that lies among the real ones; recall, the
        part of the real ones that lies among the generated.

    Shape:
        - real: ``(n, d)``
        - generated: ``(m, d)``

    Raises:
        ConfigError: other shapes, or no more vectors than neighbours.

    References:
        Kynkäänniemi et al., *Improved precision and recall metric for assessing generative
        models*, 2019.
    """
    a, b = _pair(real, generated, neighbours + 1)
    return _inside(b, a, neighbours), _inside(a, b, neighbours)


def _inside(x: Tensor, among: Tensor, neighbours: int) -> float:
    radii = torch.cat(
        [
            # The nearest of all is the vector itself.
            torch.cdist(block, among).topk(neighbours + 1, dim=1, largest=False).values[:, -1]
            for block in among.split(_BLOCK)
        ]
    )
    hits = [(torch.cdist(block, among) <= radii).any(1) for block in x.split(_BLOCK)]
    return float(torch.cat(hits).double().mean())
