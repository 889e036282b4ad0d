"""Published counts: parameters of single layers, and the ratios Z of a whole network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sttp_manifold import TTShape
from sttp_manifold.experiments.models import SNGANDiscriminator, network, weight_sizes
from sttp_manifold.experiments.paper import (
    LAYERS,
    NETWORKS,
    RANKS,
    Count,
    network_counts,
    paper_counts,
)
from sttp_manifold.nn import HouseholderWeight, compress, make_weight, summary

COUNTS = [
    (size, rank, kind, spectrum, count)
    for (size, rank), counts in LAYERS.items()
    for (kind, spectrum), count in counts.items()
]
RATIOS = [c for c in network_counts("sngan-32-discriminator") if c.published_ratio is not None]


@pytest.mark.parametrize(("size", "rank", "kind", "spectrum", "count"), COUNTS)
def test_parameters_of_a_layer(
    size: tuple[int, ...], rank: int, kind: str, spectrum: str, count: int
) -> None:
    shape = TTShape.for_weight(size, rank, kind=kind)
    assert shape.num_parameters(spectrum) == shape.dim(spectrum) == count
    weight = HouseholderWeight(shape, spectrum, init="eye")
    assert sum(p.numel() for p in weight.parameters()) == count


def test_every_known_figure_of_the_paper_comes_out() -> None:
    counts = paper_counts()
    known = [count for count in counts if count.agrees is not None]
    assert len(known) == len(COUNTS) + len(RATIOS) == 16
    assert all(count.agrees for count in known)
    names = dict.fromkeys(count.name for count in counts)
    assert list(names)[len(LAYERS) :] == list(NETWORKS)
    assert len(counts) == 4 * (len(LAYERS) + len(NETWORKS) * len(RANKS))


@pytest.mark.parametrize("known", RATIOS, ids=lambda c: f"{c.kind}-{c.spectrum}")
def test_ratio_of_the_discriminator(known: Count) -> None:
    """[STTP] tables: 128 features, rank 64; the plans' counts are those of a compressed network.

    Every layer is reparameterized, also those whose matrix is so small that the rank is lowered:
    the first convolution (128 x 27) and shortcut (128 x 3), and the last layer (1 x 128).
    Biases count in full on both sides.
    """
    model = SNGANDiscriminator.for_images(32)
    dense = sum(p.numel() for p in model.parameters())
    compress(model, rank=known.rank, kind=known.kind, spectrum=known.spectrum, init="eye")
    table = summary(model)
    assert len(table.rows) == known.weights == 11
    assert table.total.dense == known.dense == dense
    assert round(table.Z, 3) == round(known.Z, 3) == known.published_ratio
    assert table.total.stored == known.dof + known.rest
    assert table.total.stored == sum(p.numel() for p in model.parameters())
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_both_readings_of_a_window_count_the_same(name: str) -> None:
    """Three times three instead of nine: from rank 3 on the last core is square, and free."""
    sizes = weight_sizes(network(name, device="meta"))
    for count in network_counts(name, [3, *RANKS]):
        if count.kind == "sttp":
            plans = [TTShape.for_weight(size, count.rank, kernel="factored") for size in sizes]
            assert sum(plan.num_parameters(count.spectrum) for plan in plans) == count.dof


@pytest.mark.parametrize(
    ("window", "least"), [((3, 3), 3), ((5, 5), 5), ((4, 4), 8), ((7, 7), 7), ((3, 1), 1)]
)
def test_rank_from_which_both_readings_of_a_window_count_the_same(
    window: tuple[int, int], least: int
) -> None:
    for rank in range(1, 20):
        flat, factored = (
            TTShape.for_weight((32, 32, *window), rank, kernel=kernel).dim()
            for kernel in ("flat", "factored")
        )
        assert (factored == flat) == (rank >= least)
        assert factored <= flat


def test_the_ratio_does_not_depend_on_the_method() -> None:
    """The manifold stores more, its dimension is the same."""
    model = SNGANDiscriminator.for_images(32)
    compress(model, rank=64, method="riemannian", init="eye", grow="allow")
    table = summary(model)
    assert round(table.Z, 3) == 18.329
    assert table.total.stored > table.total.dimension


@pytest.mark.parametrize("kind", ["sttp", "svdp"])
def test_the_ratio_leaves_out_only_the_batch_counter(kind: str) -> None:
    """A layer and a batch norm by hand: weights, statistics and biases count, batches do not."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    compress(model, rank=4, kind=kind)
    count = {"sttp": 116, "svdp": 336}[kind]
    assert pytest.approx(100 * (count + 16 + 64) / (1152 + 16 + 64)) == summary(model).Z


def test_the_manifold_has_the_dimension_of_the_counts() -> None:
    for size, rank, kind, spectrum, count in COUNTS[:8]:
        shape = TTShape.for_weight(size, rank, kind=kind)
        assert make_weight("riemannian", shape, spectrum, "eye").manifold.dim == count
