"""`summary` and `spectral_penalty`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from ways_to_hold import METHODS

from sttp_manifold import TTShape
from sttp_manifold.errors import SpectrumError
from sttp_manifold.nn import (
    RiemannianWeight,
    SpectralLinear,
    SpectralWeight,
    compress,
    make_weight,
    spectral_penalty,
    summary,
)
from sttp_manifold.spectrum import CONSTANT, PENALTIES
from sttp_manifold.tt import SPECTRA


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10, bias=False)),
    )


# Biases, norm, running statistics.
OTHER = 16 + 4 * 16 + 64


def test_a_stock_network() -> None:
    model = network()
    table = summary(model)
    assert [row.layer for row in table.rows] == ["0", "3.0", "3.1"]
    for row, layer in zip(table.rows, [model[0], model[3][0], model[3][1]], strict=True):
        size = layer.weight.numel()
        assert row.kind == "dense"
        assert (row.dimension, row.parameters, row.stored, row.dense) == (size,) * 4
        assert row.shape == tuple(layer.weight.shape)
        assert row.ranks == ()
        top = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]
        assert row.top == pytest.approx(float(top), rel=1e-5)
    assert table.other.stored == OTHER
    assert table.Z == 100
    assert table.total.dense == sum(p.numel() for p in model.parameters()) + 32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["sttp", "svdp"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_compressed_network(method: str, kind: str, spectrum: str) -> None:
    model = compress(
        network(),
        4,
        kind=kind,
        method=method,
        spectrum=spectrum,
        skip=["3.1"],
        project=True,
        grow="allow",
    )
    table = summary(model)
    shapes = [TTShape.for_conv((16, 8, 3, 3), 4, kind=kind)]
    shapes.append(TTShape.for_conv((64, 64), 4, kind=kind))
    for row, shape, layer in zip(table.rows, shapes, [model[0], model[3][0]], strict=False):
        assert row.kind == f"{kind}, {method}, {spectrum}"
        assert row.ranks == shape.ranks
        assert row.dimension == shape.dim(spectrum)
        assert row.parameters == shape.num_parameters(spectrum)
        assert row.stored == sum(p.numel() for p in layer.spectral_weight.parameters())
        assert row.dense == shape.numel
        assert pytest.approx(100 * shape.num_parameters(spectrum) / shape.numel) == row.Z
        top = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]
        assert row.top == pytest.approx(float(top), rel=1e-4)
    assert table.rows[2].kind == "dense"
    assert table.other.dense == OTHER
    kept = sum(s.num_parameters(spectrum) for s in shapes) + 640 + OTHER
    assert table.total.parameters == kept
    assert table.total.stored == sum(p.numel() for p in model.parameters()) + 32
    assert pytest.approx(100 * kept / summary(network()).total.dense) == table.Z


def test_known_ratio() -> None:
    """A worked example: (16, 8, 3, 3) at rank 4 counts 116 of 1152 (published), its bias 16."""
    table = summary(compress(nn.Conv2d(8, 16, 3), 4))
    assert (table.rows[0].dimension, table.rows[0].dense) == (116, 1152)
    assert pytest.approx(100 * (116 + 16) / (1152 + 16)) == table.Z


def test_shared_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12))
    model[1].weight = model[0].weight
    model.append(model[2])
    for made in (model, compress(model, 3)):
        table = summary(made)
        assert [row.layer for row in table.rows] == ["0", "1", "2"]
        assert [row.shared for row in table.rows] == [None, "0", None]
        assert table.rows[1].stored == table.rows[1].dense == table.rows[1].dimension == 0
        assert table.total.dense == 2 * 144 + 3 * 12
        assert table.total.stored == sum(p.numel() for p in made.parameters())
        assert "as 0" in str(table)


def test_weights_in_no_layer_have_a_row() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = make_weight("householder", TTShape.for_matrix(12, 10, 3))

    table = summary(Own())
    assert [(row.layer, row.shape) for row in table.rows] == [("matrix", (12, 10))]
    assert table.other.dense == 0
    assert "(other)" not in str(table)


def test_what_is_left_is_listed_by_type_with_its_share() -> None:
    table = summary(compress(network(), 4))
    assert [(row.layer, row.dense) for row in table.left] == [
        ("1 x BatchNorm2d", 64), ("1 x SpectralLinear", 64), ("1 x SpectralConv2d", 16),
    ]  # fmt: skip
    assert sum(row.dense for row in table.left) == table.other.dense
    assert table.share(table.left[0]) == pytest.approx(100 * 64 / table.total.dense)
    share = f"not in spectral form, {6400 / table.total.dense:.1f} % of all"
    line = next(line for line in str(table).splitlines() if "(1 x BatchNorm2d)" in line)
    assert share in line


def test_networks_without_weights() -> None:
    for model in (nn.ReLU(), nn.LazyLinear(3)):
        table = summary(model)
        assert table.rows == ()
        assert table.Z == 100
    assert "total" in str(table)


def test_values_that_are_not_finite_have_no_top() -> None:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    assert "nan" in str(summary(layer))


def test_tables_show_every_number() -> None:
    table = summary(compress(network(), 4, method="riemannian", skip=["3.1"]))
    for text in (str(table), table.to_markdown()):
        head, *lines = text.splitlines()
        for column in ("layer", "kind", "ranks", "dimension", "stored", "dense", "Z", "top s.v."):
            assert column in head
        assert f"{table.Z:.3f}" in lines[-1]
        row = next(line for line in lines if "3.0" in line)
        for part in ("64x64", "1-2-4-4-4-4-4-4-4-4-4-2-1", "sttp, riemannian, free"):
            assert part in row
        for count in (table.rows[1].dimension, table.rows[1].stored, table.rows[1].dense):
            assert f" {count:,} " in row
    assert table.to_markdown().splitlines()[1].startswith("|:--")
    assert "(root)" in str(summary(nn.Linear(3, 3)))


# -- penalty -----------------------------------------------------------------------------------


def spread(model: nn.Module) -> nn.Module:
    """Give every weight a spectrum of its own."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SpectralWeight):
                for p in module.parameters():
                    p.add_(0.1 * torch.randn_like(p))
                if isinstance(module, RiemannianWeight):
                    module.point.copy_(module.manifold.projx(module.point))
    return model


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Riemannian gradients: only tangent parts of a function of the weight are its own."""
    found = torch.autograd.grad(
        loss, list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    return [
        p.manifold.egrad2rgrad(p, g) if hasattr(p, "manifold") else g
        for p, g in zip(model.parameters(), found, strict=True)
    ]


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_penalty_is_the_mean_over_all_singular_values(
    name: str, method: str, spectrum: str
) -> None:
    model = spread(
        nn.Sequential(
            SpectralLinear(12, 10, 4, method=method, spectrum=spectrum).double(),
            SpectralLinear(10, 9, 7, method=method, spectrum=spectrum).double(),
        )
    )
    penalty = spectral_penalty(model, name)
    values = [
        torch.linalg.svdvals(layer.weight)[: layer.spectral_weight.shape.rank] for layer in model
    ]
    wanted = sum(len(s) * PENALTIES[name](s) for s in values) / (4 + 7)
    # Where all singular values meet, gaps between computed ones are rounding.
    if (name, spectrum) == ("divergence", "identity"):
        assert penalty.isfinite()
        return
    torch.testing.assert_close(penalty, wanted, rtol=1e-7, atol=1e-9)
    if spectrum in CONSTANT:
        assert not penalty.requires_grad
        return
    found = gradients(model, penalty)
    assert any(g.abs().max() > 1e-3 for g in found)
    for a, b in zip(found, gradients(model, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_shared_weight_counts_once() -> None:
    a, b = (spread(SpectralLinear(12, 10, 4)) for _ in range(2))
    alone = spectral_penalty(nn.ModuleList([a, b]), "d_optimal")
    shared = SpectralLinear(12, 10, weight=a.spectral_weight)
    both = spectral_penalty(nn.ModuleList([a, shared, b, a]), "d_optimal")
    torch.testing.assert_close(both, alone)
    assert not torch.isclose(both, spectral_penalty(a, "d_optimal"))


def test_dtypes_may_differ() -> None:
    model = nn.ModuleList([SpectralLinear(6, 5, 2), SpectralLinear(6, 5, 2).double()])
    assert spectral_penalty(model, "d_optimal").isfinite()


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("spectrum", ["free", "normalized", "bounded", "full"])
def test_gradients_are_finite_at_ties_and_zeros(name: str, spectrum: str) -> None:
    layer = SpectralLinear(12, 10, 4, spectrum=spectrum, init="eye")
    weight = layer.spectral_weight
    for scale in (1.0, 0.0):
        with torch.no_grad():
            weight.coordinates.mul_(scale)
        (gradient,) = torch.autograd.grad(spectral_penalty(layer, name), weight.coordinates)
        assert gradient.isfinite().all()


def test_what_cannot_be_penalized() -> None:
    with pytest.raises(SpectrumError, match="'d_optimal', 'divergence'"):
        spectral_penalty(SpectralLinear(6, 5, 2), "entropy")
    with pytest.raises(SpectrumError, match="no spectral weights"):
        spectral_penalty(nn.Linear(6, 5), "d_optimal")


def test_descent_evens_the_spectrum() -> None:
    layer = SpectralLinear(12, 10, 4)
    with torch.no_grad():
        layer.spectral_weight.coordinates[-4:].copy_(torch.tensor([1.0, 0.5, 0.2, 0.1]))

    def ratio() -> Tensor:
        s = layer.spectral_weight.tt().singular_values().detach()
        return s[-1] / s[0]

    before = ratio()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        spectral_penalty(layer, "d_optimal").backward()
        optimizer.step()
    assert ratio() > 5 * before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_of_half_precision_are_finite_at_the_start(dtype, spectrum, name) -> None:
    layer = SpectralLinear(12, 10, 4, spectrum=spectrum, dtype=dtype)
    penalty = spectral_penalty(layer, name)
    assert penalty.isfinite()
    assert penalty.dtype == torch.float32
    if spectrum in CONSTANT:
        return
    penalty.backward()
    for parameter in layer.spectral_weight.parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all())
