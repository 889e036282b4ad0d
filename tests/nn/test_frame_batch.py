"""Many weights at once: calls that do not grow, values that are not looked at, tables that fit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from calls import counted
from networks_together import DOUBLE, every_spectrum
from torch import Tensor, nn
from ways_to_hold import every_method

from sttp_manifold import TTShape
from sttp_manifold.nn import SpectralWeight, compress, make_weight, together
from sttp_manifold.nn.batch_plan import Plan
from sttp_manifold.nn.chain_products import contracted, pulled_back
from sttp_manifold.nn.frame_batch import _leaves, _pull_back
from sttp_manifold.optim import RiemannianAdam

SHAPES = [
    TTShape([4, 3], [2, 5, 3], rank=4),
    TTShape([4, 2], [2, 5, 3], rank=4),
    TTShape.svd(30, 40, rank=20),
    TTShape.for_matrix(64, 45, rank=24),
    TTShape.for_matrix(8, 8, rank=8),
    TTShape.svd(1, 1, rank=1),
]
PRODUCTS = ("bmm", "baddbmm_", "linalg_solve_triangular")


class All(nn.Module):
    """Every weight in one form."""

    def __init__(self, weights: list[SpectralWeight], form: str = "dense") -> None:
        super().__init__()
        self.weights, self.form = nn.ModuleList(weights), form

    def forward(self) -> list[tuple[Tensor, ...]]:
        if self.form == "dense":
            return [(weight(),) for weight in self.weights]
        if self.form == "factors":
            return [weight.factors() for weight in self.weights]
        if self.form == "rows":
            return [weight.row_factors() for weight in self.weights]
        values = [weight.tt() for weight in self.weights]
        return [(*tt.left, tt.spectrum, *tt.right) for tt in values]

    def step(self) -> None:
        sum(t.square().sum() for parts in self() for t in parts).backward()


@every_method
@every_spectrum
@pytest.mark.parametrize("form", ["dense", "factors", "rows", "cores"])
@pytest.mark.parametrize("few", [0, 100, 1 << 30], ids=["by nodes", "both", "by leaves"])
def test_plans_of_every_size_share_a_batch(
    method: str, spectrum: str, form: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of more than sixteen columns and of fewer, square and constant ones, in one plan.

    What the spectrum multiplies, node by node or all numbers of a leaf at once, is the same.
    """
    monkeypatch.setattr("sttp_manifold.nn.batch_plan._FEW", few)
    bound = 2.0 if spectrum == "bounded" else 1.0
    weights = [make_weight(method, s, spectrum, "random", bound, **DOUBLE) for s in SHAPES * 2]
    model = together(All(weights, form))
    model.step()
    for weight, parts in zip(weights, model(), strict=True):
        wanted = weight._in_form(weight._tensors(), form)
        for mine, other in zip(parts, wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
        (parameter,) = weight.parameters()
        total = sum(t.square().sum() for t in wanted)
        (gradient,) = torch.autograd.grad(total, parameter, allow_unused=True)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-10)


@every_method
def test_more_weights_of_the_same_plans_are_no_more_products(method: str) -> None:
    few, many = (
        counted(together(All([make_weight(method, s) for s in SHAPES[:4] * n], "factors")).step)
        for n in (2, 20)
    )
    assert sum(few[name] for name in PRODUCTS) > 0
    assert {name: few[name] for name in PRODUCTS} == {name: many[name] for name in PRODUCTS}


@every_method
@every_spectrum
def test_no_value_is_read_off_an_accelerator(method: str, spectrum: str) -> None:
    """A meta tensor takes the way of an accelerator, and has no value that could be read."""
    weights = [make_weight(method, shape, spectrum, "random") for shape in SHAPES]
    plan = Plan(
        [weight.layout for weight in weights],
        ["dense", "factors", "cores", "rows", "factors", "cores"],
        torch.float32,
        torch.device("meta"),
    )
    tensors = [t.detach().to("meta") for weight in weights for t in weight._tensors()]
    with torch.no_grad():
        leaves, saved = _leaves(plan, torch.cat([*tensors, plan.constants]))
        outputs, trace = contracted(plan, leaves)
        assert all(t.is_meta for t in outputs)
        cotangents = [torch.ones_like(t) for t in outputs]
        gradient = _pull_back(plan, saved, *pulled_back(plan, trace, cotangents))
    assert gradient.shape == (sum(w.layout.size for w in weights),)


def test_tables_are_small_integers_and_every_number_is_fetched_once() -> None:
    for method in ("householder", "riemannian"):
        layouts = [make_weight(method, shape, "free").layout for shape in SHAPES]
        plan = Plan(layouts, ["dense"] * len(layouts), torch.float32, torch.device("cpu"))
        total = sum(layout.size for layout in layouts)
        mine = plan.fetch[plan.fetch < total]
        assert plan.fetch.dtype == plan.scatter.dtype == torch.int32
        assert torch.equal(mine.sort().values, torch.arange(total, dtype=torch.int32))
        assert torch.equal(plan.fetch[plan.scatter], torch.arange(total, dtype=torch.int32))


def digits(method: str, rank: int, alone: bool = False) -> nn.Module:
    sizes = (64, 128, 64, 10)
    layers: list[nn.Module] = []
    for inside, outside in pairwise(sizes):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    return compress(model, rank, method=method, init="random", grow="allow", together=not alone)


@pytest.mark.parametrize("rank", [4, 8])
def test_calls_of_a_step_of_a_small_network(rank: int) -> None:
    """What a step of the digits network may cost: with charts, and on the manifold."""
    x, y = torch.randn(64, 64), torch.randint(10, (64,))

    def backward(model: nn.Module) -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()

    chart, points = digits("householder", rank), digits("riemannian", rank)
    adam = torch.optim.Adam(chart.parameters(), foreach=True)
    riemannian = RiemannianAdam(points.parameters())
    for _ in range(5):  # past the first look at whether points stay on their manifold
        backward(points)
        riemannian.step()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        backward(model)
        optimizer.step()

    assert counted(lambda: step(chart, adam)).total() <= 650
    assert counted(lambda: backward(points)).total() <= 380
    assert counted(lambda: step(points, riemannian)).total() <= 700
    alone = digits("householder", rank, alone=True)
    assert counted(lambda: backward(alone)).total() <= 1050


@every_method
def test_a_weight_that_was_not_used_gets_no_gradient_in_any_form(method: str) -> None:
    class First(All):
        def step(self) -> None:
            parts = self()
            parts[0][0].square().sum().backward()

    for form in ("dense", "factors", "rows", "cores"):
        model = together(First([make_weight(method, s) for s in SHAPES[:3]], form))
        model.step()
        assert [p.grad is not None for p in model.parameters()] == [True, False, False]
