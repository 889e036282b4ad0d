"""Steps that never wait for a device, and can be captured: by stand-ins, on the CPU.

- The device ``meta`` has no values: whoever asks for one gets an error, as an accelerator would
  have to wait. It takes the way of all devices that are not the CPU.
- ``FakeTensorMode`` has a device ``cuda`` without a GPU, where what lies on another device cannot
  be mixed in.
- A tape of the operations of one step, run again on the memory that they ran on, is what a captured
  graph does. Whatever Python decided or counted is frozen in it.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from saved_states import through_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.frames.retractions import RETRACTIONS, Retraction
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD, _base
from sttp_manifold.tt.shape import TTShape

SHAPE = TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4)
OPTIMIZERS = [
    (RiemannianAdam, {}),
    (RiemannianAdam, {"second_moment": "frame"}),
    (RiemannianAdam, {"second_moment": "frame", "capturable": True, "amsgrad": True}),
    (RiemannianAdam, {"amsgrad": True}),
    (RiemannianAdam, {"capturable": True}),
    (RiemannianAdam, {"capturable": True, "amsgrad": True}),
    (RiemannianSGD, {}),
    (RiemannianSGD, {"momentum": 0.9, "nesterov": True}),
]
# What makes the host wait on an accelerator: values and counts asked for, errors looked up.
WAITS = (
    "_local_scalar_dense",
    "_linalg_check_errors",
    "nonzero",
    "masked_select",
    "index.Tensor",
    "unique",
    "equal.default",
    "linalg_svd",
    "linalg_eig",
    "is_nonzero",
)


def points(dtype=torch.float64, seed=0, spectrum="free"):
    """One of every kind that moves in batches: alone, with a batch, and a single frame."""
    generator = torch.Generator().manual_seed(seed)
    M = SpectralTTManifold(SHAPE, spectrum=spectrum)
    params = [M.random_parameter(*b, dtype=dtype, generator=generator) for b in ((), (), (2,))]
    start = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64, generator=generator))[0]
    start = start.contiguous().to(dtype)
    return [*params, ManifoldParameter(start, manifold=EuclideanStiefel())]


def put_gradients(params, seed):
    """In place, as a captured backward pass would."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


class Tape(TorchDispatchMode):
    """The operations that ran, with what they took and gave."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ran.append((func, args, kwargs or {}, result))
        return result

    def names(self):
        return [str(func) for func, *_ in self.ran]

    @torch.no_grad()
    def replay(self):
        """Run them again: what is computed anew goes to where it was."""
        for func, args, kwargs, result in self.ran:
            if func.is_view:
                continue
            for new, old in zip(
                tree_leaves(func(*args, **kwargs)), tree_leaves(result), strict=True
            ):
                if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


# --- No value is asked for. ---


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize(("spectrum", "weight_decay"), [("free", 0.0), ("bounded", 0.1)])
def test_a_step_without_values(cls, options, retraction, spectrum, weight_decay):
    params = []
    for p in points(spectrum=spectrum):
        q = ManifoldParameter(p.detach().to("meta"), manifold=p.manifold)
        q.grad = torch.empty_like(q.detach())
        params.append(q)
    optimizer = cls(params, lr=0.1, retraction=retraction, weight_decay=weight_decay, **options)
    optimizer.step()
    for shape in ((), (1,)):
        optimizer.param_groups[0]["lr"] = torch.empty(shape, device="meta")
        optimizer.step()
    optimizer.state_dict()
    optimizer.step()
    optimizer.stabilize()


def test_stabilizing_every_few_steps_needs_no_values_either():
    p = points()[0]
    q = ManifoldParameter(p.detach().to("meta"), manifold=p.manifold)
    q.grad = torch.empty_like(q.detach())
    for cls, options in ((RiemannianAdam, {}), (RiemannianSGD, {"momentum": 0.9})):
        optimizer = cls([q], lr=0.1, stabilize=2, **options)
        for _ in range(4):
            optimizer.step()


def test_the_stand_in_would_notice():
    q = torch.empty(3, device="meta")
    for ask in (float, bool, lambda x: x.sum().item(), lambda x: x[x > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask(q[:1] if ask in (float, bool) else q)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Parameters on a device cuda that is not there.

    A fake tensor cannot be a ``ManifoldParameter`` as well, and has no address.
    """
    monkeypatch.setattr(_base, "is_riemannian", lambda p: hasattr(p, "manifold"))
    M = SpectralTTManifold(SHAPE)
    with FakeTensorMode():
        params = [torch.empty(*b, M.n_elements, device="cuda") for b in ((), (), (2,))]
        for p in params:
            p.manifold = M
            p.grad = torch.empty_like(p)
            p.data_ptr = lambda: 0
        yield params


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_a_step_on_a_device_cuda(fake_cuda, cls, options, retraction):
    """Nothing of another device is mixed in or copied over, and nothing that waits is called."""
    optimizer = cls(fake_cuda, lr=0.1, retraction=retraction, **options)
    if not options.get("capturable"):
        optimizer.step()  # which makes a count on the host
    for lr in (0.1, torch.empty((), device="cuda")):
        optimizer.param_groups[0]["lr"] = lr
        with Tape() as tape:
            optimizer.step()
        assert len(tape.ran) > 30
        for func, args, kwargs, result in tape.ran:
            assert not any(wait in str(func) for wait in WAITS), func
            tensors = [t for t in tree_leaves((args, kwargs, result)) if hasattr(t, "device")]
            assert all(t.device.type == "cuda" for t in tensors), func
    for state in optimizer.state.values():
        for name, value in state.items():
            on_host = name == "step" and not options.get("capturable")
            assert value.device.type == ("cpu" if on_host else "cuda"), name


def test_the_count_of_a_state_that_was_not_capturable_moves_to_the_device(fake_cuda):
    optimizer = RiemannianAdam(fake_cuda)
    optimizer.step()
    optimizer.param_groups[0]["capturable"] = True
    optimizer.step()
    optimizer.step()
    assert all(state["step"].device.type == "cuda" for state in optimizer.state.values())


# --- How many kernels. ---

COPIES = {"cat", "_foreach_copy_", "_foreach_add_"}
VIEWS = {"view", "split_with_sizes", "detach", "expand", "unsqueeze", "transpose", "_unsafe_view"}


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_the_work_of_a_step_does_not_grow_with_the_number_of_parameters(cls, options, retraction):
    counts = {}
    for number in (3, 60):
        M = SpectralTTManifold(SHAPE)
        params = [
            ManifoldParameter(M.random_parameter().detach().to("meta"), manifold=M)
            for _ in range(number)
        ]
        for p in params:
            p.grad = torch.empty_like(p.detach())
        optimizer = cls(params, lr=0.1, retraction=retraction, **options)
        optimizer.step()
        with Tape() as tape:
            optimizer.step()
        counts[number] = Counter(func.overloadpacket.__name__ for func, *_ in tape.ran)
    few, many = counts[3], counts[60]
    # Joining and putting back is one call for all parameters as well; its views are one for each.
    assert {k: n for k, n in few.items() if k not in VIEWS} == {
        k: n for k, n in many.items() if k not in VIEWS
    }
    assert few.keys() == many.keys()
    assert sum(few[k] for k in COPIES) <= 12 * len(M.frame_groups) + 12
    assert few["bmm"] + few["baddbmm"] + few["baddbmm_"] > 0


# --- What is captured. ---


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"maximize": True, "foreach": False}, {"weight_decay": 0.1},
     {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    ids=lambda o: "-".join(o) or "plain",
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_capturable_steps_are_the_steps(retraction, options, dtype):
    """Fifty of them, with a rate that a schedule changes: a number there, a tensor here."""
    ends = []
    for capturable in (False, True):
        params = points(dtype)
        lr = torch.tensor(0.05, dtype=torch.float64) if capturable else 0.05
        options = {**options, "capturable": capturable}
        optimizer = RiemannianAdam(params, lr=lr, retraction=retraction, **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        for seed in range(50):
            put_gradients(params, seed)
            optimizer.step()
            scheduler.step()
        assert (optimizer.param_groups[0]["lr"] is lr) == capturable
        ends.append((params, optimizer))
    atol = 3e-5 if dtype == torch.float32 else 1e-13
    (a, first), (b, second) = ends
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=atol)
        for name, value in first.state[p].items():
            other = second.state[q][name]
            torch.testing.assert_close(value, other, rtol=1e-4 if atol > 1e-9 else 1e-12, atol=atol)


def test_bias_corrections_of_float32_have_all_their_digits():
    """``1 - 0.999`` in float32 has four."""
    ends = []
    start = points()[3].detach()
    for dtype, capturable in ((torch.float64, False), (torch.float32, True)):
        x = ManifoldParameter(start.to(dtype, copy=True), manifold=EuclideanStiefel())
        x.grad = 1e-3 * torch.ones_like(x.detach())
        RiemannianAdam([x], lr=0.3, eps=0.0, capturable=capturable).step()
        ends.append((x.detach() - start).norm())
    assert float(ends[1] / ends[0]) == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9)])
def test_betas_may_be_tensors(betas):
    ends = []
    for make in (float, lambda b: torch.tensor(b, dtype=torch.float64)):
        params = points()
        optimizer = RiemannianAdam(params, lr=0.05, betas=tuple(map(make, betas)), capturable=True)
        for seed in range(5):
            put_gradients(params, seed)
            optimizer.step()
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends, rtol=0, atol=1e-13)


def addresses(optimizer):
    return {
        (i, name): value.data_ptr()
        for i, p in enumerate(optimizer.param_groups[0]["params"])
        for name, value in [("point", p), *optimizer.__dict__["state"][p].items()]
    }


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (RiemannianAdam, {"capturable": True}),
        (RiemannianAdam, {"capturable": True, "amsgrad": True, "weight_decay": 0.1}),
        (RiemannianAdam, {"capturable": True, "second_moment": "frame"}),
        (RiemannianSGD, {"momentum": 0.9}),
    ],
)
def test_what_persists_stays_where_it_is(monkeypatch, cls, options, retraction):
    """Also when somebody reads it, and with nothing kept elsewhere from one step to the next."""
    if cls is RiemannianSGD:  # captured without a flag, so on any accelerator
        assert cls._stays(None, None, torch.empty(1, device="meta"))
        assert not cls._stays(None, None, torch.empty(1))
        monkeypatch.setattr(cls, "_stays", lambda *_: True)
    params = points()
    optimizer = cls(params, lr=0.05, retraction=retraction, **options)
    put_gradients(params, 0)
    optimizer.step()
    first = addresses(optimizer)
    assert len(first) >= 2 * len(params)
    for seed in range(1, 6):
        put_gradients(params, seed)
        before = {k: v.clone() for k, v in optimizer.__dict__["state"][params[0]].items()}
        optimizer.step()
        assert addresses(optimizer) == first
        blocks = [b for stacks in optimizer._stacks.values() for b in stacks.blocks]
        assert not any(b.arrays or b.scalars for b in blocks)
        for name, value in optimizer.__dict__["state"][params[0]].items():
            assert name == "max_exp_avg_sq" or not torch.equal(value, before[name]), name
        optimizer.state_dict()
        optimizer.stabilize()
        assert addresses(optimizer) == first


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (RiemannianAdam, {"capturable": True}),
        (RiemannianAdam, {"capturable": True, "second_moment": "frame"}),
        (RiemannianAdam, {"capturable": True, "amsgrad": True}),
        (RiemannianAdam, {"capturable": True, "weight_decay": 0.1, "maximize": True}),
        (RiemannianAdam, {"capturable": True, "weight_decay": 0.1, "decoupled_weight_decay": True}),
        (RiemannianSGD, {}),
        (RiemannianSGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_a_tape_of_one_step_is_every_step(monkeypatch, cls, options, retraction):
    """Captured once, replayed with other gradients and rates, read and written in between."""
    if cls is RiemannianSGD:
        # As on an accelerator, where it has no flag to tell by.
        monkeypatch.setattr(cls, "_stays", lambda *_: True)
        step = Retraction.step
        monkeypatch.setattr(Retraction, "step", lambda *a: step(*a, look=False))
    params = points()
    twins = copy.deepcopy(params)
    rates = (0.05, 0.05)
    if cls is RiemannianAdam:
        rates = tuple(torch.tensor(0.05, dtype=torch.float64) for _ in range(2))
    captured, stepped = (
        cls(q, lr=lr, retraction=retraction, **options)
        for q, lr in zip((params, twins), rates, strict=True)
    )
    for seed in range(2):  # the warm-up
        for q, optimizer in ((params, captured), (twins, stepped)):
            put_gradients(q, seed)
            optimizer.step()
    with Tape() as tape:
        captured.step()
    assert not [name for name in tape.names() if any(wait in name for wait in WAITS)]
    stepped.step()
    for seed in range(2, 12):
        put_gradients(params, seed)
        put_gradients(twins, seed)
        if cls is RiemannianAdam:
            for rate in rates:
                rate.mul_(0.9)
        tape.replay()
        stepped.step()
        if seed == 5:
            captured.state_dict()
            captured.stabilize()
            stepped.stabilize()
        if seed == 7:
            for q, optimizer in ((params, captured), (twins, stepped)):
                for p in q:
                    for name, value in optimizer.state[p].items():
                        value.mul_(2.0 if name == "step" else 0.5)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-14)
        a, b = captured.state[p], stepped.state[q]
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-14)


def test_the_tape_would_notice_a_count_of_the_host():
    """Without the flag the bias corrections are numbers, which a replay repeats."""
    params = points()
    twins = copy.deepcopy(params)
    captured, stepped = RiemannianAdam(params, lr=0.05), RiemannianAdam(twins, lr=0.05)
    for q, optimizer in ((params, captured), (twins, stepped)):
        put_gradients(q, 0)
        optimizer.step()
    with Tape() as tape:
        captured.step()
    tape.replay()
    stepped.step()
    stepped.step()
    assert not torch.allclose(params[0].detach(), twins[0].detach(), rtol=0, atol=1e-6)


def test_parameters_that_joined_later_keep_their_own_count():
    """In one batch with the others, whose counts nobody may look at."""
    params = points()
    apart = copy.deepcopy(params)
    together = RiemannianAdam(params, lr=0.05, capturable=True)
    alone = [RiemannianAdam([p], lr=0.05) for p in apart]
    for seed in range(8):
        put_gradients(params, seed)
        put_gradients(apart, seed)
        if seed < 3:
            params[1].grad = apart[1].grad = None
        together.step()
        assert len(together._stacks) == 1
        for optimizer in alone:
            optimizer.step()
    assert [int(together.state[p]["step"]) for p in params] == [8, 5, 8, 8]
    for p, q in zip(params, apart, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("capturable", [False, True])
def test_largest_moments_of_some_parameters_only(capturable):
    """Those that have moved while amsgrad was on have them, and the others of the batch do not."""
    params = points()
    apart = copy.deepcopy(params)
    options = dict(lr=0.05, amsgrad=True, betas=(0.9, 0.5))
    together = RiemannianAdam(params, **options, capturable=capturable)
    alone = [RiemannianAdam([p], **options) for p in apart]
    for seed in range(6):
        put_gradients(params, seed)
        put_gradients(apart, seed)
        for optimizer in (together, *alone):
            optimizer.param_groups[0]["amsgrad"] = seed < 1 or seed > 2
        if seed < 2:  # one starts late and another pauses: as many steps of both
            params[1 - seed].grad = apart[1 - seed].grad = None
        for optimizer in (together, *alone):
            optimizer.step()
    for p, q in zip(params, apart, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-13)


# --- State. ---


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)])
@pytest.mark.parametrize("carry", [lambda s: s, through_file], ids=["directly", "through a file"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_loaded_run_continues_bit_for_bit(carry, amsgrad, lr):
    params = points(torch.float32)
    optimizer = RiemannianAdam(params, lr=lr, amsgrad=amsgrad, capturable=True)
    for seed in range(3):
        put_gradients(params, seed)
        optimizer.step()
    twins = copy.deepcopy(params)
    resumed = RiemannianAdam(twins, lr=9.0)
    resumed.load_state_dict(carry(optimizer.state_dict()))
    assert resumed.param_groups[0]["capturable"]
    for seed in range(3, 7):
        for q, o in ((params, optimizer), (twins, resumed)):
            put_gradients(q, seed)
            o.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p.detach(), q.detach())
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][name])
            assert value.data_ptr() != resumed.state[q][name].data_ptr()


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_deepcopy_and_pickle_carry_the_optimizer_with_its_parameters(carry):
    params = points(torch.float32)
    optimizer = RiemannianAdam(params, lr=0.05, capturable=True)
    for seed in range(3):
        put_gradients(params, seed)
        optimizer.step()
    twins, resumed = carry((params, optimizer))
    for seed in range(3, 6):
        for q, o in ((params, optimizer), (twins, resumed)):
            put_gradients(q, seed)
            o.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p.detach(), q.detach())


@pytest.mark.parametrize("capturable", [False, True])
def test_after_a_step_that_failed_there_is_a_state_still(capturable):
    params = points()
    optimizer = RiemannianAdam(params, lr=0.05, capturable=capturable)
    put_gradients(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    group = optimizer.param_groups[0]
    group["weight_decay"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    after = optimizer.state_dict()["state"]
    for k in before:
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(before[k][name], after[k][name])
    group["weight_decay"] = 0
    optimizer.step()


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_the_flag_may_change_between_steps(order):
    """The state is the same, whoever counts."""
    params = points()
    twins = copy.deepcopy(params)
    optimizer, plain = RiemannianAdam(params, lr=0.05), RiemannianAdam(twins, lr=0.05)
    for seed in range(8):
        optimizer.param_groups[0]["capturable"] = order[seed // 4]
        for q, o in ((params, optimizer), (twins, plain)):
            put_gradients(q, seed)
            o.step()
    for p, q in zip(params, twins, strict=True):
        assert int(optimizer.state[p]["step"]) == 8
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-13)


# --- What is refused. ---


def test_what_others_move_is_not_captured():
    sphere = geoopt.Sphere()
    other = ManifoldParameter(sphere.projx(torch.randn(5)), manifold=sphere)
    match = (
        r"cannot honour capturable=True for parameters on Sphere.*geoopt's own operations.*"
        r"RiemannianAdam\(those, lr=...\), and step it outside of the graph"
    )
    params = points(torch.float32)
    with pytest.raises(OptimizerError, match=match):
        RiemannianAdam([*params, other], capturable=True)
    optimizer = RiemannianAdam(
        [dict(params=params, capturable=True), dict(params=[other])], lr=0.05
    )
    for p in (*params, other):
        p.grad = torch.ones_like(p.detach())
    optimizer.step()
    optimizer.param_groups[1]["capturable"] = True
    start = params[0].detach().clone()
    with pytest.raises(OptimizerError, match="Sphere"):
        optimizer.step()
    assert torch.equal(start, params[0].detach())


def test_a_count_of_steps_by_the_host_is_not_captured():
    params = points(torch.float32)
    match = (
        r"stabilize=5 together with capturable=True.*RiemannianAdam\(params, lr=..., "
        r"capturable=True\) without it, and optimizer.stabilize\(\) between replays"
    )
    with pytest.raises(OptimizerError, match=match):
        RiemannianAdam(params, capturable=True, stabilize=5)
    optimizer = RiemannianAdam(params, capturable=True)
    put_gradients(params, 0)
    optimizer.step()
    optimizer.stabilize()
    plain = torch.nn.Parameter(torch.ones(3))
    RiemannianAdam([plain], capturable=True, stabilize=5)


def test_plain_parameters_follow_torch():
    plain = torch.nn.Parameter(torch.ones(3))
    plain.grad = torch.ones(3)
    for cls in (torch.optim.Adam, RiemannianAdam):
        with pytest.raises(AssertionError, match="capturable=True"):
            cls([plain], capturable=True).step()


def test_torch_is_asked_whether_a_step_may_be_captured(monkeypatch):
    """It refuses while a stream is captured and the flag is off."""
    asked = []
    monkeypatch.setattr(
        torch.optim.Optimizer,
        "_accelerator_graph_capture_health_check",
        lambda self: asked.append(self),
        raising=False,
    )
    params = points()
    optimizer = RiemannianAdam(params)
    put_gradients(params, 0)
    optimizer.step()
    assert asked == [optimizer]
