"""A setting that no step can use is refused wherever it comes from, before anything has moved."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sttp_manifold.errors import OptimizerError
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD
from sttp_manifold.optim._settings import SettingError
from sttp_manifold.tt.shape import TTShape

NUMBERS = ["1", math.nan, -1.0, math.inf, True, None, 1j, [0.1], torch.zeros(2), torch.tensor(-1.0)]
FLAGS = ["yes", 1, 0.0, math.nan]
BETAS = [0.9, "ab", (0.9,), (0.9, 0.9, 0.9), (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9), (0.9, True)]
STABILIZE = [0, -1, 2.5, "2", math.nan, True, math.inf]
RETRACTIONS = ["svd", 3, None, ["qr"]]
SHARED = {
    "lr": NUMBERS,
    "weight_decay": NUMBERS,
    "stabilize": STABILIZE,
    "retraction": RETRACTIONS,
    "maximize": [*FLAGS, None],
    "differentiable": [*FLAGS, None],
    "foreach": FLAGS,
    "fused": FLAGS,
}
BAD = {
    RiemannianAdam: {
        **SHARED,
        "eps": NUMBERS,
        "betas": BETAS,
        "amsgrad": [*FLAGS, None],
        "capturable": [*FLAGS, None],
        "decoupled_weight_decay": [*FLAGS, None],
        "second_moment": ["scalar", 1, True],
    },
    RiemannianSGD: {
        **SHARED,
        "momentum": NUMBERS,
        "dampening": NUMBERS,
        "nesterov": [*FLAGS, None, True],  # the last without momentum
    },
}
CASES = [
    (cls, key, v) for cls, table in BAD.items() for key, values in table.items() for v in values
]


def parameters():
    torch.manual_seed(0)
    plain = torch.nn.Parameter(torch.ones(3))
    return [plain, SpectralTTManifold(TTShape((4, 3), (5, 2), rank=3)).random_parameter()]


def put_gradients(params):
    for p in params:
        p.grad = torch.ones_like(p)


@pytest.mark.parametrize(("cls", "key", "value"), CASES, ids=str)
def test_at_construction_in_a_group_and_in_a_state(cls, key, value):
    params = parameters()
    with pytest.raises(SettingError, match=key) as caught:
        cls(params, **{"lr": 0.1, key: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, OptimizerError)
    with pytest.raises(SettingError, match=key):
        cls([{"params": params, key: value}], lr=0.1)

    optimizer = cls(params[:1], lr=0.1)
    with pytest.raises(SettingError, match=key):
        optimizer.add_param_group({"params": params[1:], key: value})
    assert len(optimizer.param_groups) == 1

    optimizer = cls(params, lr=0.1, momentum=0.5) if cls is RiemannianSGD else cls(params, lr=0.1)
    put_gradients(params)
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0][key] = value
    if key == "nesterov":
        state["param_groups"][0]["momentum"] = 0
    kept = dict(optimizer.param_groups[0])
    with pytest.raises(SettingError, match=key):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0].keys() == kept.keys()
    assert all(optimizer.param_groups[0][k] is v for k, v in kept.items())


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        c
        for c in CASES
        if not isinstance(c[2], torch.Tensor) and not (c[1] == "lr" and c[2] == -1.0)
    ],
    ids=str,
)
def test_one_set_later_is_refused_at_the_step(cls, key, value):
    params = parameters()
    optimizer = cls(params, lr=0.1)
    put_gradients(params)
    optimizer.step()
    start = [p.detach().clone() for p in params]
    optimizer.param_groups[0][key] = value
    with pytest.raises(SettingError, match=key):
        optimizer.step()
    for p, before in zip(params, start, strict=True):
        assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": np.float32(0.1)},
        {"lr": np.int64(1)},
        {"lr": 0},
        {"lr": torch.tensor([0.1], dtype=torch.float64)},
        {"weight_decay": 1},
        {"stabilize": np.int64(3)},
        {"stabilize": 1},
    ],
)
def test_what_can_be_used_is_taken(cls, options):
    params = parameters()
    optimizer = cls(params, **{"lr": 0.1, **options})
    put_gradients(params)
    optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
def test_stabilize_is_given_by_name(cls):
    settings = (1e-3, (0.9, 0.999), 1e-8, 0, False) if cls is RiemannianAdam else (0.1, 0, 0, 0)
    tail = () if cls is RiemannianAdam else (False,)
    cls(parameters(), *settings, *tail)
    with pytest.raises(TypeError, match="positional"):
        cls(parameters(), *settings, *tail, 7)


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
def test_flags_of_a_state_that_the_parameters_cannot_honour(cls):
    """Those of torch's own optimizers among them; nothing is loaded then."""
    params = parameters()
    optimizer = cls(params, lr=0.1)
    state = optimizer.state_dict()
    state["param_groups"][0]["fused"] = True
    state["param_groups"][0]["lr"] = 7.0
    with pytest.raises(OptimizerError, match="cannot honour fused=True"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1
