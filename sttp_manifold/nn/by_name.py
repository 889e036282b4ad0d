"""`hold`: a spectral weight behind any tensor of any module, by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.carry import check_kept, mark_like
from sttp_manifold.nn.fast_path import leave_fast_paths
from sttp_manifold.nn.held import HeldWeight, held_in, put_behind
from sttp_manifold.nn.modules import Owners, naming
from sttp_manifold.nn.recipe import PRETRAINED, KernelOptions, Recipe, takes
from sttp_manifold.nn.stack import MatrixView
from sttp_manifold.nn.stock import follows
from sttp_manifold.nn.together import together as compute_together

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["hold"]


@explained
@takes(KernelOptions, init=PRETRAINED)
def hold(
    model: nn.Module,
    name: str,
    rank: int,
    *,
    count: int = 1,
    stacked: bool = False,
    order: tuple[int, ...] | None = None,
    rows: int = 1,
    together: bool = True,
    **options: Unpack[KernelOptions],
) -> nn.Module:
    """Hold a parameter of any module in spectral form, in place; its module reads it as ever.

    For what :func:`compress` does not know: a matrix of a layer of yours, a stack of experts of
    another name, a single layer at a rank of its own. The module keeps its forward, its class by
    ``isinstance``, and whatever hangs on it; the tensor is formed where it is read, within a
    forward of ``model`` once. :func:`decompress` takes it back, and so does torch's
    :func:`~torch.nn.utils.parametrize.remove_parametrizations`. Assigning to the tensor moves the
    weight. Optimizers have to be built after this call.

    Args:
        model: the network, or the module itself.
        name: qualified name of the parameter, as :meth:`~torch.nn.Module.named_parameters` says it.
            Other modules that hold the same parameter hold the same weight then.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        count: how many matrices of one shape the parameter is, along its first dimension; each has
            cores of its own.
        stacked: whether its first dimension counts them, as in ``(experts, d_out, d_in)``, and they
            do not lie below each other, as query, key and value in ``(3 d, d)``.
        order: dimensions of one of them in the order ``(d_out, d_in, *kernel)``, as ``(1, 0)`` for
            a transposed one.
        rows: how many of its dimensions, in that order, are its rows.
        together: whether a forward of ``model`` forms all spectral weights in it together; see
            :func:`together`.
        **options: those of a weight (:class:`Recipe`), with ``init="pretrained"`` by default.

    Returns:
        The model.

    Raises:
        ConversionError: a name that is no parameter, one that is in spectral form or computed
            otherwise already, or shared with something that cannot hold a spectral weight.
        ShapeError: a bad rank, a parameter that cannot be read so, or one that is not finite.
        SpectrumError: a parameter that the spectrum cannot hold, unless ``project``.

    Example:
        >>> from sttp_manifold.nn import summary
        >>> model = nn.Sequential(nn.Bilinear(8, 6, 4))
        >>> model = hold(model, "0.weight", rank=2, count=4, stacked=True)  # one form an output
        >>> [row.shape for row in summary(model).rows]
        [(4, 8, 6)]
    """
    path, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = nn.Module()
    with naming(name):
        parameter = _parameter(model, module, own)
        check_kept(module, [own])
        view = MatrixView(tuple(parameter.shape), count, stacked, order, rows)
        recipe = Recipe.of("hold", KernelOptions, options, init=PRETRAINED, rank=rank)
        owners = Owners(model)
        places: list[tuple[nn.Module, str]] = []
        for owner, attribute in owners.of(parameter):
            if owner._parameters.get(attribute) is parameter:
                check_kept(owner, [attribute])
                places.append((owner, attribute))
            elif not follows(owner, attribute):
                raise ConversionError(
                    f"{owners.name((owner, attribute))!r} refers to it as well, and would go on "
                    "with the dense tensor; give that a copy of its own"
                )
        weight = recipe.make_behind(parameter, view)
        mark_like([parameter], weight.parameters())
    for owner, attribute in places:
        put_behind(owner, {attribute: HeldWeight(weight, view)})
    leave_fast_paths(model)
    if together:
        compute_together(model)
    return model


def _parameter(model: nn.Module, module: nn.Module, own: str) -> nn.Parameter:
    parameter = module._parameters.get(own)
    if parameter is not None:
        if nn.parameter.is_lazy(parameter):
            raise ConversionError("it has no size before the first input; call the model once")
        return parameter
    if own in held_in(module):
        raise ConversionError("it is in spectral form already; decompress(model) takes it back")
    there = [n for n, p in model.named_parameters() if p.ndim >= 2]
    raise ConversionError(
        f"no such parameter; those that could be matrices are {', '.join(map(repr, there[:8]))}"
        f"{', ...' if len(there) > 8 else ''}"
        if there
        else "no such parameter, and none of this model could be a matrix"
    )
