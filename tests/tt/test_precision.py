"""Half precision is widened for factorizations, and equality follows the dtype."""

from __future__ import annotations

import pytest
import torch

from sttp_manifold.tt.precision import closeness, is_half, widened


@pytest.mark.parametrize(
    ("dtype", "computed", "close"),
    [
        (torch.float16, torch.float32, 16 * 2**-10),
        (torch.bfloat16, torch.float32, 16 * 2**-7),
        (torch.float32, torch.float32, 1e-5),
        (torch.float64, torch.float64, 1e-10),
    ],
)
def test_by_dtype(dtype: torch.dtype, computed: torch.dtype, close: float) -> None:
    x = torch.ones(2, dtype=dtype)
    assert widened(x).dtype == computed
    assert is_half(dtype) == (computed != dtype)
    assert (widened(x) is x) == (computed == dtype)
    assert closeness(dtype) == pytest.approx(close)
