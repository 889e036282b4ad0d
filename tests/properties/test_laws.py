"""The laws of the package over random plans, ranks, spectra and seeds, in float64."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import bound_of, normal, seeds, shapes, spectra, weight

from sttp_manifold import FixedTTRankManifold, SpectralTTManifold, TTShape
from sttp_manifold.chart import ChartPoint, HouseholderChart
from sttp_manifold.frames import haar_frame, reduced_frame

small = shapes(max_modes=3, max_numel=200)


def coordinates(
    chart: HouseholderChart, seed: int, spectrum: torch.Tensor | None = None
) -> torch.Tensor:
    frames = normal(seed, sum(chart.frame_sizes))
    s = normal(seed + 1, *chart.map.coordinate_shape) if spectrum is None else spectrum
    return torch.cat([frames, s.flatten()])


def weight_of(chart: HouseholderChart, z: torch.Tensor) -> torch.Tensor:
    parts = z.split([*chart.frame_sizes, chart.shape.spectrum_size(chart.spectrum)])
    s = parts[-1].reshape(chart.map.coordinate_shape)
    ones = torch.ones(chart.shape.rank, dtype=z.dtype)
    return chart.decode(ChartPoint(tuple(parts[:-1]), s, ones)).to_matrix()


def jacobian_rank(chart: HouseholderChart, z: torch.Tensor) -> int:
    if not z.numel():
        return 0
    J = torch.autograd.functional.jacobian(lambda y: weight_of(chart, y).flatten(), z)
    # Equilibrated: columns of very different size would hide singular values that are not zero;
    # but a column of rounding errors stands for a zero.
    norms = J.norm(dim=0)
    J = torch.where(norms > 1e-12 * norms.max(), J / norms, 0.0)
    return int(torch.linalg.matrix_rank(J, rtol=1e-9))


@given(shape=shapes(max_modes=4), spectrum=spectra, seed=seeds)
def test_decoded_frames_are_orthonormal_and_the_spectrum_is_s(shape, spectrum, seed) -> None:
    chart = HouseholderChart(shape, spectrum)
    z = coordinates(chart, seed)
    parts = z.split([*chart.frame_sizes, shape.spectrum_size(spectrum)])
    s = parts[-1].reshape(chart.map.coordinate_shape)
    point = ChartPoint(tuple(parts[:-1]), s, torch.ones(shape.rank, dtype=z.dtype))
    tt = chart.decode(point)
    assert float(tt.orthonormality_error()) < 1e-12
    for frame in tt.frames():
        eye = torch.eye(shape.rank, dtype=z.dtype)
        torch.testing.assert_close(frame.mT @ frame, eye, rtol=0, atol=1e-12)
    values = chart.map(s) if spectrum != "identity" else torch.ones(shape.rank, dtype=z.dtype)
    expected = (
        torch.linalg.svdvals(values) if spectrum == "full" else values.abs().sort().values.flip(0)
    )
    torch.testing.assert_close(torch.linalg.svdvals(tt.to_matrix())[: shape.rank], expected)


@given(shape=small, spectrum=spectra, seed=seeds)
def test_the_jacobian_has_the_rank_of_the_dimension(shape, spectrum, seed) -> None:
    """Stored = rank = dimension, but for the normalized spectrum, which stores one too many."""
    chart = HouseholderChart(shape, spectrum, bound=bound_of(spectrum, 3.0))
    z = coordinates(chart, seed)
    rank = jacobian_rank(chart, z)
    assert rank == shape.dim(spectrum)
    assert z.numel() - rank == (spectrum == "normalized")


@given(shape=small, seed=seeds)
def test_coinciding_singular_values_cost_the_free_chart_its_rank(shape, seed) -> None:
    """At s = 1 the Jacobian loses r (r - 1) / 2; a full bond is regular there."""
    r = shape.rank
    free, full = HouseholderChart(shape, "free"), HouseholderChart(shape, "full")
    ones = torch.ones(r, dtype=torch.float64)
    assert jacobian_rank(free, coordinates(free, seed, ones)) == shape.dim() - r * (r - 1) // 2
    assert jacobian_rank(full, coordinates(full, seed, torch.diag(ones))) == shape.dim()


@given(seed=seeds, multiplicity=st.integers(1, 4))
def test_each_group_of_equal_singular_values_costs_its_rotations(seed, multiplicity) -> None:
    shape = TTShape((3, 3), (3, 3), rank=4)
    chart = HouseholderChart(shape, "free")
    s = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    s[:multiplicity] = 1.0
    lost = multiplicity * (multiplicity - 1) // 2
    assert jacobian_rank(chart, coordinates(chart, seed, s)) == shape.dim() - lost


@given(shape=small, seed=seeds, levels=st.integers(1, 4))
def test_fixed_values_that_coincide_are_redundant_by_their_rotations(shape, seed, levels) -> None:
    """Chart and product: as many too many as rotations, and the dimension of fixed TT rank."""
    values = [1.0 + 0.5 * (i % levels) for i in range(shape.rank)]
    chart = HouseholderChart(shape, "fixed", values=values)
    groups = [values.count(v) for v in set(values)]
    redundant = sum(m * (m - 1) // 2 for m in groups)
    assert jacobian_rank(chart, coordinates(chart, seed)) == shape.dim("fixed", values)
    assert chart.n_elements - redundant == shape.dim("fixed", values)
    assert shape.dim("fixed", values) == FixedTTRankManifold(shape, values).dim
    M = SpectralTTManifold(shape, "fixed", values=values)
    x = M.random(dtype=torch.float64)
    basis = torch.eye(M.n_elements, dtype=torch.float64)
    vertical = M.vertical(x, M.proju(x, basis))
    assert M.total_dim - M.gauge_dim == M.dim == shape.dim("fixed", values)
    assert int(torch.linalg.matrix_rank(vertical, rtol=1e-7)) == M.gauge_dim


@given(shape=shapes(max_modes=4), spectrum=spectra, seed=seeds)
def test_chart_and_manifold_hold_the_same_weights(shape, spectrum, seed) -> None:
    chart = HouseholderChart(shape, spectrum, bound=bound_of(spectrum))
    M = SpectralTTManifold(shape, spectrum, bound=bound_of(spectrum))
    tt = weight(shape, spectrum, seed)
    through = M.unpack(M.pack(chart.decode(chart.encode(tt))))
    assert through.allclose(tt)
    back = chart.decode(chart.encode(M.unpack(M.pack(tt))))
    torch.testing.assert_close(back.to_matrix(), tt.to_matrix(), rtol=1e-9, atol=1e-9)


@given(shape=shapes(), spectrum=spectra, seed=seeds)
def test_gradients_are_horizontal_by_themselves(shape, spectrum, seed) -> None:
    """For a cost of the weight alone, the Riemannian gradient has no vertical part."""
    M = SpectralTTManifold(shape, spectrum, bound=bound_of(spectrum))
    x = M.pack(weight(shape, spectrum, seed)).requires_grad_()
    target, mask = (
        normal(seed + 1, shape.d_out, shape.d_in),
        normal(seed + 2, shape.d_out, shape.d_in),
    )
    cost = (mask * (M.unpack(x).to_matrix() - target)).square().sum()
    (gradient,) = torch.autograd.grad(cost, x)
    gradient = M.egrad2rgrad(x, gradient).detach()
    vertical = M.vertical(x.detach(), gradient)
    assert float(vertical.norm()) <= 1e-9 * (1 + float(gradient.norm()))


@given(shape=small, seed=seeds)
def test_a_generic_direction_of_the_total_space_is_not_horizontal(shape, seed) -> None:
    """The law above would hold emptily if nothing were vertical."""
    M = SpectralTTManifold(shape)
    x = M.pack(weight(shape, "free", seed))
    u = M.proju(x, normal(seed, M.n_elements))
    is_vertical_somewhere = float(M.vertical(x, u).norm()) > 1e-6
    assert is_vertical_somewhere == (M.gauge_dim > 0)


def test_the_reduced_chart_covers_each_subspace_twice_to_the_rank() -> None:
    """For r = 1 the two reflectors of a line: q and -q, both in the image, far apart."""
    q = haar_frame(4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    preimages = [sign * q[1:, 0] / (sign * q[0, 0] - 1) for sign in (1, -1)]
    frames = [reduced_frame(b, 4, 1) for b in preimages]
    torch.testing.assert_close(frames[0], q)
    torch.testing.assert_close(frames[1], -q)
    assert float((preimages[0] - preimages[1]).norm()) > 0.1
