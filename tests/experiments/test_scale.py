"""Many runs on many machines, one run on several devices, and kills at any moment."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import checkpoint, executor, progress
from sttp_manifold.experiments.checkpoint import CHECKPOINTS, Checkpoint
from sttp_manifold.experiments.compare import (
    Settings,
    UnfinishedError,
    plan,
    run_plan,
    save_comparison,
    tune,
)
from sttp_manifold.experiments.reading.comparison import load_comparison
from sttp_manifold.experiments.records import read_folder, read_records
from sttp_manifold.experiments.runs import train
from sttp_manifold.experiments.runs.board import Board
from sttp_manifold.experiments.runs.pulse import Pulse, read_pulses
from sttp_manifold.experiments.runs.trace import Trace
from sttp_manifold.experiments.shards import Shard

from .runs.test_train import without_times

ROOT = Path(__file__).parents[2]


def settings(out: Path, **changes) -> Settings:
    fields = {
        "task": "tiny",
        "methods": ["dense-adam", "sttp-chart-adam"],
        "ranks": [1, 2],
        "seeds": range(4),
        "epochs": 1,
        "device": "cpu",
        "jobs": 1,
    }
    return Settings(out, **{**fields, **changes})


def environment(**more: str) -> dict[str, str]:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": path,
        **more,
    }


# -- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/10001"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="as in 3/16"):
        Shard.parse(text)


def test_shards_do_each_run_once_and_are_read_as_one(tiny, tmp_path):
    whole = settings(tmp_path / "whole")
    expected = {r["hash"]: without_times(r) for r in run_plan(plan(whole), whole)}
    done = []
    for number in (2, 1, 3):
        part = settings(tmp_path / "out", shard=Shard(number, 3))
        runs = plan(part)
        save_comparison(part, runs)
        known = run_plan(runs, part)
        (own, torn) = read_records(tmp_path / "out" / f"records-{number}-of-3.jsonl")
        assert not torn
        done += [record["hash"] for record in own]
        # A part of the plan at first, all of it with the last shard.
        assert {record["hash"] for record in known} == set(done)
    assert sorted(done) == sorted(expected)
    merged = load_comparison(tmp_path / "out").records
    assert {r["hash"]: without_times(r) for r in merged} == expected
    # Whoever starts again, with however many shards, does none of them twice.
    again = settings(tmp_path / "out", shard=Shard(1, 2))
    assert len(run_plan(plan(again), again)) == 16
    assert read_records(tmp_path / "out" / "records-1-of-2.jsonl")[0] == []


def test_a_run_that_failed_in_one_file_and_is_done_in_another_is_done(tiny, tmp_path):
    one = settings(tmp_path, seeds=[0], ranks=[1], methods=["dense-adam"], shard=Shard(1, 1))
    (record,) = run_plan(plan(one), one)
    failed = {**record, "status": "failed", "reason": "no room", "test_metric": None}
    from sttp_manifold.experiments.records import RecordFile, latest

    with RecordFile(tmp_path / "records.jsonl") as file:
        file.append(record)
    with RecordFile(tmp_path / "records-2-of-2.jsonl") as file:
        file.append(failed)
    assert latest(read_folder(tmp_path, "records.jsonl"))[0]["status"] == "ok"


def test_rates_are_chosen_when_all_shards_are_done(tiny, tmp_path):
    parts = [
        settings(
            tmp_path / "out",
            ranks=[1],
            methods=["dense-adam"],
            shard=Shard(k, 2),
            tuned_file=tmp_path / "tuned.json",
            extensions=0,
        )
        for k in (1, 2)
    ]
    with pytest.raises(UnfinishedError, match="of 4 tuning runs are on record"):
        tune(parts[0])
    path, found = tune(parts[1])
    assert path.is_file()
    assert list(found) == ["dense-adam"]
    assert found["dense-adam"]["seeds"] == [1000, 1001]


# -- how far it is --------------------------------------------------------------------------------


def test_runs_say_how_far_they_are(tmp_path):
    pulse = Pulse(tmp_path, "a", every=0.0)
    pulse.look((3, 12))
    Pulse(tmp_path, "b", every=0.0).look((6, 12))
    Pulse(tmp_path, "c", every=60.0).look((6, 12))
    (tmp_path / CHECKPOINTS / "d.json").write_text("torn")
    assert read_pulses(tmp_path, ["a", "b", "c", "d", "e"]) == [0.25, 0.5]
    pulse.remove()
    assert read_pulses(tmp_path, ["a", "b"]) == [0.5]


def test_time_left_is_told_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    from sttp_manifold.experiments.task import ACCURACY

    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_PULSES", 0.0)
    with progress.RunProgress(Console(width=200), ACCURACY, "tiny") as shown:
        shown.start(4, 0, 0)
        Pulse(tmp_path, "a", every=0.0).look((6, 12))
        shown.follow(tmp_path, ["a", "b"])
        time.sleep(0.2)
    said = capsys.readouterr().out
    assert "tiny: 0/4 runs, 1 going on (50 %), about 0:00:0" in said


def test_a_log_for_tensorboard_has_the_curves_once(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = settings(tmp_path, seeds=[0], ranks=[1], methods=["sttp-chart-adam"], tensorboard=True)
    (record,) = run_plan(plan(given), given)
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    found = [(e.step, e.value) for e in events.Scalars("val_loss")]
    expected = list(zip((0, 1), record["curves"]["val_loss"], strict=True))
    assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert "largest singular value/0" in events.Tags()["scalars"]
    # Taken up again, it tells only what is new.
    trace = Trace()
    trace.curves = record["curves"]
    board = Board(tmp_path, plan(given)[0].spec)
    board.goes_on(trace)
    board.look(trace)
    board.close()
    assert len(list(folder.iterdir())) == 1


def test_without_tensorboard_the_extra_is_named(tiny, tmp_path, monkeypatch):
    from sttp_manifold.experiments.runs import board

    monkeypatch.setattr(board.importlib.util, "find_spec", lambda name: None)
    given = settings(tmp_path, tensorboard=True)
    with pytest.raises(ConfigError, match=r"pip install 'sttp-manifold\[tensorboard\]'"):
        run_plan(plan(given), given)


# -- kills ----------------------------------------------------------------------------------------


def every_step(monkeypatch) -> None:
    """States are written after each step of training."""
    monkeypatch.setattr(train, "_SECONDS_OF_A_PIECE", -1.0)
    monkeypatch.setattr(executor, "Checkpoint", functools.partial(Checkpoint, every=-1.0))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kills_at_random_moments_lose_an_interval_at_most(tmp_path, monkeypatch):
    """Killed again and again while it trains and writes, it ends with the same numbers."""
    given = Settings(
        tmp_path / "whole",
        "digits",
        ["sttp-riemannian-adam"],
        ranks=[4],
        seeds=[0, 1],
        epochs=3,
        device="cpu",
        jobs=1,
    )
    expected = {r["hash"]: without_times(r) for r in run_plan(plan(given), given)}
    every_step(monkeypatch)
    given = replace(given, out=tmp_path / "out")
    rng, seen, kills = random.Random(0), 0, 0
    while True:
        child = os.fork()
        if not child:
            # The code of its end tells whether it was killed.
            os._exit(0 if run_plan(plan(given), given) else 1)
        if kills < 8:
            seen = moved(given.out, seen, child)
            time.sleep(0.2 * rng.random())
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        # What is there is whole.
        for path in given.out.glob(f"{CHECKPOINTS}/[0-9a-f]*.pt"):
            torch.load(path, weights_only=True)
        if os.WIFEXITED(status):
            break
        kills += 1
    records, torn = read_records(given.out / "records.jsonl")
    assert not torn
    assert kills >= 4
    assert os.WEXITSTATUS(status) == 0
    assert {r["hash"]: without_times(r) for r in records} == expected
    assert len(records) == 2


def moved(folder: Path, seen: int, child: int) -> int:
    """Wait for a state that is younger than those that were seen, as long as the child lives."""
    while os.path.exists(f"/proc/{child}") or not Path("/proc").is_dir():
        times = [path.stat().st_mtime_ns for path in folder.glob(f"{CHECKPOINTS}/[0-9a-f]*.pt")]
        if times and max(times) > seen:
            return max(times)
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.002)
    return seen


# -- a cluster ------------------------------------------------------------------------------------


def test_what_a_cluster_wants_is_said(tiny, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="the number of workers decides"):
        plan(settings(tmp_path, dask="tcp://127.0.0.1:1"))
    monkeypatch.setitem(sys.modules, "distributed", None)
    given = settings(tmp_path, dask="tcp://127.0.0.1:1", jobs=None)
    with pytest.raises(ConfigError, match=r"pip install 'sttp-manifold\[dask\]'"):
        run_plan(plan(given), given)


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_gives_every_record_once(tmp_path):
    pytest.importorskip("distributed")
    script = """
import os, signal, sys
from pathlib import Path
import distributed
from sttp_manifold.experiments.compare import Settings, plan, run_plan
if __name__ == "__main__":
    distributed_options = dict(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with distributed.LocalCluster(**distributed_options) as cluster:
        settings = Settings(Path(sys.argv[1]), "digits", ["dense-*"], ranks=[4], seeds=range(8),
                            epochs=4, device="cpu", dask=cluster.scheduler_address)
        pids = [worker.pid for worker in cluster.workers.values()]
        told = []
        def kill(record):
            told.append(record["hash"])
            if len(told) == 2:
                print("killed", pids[0], flush=True)
                os.kill(pids[0], signal.SIGKILL)
        records = run_plan(plan(settings), settings, on_record=kill)
        print("told", len(told), len(set(told)), "records", len(records),
              {r["status"] for r in records}, flush=True)
"""
    path = tmp_path / "cluster.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path / "out")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed" in done.stdout
    assert "told 16 16 records 16 {'ok'}" in done.stdout
    records, torn = read_records(tmp_path / "out" / "records.jsonl")
    assert not torn
    assert len({record["hash"] for record in records}) == len(records) == 16


# -- several devices ------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_what_one_does_to_rounding(tmp_path):
    words = ["compare", "--task", "digits", "--ranks", "4", "--seeds", "0", "--epochs", "2"]
    words += ["--methods", "dense-sgd,svdp-chart-adam,sttp-riemannian-adam,sttp-riemannian-muon"]
    # 1,197 examples: the last batch of an epoch has an odd number, shared 23 to 22.
    words += ["--batch-size", "48", "--device", "cpu", "--dtype", "float64", "--quiet"]
    module = ["-m", "sttp_manifold", *words]
    one = [sys.executable, *module, "--jobs", "1", "--out", str(tmp_path / "one")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = [sys.executable, *launcher, *module, "--out", str(tmp_path / "two")]
    for command in (one, two):
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    alone, together = (
        {r["spec"]["method"]: r for r in read_records(tmp_path / name / "records.jsonl")[0]}
        for name in ("one", "two")
    )
    assert len(alone) == 4
    assert list(tmp_path.glob("two/report.html"))
    for method, record in alone.items():
        other = together[method]
        assert (other["hash"], other["status"]) == (record["hash"], "ok")
        assert "2 processes" in other["device"]
        for name in ("train_loss", "val_loss", "val_metric", "lr"):
            assert other["curves"][name] == pytest.approx(record["curves"][name], rel=1e-6)
        assert other["test_loss"] == pytest.approx(record["test_loss"], rel=1e-6)


def test_what_several_processes_cannot_share_is_refused(puzzle, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "processes", lambda: 2)
    given = settings(tmp_path, task="puzzle", methods=["fixed-rank-cg"], ranks=[2], epochs=None)
    with pytest.raises(ConfigError, match="fixed-rank-cg: one process each"):
        run_plan(plan(given), given)
    given = settings(tmp_path, jobs=2)
    with pytest.raises(ConfigError, match="--dask and --jobs are for many runs"):
        run_plan(plan(given), given)


def test_one_process_is_what_it_would_be_anyway():
    from sttp_manifold.experiments import distributed

    with distributed.joined():
        assert (distributed.processes(), distributed.process()) == (1, 0)
        assert distributed.of_all("x") == "x"
        value = torch.ones(2)
        assert distributed.sum_over_all(value) is value
        model = torch.nn.Linear(2, 2)
        assert distributed.wrapped(model, torch.device("cpu")) is model
    assert checkpoint.is_first()
    assert executor.processes() == 1
