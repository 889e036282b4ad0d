from __future__ import annotations

import os
import threading
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import files


@given(st.text() | st.sampled_from(["..", "../..", "/etc", "C:\\x", ".", "a/../b", "-", "\0"]))
def test_no_word_makes_a_file_name_that_leads_elsewhere(word):
    name = files.file_name(word)
    assert 0 < len(name) <= 80
    assert name not in (".", "..")
    assert not name.startswith(".")
    assert Path(name).name == PureWindowsPath(name).name == name
    assert "\0" not in name


def test_names_of_optimizers_stay():
    assert [files.file_name(word) for word in ("adam", "lbfgs", "adamw-2.1+x")] == [
        "adam",
        "lbfgs",
        "adamw-2.1+x",
    ]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    files.write_text(path, "new \ud800")
    assert path.read_text() == "new \\ud800"
    assert path.stat().st_mode & 0o400


def test_errors_of_the_system_name_the_file_and_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"file: .*; take another"),
        files.named_errors(tmp_path / "file" / "x", "take another"),
    ):
        files.write_text(tmp_path / "file" / "x", "")
    with (
        pytest.raises(ConfigError, match=r"there: No space left on device; take another"),
        files.named_errors(Path("there"), "take another"),
    ):
        raise OSError(28, os.strerror(28))


@pytest.mark.skipif(os.name != "posix", reason="folders are no files there")
def test_one_at_a_time_holds_a_folder(tmp_path):
    path = tmp_path / "deep" / "count"
    seen = []

    def add() -> None:
        for _ in range(20):
            with files.locked(path):
                count = int(path.read_text()) if path.exists() else 0
                files.write_text(path, str(count + 1))
        seen.append(True)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (path.read_text(), len(seen)) == ("80", 4)
    assert [file.name for file in path.parent.iterdir()] == ["count"]
    with (
        files.locked(path),
        pytest.raises(ConfigError, match="another process holds"),
        files.locked(path, patience=0.0),
    ):
        pass
