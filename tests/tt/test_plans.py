"""Plans of linear maps: every one gives the same, and its work is counted as it is done."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, normal, seeds, shapes, spectra, weight
from torch.utils.flop_counter import FlopCounterMode

from sttp_manifold import TTShape
from sttp_manifold.tt import plans, spectral
from sttp_manifold.tt.cost_model import costs
from sttp_manifold.tt.plans import (
    LinearPlan,
    cheapest_cut,
    cut_work,
    linear_plans,
    linear_steps,
)

KERNEL = TTShape.for_conv((64, 64, 3, 3), 64).merged


@given(
    shape=shapes(max_modes=4), spectrum=spectra, seed=seeds, batch=batches, count=st.integers(0, 3)
)
def test_every_plan_gives_the_same(
    shape: TTShape, spectrum: str, seed: int, batch: tuple[int, ...], count: int
) -> None:
    """Merged chains and chains as they are written, both directions, no vector at all."""
    tt = weight(shape, spectrum, seed, batch)
    W = tt.to_matrix()
    x, y = normal(seed, *batch, count, shape.d_in), normal(seed, *batch, count, shape.d_out)
    for chain, value in ((shape, tt), (shape.merged, tt.merged())):
        ways = [plan for plan, _ in linear_plans(chain, count)]
        assert len(set(ways)) == len(ways)
        assert linear_steps(chain, count) in ways
        for plan in ways:
            torch.testing.assert_close(value._rows_times_wt(x, plan), x @ W.mT)
            torch.testing.assert_close(value._rows_times_w(y, plan), y @ W)


def test_gradients_of_every_plan() -> None:
    shape = TTShape((2, 3, 4), (3, 2, 2, 3), rank=4).merged
    tt = weight(shape, "free", 0)
    leaves = [t.clone().requires_grad_() for t in (*tt.left, tt.spectrum, *tt.right)]
    split = len(tt.left)
    live = type(tt)(leaves[:split], leaves[split], leaves[split + 1 :], shape)
    x = normal(1, 5, shape.d_in).requires_grad_()
    y = x @ live.to_matrix().mT
    wanted = torch.autograd.grad(y.sin().sum(), [*leaves, x])
    for plan, _ in linear_plans(shape, 5):
        found = torch.autograd.grad(live._rows_times_wt(x, plan).sin().sum(), [*leaves, x])
        torch.testing.assert_close(found, wanted)


def test_work_is_counted_as_it_is_done() -> None:
    """Operations of a plan are those that torch counts."""
    shape = TTShape((2, 3, 4), (3, 2, 2, 3), rank=4).merged
    assert len(shape.left_core_shapes) == 2
    assert len(shape.right_core_shapes) == 3
    tt = weight(shape, "free", 0).merged()
    x = normal(1, 5, shape.d_in)
    for plan, work in linear_plans(shape, 5):
        with FlopCounterMode(display=False) as counter:
            tt._rows_times_wt(x, plan)
        assert counter.get_total_flops() == work.flops, plan


def test_names_of_plans() -> None:
    assert LinearPlan.named("lowrank", 3) == ("lowrank", 3, True)
    assert LinearPlan.named("cores", 3) == ("cores", 1, False)
    assert LinearPlan.named("dense", 3).name == "dense"


@given(shape=shapes(), spectrum=spectra, seed=seeds)
def test_every_cut_gives_the_same_weight(shape, spectrum, seed):
    tt = weight(shape.merged, spectrum, seed, (2,))
    u, v = tt.frames()
    wanted = tt._times_bond(u, tt.spectrum) @ v.mT
    for cut in range(1, len(shape.merged.core_shapes)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spectral, "cheapest_cut", lambda _, cut=cut: cut)
            torch.testing.assert_close(tt.to_matrix(), wanted)
    torch.testing.assert_close(tt.to_matrix(), wanted)


@given(shape=shapes())
def test_no_cut_costs_less(shape):
    shape = shape.merged
    every = [cut_work(shape, cut).cost(costs()) for cut in range(1, len(shape.core_shapes))]
    assert cut_work(shape, cheapest_cut(shape)).cost(costs()) == min(every)


@pytest.mark.parametrize("cut", range(1, len(KERNEL.core_shapes)))
def test_operations_are_those_that_torch_counts(cut, monkeypatch):
    tt = weight(KERNEL, "free", 0)
    monkeypatch.setattr(spectral, "cheapest_cut", lambda _: cut)
    with FlopCounterMode(display=False) as counter:
        tt.to_matrix()
    assert counter.get_total_flops() == cut_work(KERNEL, cut).flops


def test_a_wide_kernel_is_not_cut_between_rows_and_columns():
    centre = len(KERNEL.out_modes)
    assert cheapest_cut(KERNEL) > centre
    assert cut_work(KERNEL, cheapest_cut(KERNEL)).flops < 0.75 * cut_work(KERNEL, centre).flops
    assert cheapest_cut(TTShape.svd(64, 576, 16)) == 1


def test_the_choice_is_traced_without_a_cache(monkeypatch):
    monkeypatch.setattr(plans, "_chosen_cut", lambda *_: pytest.fail("the cache was asked"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert cheapest_cut(KERNEL) == plans._choose_cut(KERNEL, costs())
