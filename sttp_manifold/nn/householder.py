"""`HouseholderWeight`: coordinates of the non-redundant chart, for any optimizer of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from sttp_manifold._arguments import explained
from sttp_manifold.chart import ChartPoint, HouseholderChart
from sttp_manifold.errors import ConversionError
from sttp_manifold.frames.compiled import is_wanted
from sttp_manifold.nn.layout import Layout, batch_map
from sttp_manifold.nn.state import warn_once
from sttp_manifold.nn.torch_state import has_values, in_onnx_export
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.precision import computing_dtype
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["HouseholderWeight"]


class HouseholderWeight(SpectralWeight):
    r"""A weight held by coordinates of the non-redundant Householder chart.

    One parameter, ``coordinates``: frames in the order of the merged chain, then the spectrum
    (:meth:`sttp_manifold.HouseholderChart.unpack`), ``shape.num_parameters(spectrum)`` numbers.
    Any value of them is a weight of the set, so any optimizer may move them. A weight with an
    identity spectrum has constant ``signs`` besides, one with a fixed spectrum its ``values`` with
    such signs: buffers.

    It takes the options of every :class:`~sttp_manifold.nn.weight.SpectralWeight`, and raises as
    that does.

    Shape:
        - coordinates: ``(num_parameters,)``
        - signs, values: ``(r,)``

    References:
        [STTP] Sec. 3.2-3.4.

    Example:
        >>> weight = HouseholderWeight(TTShape.for_matrix(12, 10, rank=3))
        >>> weight().shape
        torch.Size([12, 10])
        >>> weight.coordinates.shape == (weight.shape.num_parameters("free"),)
        True
    """

    method = "householder"

    coordinates: nn.Parameter
    signs: Tensor | None

    def _begin(
        self, chart: HouseholderChart, point: ChartPoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._make_chart()
        self.coordinates = nn.Parameter(self.chart.flatten(point).to(dtype))
        signs = point.signs.to(dtype) if self.spectrum == "identity" else None
        self.register_buffer("signs", signs)

    def _keep_values(self, point: ChartPoint, dtype: torch.dtype, device: torch.device) -> None:
        super()._keep_values(point, dtype, device)
        if self.values is not None and has_values(self.values, point.signs):
            self.values.mul_(point.signs.to(dtype))

    def _make_chart(self) -> None:
        self.chart = HouseholderChart(self.shape, self.spectrum, self.bound, self.map.values)
        # torch.compile does not trace the lock that a cached property takes in Python 3.11.
        _ = self.chart.map, self.chart.is_full, self.chart.frame_sizes

    def _follow_values(self) -> None:
        super()._follow_values()
        if self.map.values != self.chart.values:
            self._make_chart()

    @staticmethod
    @explained
    def count(shape: TTShape, spectrum: str) -> int:
        """Numbers stored for a plan."""
        return shape.num_parameters(spectrum)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.coordinates.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.coordinates.device

    def _tensors(self) -> tuple[Tensor, ...]:
        vector = self._parameters.get("coordinates")
        if vector is None:
            # Pruned: what the hook computes before a forward, and layers do not call forward.
            for hook in self._forward_pre_hooks.values():
                if isinstance(hook, BasePruningMethod):
                    hook(self, ())
            vector = self.coordinates
        constant = self._constant
        return (vector,) if constant is None else (vector, constant)

    @property
    def _constant(self) -> Tensor | None:
        """A constant spectrum, which is not in the vector."""
        signs = self._buffers["signs"]  # an attribute of a module takes three times as long
        return self._buffers["values"] if signs is None else signs

    @cached_property
    def layout(self) -> Layout:
        """Frames in the order of the chain, then the spectrum; see the base class."""
        sizes = self.chart.frame_sizes
        starts = tuple(accumulate(sizes, initial=0))
        full = self.chart.is_full
        return Layout(
            self.shape.merged,
            batch_map(self.map),
            full,
            starts[:-1],
            sizes,
            starts[-1],
            self.chart.n_elements,
            self.map.is_constant,
        )

    def _value_of(self, tensors: Sequence[Tensor]) -> SpectralTT:
        wide = computing_dtype(tensors[0].dtype)
        point = self.chart.unflatten(tensors[0].to(wide))
        if in_onnx_export():
            raise ConversionError(
                "ONNX has no triangular solve, from which frames are made of coordinates; export "
                "stock layers, sm.nn.decompress(copy.deepcopy(model)), with form='factors' for two "
                "thin ones each"
            )
        if is_wanted():
            left, right = self.chart._cores_at_once(torch.cat(point.frames))
        else:
            left, right = self.chart.cores(point.frames)
        s = tensors[1].to(wide) if len(tensors) > 1 else self.map(point.spectrum)
        return SpectralTT(left, s, right, self.shape)

    def bond(self) -> Tensor:
        """The spectrum, or the full bond, without computing a frame; see the base class."""
        if self._constant is not None:
            return self._constant
        theta = self.coordinates[sum(self.chart.frame_sizes) :].view(self.map.coordinate_shape)
        return self.map(theta.to(computing_dtype(theta.dtype))).to(theta.dtype)

    @explained
    @torch.no_grad()
    def decay_(self, amount: float | Tensor) -> HouseholderWeight:
        r"""Take a step of weight decay, :math:`W \leftarrow (1 - a) W`, in place, by the spectrum.

        Exact for ``free`` and ``full`` spectra; of others, a step ``a`` along the gradient of
        :math:`\tfrac12 |W|_F^2`; nothing for a constant one.
        :func:`sttp_manifold.optim.decay_weights` does it in the steps of an optimizer.

        Args:
            amount: learning rate times decay.

        Shape:
            - amount: one number, where it is a tensor

        Returns:
            The module itself.
        """
        theta = self.coordinates[sum(self.chart.frame_sizes) :]
        if self.spectrum in ("free", "full"):
            theta.mul_(1 - amount)
        elif not self.map.is_constant:
            with torch.enable_grad():
                own = theta.to(computing_dtype(theta.dtype)).detach().clone().requires_grad_()
                energy = self.map(own.view(self.map.coordinate_shape)).square().sum() / 2
                (slope,) = torch.autograd.grad(energy, own)
            theta.sub_(amount * slope.to(theta.dtype))
        return self

    def _set(self, tt: SpectralTT, project: bool) -> None:
        point = self.chart.encode(tt, project=project)
        self.coordinates.copy_(self.chart.flatten(point))
        if self.signs is not None:
            self.signs.copy_(point.signs)
        if self.values is not None:
            self.values.copy_(torch.copysign(self.values, point.signs))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._join_former_keys(state_dict, prefix, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _wrong(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        wrong = super()._wrong(state_dict, prefix)
        if wrong is not None:
            return wrong
        key = prefix + "signs"
        signs = state_dict.get(key)
        if self.signs is None or not isinstance(signs, Tensor) or not has_values(signs):
            return None
        if bool((signs.abs() == 1).all()):
            return None
        return f"{key} are no signs: under spectrum='identity' each is 1 or -1"

    def _join_former_keys(
        self, state_dict: dict[str, Any], prefix: str, load: Sequence[str]
    ) -> None:
        """Join what an earlier version stored: ``frames.0``, ..., and the spectrum alone."""
        start, key = f"{prefix}frames.", f"{prefix}coordinates"
        numbers = (k.removeprefix(start) for k in state_dict if k.startswith(start))
        keys = [start + number for number in sorted(numbers, key=int)]
        spectrum = state_dict.get(key)
        if not keys and spectrum is None and f"{prefix}signs" in state_dict:
            state_dict[key] = self.coordinates.detach()[:0]  # none were stored if there are none
        if not keys and (spectrum is None or spectrum.ndim == 1):
            return
        former = [*keys, key] if key in state_dict else keys
        warn_once(
            load,
            f"joined {', '.join(map(repr, former))} of an older state to the one vector {key!r}; "
            "save the state anew to be rid of this warning",
        )
        state_dict[key] = torch.cat([state_dict.pop(k).flatten() for k in former])
