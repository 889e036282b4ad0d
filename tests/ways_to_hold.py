"""The methods that hold a weight, for tests that are the same for all of them."""

from __future__ import annotations

import pytest

METHODS = ("householder", "riemannian")
every_method = pytest.mark.parametrize("method", METHODS)
