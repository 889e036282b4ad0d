"""Plans of linear maps: every one gives the same, and the constants come from where they should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, normal, seeds, shapes, spectra, weight
from typer.testing import CliRunner

from sttp_manifold import TTShape
from sttp_manifold.cli import app
from sttp_manifold.errors import ConfigError
from sttp_manifold.tt import refit
from sttp_manifold.tt.costs import VARIABLE, Costs, costs, read_costs, write_costs
from sttp_manifold.tt.plans import (
    LinearPlan,
    Work,
    conv_plan,
    linear_plan,
    linear_plans,
    linear_steps,
)


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
        plans = [plan for plan, _ in linear_plans(chain, count)]
        assert len(set(plans)) == len(plans)
        assert linear_steps(chain, count) in plans
        for plan in plans:
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
    from torch.utils.flop_counter import FlopCounterMode

    shape = TTShape((2, 3, 4), (3, 2, 2, 3), rank=4).merged
    assert len(shape.left_core_shapes) == 2
    assert len(shape.right_core_shapes) == 3
    tt = weight(shape, "free", 0).merged()
    x = normal(1, 5, shape.d_in)
    for plan, work in linear_plans(shape, 5):
        with FlopCounterMode(display=False) as counter:
            tt._rows_times_wt(x, plan)
        assert counter.get_total_flops() == work.flops, plan


@given(
    d_out=st.integers(1, 3000), d_in=st.integers(1, 3000), rank=st.integers(1, 500),
    count=st.integers(1, 10_000),
)  # fmt: skip
def test_plans_of_what_is_formed_already(d_out: int, d_in: int, rank: int, count: int) -> None:
    """Whoever forms ``W`` to apply it also applies it where that is free; factors need to gain."""
    shape = TTShape.svd(d_out, d_in, min(rank, d_out, d_in))
    at_hand, of_kernel = linear_plan(shape, count, True), conv_plan(shape, count, True)
    assert at_hand in ("dense", "lowrank")
    if linear_plan(shape, count) == "dense":
        assert at_hand == "dense"
    if conv_plan(shape, count) == "dense":
        assert of_kernel == "dense"
    if shape.rank * (d_out + d_in) >= d_out * d_in:
        assert at_hand == "dense"
    if 2 * shape.rank * (d_out + d_in) <= d_out * d_in and d_out * d_in > 1e6:
        assert at_hand == "lowrank"


@given(shape=shapes(), count=st.integers(1, 50), together=st.integers(2, 100))
def test_only_forming_whole_factors_is_shared(shape, count, together):
    alone, shared = linear_plans(shape, count), linear_plans(shape, count, together)
    for (plan, one), (same, many) in zip(alone, shared, strict=True):
        assert plan == same
        assert many[0] == one[0]
        assert many[2:] == one[2:]
        assert many.calls == one.calls if plan.name == "cores" else many.calls <= one.calls


def test_many_weights_at_once_have_their_factors_formed():
    shape = TTShape.for_matrix(256, 256, rank=16)
    assert linear_plan(shape, 32) == "cores"
    assert linear_plan(shape, 32, together=50) == "lowrank"


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


def test_a_fit_finds_the_constants_that_made_the_times() -> None:
    truth = Costs(call=3e5, touch=20, permute=100)
    timed = [
        refit.Timed(place, plan, work, 1e-11 * work.cost(truth))
        for place in refit.MAPS
        for plan, work in linear_plans(TTShape.for_matrix(*place[:3]).merged, place[3])
    ]
    found = refit.fit(timed)
    for name in ("call", "touch", "permute"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-4)
    assert set(refit.regrets(timed, found).values()) == {1.0}
    with pytest.raises(RuntimeError, match="too busy"):
        refit.fit([t._replace(work=Work(calls=1.0)) for t in timed])


def test_the_command_writes_a_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "MAPS", [(64, 64, 4, 8), (256, 256, 8, 300), (512, 512, 32, 64)])
    path = tmp_path / "costs.json"
    result = CliRunner().invoke(app, ["refit-costs", str(path), "--repeats", "1"])
    if result.exit_code and isinstance(result.exception, RuntimeError):
        pytest.skip("the machine is too busy to time anything")
    assert result.exit_code == 0, result.output
    assert VARIABLE in result.output
    assert read_costs(path).call >= 0
    about = json.loads(path.read_text())["about"]
    assert about["threads"] == torch.get_num_threads()


def test_names_of_plans() -> None:
    assert LinearPlan.named("lowrank", 3) == ("lowrank", 3, True)
    assert LinearPlan.named("cores", 3) == ("cores", 1, False)
    assert LinearPlan.named("dense", 3).name == "dense"
