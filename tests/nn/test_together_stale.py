"""No weight is seen that its parameters no longer give, however they were changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks_together import (
    DOUBLE,
    METHODS,
    Net,
    agree,
    alone,
    every_method,
    image,
    made,
    run,
    warm,
)
from torch import Tensor, nn

from sttp_manifold.nn import (
    make_weight,
    switch,
)
from sttp_manifold.nn.scope import Stamp


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
    model.linears.requires_grad_(False)
    for _ in range(3):
        run(model, x)
    taken.clear()
    other = alone(model)
    for m in (model, other):
        m.middle = lambda m=m: first_weight(m).requires_grad_(True)
    agree(run(model, x), run(other, x))
    assert parameter(model).grad is not None
    assert False in taken


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


def test_stamps_of_an_accelerator_need_no_values() -> None:
    """What tells a change where values cannot be compared: all but a write through ``.data``."""
    p = nn.Parameter(torch.randn(4))
    stamp = Stamp.of(p)
    assert stamp.fits(p)
    with torch.no_grad():
        p.add_(1)
    assert not stamp.fits(p)
    stamp = Stamp.of(p)
    p.data = p.data.clone()
    assert not stamp.fits(p)
    stamp = Stamp.of(p)
    p.requires_grad_(False)
    assert not stamp.fits(p)
    p.requires_grad_(True)
    stamp = Stamp.of(p)
    assert not stamp.fits(copy.copy(p))
