"""Where a weight starts: names of initial values, and their coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sttp_manifold.chart import ChartPoint, HouseholderChart
from sttp_manifold.errors import ShapeError, SpectrumError
from sttp_manifold.frames.gauge import haar_frame
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.tt.precision import computing_dtype
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["INITS", "initial_point", "kept_values", "kind_of"]

INITS = ("eye", "noisy_eye", "random")
"""Names of the initial values; a :class:`~sttp_manifold.SpectralTT` is accepted as well."""


def initial_point(
    chart: HouseholderChart,
    init: str | SpectralTT,
    init_std: float,
    dtype: torch.dtype,
    device: torch.device,
) -> ChartPoint:
    """Coordinates to start from; for a value, any that can be overwritten.

    Raises:
        ShapeError: an unknown ``init``.
    """
    if not isinstance(init, SpectralTT) and init not in INITS:
        raise ShapeError(
            f"unknown init {init!r}; expected one of {', '.join(map(repr, INITS))}, or a "
            "SpectralTT such as tt_svd(W, shape)"
        )
    dtype = computing_dtype(dtype)
    plan, r = chart.shape.merged, chart.shape.rank
    spectrum = chart.map.initial(dtype=dtype, device=device)
    if init == "random" and has_values(spectrum):
        left, right = [], []
        for k, ((a, mode, b), (d, rank)) in enumerate(
            zip(plan.core_shapes, plan.frame_shapes, strict=True)
        ):
            frame = haar_frame(d, rank, dtype=dtype, device=device)
            if k < len(plan.out_modes):
                left.append(frame.unflatten(-2, (a, mode)))
            else:
                right.append(frame.mT.unflatten(-1, (mode, b)))
        s = chart.map(spectrum)
        return chart.encode(SpectralTT(tuple(left), s, tuple(right), chart.shape))
    std = init_std if init == "noisy_eye" else 0.0
    frames = tuple(
        std * torch.randn(size, dtype=dtype, device=device)
        if std
        else torch.zeros(size, dtype=dtype, device=device)
        for size in chart.frame_sizes
    )
    return ChartPoint(frames, spectrum, torch.ones(r, dtype=dtype, device=device))


def kept_values(
    shape: TTShape, spectrum: str, init: object, values: Sequence[float] | None
) -> Sequence[float] | None:
    """Singular values of a fixed spectrum: those given, or those of the value to start from."""
    if spectrum != "fixed" or values is not None or not isinstance(init, SpectralTT):
        return values
    if init.shape.merged != shape.merged or init.batch_shape:
        return None
    found = init.detach().to(torch.float64).singular_values()
    if not has_values(found):
        return None
    if not bool((found > 0).all()) or not bool(found.isfinite().all()):
        raise SpectrumError(
            "spectrum='fixed' keeps the singular values of the weight, which have to be positive "
            f"and finite: they are from {float(found.min()):.3g} to {float(found.max()):.3g}; take "
            "a lower rank, or values=[...] with project=True"
        )
    kept: list[float] = found.tolist()
    return kept


def kind_of(
    init: str | SpectralTT, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype, torch.device]:
    """Dtype and device asked for, or those of the value, or torch's defaults."""
    if isinstance(init, SpectralTT):
        return dtype or init.dtype, torch.device(init.device if device is None else device)
    if device is None:
        device = torch.get_default_device()
    return dtype or torch.get_default_dtype(), torch.device(device)
