"""Parameter groups of a model: what decays, and at which rates what moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import OptimizerError
from sttp_manifold.manifolds.contract import HasDecay
from sttp_manifold.optim._blocks import is_riemannian
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["HoldsWeight", "param_groups"]

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
# In the order in which the groups are returned.
_WEIGHTS, _FRAMES, _COORDINATES, _MATRICES, _REST = (
    "spectral weights",
    "other manifolds",
    "chart coordinates",
    "weights",
    "biases and norms",
)


@runtime_checkable
class HoldsWeight(Protocol):
    """A module whose own parameters stand for one weight, in whatever coordinates."""

    def tt(self) -> SpectralTT:
        """The weight."""
        ...

    def encode_(self, tt: SpectralTT) -> Any:
        """Hold another weight."""
        ...


@explained
def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    lr: float | Tensor | None = None,
    frame_lr: float | Tensor | None = None,
    spectrum_lr: float | Tensor | None = None,
) -> list[dict[str, Any]]:
    r"""Sort the trainable parameters of a model into groups, for any optimizer.

    Decay is for what it means something for:

    ======================= ======================================== ============ =============
    group                   parameters                               decays       rate
    ======================= ======================================== ============ =============
    ``"spectral weights"``  points of :class:`SpectralTTManifold`    the weight   ``frame_lr``
    ``"other manifolds"``   frames, points of geoopt's manifolds     no           ``frame_lr``
    ``"chart coordinates"`` of weights held by a Householder chart   no           ``frame_lr``
    ``"weights"``           plain ones of two dimensions and more    yes          ``lr``
    ``"biases and norms"``  biases, affine maps of norms, vectors    no           ``lr``
    ======================= ======================================== ============ =============

    Coordinates of a chart do not decay: zero is no small weight but a certain frame. Let the weight
    decay by :func:`decay_weights`, in the steps of the same optimizer.

    Args:
        model: its parameters that require a gradient; one that is used twice is in one group.
        weight_decay: for the groups that decay, zero for the others.
        lr: learning rate; that of the optimizer if None.
        frame_lr: learning rate of what holds frames; ``lr`` if None.
        spectrum_lr: learning rate of the spectra in points of manifolds, for
            :class:`RiemannianMuon`, whose ``adam_lr`` it is in that group. The other optimizers
            have one rate for a parameter, and refuse it.

    Returns:
        The groups that are not empty, each with a ``"name"``.

    Shape:
        - lr, frame_lr, spectrum_lr: of one element, where they are tensors

    Raises:
        OptimizerError: ``spectrum_lr`` without a spectral weight on a manifold to use it.

    Example:
        >>> import sttp_manifold as sm
        >>> layer = sm.nn.SpectralLinear(12, 10, rank=3, method="riemannian")
        >>> groups = sm.optim.param_groups(layer, weight_decay=0.1)
        >>> [(group["name"], group["weight_decay"]) for group in groups]
        [('spectral weights', 0.1), ('biases and norms', 0.0)]
        >>> opt = sm.optim.RiemannianAdam(groups, lr=1e-3)
    """
    sorted_: dict[str, list[Tensor]] = {
        name: [] for name in (_WEIGHTS, _FRAMES, _COORDINATES, _MATRICES, _REST)
    }
    for p, kind in _kinds(model):
        sorted_[kind].append(p)
    if spectrum_lr is not None and not sorted_[_WEIGHTS]:
        held = ", whose charts hold frames and spectrum in one" if sorted_[_COORDINATES] else ""
        raise OptimizerError(
            f"param_groups got spectrum_lr={spectrum_lr!r}, but {type(model).__name__} has no "
            f"spectral weight on a manifold{held}; call param_groups(model, frame_lr=...) without "
            f"it, or compress(model, ..., method='riemannian') first"
        )
    groups = []
    for name, params in sorted_.items():
        if not params:
            continue
        decays = name in (_WEIGHTS, _MATRICES)
        group: dict[str, Any] = {"params": params, "name": name}
        group["weight_decay"] = weight_decay if decays else 0.0
        rate = lr if name in (_MATRICES, _REST) or frame_lr is None else frame_lr
        if rate is not None:
            group["lr"] = rate
        if name == _WEIGHTS and spectrum_lr is not None:
            group["adam_lr"] = spectrum_lr
        groups.append(group)
    return groups


def _kinds(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Each trainable parameter once, with the group that it belongs to."""
    seen: set[int] = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad or id(p) in seen:
                continue
            seen.add(id(p))
            if is_riemannian(p):
                yield p, _WEIGHTS if isinstance(getattr(p, "manifold", None), HasDecay) else _FRAMES
            elif isinstance(module, HoldsWeight):
                yield p, _COORDINATES
            elif p.ndim < 2 or name.endswith("bias") or isinstance(module, _NORMS):
                yield p, _REST
            else:
                yield p, _MATRICES
