"""Every optimizer that steps keeps every law.

A new optimizer is one or more rows here. What belongs to one alone is in `tests/optim`.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from saved_states import through_file
from spectral_points import frame_error

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.manifolds.fixed_tt_rank import FixedTTRankManifold
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD, check_optimizer
from sttp_manifold.tt.shape import TTShape

SHAPE = TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4)


@dataclass(frozen=True)
class Row:
    """An optimizer with some of its settings.

    Attributes:
        cls: its class.
        options: its settings but the rate.
        lr: a rate that suits it.
        reference: the optimizer that plain parameters are moved by, and its settings.
        momentum: the name of its momentum in the state, if there is one.
        capturable: whether it has the flag.
    """

    cls: Any
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.05
    reference: tuple[Any, dict[str, Any]] | None = None
    momentum: str | None = "exp_avg"
    capturable: bool = True

    def make(self, params: Any, **more: Any) -> Any:
        """The optimizer over some parameters."""
        return self.cls(params, **{"lr": self.lr, **self.options, **more})


ADAM, ADAMW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
BUFFER: dict[str, Any] = {"momentum": "momentum_buffer", "capturable": False}
ROWS = {
    "adam": Row(RiemannianAdam, reference=(ADAM, {})),
    "adam, amsgrad": Row(RiemannianAdam, {"amsgrad": True}, reference=(ADAM, {"amsgrad": True})),
    "adam, decay": Row(
        RiemannianAdam, {"weight_decay": 0.1}, reference=(ADAM, {"weight_decay": 0.1})
    ),
    "adam, decoupled decay": Row(
        RiemannianAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        reference=(ADAMW, {"weight_decay": 0.1}),
    ),
    "adam, stabilized": Row(RiemannianAdam, {"stabilize": 2}, capturable=False),
    "adam, cayley": Row(RiemannianAdam, {"retraction": "cayley"}),
    "adam, frame": Row(RiemannianAdam, {"second_moment": "frame"}, reference=(ADAM, {})),
    "adam, frame, amsgrad": Row(
        RiemannianAdam,
        {"second_moment": "frame", "amsgrad": True, "weight_decay": 0.1},
        reference=(ADAM, {"amsgrad": True, "weight_decay": 0.1}),
    ),
    "adam, pogo": Row(RiemannianAdam, {"retraction": "pogo"}),
    "sgd": Row(RiemannianSGD, reference=(SGD, {}), momentum=None, capturable=False),
    "sgd, momentum": Row(
        RiemannianSGD, {"momentum": 0.9}, reference=(SGD, {"momentum": 0.9}), **BUFFER
    ),
    "sgd, damped": Row(
        RiemannianSGD,
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "stabilize": 2},
        reference=(SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        **BUFFER,
    ),
    "sgd, nesterov": Row(
        RiemannianSGD,
        {"momentum": 0.9, "nesterov": True, "retraction": "polar"},
        reference=(SGD, {"momentum": 0.9, "nesterov": True}),
        **BUFFER,
    ),
    "muon": Row(RiemannianMuon, reference=(ADAMW, {"weight_decay": 0.0})),
    "muon, decay": Row(
        RiemannianMuon,
        {"weight_decay": 0.1, "adam_lr": 0.02, "nesterov": False},
        reference=(ADAMW, {"lr": 0.02, "weight_decay": 0.1}),
    ),
}
if hasattr(torch.optim, "Muon"):
    ROWS["muon, plain matrices"] = Row(
        RiemannianMuon, {"plain_matrices": "muon", "retraction": "qr"}, capturable=False
    )
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


class Model(torch.nn.Module):
    """Every kind of parameter: plain, ours (with and without batch), a single frame, others."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0, generic: bool = True):
        super().__init__()
        torch.manual_seed(seed)
        M = SpectralTTManifold(SHAPE, spectrum="bounded", bound=2.0)
        self.plain = torch.nn.Parameter(torch.randn(3, 2, dtype=dtype))
        self.one = M.random_parameter(dtype=dtype)
        self.many = SpectralTTManifold(SHAPE).random_parameter(2, dtype=dtype)
        self.large = SpectralTTManifold(TTShape.svd(30, 26, rank=18)).random_parameter(dtype=dtype)
        self.frame = ManifoldParameter(EuclideanStiefel().random(6, 4, dtype=dtype))
        if generic:
            sphere = geoopt.Sphere()
            self.sphere = ManifoldParameter(
                sphere.projx(torch.randn(5, dtype=dtype)), manifold=sphere
            )
            F = FixedTTRankManifold(SHAPE)
            self.weight, self.other = (
                F.random_parameter(dtype=dtype),
                F.random_parameter(dtype=dtype),
            )


def put_gradients(model, seed, sign=1.0):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.grad = sign * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if name == "frame" and seed == 1:
            p.grad = None  # its count of steps falls behind


def train(model, optimizer, steps, sign=1.0):
    for step in steps:
        put_gradients(model, step, sign)
        optimizer.step()


def assert_equal(model, twin):
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.detach(), q.detach()), name


def assert_close(model, twin, atol):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=atol)


# --- State. ---


def directly(state):
    return state


@every_row
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("carry", [directly, through_file])
def test_a_loaded_run_continues_bit_for_bit(row, foreach, carry):
    model = Model()
    optimizer = row.make(model.parameters(), foreach=foreach)
    train(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    # Other settings, all of which the state must replace.
    resumed = row.cls(twin.parameters(), lr=1.5)
    resumed.load_state_dict(carry(optimizer.state_dict()))
    train(model, optimizer, range(3, 7))
    train(twin, resumed, range(3, 7))
    assert_equal(model, twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        a, b = optimizer.state[p], resumed.state[q]
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])), key


@every_row
def test_the_state_is_needed(row):
    """The law above would notice a state that is lost."""
    if row.momentum is None:
        pytest.skip("has none")
    model = Model()
    optimizer = row.make(model.parameters())
    train(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    train(model, optimizer, range(3, 5))
    train(twin, row.make(twin.parameters()), range(3, 5))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert not torch.equal(p.detach(), q.detach())


@every_row
def test_a_loaded_state_shares_no_memory(row):
    model = Model()
    optimizer = row.make(model.parameters())
    train(model, optimizer, range(2))
    twin = copy.deepcopy(model)
    resumed = row.make(twin.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    train(twin, resumed, range(2, 4))
    train(model, optimizer, range(2, 4))
    assert_equal(model, twin)


@every_row
@pytest.mark.parametrize(
    "carry", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_carry_the_optimizer_with_its_model(row, carry):
    model = Model()
    optimizer = row.make(model.parameters())
    train(model, optimizer, range(3))
    twin, resumed = carry((model, optimizer))
    train(model, optimizer, range(3, 6))
    train(twin, resumed, range(3, 6))
    assert_equal(model, twin)
    resumed.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


@every_row
def test_the_state_can_be_read_and_written_between_steps(row):
    model = Model()
    twin, reset = copy.deepcopy(model), copy.deepcopy(model)
    quiet, read, written = (row.make(m.parameters()) for m in (model, twin, reset))
    for step in range(2, 6):
        train(model, quiet, [step])
        train(twin, read, [step])
        read.state_dict()
        train(reset, written, [step])
        for p, state in written.state.items():
            if row.momentum in state:
                assert state[row.momentum].shape == p.shape
                state[row.momentum].zero_()
    assert_equal(model, twin)
    if row.momentum:
        assert not torch.equal(model.one.detach(), reset.one.detach())


@every_row
def test_the_state_follows_the_dtype_of_the_parameters(row):
    model = Model()
    optimizer = row.make(model.parameters())
    train(model, optimizer, range(2, 4))
    twin = copy.deepcopy(model).double()
    resumed = row.make(twin.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    train(twin, resumed, range(4, 6))
    train(model, optimizer, range(4, 6))
    for state in resumed.state.values():
        for name, value in state.items():
            assert name == "step" or value is None or value.dtype == torch.float64, name
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=1e-3)


# --- Rates. ---

SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
}


@every_row
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_set_the_rate_of_each_step_and_resume(row, make):
    model = Model()
    by_hand = copy.deepcopy(model)
    scheduled, set_ = row.make(model.parameters()), row.make(by_hand.parameters())
    scheduler = make(scheduled)
    for step in range(2, 5):
        set_.param_groups[0]["lr"] = scheduled.param_groups[0]["lr"]
        train(model, scheduled, [step])
        train(by_hand, set_, [step])
        scheduler.step()
    assert_equal(model, by_hand)
    twin = copy.deepcopy(model)
    resumed = row.make(twin.parameters())
    rescheduled = make(resumed)
    resumed.load_state_dict(through_file(scheduled.state_dict()))
    rescheduled.load_state_dict(through_file(scheduler.state_dict()))
    for step in range(5, 8):
        for m, o, s in ((model, scheduled, scheduler), (twin, resumed, rescheduled)):
            train(m, o, [step])
            s.step()
    assert_equal(model, twin)


@every_row
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_is_its_number(row, shape):
    ends = []
    for lr in (0.25, torch.full(shape, 0.25)):
        model = Model()
        train(model, row.make(model.parameters(), lr=lr), range(2, 4))
        ends.append(model)
    assert_close(*ends, atol=1e-6)


# --- Steps. ---


@every_row
def test_maximize_is_to_minimize_the_negative(row):
    model = Model()
    twin = copy.deepcopy(model)
    train(model, row.make(model.parameters(), maximize=True), range(4))
    train(twin, row.make(twin.parameters()), range(4), sign=-1.0)
    assert_close(model, twin, atol=0)


@every_row
def test_closure_runs_with_gradients_and_its_loss_comes_back(row):
    model = Model()
    optimizer = row.make(model.parameters())

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum((p - 1).square().sum() for p in model.parameters())
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
        second = optimizer.step(closure)
    assert second < first


@every_row
def test_gradients_stay_as_they_are(row):
    model = Model()
    optimizer = row.make(model.parameters(), maximize=True)
    put_gradients(model, 0)
    kept = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))


@every_row
def test_frozen_parameters_and_absent_gradients_stay(row):
    model = Model()
    start = copy.deepcopy(model)
    optimizer = row.make(model.parameters(), stabilize=None)
    optimizer.step()
    model.one.grad = torch.ones_like(model.one)
    model.many.requires_grad_(False)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), start.get_parameter(name).detach()) == (name != "one")
    assert not any(p in optimizer.state for n, p in model.named_parameters() if n != "one")


@every_row
def test_one_batch_or_one_by_one(row):
    ends = []
    for foreach in (None, False):
        model = Model(torch.float64)
        train(model, row.make(model.parameters(), foreach=foreach), range(4))
        ends.append(model)
    assert_close(*ends, atol=1e-12)


@every_row
def test_a_group_that_joins_later_moves_as_one_that_was_there(row):
    model = Model(torch.float64)
    twin = copy.deepcopy(model)
    first, *rest = model.parameters()
    optimizer = row.make([first])
    optimizer.add_param_group({"params": rest})
    groups = [{"params": [p]} for p in twin.parameters()]
    train(model, optimizer, range(4))
    train(twin, row.make(groups), range(4))
    assert_close(model, twin, atol=1e-12)
    for key, value in optimizer.param_groups[0].items():
        assert key in ("params", "step") or optimizer.param_groups[1][key] == value


@every_row
def test_a_capturable_step_is_the_step(row):
    if not row.capturable:
        pytest.skip("has no such flag")
    ends = []
    for capturable in (False, True):
        model = Model(torch.float64, generic=False)
        del model.plain  # torch has it on accelerators only
        train(model, row.make(model.parameters(), capturable=capturable), range(6))
        ends.append(model)
    assert_close(*ends, atol=1e-12)


@every_row
def test_autocast_does_not_round_a_step(row):
    ends = []
    for enabled in (False, True):
        model = Model()
        optimizer = row.make(model.parameters())
        put_gradients(model, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        ends.append(model)
    assert_equal(*ends)


@every_row
def test_a_compiled_step_is_the_step(row):
    """torch.compile replaces the step of what it takes for its own Adam by Euclidean Adam."""
    torch._dynamo.reset()
    ends = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        model = Model(torch.float64)
        optimizer = row.make(model.parameters())
        step = wrap(lambda optimizer=optimizer: optimizer.step())
        for seed in range(2, 4):
            put_gradients(model, seed)
            step()
        ends.append(model)
    assert_close(*ends, atol=1e-14)


@every_row
def test_autograd_sees_that_a_point_has_moved(row):
    model = Model()
    loss = model.one.square().square().sum()
    optimizer = row.make(model.parameters())
    put_gradients(model, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- Against torch. ---


@every_row
@pytest.mark.parametrize("foreach", [None, True, False])
def test_plain_parameters_move_as_torch_moves_them(row, foreach):
    if row.reference is None:
        pytest.skip("as another row")
    cls, options = row.reference
    model, beside = torch.nn.Linear(3, 2), Model()
    twin = copy.deepcopy(model)
    ours = row.make([*model.parameters(), *beside.parameters()], foreach=foreach)
    theirs = cls(twin.parameters(), **{"lr": row.lr, **options}, foreach=foreach)
    for step in range(6):
        put_gradients(beside, step)
        for m in (model, twin):
            put_gradients(m, step)
        if step == 3:
            model.bias.grad = twin.bias.grad = None
        ours.step()
        theirs.step()
    assert_equal(model, twin)


# --- On the manifold, for good. ---


@every_row
def test_frames_stay_frames_and_momentum_tangent(row):
    model = Model(torch.float64)
    optimizer = row.make(model.parameters())
    train(model, optimizer, range(2, 8))
    for p in (model.one, model.many, model.large, model.frame):
        assert frame_error(p) < 1e-13
        if row.momentum and row.options.get("retraction") != "pogo":
            u = optimizer.state[p][row.momentum]
            off = (p.manifold.proju(p.detach(), u) - u).abs().max()
            assert off < 1e-13 * (1 + u.abs().max())


@pytest.mark.slow
@every_row
def test_frames_do_not_drift_in_float32(row):
    """By noise; ten thousand steps of one row of each class, a thousand of the others."""
    model = Model(generic=False)
    del model.plain, model.many
    optimizer = row.make(model.parameters())
    first = next(other for other in ROWS.values() if other.cls is row.cls)
    worst = 0.0
    for step in range(10_000 if row is first else 1_000):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        if step % 100 == 99:
            worst = max(worst, *map(frame_error, (model.one, model.large, model.frame)))
    assert worst <= 2e-6


@every_row
def test_points_are_put_back_every_so_many_steps(row):
    calls = []

    class Counting(row.cls):
        def stabilize_group(self, group):
            calls.append(taken)
            super().stabilize_group(group)

    model = Model()
    optimizer = Counting(model.parameters(), **{"lr": row.lr, **row.options, "stabilize": 3})
    for taken in range(2, 9):
        train(model, optimizer, [taken])
    assert calls == [4, 7]


# --- What is refused, before anything has moved. ---


@every_row
@pytest.mark.parametrize("name", ["plain", "one", "frame", "sphere"])
def test_sparse_gradients(row, name):
    model = Model()
    start = copy.deepcopy(model)
    optimizer = row.make(model.parameters())
    put_gradients(model, 0)
    p = model.get_parameter(name)
    p.grad = p.grad.to_sparse()
    with pytest.raises(OptimizerError, match=r"sparse one; build its embedding with sparse=False"):
        optimizer.step()
    assert_equal(model, start)


@every_row
@pytest.mark.parametrize(
    "setting",
    [{"lr": -1.0}, {"lr": "1"}, {"lr": float("nan")}, {"weight_decay": -1.0}, {"stabilize": 0},
     {"retraction": "svd"}, {"maximize": "yes"}, {"foreach": 1}, {"fused": True},
     {"differentiable": True}],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be_used(row, setting):
    model = Model()
    start = copy.deepcopy(model)
    options = {"lr": row.lr, **row.options}
    (key,) = setting
    known = key == "differentiable" and row.cls is RiemannianMuon
    with pytest.raises(TypeError if known else OptimizerError, match=key):
        row.cls(model.parameters(), **{**options, **setting})
    optimizer = row.make([model.plain])
    with pytest.raises(OptimizerError, match=key):
        optimizer.add_param_group({"params": [model.one], **setting})
    assert len(optimizer.param_groups) == 1
    optimizer = row.make(model.parameters())
    state = optimizer.state_dict()
    state["param_groups"][0].update(setting)
    with pytest.raises(OptimizerError, match=key):
        optimizer.load_state_dict(state)
    put_gradients(model, 0)
    if setting != {"lr": -1.0}:  # schedules may end a rounding below zero
        optimizer.param_groups[0].update(setting)
        with pytest.raises(OptimizerError, match=key):
            optimizer.step()
    assert_equal(model, start)


@every_row
def test_check_optimizer_accepts_it(row):
    model = Model()
    check_optimizer(row.make(model.parameters()), model)
