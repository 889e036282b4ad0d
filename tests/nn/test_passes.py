"""The batch of a network where values must not be looked at, and what it costs in calls."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sttp_manifold import TTShape
from sttp_manifold.nn import make_weight
from sttp_manifold.nn.layout import Layout, Member
from sttp_manifold.nn.passes import Pass

PRODUCTS = {"bmm", "baddbmm", "baddbmm_", "linalg_solve_triangular"}


class Calls(TorchDispatchMode):
    """Counts what reaches the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def forth_and_back(method: str, spectrum: str, count: int, device: str) -> Counter[str]:
    """One pass over weights of two plans on a device, and its calls."""
    shapes = [TTShape([4, 3], [2, 5, 3], rank=4), TTShape([4, 2], [2, 5, 3], rank=4)]
    weights = [make_weight(method, s, spectrum, "random") for s in shapes for _ in range(count)]
    members = [
        Member(weight, form, weight._tensors())
        for weight, form in zip(weights, ("dense", "factors", "cores") * count, strict=False)
    ]
    layout = Layout(members)
    leaves = [
        torch.stack([members[i].tensors[k].detach() for i, k in leaf]).to(device)
        for leaf in layout.leaves
    ]
    calls = Calls()
    with torch.no_grad(), calls:
        passed = Pass(layout, leaves, [True] * len(leaves))
        gradients = passed.pull_back([tuple(map(torch.ones_like, p)) for p in passed.parts])
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert isinstance(gradient, Tensor)
        assert gradient.shape == leaf.shape
        assert gradient.device == leaf.device
    return calls.counts


@pytest.mark.parametrize("method", ["riemannian"])
@pytest.mark.parametrize("spectrum", ["free", "full", "identity"])
def test_no_value_is_read_off_an_accelerator(method: str, spectrum: str) -> None:
    """A meta tensor takes the way of an accelerator, and has no value that could be read."""
    forth_and_back(method, spectrum, 1, "meta")


@pytest.mark.parametrize("method", ["riemannian"])
def test_more_weights_of_the_same_plans_are_no_more_products(method: str) -> None:
    few, many = (forth_and_back(method, "free", count, "cpu") for count in (3, 30))
    assert sum(few[name] for name in PRODUCTS) > 0
    assert {name: few[name] for name in PRODUCTS} == {name: many[name] for name in PRODUCTS}
