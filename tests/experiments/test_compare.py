from __future__ import annotations

import json
import math
from dataclasses import replace
from threading import Thread

import pytest

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import compare, executor, tune
from sttp_manifold.experiments.compare import Settings, plan, run_plan
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.plan import tuning_plan
from sttp_manifold.experiments.records import read_records
from sttp_manifold.experiments.tasks import TASKS

from .conftest import TRAINING
from .runs.test_train import without_times
from .test_records import a_record


@pytest.fixture
def settings(tiny, tmp_path) -> Settings:
    return Settings(
        out=tmp_path / "out",
        task="tiny",
        methods=["dense-adam", "sttp-chart-adam", "sttp-riemannian-sgd"],
        seeds=[0, 1],
        jobs=1,
        device="cpu",
    )


def test_the_plan_is_methods_times_ranks_times_seeds(settings):
    runs = plan(replace(settings, ranks=[1, 2]))
    keys = [(run.spec.seed, run.spec.rank, run.spec.method) for run in runs]
    assert keys == [
        (seed, rank, method) for seed in (0, 1) for rank in (1, 2) for method in settings.methods
    ]
    assert len({run.spec.hash for run in runs}) == 12


def test_defaults_are_the_tasks(tiny, tmp_path):
    runs = plan(Settings(out=tmp_path, task="tiny"))
    usual = [method for method in TRAINING if not getattr(method, "extra", False)]
    assert len(runs) == len(usual) * len(tiny.ranks) * len(tiny.seeds)
    more = plan(
        Settings(out=tmp_path, task="tiny", methods=["all", "*-adaptive", "*-fixed-rank-*"])
    )
    assert len(more) == len(TRAINING) * len(tiny.ranks) * len(tiny.seeds)
    assert {run.spec.epochs for run in runs} == {tiny.epochs}
    assert {run.spec.dtype for run in runs} == {tiny.dtype}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "nothing"}, "unknown task 'nothing'"),
        ({"methods": ["nothing"]}, "unknown method 'nothing'"),
        ({"ranks": [0]}, "rank 0: expected 1 or more"),
        ({"seeds": [-1]}, "seed -1: expected 0 or more"),
        ({"seeds": []}, "no seed given"),
        ({"epochs": 0}, "epoch count 0: expected 1 or more"),
        ({"jobs": 0}, "job count 0: expected 1 or more"),
        ({"dtype": "float16"}, "'float16'. The dtypes are: float32, float64"),
        ({"device": "abacus"}, "'abacus'. The devices are"),
        ({"lrs": {"nothing": 1.0}}, "unknown method 'nothing'"),
        ({"lrs": {"all": -1.0}}, "learning rate -1.0: expected a positive number"),
        ({"lrs": {"all": float("nan")}}, "learning rate nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(replace(settings, **changes))


def test_fewer_examples_to_train_on_are_part_of_the_specification(settings):
    one = replace(settings, methods=["dense-adam"], seeds=[0])
    whole, few = (plan(replace(one, options=o))[0] for o in ({}, {"train_examples": 20}))
    assert "options" not in whole.spec.to_dict()
    assert few.spec.options == {"train_examples": 20}
    assert few.spec.hash != whole.spec.hash
    few_settings = replace(one, options={"train_examples": 20})
    assert "--train-examples 20" in compare.command_line(few_settings)
    (record,) = run_plan([few], few_settings)
    assert record["examples"] == {"train": 20, "val": 24, "test": 24}
    assert record["curves"]["iteration"] == [0, 2, 4]
    with pytest.raises(ConfigError, match="example count 0: expected 1 or more"):
        plan(replace(one, options={"train_examples": 0}))
    many = replace(one, options={"train_examples": 49})
    with pytest.raises(ConfigError, match="--train-examples 49: the train split has 48"):
        run_plan(plan(many), many)


def test_learning_rates_given_by_hand_win(settings):
    lrs = {"all": 0.5, "sttp-*": 0.25}
    found = {
        run.spec.method: (run.spec.lr, run.lr_source) for run in plan(replace(settings, lrs=lrs))
    }
    assert found["dense-adam"] == (0.5, "given")
    assert found["sttp-chart-adam"] == found["sttp-riemannian-sgd"] == (0.25, "given")
    (untuned,) = {run.lr_source for run in plan(settings)}
    assert untuned == "untuned"


def test_a_stopped_comparison_goes_on_where_it_was(settings):
    runs = plan(settings)
    seen = []

    class Killed(BaseException):
        pass

    def die_at_the_third(record):
        seen.append(record)
        if len(seen) == 3:
            raise Killed

    with pytest.raises(Killed):
        run_plan(runs, settings, on_record=die_at_the_third)
    path = settings.out / "records.jsonl"
    done, _ = read_records(path)
    assert len(done) == 3
    # Killed in the middle of the third line: what is torn is dropped and done again.
    path.write_bytes(path.read_bytes()[:-50])
    started = []
    again = run_plan(runs, settings, on_start=lambda *numbers: started.append(numbers))
    assert started[0][:2] == (6, 2)
    assert started[0][2] > 0
    kept, torn = read_records(path)
    assert torn == 0
    assert [record["hash"] for record in again] == [run.spec.hash for run in runs]
    assert kept[:2] == done[:2] == again[:2]
    assert without_times(again[2]) == without_times(done[2])
    lines = path.read_bytes()
    for jobs in (1, 2, None):
        run_plan(runs, replace(settings, jobs=jobs))
        assert path.read_bytes() == lines


def test_a_diverged_run_is_recorded_and_the_rest_go_on(settings):
    methods = ["dense-sgd", "sttp-chart-adam", "sttp-riemannian-sgd"]
    broken = replace(settings, methods=methods, lrs={"dense-sgd": 1e30})
    records = run_plan(plan(broken), broken)
    assert {r["spec"]["method"] for r in records if r["status"] == "diverged"} == {"dense-sgd"}
    assert sum(r["status"] == "ok" for r in records) == 4
    again = []
    run_plan(plan(broken), broken, on_start=lambda *numbers: again.append(numbers))
    assert again == [(6, 6, 0)]


def test_a_failed_run_is_tried_again(settings, monkeypatch):
    runs = plan(replace(settings, methods=["dense-adam"], seeds=[0]))

    def broken(*args):
        return a_record(
            spec=runs[0].spec.to_dict(), hash=runs[0].spec.hash, status="failed", reason="x"
        )

    with monkeypatch.context() as patch:
        patch.setattr(executor, "execute", broken)
        (failed,) = run_plan(runs, settings)
    (record,) = run_plan(runs, settings)
    assert (failed["status"], record["status"]) == ("failed", "ok")
    assert len(read_records(settings.out / "records.jsonl")[0]) == 2


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_number_of_jobs(tmp_path):
    # Workers are other processes and import the task by name: one that is installed.
    base = Settings(
        out=tmp_path / "one",
        methods=["dense-sgd", "sttp-chart-adam", "svdp-riemannian-adam"],
        ranks=[4],
        seeds=[0],
        epochs=1,
        device="cpu",
        jobs=1,
        lrs={"all": 0.01},
    )
    one = run_plan(plan(base), base)
    two = run_plan(plan(base), replace(base, jobs=2, out=tmp_path / "two"))
    assert [without_times(record) for record in one] == [without_times(record) for record in two]


def test_data_that_is_not_there_stops_before_the_first_run(tmp_path):
    settings = Settings(out=tmp_path / "out", task="fashion-mnist", data_dir=tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="apt install"):
        run_plan(plan(settings), settings)
    assert not settings.out.exists()


def test_tuning_writes_rates_that_are_used(tiny, settings, tmp_path):
    tuned_file = tmp_path / "tuned.json"
    settings = replace(
        settings, tuned_file=tuned_file, methods=["dense-adam", "sttp-chart-sgd"], extensions=0
    )
    with pytest.raises(ConfigError, match=r"no tuned rates in .*--tune"):
        plan(settings)
    path, found = compare.tune(settings)
    assert path == tuned_file
    assert set(found) == {"dense-adam", "sttp-chart-sgd"}
    for name, entry in found.items():
        assert [point["lr"] for point in entry["grid"]] == list(tiny.lrs)
        best = max(entry["grid"], key=lambda p: (p["val_metric"], -p["val_loss"]))
        assert entry["lr"] == best["lr"]
        assert entry["at_edge"]
        assert entry["seeds"] == list(tune.TUNING_SEEDS)
        assert (entry["ranks"], entry["epochs"]) == (list(tiny.ranks), tiny.epochs)
        assert "torch" in entry["versions"]
        assert METHODS[name]
    for run in plan(settings):
        assert (run.spec.lr, run.lr_source) == (found[run.spec.method]["lr"], "tuned")
        assert run.spec.seed not in tune.TUNING_SEEDS
    records, _ = read_records(settings.out / "tuning.jsonl")
    assert len(records) == 2 * 2 * len(tiny.lrs)
    assert {record["test_metric"] for record in records} == {None}
    assert {record["spec"]["purpose"] for record in records} == {"tune"}
    # Another method tuned later leaves these rates alone.
    compare.tune(replace(settings, methods=["dense-sgd"]))
    assert set(tune.load_tuned(tiny, tuned_file)) == {"dense-adam", "sttp-chart-sgd", "dense-sgd"}
    # Rates of other data are not used.
    assert tune.load_tuned(replace(tiny, data=99), tuned_file) == {}


def test_tuning_seeds_are_not_reported(settings):
    with pytest.raises(ConfigError, match=r"seeds \[1000\] are kept for tuning"):
        compare.tune(replace(settings, seeds=[0, 1000]))


def tuning_record(lr, value, loss=1.0, status="ok"):
    record = a_record()
    spec = {**record["spec"], "lr": lr}
    curves = {**record["curves"], "val_loss": [2.0, loss]}
    return {**record, "spec": spec, "curves": curves, "val_metric": value, "status": status}


def test_the_best_rate_finished_everywhere_and_ties_go_to_the_lower_loss():
    task = TASKS["digits"]
    records = [
        tuning_record(0.1, 80.0),
        tuning_record(0.1, 90.0, loss=0.5),
        tuning_record(0.3, 85.0, loss=0.5),
        tuning_record(0.3, 85.0, loss=0.9),
        tuning_record(1.0, 99.0),
        tuning_record(1.0, None, status="diverged"),
        tuning_record(0.01, 10.0),
    ]
    found = tune.best_rate(task, records)
    assert found["lr"] == 0.3
    assert not found["at_edge"]
    assert [point["unfinished"] for point in found["grid"]] == [0, 0, 0, 1]
    assert tune.best_rate(task, records[5:6]) is None


def test_errors_are_averaged_by_their_logarithm():
    task = TASKS["completion"]
    records = [
        tuning_record(0.1, 1e-8),
        tuning_record(0.1, 1e-2),
        tuning_record(0.3, 1e-4),
        tuning_record(0.3, 1e-3),
    ]
    assert tune.best_rate(task, records)["lr"] == 0.1


def rates(**changes: object) -> str:
    entry = {"lr": 0.1, "at_edge": False, **changes}
    return json.dumps({"schema": 1, "task": "digits", "data": 1, "methods": {"m": entry}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no file of tuned rates"),
        ("{}", "no file of tuned rates"),
        (json.dumps({"schema": 2}), "schema 2, expected 1"),
        (json.dumps({"schema": 1, "task": "x"}), "of the task 'x', expected 'digits'"),
        ("[]", "no file of tuned rates"),
        ("", "no file of tuned rates"),
        (rates(lr=math.nan), "learning rate of m holds None"),
        (rates(lr="fast"), "learning rate of m holds 'fast'"),
        (rates(lr=-1), "learning rate of m holds -1"),
        (rates(at_edge=None), "at_edge of m"),
        (rates(epochs="x"), "epochs of m holds 'x'"),
    ],
)
def test_a_broken_file_of_rates_is_refused(tmp_path, content, message):
    path = tmp_path / "tuned.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        tune.load_tuned(TASKS["digits"], path)


def test_rates_that_cannot_be_kept_say_where_to_keep_them(tmp_path, monkeypatch):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tune, "write_text", refuse)
    with pytest.raises(ConfigError, match=r"Permission denied.*--tuned-file"):
        tune.save_tuned(TASKS["digits"], {}, tmp_path / "tuned.json")


def test_rates_that_cannot_be_kept_are_known_before_they_are_looked_for(settings, monkeypatch):
    runs = []
    monkeypatch.setattr(executor, "execute", lambda *call: runs.append(call))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(tune.tempfile, "mkstemp", refuse)
        with pytest.raises(ConfigError, match=r"tuned\.json: Permission denied.*--tuned-file"):
            compare.tune(replace(settings, tuned_file=settings.out / "tuned.json"))
    broken = settings.out / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="is no file of tuned rates"):
        compare.tune(replace(settings, tuned_file=broken))
    assert runs == []
    assert broken.read_text() == "{"


def test_two_tunings_at_once_lose_nothing(tmp_path):
    path = tmp_path / "tuned.json"
    names = [f"m{k}" for k in range(40)]
    entry = {"lr": 0.1, "at_edge": False, "seeds": [1000], "ranks": [4]}

    def save(mine):
        for name in mine:
            tune.save_tuned(TASKS["digits"], {name: entry}, path)

    threads = [Thread(target=save, args=(names[k::4],)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(tune.load_tuned(TASKS["digits"], path)) == set(names)
    assert list(tmp_path.iterdir()) == [path]


def test_rates_that_are_none_are_left_out_of_the_grid():
    """Muon's are angles, up to a right one."""
    settings = Settings(out=None, task="completion", methods=["sttp-riemannian-*"])
    grids = {}
    for planned in tuning_plan(settings):
        grids.setdefault(planned.spec.method, set()).add(planned.spec.lr)
    assert max(grids["sttp-riemannian-adam"]) == 30
    assert grids["sttp-riemannian-muon"] == {
        lr for lr in grids["sttp-riemannian-adam"] if lr <= math.pi / 2
    }


# Rates of sets that have to be downloaded are for those to find who have them; GANs begin at rates
# of their kinds.
UNTUNED = ("cifar10", "stl10", *(task.name for task in TASKS if task.gan))


@pytest.mark.parametrize("task", [task.name for task in TASKS if task.name not in UNTUNED])
def test_the_rates_kept_with_a_task_are_whole(task):
    found = tune.load_tuned(TASKS[task])
    rated = {
        method.name: not getattr(method, "extra", False)
        for method in METHODS
        if method.applies_to(TASKS[task]) and method.untuned_lr is not None
    }
    assert {name for name, always in rated.items() if always} <= set(found) <= set(rated)
    for entry in found.values():
        assert entry["lr"] in [point["lr"] for point in entry["grid"]]
        assert not set(entry["seeds"]) & set(TASKS[task].seeds)


def test_a_task_says_how_many_seeds_it_is_compared_on(tmp_path):
    for name, count in (("digits", 10), ("fashion-mnist", 3), ("completion", 3)):
        settings = Settings(tmp_path, name, ["dense-adam"], ranks=[4], device="cpu")
        seeds = [planned.spec.seed for planned in plan(settings)]
        assert seeds == list(TASKS[name].seeds) == list(range(count))
        words = compare.command_line(settings).split()
        assert words[words.index("--seeds") + 1] == ",".join(map(str, seeds))
        given = plan(replace(settings, seeds=[5]))
        assert [planned.spec.seed for planned in given] == [5]
