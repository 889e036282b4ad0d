"""Norms of gradients in the metric of their manifolds: clipping, and the scale of their noise."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sttp_manifold._arguments import explained
from sttp_manifold.errors import OptimizerError
from sttp_manifold.manifolds.geometry import geometry_of, plain
from sttp_manifold.optim._blocks import full_precision, is_riemannian
from sttp_manifold.optim._settings import SettingError

__all__ = ["NonFiniteNormError", "clip_grad_norm_", "gradient_noise_scale"]


class NonFiniteNormError(OptimizerError, RuntimeError):
    """The norm of gradients is not finite. Also a ``RuntimeError``, which torch raises here."""


@explained
@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale gradients down, in place, so that their norm is at most ``max_norm``.

    For plain parameters it is :func:`torch.nn.utils.clip_grad_norm_`. A parameter on a manifold
    counts with the length of its Riemannian gradient in the metric there. The Euclidean gradient
    that ``.grad`` holds is longer, for frames by the part normal to the manifold, which no step
    sees and which would have the rest clipped for nothing. On an accelerator nothing is waited for,
    unless ``error_if_nonfinite``.

    Args:
        parameters: one parameter, or any number of them; those without a gradient do not count.
        max_norm: the largest norm that stays.
        norm_type: order of the norm; of manifold parameters there is 2 only.
        error_if_nonfinite: raise where the norm is not finite, instead of scaling by it.
        foreach: as in torch.

    Returns:
        The norm before, without dimensions. Squares of gradients on manifolds do not overflow.

    Shape:
        - parameters: any
        - Output: ``()``

    Raises:
        OptimizerError: ``max_norm`` is negative or not a number, or ``norm_type`` is not 2 with
            manifold parameters (these also a ``ValueError``); or a norm that is not finite, if
            asked for (also a ``RuntimeError``).

    Example:
        >>> import sttp_manifold as sm
        >>> M = sm.SpectralTTManifold(sm.TTShape.for_matrix(12, 10, rank=3))
        >>> x = M.random_parameter()
        >>> M.unpack(x).to_matrix().square().sum().backward()
        >>> norm = clip_grad_norm_([x], 1.0)
        >>> bool(M.egrad2rgrad(x, x.grad).norm() <= 1)
        True
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not (max_norm >= 0 and norm_type > 0):
        raise SettingError(
            f"clip_grad_norm_ got max_norm={max_norm!r}, norm_type={norm_type!r}; it takes a "
            f"number >= 0 and an order > 0, as in clip_grad_norm_(model.parameters(), 1.0)"
        )
    params = [p for p in params if p.grad is not None]
    curved = [p for p in params if is_riemannian(p)]
    flat = [p.grad for p in params if not is_riemannian(p)]
    total = get_total_norm(flat, norm_type, False, foreach)  # type: ignore[arg-type]
    if curved:
        if norm_type != 2:
            raise SettingError(
                f"clip_grad_norm_ got norm_type={norm_type!r} with parameters on a manifold, whose "
                f"metric has the norm of order 2 only; call clip_grad_norm_(parameters, "
                f"{max_norm!r}), or clip the plain parameters by themselves"
            )
        norms = [_length(p, p.grad) for p in curved]  # type: ignore[arg-type]
        if flat:
            norms.append(total.to(norms[0]))
        total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        total = total.to(torch.promote_types(curved[0].dtype, torch.float32))
    if error_if_nonfinite and not bool(total.isfinite()):
        raise NonFiniteNormError(
            f"the norm of the gradients is {float(total)}, so they cannot be clipped; look for the "
            f"parameter whose gradient is not finite, or call clip_grad_norm_(parameters, "
            f"{max_norm!r}) to scale by it all the same"
        )
    clip_grads_with_norm_(params, max_norm, total, foreach)
    return total


def _gradient(p: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The point and its Riemannian gradient, not in half precision."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    x, grad = plain(p).to(dtype), plain(grad).to(dtype)
    return x, geometry_of(p.manifold).gradient(x, grad)  # type: ignore[attr-defined]


def _length(p: Tensor, grad: Tensor) -> Tensor:
    with full_precision([p]):
        x, u = _gradient(p, grad)
        return geometry_of(p.manifold).norm(x, u)  # type: ignore[attr-defined]


@explained
def gradient_noise_scale(
    parameters: Iterable[Tensor], losses: Iterable[Tensor], *, batch_size: int = 1
) -> float:
    r"""The batch size at which noise and signal of a gradient are of one size.

    The simple noise scale :math:`\operatorname{tr}(\Sigma) / |G|^2` of McCandlish et al. 2018, "An
    Empirical Model of Large-Batch Training" (eq. 2.9): much smaller batches waste little data, much
    larger ones little but time. ``G`` is the gradient and :math:`\Sigma` the covariance of that of
    one sample, both in the metric for parameters on manifolds, and both estimated without bias from
    ``n`` batches of ``b`` samples.

    Args:
        parameters: at which the losses are; ``.grad`` stays as it is.
        losses: of batches, each the mean over its samples, at the same parameters; at least two. A
            generator keeps the graph of one at a time.
        batch_size: samples of a batch.

    Returns:
        The scale in samples; infinite where the gradient cannot be told from zero, zero where all
        batches agree.

    Shape:
        - parameters: any, losses: ``()`` each

    Raises:
        OptimizerError: fewer than two losses, or a batch size below one (also a ``ValueError``).

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> batches = torch.randn(64, 8, 2) + 3
        >>> losses = ((p - batch).square().mean() for batch in batches)
        >>> scale = gradient_noise_scale([p], losses, batch_size=8)
        >>> 0.05 < scale < 0.3
        True
    """
    params = [p for p in parameters if p.requires_grad]
    if batch_size < 1:
        raise SettingError(
            f"gradient_noise_scale got batch_size={batch_size!r}; it takes a whole number >= 1, as "
            f"in gradient_noise_scale(params, losses, batch_size=32)"
        )
    squares, count = 0.0, 0
    sums: list[Tensor] = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        with torch.no_grad(), full_precision(params):
            vectors = [_tangent(p, grad) for p, grad in zip(params, gradients, strict=True)]
            squares += _square(params, vectors)
            sums = [a + b for a, b in zip(sums, vectors, strict=True)] if sums else vectors
        count += 1
    if count < 2:
        raise SettingError(
            f"gradient_noise_scale got {count} loss, of which there is no spread; call "
            f"gradient_noise_scale(params, [loss(batch) for batch in batches]) with two batches at "
            f"least"
        )
    with torch.no_grad(), full_precision(params):
        mean = _square(params, [total / count for total in sums])
    spread = max(squares - count * mean, 0.0) / (count - 1)
    signal = mean - spread / count
    if spread == 0:
        return 0.0
    return batch_size * spread / signal if signal > 0 else math.inf


def _tangent(p: Tensor, grad: Tensor) -> Tensor:
    return _gradient(p, grad)[1] if is_riemannian(p) else plain(grad)


def _square(params: list[Tensor], vectors: list[Tensor]) -> float:
    """Squared length, in float64."""
    total = 0.0
    for p, u in zip(params, vectors, strict=True):
        if is_riemannian(p):
            x = plain(p).to(u.dtype)
            total += float(geometry_of(p.manifold).inner(x, u, u))  # type: ignore[attr-defined]
        else:
            total += float(torch.linalg.vector_norm(u, dtype=torch.float64).square())
    return total
