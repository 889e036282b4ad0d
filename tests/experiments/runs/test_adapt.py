"""Trainings whose ranks change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sttp_manifold.experiments.data import Splits
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.plan import Settings, plan
from sttp_manifold.experiments.rank_schedule import RankSchedule
from sttp_manifold.experiments.records import validate
from sttp_manifold.experiments.runs.adapt import AdaptiveRun
from sttp_manifold.experiments.runs.execute import execute
from sttp_manifold.nn import SpectralWeight
from sttp_manifold.optim import check_optimizer

from ..conftest import tiny_splits

METHOD = "svdp-riemannian-muon-adaptive"


def planned(tiny, method=METHOD, epochs=6):
    settings = Settings(
        out=None, task="tiny", methods=[method], seeds=[0], epochs=epochs, device="cpu"
    )
    return plan(settings)[0]


def begun(tiny) -> AdaptiveRun:
    torch.manual_seed(0)
    run = AdaptiveRun(planned(tiny).spec, tiny, METHODS[METHOD], tiny_splits())
    run.begin(torch.device("cpu"), torch.float32)
    return run


@pytest.mark.parametrize("method", [METHOD, "sttp-riemannian-muon-adaptive"])
def test_ranks_start_high_and_end_at_the_rank(tiny, method):
    run = planned(tiny, method)
    record = execute(run.spec, tiny, METHODS[method], run.lr_source)
    validate(record)
    assert record["status"] == "ok"
    assert "2 times the rank" in record["spec"]["options"]["rank_schedule"]
    dimensions = record["curves"]["dimension"]
    assert len(dimensions) == 7
    assert dimensions == sorted(dimensions, reverse=True)
    assert dimensions[0] > dimensions[-1] == record["dimension"]
    usual = planned(tiny, method.removesuffix("-adaptive"))
    other = execute(usual.spec, tiny, METHODS[usual.spec.method], usual.lr_source)
    assert record["dimension"] <= other["dimension"]
    assert record["stored_parameters"] <= other["stored_parameters"]
    for values in record["spectra"].values():
        assert {len(s) for s in values} == {len(values[0])}
        assert sum(value is not None for value in values[-1]) <= 2
        assert sum(value is not None for value in values[0]) == len(values[0])


def test_a_run_that_was_cut_goes_on_with_the_ranks_it_had(tiny):
    whole, first = begun(tiny), begun(tiny)
    for _ in range(3):
        whole.advance()
        first.advance()
    second = begun(tiny)
    second.load_state_dict(first.state_dict())
    check_optimizer(second.optimizer, second.model)
    while whole.advance():
        second.advance()
    second.advance()
    for name in ("train_loss", "val_loss", "dimension", "lr"):
        assert whole.trace.curves[name] == second.trace.curves[name], name
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p.detach(), q.detach())


def test_stages_are_thirds():
    ranks = RankSchedule()
    assert [ranks.stage(epoch, 6) for epoch in range(7)] == [0, 0, 1, 1, 2, 2, 2]
    assert [ranks.stage(epoch, 3) for epoch in range(4)] == [0, 1, 2, 2]
    assert ranks.stage(0, 1) == 2


def test_energy_lowers_the_ranks(tiny):
    method = replace(METHODS[METHOD], ranks=RankSchedule(times=3, energy=0.5))
    torch.manual_seed(0)
    splits: Splits = tiny_splits()
    run = AdaptiveRun(planned(tiny).spec, tiny, method, splits)
    run.begin(torch.device("cpu"), torch.float32)

    def ranks():
        return [w.shape.rank for w in run.model.modules() if isinstance(w, SpectralWeight)]

    assert ranks() == [6, 3]
    for _ in range(3):
        run.advance()
    assert run.stage == 1
    assert all(a < b for a, b in zip(ranks(), [6, 3], strict=True))
