"""Second moments of inputs: whatever reads a weight, and what `compress(data=)` makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn import SkippedLayerWarning, compress
from sttp_manifold.nn.calibration import second_moments

DOUBLE = {"dtype": torch.float64}


def outer(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    return rows.mT @ rows


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d, same": (lambda: nn.Conv1d(4, 6, 3, padding="same", bias=False), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(3, 5, (3, 2), 2, (1, 0), 2, bias=False), (2, 3, 9, 8)),
    "2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 6, 7)),
    "2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), (2, 4, 6, 7)),
    "2d, circular": (
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", bias=False),
        (2, 3, 5, 5),
    ),
    "3d, no batch": (lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 4, 5, 4)),
}


@pytest.mark.parametrize(("make", "size"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("chunk", [1 << 22, 50])
def test_of_patches_say_the_norm_of_the_output(
    make: Callable[[], nn.Module],
    size: tuple[int, ...],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``tr(W C W^T)`` is the squared norm of what the convolution gives, by torch itself."""
    monkeypatch.setattr("sttp_manifold.nn.moments._CHUNK", chunk)
    layer, x = make().double(), torch.randn(size, **DOUBLE)
    moments = second_moments(layer, [layer.weight], [x])
    found = torch.zeros(())
    for kernel in layer.weight.detach().unflatten(0, (layer.groups, -1)):
        left, right = moments.of(layer.weight, kernel)
        assert left is None
        rows = kernel.flatten(1)
        found = found + (rows @ right * rows).sum()
    torch.testing.assert_close(found, layer(x).square().sum().detach())


def test_of_transposed_convolutions_are_on_the_left() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2).double()
    x = torch.randn(2, 4, 5, 5, **DOUBLE)
    moments = second_moments(layer, [layer.weight], [x])
    for k, kernel in enumerate(layer.weight.unflatten(0, (2, -1))):
        left, right = moments.of(layer.weight, kernel)
        assert right is None
        torch.testing.assert_close(left, outer(x[:, 2 * k : 2 * k + 2].movedim(1, -1)))


def test_every_way_to_multiply_is_seen() -> None:
    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.randn(5, 4))
            self.stack = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.linear(x, self.W)  # 4 -> 5
            z = y @ self.W  # back by the transpose
            self.seen = (x, y)
            self.mixed = torch.bmm(y[:3], self.stack.mT)
            return self.W @ z[0, 0]

    model, x = Ways(), torch.randn(3, 7, 4)
    moments = second_moments(model, [model.W, model.stack], [x])
    left, right = moments.of(model.W, model.W)
    torch.testing.assert_close(left, outer(model.seen[1]))
    last = (model.seen[1] @ model.W)[0, 0].detach()
    torch.testing.assert_close(right, outer(x) + outer(last))
    for k in range(3):
        torch.testing.assert_close(
            moments.of(model.stack, model.stack[k])[1], outer(model.seen[1][k])
        )


@pytest.mark.parametrize("training", [False, True])
def test_attention_is_seen_part_by_part(training: bool) -> None:
    layer = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ).train(training)
    x = torch.randn(3, 5, 8)
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    moments = second_moments(layer, matrices, [x])
    assert all(moments.of(p, p)[1] is not None for p in matrices)
    packed = layer.layers[0].self_attn.in_proj_weight
    for part in packed.unflatten(0, (3, -1)):
        torch.testing.assert_close(moments.of(packed, part)[1], outer(x))
    queries, keys = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    packed = attention.in_proj_weight
    moments = second_moments(attention, [packed], lambda m: m(queries, keys, keys))
    for part, x in zip(packed.unflatten(0, (3, -1)), (queries, keys, keys), strict=True):
        found = moments.of(packed, part)[1]
        assert found is not None
        torch.testing.assert_close(found, outer(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_seen(kind: type[nn.RNNBase]) -> None:
    layer, x = kind(4, 6, num_layers=2, batch_first=True), torch.randn(3, 5, 4)
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    moments = second_moments(layer, matrices, [x])
    torch.testing.assert_close(moments.of(matrices[0], matrices[0])[1], outer(x))
    hidden = kind(4, 6, batch_first=True)
    hidden.load_state_dict({k: v for k, v in layer.state_dict().items() if "l0" in k})
    torch.testing.assert_close(
        moments.of(matrices[1], matrices[1])[1], outer(hidden(x)[0][:, :-1]).detach()
    )


def test_tables_count_their_rows_and_ties_add_up() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    indices = torch.tensor([[0, 1, 1], [7, 1, 0]])
    left, right = second_moments(model, [model[0].weight], [indices]).of(*2 * [model[0].weight])
    assert left.tolist() == [2, 3, 0, 0, 0, 0, 0, 1, 0, 0]
    torch.testing.assert_close(right, outer(model[0](indices)).detach())
    bag = nn.EmbeddingBag(10, 4)
    assert second_moments(bag, [bag.weight], [indices]).of(*2 * [bag.weight])[0][1] == 3


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        self.seen = self.words(input_ids)
        self.pooled = self.inner(self.seen)[:, 0]
        return self.head(self.pooled)


def test_padding_is_no_input() -> None:
    """Each place that the mask leaves out counts nowhere, and what has other rows is whole."""
    model = Masked().double()
    weights = [model.words.weight, model.inner.weight, model.head.weight]
    ids = torch.tensor([[3, 4, 0, 0], [5, 3, 6, 0], [8, 8, 8, 8]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    moments = second_moments(model, weights, [batch])
    kept = mask.bool()
    count = torch.bincount(ids[kept], minlength=9).double()
    assert torch.equal(moments.of(*weights[:1] * 2)[0], count)
    torch.testing.assert_close(moments.of(*weights[1:2] * 2)[1], outer(model.seen[kept]))
    torch.testing.assert_close(moments.of(*weights[2:] * 2)[1], outer(model.pooled))
    # Next to inputs of a decoder the mask could be theirs by its size, and floats are no mask.
    for other in ({**batch, "decoder_input_ids": ids}, {**batch, "attention_mask": mask.double()}):
        moments = second_moments(model, weights, [other])
        torch.testing.assert_close(moments.of(*weights[1:2] * 2)[1], outer(model.seen))
    with pytest.raises(ConversionError, match="attention_mask of a batch of data keeps nothing"):
        second_moments(model, weights, [{**batch, "attention_mask": torch.zeros_like(mask)}])


def test_autocast_reads_the_same_weight() -> None:
    layer, x = nn.Linear(6, 3), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        moments = second_moments(layer, [layer.weight], [x])
    torch.testing.assert_close(
        moments.of(layer.weight, layer.weight)[1], outer(x.bfloat16()), rtol=1e-6, atol=1e-6
    )


def test_nothing_is_disturbed() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 6))
    model[2].eval()
    model[0].weight.grad = torch.ones(6, 6)
    calls: list[int] = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loader = torch.utils.data.DataLoader(torch.randn(9, 6), batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    compress(model, 3, data=loader, only="0", grow="allow")
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.children()] == [True, True, False, True]
    assert len(calls) == 3
    assert len(model[3]._forward_hooks) == 1
    for key, value in model.state_dict().items():
        assert key not in state or torch.equal(value, state[key])
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("kind", ["svdp", "sttp"])
@pytest.mark.parametrize("how", ["list", "pairs", "mapping", "function"])
@torch.no_grad()
def test_outputs_on_the_data_are_nearer(kind: str, how: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 24)
    x = torch.randn(200, 32) * torch.logspace(0, -2, 32)
    wanted = layer(x)
    data = {
        "list": [x[:100], x[100:]],
        "pairs": [(x, torch.zeros(200))],
        "mapping": {"input": x},
        "function": lambda model: model(x),
    }[how]

    def copied() -> nn.Linear:
        other = nn.Linear(32, 24)
        other.load_state_dict(layer.state_dict())
        return other

    plain = compress(copied(), 4, kind=kind)
    fitted = compress(copied(), 4, kind=kind, data=data)
    assert float((fitted(x) - wanted).norm()) < 0.75 * float((plain(x) - wanted).norm())
    if kind == "svdp":  # the best there is, up to the ridge
        white = torch.linalg.svd(x.double() @ layer.weight.double().mT).S
        best = white[4:].square().sum().sqrt()
        assert float((fitted(x) - wanted).norm()) < 1.02 * float(best)


def test_moments_serve_copies_that_share_their_parameters() -> None:
    model, x = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4)), torch.randn(50, 16)
    moments = second_moments(model, [model[0].weight, model[1].weight], [x])

    def shared() -> nn.Module:
        return copy.deepcopy(model, {id(p): p for p in model.parameters()})

    once, again = (compress(shared(), 2, kind="svdp", data=d) for d in (moments, [x]))
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a.weight, b.weight)


def test_a_layer_that_the_data_does_not_reach_is_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.warns(SkippedLayerWarning, match="no input of 'idle': truncated without"):
        compress(Half(), 2, data=[torch.randn(9, 8)])
