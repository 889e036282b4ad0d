"""`sttp gan` from the command to its report: tables, sentences, pictures."""

from __future__ import annotations

import io

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from sttp_manifold import cli
from sttp_manifold.experiments.reading.comparison import load_comparison
from sttp_manifold.experiments.reading.conclusions import reservations
from sttp_manifold.experiments.reading.gan_table import GAN_HEADER, gan_lines, say_gans

from .conftest import OPTIONS

FLAGS = ["--steps", "4", "--every", "2", "--ngf", "4", "--ndf", "4", "--latent", "8", "--batch",
         "8", "--samples", "64", "--classifier-epochs", "1", "--device", "cpu"]  # fmt: skip


def sttp(*words: str):
    return CliRunner().invoke(cli.app, ["gan", *words], catch_exceptions=False)


@pytest.fixture
def compared(gan_task, tmp_path):
    words = ["--task", gan_task.name, "--methods", "spectral-norm,sttp-identity-chart",
             "--seeds", "0,1", "--jobs", "1", "--tensorboard", "--out", str(tmp_path / "out"),
             *FLAGS]  # fmt: skip
    outcome = sttp(*words)
    assert outcome.exit_code == 0, outcome.output
    return tmp_path / "out", outcome


def test_a_command_writes_tables_pictures_and_a_page(compared):
    out, outcome = compared
    assert "spectral-norm" in outcome.output
    assert len(list((out / "tensorboard").rglob("events.*"))) == 4
    found = load_comparison(out)
    pictures = ["distance", "stable-rank", "spectra", "samples", "interpolation"]
    assert list(found.pictures) == pictures
    assert all((out / "figures" / f"{name}.png").is_file() for name in pictures)
    for name in ("samples", "interpolation"):
        pixels = imread(io.BytesIO(found.pictures[name].png))[..., :3]
        assert (pixels < 0.5).mean() > 0.1, "a picture without images is white"
    gans = found.tables[0]
    assert tuple(gans.titles) == GAN_HEADER
    assert {line[1] for line in gans.lines} == {"spectral-norm", "sttp-identity-chart"}
    assert all(len(line) == len(GAN_HEADER) for line in gans.lines)
    assert "4.0 to 4.0" in next(line for line in gans.lines if line[1].startswith("sttp"))
    page = (out / "report.html").read_text()
    for words in ("Images and spectra", "not FID", "The floor is", "sttp gan --task gan-tiny"):
        assert words in page
    assert "row beats column" in (out / "summary.md").read_text()


def test_sentences_say_floor_collapse_and_other_lengths(compared):
    out, _ = compared
    found = load_comparison(out)
    floor, collapse = say_gans(found.records)
    assert floor.startswith("The floor is ")
    assert floor.endswith("These distances are no FID.")
    assert (
        collapse == "No spectrum collapsed: SpectrumMonitor raised no alarm in any of the 4 runs."
    )
    first = found.records[0]
    first["own"]["alarms"] = ["a layer falls"]
    first["own"]["classifier"] = "another"
    first["own"].update(fid=12.0, kid=0.01, inception_score=3.0)
    floor, collapse, *published = say_gans(found.records)
    assert "The runs used 2 classifiers" in floor
    assert "spectral-norm at rank 4 (1 runs), of 4 runs" in collapse
    assert published[0] == "FID, by torch-fidelity, means over seeds: spectral-norm 12."
    assert gan_lines(found.records)[0][8] in ("0", "1")
    tuned = {"spectral-norm": {"at_edge": True, "steps": 150, "epochs": None}}
    said = reservations(found.records, {**found.note, "tuned": tuned})
    assert "Learning rates were tuned for 150 steps and used for 4." in said


def test_the_same_command_goes_on_and_does_no_run_twice(compared, gan_task):
    out, _ = compared
    before = (out / "records.jsonl").read_bytes()
    words = ["--task", gan_task.name, "--methods", "spectral-norm,sttp-identity-chart",
             "--seeds", "0,1", "--jobs", "1", "--out", str(out), *FLAGS]  # fmt: skip
    assert sttp(*words).exit_code == 0
    assert (out / "records.jsonl").read_bytes() == before
    # In two shards as well: all is done.
    for shard in ("1/2", "2/2"):
        assert sttp(*words, "--shard", shard).exit_code == 0


def test_what_is_wrong_with_a_command_is_said(gan_task, tmp_path, monkeypatch):
    for words, message in (
        (["--preset", "huge"], "--preset 'huge': expected one of small, published"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--task", "digits"], "does not apply to the task 'digits'"),
        (["--fid"], "--fid needs"),
        (["--ndf", "-4"], "--ndf -4: expected 1 or more"),
    ):
        outcome = sttp("--out", str(tmp_path / "none"), "--jobs", "1", *words)
        assert outcome.exit_code == 2, outcome.output
        assert message in " ".join(outcome.output.split())
    monkeypatch.setattr("sttp_manifold.experiments.distributed.processes", lambda: 2)
    outcome = sttp("--out", str(tmp_path / "none"))
    assert outcome.exit_code == 2
    assert "a GAN trains in one" in " ".join(outcome.output.split())
    assert not (tmp_path / "none").exists()


def test_the_published_preset_is_the_published_setting():
    from sttp_manifold.experiments.gan.setting import PRESETS, GanSetting

    setting = GanSetting.of({**PRESETS["published"], "size": 32})
    assert (setting.ngf, setting.ndf, setting.discriminator_steps) == (256, 128, 5)
    assert (setting.steps, setting.generator_lr, setting.amp) == (50_000, 2e-4, "bfloat16")
    assert set(OPTIONS) <= set(vars(setting))
