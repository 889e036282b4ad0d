"""The value: products against the dense weight, equality up to gauge, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, normal, seeds, shapes, spectra, weight

from sttp_manifold import SpectralTT, TTShape, tt_svd
from sttp_manifold.errors import ShapeError
from sttp_manifold.frames import haar_frame, random_rotation, rotate
from sttp_manifold.tt.plans import linear_plan

INTEGERS = [
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.int8, torch.int16, torch.int32, torch.int64,
]  # fmt: skip


def dense(tt: SpectralTT) -> torch.Tensor:
    """The definition, by einsum over one multi-index after another."""
    batch = tt.batch_shape
    u = torch.ones(*batch, 1, 1, dtype=tt.dtype)
    for core in tt.left:
        u = torch.einsum("...xr,...rns->...xns", u, core).flatten(-3, -2)
    vt = torch.ones(*batch, 1, 1, dtype=tt.dtype)
    for core in reversed(tt.right):
        vt = torch.einsum("...rms,...sy->...rmy", core, vt).flatten(-2)
    return u @ tt.bond @ vt


@given(shape=shapes(), spectrum=spectra, seed=seeds, batch=batches)
def test_to_matrix_and_spectrum(shape, spectrum, seed, batch) -> None:
    tt = weight(shape, spectrum, seed, batch)
    W = tt.to_matrix()
    torch.testing.assert_close(W, dense(tt))
    torch.testing.assert_close(tt.singular_values(), torch.linalg.svdvals(W)[..., : shape.rank])
    torch.testing.assert_close(tt.norm(), torch.linalg.matrix_norm(W))


@given(
    shape=shapes(),
    spectrum=spectra,
    seed=seeds,
    batch=batches,
    lead=st.sampled_from([(), (3,), (2, 3)]),
)
def test_products_by_every_plan(shape, spectrum, seed, batch, lead) -> None:
    tt = weight(shape, spectrum, seed, batch)
    W = dense(tt)
    x, y = normal(seed, *batch, *lead, shape.d_in), normal(seed, *batch, *lead, shape.d_out)
    rows_x, rows_y = x.reshape(*batch, -1, shape.d_in), y.reshape(*batch, -1, shape.d_out)
    torch.testing.assert_close(tt.matvec(x).reshape(*batch, -1, shape.d_out), rows_x @ W.mT)
    torch.testing.assert_close(tt.rmatvec(y).reshape(*batch, -1, shape.d_in), rows_y @ W)
    for plan in ("dense", "lowrank", "cores"):
        torch.testing.assert_close(tt._rows_times_wt(rows_x, plan), rows_x @ W.mT)
        torch.testing.assert_close(tt._rows_times_w(rows_y, plan), rows_y @ W)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("given_shape", [True, False])
def test_compiled_from_cores(dynamic, batch, given_shape) -> None:
    """A plan that is made while it is traced, too."""
    shape = TTShape.for_matrix(64, 48, rank=8)
    tt = weight(shape, "free", 0, batch)
    split, tensors = len(tt.left), (*tt.left, tt.spectrum, *tt.right)
    x = normal(1, *batch, 7, 48)

    def products(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plan = {"shape": shape} if given_shape else {}
        again = SpectralTT(tensors[:split], tensors[split], tensors[split + 1 :], **plan)
        return again.to_matrix(), again.matvec(x)

    torch._dynamo.reset()
    compiled = torch.compile(products, fullgraph=True, dynamic=dynamic, backend="eager")
    torch.testing.assert_close(compiled(*tensors), products(*tensors))


@given(
    shape=shapes(max_modes=4), spectrum=spectra, seed=seeds, batch=batches,
    kind=st.sampled_from(INTEGERS),
)  # fmt: skip
def test_entries(shape, spectrum, seed, batch, kind) -> None:
    """By every integer dtype, of any number of places, from both ends, as torch indexes."""
    tt, generator = weight(shape, spectrum, seed, batch), torch.Generator().manual_seed(seed)
    held = torch.iinfo(kind)
    # A chain for each place where they are few, rows of the whole frames where they are many.
    for count in ((), (0,), (1,), (3,), (2, 2), (shape.d_out,), (shape.numel,)):
        i, j = (
            torch.randint(max(-d, held.min), min(d, held.max), count, generator=generator)
            for d in (shape.d_out, shape.d_in)
        )
        found = tt.entries(i.to(kind), j.to(kind))
        assert found.shape == (*batch, *count)
        torch.testing.assert_close(found, dense(tt)[..., i, j])


def test_small_integers_are_places_and_no_mask() -> None:
    """To torch, a uint8 index of as many places as rows is a mask."""
    shape = TTShape.for_matrix(24, 24, rank=4)
    for tt in (weight(shape, "free", 0), weight(shape, "full", 0, (2,))):
        i, j = torch.arange(24).flip(0), torch.arange(24) % 5
        for kind in INTEGERS:
            torch.testing.assert_close(tt.entries(i.to(kind), j.to(kind)), dense(tt)[..., i, j])
            torch.testing.assert_close(tt.entries(i, j.to(kind)), dense(tt)[..., i, j])
        found = tt.entries(i.tolist(), np.asarray(j, dtype=np.uint16))
        torch.testing.assert_close(found, dense(tt)[..., i, j])


def test_entries_without_numbers() -> None:
    tt = weight(TTShape.for_matrix(6, 4, rank=2), "free", 0).to("meta")
    assert tt.entries(torch.tensor([1, 2]), torch.tensor([0, 3])).shape == (2,)


@given(shape=shapes(), spectrum=spectra, seed=seeds, batch=batches)
def test_distance_is_the_frobenius_one(shape, spectrum, seed, batch) -> None:
    a, b = weight(shape, spectrum, seed, batch), weight(shape, "free", seed + 7, batch)
    expected = torch.linalg.matrix_norm(a.to_matrix() - b.to_matrix())
    torch.testing.assert_close(a.distance(b), expected)
    other_modes = tt_svd(b.to_matrix(), TTShape.svd(shape.d_out, shape.d_in, shape.rank))
    torch.testing.assert_close(a.distance(other_modes), expected)
    assert a.allclose(a.clone())
    assert a.allclose(b) == bool((expected < 1e-9).all())


@given(shape=shapes(), seed=seeds)
def test_distance_sees_small_differences(shape, seed) -> None:
    """Not through squared norms: 1e-12 is seen at norm one, where they would see 1e-8."""
    tt = weight(shape, "identity", seed)
    moved = SpectralTT(tt.left, tt.spectrum * (1 + 1e-12), tt.right, shape)
    expected = 1e-12 * shape.rank**0.5
    assert abs(float(tt.distance(moved)) - expected) < 0.2 * expected


@given(shape=shapes(), seed=seeds)
def test_equality_up_to_gauge(shape, seed) -> None:
    tt = weight(shape, "free", seed)
    torch.manual_seed(seed)
    left = [random_rotation(c.shape[-1], dtype=tt.dtype) for c in tt.left[:-1]]
    right = [random_rotation(c.shape[-1], dtype=tt.dtype) for c in tt.right[:-1]]
    turned = rotate(tt, left, right)
    assert turned.allclose(tt)
    assert float(turned.orthonormality_error()) < 1e-12


def test_unmerged_cores_are_the_same_weight() -> None:
    shape = TTShape((2, 2, 3), (3, 2, 2), rank=3)
    stored = weight(shape, "free", 3)
    assert [tuple(c.shape) for c in stored.left] == [(1, 4, 3), (3, 3, 3)]
    first = torch.eye(2, dtype=torch.float64).reshape(1, 2, 2)
    second = stored.left[0].reshape(2, 2, 3)
    long = SpectralTT((first, second, stored.left[1]), stored.spectrum, stored.right, shape)
    assert long.allclose(stored)
    assert [tuple(c.shape) for c in long.merged().left] == [(1, 4, 3), (3, 3, 3)]
    torch.testing.assert_close(long.merged().to_matrix(), stored.to_matrix())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_gradient_and_device_are_kept(dtype) -> None:
    tt = tt_svd(torch.randn(6, 4, dtype=dtype), TTShape.for_matrix(6, 4, rank=2))
    assert tt.dtype == tt.to_matrix().dtype == tt.to(dtype).dtype == dtype
    assert tt.to("meta").device.type == "meta"
    leaf = tt.spectrum.clone().requires_grad_()
    live = SpectralTT(tt.left, leaf, tt.right)
    assert live.to_matrix().requires_grad
    assert not live.detach().to_matrix().requires_grad
    with pytest.raises(AttributeError):
        tt.spectrum = leaf


def test_plans_follow_cost() -> None:
    """A wide low-rank weight and few vectors: forming it is the worst of the three."""
    wide = TTShape.for_matrix(4096, 4096, rank=16)
    assert linear_plan(wide, 1) != "dense"
    assert linear_plan(TTShape.svd(32, 32, rank=32), 10_000) == "dense"


def test_calls_that_do_not_fit() -> None:
    shape = TTShape.for_matrix(6, 4, rank=2)
    tt = weight(shape, "free", 0)
    with pytest.raises(ShapeError, match="do not follow"):
        SpectralTT(tt.left, tt.spectrum, tt.right, TTShape.for_matrix(6, 4, rank=1))
    with pytest.raises(ShapeError, match=r"takes \(\*, 4\) in torch.float64 on cpu, got \(5,\)"):
        tt.matvec(normal(0, 5))
    with pytest.raises(ShapeError, match=r"tt\.rmatvec takes \(\*, 6\)"):
        tt.rmatvec(normal(0, 4))
    with pytest.raises(ShapeError, match="not defined"):
        tt.distance(weight(TTShape.for_matrix(4, 6, rank=2), "free", 0))


def test_it_prints_its_plan() -> None:
    assert repr(weight(TTShape.svd(3, 4, 2), "full", 0, (2,))) == (
        "SpectralTT(3 | 4, ranks 1-2-1, full bond, batch (2,), float64, cpu)"
    )


def test_no_vectors_no_entries_and_empty_batches() -> None:
    tt = weight(TTShape.for_matrix(6, 4, rank=2), "free", 0)
    assert tt.matvec(normal(0, 0, 4)).shape == (0, 6)
    assert tt.rmatvec(normal(0, 3, 0, 6)).shape == (3, 0, 4)
    for plan in ("dense", "lowrank", "cores"):
        assert tt._rows_times_wt(normal(0, 0, 4), plan).shape == (0, 6)
        assert tt._rows_times_w(normal(0, 0, 6), plan).shape == (0, 4)
    none = torch.zeros(0, dtype=torch.int64)
    assert tt.entries(none, none).shape == (0,)


def test_norms_and_distances_at_any_scale() -> None:
    """Squares of 1e-30 vanish in float32, those of 1e30 overflow; the norms must not."""
    shape = TTShape.for_matrix(6, 4, rank=2)
    for scale in (1e-30, 1e30):
        a = tt_svd(normal(0, 6, 4).float(), shape)
        a = SpectralTT(a.left, a.spectrum * scale, a.right, shape)
        b = SpectralTT(a.left, a.spectrum * 2, a.right, shape)
        torch.testing.assert_close(a.norm(), a.spectrum.double().norm().float())
        torch.testing.assert_close(a.distance(b), a.norm())
        assert not a.allclose(b)


def test_distances_broadcast_over_batches() -> None:
    shape = TTShape.for_matrix(6, 4, rank=2)
    one, many = weight(shape, "free", 0), weight(shape, "free", 1, (3,))
    expected = torch.linalg.matrix_norm(one.to_matrix() - many.to_matrix())
    torch.testing.assert_close(one.distance(many), expected)
    with pytest.raises(ShapeError, match="do not broadcast"):
        many.distance(weight(shape, "free", 2, (2,)))
    with pytest.raises(ShapeError, match="distance between weights in"):
        one.distance(one.to(torch.float32))


def test_numbers_that_are_not_real() -> None:
    ones = torch.ones(1, 2, 1, dtype=torch.int64)
    with pytest.raises(ShapeError, match="real floating-point"):
        SpectralTT((ones,), torch.ones(1, dtype=torch.int64), (ones,))
    tt = weight(TTShape.for_matrix(6, 4, rank=2), "free", 0)
    with pytest.raises(ShapeError, match=r"x\.to\(tt\.dtype\)"):
        tt.matvec(normal(0, 4).float())


@pytest.mark.parametrize(
    ("out_modes", "in_modes"),
    [
        ((2, 1), (2,)),
        ((2,), (1, 2)),
        ((1, 2, 1, 1), (1, 2, 1)),
        ((2, 2, 1), (1, 1, 4)),
        ((1,), (1,)),
    ],
)
def test_cores_of_mode_one_are_merged_and_not_dropped(out_modes, in_modes) -> None:
    """Between equal ranks they may turn what comes before, and change no shape."""
    torch.manual_seed(0)
    plan = TTShape(out_modes, in_modes, rank=4)
    frames = [haar_frame(d, r, dtype=torch.float64) for d, r in plan.frame_shapes]
    split = len(out_modes)
    sizes = plan.core_shapes
    left = tuple(f.reshape(size) for f, size in zip(frames[:split], sizes[:split], strict=True))
    right = tuple(f.mT.reshape(size) for f, size in zip(frames[split:], sizes[split:], strict=True))
    tt = SpectralTT(left, normal(1, plan.rank), right, plan)
    merged = tt.merged()
    assert merged.orthonormality_error() < 1e-12
    torch.testing.assert_close(merged.to_matrix(), tt.to_matrix())
