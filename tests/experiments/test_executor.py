"""Workers: they end with their parent, however it ends, and the call that goes on is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import executor
from sttp_manifold.experiments.compare import Settings, plan, run_plan
from sttp_manifold.experiments.records import read_records

PROC = Path("/proc")


def stat(pid: int) -> list[str]:
    """State and parent of a process, and more; nothing where there is none."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def alive(pid: int) -> bool:
    # A zombie holds nothing; the new parent of an orphan may be slow to ask for it.
    return stat(pid)[:1] not in ([], ["Z"])


def children(pid: int) -> list[int]:
    pids = [int(path.name) for path in PROC.iterdir() if path.name.isdigit()]
    return [child for child in pids if stat(child)[1:2] == [str(pid)]]


def test_a_process_ends_when_its_parent_is_another(monkeypatch):
    codes = []
    parents = iter([7, 7, 1])
    monkeypatch.setattr(executor.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(executor.os, "_exit", codes.append)
    monkeypatch.setattr(executor.time, "sleep", lambda seconds: None)
    executor._watch(7)
    assert codes == [1]


@pytest.mark.slow
@pytest.mark.skipif(not PROC.is_dir(), reason="this system does not list its processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_comparison_leaves_no_worker(tmp_path, number):
    words = ["compare", "--methods", "dense-*", "--ranks", "4", "--seeds", "0-99", "--quiet"]
    command = [sys.executable, "-m", "sttp_manifold", *words, "--jobs", "2", "--out", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    path = tmp_path / "records.jsonl"
    limit = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < limit
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(number)
    # Ends when nobody holds the other end of the pipe.
    said, _ = process.communicate(timeout=60)
    limit = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < limit
        time.sleep(0.05)
    records, _ = read_records(path)
    assert len(records) >= 2
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert b"What is done is kept; the same command goes on from here." in said
        assert b"Traceback" not in said
        assert path.read_bytes().endswith(b"\n")


@pytest.mark.slow
@pytest.mark.skipif(not PROC.is_dir(), reason="this system does not list its processes")
def test_a_killed_worker_is_told_and_what_is_done_is_kept(tmp_path):
    settings = Settings(
        out=tmp_path, methods=["dense-*"], ranks=[4], seeds=range(50), device="cpu", jobs=2
    )
    killed = []

    def kill(record) -> None:
        if not killed:
            killed.extend(
                child
                for child in children(os.getpid())
                if b"LokyProcess" in (PROC / str(child) / "cmdline").read_bytes()
            )
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(ConfigError, match=r"a worker process was killed.*--jobs 1"):
        run_plan(plan(settings), settings, on_record=kill)
    assert killed
    assert read_records(tmp_path / "records.jsonl")[0]
