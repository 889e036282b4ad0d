"""What users hand over and does not fit is refused by name: cores, parts of a value, places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategies import weight

from sttp_manifold import SpectralTT, TTShape
from sttp_manifold.errors import PlaceError, ShapeError


def core(*size: int) -> torch.Tensor:
    return torch.zeros(*size)


@pytest.mark.parametrize(
    ("left", "spectrum", "right", "words"),
    [
        ([], core(1), [core(1, 3, 1)], "at least one core"),
        ([core(3, 2)], core(2), [core(2, 3, 1)], "left core 0 has shape (3, 2)"),
        ([core(1, 3, 2)], core(3), [core(2, 3, 1)], "does not fit a centre rank 2"),
        ([core(1, 3, 2), core(3, 3, 2)], core(2), [core(2, 3, 1)], "disagree at bond 1: 2 and 3"),
        ([core(1, 3, 2)], core(2).double(), [core(2, 3, 1)], "share dtype and device"),
        ([core(5, 1, 3, 2)], core(5, 2), [core(2, 3, 1)], "right core 0"),
    ],
)
def test_cores_that_do_not_fit(left, spectrum, right, words) -> None:
    with pytest.raises(ShapeError) as caught:
        SpectralTT(left, spectrum, right)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"left": 3}, "left takes a Sequence, got int: 3"),
        ({"right": None}, "right takes a Sequence, got NoneType"),
        ({"left": [1.0, 2.0]}, "left core 0 takes a Tensor, got float: 1.0"),
        ({"left": [np.ones((1, 6, 2))]}, "left core 0 takes a Tensor, got ndarray"),
        ({"spectrum": [1.0, 2.0]}, "the spectrum takes a Tensor, got list"),
        ({"shape": (6, 4)}, "shape takes a TTShape, got tuple: (6, 4)"),
    ],
)
@pytest.mark.parametrize("with_shape", [False, True])
def test_what_is_no_part_of_a_weight(parts, words, with_shape) -> None:
    shape = TTShape.svd(6, 4, rank=2)
    tt = weight(shape, "free", 0)
    given = {"left": tt.left, "spectrum": tt.spectrum, "right": tt.right}
    given |= {"shape": shape} if with_shape else {}
    with pytest.raises(ShapeError) as caught:
        SpectralTT(**(given | parts))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("i", "j", "error", "words"),
    [
        ([6], [0], PlaceError, "i runs from 6 to 6, outside 0 <= i < 6"),
        ([-7, 0], [0, 0], PlaceError, "i runs from -7 to 0"),
        ([0, 1], [0, 4], PlaceError, "j runs from 0 to 4"),
        (torch.tensor([2**63 + 1], dtype=torch.uint64), [0], PlaceError, "over all sizes"),
        ([0, 1], [0], ShapeError, r"got (2,) and (1,)"),
        ([0.0], [0], ShapeError, "got i = torch.float32"),
        (torch.tensor([True]), torch.tensor([True]), ShapeError, "mask.nonzero"),
        ("ab", [0], ShapeError, "got i = 'ab'"),
        ([0], None, ShapeError, "got j = None"),
        ([[0], [1, 2]], [0], ShapeError, "got i = [[0], [1, 2]]"),
        (torch.zeros(1, dtype=torch.long, device="meta"), [0], ShapeError, "meta"),
    ],
)
def test_places_that_are_none(i, j, error, words) -> None:
    tt = weight(TTShape.for_matrix(6, 4, rank=2), "free", 0)
    with pytest.raises(error) as caught:
        tt.entries(i, j)
    assert words in str(caught.value)
    if error is PlaceError:
        assert isinstance(caught.value, IndexError)
        assert caught.value.index == words[0] or "over" in words
