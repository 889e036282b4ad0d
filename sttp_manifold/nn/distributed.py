"""Points on manifolds in networks that `fully_shard` cuts over processes."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.riemannian import RiemannianWeight

__all__ = ["keep_whole"]


@explained
def keep_whole(model: nn.Module, group: dist.ProcessGroup | None = None) -> set[nn.Parameter]:
    """Keep points on manifolds whole on every process, for ``fully_shard`` to leave out.

    torch's ``fully_shard`` cuts parameters into pieces and gives optimizers the pieces. Coordinates
    of charts may be cut anywhere, and train as on one process. A frame may not: a step, projection
    or retraction is one of the whole frame, and ``fully_shard`` of a network with such points is
    refused. Say instead, before the optimizer is made::

        fully_shard(model, ignored_params=sm.nn.keep_whole(model))

    Points then are as those of the first process everywhere, and their gradients are averaged when
    they are complete, as ``fully_shard`` averages the others. They are few numbers: that is what
    they are for. Under accumulation (``set_requires_gradient_sync(False)``) they are averaged in
    every backward pass, with the same result. Each process has to use the same weights.

    Args:
        model: the network, before ``fully_shard`` or after it has been cut elsewhere.
        group: the processes that share it; all of them if absent.

    Returns:
        The parameters, for ``ignored_params`` (torch 2.7 or later); of a network without points an
        empty set.

    Raises:
        ConversionError: no process group.

    Example:
        >>> from sttp_manifold.nn import SpectralLinear
        >>> keep_whole(SpectralLinear(12, 10, rank=3))  # coordinates of a chart may be cut
        set()
    """
    points = {m.point: None for m in model.modules() if isinstance(m, RiemannianWeight)}
    if points and not (dist.is_available() and dist.is_initialized()):
        raise ConversionError(
            "keep_whole averages over the processes of a group, and there is none; call "
            "torch.distributed.init_process_group(...) first, as fully_shard needs it too"
        )
    for point in points:  # in the same order everywhere
        _share(point, group)
    return set(points)


def _share(point: Tensor, group: dist.ProcessGroup | None) -> None:
    if not point.is_meta:  # values that are loaded later are the same everywhere
        with torch.no_grad():
            dist.broadcast(point, group=group, group_src=0)
    if point.requires_grad:
        point.register_post_accumulate_grad_hook(partial(_average, group=group))


def _average(point: Tensor, group: dist.ProcessGroup | None) -> None:
    gradient = point.grad
    assert gradient is not None
    dist.all_reduce(gradient, group=group)
    gradient.div_(dist.get_world_size(group))
