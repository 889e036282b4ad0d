"""The chart of a whole weight: encode and decode, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import batches, bound_of, seeds, shapes, spectra, weight

from sttp_manifold import SpectralTT, TTShape
from sttp_manifold.chart import HouseholderChart
from sttp_manifold.errors import ShapeError, SpectrumError


@given(shape=shapes(max_modes=4), spectrum=spectra, seed=seeds, batch=batches)
def test_encode_then_decode_is_the_identity(shape, spectrum, seed, batch) -> None:
    chart = HouseholderChart(shape, spectrum, bound=bound_of(spectrum))
    tt = weight(shape, spectrum, seed, batch)
    point = chart.encode(tt)
    assert tuple(f.shape[-1] for f in point.frames) == chart.frame_sizes
    assert point.spectrum.shape == (*batch, *chart.map.coordinate_shape)
    assert sum(chart.frame_sizes) + shape.spectrum_size(spectrum) == shape.num_parameters(spectrum)
    decoded = chart.decode(point)
    assert decoded.allclose(tt)
    assert all(float(f.abs().max()) <= 2**0.5 + 1e-9 for f in point.frames if f.numel())
    again = chart.encode(decoded)
    for p, q in zip(point.frames, again.frames, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-7)


@given(shape=shapes(max_modes=4), spectrum=spectra, seed=seeds, batch=batches)
def test_pack_then_unpack_is_the_identity(shape, spectrum, seed, batch) -> None:
    """The two verbs of the manifolds; signs of an identity spectrum are taken up by a frame."""
    chart = HouseholderChart(shape, spectrum, bound=bound_of(spectrum))
    tt = weight(shape, spectrum, seed, batch)
    d, r = shape.merged.frame_shapes[len(shape.merged.out_modes) - 1]
    e, _ = shape.merged.frame_shapes[len(shape.merged.out_modes)]
    signs = chart.encode(tt).signs
    if (spectrum == "identity" and d == r and bool((signs < 0).any())) or (
        spectrum == "fixed" and d == r == e and bool((signs.prod(-1) < 0).any())
    ):
        with pytest.raises(ShapeError, match=r"encode\(tt\)"):
            chart.pack(tt)
        return
    z = chart.pack(tt)
    assert z.shape == (*batch, chart.n_elements)
    assert chart.unpack(z).allclose(tt, rtol=1e-6)


def test_signs_come_along_where_the_vector_cannot_hold_the_weight() -> None:
    """Where a column of the left frame is that of the truncated identity, up to sign."""
    shape = TTShape.svd(6, 5, rank=3)
    chart = HouseholderChart(shape, "identity")
    left, right = torch.eye(6, 3, dtype=torch.float64), torch.eye(3, 5, dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    tt = SpectralTT((left[None],), ones, (right[..., None],), shape)
    with pytest.raises(ShapeError, match=r"encode\(tt\)"):
        chart.pack(SpectralTT((-left[None],), ones, (right[..., None],), shape))
    for value in (tt, SpectralTT((-left[None],), ones, (right[..., None],), shape)):
        point = chart.encode(value)
        assert chart.unpack(chart.flatten(point), point.signs).allclose(value)


def test_which_cores_are_full() -> None:
    shape = TTShape((4, 4, 4), (4, 4), rank=3)
    centre = {
        "free": (1, 1),
        "normalized": (1, 1),
        "bounded": (1, 1),
        "identity": (0, 1),
        "full": (0, 0),
        "fixed": (1, 1),
    }
    for spectrum, (left, right) in centre.items():
        flags = HouseholderChart(shape, spectrum).is_full
        assert flags == (False, False, bool(left), bool(right), False)


def test_what_cannot_be_encoded() -> None:
    shape = TTShape.for_matrix(8, 6, rank=3)
    chart = HouseholderChart(shape, "identity")
    with pytest.raises(ShapeError, match="tt_svd"):
        chart.encode(weight(TTShape.for_matrix(8, 6, rank=2), "identity", 0))
    free = weight(shape, "free", 0)
    with pytest.raises(SpectrumError, match="project=True"):
        chart.encode(free)
    projected = chart.decode(chart.encode(free, project=True))
    torch.testing.assert_close(projected.singular_values(), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_both_dtypes(dtype) -> None:
    shape = TTShape.for_conv((32, 16, 3, 3), rank=8)
    tt = weight(shape, "free", 5).to(dtype)
    chart = HouseholderChart(shape)
    decoded = chart.decode(chart.encode(tt))
    assert decoded.dtype == dtype
    assert float(decoded.distance(tt)) < 30 * torch.finfo(dtype).eps * float(tt.norm())
