"""The one place where geoopt is imported.

geoopt 0.5 decorates helpers with ``torch.jit.script``, which recent torch releases
deprecate: importing it emits that one warning dozens of times. It is silenced here, for the
duration of the import only, and nothing else is.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # A DeprecationWarning until torch 2.13, a FutureWarning after it; the second is Python 3.14's.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is not supported")
    import geoopt

from geoopt import Euclidean, EuclideanStiefel, ManifoldParameter, ManifoldTensor, ProductManifold
from geoopt.manifolds.base import Manifold

__all__ = [
    "Euclidean",
    "EuclideanStiefel",
    "Manifold",
    "ManifoldParameter",
    "ManifoldTensor",
    "ProductManifold",
    "geoopt",
]
