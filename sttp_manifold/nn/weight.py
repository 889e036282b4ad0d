"""Trainable weights: `HouseholderWeight` and `RiemannianWeight`, one interface.

Both hold a :class:`~sttp_manifold.SpectralTT` in parameters. The first does it by coordinates of
the non-redundant chart ([STTP] Sec. 3.3), which any torch optimizer may move; the second by a
point of the product manifold, which takes a Riemannian optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from sttp_manifold._geoopt import ManifoldParameter
from sttp_manifold.chart import ChartPoint, HouseholderChart
from sttp_manifold.errors import ConversionError
from sttp_manifold.manifolds import SpectralTTManifold
from sttp_manifold.nn.base import SpectralWeight
from sttp_manifold.nn.initial import computing_dtype, initial_point
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["METHODS", "HouseholderWeight", "RiemannianWeight", "SpectralWeight", "make_weight"]


class HouseholderWeight(SpectralWeight):
    r"""A weight held by coordinates of the non-redundant Householder chart.

    One parameter for each core that has any, ``frames[k]``, and one for the spectrum,
    ``coordinates``; together ``shape.num_parameters(spectrum)`` numbers, the dimension of the set
    of weights. Any value of them is a weight of the set, so any optimizer may move them.

    Args:
        shape: the plan.
        spectrum: one of ``identity``, ``free``, ``normalized``, ``bounded``, ``full``.
        init: ``"eye"`` (all frame coordinates zero: truncated identities up to sign),
            ``"noisy_eye"`` (normal with deviation ``init_std`` around it), ``"random"`` (frames
            from the Haar measure), each with a unit spectrum; or a value to take over.
        bound: bound of ``"bounded"``.
        init_std: deviation for ``"noisy_eye"``.
        project: with a value as ``init``, take the nearest one that the spectrum can hold.
        dtype: floating dtype; that of the value, or torch's default.
        device: likewise.

    Raises:
        ShapeError: an unknown ``init``, or a value on another plan.
        SpectrumError: an unknown spectrum, or a value that it cannot hold.

    References:
        [STTP] Sec. 3.2-3.4.

    Example:
        >>> weight = HouseholderWeight(TTShape.for_matrix(12, 10, rank=3))
        >>> weight().shape
        torch.Size([12, 10])
        >>> sum(p.numel() for p in weight.parameters()) == weight.shape.num_parameters("free")
        True
    """

    method = "householder"

    coordinates: nn.Parameter | None
    signs: Tensor

    def __init__(
        self,
        shape: TTShape,
        spectrum: str = "free",
        init: str | SpectralTT = "noisy_eye",
        bound: float = 1.0,
        init_std: float = 1e-4,
        *,
        project: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape, spectrum, bound)
        self.chart = HouseholderChart(shape, spectrum, bound)
        # torch.compile does not trace the lock that a cached property takes in Python 3.11.
        _ = self.chart.map, self.chart.is_full, self.chart.frame_sizes
        dtype, device = _kind_of(init, dtype, device)
        point = initial_point(self.chart, init, init_std, dtype, device)
        # A constant core (an orthonormal square, its rotation absorbed elsewhere) has no entry.
        self.frames = nn.ParameterList(
            nn.Parameter(vector.to(dtype)) for vector in point.frames if vector.numel()
        )
        if spectrum == "identity":
            self.register_parameter("coordinates", None)
            self.register_buffer("signs", point.signs.to(dtype))
        else:
            self.coordinates = nn.Parameter(point.spectrum.to(dtype))
        self._names = tuple(map(str, range(len(self.frames))))
        self.tensor_sizes = tuple(tuple(tensor.shape) for tensor in self._tensors())
        if isinstance(init, SpectralTT):
            self.encode_(init, project=project)

    @staticmethod
    def count(shape: TTShape, spectrum: str) -> int:
        """Numbers stored for a plan."""
        return shape.num_parameters(spectrum)

    @property
    def _centre(self) -> Tensor:
        return self.signs if self.coordinates is None else self.coordinates

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self._centre.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._centre.device

    def _tensors(self) -> tuple[Tensor, ...]:
        # Attributes of modules are slow to get, and this is done for each weight of each forward.
        stored = cast("dict[str, Tensor]", self.frames._parameters)
        try:
            centre = self._parameters["coordinates"]
            frames = [stored[name] for name in self._names]
            return (*frames, self.signs if centre is None else centre)
        except KeyError:  # computed from other parameters
            return (*self.frames, self._centre)

    def _value_of(self, tensors: Sequence[Tensor]) -> SpectralTT:
        *frames, centre = tensors
        dtype, wide = centre.dtype, computing_dtype(centre.dtype)
        constant = centre.new_empty(0, dtype=wide)
        stored = iter(frames)
        vectors = tuple(
            next(stored).to(wide) if size else constant for size in self.chart.frame_sizes
        )
        centre = centre.to(wide)
        if self.coordinates is None:
            point = ChartPoint(vectors, constant, centre)
        else:
            point = ChartPoint(vectors, centre, constant)
        tt = self.chart.decode(point)
        return tt if wide == dtype else tt.to(dtype)

    def bond(self) -> Tensor:
        """The spectrum, or the full bond, without computing a frame; see the base class."""
        return self._centre if self.coordinates is None else self.map(self._centre)

    def _set(self, tt: SpectralTT, project: bool) -> None:
        point = self.chart.encode(tt, project=project)
        stored = [vector for vector in point.frames if vector.numel()]
        for parameter, vector in zip(self.frames, stored, strict=True):
            parameter.copy_(vector)
        self._centre.copy_(point.signs if self.coordinates is None else point.spectrum)


class RiemannianWeight(SpectralWeight):
    r"""A weight held as a point of the product manifold, the total space.

    One ``geoopt.ManifoldParameter``, ``point``, of all frames and the spectrum's coordinates. It
    takes a Riemannian optimizer, such as :class:`sttp_manifold.optim.RiemannianAdam`: a Euclidean
    one leaves the manifold without a word (:func:`sttp_manifold.optim.check_optimizer`).

    Args:
        shape: the plan.
        spectrum: one of ``identity``, ``free``, ``normalized``, ``bounded``, ``full``.
        init: as for :class:`HouseholderWeight`, the same weight at the same seed.
        bound: bound of ``"bounded"``.
        init_std: deviation for ``"noisy_eye"``.
        project: with a value as ``init``, take the nearest one that the spectrum can hold.
        dtype: floating dtype; that of the value, or torch's default.
        device: likewise.

    Raises:
        ShapeError: an unknown ``init``, or a value on another plan.
        SpectrumError: an unknown spectrum, or a value that it cannot hold.

    Example:
        >>> weight = RiemannianWeight(TTShape.for_matrix(12, 10, rank=3))
        >>> bool(weight.tt().orthonormality_error() < 1e-5)
        True
    """

    method = "riemannian"

    point: ManifoldParameter

    def __init__(
        self,
        shape: TTShape,
        spectrum: str = "free",
        init: str | SpectralTT = "noisy_eye",
        bound: float = 1.0,
        init_std: float = 1e-4,
        *,
        project: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape, spectrum, bound)
        manifold = SpectralTTManifold(shape, spectrum, bound)
        dtype, device = _kind_of(init, dtype, device)
        chart = HouseholderChart(shape, spectrum, bound)
        tt = chart.decode(initial_point(chart, init, init_std, dtype, device))
        self.point = ManifoldParameter(manifold.pack(tt).to(dtype), manifold=manifold)
        self.tensor_sizes = (tuple(self.point.shape),)
        if isinstance(init, SpectralTT):
            self.encode_(init, project=project)

    @staticmethod
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
        return SpectralTTManifold(self.shape, self.spectrum, self.bound)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the point."""
        return self.point.dtype

    @property
    def device(self) -> torch.device:
        """Device of the point."""
        return self.point.device

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.point,)

    def _value_of(self, tensors: Sequence[Tensor]) -> SpectralTT:
        return self.manifold.unpack(tensors[0])

    def bond(self) -> Tensor:
        """The spectrum, or the full bond, without computing a frame; see the base class."""
        return self._value().spectrum

    def _set(self, tt: SpectralTT, project: bool) -> None:
        self.point.copy_(self.manifold.pack(tt, project=project))

    def _apply(self, fn: Any, recurse: bool = True) -> RiemannianWeight:
        # Where torch replaces parameters instead of their data, it knows nothing of manifolds.
        manifold = self.manifold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._keep_on(manifold)
        return self

    def _keep_on(self, manifold: SpectralTTManifold) -> None:
        point = self._parameters["point"]
        assert point is not None
        if not isinstance(point, ManifoldParameter):
            self.point = ManifoldParameter(
                point.detach(), manifold=manifold, requires_grad=point.requires_grad
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        manifold, key = self.manifold, prefix + "point"
        point = state_dict.get(key)
        if isinstance(point, Tensor) and point.shape == self.point.shape:
            error = float(manifold.unpack(point.detach().double()).orthonormality_error())
            precision = max(torch.finfo(t.dtype).eps for t in (point, self.point))
            if not error <= max(1e-4, 32 * precision):
                # The last argument collects what torch raises at the end.
                messages: list[str] = args[-1]
                messages.append(
                    f"{key} is off its manifold: its frames are orthonormal to {error:.2g} only. "
                    f"Bring it back by state[{key!r}] = M.projx(state[{key!r}]) with "
                    f"M = model.get_submodule({prefix[:-1]!r}).manifold, and train it with a "
                    "Riemannian optimizer"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._keep_on(manifold)


METHODS: dict[str, type[HouseholderWeight | RiemannianWeight]] = {
    "householder": HouseholderWeight,
    "riemannian": RiemannianWeight,
}
"""Ways to hold a weight, by name."""

# What may be computed in a batch, or kept, is exactly of these types. A subclass of a weight may
# depend on more than the tensors that it names, as a parametrized module does, and of a subclass of
# Tensor nobody knows what lies at its address.
EXACT_WEIGHTS = (HouseholderWeight, RiemannianWeight)
EXACT_TENSORS = (Tensor, nn.Parameter, ManifoldParameter)


def make_weight(
    method: str,
    shape: TTShape,
    spectrum: str = "free",
    init: str | SpectralTT = "noisy_eye",
    bound: float = 1.0,
    init_std: float = 1e-4,
    *,
    project: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SpectralWeight:
    """A weight held by the method of a name; the arguments are those of its class.

    Args:
        method: ``"householder"`` or ``"riemannian"``.
        shape: the plan.
        spectrum: one of ``identity``, ``free``, ``normalized``, ``bounded``, ``full``.
        init: ``"eye"``, ``"noisy_eye"``, ``"random"``, or a value to take over.
        bound: bound of ``"bounded"``.
        init_std: deviation for ``"noisy_eye"``.
        project: with a value as ``init``, take the nearest one that the spectrum can hold.
        dtype: floating dtype; that of the value, or torch's default.
        device: likewise.

    Raises:
        ConversionError: an unknown method.
        ShapeError: an unknown ``init``, or a value on another plan.
        SpectrumError: an unknown spectrum, or a value that it cannot hold.

    Example:
        >>> make_weight("riemannian", TTShape.svd(6, 5, rank=2)).method
        'riemannian'
    """
    return weight_class(method)(
        shape, spectrum, init, bound, init_std, project=project, dtype=dtype, device=device
    )


def weight_class(method: str) -> type[HouseholderWeight | RiemannianWeight]:
    """The class of a method.

    Raises:
        ConversionError: an unknown method; the message lists those there are.
    """
    if method not in METHODS:
        names = ", ".join(map(repr, METHODS))
        raise ConversionError(
            f"unknown method {method!r}; expected one of {names}, as in method='householder'"
        )
    return METHODS[method]


def _kind_of(
    init: str | SpectralTT, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype, torch.device]:
    if isinstance(init, SpectralTT):
        return dtype or init.dtype, torch.device(init.device if device is None else device)
    if device is None:
        device = torch.get_default_device()
    return dtype or torch.get_default_dtype(), torch.device(device)
