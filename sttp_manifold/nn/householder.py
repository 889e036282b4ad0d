"""`HouseholderWeight`: coordinates of the non-redundant chart, for any optimizer of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sttp_manifold.chart import ChartPoint, HouseholderChart
from sttp_manifold.nn.initial import computing_dtype, initial_point, kind_of
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["HouseholderWeight"]


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
        dtype, device = kind_of(init, dtype, device)
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
