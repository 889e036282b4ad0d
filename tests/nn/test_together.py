"""Weights computed together are those computed one by one, whatever torch does around them."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, spectra
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sttp_manifold import TTShape
from sttp_manifold.nn import (
    SpectralConv2d,
    SpectralLinear,
    batch,
    compress,
    decompress,
    layout,
    make_weight,
    scope,
    switch,
    together,
)
from sttp_manifold.nn.scope import Entry, is_together
from sttp_manifold.tt import SPECTRA

METHODS = ("householder", "riemannian")
DOUBLE = {"dtype": torch.float64}

every_method = pytest.mark.parametrize("method", METHODS)
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


class Block(nn.Module):
    """Two equal convolutions and a shortcut, as networks are mostly made."""

    def __init__(self, width: int, method: str, spectrum: str) -> None:
        super().__init__()
        how = {"method": method, "spectrum": spectrum, "init": "random", **DOUBLE}
        self.first = SpectralConv2d(width, width, 3, 4, padding=1, **how)
        self.second = SpectralConv2d(width, width, 3, 4, padding=1, **how)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).tanh())


class Net(nn.Module):
    """Weights in all three forms: formed, as two factors, and as cores."""

    def __init__(self, method: str = "householder", spectrum: str = "free") -> None:
        super().__init__()
        how = {"method": method, "spectrum": spectrum, "init": "random", **DOUBLE}
        self.blocks = nn.ModuleList(Block(8, method, spectrum) for _ in range(3))
        self.wide = nn.ModuleList(SpectralConv2d(8, 8, 3, 2, padding=1, **how) for _ in range(2))
        self.linears = nn.ModuleList(SpectralLinear(60, 60, 6, **how) for _ in range(2))
        self.middle: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        self.middle()
        for layer in self.wide:
            x = layer(x).tanh()
        x = x.flatten(1)[:, :60]
        for layer in self.linears:
            x = layer(x)
        return x


def made(method: str = "householder", spectrum: str = "free", seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return together(Net(method, spectrum))


def image(count: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, 4, 4, generator=generator, **DOUBLE)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Output and gradients of a scalar of it."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), gradients(model)


def alone(model: nn.Module) -> nn.Module:
    """A copy whose layers compute their own weights."""
    return together(copy.deepcopy(model), False)


def agree(ours: tuple[Tensor, list], wanted: tuple[Tensor, list]) -> None:
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-10, atol=1e-12)
    assert [g is None for g in ours[1]] == [g is None for g in wanted[1]]
    for mine, other in zip(ours[1], wanted[1], strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each weight of a batch that was asked for could be given out.

    Whatever has a partner is batched: which batches are worth it is another matter.
    """
    monkeypatch.setattr(batch, "_gain", lambda some, _: [n >= 2 for n in layout.partners(some)])
    log: list[bool] = []
    take = Entry.take

    def spy(self: Entry, weight: object) -> object:
        found = take(self, weight)
        log.append(found is not None)
        return found

    monkeypatch.setattr(Entry, "take", spy)
    yield log
    assert not scope._scopes.stack


def warm(model: nn.Module, x: Tensor, taken: list[bool]) -> None:
    """The first forward finds out what the next ones need."""
    for _ in range(2):
        run(model, x)
    assert taken
    assert all(taken)
    taken.clear()


# -- the same numbers --------------------------------------------------------------------------


@every_method
@every_spectrum
def test_outputs_and_gradients_are_those_of_weights_alone(
    method: str, spectrum: str, taken: list[bool]
) -> None:
    model, x = made(method, spectrum), image()
    wanted = run(alone(model), x)
    for _ in range(3):
        agree(run(model, x), wanted)
    assert len(taken) == 2 * 10
    assert all(taken)


@given(seed=seeds, spectrum=spectra, method=st.sampled_from(METHODS), data=st.data())
def test_any_weights_in_any_forms(
    seed: int, spectrum: str, method: str, data: st.DataObject
) -> None:
    """Random plans, each twice, forms mixed, some outputs without a gradient."""
    torch.manual_seed(seed)
    modes = st.lists(st.integers(1, 4), min_size=1, max_size=3)
    shapes = [
        TTShape(data.draw(modes), data.draw(modes), rank=data.draw(st.integers(1, 5)))
        for _ in range(2)
    ]
    forms = ("dense", "factors", "cores")
    wanted = [(shape, data.draw(st.sampled_from(forms))) for shape in shapes for _ in range(3)]
    weights = [make_weight(method, shape, spectrum, "random", **DOUBLE) for shape, _ in wanted]
    used = [data.draw(st.booleans()) for _ in wanted]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ModuleList(weights)

        def forward(self) -> list[tuple[Tensor, ...]]:
            values = []
            for weight, (_, form) in zip(self.weights, wanted, strict=True):
                if form == "dense":
                    values.append((weight(),))
                elif form == "factors":
                    values.append(weight.factors())
                else:
                    tt = weight.tt()
                    values.append((*tt.left, tt.spectrum, *tt.right))
            return values

    def step(model: nn.Module) -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        values = model()
        total = torch.zeros((), **DOUBLE)
        for mine, counts in zip(values, used, strict=True):
            if counts:
                total = total + sum((v * v.detach().sin()).sum() for v in mine)
        if total.requires_grad:
            total.backward()
        flat = torch.cat([v.detach().flatten() for mine in values for v in mine])
        return flat, gradients(model)

    model = together(Model())
    expected = step(alone(model))
    for _ in range(2):
        agree(step(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, taken: list[bool]) -> None:
    """Frames are computed in float32 and rounded once, as for a weight alone."""
    model = made().to(dtype)
    weights = [block.first.spectral_weight for block in model.blocks]

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ModuleList(weights)

        def forward(self) -> Tensor:
            return torch.stack([weight() for weight in self.weights])

    both = together(Sum())
    both()
    ours = both()
    assert taken == [True] * 3
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, alone(both)(), rtol=0, atol=torch.finfo(dtype).eps)


def test_second_derivatives(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    other = alone(model)

    def products(m: nn.Module) -> list[Tensor]:
        parameters = list(m.parameters())
        loss = m(x).square().sum()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        scalar = sum((g * g.detach().cos()).sum() for g in first)
        return list(torch.autograd.grad(scalar, parameters))

    for mine, wanted in zip(products(model), products(other), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-9)
    assert all(taken)


# -- no stale weight ---------------------------------------------------------------------------


def first_weight(model: Net) -> nn.Module:
    return model.linears[0].spectral_weight


def parameter(model: Net) -> nn.Parameter:
    return next(first_weight(model).parameters())


def owner(model: Net) -> tuple[nn.Module, str]:
    weight = first_weight(model)
    return (weight.frames, "0") if hasattr(weight, "frames") else (weight, "point")


def by_optimizer(model: Net) -> None:
    p = parameter(model)
    before, p.grad = p.grad, torch.ones_like(p)
    torch.optim.SGD([p], lr=0.1).step()
    p.grad = before


def by_data(model: Net) -> None:
    parameter(model).data.mul_(1.5)


def by_new_data(model: Net) -> None:
    parameter(model).data = parameter(model).data * 1.5


def by_copy(model: Net) -> None:
    with torch.no_grad():
        parameter(model).copy_(parameter(model) * 1.5)


def in_place(model: Net) -> None:
    with torch.no_grad():
        parameter(model)[:3] += 0.25


def by_detached_alias(model: Net) -> None:
    parameter(model).detach().add_(0.25)


def by_numpy(model: Net) -> None:
    parameter(model).detach().numpy()[:3] += 0.25


def by_state_dict(model: Net) -> None:
    weight = first_weight(model)
    state = {k: v.clone() for k, v in weight.state_dict().items()}
    for name, value in state.items():
        if name == "point":
            value.copy_(weight.manifold.random(value.shape, **DOUBLE))
        else:
            value.mul_(1.5)
    weight.load_state_dict(state)


def by_assigned_state_dict(model: Net) -> None:
    weight = first_weight(model)
    state = {k: v.clone() for k, v in weight.state_dict().items()}
    if "point" in state:
        state["point"] = weight.manifold.random(state["point"].shape, **DOUBLE).clone()
    else:
        state["frames.0"].mul_(1.5)
    weight.load_state_dict(state, assign=True)


def by_swap(model: Net) -> None:
    p = parameter(model)
    new = copy.deepcopy(p)
    new.data.mul_(1.5)
    torch.utils.swap_tensors(p, new)


def by_new_parameter(model: Net) -> None:
    module, name = owner(model)
    new = copy.deepcopy(module._parameters[name])
    new.data.mul_(1.5)
    setattr(module, name, new)


def by_encode(model: Net) -> None:
    weight = first_weight(model)
    weight.encode_(make_weight(weight.method, weight.shape, init="random", **DOUBLE).tt())


def by_resize(model: Net) -> None:
    """The same values in other memory, then others: neither version nor identity changes."""
    p = parameter(model)
    p.data = p.data.clone()
    p.data.add_(0.25)


def by_same_memory(model: Net) -> None:
    """Another parameter in the same memory: nothing but its identity tells, and its gradient."""
    module, name = owner(model)
    old = module._parameters[name]
    new = copy.copy(old)
    new.data = old.data
    assert new is not old
    assert new.data_ptr() == old.data_ptr()
    setattr(module, name, new)


def by_freezing(model: Net) -> None:
    first_weight(model).requires_grad_(False)


def by_new_weight(model: Net) -> None:
    switch(model.linears[0], METHODS[first_weight(model).method == "householder"])


CHANGES = [
    by_optimizer, by_data, by_new_data, by_copy, in_place, by_detached_alias, by_numpy,
    by_state_dict, by_assigned_state_dict, by_swap, by_new_parameter, by_encode, by_resize,
    by_same_memory, by_freezing, by_new_weight,
]  # fmt: skip


@every_method
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("where", ["between forwards", "in the middle of a forward"])
def test_no_stale_weight_is_seen(
    method: str, change: Callable[[Net], None], where: str, taken: list[bool]
) -> None:
    model, x = made(method), image()
    warm(model, x, taken)
    before = model(x).detach()
    other = alone(model)
    if change is by_swap and where != "between forwards":
        # torch does not swap what a graph refers to.
        model.middle = lambda: by_swap(model)
        with pytest.raises(RuntimeError, match="use_count"):
            model(x)
        for m in (model, other):
            m.middle = lambda m=m: by_swap(m)
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(x), other(x), rtol=1e-10, atol=1e-12)
        return
    for m in (model, other):
        torch.manual_seed(5)
        if where == "between forwards":
            change(m)
        else:
            m.middle = lambda m=m: change(m)
    wanted = []
    for m in (other, model):
        torch.manual_seed(5)
        wanted.append(run(m, x))
    agree(wanted[1], wanted[0])
    if change not in (by_same_memory, by_freezing, by_new_weight):
        assert not torch.allclose(before, wanted[0][0])
    for m in (model, other):
        m.middle = lambda: None
    agree(run(model, x), run(other, x))
    agree(run(model, x), run(other, x))


def test_a_weight_is_unfrozen_in_the_middle_of_a_forward(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    first_weight(model).requires_grad_(False)
    for _ in range(2):
        run(model, x)
    other = alone(model)
    for m in (model, other):
        m.middle = lambda m=m: first_weight(m).requires_grad_(True)
    agree(run(model, x), run(other, x))
    assert parameter(model).grad is not None


@every_method
def test_a_hook_of_the_user_changes_a_parameter(method: str, taken: list[bool]) -> None:
    model, x = made(method), image()
    warm(model, x, taken)

    def hook(m: Net) -> Callable[..., None]:
        return lambda *_: by_data(m)

    other = alone(model)
    for m in (model, other):
        m.blocks[2].second.register_forward_hook(hook(m))
    agree(run(model, x), run(other, x))
    assert False in taken
    taken.clear()
    agree(run(model, x), run(other, x))


@every_method
def test_functional_call_sees_its_own_parameters(method: str, taken: list[bool]) -> None:
    model, x = made(method), image()
    warm(model, x, taken)
    base = model(x).detach()
    if method == "householder":
        new = {k: (1.5 * v).detach().requires_grad_() for k, v in model.named_parameters()}
    else:
        new = {k: v.detach().clone() for k, v in model.named_parameters()}
        for name, value in new.items():
            if name.endswith("point"):
                manifold = model.get_submodule(name.removesuffix(".point")).manifold
                value.copy_(manifold.random(value.shape, **DOUBLE))
            value.requires_grad_()
    other = alone(model)
    found = []
    for m in (model, other):
        y = torch.func.functional_call(m, new, (x,))
        found.append((y.detach(), list(torch.autograd.grad(y.square().sum(), list(new.values())))))
    agree(found[0], found[1])
    assert not torch.allclose(found[0][0], base)
    torch.testing.assert_close(model(x).detach(), base, rtol=1e-12, atol=0)
    assert all(taken)


def test_steps_of_an_inner_loop_are_differentiable(taken: list[bool]) -> None:
    """As in meta-learning: parameters with a history of their own."""
    model, x = made(), image()
    warm(model, x, taken)

    def outer(m: nn.Module) -> tuple[Tensor, list[Tensor]]:
        named = dict(m.named_parameters())
        loss = torch.func.functional_call(m, named, (x,)).square().sum()
        inner = torch.autograd.grad(loss, list(named.values()), create_graph=True)
        stepped = {k: p - 1e-3 * g for (k, p), g in zip(named.items(), inner, strict=True)}
        y = torch.func.functional_call(m, stepped, (x,))
        return y.detach(), list(torch.autograd.grad(y.sum(), list(named.values())))

    agree(outer(model), outer(alone(model)))


# -- what torch does around --------------------------------------------------------------------


def test_two_forwards_before_one_backward(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)

    def both(m: nn.Module) -> tuple[Tensor, list[Tensor | None]]:
        m.zero_grad()
        first, second = m(x), m(image(3, seed=7))
        (first.square().sum() + second.sin().sum()).backward()
        return torch.cat((first, second)).detach(), gradients(m)

    agree(both(model), both(alone(model)))
    assert all(taken)


class Heads(nn.Module):
    """Parts that share nothing; one of them may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            SpectralLinear(12, 12, 4, init="random", **DOUBLE) for _ in "abc"
        )
        self.leave_out: set[int] = set()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for k, part in enumerate(self.parts) if k not in self.leave_out]


def test_backward_passes_through_different_weights_do_not_meet(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    other = alone(model)
    for _ in range(3):
        for m in (model, other):
            m.zero_grad()
            first, second, third = m(x)
            second.square().sum().backward()
            first.sum().backward()
            third.sin().sum().backward(retain_graph=True)
            third.cos().sum().backward()
        agree((x, gradients(model)), (x, gradients(other)))
    assert all(taken)


def test_a_graph_that_was_freed_says_so(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    model(x)
    loss = sum(y.sum() for y in model(x))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_backward_pass_inside_of_a_forward_leaves_the_rest_alone(taken: list[bool]) -> None:
    class Model(Heads):
        def forward(self, x: Tensor) -> Tensor:
            first = self.parts[0](x)
            inner = next(self.parts[0].spectral_weight.parameters())
            (slope,) = torch.autograd.grad(first.square().sum(), inner)
            return self.parts[2](self.parts[1](x)) + slope.sum()

    model, x = together(Model()), torch.randn(4, 12, **DOUBLE)
    other = alone(model)
    for _ in range(3):
        agree(run(model, x), run(other, x))
    assert True in taken


def test_a_weight_left_out_gets_no_gradient(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    other = alone(model)

    def step(m: Heads) -> tuple[Tensor, list[Tensor | None]]:
        m.zero_grad()
        y = torch.stack(m(x))
        y.square().sum().backward()
        return y.detach(), gradients(m)

    for leave_out in ({}, {}, {1}, {0}, {0, 2}, {}, {}):
        for m in (model, other):
            m.leave_out = set(leave_out)
        agree(step(model), step(other))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_gradient_checkpointing(reentrant: bool, whole: bool, taken: list[bool]) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks[:2]:
                x = checkpoint(block, x, use_reentrant=reentrant)
            x = self.blocks[2](x)
            x = self.wide[1](self.wide[0](x)).flatten(1)[:, :60]
            return self.linears[1](self.linears[0](x))

    torch.manual_seed(0)
    model = together(Net() if whole else Checkpointed())
    other = alone(model)
    for _ in range(4):
        x = image().requires_grad_()
        found = []
        for m in (model, other):
            m.zero_grad()
            y = checkpoint(m, x, use_reentrant=reentrant) if whole else m(x)
            y.square().sum().backward()
            found.append((y.detach(), gradients(m)))
        agree(found[0], found[1])
    if not whole:
        assert True in taken


def test_saved_tensor_hooks(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    wanted = run(alone(model), x)
    model.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    y.square().sum().backward()
    agree((y.detach(), gradients(model)), wanted)


COMPILED = """
import copy
import sys
import torch
from torch import nn
from sttp_manifold.nn import compress, together
from sttp_manifold.nn.scope import Entry
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(),
    nn.Sequential(nn.Linear(36, 36), nn.Tanh(), nn.Linear(36, 36)),
).double()
compress(model, 4, method=sys.argv[1], init="random", grow="allow")
twin = together(copy.deepcopy(model), False)
x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
def same(f, g):
    ours, wanted = f(x), g(x)
    torch.testing.assert_close(ours, wanted)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), list(model.parameters())),
        torch.autograd.grad(wanted.square().sum(), list(twin.parameters())),
    ):
        torch.testing.assert_close(a, b)
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
for step in range(3):
    same(compiled, twin)
    for m in (model, twin):
        if sys.argv[1] == "householder":
            with torch.no_grad():
                m[0].spectral_weight.frames[0].add_(0.1)
taken, take = [], Entry.take
Entry.take = lambda entry, weight: taken.append(take(entry, weight)) or taken[-1]
model[3] = torch.compile(model[3], backend="aot_eager")
for _ in range(3):
    same(model, twin)
assert taken and None not in taken, "the rest of a model is computed together"
"""


def run_script(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process of its own: import hooks of the tests stay out of it."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.slow
@every_method
def test_compiled(method: str) -> None:
    worker = run_script(COMPILED, method)
    _, said = worker.communicate(timeout=300)
    assert worker.returncode == 0, said.decode()


@pytest.mark.parametrize("frozen", ["some frames", "some weights", "all"])
@every_method
def test_partial_freezing(method: str, frozen: str, taken: list[bool]) -> None:
    model, x = made(method), image()
    names = {
        "some frames": lambda k: k.endswith(("frames.0", "bias")),
        "some weights": lambda k: "blocks.0" in k or "linears.1" in k or "first" in k,
        "all": lambda k: True,
    }
    for name, p in model.named_parameters():
        p.requires_grad_(not names[frozen](name))
    other = alone(model)
    for _ in range(3):
        for m in (model, other):
            m.zero_grad()
        ours, wanted = model(x), other(x)
        assert ours.requires_grad == wanted.requires_grad
        if ours.requires_grad:
            ours.square().sum().backward()
            wanted.square().sum().backward()
        agree((ours.detach(), gradients(model)), (wanted.detach(), gradients(other)))
    assert True in taken
    for p in model.parameters():
        p.requires_grad_(True)
    for _ in range(2):
        agree(run(model, x), run(alone(model), x))


def test_a_frozen_weight_asks_for_no_graph(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    model.parts[0].requires_grad_(False)
    model.parts[1].requires_grad_(False)
    for _ in range(3):
        assert [y.requires_grad for y in model(x)] == [False, False, True]
    assert len(taken) >= 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_method
def test_without_gradient(method: str, mode: Callable[[], object], taken: list[bool]) -> None:
    model, x = made(method).eval(), image()
    wanted = alone(model)(x).detach()
    for _ in range(3):
        with mode():
            y = model(x)
        assert not y.requires_grad
        torch.testing.assert_close(y.clone(), wanted, rtol=1e-10, atol=1e-12)
    assert all(taken)
    assert len(taken) == 20
    model.train()
    agree(run(model, x), run(alone(model), x))


def test_a_change_of_grad_mode_in_the_middle(taken: list[bool]) -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.blocks[1](self.blocks[0](x))
            return self.wide[1](self.blocks[2](x))

    class Opened(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[1](self.blocks[0](x))
            with torch.enable_grad():
                return self.wide[1](self.blocks[2](x))

    torch.manual_seed(0)
    model, x = together(Model()), image()
    for _ in range(3):
        agree(run(model, x), run(alone(model), x))
    opened = together(Opened())
    for _ in range(3):
        opened.zero_grad()
        with torch.no_grad():
            y = opened(x)
        y.square().sum().backward()
        assert opened.wide[1].spectral_weight.coordinates.grad is not None
        assert opened.blocks[0].first.spectral_weight.coordinates.grad is None


def test_autocast(taken: list[bool]) -> None:
    model, x = made().float(), image().float()
    warm(model, x, taken)
    other = alone(model)
    for _ in range(2):
        found = []
        for m in (model, other):
            m.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = m(x)
            y.float().square().sum().backward()
            found.append((y.detach().float(), gradients(m)))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=0.05, atol=0.05)
        for mine, wanted in zip(found[0][1], found[1][1], strict=True):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, wanted, rtol=0.2, atol=0.2)
    assert all(taken)


def test_transforms_of_torch_func() -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    other = alone(model)
    for _ in range(2):
        model(x)
    named = {k: v.detach() for k, v in model.named_parameters()}

    def loss(m: nn.Module) -> Callable[..., Tensor]:
        return lambda p, row: sum(
            y.square().sum() for y in torch.func.functional_call(m, p, (row,))
        )

    ours, wanted = (torch.func.grad(loss(m))(named, x) for m in (model, other))
    torch.testing.assert_close(ours, wanted)
    rows = torch.func.vmap(lambda row: torch.stack(model(row)))(x)
    torch.testing.assert_close(rows, torch.stack(other(x), 1))


def test_tracing() -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    for _ in range(2):
        model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


WORKER = """
import sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from sttp_manifold.nn import compress, together
rank, store, method = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method="file://" + store, rank=rank, world_size=2
)
torch.manual_seed(0)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.spare = nn.Linear(12, 12)
    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x
model = compress(Model().double(), 3, method=method, grow="allow")
twin = together(__import__("copy").deepcopy(model), False)
ddp = DistributedDataParallel(model, find_unused_parameters=True)
data = torch.randn(2, 5, 12, dtype=torch.float64)
for step in range(4):
    model.zero_grad(); twin.zero_grad()
    ddp(data[rank]).square().mean().backward()
    (sum(twin(x).square().mean() for x in data) / 2).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if name.startswith("spare"):
            assert p.grad is None and q.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
from sttp_manifold.nn.scope import _memories
assert _memories[model][True, True].layouts
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@every_method
def test_distributed_data_parallel(method: str, tmp_path: Path) -> None:
    """Two processes average their gradients; a twin sees the data of both."""
    workers = [run_script(WORKER, str(rank), str(tmp_path / "store"), method) for rank in range(2)]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said.decode()


# -- networks ----------------------------------------------------------------------------------


def test_modules_called_on_their_own(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    other = alone(model)
    for _ in range(2):
        agree(run(model.blocks[0], x), run(other.blocks[0], x))
    weight = model.linears[0].spectral_weight
    torch.testing.assert_close(weight(), other.linears[0].spectral_weight())
    assert not taken


@every_method
def test_copies_and_pickles(method: str, taken: list[bool]) -> None:
    model, x = made(method), image()
    model.middle = None  # a lambda cannot be pickled
    model.middle = print_nothing
    warm(model, x, taken)
    wanted = run(alone(model), x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert is_together(other)
        for _ in range(2):
            agree(run(other, x), wanted)
        with torch.no_grad():
            for p in other.linears[0].parameters():
                p.mul_(1.1)
        agree(run(model, x), wanted)
        assert all(taken)


def print_nothing() -> None:
    """A function that a pickle can name."""


def test_layers_moved_to_another_model(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    second = together(nn.Sequential(model.blocks[0], model.blocks[1], nn.Conv2d(8, 8, 1)).double())
    for _ in range(3):
        agree(run(second, x), run(alone(second), x))
        agree(run(model, x), run(alone(model), x))


def test_nested_roots(taken: list[bool]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made()
            self.after = nn.ModuleList(SpectralLinear(60, 60, 6, **DOUBLE) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.after[1](self.after[0](self.inner(x)))

    model, x = Outer(), image()
    for root in (model, together(model)):
        for _ in range(3):
            taken.clear()
            agree(run(root, x), run(alone_inside(root), x))
        assert len(taken) == (12 if is_together(root) else 10)


def alone_inside(model: nn.Module) -> nn.Module:
    new = copy.deepcopy(model)
    for module in new.modules():
        together(module, False)
    return new


def test_shared_weights_and_layers_used_twice(taken: list[bool]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = SpectralLinear(12, 12, 4, init="random", **DOUBLE)
            self.b = SpectralLinear(12, 12, 4, weight=self.a.spectral_weight, **DOUBLE)
            self.c = SpectralLinear(12, 12, 4, init="random", **DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.c(self.a(self.c(x)).tanh())))

    model, x = together(Model()), torch.randn(4, 12, **DOUBLE)
    for _ in range(3):
        agree(run(model, x), run(alone(model), x))
    assert taken == [True] * 10


def test_what_is_given_out_belongs_to_the_caller(taken: list[bool]) -> None:
    """Writing into a weight is as harmless as if it had been computed for this call alone."""

    class Model(Heads):
        def forward(self, x: Tensor) -> Tensor:
            first = self.parts[0].weight
            first.data.zero_()
            second = self.parts[1].weight
            second.mul_(2)
            again = self.parts[0].weight + self.parts[1].weight
            return x @ again + self.parts[1](x) + x @ second + self.parts[2](x)

    model, x = together(Model()), torch.randn(4, 12, **DOUBLE)
    for _ in range(3):
        agree(run(model, x), run(alone(model), x))
    assert all(taken)


def test_an_error_or_an_interrupt_leaves_nothing_behind(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    wanted = run(alone(model), x)

    def fail(error: BaseException) -> Callable[[], None]:
        def raises() -> None:
            raise error

        return raises

    for error in (ValueError("no"), KeyboardInterrupt()):
        model.middle = fail(error)
        with pytest.raises(type(error)):
            model(x)
        model.middle = lambda: None
        taken.clear()
        for _ in range(2):  # a graph left over could not be used twice
            run(model.linears[0], torch.randn(50, 60, **DOUBLE))
        assert not taken
        agree(run(model, x), wanted)


def test_parametrized_weights_compute_their_own(taken: list[bool]) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model, x = made(), image()
    warm(model, x, taken)
    weight = model.linears[0].spectral_weight
    before = model(x).detach()
    nn.utils.parametrize.register_parametrization(weight, "coordinates", Double())
    for _ in range(3):
        agree(run(model, x), run(alone(model), x))
    assert not torch.allclose(before, model(x))


def test_two_threads_run_one_model(taken: list[bool]) -> None:
    model = made()
    inputs = [image(2, seed=k) for k in range(2)]
    wanted = [alone(model)(x).detach() for x in inputs]
    errors: list[object] = []

    def work(k: int) -> None:
        try:
            for _ in range(15):
                y = model(inputs[k])
                torch.testing.assert_close(y.detach(), wanted[k], rtol=1e-10, atol=1e-12)
                grads = torch.autograd.grad(y.sum(), list(model.parameters()))
                assert all(g.isfinite().all() for g in grads)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert True in taken


def test_hooks_and_subclasses_of_parameters(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    seen: list[Tensor] = []
    parameter(model).register_hook(lambda g: seen.append(g.clone()))
    run(model, x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], parameter(model).grad)
    post: list[object] = []
    parameter(model).register_post_accumulate_grad_hook(post.append)
    run(model, x)
    assert len(post) == 1


def test_a_model_is_freed_when_it_is_let_go(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model.linears[0].spectral_weight)
        memory = weakref.ref(model)
        del model
        assert memory() is None
        assert gone() is None
    finally:
        gc.enable()


def test_on_and_off() -> None:
    stock = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
    model = compress(copy.deepcopy(stock), 3)
    assert is_together(model)
    assert model is together(model)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    together(model, False)
    assert not is_together(model)
    assert not model._forward_hooks_always_called
    together(model)
    decompress(model)
    assert not is_together(model)
    assert not is_together(compress(stock, 3, together=False))


def test_what_gains_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single layer, and layers that have nothing in common, compute their own weights."""
    monkeypatch.setattr(batch._Run, "forward", lambda self: pytest.fail("a batch of one"))
    sizes = ((12, 30), (30, 7), (7, 19))
    model = together(nn.Sequential(*(SpectralLinear(a, b, 3, kind="svdp") for a, b in sizes)))
    for _ in range(12):
        model(torch.randn(4, 12))
    memory = scope._memories[model][True, True]
    assert memory.rest > 0
    assert not scope._scopes.stack
    with torch.no_grad():
        pair = together(nn.Sequential(*(SpectralLinear(12, 12, 4) for _ in range(2))))
        for _ in range(5):
            pair(torch.randn(4, 12))


def test_rest_ends_when_the_network_changes(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    model.leave_out = {0, 1}
    for _ in range(12):
        model(x)
    assert not taken
    model.leave_out = set()
    for _ in range(40):
        model(x)
    assert taken
    assert all(taken)


def test_large_weights_are_not_held_without_gradient(
    monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    monkeypatch.setattr(batch, "_HELD", 2 * 12 * 12)
    model, x = together(Heads()), torch.randn(400, 12, **DOUBLE)
    for k in range(3):
        model.parts[k] = SpectralLinear(12, 12, 12, **DOUBLE)
    for _ in range(2):
        with torch.no_grad():
            model(x)
    assert len(taken) == 2
    taken.clear()
    for _ in range(2):
        model(x)
    assert len(taken) == 3


def test_large_products_are_the_same(monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> None:
    model, x = made(), image()
    wanted = run(alone(model), x)
    monkeypatch.setattr(batch, "_LARGE", 1)
    for _ in range(2):
        agree(run(model, x), wanted)
    assert all(taken)
