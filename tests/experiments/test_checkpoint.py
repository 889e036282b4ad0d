"""A run that is cut goes on where it was, bit for bit; what is on disk is whole or absent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sttp_manifold._files import replacing
from sttp_manifold.experiments.checkpoint import Checkpoint
from sttp_manifold.experiments.compare import Settings, plan, run_plan
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.runs import watch as watching
from sttp_manifold.experiments.runs.execute import execute
from sttp_manifold.experiments.runs.solve import SolverRun
from sttp_manifold.experiments.runs.train import TrainingRun
from sttp_manifold.experiments.solvers import SOLVERS
from sttp_manifold.experiments.tasks import TASKS

from .runs.test_solve import without_time
from .runs.test_train import without_times

# Those that can be cut.
SOLVING = [solver.name for solver in SOLVERS if not solver.requires]


class Cut(BaseException):
    """What a kill is to a run."""


def planned(method, tmp_path):
    settings = Settings(
        tmp_path, "tiny", [method], ranks=[2], seeds=[0], epochs=5, device="cpu", jobs=1
    )
    return settings, plan(settings)


@pytest.mark.parametrize(
    "method",
    [
        "dense-adam",
        "sttp-riemannian-adam",
        "sttp-riemannian-sgd",
        "svdp-chart-sgd",
        "sttp-chart-adam",
    ],
)
def test_a_run_that_is_cut_ends_as_one_that_is_not(tiny, tmp_path, monkeypatch, method):
    settings, (run,) = planned(method, tmp_path)
    spec = run.spec
    whole = execute(spec, tiny, METHODS[method], run.lr_source)
    advance, epochs = TrainingRun.advance, []

    def cut_in_the_third(state):
        epochs.append(state.epoch)
        if len(epochs) == 3:
            raise Cut
        return advance(state)

    keep = Checkpoint(tmp_path, spec.hash, every=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "advance", cut_in_the_third)
        with pytest.raises(Cut):
            execute(spec, tiny, METHODS[method], run.lr_source, None, keep)
        again = execute(spec, tiny, METHODS[method], run.lr_source, None, keep)
    assert epochs == [0, 1, 2, 2, 3, 4]
    assert without_times(again) == without_times(whole)
    assert keep.path.is_file()
    # The executor takes it away once the record is on disk.
    (record,) = run_plan([run], settings)
    assert without_times(record) == without_times(whole)
    assert not keep.path.parent.exists()


@pytest.mark.parametrize("spoil", ["torn", "empty", "foreign", "other"])
def test_a_state_of_no_use_is_passed_over(tiny, tmp_path, spoil):
    _, (run,) = planned("dense-adam", tmp_path)
    keep = Checkpoint(tmp_path, run.spec.hash, every=0.0)
    whole = execute(run.spec, tiny, METHODS["dense-adam"], run.lr_source, None, keep)
    content = keep.path.read_bytes()
    if spoil == "other":
        torch.save({"hash": "another", "state": {}}, keep.path)
    else:
        keep.path.write_bytes({"torn": content[:-99], "empty": b"", "foreign": b"x" * 99}[spoil])
    again = execute(run.spec, tiny, METHODS["dense-adam"], run.lr_source, None, keep)
    assert without_times(again) == without_times(whole)


def test_a_state_of_another_version_fails_once_and_is_removed(tiny, tmp_path):
    _, (run,) = planned("dense-adam", tmp_path)
    keep = Checkpoint(tmp_path, run.spec.hash)
    keep.path.parent.mkdir()
    torch.save({"hash": run.spec.hash, "state": {"model": {}}}, keep.path)
    failed = execute(run.spec, tiny, METHODS["dense-adam"], run.lr_source, None, keep)
    assert failed["status"] == "failed"
    assert "does not fit its run any longer" in failed["reason"]
    second = execute(run.spec, tiny, METHODS["dense-adam"], run.lr_source, None, keep)
    assert second["status"] == "ok"


def test_states_are_written_no_more_often_than_asked_for(tiny, tmp_path):
    _, (run,) = planned("dense-adam", tmp_path)
    keep = Checkpoint(tmp_path, run.spec.hash, every=1e6)
    execute(run.spec, tiny, METHODS["dense-adam"], run.lr_source, None, keep)
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_half_written_goes_with_the_state(tmp_path):
    keep, other = Checkpoint(tmp_path, "a1"), Checkpoint(tmp_path, "b2")
    with replacing(keep.path) as half:
        half.write_bytes(b"half")
    left = keep.path.rename(half)
    keep.path.write_bytes(b"whole")
    other.path.write_bytes(b"whole")
    keep.remove()
    assert list(left.parent.iterdir()) == [other.path]
    other.remove()
    assert not left.parent.exists()
    product = tmp_path / "products" / "a1" / ".curve-left.csv"
    product.parent.mkdir(parents=True)
    product.write_bytes(b"half")
    keep.leave({"curve.csv": b"whole"})
    assert [path.name for path in product.parent.iterdir()] == ["curve.csv"]


@pytest.mark.parametrize("method", SOLVING)
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_solver_that_is_cut_ends_as_one_that_is_not(puzzle, tmp_path, monkeypatch, method, cut):
    settings = Settings(tmp_path, "puzzle", [method], ranks=[2], seeds=[0], device="cpu", jobs=1)
    lrs = {"factor-adam": 0.03} if method == "factor-adam" else {}
    (run,) = plan(replace(settings, lrs=lrs, max_evaluations=60))
    whole = execute(run.spec, puzzle, METHODS[method], run.lr_source)
    assert whole["effort"]["iterations"] > 5
    advance, pieces = SolverRun.advance, []

    def cut_after(state):
        pieces.append(state.trace.effort.evaluations)
        if len(pieces) == cut + 1:
            raise Cut
        return advance(state)

    keep = Checkpoint(tmp_path, run.spec.hash, every=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(watching, "_SECONDS_OF_A_PIECE", 0.0)
        patch.setattr(SolverRun, "advance", cut_after)
        with pytest.raises(Cut):
            execute(run.spec, puzzle, METHODS[method], run.lr_source, None, keep)
        assert pieces == sorted(set(pieces))
        again = execute(run.spec, puzzle, METHODS[method], run.lr_source, None, keep)
    # Taken up at the last state, not begun again.
    assert pieces[cut + 1] == pieces[cut] > 0
    assert without_time(again) == without_time(whole)


def test_pymanopts_solver_is_not_cut(puzzle, tmp_path, monkeypatch):
    pytest.importorskip("pymanopt")
    monkeypatch.setattr(watching, "_SECONDS_OF_A_PIECE", 0.0)
    name = "pymanopt-fixed-rank-cg"
    task = replace(puzzle, kind="svdp")
    settings = Settings(tmp_path, "puzzle", [name], seeds=[0], device="cpu", jobs=1)
    monkeypatch.setattr(TASKS, "_entries", {**TASKS._entries, "puzzle": task})
    (run,) = plan(settings)
    keep = Checkpoint(tmp_path, run.spec.hash, every=0.0)
    record = execute(run.spec, task, METHODS[name], None, None, keep)
    assert record["status"] == "ok"
    assert not list(tmp_path.iterdir())
