"""Published counts: parameters of single layers, and the ratios Z of a whole network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sttp_manifold import TTShape
from sttp_manifold.nn import HouseholderWeight, compress, make_weight, summary

# (kernel shape, rank, kind, with a learned spectrum, with an identity spectrum)
COUNTS = [
    ((16, 8, 3, 3), 4, "svdp", 336, 326),
    ((16, 8, 3, 3), 4, "sttp", 116, 106),
    ((64, 64), 16, "svdp", 1792, 1656),
    ((64, 64), 16, "sttp", 1280, 1144),
    ((512, 512, 3, 3), 64, "svdp", 323584, 321504),
    ((512, 512, 3, 3), 64, "sttp", 41472, 39392),
]


@pytest.mark.parametrize(("kernel", "rank", "kind", "learned", "identity"), COUNTS)
def test_parameters_of_a_layer(
    kernel: tuple[int, ...], rank: int, kind: str, learned: int, identity: int
) -> None:
    shape = TTShape.for_conv(kernel, rank, kind=kind)
    for spectrum, count in (("free", learned), ("identity", identity)):
        assert shape.num_parameters(spectrum) == shape.dim(spectrum) == count
        weight = HouseholderWeight(shape, spectrum, init="eye")
        assert sum(p.numel() for p in weight.parameters()) == count


class Block(nn.Module):
    """Residual block of the discriminator; a 1x1 shortcut where the size changes."""

    def __init__(self, c_in: int, c_out: int, shortcut: bool, down: bool) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.c2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if shortcut else nn.Identity()
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.c2(self.c1(x).relu()).relu() + self.shortcut(x))


class Discriminator(nn.Module):
    """SNGAN for 32 x 32 images: four residual blocks and a linear layer to one number."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Block(3, features, shortcut=True, down=True),
            Block(features, features, shortcut=True, down=True),
            Block(features, features, shortcut=False, down=False),
            Block(features, features, shortcut=False, down=False),
        )
        self.linear = nn.Linear(features, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(x).relu().sum((-2, -1)))


@pytest.mark.parametrize(
    ("kind", "spectrum", "published"),
    [
        ("svdp", "identity", 51.743),
        ("sttp", "identity", 16.713),
        ("svdp", "free", 53.358),
        ("sttp", "free", 18.329),
    ],
)
def test_ratio_of_the_discriminator(kind: str, spectrum: str, published: float) -> None:
    """[STTP] tables: 128 features, rank 64.

    Every layer is reparameterized, also those whose matrix is so small that the rank is lowered:
    the first convolution (128 x 27) and shortcut (128 x 3), and the last layer (1 x 128).
    Biases count in full on both sides.
    """
    model = Discriminator(128)
    dense = sum(p.numel() for p in model.parameters())
    compress(model, rank=64, kind=kind, spectrum=spectrum, init="eye")
    table = summary(model)
    assert len(table.rows) == 11
    assert table.total.dense == dense
    assert round(table.Z, 3) == published
    assert table.total.stored == sum(p.numel() for p in model.parameters())
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1)


def test_the_ratio_does_not_depend_on_the_method() -> None:
    """The manifold stores more, its dimension is the same."""
    model = Discriminator(128)
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
    for kernel, rank, kind, learned, identity in COUNTS[:4]:
        shape = TTShape.for_conv(kernel, rank, kind=kind)
        for spectrum, count in (("free", learned), ("identity", identity)):
            weight = make_weight("riemannian", shape, spectrum, "eye")
            assert weight.manifold.dim == count
