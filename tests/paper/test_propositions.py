"""One test for each proposition and equation of the paper that the package rests on.

Obukhov et al., Spectral Tensor Train Parameterization of Deep Learning Layers, AISTATS 2021.
The published counts are in test_counts.py.
"""

from __future__ import annotations

import torch
from hypothesis import given
from strategies import normal, seeds, shapes, spectra

from sttp_manifold import SpectralTT, TTShape, tt_svd
from sttp_manifold.chart import ChartPoint, HouseholderChart
from sttp_manifold.frames import (
    full_frame,
    full_size,
    haar_frame,
    random_rotation,
    reduced_size,
    rotate,
)
from sttp_manifold.spectrum import SpectrumMap


def haar_chain(shape: TTShape, seed: int) -> SpectralTT:
    """Cores made of independent random frames, with a random spectrum."""
    generator = torch.Generator().manual_seed(seed)
    plan = shape.merged
    frames = [
        haar_frame(d, r, dtype=torch.float64, generator=generator) for d, r in plan.frame_shapes
    ]
    split = len(plan.out_modes)
    left = [f.unflatten(0, c[:2]) for f, c in zip(frames, plan.left_core_shapes, strict=False)]
    right = [
        f.mT.unflatten(1, c[1:])
        for f, c in zip(frames[split:], plan.right_core_shapes, strict=True)
    ]
    return SpectralTT(left, normal(seed, plan.rank), right, shape)


@given(shape=shapes(max_modes=4), seed=seeds)
def test_proposition_1_orthonormal_cores_make_orthonormal_frames(shape, seed) -> None:
    tt = haar_chain(shape, seed)
    eye = torch.eye(shape.rank, dtype=torch.float64)
    for frame in tt.frames():
        torch.testing.assert_close(frame.mT @ frame, eye, rtol=0, atol=1e-12)
    singular = torch.linalg.svdvals(tt.to_matrix())[: shape.rank]
    torch.testing.assert_close(singular, tt.spectrum.abs().sort(descending=True).values)


@given(shape=shapes(max_modes=4), seed=seeds)
def test_proposition_2_gauge_freedom(shape, seed) -> None:
    """Rotating both sides of any inner bond leaves W, and changes the cores."""
    tt = haar_chain(shape, seed)
    torch.manual_seed(seed)
    left = [random_rotation(c.shape[-1], dtype=torch.float64) for c in tt.left[:-1]]
    right = [random_rotation(c.shape[-1], dtype=torch.float64) for c in tt.right[:-1]]
    turned = rotate(tt, left, right)
    torch.testing.assert_close(turned.to_matrix(), tt.to_matrix())
    if any(q.shape[-1] > 1 for q in left):
        moved = sum(float((a - b).norm()) for a, b in zip(tt.left, turned.left, strict=True))
        assert moved > 1e-3


@given(shape=shapes(max_modes=4), seed=seeds)
def test_tensor_train_of_a_matrix(shape, seed) -> None:
    """Eq. of the TT format: every entry is a product of core slices, one for each mode."""
    tt = haar_chain(shape, seed)
    plan = shape.merged
    generator = torch.Generator().manual_seed(seed)
    i = [int(torch.randint(n, (1,), generator=generator)) for n in plan.out_modes]
    j = [int(torch.randint(m, (1,), generator=generator)) for m in plan.in_modes]
    product = torch.eye(1, dtype=torch.float64)
    for core, index in zip(tt.left, i, strict=True):
        product = product @ core[:, index]
    product = product * tt.spectrum
    for core, index in zip(tt.right, j, strict=True):
        product = product @ core[:, index]
    row = col = 0
    for index, size in zip(i, plan.out_modes, strict=True):
        row = row * size + index
    for index, size in zip(j, plan.in_modes, strict=True):
        col = col * size + index
    torch.testing.assert_close(product[0, 0], tt.to_matrix()[row, col])


@given(seed=seeds)
def test_section_3_2_householder_products(seed) -> None:
    """Sec. 3.2: the frame is the leading columns of H_1 ... H_r, reflectors with unit diagonal."""
    d, r = 6, 3
    p = normal(seed, full_size(d, r))
    Y = torch.eye(d, r, dtype=torch.float64)
    rows, columns = torch.tril_indices(r, r, -1)
    Y[rows, columns] = p[: len(rows)]
    Y[r:] = p[len(rows) :].reshape(d - r, r)
    product = torch.eye(d, dtype=torch.float64)
    for y in Y.T:
        product = product @ (torch.eye(d, dtype=torch.float64) - 2 * torch.outer(y, y) / (y @ y))
    torch.testing.assert_close(full_frame(p, d, r), product[:, :r])


@given(shape=shapes(max_modes=4), spectrum=spectra)
def test_section_3_3_parameters_of_the_cores(shape, spectrum) -> None:
    """Sec. 3.3: reduced cores but the two beside the spectrum; identity reduces one of them."""
    plan = shape.merged
    chart = HouseholderChart(shape, spectrum)
    centre = len(plan.out_modes)
    full = {"identity": {centre}, "full": set()}.get(spectrum, {centre - 1, centre})
    for k, (d, r) in enumerate(plan.frame_shapes):
        expected = full_size(d, r) if k in full else reduced_size(d, r)
        assert chart.frame_sizes[k] == expected
    stored = sum(chart.frame_sizes) + shape.spectrum_size(spectrum)
    assert stored == shape.num_parameters(spectrum)


@given(shape=shapes(), seed=seeds)
def test_section_3_4_lipschitz_normalization(shape, seed) -> None:
    """Sec. 3.4: the spectrum over its largest entry makes the matrix exactly 1-Lipschitz."""
    tt = tt_svd(normal(seed, shape.d_out, shape.d_in), shape)
    s = SpectrumMap("normalized", shape.rank)(normal(seed + 1, shape.rank))
    norm = torch.linalg.matrix_norm(SpectralTT(tt.left, s, tt.right, shape).to_matrix(), 2)
    torch.testing.assert_close(norm, torch.ones_like(norm))


def test_the_matrix_norm_of_a_kernel_is_not_the_norm_of_the_convolution() -> None:
    """A (16,16,3,3) kernel with unit singular values at the default start has circular norm 3."""
    shape = TTShape.for_conv((16, 16, 3, 3), rank=16)
    chart = HouseholderChart(shape, "identity")
    frames = tuple(torch.zeros(n, dtype=torch.float64) for n in chart.frame_sizes)
    ones = torch.ones(16, dtype=torch.float64)
    W = chart.decode(ChartPoint(frames, ones[:0], ones)).to_matrix()
    torch.testing.assert_close(torch.linalg.matrix_norm(W, 2), ones[0])
    # Circular convolution is diagonal in frequency: one 16 x 16 matrix for each.
    transfer = torch.fft.fft2(W.reshape(16, 16, 3, 3), s=(32, 32)).permute(2, 3, 0, 1)
    assert abs(float(torch.linalg.matrix_norm(transfer, 2).max()) - 3.0) < 1e-6
