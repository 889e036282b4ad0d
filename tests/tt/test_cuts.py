"""Where a chain is cut in two to form the dense weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import seeds, shapes, spectra, weight
from torch.utils.flop_counter import FlopCounterMode

from sttp_manifold import TTShape
from sttp_manifold.tt import cuts, spectral
from sttp_manifold.tt.costs import costs
from sttp_manifold.tt.cuts import cheapest_cut, cut_work

KERNEL = TTShape.for_conv((64, 64, 3, 3), 64).merged


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
    monkeypatch.setattr(cuts, "_chosen", lambda *_: pytest.fail("the cache was asked"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert cheapest_cut(KERNEL) == cuts._choose(KERNEL, costs())
