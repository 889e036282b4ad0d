"""Constants of the cost model: where they come from, and that the choice of a plan follows them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sttp_manifold import TTShape
from sttp_manifold.errors import ConfigError
from sttp_manifold.tt.cost_model import VARIABLE, Costs, costs, read_costs, write_costs
from sttp_manifold.tt.plans import conv_plan, linear_plans, linear_steps


def test_the_choice_follows_the_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = TTShape.for_matrix(512, 512, rank=16)
    assert linear_steps(shape, 4).name == "cores"
    only_calls = tmp_path / "calls.json"
    write_costs(only_calls, Costs(call=1e12, touch=0, permute=0), {"machine": "none"})
    monkeypatch.setenv(VARIABLE, str(only_calls))
    assert costs() == read_costs(only_calls)
    work = dict(linear_plans(shape, 4))
    assert work[linear_steps(shape, 4)].calls == min(w.calls for w in work.values())
    monkeypatch.delenv(VARIABLE)
    assert costs() == Costs()
    assert linear_steps(shape, 4).name == "cores"


def test_constants_of_convolutions_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = TTShape.for_conv((64, 64, 3, 3), rank=16)
    assert conv_plan(shape, 10_000) == "factorized"
    path = tmp_path / "wide.json"
    write_costs(path, dataclasses.replace(Costs(), channels=64), {})
    monkeypatch.setenv(VARIABLE, str(path))
    assert conv_plan(shape, 10_000) == "dense"


@pytest.mark.parametrize(
    "content",
    [None, "no json", "{}", '{"costs": 3}', '{"costs": {"call": 1}}', json.dumps({"costs": {
        "call": -1, "touch": 8, "permute": 60, "channels": 16, "patch": 16}})],
)  # fmt: skip
def test_a_bad_file_is_an_error(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "costs.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(ConfigError, match=r"costs|cost 'call'"):
        linear_steps(TTShape.svd(4, 4, rank=2), 3)
