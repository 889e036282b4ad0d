"""The plan: counts, bounds, merging, and what it says about bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import shapes, spectra

from sttp_manifold import TTShape
from sttp_manifold.errors import RankError, ShapeError, SpectrumError


@given(shape=shapes(), spectrum=spectra)
def test_counts_follow_the_formulas(shape: TTShape, spectrum: str) -> None:
    R, r = shape.ranks, shape.rank
    modes = shape.out_modes + shape.in_modes
    dim = sum(R[k] * n * R[k + 1] for k, n in enumerate(modes)) - sum(x * x for x in R[1:-1])
    dim -= {"identity": r * (r + 1) // 2, "normalized": 1, "fixed": r}.get(spectrum, 0)
    assert shape.dim(spectrum) == dim
    stiefel = sum(d * p - p * (p + 1) // 2 for d, p in shape.frame_shapes)
    coordinates = {"identity": 0, "fixed": 0, "full": r * r}.get(spectrum, r)
    assert shape.total_dim(spectrum) == stiefel + coordinates
    gauge = sum(x * (x - 1) // 2 for x in R) - r * (r - 1) // 2
    gauge += {"identity": r * (r - 1) // 2, "full": r * (r - 1), "normalized": 1}.get(spectrum, 0)
    assert shape.gauge_dim(spectrum) == gauge == shape.total_dim(spectrum) - dim


@given(shape=shapes(max_modes=4), spectrum=spectra)
def test_merging_keeps_sizes_rank_and_dimension(shape: TTShape, spectrum: str) -> None:
    merged = shape.merged
    assert (merged.d_out, merged.d_in, merged.rank) == (shape.d_out, shape.d_in, shape.rank)
    assert merged.dim(spectrum) == shape.dim(spectrum)
    assert merged.num_parameters(spectrum) == shape.num_parameters(spectrum)
    assert merged.gauge_dim(spectrum) == merged.total_dim(spectrum) - shape.dim(spectrum)
    assert merged.merged == merged
    left, right = merged.left_core_shapes, merged.right_core_shapes
    assert all(a * n > b for a, n, b in left[:-1])
    assert all(m * b > a for a, m, b in right[1:])


@given(shape=shapes(max_modes=4))
def test_one_rank_is_lowered_to_the_bounds_and_no_further(shape: TTShape) -> None:
    modes = shape.out_modes + shape.in_modes
    wanted = max(shape.ranks)
    for k in range(1, len(modes)):
        bound = min(math.prod(modes[:k]), math.prod(modes[k:]))
        assert shape.ranks[k] == min(wanted, bound)
    assert TTShape(shape.out_modes, shape.in_modes, ranks=shape.ranks) == shape


def test_example_of_the_geometry() -> None:
    """Modes (2,2,2,2,2,2) at rank 16 are, as a manifold, modes (32, 2)."""
    shape = TTShape((2,) * 6, (2,) * 6, rank=16)
    assert shape.ranks == (1, 2, 4, 8, 16, 16, 16, 16, 16, 8, 4, 2, 1)
    assert shape.merged.out_modes == (32, 2)
    assert shape.merged.frame_shapes[:2] == ((32, 16), (32, 16))


@pytest.mark.parametrize(("d_out", "d_in"), [(1, 1), (1, 7), (7, 1), (1, 12)])
@pytest.mark.parametrize("make", [TTShape.for_matrix, TTShape.svd])
def test_a_side_of_size_one(make, d_out: int, d_in: int) -> None:
    shape = make(d_out, d_in, rank=5)
    assert shape.rank == 1
    assert shape.dim("free") == d_out + d_in - 1


def test_convolution_kernels() -> None:
    flat = TTShape.for_conv((16, 8, 3, 3), rank=4)
    factored = TTShape.for_conv((16, 8, 3, 4), rank=4, kernel="factored")
    assert flat.in_modes == (2, 2, 2, 9)
    assert factored.in_modes == (2, 2, 2, 3, 2, 2)
    assert TTShape.for_conv((16, 8, 1, 1), rank=4).in_modes == (2, 2, 2)
    assert TTShape.for_conv((16, 8, 5), rank=4, kind="svdp") == TTShape.svd(16, 40, 4)


@given(
    d_out=st.integers(1, 200), d_in=st.integers(1, 200), rank=st.integers(1, 20),
    window=st.lists(st.integers(1, 6), max_size=3),
)  # fmt: skip
def test_one_constructor_for_the_weight_of_any_layer(d_out, d_in, rank, window) -> None:
    size = (d_out, d_in, *window)
    columns = d_in * math.prod(window)
    assert TTShape.for_weight((d_out, d_in), rank) == TTShape.for_matrix(d_out, d_in, rank)
    assert TTShape.for_weight(size, rank, kind="svdp") == TTShape.svd(d_out, columns, rank)
    for kernel in ("flat", "factored"):
        plan = TTShape.for_weight(torch.Size(size), rank, kernel=kernel)
        assert (plan.d_out, plan.d_in) == (d_out, columns)
        assert plan == TTShape.for_conv(size, rank, kernel)


def test_integers_of_numpy_are_integers() -> None:
    assert TTShape(np.array([3, 4]), [np.int64(5)], rank=np.int32(2)) == TTShape((3, 4), (5,), 2)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"out_modes": (), "in_modes": (2,), "rank": 1}, ShapeError, "out_modes=(3, 4, 2)"),
        ({"out_modes": (0,), "in_modes": (2,), "rank": 1}, ShapeError, "positive integer, got 0"),
        ({"out_modes": (-3,), "in_modes": (2,), "rank": 1}, ShapeError, "got -3"),
        ({"out_modes": (2.5,), "in_modes": (2,), "rank": 1}, ShapeError, "got 2.5"),
        ({"out_modes": (True,), "in_modes": (2,), "rank": 1}, ShapeError, "got True"),
        ({"out_modes": 6, "in_modes": (2,), "rank": 1}, ShapeError, "sequence of integers, got 6"),
        ({"out_modes": (3,), "in_modes": (2,), "rank": 0}, ShapeError, "rank must be"),
        ({"out_modes": (3,), "in_modes": (2,)}, ShapeError, "give either rank=4"),
        (
            {"out_modes": (3,), "in_modes": (2,), "rank": 1, "ranks": (1, 1, 1)},
            ShapeError,
            "either",
        ),
        ({"out_modes": (3,), "in_modes": (2,), "ranks": (1, 1)}, ShapeError, "have 3 ranks"),
        ({"out_modes": (3,), "in_modes": (2,), "ranks": (2, 1, 1)}, RankError, "outer ranks are 1"),
        ({"out_modes": (3,), "in_modes": (2,), "ranks": (1, 3, 1)}, RankError, "is over 2"),
        ({"out_modes": (4, 4), "in_modes": (16,), "ranks": (1, 1, 5, 1)}, RankError, "is over 4"),
    ],
)
def test_bad_plans(kwargs: dict, error: type, words: str) -> None:
    with pytest.raises(error) as caught:
        TTShape(**kwargs)
    assert words in str(caught.value)


def test_a_rank_error_carries_its_culprit() -> None:
    with pytest.raises(RankError) as caught:
        TTShape((4, 4), (16,), ranks=(1, 4, 17, 1))
    assert (caught.value.bond, caught.value.rank, caught.value.bound) == (2, 17, 16)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TTShape.for_conv((16,), rank=2), "c_out, c_in"),
        (lambda: TTShape.for_conv((16, 8), rank=2, kind="svd"), "'sttp' or 'svdp'"),
        (lambda: TTShape.for_weight(12, rank=2), "size must be a sequence of integers, got 12"),
        (lambda: TTShape((2,), (2,), ranks=1), "ranks must be a sequence of integers, got 1"),
        (lambda: TTShape.for_matrix(4, 4, torch.ones(2)), "rank must be a positive integer"),
        (lambda: TTShape.for_conv((16, 8, 3, 3), rank=2, kernel="round"), "'flat' or 'factored'"),
        (lambda: TTShape.for_conv((16, 8, 3, 3), rank=2, kind="tt"), "'sttp' or 'svdp'"),
        (lambda: TTShape.for_matrix(0, 3, rank=2), "positive integer"),
    ],
)
def test_bad_constructor_calls(call, words: str) -> None:
    with pytest.raises(ShapeError) as caught:
        call()
    assert words in str(caught.value)


def test_an_unknown_spectrum_is_answered_with_the_names() -> None:
    with pytest.raises(SpectrumError, match="identity, free, normalized, bounded, full, fixed"):
        TTShape.svd(3, 3, 2).dim("learned")


def test_plans_print_and_hash() -> None:
    shape = TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4)
    assert eval(repr(shape)) == shape
    assert str(shape) == "3·4·2 | 2·5·3, ranks 1-3-4-4-4-3-1"
    assert len({shape, TTShape((3, 4, 2), (2, 5, 3), 4)}) == 1
