"""What the property tests draw: plans, spectra, batches, seeds, and weights made from them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from sttp_manifold import SpectralTT, TTShape, tt_svd
from sttp_manifold.spectrum import SpectrumMap
from sttp_manifold.tt import SPECTRA

spectra = st.sampled_from(SPECTRA)
seeds = st.integers(0, 2**31 - 1)
batches = st.sampled_from([(), (2,), (2, 1)])


@st.composite
def shapes(draw: st.DrawFn, max_modes: int = 3, max_numel: int = 600) -> TTShape:
    """Plans with one to ``max_modes`` modes a side, modes of one among them, any rank."""
    modes = st.lists(st.integers(1, 5), min_size=1, max_size=max_modes)
    plan = TTShape(draw(modes), draw(modes), rank=draw(st.integers(1, 7)))
    if plan.numel > max_numel:
        plan = TTShape(plan.out_modes[:2], plan.in_modes[:2], rank=plan.rank)
    return plan


def normal(seed: int, *size: int) -> Tensor:
    """Standard normal numbers in float64, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, dtype=torch.float64, generator=generator)


def bound_of(spectrum: str, bound: float = 2.0) -> float:
    """A bound for a spectrum that has one, and the neutral one for the others."""
    return bound if spectrum == "bounded" else 1.0


def weight(shape: TTShape, spectrum: str, seed: int, batch: tuple[int, ...] = ()) -> SpectralTT:
    """A generic weight that ``spectrum`` can hold: frames of a random matrix, random spectrum.

    An identity spectrum gets random signs: its singular values are one all the same.
    """
    tt = tt_svd(normal(seed, *batch, shape.d_out, shape.d_in), shape)
    spectrum_map = SpectrumMap(spectrum, shape.rank, bound_of(spectrum))
    s = spectrum_map(normal(seed + 1, *batch, *spectrum_map.coordinate_shape))
    if spectrum == "identity":
        s = normal(seed + 1, *batch, shape.rank).sign()
    return SpectralTT(tt.left, s, tt.right, shape)
