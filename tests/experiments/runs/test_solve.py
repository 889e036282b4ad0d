from __future__ import annotations

import importlib
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import methods, solvers
from sttp_manifold.experiments.compare import Settings, plan, run_plan, tune
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.problems import drawn_problem, entries_of
from sttp_manifold.experiments.records import Record, read_records, validate
from sttp_manifold.experiments.runs import watch as watching
from sttp_manifold.experiments.runs.execute import execute
from sttp_manifold.experiments.runs.train import TrainingRun
from sttp_manifold.experiments.solvers import SOLVERS, Solver
from sttp_manifold.experiments.task import Budget, Task
from sttp_manifold.experiments.tasks import TASKS
from sttp_manifold.manifolds.cost import ManifoldCost
from sttp_manifold.tt import SpectralTT, TTShape

from .test_train import without_times


def solve(task: Task, method: str, **changes: object) -> Record:
    settings = Settings(out=None, task=task.name, methods=[method], seeds=[0], device="cpu")
    (planned,) = plan(replace(settings, lrs={"factor-adam": 0.03} if "adam" in method else {}))
    spec = replace(planned.spec, **changes)
    record = execute(spec, task, METHODS[method], planned.lr_source)
    validate(record)
    return record


def applying(task: Task) -> list[Solver]:
    return [solver for solver in SOLVERS if solver.applies_to(task)]


def without_time(record: Record) -> Record:
    kept = without_times(record)
    effort = {k: v for k, v in record["effort"].items() if k != "seconds_to_target"}
    return {**kept, "effort": effort}


def test_every_solver_finds_the_weight_from_one_start(puzzle):
    records = {solver.name: solve(puzzle, solver.name) for solver in applying(puzzle)}
    assert {record["status"] for record in records.values()} == {"ok"}
    assert len({record["w0_digest"] for record in records.values()}) == 1
    assert max(record["w0_gap"] for record in records.values()) < 1e-14
    for name, record in records.items():
        effort = record["effort"]
        assert effort["target"] == 1e-10
        assert record["spec"]["kind"] == puzzle.kind
        assert record["examples"] == {"train": 84, "val": 12, "test": 24}
        assert record["curves"]["train_loss"][0] == pytest.approx(
            records["fixed-rank-cg"]["curves"]["train_loss"][0]
        )
        assert effort["residual"] <= 1e-10, name
        assert effort["stopped"].endswith("<= target = 1e-10")
        # Recovered, not only fitted: on entries that were never shown.
        assert record["test_metric"] < 1e-8, name
        assert effort["iterations_to_target"] == effort["iterations"]
        assert effort["evaluations_to_target"] == effort["evaluations"]
        assert 0 < effort["seconds_to_target"] <= record["seconds"]
        assert record["curves"]["iteration"][-1] == effort["iterations"]
        assert (effort["hessian_products"] > 0) == (record["spec"]["optimizer"] == "tr")
        assert effort["gradients"] >= effort["iterations"]


def test_a_run_is_the_same_every_time(puzzle):
    for name in ("fixed-rank-cg", "chart-lbfgs", "factor-adam"):
        first, second = (solve(puzzle, name, max_evaluations=25) for _ in range(2))
        assert without_time(first) == without_time(second)


def test_seeds_and_ranks_give_other_problems(puzzle):
    problems = [
        puzzle.problem(puzzle, rank, seed) for rank, seed in ((2, 0), (2, 0), (2, 1), (1, 0))
    ]
    places = [problem.splits.train.inputs.tolist() for problem in problems]
    assert places[0] == places[1]
    assert places[0] != places[2]
    assert places[0] != places[3]
    assert len({problem.digest for problem in problems}) == 3


@pytest.mark.parametrize("name", ["completion-tensor", "completion-matrix"])
def test_the_problems_are_what_they_say(name):
    task = TASKS[name]
    for rank in task.ranks:
        problem = task.problem(task, rank, 0)
        shape, splits = problem.start.shape, problem.splits
        places = torch.cat([part.inputs for part in (splits.train, splits.val, splits.test)])
        assert len(places.unique(dim=0)) == len(places)
        assert bool((places >= 0).all())
        assert bool((places < torch.tensor([shape.d_out, shape.d_in])).all())
        if name == "completion-tensor":
            assert (shape.out_modes, shape.in_modes) == ((4,) * 4, (4,) * 5)
            assert max(shape.ranks) == shape.rank == rank
            assert len(splits.train) == 26_214
        else:
            assert (shape.d_out, shape.d_in, shape.rank) == (1000, 1000, rank)
            assert len(splits.train) == 5 * rank * (2000 - rank)
        s = problem.start.singular_values()
        torch.testing.assert_close(s[0] / s[-1], torch.tensor(5.0, dtype=torch.float64))
        # The start knows nothing of what is to be found.
        overlap = entries_of(problem.start, splits.train.inputs) @ splits.train.targets
        assert abs(overlap) < 0.2 * splits.train.targets.square().sum()


class Counted:
    """Calls of the function that makes entries, where a gradient may follow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        entries = SpectralTT.entries

        def counted(tt: SpectralTT, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            # A look for the record is one without a gradient.
            self.calls += torch.is_grad_enabled()
            return entries(tt, i, j)

        monkeypatch.setattr(SpectralTT, "entries", counted)


@pytest.mark.parametrize("budget", [2000, 7])
def test_evaluations_are_counted_truly(puzzle, monkeypatch, budget):
    for solver in applying(puzzle):
        if solver.requires:
            continue
        # The problem itself is made from entries.
        problem = puzzle.problem(puzzle, 2, 0)
        task = replace(puzzle, problem=lambda *_, made=problem: made)
        with monkeypatch.context() as patch:
            counted = Counted(patch)
            effort = solve(task, solver.name, max_evaluations=budget)["effort"]
        assert effort["evaluations"] == counted.calls, solver.name
        assert effort["evaluations"] <= budget
        if budget == 7:
            assert effort["iterations_to_target"] is effort["seconds_to_target"] is None
            assert effort["stopped"].startswith(("max_evaluations = 7 ", "max_products = 7 "))


@pytest.mark.parametrize("puzzle", ["svdp"], indirect=True)
def test_pymanopts_evaluations_are_counted_truly(puzzle, monkeypatch):
    calls = []
    einsum = np.einsum

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return einsum(*arguments)

    monkeypatch.setattr(solvers.np, "einsum", counted)
    effort = solve(puzzle, "pymanopt-fixed-rank-cg", max_evaluations=9)["effort"]
    assert effort["evaluations"] == len(calls) == 9
    assert effort["stopped"] == "max_evaluations = 9 calls of the cost made"


def test_hessian_products_are_counted_and_bounded(puzzle, monkeypatch):
    counted = []
    hessian = ManifoldCost._counted

    def watched(cost, apply):
        def product(u):
            counted.append(1)
            return apply(u)

        return hessian(cost, product)

    monkeypatch.setattr(ManifoldCost, "_counted", watched)
    for name in ("fixed-rank-tr", "product-tr"):
        counted.clear()
        whole = solve(puzzle, name)["effort"]
        assert whole["hessian_products"] == len(counted) > 0
        counted.clear()
        short = solve(puzzle, name, max_evaluations=10)["effort"]
        assert short["hessian_products"] == len(counted) <= 10
        assert "max_products = 10" in short["stopped"] or short["evaluations"] == 10
        assert short["gradients"] > 0


def test_other_budgets_end_a_run_too(puzzle):
    for solver in applying(puzzle):
        few = solve(puzzle, solver.name, max_iterations=3)
        assert (few["status"], few["effort"]["iterations"]) == ("ok", 3)
        assert few["effort"]["stopped"] == "max_iterations = 3 made"
        assert few["curves"]["iteration"] == [0, 1, 2, 3]
        none = solve(puzzle, solver.name, max_seconds=0.0)
        assert none["effort"]["iterations"] == 0
        assert none["effort"]["stopped"] == "max_seconds = 0 spent"


def test_long_curves_are_thinned_as_documented(puzzle, monkeypatch):
    record = solve(puzzle, "factor-adam", max_evaluations=400, lr=1e-4)
    assert record["effort"]["iterations"] == 399
    kept = record["curves"]["iteration"]
    assert kept[:101] == list(range(101))
    assert kept[-1] == 399
    for before, after in pairwise(kept[100:-1]):
        assert after == math.ceil(1.03 * before)
    assert len(record["curves"]["seconds"]) == len(record["spectra"]["matrix"]) == len(kept)


def test_looking_is_not_timed(puzzle, monkeypatch):
    look = watching.Watch._record

    def slow(watch: watching.Watch) -> None:
        end = watching.time.perf_counter() + 0.05
        while watching.time.perf_counter() < end:
            pass
        look(watch)

    monkeypatch.setattr(watching.Watch, "_record", slow)
    record = solve(puzzle, "fixed-rank-cg", max_iterations=10)
    assert record["seconds"] > 0.5
    assert record["curves"]["seconds"][-1] < record["seconds"] - 0.5


def test_singular_values_and_drift_are_those_of_the_weight(puzzle):
    records = {solver.name: solve(puzzle, solver.name) for solver in applying(puzzle)}
    start = [1.0, 0.2]
    end = [1.0, 0.2]  # the weight to find has the same
    for name, record in records.items():
        assert record["spectra"]["matrix"][0] == pytest.approx(start), name
        assert record["spectra"]["matrix"][-1] == pytest.approx(end, abs=1e-7), name
        drift = record["curves"]["drift"]
        if record["spec"]["parameterization"] == "factors":
            assert set(drift) == {None}
        else:
            assert max(drift) < 1e-12, name


def test_counts_are_those_of_the_shapes(puzzle):
    shape = puzzle.problem(puzzle, 2, 0).start.shape
    for solver in applying(puzzle):
        record = solve(puzzle, solver.name, max_iterations=1)
        assert record["dimension"] == shape.dim("free")
        assert record["dense_elements"] == 120
        assert record["other_parameters"] == 0
        if solver.parameterization == "householder":
            assert record["stored_parameters"] == record["dimension"]
        else:
            assert record["stored_parameters"] > record["dimension"]


@pytest.mark.parametrize("puzzle", ["svdp"], indirect=True)
def test_nothing_dense_is_formed(puzzle, monkeypatch):
    shape = TTShape.svd(300, 250, rank=2)
    task = replace(
        puzzle, problem=lambda task, rank, seed: drawn_problem(task, shape, (5480, 90, 90), seed)
    )

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            return out

    def refuse(*args: object) -> None:
        raise AssertionError("a dense matrix is formed")

    monkeypatch.setattr(SpectralTT, "to_matrix", refuse)
    sparse = importlib.import_module("scipy.sparse")
    monkeypatch.setattr(sparse.csr_matrix, "toarray", refuse)
    monkeypatch.setattr(sparse.csr_matrix, "todense", refuse)
    for solver in applying(task):
        with Sizes() as sizes:
            record = solve(task, solver.name, max_evaluations=12)
        assert (record["status"], record["reason"]) == ("ok", None)
        assert record["effort"]["iterations"] > 0
        assert sizes.largest < shape.numel / 2, solver.name


def test_single_precision_ends_honestly(puzzle):
    record = solve(puzzle, "fixed-rank-cg", dtype="float32", max_evaluations=200)
    assert record["status"] == "ok"
    assert 1e-10 < record["effort"]["residual"] < 1e-4
    assert record["effort"]["seconds_to_target"] is None


def test_a_residual_that_is_no_number_is_a_result(puzzle):
    record = solve(puzzle, "factor-adam", lr=1e99)
    assert record["status"] == "diverged"
    assert "residual" in record["reason"]


def test_a_solver_that_misses_the_start_is_refused(puzzle):
    def elsewhere(problem, watch):
        tt = problem.start
        watch.iterate(SpectralTT(tt.left, tt.spectrum * 1.01, tt.right, tt.shape))

    shifted = replace(METHODS["fixed-rank-cg"], solve=elsewhere)
    (planned,) = plan(Settings(out=None, task="puzzle", methods=["fixed-rank-cg"], seeds=[0]))
    record = execute(planned.spec, puzzle, shifted, None)
    assert record["status"] == "failed"
    assert "does not hold the common initial weight" in record["reason"]


def test_a_comparison_of_solvers_goes_on_where_it_was(puzzle, tmp_path):
    settings = Settings(
        out=tmp_path / "out",
        task="puzzle",
        methods=["fixed-rank-*", "product-cg"],
        seeds=[0, 1],
        device="cpu",
        jobs=1,
    )
    whole = run_plan(plan(settings), settings)
    path = tmp_path / "out" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    started = []
    again = run_plan(plan(settings), settings, on_start=lambda *n: started.append(n))
    assert started == [(8, 3, 40)]
    assert list(map(without_time, again)) == list(map(without_time, whole))
    before = path.read_bytes()
    run_plan(plan(settings), settings)
    assert path.read_bytes() == before
    # Another budget is another run.
    other = replace(settings, max_evaluations=5)
    assert not {r.spec.hash for r in plan(other)} & {r.spec.hash for r in plan(settings)}


def test_methods_are_those_of_the_task(tiny, puzzle):
    def names(task, *patterns):
        return methods.methods_for(task, patterns)

    assert names(puzzle, "all") == [solver.name for solver in applying(puzzle)]
    assert not {solver.name for solver in SOLVERS} & set(names(tiny, "all"))
    both = names(TASKS["completion"], "all")
    assert {"dense-adam", "fixed-rank-cg"} <= set(both)
    assert "pymanopt-fixed-rank-cg" not in both
    assert names(puzzle, "*-cg")[:2] == ["fixed-rank-cg", "product-cg"]
    with pytest.raises(
        ConfigError, match=r"'dense-adam' does not apply to the task 'puzzle'.*: fixed-rank-cg, "
    ):
        names(puzzle, "fixed-rank-cg", "dense-adam")
    with pytest.raises(ConfigError, match="'product-cg' does not apply to the task 'tiny'"):
        plan(Settings(out=None, task="tiny", methods=["product-cg"]))
    with pytest.raises(ConfigError, match="unknown method 'nothing'"):
        names(puzzle, "nothing")


@pytest.mark.parametrize("puzzle", ["svdp"], indirect=True)
def test_a_package_that_is_missing_is_said(puzzle, monkeypatch):
    name = "pymanopt-fixed-rank-cg"
    assert name in methods.methods_for(puzzle, ["all"])
    monkeypatch.setattr(Solver, "is_available", property(lambda self: self.requires is None))
    assert name not in methods.methods_for(puzzle, ["all"])
    assert [method.name for method in methods.left_out(puzzle, ["all"])] == [name]
    assert methods.left_out(puzzle, ["product-*"]) == []
    with pytest.raises(ConfigError, match=r"pip install 'sttp-manifold\[pymanopt\]'"):
        methods.methods_for(puzzle, [name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "--epochs 3: none of the methods chosen heeds it; they take --max-eval"),
        ({"lrs": {"product-cg": 0.1}}, "product-cg has no learning rate"),
        ({"max_evaluations": 0}, "evaluation limit 0: expected 1 or more"),
        ({"max_iterations": 0}, "iteration limit 0"),
        ({"max_seconds": -1.0}, "time limit -1.0"),
        ({"max_seconds": math.nan}, "time limit nan"),
    ],
)
def test_options_that_nobody_heeds_are_refused(puzzle, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(Settings(out=None, task="puzzle", device="cpu", **changes))


def test_budgets_are_not_for_methods_that_train(tiny):
    with pytest.raises(
        ConfigError,
        match="--max-seconds 3: none of the methods chosen heeds it; they take --epochs",
    ):
        plan(Settings(out=None, task="tiny", device="cpu", max_seconds=3))


@pytest.mark.parametrize("puzzle", ["svdp"], indirect=True)
def test_what_computes_in_numpy_does_not_pretend_to_use_a_gpu(puzzle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="pymanopt-fixed-rank-cg on cuda: computes on the CPU"):
        plan(Settings(out=None, task="puzzle", device="cuda"))


def test_solvers_have_no_learning_rate_but_adam(puzzle, tmp_path):
    settings = Settings(
        out=tmp_path / "out",
        task="puzzle",
        tuned_file=tmp_path / "tuned.json",
        methods=["factor-adam", "product-cg"],
        max_evaluations=60,
        device="cpu",
        jobs=1,
    )
    path, found = tune(settings)
    assert path.is_file()
    assert set(found) == {"factor-adam"}
    assert found["factor-adam"]["max_evaluations"] == 60
    records, _ = read_records(tmp_path / "out" / "tuning.jsonl")
    assert {record["test_metric"] for record in records} == {None}
    planned = {run.spec.method: run for run in plan(settings)}
    assert planned["product-cg"].spec.lr is planned["product-cg"].lr_source is None
    assert planned["factor-adam"].lr_source == "tuned"
    with pytest.raises(ConfigError, match="none of the methods chosen has a learning rate"):
        tune(replace(settings, methods=["product-cg"]))


def test_methods_that_train_say_when_they_reached_the_target(monkeypatch):
    task = replace(TASKS["completion"], budget=Budget(target=0.5), repeats=3)
    settings = Settings(out=None, task="completion", methods=["sttp-riemannian-adam"], epochs=12)
    (planned, *_) = plan(replace(settings, device="cpu", lrs={"all": 1.0}))
    losses = []
    step = TrainingRun._count

    def watched(run, loss, begin):
        losses.append(loss)
        step(run, loss, begin)

    monkeypatch.setattr(TrainingRun, "_count", watched)
    spec = replace(planned.spec, repeats=3)
    record = execute(spec, task, METHODS[spec.method], planned.lr_source)
    validate(record)
    effort = record["effort"]
    assert effort["iterations"] == effort["evaluations"] == effort["gradients"] == len(losses) == 36
    first = next(k for k, loss in enumerate(losses) if loss <= 0.25)
    assert effort["iterations_to_target"] == first
    # The evaluation that found it is one of those made.
    assert effort["evaluations_to_target"] == first + 1
    assert 0 < effort["seconds_to_target"] < record["curves"]["seconds"][-1]
    assert record["curves"]["iteration"] == list(range(0, 37, 3))
    assert effort["residual"] < 0.5


def test_training_and_solving_share_a_start():
    settings = Settings(out=None, task="completion", ranks=[4], seeds=[0], device="cpu", epochs=1)
    records = []
    for planned in plan(replace(settings, methods=["sttp-chart-adam", "fixed-rank-cg"])):
        spec = replace(planned.spec, repeats=1) if planned.spec.epochs else planned.spec
        records.append(
            execute(
                replace(spec, max_iterations=1) if spec.epochs is None else spec,
                TASKS["completion"],
                METHODS[spec.method],
                planned.lr_source,
            )
        )
    assert records[0]["w0_digest"] == records[1]["w0_digest"]
    losses = [record["curves"]["train_loss"][0] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert records[0]["examples"] == records[1]["examples"]
