"""No weight is seen that its parameters no longer give, however they were changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks_together import (
    DOUBLE,
    Net,
    agree,
    alone,
    image,
    made,
    run,
    warm,
)
from parameter_changes import (
    CHANGES,
    by_copy,
    by_data,
    by_freezing,
    by_new_weight,
    by_numpy,
    by_same_memory,
    by_swap,
    first_weight,
    parameter,
)
from torch import Tensor, nn
from ways_to_hold import every_method

from sttp_manifold.nn.formed import _Stamp


@every_method
@pytest.mark.parametrize(
    ("where", "change"),
    [("between forwards", change) for change in CHANGES]
    + [("in the middle of a forward", c) for c in CHANGES if c not in (by_data, by_numpy)],
)
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
        return lambda *_: by_copy(m)

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


@every_method
@pytest.mark.parametrize("change", [by_data, by_numpy], ids=["data", "numpy"])
def test_a_write_that_leaves_no_trace_is_seen_by_the_next_forward(
    method: str, change: Callable[[Net], None], taken: list[bool]
) -> None:
    """After the first weight of a forward nothing but the value would tell."""
    model, x = made(method), image()
    other = alone(model)
    wanted = run(other, x)
    model.middle = lambda: change(model)
    agree(run(model, x), wanted)
    model.middle = lambda: None
    change(other)
    agree(run(model, x), run(other, x))
    assert all(taken)


def test_stamps_need_no_values() -> None:
    """What tells a change: all but a write through ``.data``."""
    p = nn.Parameter(torch.randn(4))
    stamp = _Stamp.of(p)
    assert stamp.fits(p)
    with torch.no_grad():
        p.add_(1)
    assert not stamp.fits(p)
    stamp = _Stamp.of(p)
    p.data = p.data.clone()
    assert not stamp.fits(p)
    stamp = _Stamp.of(p)
    p.requires_grad_(False)
    assert not stamp.fits(p)
    p.requires_grad_(True)
    stamp = _Stamp.of(p)
    assert not stamp.fits(copy.copy(p))
