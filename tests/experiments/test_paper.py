"""Counts of the paper's networks, and the command that prints them."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sttp_manifold import cli
from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import paper
from sttp_manifold.experiments.models import network, weight_sizes
from sttp_manifold.nn import compress, summary

ROOT = Path(__file__).resolve().parents[2]


def sttp(*words: str):
    return CliRunner().invoke(cli.app, ["paper", *words], catch_exceptions=False)


@pytest.mark.parametrize("name", paper.NETWORKS)
def test_svdp_counts_by_hand(name: str) -> None:
    """A matrix of rank r has r (d_out + d_in - r) numbers, with equal values r (r + 1) / 2 less."""
    sizes = weight_sizes(network(name, device="meta"))
    for count in paper.network_counts(name):
        if count.kind == "svdp":
            dof = 0
            for d_out, *others in sizes:
                d_in = math.prod(others)
                r = min(count.rank, d_out, d_in)
                dof += r * (d_out + d_in - r) - (count.spectrum == "identity") * r * (r + 1) // 2
            assert dof == count.dof
            assert count.weights == len(sizes)


@pytest.mark.parametrize("name", ["resnet-8", "wrn-10-1", "sngan-28-generator"])
def test_plans_count_what_a_compressed_network_has(name: str) -> None:
    """Norms and running statistics too, which the discriminators do not have."""
    for count in paper.network_counts(name, [5]):
        model = compress(
            network(name), count.rank, kind=count.kind, spectrum=count.spectrum, init="eye",
            grow="allow",
        )  # fmt: skip
        table = summary(model)
        assert table.total.parameters == count.dof + count.rest
        assert table.total.dense == count.dense
        assert table.Z == count.Z


def test_bounds_of_all_counts() -> None:
    """Trains have fewer numbers than matrices of their rank; more rank, more numbers."""
    for name in paper.NETWORKS:
        counts = {(c.rank, c.spectrum, c.kind): c for c in paper.network_counts(name)}
        for (rank, spectrum, kind), count in counts.items():
            assert count.agrees in (None, True)
            assert 0 < count.Z <= 100
            assert count.dof <= counts[rank, "free", kind].dof
            assert count.dof <= counts[rank, spectrum, "svdp"].dof
            if 2 * rank in paper.RANKS:
                assert count.dof <= counts[2 * rank, spectrum, kind].dof


def test_a_rank_above_every_side_is_lowered() -> None:
    high, higher = (paper.network_counts("resnet-8", [rank])[3] for rank in (64, 4096))
    assert (high.kind, high.spectrum) == ("sttp", "free")
    assert replace(high, rank=4096) != higher  # bonds inside carry more than a side
    assert higher.Z == 100
    svdp = paper.network_counts("resnet-8", [64, 4096])
    assert replace(svdp[2], rank=4096) == svdp[6]


def test_the_command_prints_every_network() -> None:
    result = sttp()
    assert result.exit_code == 0
    assert result.output == paper.as_text(paper.paper_counts())
    for name in paper.NETWORKS:
        assert f"{name}: " in result.output
    assert "16 of 16 known published figures come out." in result.output
    assert "differs" not in result.output
    assert max(map(len, result.output.splitlines())) <= 100


def test_ranks_and_networks_can_be_chosen() -> None:
    result = sttp("--networks", "resnet-20,wrn-10-2", "--ranks", "2-3")
    assert result.exit_code == 0
    assert result.output == paper.as_text(paper.paper_counts(["resnet-20", "wrn-10-2"], [2, 3]))
    assert "No known published figure is among these." in result.output
    assert "resnet-20: 20 weights, 271,098 numbers, 2,762 of them not" in result.output
    assert "sngan" not in result.output
    assert " x " not in sttp("--ranks", "5").output  # the rank of no published layer


def test_other_formats_and_files(tmp_path: Path) -> None:
    result = sttp("--ranks", "64", "--format", "csv", "--out", str(tmp_path / "new" / "counts.csv"))
    assert (result.exit_code, result.output) == (0, "")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "new" / "counts.csv").read_text("utf-8"))))
    counts = paper.paper_counts(ranks=[64])
    assert [int(line["dof"]) for line in lines] == [count.dof for count in counts]
    (line,) = [w for w in lines if w["published_ratio"] == "16.713"]
    assert (line["name"], line["kind"], line["Z"]) == ("sngan-32-discriminator", "sttp", "16.713")
    assert lines[-1]["published_dof"] == ""
    markdown = sttp("--ranks", "64", "--format", "markdown").output
    assert markdown == paper.as_markdown(counts)
    assert "**wrn-28-10**: 29 weights, 36,497,146 numbers" in markdown


def test_a_figure_that_does_not_come_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {("sngan-32-discriminator", 64): {("sttp", "identity"): 16.8}}
    monkeypatch.setattr(paper, "_RATIOS", figures)
    result = sttp("--networks", "sngan-32-discriminator")
    assert result.exit_code == 1
    assert "differs" in result.output
    assert "0 of 1 known published figures come out." in result.output
    expected = "sngan-32-discriminator, rank 64, sttp, identity: 16.713, published 16.800."
    assert expected in result.output
    layers = {((64, 64), 16): {("svdp", "free"): 1800}}
    monkeypatch.setattr(paper, "LAYERS", layers)
    result = sttp("--ranks", "16")
    assert result.exit_code == 1
    assert "64 x 64, rank 16, svdp, free: 1,792, published 1,800." in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--networks", "wrn28"], "unknown network 'wrn28'; expected resnet-D, wrn-D-K, sngan"),
        (["--networks", "wrn-27-1"], "the depth of a WideResNet is 6 n + 4 layers (10, 16, 22"),
        (["--networks", "sngan-64-generator"], "no SNGAN for images of 64 pixels"),
        (["--networks", ","], "--networks is empty"),
        (["--ranks", "0"], "rank 0: expected 1 or more"),
        (["--ranks", "4.5"], "--ranks '4.5': expected whole numbers"),
        (["--ranks", ""], "--ranks is empty"),
        (["--format", "html"], "unknown format 'html'. The formats are: text, markdown, csv"),
        (["--out", "here"], "here: Is a directory; name another file with --out"),
    ],
)
def test_bad_usage_is_answered(tmp_path: Path, monkeypatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    result = sttp(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert not list((tmp_path / "here").iterdir())


def test_errors_of_the_functions() -> None:
    with pytest.raises(ConfigError, match="rank -1"):
        paper.layer_counts((8, 8), [-1])
    with pytest.raises(ConfigError, match="unknown format"):
        paper.written([], "pdf")


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs" / "paper.md").read_text("utf-8")
    assert paper.as_markdown(paper.paper_counts()) in page
