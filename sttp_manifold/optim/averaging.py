"""Averages of parameters that stay on their manifolds, and a check of points that did not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_avg_fn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import OptimizerError
from sttp_manifold.frames.orthonormal import HALF
from sttp_manifold.optim._blocks import frame_views, is_framed, is_riemannian, working_dtype

__all__ = ["check_points", "get_manifold_multi_avg_fn"]

Tensors = Sequence[Tensor]
MultiAverage = Callable[[Any, Any, Any], None]


def get_manifold_multi_avg_fn(
    model: torch.nn.Module, multi_avg_fn: MultiAverage | None = None
) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Averaging function for ``torch.optim.swa_utils.AveragedModel`` that stays on manifolds.

    Averages of points leave a manifold: those of frames are shorter than frames, by a hundredth
    after some steps already. Here every parameter is averaged as ``multi_avg_fn`` does it, and
    those on a manifold are then put back: frames to the nearest frame (the projected average;
    Moakher 2002 compares it to others), spectra stay as averaged, and points on other manifolds of
    geoopt's go where its ``projx`` takes them. Plain parameters and buffers are averaged exactly as
    by ``multi_avg_fn`` alone.

    A weight has many points, which differ by rotations between its cores (docs/math). Gradients
    have no part along them, so that the points of one training stay comparable, and their average
    is one of weights. Do not average points of different trainings, nor over a ``switch`` or
    ``canonical_gauge`` in between: equal weights may then average to another.

    Args:
        model: what is averaged: the one that ``update_parameters`` gets. It tells which parameters
            are on manifolds, which the averaging function cannot see.
        multi_avg_fn: the average itself, such as
            ``torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)``; None for equal weights.

    Returns:
        A function of averaged values, current values and how many were averaged, which overwrites
        the averaged values.

    Raises:
        OptimizerError: ``model`` is no module, or ``multi_avg_fn`` no function; and in the function
            that is returned, for values that are not the parameters of ``model``.

    Example:
        >>> import torch, sttp_manifold as sm
        >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        >>> model = sm.nn.SpectralLinear(12, 10, rank=3, method="riemannian")
        >>> average = get_manifold_multi_avg_fn(model, get_ema_multi_avg_fn(0.99))
        >>> averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        >>> averaged.update_parameters(model)
    """
    average: MultiAverage = _equal_weights if multi_avg_fn is None else multi_avg_fn
    given: Any = model
    if not (isinstance(given, torch.nn.Module) and callable(average)):
        # Said here: the function that is returned is called after a step of training only.
        raise OptimizerError(
            f"get_manifold_multi_avg_fn takes a module and an averaging function of torch's, got "
            f"{type(given).__name__} and {type(multi_avg_fn).__name__}; call "
            f"get_manifold_multi_avg_fn(model, get_ema_multi_avg_fn(0.999))"
        )

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, number: Tensor | int) -> None:
        originals = _originals(model, current)
        average(averaged, current, number)
        for a, p in zip(averaged, originals, strict=True):
            if is_riemannian(p):
                _put_back(p, a)

    return update


def _equal_weights(averaged: Tensors, current: Tensors, number: Tensor | int) -> None:
    # torch's function for many tensors refuses counts, as those of batch norm are.
    average = get_swa_avg_fn()
    for a, c in zip(averaged, current, strict=True):
        a.copy_(average(a, c, number))


def _originals(model: torch.nn.Module, current: Tensors) -> list[Tensor]:
    """The parameters and buffers of a model whose values these are.

    They come as aliases; or as copies, in their order, if the average is kept on another device.
    """
    own = [*model.parameters(), *model.buffers()]
    by_memory = {(p.data_ptr(), p.shape): p for p in own}
    found = [by_memory.get((value.data_ptr(), value.shape)) for value in current]
    if not any(p is None for p in found):
        return [p for p in found if p is not None]
    for candidates in (list(model.parameters()), own):
        alike = [p for p in candidates if current and p.dtype == current[0].dtype]
        if [p.shape for p in alike] == [value.shape for value in current]:
            return alike
    raise OptimizerError(
        f"an average of {len(current)} tensors that are not the parameters of the "
        f"{type(model).__name__} that get_manifold_multi_avg_fn was given; call "
        f"AveragedModel(model, multi_avg_fn=get_manifold_multi_avg_fn(model)), and "
        f"update_parameters(model) with the same model"
    )


def _put_back(p: Tensor, value: Tensor) -> None:
    """The nearest point of the manifold of ``p``, in place of a value beside it."""
    manifold = p.manifold  # type: ignore[attr-defined]
    value.copy_(manifold.projx(value.to(working_dtype(p))))


@explained
@torch.no_grad()
def check_points(model: torch.nn.Module) -> None:
    """Raise if a parameter of a model is off its manifold.

    A Euclidean optimizer, an average, an initialization in place or a loaded file may have taken it
    there. Costs a product of small matrices for each frame, and waits for the device.

    Args:
        model: any module.

    Raises:
        OptimizerError: on the first parameter whose value is no point of its manifold, to the
            precision of its dtype.

    Example:
        >>> import sttp_manifold as sm
        >>> check_points(sm.nn.SpectralLinear(12, 10, rank=3, method="riemannian"))
    """
    for name, p in model.named_parameters():
        if not is_riemannian(p) or p.is_meta:
            continue
        error = _distance(p)
        tolerance = (8 if p.dtype in HALF else 64) * torch.finfo(p.dtype).eps
        if not error <= tolerance:
            manifold = type(p.manifold).__name__  # type: ignore[attr-defined]
            raise OptimizerError(
                f"parameter {name!r} is off its manifold {manifold} by {error:.1e}, where its "
                f"dtype has {tolerance:.1e}: it was averaged, moved by a Euclidean optimizer or "
                f"written to. Put it back by p.proj_() under torch.no_grad(); average with "
                f"sm.optim.get_manifold_multi_avg_fn(model), step with sm.optim.RiemannianAdam"
            )


def _distance(p: Tensor) -> float:
    """How far a value is from its manifold: of frames the error of the Gram matrix."""
    x = p.detach().to(working_dtype(p))
    if not is_framed(p):
        projected = p.manifold.projx(x)  # type: ignore[attr-defined]
        return float((projected - x).abs().max() / x.abs().max().clamp(min=1)) if x.numel() else 0.0
    worst = 0.0
    for X in frame_views(p, x):
        if X.numel():
            gram = X.mT @ X
            gram.diagonal(dim1=-2, dim2=-1).sub_(1)
            worst = max(worst, float(gram.abs().max().nan_to_num(torch.inf)))
    return worst
