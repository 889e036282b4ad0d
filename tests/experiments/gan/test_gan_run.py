"""The third kind of run: what it records, and that a kill loses nothing but time."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.checkpoint import PRODUCTS, Checkpoint
from sttp_manifold.experiments.compare import Settings, plan, run_plan, save_comparison, tune
from sttp_manifold.experiments.gan.entrants import DEFAULT, GAN_ENTRANTS
from sttp_manifold.experiments.methods import METHODS, methods_for
from sttp_manifold.experiments.models import SNGANGenerator
from sttp_manifold.experiments.plan import tuning_plan
from sttp_manifold.experiments.records import latest, read_records, rounded
from sttp_manifold.experiments.runs import gan
from sttp_manifold.experiments.runs.execute import execute
from sttp_manifold.experiments.runs.gan import GanRun, hinge
from sttp_manifold.experiments.tasks import TASKS
from sttp_manifold.experiments.tune import EXTENSIONS, load_tuned

from .conftest import OPTIONS

CUT = ("spectral-norm", "orthogonal-penalty", "svdp-penalized-chart",
       "sttp-identity-riemannian-adam", "sttp-bounded-riemannian-muon")  # fmt: skip


class Cut(BaseException):
    """What a kill is to a run."""


def settings(tmp_path, methods, **changes) -> Settings:
    given = {"seeds": [0], "device": "cpu", "jobs": 1, "options": OPTIONS, **changes}
    return Settings(tmp_path, "gan-tiny", methods, **given)


def without_times(record):
    curves = {k: v for k, v in record["curves"].items() if k != "seconds"}
    left = {k: v for k, v in record.items() if k not in ("started", "seconds")}
    return {**left, "curves": curves}


def test_every_entrant_runs_and_says_what_it_is(gan_task, tmp_path):
    names = [entrant.name for entrant in GAN_ENTRANTS]
    assert methods_for(gan_task, ["all"]) == names
    here = settings(tmp_path, ["all"], options={**OPTIONS, "steps": 2, "every": 2})
    records = run_plan(plan(here), here)
    assert [record["status"] for record in records] == ["ok"] * len(names)
    for record, entrant in zip(records, GAN_ENTRANTS, strict=True):
        curves, own = record["curves"], record["own"]
        assert record["run"] == "gan"
        assert curves["iteration"] == [0, 2]
        assert record["val_metric"] == curves["val_metric"][-1] >= 0
        assert {"kernel", "precision", "recall", "floor", "classifier", "classes"} <= set(own)
        assert abs(sum(own["classes"]) - 1) < 1e-6
        # The first shortcut and the last layer have one singular value: nothing to watch.
        assert len(record["spectra"]) == 9
        first = {name: rows[0] for name, rows in record["spectra"].items()}
        last = {name: rows[-1] for name, rows in record["spectra"].items()}
        constant = entrant.spectrum in ("identity", "fixed")
        constant |= entrant.name == "spectral-regularization"
        assert (first == last) == constant
        if entrant.spectrum == "identity":
            assert {s for rows in last.values() for s in rows} == {1.0}
        assert (
            (max(curves["drift"]) < 1e-5) if entrant.spectrum else (curves["drift"] == [None] * 2)
        )
    by_name = dict(zip(names, records, strict=True))

    def count(name):
        return by_name[name]["stored_parameters"] + by_name[name]["other_parameters"]

    assert count("spectral-norm-small") <= count("sttp-identity-chart") < count("spectral-norm")
    assert count("spectral-norm") == count("plain") == count("spectral-regularization")
    # One generator, one classifier, one noise: before the first step all images are the same.
    assert len({record["curves"]["val_metric"][0] for record in records}) == 1
    assert set(DEFAULT) < set(names)


def test_a_run_leaves_pictures_and_a_generator(gan_task, tmp_path):
    from PIL import Image

    (run,) = plan(settings(tmp_path, ["plain"]))
    (record,) = run_plan([run], settings(tmp_path, ["plain"]))
    folder = tmp_path / PRODUCTS / record["hash"]
    for name, size in (("samples.png", (256, 256)), ("interpolation.png", (256, 192))):
        with Image.open(folder / name) as picture:
            assert picture.size == size
    held = torch.load(folder / "generator.pt", weights_only=True)
    net = SNGANGenerator.for_images(held["setting"]["size"], 1, ngf=4, latent=8)
    net.load_state_dict(held["state"])
    assert net.eval()(torch.randn(2, 8)).shape == (2, 1, 16, 16)


@pytest.mark.parametrize("name", CUT)
def test_a_run_that_is_cut_anywhere_ends_as_one_that_is_not(gan_task, tmp_path, monkeypatch, name):
    monkeypatch.setattr(gan, "_PIECE", 1)
    (run,) = plan(settings(tmp_path, [name]))
    whole = execute(run.spec, gan_task, METHODS[name], run.lr_source)
    assert whole["status"] == "ok"
    chance = random.Random(name)
    step, moments = GanRun._generator_step, chance.sample(range(6), 2)

    def cut_within_a_step(state):
        if state.step in moments:
            moments.remove(state.step)
            raise Cut
        step(state)

    keep = Checkpoint(tmp_path, run.spec.hash, every=0.0)
    monkeypatch.setattr(GanRun, "_generator_step", cut_within_a_step)
    cuts = 0
    while True:
        torch.manual_seed(cuts)  # nothing is drawn from the global generator
        try:
            again = execute(run.spec, gan_task, METHODS[name], run.lr_source, None, keep)
            break
        except Cut:
            cuts += 1
    assert cuts == 2
    assert without_times(again) == without_times(whole)


_SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from conftest import OPTIONS, tiny_task
from sttp_manifold.experiments.compare import Settings, plan, run_plan
from sttp_manifold.experiments import checkpoint, executor
from sttp_manifold.experiments.runs import gan
from sttp_manifold.experiments.tasks import TASKS
TASKS.add(tiny_task())
gan._PIECE = 1
known = checkpoint.Checkpoint.__init__
checkpoint.Checkpoint.__init__ = lambda self, *a, every=0.0: known(self, *a, every=every)
settings = Settings(Path(sys.argv[1]), "gan-tiny", ["sttp-identity-riemannian-adam"], seeds=[0],
                    device="cpu", jobs=1, options={**OPTIONS, "steps": 30, "every": 30})
print("ready", flush=True)
run_plan(plan(settings), settings)
print("done", flush=True)
"""


@pytest.mark.slow
def test_kills_at_random_moments_lose_no_record_and_change_no_number(gan_task, tmp_path):
    """The process is killed for good, wherever it is; the same command goes on."""
    given = {**OPTIONS, "steps": 30, "every": 30}
    here = settings(tmp_path / "whole", ["sttp-identity-riemannian-adam"], options=given)
    (whole,) = run_plan(plan(here), here)
    words = [sys.executable, "-c", _SCRIPT, str(tmp_path / "cut"), str(Path(__file__).parent)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(random.uniform(0.2, 0.9))
    assert process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    records, torn = read_records(tmp_path / "cut" / "records.jsonl")
    assert not torn
    (record,) = latest(records)
    assert without_times(record) == without_times(json.loads(json.dumps(whole)))
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_the_rates_kept_with_the_default_task_are_of_its_grid_or_its_extensions():
    found = load_tuned(TASKS["gan-fashion-mnist-16"])
    assert set(found) == set(DEFAULT)
    for name, entry in found.items():
        tried = [point["lr"] for point in entry["grid"]]
        grid = METHODS[name].rates(TASKS["gan-fashion-mnist-16"])
        beyond = [edge * 3 ** (sign * k) for edge, sign in ((grid[0], -1), (grid[-1], 1))
                  for k in range(1, EXTENSIONS + 1)]  # fmt: skip
        assert set(grid) <= set(tried)
        assert set(tried) - set(grid) <= {float(f"{lr:.3g}") for lr in beyond}
        assert len(tried) <= len(grid) + EXTENSIONS
        assert entry["lr"] in tried
        assert not set(entry["seeds"]) & {0, 1, 2}


def test_hinge_is_the_published_loss():
    real, generated = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert hinge(real, generated) == 0.5 + 0.75


def test_more_discriminator_steps_and_mixed_precision(gan_task, tmp_path):
    given = {**OPTIONS, "discriminator_steps": 2, "amp": "bfloat16"}
    here = settings(tmp_path, ["spectral-norm", "sttp-identity-chart"], options=given)
    records = run_plan(plan(here), here)
    assert [record["status"] for record in records] == ["ok", "ok"]
    assert records[0]["curves"]["evaluations"] == [0, 6, 12]


def test_a_run_that_diverges_is_a_record(gan_task, tmp_path):
    here = settings(tmp_path, ["plain"], lrs={"plain": 1e30})
    (record,) = run_plan(plan(here), here)
    assert record["status"] == "diverged"


def test_rates_are_tuned_on_seeds_of_their_own_and_kept(gan_task, tmp_path):
    file = tmp_path / "rates.json"
    here = settings(
        tmp_path, ["plain", "sttp-identity-riemannian-muon"], tuned_file=file,
        tuning_seeds=(1000,), options={**OPTIONS, "steps": 2, "every": 2},
    )  # fmt: skip
    planned = tuning_plan(here)
    assert [run.spec.lr for run in planned] == [3.33e-4, 1e-3, 3e-3, 5e-3, 1.5e-2, 4.5e-2]
    assert {run.spec.seed for run in planned} == {1000}
    _, found = tune(here)
    for entry in found.values():
        tried = [point["lr"] for point in entry["grid"]]
        # Three rates of a grid, and those beyond where the best was its first or last.
        assert len(tried) in (3, 4, 5)
        assert entry["at_edge"] == (entry["lr"] in (tried[0], tried[-1]))
        assert len(tried) == 5 or not entry["at_edge"]
    runs = plan(here)
    assert {run.lr_source for run in runs} == {"tuned"}
    assert [run.spec.lr for run in runs] == [entry["lr"] for entry in found.values()]
    with pytest.raises(ConfigError, match=r"seeds \[1000\] are kept for tuning"):
        tuning_plan(settings(tmp_path, ["plain"], seeds=[1000], tuning_seeds=(1000,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0: expected 1 or more"),
        ({"samples": 63}, "--samples 63: expected 64 or more"),
        ({"ema": 1.0}, "--ema 1.0: expected 0 or more, and less than 1"),
        ({"generator_lr": -1.0}, "--generator-lr -1.0: expected a positive number"),
        ({"amp": "float16"}, "--amp float16: expected bfloat16"),
        ({"speed": 3}, "speed 3: none of the methods chosen heeds it"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(gan_task, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(settings(tmp_path, ["plain"], options={**OPTIONS, **changes}))


def test_the_command_that_repeats_it_is_that_of_gans(gan_task, tmp_path):
    here = settings(tmp_path, ["plain"], options={**OPTIONS, "amp": "bfloat16"})
    save_comparison(here, plan(here))
    command = json.loads((tmp_path / "comparison.json").read_text())["command"]
    assert command.startswith("sttp gan --task gan-tiny --methods plain --ranks 4 --seeds 0")
    assert "--batch 8" in command
    assert "--amp bfloat16" in command
    assert "--fid" not in command
    assert rounded(0.12345678) == 0.1234568
