"""One page of several folders, and the command of each row."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sttp_manifold.cli import app
from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import compare
from sttp_manifold.experiments.compare import Settings
from sttp_manifold.experiments.options import numbers, rates
from sttp_manifold.experiments.reading.comparison import load_comparison
from sttp_manifold.experiments.reading.merged import merge, write_merged
from sttp_manifold.experiments.reading.reproduce import command_of, row_cells


def made(settings: Settings) -> list[dict]:
    runs = compare.plan(settings)
    compare.save_comparison(settings, runs)
    return compare.run_plan(runs, settings)


@pytest.fixture
def folders(tiny, tmp_path):
    base = Settings(
        tmp_path / "a",
        "tiny",
        ["dense-adam", "sttp-chart-adam"],
        ranks=[1, 2],
        seeds=[0, 1],
        epochs=1,
        jobs=1,
        device="cpu",
    )
    other = replace(
        base, out=tmp_path / "b", seeds=[1, 2], methods=["dense-adam", "svdp-chart-sgd"]
    )
    third = replace(base, out=tmp_path / "c", epochs=2, methods=["dense-adam"])
    for settings in (base, other, third):
        made(settings)
    return base, other, third


def test_runs_of_one_setting_are_one_comparison(folders, tmp_path):
    base, other, _ = folders
    loaded = [load_comparison(settings.out) for settings in folders]
    both, longer = merge(loaded)
    # Two methods x two ranks x two seeds each; dense at seed 1 is in both.
    assert len(both.records) == 8 + 8 - 2
    assert len({record["hash"] for record in both.records}) == 14
    assert longer.records == loaded[2].records
    row = next(r for r in both.rows if (r.method, r.rank) == ("dense-adam", 1))
    assert list(row.test) == [0, 1, 2]
    written = write_merged([s.out for s in folders], tmp_path / "page")
    page = written[-1].read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    # A picture and three sentences open it.
    assert page.index("data:image/png") < page.index("<li>") < page.index("Each row, and how")
    assert page.count("<h1>tiny</h1>") == 2
    assert "sttp report" in page
    text = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    assert "`sttp compare --task tiny --methods dense-adam --ranks 1 --seeds 0,1,2" in text
    with pytest.raises(ConfigError, match="goes to a folder of its own"):
        write_merged([base.out, other.out], base.out)


def test_the_command_of_a_row_gives_its_hashes(folders):
    base, *_ = folders
    records = load_comparison(base.out).records
    for line in row_cells(records):
        words = shlex.split(line[-1])
        given = dict(zip(words[2::2], words[3::2], strict=True))
        settings = Settings(
            base.out,
            given["--task"],
            [given["--methods"]],
            ranks=numbers([given["--ranks"]], "--ranks"),
            seeds=numbers([given["--seeds"]], "--seeds"),
            epochs=int(given["--epochs"]),
            dtype=given["--dtype"],
            device=given["--device"],
            lrs=rates([given["--lr"]]),
            options={"batch_size": int(given["--batch-size"]), "schedule": given["--schedule"]},
        )
        hashes = {planned.spec.hash for planned in compare.plan(settings)}
        found = {
            r["hash"]
            for r in records
            if (str(r["spec"]["rank"]), r["spec"]["method"]) == (line[0], line[1])
        }
        assert hashes == found


def test_a_solvers_command_has_its_budget(puzzle, tmp_path):
    settings = Settings(tmp_path, "puzzle", ["product-cg"], seeds=[0], device="cpu", jobs=1)
    (record,) = made(settings)
    words = command_of([record])
    assert "--max-evaluations 2000" in words
    assert "--lr" not in words
    assert "--schedule" not in words


def test_several_folders_from_the_command_line(folders, tmp_path):
    names = [str(settings.out) for settings in folders]
    result = CliRunner().invoke(app, ["report", *names, "--out", str(tmp_path / "page")])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith("report.html")
    assert (tmp_path / "page" / "report.html").is_file()
