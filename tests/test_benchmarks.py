"""The benchmarks run and report honestly. How fast anything is, is for ``make bench`` to say."""

from __future__ import annotations

import copy
import json
import re
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_scripts import BENCHMARKS, run_script
from calls import counted

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter
from sttp_manifold.optim import RiemannianAdam

ROWS = {
    "frame map",
    "all weights of a network",
    "parts of forming weights together",
    "convolution",
    "linear map from cores",
    "linear inference",
    "optimizer step",
    "orthonormality",
    "linear layer in training",
}


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a trial run of all parts leaves."""
    folder = tmp_path_factory.mktemp("docs")
    trial = ("--small", "--turns", "1", "--threads", "1", "--docs", str(folder))
    run_script("run.py", *trial, seconds=300)
    return folder


@pytest.fixture
def run(docs: Path) -> Any:
    return json.loads((docs / "results" / "benchmarks.json").read_text("utf-8"))


def test_a_run_has_every_row_and_every_number(run: Any) -> None:
    assert {record["row"] for record in run["records"]} == ROWS
    for record in run["records"]:
        assert record["versions"]["torch"] == metadata.version("torch")
        if record["status"] == "not measured":
            assert record["note"]
            assert record["ratio"] is None
        elif record["measure"] == "ratio":
            assert record["ratio"] > 0
        else:
            assert record["ours_value"] > 0
    methods = {"dense", "SVDP chart", "SVDP Riemannian", "STTP chart", "STTP Riemannian"}
    assert {case["method"] for case in run["training"]} == {*methods, "plain factors"}
    assert {case["method"] for case in run["growth"]} == methods
    assert {case["axis"] for case in run["growth"]} == {"rank", "width", "depth", "batch"}
    assert all(case["seconds"] > 0 and case["flops"] > 0 for case in run["growth"])


def test_a_missing_peer_is_reported_never_dropped(docs: Path, run: Any) -> None:
    page = (docs / "benchmarks.md").read_text("utf-8")
    for name, version in run["about"]["versions"].items():
        assert re.search(rf"\| {re.escape(name)} +\| {re.escape(version)} +\|", page)
        mine = [r for r in run["records"] if name in r["versions"] and name != "torch"]
        if version == "not installed":
            assert mine
            assert any(f"{name} not installed" in record["note"] for record in mine)
            assert f"{name} not installed" in page


def test_the_page_is_made_from_the_file_alone(docs: Path, script: Any, run: Any) -> None:
    page = (docs / "benchmarks.md").read_text("utf-8")
    assert script("page").text(run) == page
    pictures = re.findall(r"\]\((figures/[^)]+)\)", page)
    assert len(pictures) == 3
    assert all((docs / picture).stat().st_size > 10_000 for picture in pictures)


def test_every_comparison_has_a_label_of_its_own(script: Any, run: Any) -> None:
    labels = {script("pictures").label(record) for record in run["records"]}
    assert len(labels) == len(script("page").by_case(run["records"]))


def test_a_miss_is_named_with_its_threads(script: Any, run: Any) -> None:
    records, page = script("records"), script("page")
    record = copy.deepcopy(run["records"][1]) | {"target": 10.0, "measure": "ratio"}
    found = []
    for threads, ratio in ((1, 12.0), (2, 9.5)):
        one = record | {"threads": threads, "ratio": ratio, "note": ""}
        found.append(one | {"status": records.status(one)})
    about = run["about"] | {"threads": [1, 2]}
    text = page.text(run | {"about": about, "records": found})
    assert "With 1 thread, 1 of 1 targets are met, 0 are missed." in text
    assert "2 threads: 9.50x, target ≥ 10x" in text
    assert re.search(r"\| +12\.00x, met \| 9\.50x, \*\*missed\*\* \|", text)


@pytest.mark.parametrize(
    ("value", "target", "at_most", "status"),
    [
        (13.0, 13.0, False, "met"),
        (12.9, 13.0, False, "missed"),
        (1.0, 1.1, True, "met"),
        (1.2, 1.1, True, "missed"),
        (1.2, None, False, ""),
        (None, 13.0, False, "not measured"),
    ],
)
def test_status(
    script: Any, value: float | None, target: float | None, at_most: bool, status: str
) -> None:
    record = {"measure": "ratio", "ratio": value, "target": target, "at_most": at_most}
    assert script("records").status(record) == status


def test_ratios_are_those_within_a_turn(script: Any) -> None:
    now = 0.0

    def work(seconds: list[float]) -> Any:
        each = iter(seconds)

        def once() -> None:
            nonlocal now
            now += next(each)

        return once

    warm = [0.01, 0.01]
    works = {
        "ours": work([*warm, 0.01, 0.10, 0.01, 0.10, 0.01]),
        "theirs": work([*warm, 0.02, 0.20, 0.02, 0.80, 0.08]),  # twice ours, in most turns
        "absent": None,
    }
    found = script("timing").Timer(turns=5, clock=lambda: now).compare(works)
    assert found["ours"].against == pytest.approx(1.0)
    assert found["theirs"].against == pytest.approx(2.0)  # of medians it would be 8
    assert found["theirs"].seconds == pytest.approx(0.08)
    assert found["theirs"].turns == 5
    assert found["absent"] is None


def test_who_is_slow_is_called_once(script: Any) -> None:
    calls, timing = [], script("timing")
    now = 0.0

    def slow() -> None:
        nonlocal now
        calls.append(now)
        now += 2 * timing.AT_MOST

    def quick() -> None:
        nonlocal now
        now += 0.5

    found = timing.Timer(turns=5, clock=lambda: now).compare({"ours": quick, "theirs": slow})
    assert len(calls) == found["theirs"].turns == 1
    assert found["theirs"].against == pytest.approx(4 * timing.AT_MOST)
    assert found["ours"].turns == 5


def test_flops_of_products_and_solves(script: Any) -> None:
    training: ModuleType = script("training")
    A, B, L = torch.randn(3, 4, 5), torch.randn(3, 5, 6), torch.randn(3, 4, 4)
    C = torch.zeros(3, 4, 6)
    assert training.flops(lambda: A @ B) == 2 * 3 * 4 * 5 * 6
    assert training.flops(lambda: C.baddbmm_(A, B)) == 2 * 3 * 4 * 5 * 6
    solve = torch.linalg.solve_triangular
    assert training.flops(lambda: solve(L, C, upper=False)) == 3 * 4 * 4 * 6
    x = torch.randn(7, 5, requires_grad=True)
    layer = torch.nn.Linear(5, 3)
    assert training.flops(lambda: layer(x).sum().backward()) == 3 * 2 * 7 * 5 * 3


def test_plain_factors_do_the_arithmetic_of_a_spectral_weight_and_no_more(script: Any) -> None:
    training: ModuleType = script("training")
    x = torch.randn(8, 32)
    count = {}
    for method in ("plain factors", "SVDP chart"):
        model, optimizer = training.converted(training.mlp(32, 64), method, 4)
        assert model(x).shape == (8, 10)
        count[method] = training.flops(training.training_step(model, optimizer, x))
    assert sum(p.numel() for p in model.parameters()) < 3 * (32 + 64) * 4 + 10 * 32 + 64 + 32 + 10
    assert count["plain factors"] < count["SVDP chart"]


def test_the_exponent_is_that_of_the_upper_half(script: Any) -> None:
    sizes = [2, 4, 8, 16, 32, 64]
    values = [1.0, 1.0, 1.0] + [size**1.5 for size in sizes[3:]]
    assert script("growth").exponent(sizes, values) == pytest.approx(1.5)


def test_tf32_is_simulated_by_ten_bits(script: Any) -> None:
    tf32 = script("tf32")
    x = torch.randn(1000)
    kept = tf32.rounded(x)
    assert (kept.view(torch.int32) & 0x1FFF == 0).all()
    assert ((kept - x).abs() <= 2.0**-11 * x.abs()).all()
    A, B = torch.randn(2, 5, 5), torch.randn(2, 5, 5)
    with tf32.Tf32():
        product = A @ B
    torch.testing.assert_close(product, tf32.rounded(A) @ tf32.rounded(B))
    assert not torch.allclose(product, A @ B, rtol=0, atol=1e-6)


def test_the_page_of_optimizers_is_that_of_its_results(script: Any, tmp_path: Path) -> None:
    rates = script("which_optimizer")
    docs = BENCHMARKS.parents[1] / "docs"
    if not docs.is_dir():
        pytest.skip("the documentation is not beside the tests")
    runs = rates.load(docs / "results" / "which-optimizer.json")
    page = (docs / "which-optimizer.md").read_text("utf-8")
    assert rates.table(runs) in page
    assert rates.times(runs) in page
    copied = tmp_path / "page.md"
    copied.write_text(page, "utf-8")
    rates.write(runs, copied)
    assert copied.read_text("utf-8") == page
    one = rates.one("RiemannianMuon", 32, 4, 0.1, 0, 2)
    assert {*one} == {*runs[-1]}
    assert one["steps"] == 2


@pytest.mark.slow
def test_steps_under_compile_are_timed_beside_eager_ones() -> None:
    trial = ("--turns", "1", "--networks", "64-128-64-10", "--methods", "SVDP chart")
    said = run_script("compiled.py", *trial, seconds=1200)
    network, method, *numbers, operators = said.splitlines()[-1].strip("| ").split(" | ")
    assert (network, method) == ("64-128-64-10", "SVDP chart")
    assert all(float(number) > 0 for number in numbers)
    assert int(operators) == 0  # a compiler sees plain operations where there are no kernels


def test_the_products_of_a_step_are_those_that_the_optimizer_calls(script: Any) -> None:
    floor: ModuleType = script("step_floor")
    for kind, many in floor.PRODUCTS.items():
        frames = [
            ManifoldParameter(torch.linalg.qr(torch.randn(24, 4))[0], manifold=EuclideanStiefel())
            for _ in range(3)
        ]
        for frame in frames:
            frame.grad = torch.randn(24, 4)
        step = RiemannianAdam(frames, 1e-3, second_moment=kind).step
        calls = counted(step)
        assert calls["bmm"] + calls["baddbmm"] + calls["baddbmm_"] == many


@pytest.mark.slow
def test_products_are_timed_beside_adam() -> None:
    said = run_script("step_floor.py", "--turns", "1", seconds=300)
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("|")]
    assert [row[0].split()[0] for row in rows[2:]] == ["torch", "6", "6", "8", "8"]
    assert all(float(row[1]) > 0 for row in rows[2:])
