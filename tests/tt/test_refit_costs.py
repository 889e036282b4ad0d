"""Fitting the constants: those that made the times are found, and the command writes a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sttp_manifold import TTShape
from sttp_manifold.cli import app
from sttp_manifold.errors import TimingError
from sttp_manifold.tt import refit_costs
from sttp_manifold.tt.cost_model import VARIABLE, Costs, Work, read_costs
from sttp_manifold.tt.plans import linear_plans
from sttp_manifold.tt.refit_costs import Timed

TRUTH = Costs(call=3e5, touch=20, permute=100)


def made(place: tuple[int, int, int, int], repeats: int = 1) -> list[Timed]:
    """Times of a machine whose constants are ``TRUTH``."""
    plans = linear_plans(TTShape.for_matrix(*place[:3]).merged, place[3])
    return [Timed(place, plan, work, 1e-11 * work.cost(TRUTH)) for plan, work in plans]


def equal(place: tuple[int, int, int, int], repeats: int = 1) -> list[Timed]:
    """Times of a machine on which every call takes as long, whatever it computes."""
    return [t._replace(work=Work(calls=1.0)) for t in made(place)]


def is_truth(found: Costs) -> None:
    for name in ("call", "touch", "permute"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-4)


def test_a_fit_finds_the_constants_that_made_the_times() -> None:
    timed = [t for place in refit_costs.MAPS for t in made(place)]
    found = refit_costs.fit(timed)
    is_truth(found)
    assert set(refit_costs.regrets(timed, found).values()) == {1.0}
    with pytest.raises(TimingError, match="too busy"):
        refit_costs.fit([t for place in refit_costs.MAPS for t in equal(place)])


@pytest.mark.parametrize("backward", [False, True])
def test_each_plan_of_a_map_is_timed(backward: bool) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-3
        return now

    place = (24, 36, 4, 8)
    timed = refit_costs.time_plans(place, repeats=2, backward=backward, clock=clock)
    plans = list(linear_plans(TTShape.for_matrix(*place[:3]).merged, place[3]))
    assert [(t.plan, t.work) for t in timed] == plans
    assert [t.seconds for t in timed] == pytest.approx([1e-3] * len(plans))


def test_the_command_writes_a_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit_costs, "time_plans", made)
    path = tmp_path / "costs.json"
    result = CliRunner().invoke(app, ["refit-costs", str(path), "--repeats", "1"])
    assert result.exit_code == 0, result.output
    assert VARIABLE in result.output
    is_truth(read_costs(path))
    about = json.loads(path.read_text())["about"]
    assert about["threads"] == torch.get_num_threads()
    assert about["worst regret"] == 1.0


def test_a_busy_machine_is_said_and_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit_costs, "time_plans", equal)
    path = tmp_path / "costs.json"
    path.write_text("before")
    result = CliRunner().invoke(app, ["refit-costs", str(path)])
    assert result.exit_code == 2
    assert "too busy to fit; try again" in result.output
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["costs.json"]
