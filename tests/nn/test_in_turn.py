"""`compress(..., in_turn=True)`: weights fitted to dense outputs, one after the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn import SkippedLayerWarning, compress
from sttp_manifold.nn.calibration import second_moments


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 16)
    ).double()


def batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    spread = torch.linspace(0.1, 2, 20, dtype=torch.float64)
    return [torch.randn(60, 20, dtype=torch.float64) * spread for _ in range(count)]


def lost(model: nn.Module, dense: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return float(sum((model(x) - dense(x)).square().sum() for x in data))


def test_a_layer_alone_is_what_it_was_without() -> None:
    data = batches()
    one, two = (
        compress(nn.Sequential(copy.deepcopy(network()[0])), 5, kind="svdp", data=data, in_turn=how)
        for how in (False, True)
    )
    torch.testing.assert_close(one[0].weight.detach(), two[0].weight.detach())


def test_the_second_layer_is_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduced-rank regression of the dense outputs on what the truncated layer before it gives."""
    monkeypatch.setattr("sttp_manifold.nn.units._RIDGE", 1e-10)
    data, dense, rank = batches(), network()[:3], 4
    model = compress(copy.deepcopy(dense), rank, kind="svdp", data=data, in_turn=True)
    x = torch.cat(data)
    with torch.no_grad():
        y = model[1](model[0](x))
        wanted = dense[1](dense[0](x)) @ dense[2].weight.mT
        full = torch.linalg.lstsq(y, wanted).solution
        v = torch.linalg.svd(y @ full, full_matrices=False).Vh[:rank]
        best = (wanted - y @ full @ v.mT @ v).norm()
        torch.testing.assert_close(
            (wanted - y @ model[2].weight.mT).norm(), best, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("kind", ["svdp", "sttp"])
@pytest.mark.parametrize("how", [{"rank": 4}, {"budget": 0.3, "allocate": "balanced"}])
def test_the_network_is_nearer(kind: str, how: Any) -> None:
    data, dense = batches(), network()
    plain, fitted = (
        compress(copy.deepcopy(dense), **how, kind=kind, data=data, in_turn=in_turn)
        for in_turn in (False, True)
    )
    for x in (data, batches(4)[3:]):
        assert lost(fitted, dense, x) < lost(plain, dense, x)


def test_an_iterator_is_gone_through_more_than_once_and_nothing_is_disturbed() -> None:
    data, dense = batches(), network()
    state, before = torch.get_rng_state(), copy.deepcopy(dense.state_dict())
    made = [
        compress(model, 4, kind="svdp", data=given, in_turn=True)
        for model, given in (
            (copy.deepcopy(dense), iter(data)),
            (copy.deepcopy(dense), data),
            (copy.deepcopy(dense), lambda model: [model(x) for x in data]),
        )
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())
    for other in made[1:]:
        torch.testing.assert_close(other(data[0]), made[0](data[0]))


class Masked(nn.Module):
    """A table, attention, a convolution and a layer that is used twice, under a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.twice = nn.Linear(16, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        x = x + self.attention(x, x, x, key_padding_mask=attention_mask == 0)[0]
        x = self.twice(self.twice(x).tanh()).tanh()
        return self.conv(x.mT).mean(-1)


def test_any_layer_under_a_mask() -> None:
    torch.manual_seed(0)
    dense = Masked().double().eval()
    ids = torch.randint(30, (40, 7))
    mask = (torch.arange(7) < torch.randint(3, 8, (40, 1))).long()
    data = [{"input_ids": ids[k : k + 10], "attention_mask": mask[k : k + 10]} for k in (0, 10, 20)]
    errors = []
    for in_turn in (False, True):
        model = compress(
            copy.deepcopy(dense), 4, kind="svdp", data=data, in_turn=in_turn, grow="allow"
        )
        errors.append(sum((model(**b) - dense(**b)).square().sum().item() for b in data))
    assert errors[1] < errors[0]


def test_what_cannot_be_fitted_in_turn() -> None:
    data, dense = batches(), network()
    before = str(dense)
    with pytest.raises(ConversionError, match="fits weights on data"):
        compress(dense, 4, in_turn=True)
    moments = second_moments(dense, [p for p in dense.parameters() if p.ndim > 1], data)
    with pytest.raises(ConversionError, match="give the batches, not their moments"):
        compress(dense, 4, data=moments, in_turn=True)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.expert = nn.Linear(20, 4), nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.expert(x[self.gate(x).sum(1) > 0])

    routed = Routed().double()
    with pytest.raises(ConversionError, match="leave in_turn out"):
        compress(routed, 1, kind="svdp", data=data, in_turn=True)
    assert str(dense) == before
    assert type(routed.gate) is nn.Linear


class Spare(nn.Module):
    """With a layer that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.extra = network(), nn.Linear(20, 20).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layers_that_the_data_does_not_reach_are_truncated_without() -> None:
    model = Spare()
    extra = copy.deepcopy(model.extra)
    with pytest.warns(SkippedLayerWarning, match="'extra': truncated without"):
        compress(model, 4, kind="svdp", data=batches(), in_turn=True)
    torch.testing.assert_close(model.extra.weight, compress(extra, 4, kind="svdp").weight)
