"""Grids that grow: a best rate at an edge is looked for beyond it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field, replace

import pytest
from rich.console import Console

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import executor
from sttp_manifold.experiments.compare import Settings, UnfinishedError, plan, tune
from sttp_manifold.experiments.plan import tuning_plan
from sttp_manifold.experiments.progress import RunProgress
from sttp_manifold.experiments.shards import Shard
from sttp_manifold.experiments.task import ACCURACY
from sttp_manifold.experiments.tasks import TASKS
from sttp_manifold.experiments.terminal import show_rates
from sttp_manifold.experiments.tune import rate_beyond

from .test_records import a_record

SEEDS = (1000, 1001)


@dataclass
class Trainings:
    """Runs in place of trainings, each a moment: best at one rate, none beyond another.

    Attributes:
        best: rate by method; 0.003 where there is none.
        largest: rate by method beyond which a run diverges.
        calls: method, rate and seed of each.
    """

    best: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    calls: list[tuple[str, float, int]] = field(default_factory=list)

    def __call__(self, spec, *rest):
        self.calls.append((spec.method, spec.lr, spec.seed))
        value = 90 - abs(math.log(spec.lr / self.best.get(spec.method, 3e-3)))
        end = {"spec": spec.to_dict(), "hash": spec.hash, "test_loss": None, "test_metric": None}
        if spec.lr > self.largest.get(spec.method, math.inf):
            return a_record(**end, status="diverged", reason="too fast", val_metric=None)
        return a_record(**end, val_metric=value)


@pytest.fixture
def trainings(monkeypatch) -> Trainings:
    runs = Trainings()
    monkeypatch.setattr(executor, "execute", runs)
    return runs


@pytest.fixture
def settings(tiny, tmp_path) -> Settings:
    """Of one method, on a grid from 0.001 to 0.01."""
    return Settings(
        out=tmp_path / "out", task="tiny", methods=["dense-adam"], seeds=[0], jobs=1,
        device="cpu", tuned_file=tmp_path / "rates.json",
    )  # fmt: skip


def tried(found) -> list[float]:
    return [point["lr"] for point in found["grid"]]


@pytest.mark.parametrize(
    ("best", "rates", "at_edge"),
    [
        (0.001, [1e-4, 1e-3, 1e-2], False),  # at the edge, and no better beyond
        (1e-4, [1e-5, 1e-4, 1e-3, 1e-2], False),
        (0.1, [1e-3, 1e-2, 0.1, 1.0], False),
        (0.01, [1e-3, 1e-2, 0.1], False),
        (100.0, [1e-3, 1e-2, 0.1, 1.0], True),  # farther than it may go
        (1e-9, [1e-5, 1e-4, 1e-3, 1e-2], True),
    ],
)
def test_a_best_rate_at_an_edge_is_looked_for_beyond_it(settings, trainings, best, rates, at_edge):
    trainings.best["dense-adam"] = best
    _, found = tune(settings)
    entry = found["dense-adam"]
    assert tried(entry) == rates
    assert entry["at_edge"] is at_edge
    assert entry["lr"] == min(rates, key=lambda lr: abs(math.log(lr / best)))
    assert sorted(trainings.calls) == sorted(("dense-adam", lr, s) for lr in rates for s in SEEDS)
    (planned,) = plan(settings)
    assert (planned.spec.lr, planned.lr_source) == (entry["lr"], "tuned")


def test_how_often_a_grid_grows_is_bounded(settings, trainings):
    trainings.best["dense-adam"] = 1e6
    for extensions, rates in ((0, 2), (1, 3), (2, 4), (5, 7)):
        _, found = tune(replace(settings, extensions=extensions))
        assert tried(found["dense-adam"]) == [float(f"{10.0**k:g}") for k in range(-3, rates - 3)]
        assert found["dense-adam"]["at_edge"]
    # What a shorter tuning has done, a longer one reads.
    assert len(trainings.calls) == len(set(trainings.calls)) == 7 * len(SEEDS)
    with pytest.raises(ConfigError, match="extension count -1: expected 0 or more"):
        tuning_plan(replace(settings, extensions=-1))


def test_a_rate_at_which_runs_diverge_ends_the_grid(settings, trainings):
    trainings.best["dense-adam"], trainings.largest["dense-adam"] = 1.0, 0.02
    _, found = tune(settings)
    entry = found["dense-adam"]
    assert tried(entry) == [1e-3, 1e-2, 0.1]
    assert (entry["lr"], entry["at_edge"]) == (0.01, False)
    # Where no rate of the grid ends well, there is no best one to go beyond.
    trainings.largest["dense-sgd"] = 0.0
    assert tune(replace(settings, methods=["dense-sgd"]))[1] == {}


def test_no_rate_is_larger_than_a_methods_largest(settings, tiny, trainings):
    """Muon's rates are angles, up to a right one."""
    methods = ["svdp-riemannian-muon", "svdp-chart-adam"]
    trainings.best.update(dict.fromkeys(methods, 100.0))
    told = []
    _, found = tune(replace(settings, methods=methods, extensions=4), on_extend=told.append)
    assert tried(found["svdp-chart-adam"]) == [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0]
    assert tried(found["svdp-riemannian-muon"]) == [1e-3, 1e-2, 0.1, 1.0]
    assert found["svdp-riemannian-muon"]["at_edge"]
    assert [set(rates) for rates in told] == [set(methods)] * 2 + [{"svdp-chart-adam"}] * 2


def test_only_the_grid_of_a_method_at_its_edge_grows(settings, trainings, tiny, monkeypatch):
    monkeypatch.setitem(TASKS._entries, "tiny", replace(tiny, lrs=(1e-3, 1e-2, 0.1)))
    trainings.best.update({"dense-adam": 0.01, "dense-sgd": 1.0})
    told = []
    _, found = tune(replace(settings, methods=["dense-*"]), on_extend=told.append)
    assert tried(found["dense-adam"]) == [1e-3, 1e-2, 0.1]
    assert tried(found["dense-sgd"]) == [1e-3, 1e-2, 0.1, 1.0, 10.0]
    assert told == [{"dense-sgd": 1.0}, {"dense-sgd": 10.0}]


def test_a_tuning_that_is_stopped_goes_on_with_its_extensions(settings, trainings, monkeypatch):
    trainings.best["dense-adam"] = 100.0

    def stopped(spec, *rest):
        if len(trainings.calls) == 5:
            raise KeyboardInterrupt
        return trainings(spec, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "execute", stopped)
        with pytest.raises(KeyboardInterrupt):
            tune(settings)
    assert not settings.tuned_file.exists()
    _, found = tune(settings)
    assert tried(found["dense-adam"]) == [1e-3, 1e-2, 0.1, 1.0]
    assert len(trainings.calls) == len(set(trainings.calls)) == 8


def test_shards_extend_together(settings, trainings):
    trainings.best["dense-adam"] = 0.1
    parts = [replace(settings, shard=Shard(k, 2)) for k in (1, 2)]
    for _ in range(4):
        for part in parts:
            try:
                _, found = tune(part)
            except UnfinishedError:
                continue
            assert tried(found["dense-adam"]) == [1e-3, 1e-2, 0.1, 1.0]
    assert json.loads(settings.tuned_file.read_text())["methods"]["dense-adam"]["lr"] == 0.1
    assert len(trainings.calls) == len(set(trainings.calls)) == 8


@pytest.mark.parametrize(
    ("lr", "grid", "beyond"),
    [
        (3e-3, [3.33e-4, 1e-3, 3e-3], 9e-3),
        (3.33e-4, [3.33e-4, 1e-3, 3e-3], 1.11e-4),
        (1.0, [0.1, 0.3, 1.0], 3.33),
        (1e-3, [1e-3, 3e-3], 3.33e-4),
        (1e-3, [3.33e-4, 1e-3, 3e-3], None),
        (1e-3, [1e-3], None),
        (1e60, [1.0, 1e60], None),  # of rates, none is as large as that
    ],
)
def test_the_step_beyond_is_that_between_the_edge_and_its_neighbour(lr, grid, beyond):
    found = {"lr": lr, "at_edge": lr in (grid[0], grid[-1]), "grid": [{"lr": x} for x in grid]}
    assert rate_beyond(found) == beyond


def test_what_is_tried_beyond_is_said_and_an_edge_that_is_left_too(settings, trainings, capsys):
    trainings.best["dense-adam"] = 100.0
    shown = io.StringIO()
    with RunProgress(Console(file=shown, width=200), ACCURACY, "tuning") as progress:
        path, found = tune(
            settings, on_start=progress.start, on_record=progress.record,
            on_extend=progress.extend,
        )  # fmt: skip
    said = shown.getvalue()
    assert "Best at the edge of the grid, trying beyond: dense-adam 0.1\n" in said
    assert "trying beyond: dense-adam 1\n" in said
    assert "tuning: 2/2 runs" in said
    show_rates(path, found)
    assert "at the edge of the grid" in capsys.readouterr().out
