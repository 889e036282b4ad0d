"""Spectrum maps, their inverses, and penalties with finite gradients everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, bound_of, normal, seeds, spectra, weight

from sttp_manifold import SpectralTT, TTShape
from sttp_manifold.errors import ShapeError, SpectrumError
from sttp_manifold.spectrum import PENALTIES, SpectrumMap, d_optimal, divergence, hold_spectrum
from sttp_manifold.spectrum import spectrum_map as by_name
from sttp_manifold.tt import SPECTRA

ranks = st.integers(1, 6)


@given(name=spectra, rank=ranks, seed=seeds, batch=batches)
def test_inverse(name, rank, seed, batch) -> None:
    chart = SpectrumMap(name, rank, bound=bound_of(name))
    s = chart(normal(seed, *batch, *chart.coordinate_shape))
    assert s.shape == (*batch, *((rank, rank) if name == "full" else (rank,)))
    torch.testing.assert_close(chart(chart.inverse(s)), s)
    torch.testing.assert_close(chart.nearest(s), s, rtol=1e-3, atol=0)
    assert chart.initial(*batch).shape == (*batch, *chart.coordinate_shape)


@given(rank=ranks, seed=seeds, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_bounds_hold_and_signs_stay(rank, seed, scale) -> None:
    theta = scale * normal(seed, rank)
    for name, bound in (("normalized", 1.0), ("bounded", 1.5)):
        s = SpectrumMap(name, rank, bound=bound_of(name, 1.5))(theta)
        assert bool((s.abs() <= bound).all())
        assert bool((s.sign() == theta.sign()).all())
    assert float(SpectrumMap("normalized", rank)(theta).abs().max()) == pytest.approx(1)


@given(rank=ranks, seed=seeds)
def test_bounded_is_smooth_and_one_to_one(rank, seed) -> None:
    chart = SpectrumMap("bounded", rank, bound=0.7)
    theta = normal(seed, rank).requires_grad_()
    assert torch.autograd.gradgradcheck(chart, (theta,))
    jacobian = torch.autograd.functional.jacobian(chart, theta)
    assert torch.linalg.matrix_rank(jacobian) == rank


@pytest.mark.parametrize(
    ("name", "s", "nearest"),
    [
        ("identity", [2.0, -0.5, 0.0], [1.0, -1.0, 1.0]),
        ("normalized", [3.0, -2.0, 0.5], [1.0, -1.0, 0.5]),
        ("normalized", [0.2, -0.6, 0.1], [0.2, -1.0, 0.1]),
        ("bounded", [3.0, -0.5, 0.0], [1.998, -0.5, 0.0]),
        ("free", [3.0, -0.5, 0.0], [3.0, -0.5, 0.0]),
        ("fixed", [0.1, -4.0, 0.2], [1 / 3, -1.0, 2 / 3]),
    ],
)
def test_projection_is_the_nearest_and_asked_for(name, s, nearest) -> None:
    chart = SpectrumMap(name, 3, bound=bound_of(name))
    s, nearest = torch.tensor(s), torch.tensor(nearest)
    torch.testing.assert_close(chart.nearest(s), nearest)
    if name == "free":
        return
    with pytest.raises(SpectrumError, match="pass project=True"):
        chart.inverse(s)
    held = chart(chart.inverse(s, project=True))
    if chart.is_constant:  # signs and order are left to the caller
        held, nearest = held.sort().values, nearest.abs().sort().values
    torch.testing.assert_close(held, nearest)


@pytest.mark.parametrize("name", ["identity", "normalized", "bounded", "free", "full", "fixed"])
def test_a_spectrum_that_is_not_finite_is_refused(name) -> None:
    chart = SpectrumMap(name, 2)
    bad = torch.full((2, 2) if name == "full" else (2,), torch.nan)
    with pytest.raises(SpectrumError):
        chart.inverse(bad)

    good = torch.eye(2) if name == "full" else torch.ones(2)
    for number in (torch.nan, torch.inf):
        bad = good * number if name != "full" else good.fill_diagonal_(number)
        for project in (False, True):
            with pytest.raises(SpectrumError, match="not finite"):
                chart.inverse(bad, project=project)


@pytest.mark.parametrize("part", ["left", "spectrum", "right"])
@pytest.mark.parametrize("name", ["free", "full"])
def test_a_weight_that_is_not_finite_is_not_held(name, part) -> None:
    tt = weight(TTShape.for_matrix(6, 8, rank=3), "free", 0)
    parts = {"left": tt.left, "spectrum": tt.spectrum, "right": tt.right}
    bad = parts[part][0] * torch.nan if part != "spectrum" else tt.spectrum * torch.nan
    parts[part] = (bad, *parts[part][1:]) if part != "spectrum" else bad
    with pytest.raises(SpectrumError, match="not finite"):
        hold_spectrum(SpectralTT(**parts, shape=tt.shape), SpectrumMap(name, 3), project=True)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan"), True, "2", None])
def test_bounds_that_are_none(bound) -> None:
    with pytest.raises(SpectrumError, match="positive finite number"):
        SpectrumMap("bounded", 2, bound=bound)
    assert by_name("bounded", 2, 3.0).bound == 3.0


@pytest.mark.parametrize("name", SPECTRA)
def test_coordinates_of_another_shape_are_refused(name) -> None:
    """A single number would broadcast to all singular values."""
    chart = SpectrumMap(name, 3)
    for size in ((1,), (4,), (), (3, 1)):
        if size[-len(chart.coordinate_shape) :] == chart.coordinate_shape:
            continue
        with pytest.raises(ShapeError, match="coordinates of spectrum"):
            chart(torch.ones(size))
        with pytest.raises(ShapeError, match="singular values of spectrum"):
            chart.inverse(torch.ones(size))
    with pytest.raises(ShapeError, match="rank of a spectrum"):
        SpectrumMap(name, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["normalized", "bounded"])
def test_maps_over_the_whole_range_of_a_dtype(name, dtype) -> None:
    info = torch.finfo(dtype)
    chart = SpectrumMap(name, 3, bound=bound_of(name))
    for largest in (info.max, info.max**0.5 * 2, 1.0, 1e-4):
        theta = torch.tensor([largest, -largest / 2, 0.0], dtype=dtype)
        s, wanted = chart(theta), chart(theta.double())
        torch.testing.assert_close(s.double(), wanted, rtol=4 * info.eps, atol=0)
        assert s.dtype == dtype
    assert not chart(torch.zeros(3, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@given(seed=seeds, rank=ranks, scale=st.sampled_from([0.2, 1.0, 50.0]))
def test_penalties_of_half_precision_are_those_of_the_rounded_numbers(
    dtype, seed, rank, scale
) -> None:
    s = (scale * normal(seed, rank)).to(dtype).requires_grad_()
    for penalty in PENALTIES.values():
        eps = 64 / torch.finfo(torch.float16).max if dtype == torch.float16 else 1e-6
        found, wanted = penalty(s), penalty(s.detach().double(), eps)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(found, s)
        assert gradient.dtype == dtype
        assert bool(gradient.isfinite().all())


def test_hold_brings_a_weight_to_the_form_of_the_map() -> None:
    shape = TTShape.for_matrix(6, 8, rank=3)
    full, free = weight(shape, "full", 1, (2,)), weight(shape, "free", 1, (2,))
    as_vector = hold_spectrum(full, SpectrumMap("free", 3))
    assert not as_vector.is_full
    assert as_vector.allclose(full)
    assert hold_spectrum(free, SpectrumMap("full", 3)).is_full
    assert hold_spectrum(free, SpectrumMap("full", 3)).allclose(free)
    polar = hold_spectrum(full, SpectrumMap("identity", 3), project=True)
    torch.testing.assert_close(polar.singular_values(), torch.ones(2, 3, dtype=torch.float64))
    # No weight with unit singular values on these frames is nearer.
    expected = (torch.linalg.svdvals(full.spectrum) - 1).norm(dim=-1)
    torch.testing.assert_close(polar.distance(full), expected)


@given(rank=st.integers(2, 6), seed=seeds, batch=batches)
def test_penalties_by_their_definitions(rank, seed, batch) -> None:
    s = normal(seed, *batch, rank)
    relative = (s.abs() / s.abs().amax(-1, keepdim=True)).sort(-1, descending=True).values
    torch.testing.assert_close(d_optimal(s, eps=0.0), -relative.log().mean(-1))
    gaps = relative[..., :-1] - relative[..., 1:]
    expected = -((rank - 1) * gaps).log().mean(-1)
    torch.testing.assert_close(divergence(s, eps=0.0), expected)
    assert bool((divergence(s) > -1e-9).all())
    for penalty in PENALTIES.values():
        torch.testing.assert_close(penalty(-3.0 * s), penalty(s), rtol=1e-6, atol=1e-9)


def test_penalties_are_smallest_where_they_should_be() -> None:
    assert float(d_optimal(torch.ones(5).double())) == pytest.approx(0, abs=1e-11)
    assert float(divergence(torch.linspace(0, 1, 5).double())) == pytest.approx(0, abs=1e-11)
    assert float(divergence(torch.tensor([4.0]))) == 0


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize(
    "s",
    [[0.0, 0.0, 0.0], [1.0, 0.0, 0.5], [1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.0, -1.0, 0.0], [3.0]],
)
def test_penalties_are_finite_at_zero_and_at_ties(penalty, dtype, s) -> None:
    theta = torch.tensor(s, dtype=dtype, requires_grad=True)
    value = penalty(theta)
    (gradient,) = torch.autograd.grad(value, theta)
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())
