from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sttp_manifold import cli
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.tasks import TASKS

QUICK = ["--ranks", "4", "--seeds", "0", "--epochs", "1", "--jobs", "1", "--device", "cpu"]


def sttp(*words: str):
    return CliRunner().invoke(cli.app, list(words), catch_exceptions=False)


def test_help_teaches():
    top = sttp("--help")
    assert top.exit_code == 0
    assert "U diag(s) V^T" in top.output
    compare = sttp("compare", "--help").output
    for words in ("Examples", "Exit codes", "--tune", "report.html", "[the task's]"):
        assert words in compare
    assert sttp().exit_code == 2


def test_the_version_is_told():
    assert sttp("--version").output.startswith("sttp ")


def test_methods_and_tasks_are_listed():
    methods = sttp("methods").output
    assert all(method.name in methods for method in METHODS)
    tasks = sttp("tasks").output
    assert all(task.name in tasks for task in TASKS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "sttp-chart-adm"], "Did you mean 'sttp-chart-adam'? The methods are: dense"),
        (["--task", "digts"], "The tasks are: digits, fashion-mnist, completion, completion-"),
        (["--dtype", "half"], "The dtypes are: float32, float64"),
        (["--device", "tpu"], "The devices are: auto, cpu, cuda"),
        (["--ranks", "four"], "--ranks 'four': expected whole numbers, as in 4,8 or 0-2"),
        (["--ranks", "0"], "rank 0: expected 1 or more"),
        (["--ranks", ","], "--ranks is empty"),
        (["--seeds", "5-2"], "the range ends before it starts"),
        (["--epochs", "0"], "epoch count 0"),
        (["--lr", "fast"], "--lr 'fast': expected a number"),
        (["--lr", "nobody=0.1"], "unknown method 'nobody'"),
        (["--task", "fashion-mnist", "--data-dir", "."], "apt install dataset-fashion-mnist"),
        (["--tuned-file", "nothing.json"], "no tuned rates in nothing.json"),
    ],
)
def test_bad_usage_is_answered_and_leaves_nothing_behind(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    result = sttp("compare", "--out", "out", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_and_folders_end_with_two(tmp_path):
    assert sttp("compare", "--rank", "4").exit_code == 2
    result = sttp("report", str(tmp_path))
    assert result.exit_code == 2
    assert "no comparison in" in result.stderr


def test_a_comparison_from_the_command_line(tmp_path):
    out = tmp_path / "out"
    words = ["compare", *QUICK, "--methods", "dense-adam,sttp-*-adam", "--out", str(out)]
    first = sttp(*words)
    assert first.exit_code == 0
    for name in ("dense-adam", "sttp-chart-adam", "sttp-riemannian-adam", "report.html"):
        assert name in first.output
    files = {path.name for path in out.iterdir()}
    assert files >= {"records.jsonl", "summary.csv", "summary.md", "report.html", "figures"}
    again = sttp(*words)
    assert again.exit_code == 0
    assert "3 of 3 runs are on record already" in again.stderr
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    report = sttp("report", str(out))
    assert report.exit_code == 0
    assert (out / "report.html").read_bytes() == before


def test_quiet_says_nothing(tmp_path):
    result = sttp(
        "compare", *QUICK, "--quiet", "--methods", "dense-adam", "--out", str(tmp_path / "out")
    )
    assert (result.exit_code, result.output) == (0, "")


def test_a_diverged_run_is_said_and_is_a_result(tmp_path):
    words = ["--methods", "dense-*", "--lr", "dense-sgd=1e38", "--out", str(tmp_path / "out")]
    result = sttp("compare", *QUICK, *words)
    assert result.exit_code == 0
    assert "dense-sgd rank 4 seed 0 lr 1e+38 diverged: training loss" in result.stderr


def test_when_nothing_finished_the_exit_code_is_one(tmp_path):
    words = ["--methods", "dense-sgd", "--lr", "1e38", "--out", str(tmp_path / "out")]
    assert sttp("compare", *QUICK, *words).exit_code == 1


def test_tuning_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS._entries, "digits", _short(TASKS["digits"]))
    tuned, out = tmp_path / "tuned.json", tmp_path / "out"
    result = sttp(
        *("compare", "--tune", "--tuned-file", str(tuned), *QUICK),
        *("--methods", "dense-adam", "--out", str(out)),
    )
    assert result.exit_code == 0
    rate = json.loads(tuned.read_text())["methods"]["dense-adam"]["lr"]
    record = json.loads((out / "records.jsonl").read_text())
    assert (record["spec"]["lr"], record["lr_source"]) == (rate, "tuned")


def _short(task):
    from dataclasses import replace

    return replace(task, lrs=(1e-3, 1e-2))


def test_an_interrupt_ends_with_130(tmp_path, monkeypatch):
    from sttp_manifold.experiments import executor

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "execute", interrupt)
    result = sttp("compare", *QUICK, "--methods", "dense-adam", "--out", str(tmp_path / "out"))
    assert result.exit_code == 130
    assert "the same command goes on from here" in result.stderr


def _process(*words: str, **options: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    command = [sys.executable, "-m", "sttp_manifold", *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill -9")
def test_a_killed_process_leaves_a_whole_file_and_goes_on(tmp_path):
    out = tmp_path / "out"
    words = ["compare", "--methods", "dense-*", "--ranks", "4", "--seeds", "0-3", "--epochs", "5"]
    words += ["--jobs", "1", "--device", "cpu", "--quiet", "--out", str(out)]
    process = _process(*words)
    path: Path = out / "records.jsonl"
    limit = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = path.read_bytes().count(b"\n")
    assert 2 <= done < 8
    kept = path.read_bytes()
    second = _process(*words)
    _, complaints = second.communicate(timeout=240)
    assert (second.returncode, complaints) == (0, b"")
    whole = path.read_bytes()
    assert whole.startswith(kept[: kept.rfind(b"\n") + 1])
    assert whole.count(b"\n") == 8


def test_a_problem_is_solved_from_the_command_line(tmp_path):
    out = tmp_path / "out"
    words = ["compare", "--task", "completion", "--methods", "fixed-rank-tr,product-cg"]
    words += ["--ranks", "4", "--seeds", "0", "--max-evaluations", "100", "--jobs", "1"]
    first = sttp(*words, "--device", "cpu", "--out", str(out))
    assert first.exit_code == 0
    assert "reached 1e-10" in first.output
    assert "1 of 1" in first.output  # trust regions
    assert "0 of 1" in first.output  # conjugate gradients on the product need more than 100
    assert "what it took" in first.output
    assert (out / "figures" / "convergence.png").is_file()
    again = sttp(*words, "--device", "cpu", "--out", str(out))
    assert "2 of 2 runs are on record already" in again.stderr


def test_a_method_of_another_task_is_refused(tmp_path):
    words = ["compare", "--task", "digits", "--methods", "fixed-rank-cg"]
    result = sttp(*words, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "does not apply to the task 'digits'. Those that do are: dense-adam" in result.stderr
    assert not (tmp_path / "out").exists()
