"""Fitting the constants: those that made the times are found, and the command writes a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sttp_manifold import TTShape
from sttp_manifold.cli import app
from sttp_manifold.tt import refit_costs
from sttp_manifold.tt.cost_model import VARIABLE, Costs, Work, read_costs
from sttp_manifold.tt.plans import linear_plans


def test_a_fit_finds_the_constants_that_made_the_times() -> None:
    truth = Costs(call=3e5, touch=20, permute=100)
    timed = [
        refit_costs.Timed(place, plan, work, 1e-11 * work.cost(truth))
        for place in refit_costs.MAPS
        for plan, work in linear_plans(TTShape.for_matrix(*place[:3]).merged, place[3])
    ]
    found = refit_costs.fit(timed)
    for name in ("call", "touch", "permute"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-4)
    assert set(refit_costs.regrets(timed, found).values()) == {1.0}
    with pytest.raises(RuntimeError, match="too busy"):
        refit_costs.fit([t._replace(work=Work(calls=1.0)) for t in timed])


def test_the_command_writes_a_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = [(64, 64, 4, 8), (256, 256, 8, 300), (512, 512, 32, 64)]
    monkeypatch.setattr(refit_costs, "MAPS", maps)
    path = tmp_path / "costs.json"
    result = CliRunner().invoke(app, ["refit-costs", str(path), "--repeats", "1"])
    if result.exit_code and isinstance(result.exception, RuntimeError):
        pytest.skip("the machine is too busy to time anything")
    assert result.exit_code == 0, result.output
    assert VARIABLE in result.output
    assert read_costs(path).call >= 0
    about = json.loads(path.read_text())["about"]
    assert about["threads"] == torch.get_num_threads()
