"""Problems for solvers: a weight that is seen in some of its entries and never formed.

A problem is what a task is to the methods that train, without epochs and batches: places and values
to fit, others to judge by, and the weight that every solver starts from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from sttp_manifold.experiments.common_start import common_start, layer_shape
from sttp_manifold.experiments.data import Examples, Splits
from sttp_manifold.experiments.models import weights
from sttp_manifold.experiments.specs import derived_seed
from sttp_manifold.experiments.task import Problem, Task
from sttp_manifold.manifolds import SpectralTTManifold
from sttp_manifold.tt import SpectralTT, TTShape, tt_svd

__all__ = [
    "digest_of",
    "distinct_places",
    "drawn_problem",
    "entries_of",
    "matrix_problem",
    "network_problem",
    "random_weight",
    "tensor_problem",
]


def entries_of(tt: SpectralTT, places: Tensor) -> Tensor:
    """Entries of a weight at places.

    Shape:
        - places: ``(n, 2)`` rows and columns
        - output: ``(n,)``
    """
    return tt.entries(places[:, 0], places[:, 1])


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Sixteen hexadecimal digits that stand for numbers.

    Shape:
        - tensors: any
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def random_weight(shape: TTShape, generator: torch.Generator) -> SpectralTT:
    """Random frames, and singular values that fall from 1 to 1/5 in equal ratios, in float64.

    A moderate condition: what is compared is how methods move, not how they bear weights that all
    but lose a rank.
    """
    manifold = SpectralTTManifold(shape)
    point = manifold.random(dtype=torch.float64, generator=generator).as_subclass(Tensor)
    tt = manifold.unpack(point.detach())
    s = torch.logspace(0, -np.log10(5), shape.rank, dtype=torch.float64)
    return SpectralTT(tt.left, s, tt.right, shape)


def distinct_places(shape: TTShape, count: int, generator: torch.Generator) -> Tensor:
    """Distinct places of a matrix in random order, in memory and time of their number.

    Shape:
        - output: ``(count, 2)`` rows and columns
    """
    found = np.empty(0, dtype=np.int64)
    while len(found) < count:
        more = torch.randint(shape.numel, (count,), generator=generator).numpy()
        found = np.concatenate((found, more))
        found = found[np.sort(np.unique(found, return_index=True)[1])]
    places = torch.from_numpy(found[:count])
    return torch.stack((places // shape.d_in, places % shape.d_in), dim=1)


def network_problem(task: Task, rank: int, seed: int) -> Problem:
    """The task of one matrix and its fixed splits, from the start of the methods that train."""
    assert task.load is not None
    (layer,) = weights(common_start(task, rank, seed)).values()
    matrix = layer.weight
    assert isinstance(matrix, Tensor)
    matrix = matrix.detach()
    start = tt_svd(matrix, layer_shape(layer, rank))
    return Problem(start, task.load(None), digest_of([matrix]))


def drawn_problem(task: Task, shape: TTShape, sizes: tuple[int, int, int], seed: int) -> Problem:
    """A random weight to find, random places to see it at, and another random weight to start from.

    Args:
        task: whose name and version go into the seed.
        shape: of the weight, and of those to search.
        sizes: observed entries, those for validation, those for the test.
        seed: draws all of it.
    """
    generator = torch.Generator().manual_seed(
        derived_seed("problem", task.name, task.data, shape.rank, seed)
    )
    truth = random_weight(shape, generator)
    places = distinct_places(shape, sum(sizes), generator)
    values = entries_of(truth, places)
    parts = zip(places.split(sizes), values.split(sizes), strict=True)
    start = random_weight(shape, generator)
    digest = digest_of([*start.left, start.spectrum, *start.right])
    return Problem(start, Splits(*(Examples(*part) for part in parts)), digest)


def tensor_problem(task: Task, rank: int, seed: int) -> Problem:
    """A tensor of modes (4, 4, 4, 4 | 4, 4, 4, 4, 4) and TT rank ``rank``, a tenth of it seen.

    The seed draws the tensor, the places and the start. 26,214 entries are observed, 2,621 are for
    validation and 26,214 for the test.
    """
    shape = TTShape((4,) * 4, (4,) * 5, rank=rank)
    return drawn_problem(task, shape, (26_214, 2_621, 26_214), seed)


def matrix_problem(task: Task, rank: int, seed: int) -> Problem:
    """A 1000 x 1000 matrix of rank ``rank``, five times as many entries seen as it has dimensions.

    The seed draws the matrix, the places and the start. 10,000 entries are for validation and
    10,000 for the test.
    """
    shape = TTShape.svd(1000, 1000, rank=rank)
    return drawn_problem(task, shape, (5 * shape.dim("free"), 10_000, 10_000), seed)
