from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sttp_manifold import cli
from sttp_manifold.experiments import help_texts
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.shared_options import RATES, RUNS
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.tasks import TASKS

OLD = Path(__file__).parent / "experiments" / "old_records"
QUICK = ["--ranks", "4", "--seeds", "0", "--epochs", "1", "--jobs", "1", "--device", "cpu"]


def sttp(*words: str):
    return CliRunner().invoke(cli.app, list(words), catch_exceptions=False)


def test_help_teaches():
    top = sttp("--help")
    assert top.exit_code == 0
    assert "U diag(s) V^T" in top.output
    compare = " ".join(sttp("compare", "--help").output.replace("│", " ").split())
    for words in ("Examples", "Exit codes", "--tune", "report.html", "[the task's]", "[one a core"):
        assert words in compare
    for text in (help_texts.COMPARE, help_texts.PAPER):
        # Indented lines are broken by hand, for terminals of 80 columns.
        assert all(len(line) < 79 for line in text.splitlines() if line.startswith(" "))
    assert sttp().exit_code == 2


def test_what_two_commands_share_has_one_order_and_one_group():
    commands = get_command(cli.app).commands
    compare, gan = (
        {p.name: p.rich_help_panel for p in commands[c].params} for c in ("compare", "gan")
    )
    shared = [(name, panel) for name, panel in compare.items() if name in gan]
    assert [(name, panel) for name, panel in gan.items() if name in compare] == shared
    assert {panel for _, panel in shared} == {None, RATES, RUNS}


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
        (["--task", "digts"], "The tasks are: digits, fashion-mnist, cifar10, stl10, completion"),
        (["--dtype", "half"], "The dtypes are: float32, float64"),
        (["--device", "tpu"], "The devices are: auto, cpu, cuda"),
        (["--ranks", "four"], "--ranks 'four': expected whole numbers, as in 4,8 or 0-2"),
        (["--ranks", "0"], "rank 0: expected 1 or more"),
        (["--ranks", ","], "--ranks is empty"),
        (["--seeds", "5-2"], "the range ends before it starts"),
        (["--seeds", "0-99999999999"], "100,000,000,000 numbers; expected 100,000 or fewer"),
        (["--seeds=-1"], "--seeds '-1': expected whole numbers"),
        (["--seeds", "99999999999"], "seed 99999999999: expected 1,000,000,000 or less"),
        (["--seeds", "0-99999", "--ranks", "2-4"], "are 4,200,000 runs; expected 1,000,000"),
        (["--methods", ""], "no method given"),
        (["--epochs", "0"], "epoch count 0"),
        (["--epochs", "9" * 30], "expected 1,000,000,000 or less"),
        (["--max-seconds", "inf", "--task", "completion"], "time limit inf"),
        (["--max-seconds", "nan", "--task", "completion"], "time limit nan"),
        (["--lr", "1e999"], "learning rate inf"),
        (["--tuned-file", "."], ".: Is a directory; name another file with --tuned-file"),
        (["--tune", "--tuned-file", "."], "Is a directory; "),
        (["--tune", "--tuned-file", "/proc/x.json"], "/proc/x.json: No such file or directory"),
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


@pytest.mark.parametrize(
    ("blocked", "words", "message"),
    [
        (".", ["--out", "file"], "file: File exists; make room or name another folder with --out"),
        (".", ["--out", "file/in"], "name another folder with --out"),
        ("out/records.jsonl", [], "out/records.jsonl: Is a directory"),
        ("out/comparison.json", [], "comparison.json: Is a directory"),
        ("out/report.html", [], "report.html: Is a directory"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, monkeypatch, blocked, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / blocked).mkdir(parents=True, exist_ok=True)
    result = sttp("compare", *QUICK, "--methods", "dense-adam", "--out", "out", *words)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", "")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_is_full_is_said_and_what_is_done_is_kept(tmp_path, monkeypatch):
    from sttp_manifold.experiments import files

    def full(path, content):
        raise OSError(28, os.strerror(28))

    out = tmp_path / "out"
    words = ["compare", *QUICK, "--methods", "dense-adam", "--out", str(out)]
    for name in ("records", "comparison", "nothing", "report"):
        with monkeypatch.context() as patch:
            if name == "records":
                from sttp_manifold.experiments import records

                patch.setattr(records.os, "fsync", lambda descriptor: full(None, None))
            elif name != "nothing":
                patch.setattr(files.Path, "write_bytes", full)
            result = sttp(*words) if name != "report" else sttp("report", str(out))
        if name == "nothing":
            assert result.exit_code == 0
            continue
        assert result.exit_code == 2
        assert "No space left on device; make room" in result.stderr
    assert sttp(*words).exit_code == 0


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff", b'{"task": "digits"}'])
def test_a_broken_note_is_said_with_the_call_that_mends_it(tmp_path, content):
    out = tmp_path / "[bold]"
    shutil.copytree(OLD / "digits", out)
    (out / "comparison.json").write_bytes(content)
    result = sttp("report", str(out))
    assert result.exit_code == 2
    assert "comparison.json is no note of a comparison" in result.stderr
    assert f"`sttp compare --out {shlex.quote(str(out))}`" in result.stderr


@pytest.mark.parametrize(("folder", "missing"), [("mixed", "Some runs diverged"), ("digits", "")])
def test_an_old_folder_is_reported_and_goes_on(tmp_path, monkeypatch, folder, missing):
    out = tmp_path / "[old]"
    shutil.copytree(OLD / folder, out)
    result = sttp("report", str(out))
    assert result.exit_code == 0
    assert str(out / "report.html") in result.output.replace("\n", "")
    with (OLD / folder / "summary.csv").open(encoding="utf-8") as file:
        before = list(csv.DictReader(file))
    with (out / "summary.csv").open(encoding="utf-8") as file:
        after = list(csv.DictReader(file))
    assert [
        {name: line[name] for name in old} for old, line in zip(before, after, strict=True)
    ] == (before)
    command = shlex.split(json.loads((out / "comparison.json").read_text())["command"])
    again = sttp(*command[1:], "--out", str(out), "--jobs", "1")
    assert again.exit_code == 0
    count = len((OLD / folder / "records.jsonl").read_bytes().splitlines())
    assert f"{count} of {count} runs are on record already" in again.stderr


def test_no_name_in_a_record_leads_to_another_folder(tmp_path):
    """Names become parts of file names, of tables in Markdown, and of pages."""
    out = tmp_path / "deep" / "out"
    shutil.copytree(OLD / "digits", out)
    name = "../../../x|`<b>$\\foo$"
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    for line in lines:
        line["spec"] |= {"optimizer": name, "method": name + line["spec"]["method"]}
        line["hash"] = RunSpec.from_dict(line["spec"]).hash
    (out / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    note = json.loads((out / "comparison.json").read_text())
    note |= {"hashes": [line["hash"] for line in lines], "command": "x\n```\n# y"}
    (out / "comparison.json").write_text(json.dumps(note))
    assert sttp("report", str(out)).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert all(path.is_file() for path in (out / "figures").iterdir())
    text = (out / "summary.md").read_text()
    assert "<b>" not in text
    assert r"x\|\`&lt;b>$" in text
    assert "````\nx\n```\n# y\n````" in text
    assert "<b>$" not in (out / "report.html").read_text()


def test_unknown_options_and_folders_end_with_two(tmp_path):
    assert sttp("compare", "--rank", "4").exit_code == 2
    result = sttp("report", str(tmp_path))
    assert result.exit_code == 2
    assert "no comparison in" in result.stderr


def test_a_comparison_from_the_command_line(tmp_path):
    out = tmp_path / "out"
    methods = "dense-adam,sttp-chart-adam,sttp-riemannian-adam"
    words = ["compare", *QUICK, "--methods", methods, "--out", str(out)]
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
        *("compare", "--tune", "--tuned-file", str(tuned), "--tuning-seeds", "7-8", *QUICK),
        *("--methods", "dense-adam", "--out", str(out), "--extensions", "1"),
    )
    assert result.exit_code == 0
    found = json.loads(tuned.read_text())["methods"]["dense-adam"]
    assert found["seeds"] == [7, 8]
    # Of two rates, one is best, and at an edge.
    assert len(found["grid"]) == 3
    rate = found["lr"]
    record = json.loads((out / "records.jsonl").read_text())
    assert (record["spec"]["lr"], record["lr_source"]) == (rate, "tuned")


@pytest.mark.parametrize("command", ["compare", "gan"])
def test_options_of_tuning_are_refused_where_nothing_is_tuned(command):
    result = sttp(command, "--tuning-seeds", "7", "--extensions", "1")
    assert result.exit_code == 2
    assert "--tuning-seeds and --extensions: only tuning heeds that; add --tune" in result.stderr


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
