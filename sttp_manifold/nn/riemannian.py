"""`RiemannianWeight`: a point of the product manifold, for a Riemannian optimizer."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sttp_manifold._arguments import explained
from sttp_manifold._geoopt import ManifoldParameter
from sttp_manifold.chart import ChartPoint, HouseholderChart
from sttp_manifold.errors import OffManifoldError
from sttp_manifold.manifolds import SpectralTTManifold
from sttp_manifold.nn.layout import Layout, batch_map
from sttp_manifold.nn.torch_state import circumstances, has_values, outside_autocast
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.precision import computing_dtype, widened
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["OffManifoldWarning", "RiemannianWeight"]

# After how many changes training is looked at first, and then at the latest.
_FIRST, _SELDOM = 4, 1024
# One text for all weights, so that it is shown once.
OFF = (
    "points of spectral weights have left their manifold in training: a plain optimizer moves "
    "them, or they are written to. Train them with sm.optim.RiemannianAdam(model.parameters(), "
    "lr=1e-3), or, where the optimizer is another's to make, in coordinates: "
    "sm.nn.switch(model, 'householder'). sm.optim.check_points(model) names the parameters"
)


class OffManifoldWarning(UserWarning):
    """Weights that a training takes off their manifold."""


def check_is_point(value: object, weight: str) -> None:
    """Raise for what takes the place of a point and is none.

    Args:
        value: the value; fake tensors, which geoopt cannot wrap, are accepted.
        weight: which weight it is, for the message.

    Raises:
        OffManifoldError: anything else.
    """
    if isinstance(value, FakeTensor):
        return
    if type(value).__name__ == "DTensor":
        raise OffManifoldError(
            f"the point of a weight ({weight}) would be cut into pieces, and a step of a piece is "
            "none on the manifold; keep it whole: fully_shard(model, "
            "ignored_params=sm.nn.keep_whole(model)), or train in coordinates, which may be cut: "
            "sm.nn.switch(model, 'householder')"
        )
    raise OffManifoldError(
        f"the point of a weight ({weight}) is a ManifoldParameter, which a {type(value).__name__} "
        "in its place is not; write into it under torch.no_grad(), weight.point.copy_(x), or take "
        "a weight over by weight.encode_(tt_svd(W, weight.shape))"
    )


class RiemannianWeight(SpectralWeight):
    r"""A weight held as a point of the product manifold, the total space.

    One ``geoopt.ManifoldParameter``, ``point``, of all frames and the spectrum's coordinates. It
    takes a Riemannian optimizer, such as :class:`sttp_manifold.optim.RiemannianAdam`: a Euclidean
    one leaves the manifold (:func:`sttp_manifold.optim.check_optimizer`), as averages do. Such a
    point is refused where it is evaluated: once for each change of it, in evaluation mode and
    without gradient, but not under compilation, tracing and transforms.

    It takes the options of every :class:`~sttp_manifold.nn.weight.SpectralWeight`, and starts from
    the same weight as a :class:`HouseholderWeight` at the same seed.

    Raises:
        OffManifoldError: when it is evaluated, with a point whose frames are not orthonormal.

    Example:
        >>> weight = RiemannianWeight(TTShape.for_matrix(12, 10, rank=3))
        >>> bool(weight.tt().orthonormality_error() < 1e-5)
        True
    """

    method = "riemannian"

    point: ManifoldParameter
    # Of the last value that was found to be a point: object, version and place.
    _seen: tuple[int, int, int] | None
    # Changes of the value in training, after how many to look, and the version seen last.
    _changes: int
    _look_after: int
    _version_seen: int
    # Machine epsilon of the coarsest dtype that the frames have been rounded to.
    _rounded: float

    def _begin(
        self, chart: HouseholderChart, point: ChartPoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._seen, self._rounded = None, 0.0
        self._changes, self._look_after, self._version_seen = 0, _FIRST, -1
        manifold = SpectralTTManifold(self.shape, self.spectrum, self.bound, self.map.values)
        if has_values(point.spectrum):
            start = manifold.pack(chart.decode(point)).to(dtype)
        else:
            start = torch.empty(manifold.n_elements, dtype=dtype, device=device)
        self.point = _on(manifold, start)

    @staticmethod
    @explained
    def count(shape: TTShape, spectrum: str) -> int:
        """Numbers stored for a plan: whole frames, and the spectrum."""
        return sum(d * r for d, r in shape.merged.frame_shapes) + shape.spectrum_size(spectrum)

    @property
    def manifold(self) -> SpectralTTManifold:
        """The manifold of the point."""
        # torch.func.functional_call puts plain tensors in the place of parameters.
        found: SpectralTTManifold | None = getattr(self.point, "manifold", None)
        return self._own_manifold if found is None else found

    @cached_property
    def _own_manifold(self) -> SpectralTTManifold:
        return SpectralTTManifold(self.shape, self.spectrum, self.bound, self.map.values)

    def _follow_values(self) -> None:
        super()._follow_values()
        manifold = getattr(self.point, "manifold", None)
        # One put there from outside, as of fixed TT rank, has none to follow.
        if getattr(manifold, "values", self.map.values) != self.map.values:
            self.__dict__.pop("_own_manifold", None)
            self.point.manifold = self._own_manifold

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the point."""
        return self.point.dtype

    @property
    def device(self) -> torch.device:
        """Device of the point."""
        return self.point.device

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.point,) if self.values is None else (self.point, self.values)

    @cached_property
    def layout(self) -> Layout:
        """Equal frames side by side, then the spectrum; see the base class."""
        manifold, plan = self._own_manifold, self.shape.merged
        return Layout(
            plan,
            batch_map(self.map),
            (None,) * len(plan.core_shapes),
            tuple(manifold._starts),
            tuple(d * r for d, r in plan.frame_shapes),
            manifold.spectrum_slice.start,
            manifold.n_elements,
            self.values is not None,
        )

    def _value_of(self, tensors: Sequence[Tensor]) -> SpectralTT:
        point, *values = [tensor.to(computing_dtype(tensor.dtype)) for tensor in tensors]
        if not values:
            return self.manifold.unpack(point)
        return SpectralTT(*self._own_manifold.cores(point, lambda _: values[0]), shape=self.shape)

    def __setattr__(self, name: str, value: Any) -> None:
        # fully_shard puts its pieces here, prune and users what is no point.
        is_point = isinstance(value, ManifoldParameter) or "_loading" in self.__dict__
        if name == "point" and not is_point:
            check_is_point(value, self.extra_repr())
        super().__setattr__(name, value)

    def _look(self) -> None:
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                self._watch()
            elif not self.training:
                self._check_point()

    def _can_be_checked(self) -> bool:
        point = self.point
        return (
            isinstance(point, ManifoldParameter)
            and point.shape == (self.manifold.n_elements,)
            and has_values(point)
            and not point.is_inference()
        )

    def _error(self) -> tuple[float, float]:
        """How far frames are from orthonormal, and how far they may be."""
        point, worst = self.point.detach(), []
        with outside_autocast(point.device):
            for part, count, d, r in self._own_manifold.frame_groups:
                X = widened(point[part]).view(count, d, r)
                eye = torch.eye(r, dtype=X.dtype, device=X.device)
                worst.append(torch.baddbmm(eye.expand(count, r, r), X.mT, X, beta=-1).abs().max())
        error = float(torch.stack(worst).max())
        return error, _tolerance(max(torch.finfo(self.point.dtype).eps, self._rounded))

    def _watch(self) -> None:
        """Warn once if training takes the point off its manifold.

        Optimizers are made where nobody looks. It costs a look at the version in each forward, and
        a look at the frames, for which an accelerator waits, after 4, 16, 64, ... changes.
        """
        point = self.point
        if type(point) is not ManifoldParameter or point.is_inference():
            return
        version = point._version
        if version == self._version_seen:
            return
        self._version_seen = version
        self._changes += 1
        if self._changes < self._look_after or not self._can_be_checked():
            return
        if circumstances() is None or _is_captured(point):
            return
        self._look_after = min(4 * self._changes, self._changes + _SELDOM)
        error, limit = self._error()
        if error > limit:
            self._look_after = sys.maxsize
            warnings.warn(OFF, OffManifoldWarning, stacklevel=2)

    def _check_point(self) -> None:
        """Raise for a point that is off its manifold, once looked at for each version of it."""
        point = self.point
        if not self._can_be_checked():
            return
        seen = id(point), point._version, point.data_ptr()
        if seen == self._seen or circumstances() is None or _is_captured(point):
            return
        error, limit = self._error()
        if error > limit:  # NaN goes on: a training that diverged shows it
            raise OffManifoldError(
                f"the point of a weight ({self.extra_repr()}) is off its manifold: its frames are "
                f"orthonormal to {error:.2g} only, where {limit:.1g} is allowed. It was averaged, "
                "moved by a Euclidean optimizer or written to. Average with "
                "sm.optim.get_manifold_multi_avg_fn(model), step with sm.optim.RiemannianAdam; "
                "sm.optim.check_points(model) names the parameter, and weight.point.proj_() under "
                "torch.no_grad() puts it back"
            )
        self._seen = seen

    def bond(self) -> Tensor:
        """The spectrum, or the full bond, without computing a frame; see the base class."""
        if self.values is not None:
            return self.values
        theta = self.point[self._own_manifold.spectrum_slice].view(self.map.coordinate_shape)
        return self.map(theta.to(computing_dtype(theta.dtype))).to(theta.dtype)

    def _set(self, tt: SpectralTT, project: bool) -> None:
        self.point.copy_(self.manifold.pack(tt, project=project))
        self._rounded = 0.0

    def _apply(self, fn: Any, recurse: bool = True) -> RiemannianWeight:
        # Where torch replaces parameters instead of their data, it knows nothing of manifolds.
        manifold, before = self.manifold, self.dtype
        super()._apply(fn, recurse)
        self._keep_on(manifold)
        self._was_rounded(before)
        self._follow_values()
        return self

    def _keep_on(self, manifold: SpectralTTManifold) -> None:
        point = self._parameters["point"]
        assert point is not None
        if not isinstance(point, ManifoldParameter):
            self.point = _on(manifold, point.detach(), point.requires_grad)

    def _was_rounded(self, dtype: torch.dtype) -> None:
        self._rounded = max(self._rounded, torch.finfo(dtype).eps)

    def _wrong(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        wrong = super()._wrong(state_dict, prefix)
        if wrong is not None:
            return wrong
        key = prefix + "point"
        point = state_dict.get(key)
        if not isinstance(point, Tensor) or point.shape != self.point.shape:
            return None
        if not has_values(point):
            return None
        with outside_autocast(self.point.device):
            error = float(self.manifold.unpack(point.detach().double()).orthonormality_error())
        precision = max(torch.finfo(t.dtype).eps for t in (point, self.point))
        if error <= _tolerance(precision):
            self._was_rounded(point.dtype)
            return None
        return (
            f"{key} is off its manifold: its frames are orthonormal to {error:.2g} only. "
            f"Bring it back by state[{key!r}] = M.projx(state[{key!r}]) with "
            f"M = model.get_submodule({prefix[:-1]!r}).manifold, and train it with a "
            "Riemannian optimizer"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        manifold = self.manifold
        self.__dict__["_loading"] = True  # with assign=True torch puts a plain parameter here
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            del self.__dict__["_loading"]
        self._keep_on(manifold)
        self._follow_values()


def _tolerance(eps: float) -> float:
    """How far from orthonormal frames may be, by what they have been rounded to."""
    return max(1e-4, 32 * eps)


def _is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, where no value can be waited for."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _on(
    manifold: SpectralTTManifold, point: Tensor, requires_grad: bool = True
) -> ManifoldParameter:
    """A parameter on a manifold; of a fake tensor, which geoopt cannot wrap, a plain one."""
    if isinstance(point, FakeTensor):
        return cast("ManifoldParameter", nn.Parameter(point, requires_grad))
    return ManifoldParameter(point, manifold=manifold, requires_grad=requires_grad)
