"""What a user may set of a training run: each does what it says, and is a part of the hash."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import plan as planning
from sttp_manifold.experiments.common_start import drawn_model, layer_shape, project_
from sttp_manifold.experiments.compare import Settings, command_line, plan, run_plan
from sttp_manifold.experiments.data import Examples, Splits
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.models import weights
from sttp_manifold.experiments.runs import train
from sttp_manifold.experiments.runs.execute import execute
from sttp_manifold.experiments.runs.images import crop_and_flip, draw_crops, first_of, of_size
from sttp_manifold.experiments.tasks import TASKS

from .test_train import without_times


def images(count: int = 60, size: int = 8) -> Splits:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for n in (count, 20, 20):
        x = torch.randn(n, 2, size, size, generator=generator)
        parts.append(Examples(x, torch.arange(n) % 4))
    return Splits(*parts)


class Small(nn.Module):
    """Convolutions, a batch norm and dropout, in a fraction of a second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.drop(self.norm(self.conv(x)).relu()).mean((-2, -1)))


def load(root=None) -> Splits:
    return images()


@pytest.fixture
def pictures(monkeypatch, tmp_path):
    task = replace(
        TASKS["fashion-mnist"],
        name="pictures",
        load=load,
        model=Small,
        ranks=(1, 2),
        epochs=2,
        batch_size=16,
    )
    monkeypatch.setattr(TASKS, "_entries", {**TASKS._entries, "pictures": task})
    monkeypatch.setenv("STTP_CACHE", str(tmp_path / "cache"))
    return task


def settings(tmp_path, *methods: str, **options) -> Settings:
    return Settings(
        tmp_path / "out",
        "pictures",
        methods or ["dense-adam", "svdp-chart-adam", "sttp-riemannian-adam"],
        seeds=[0],
        device="cpu",
        jobs=1,
        options=options,
    )


def test_options_are_in_the_specification_and_defaults_are_not(pictures, tmp_path):
    plain = plan(settings(tmp_path, "dense-adam"))[0].spec
    assert plain.options == {}
    assert (
        plan(settings(tmp_path, "dense-adam", start="common", schedule="cosine"))[0].spec == plain
    )
    given = {"model": "wrn-10-1", "augment": "crop-flip", "amp": "bfloat16", "image_size": 4}
    spec = plan(settings(tmp_path, "dense-adam", **given, batch_size=8, schedule="linear"))[0].spec
    assert spec.options == given
    assert (spec.batch_size, spec.schedule) == (8, "linear")
    words = command_line(settings(tmp_path, "dense-adam", **given, batch_size=8))
    assert "--model wrn-10-1" in words
    assert "--augment crop-flip" in words
    assert "--batch-size 8" in words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vgg"}, "expected resnet-D or wrn-D-K"),
        ({"model": "wrn-11-2"}, "the depth of a WideResNet is"),
        ({"schedule": "step"}, "--schedule 'step': expected cosine, linear or constant"),
        ({"start": "here"}, "--start 'here': expected common, own or pretrained"),
        ({"amp": "int8"}, "--amp 'int8': expected bfloat16 or float16"),
        ({"augment": "mixup"}, "expected crop-flip"),
        ({"batch_size": 0}, "--batch-size 0: expected a whole number"),
        ({"pretrain_epochs": 2}, "heeded with --start pretrained only"),
        ({"start": "pretrained", "pretrain_lr": -1.0}, "expected a positive number"),
    ],
)
def test_a_value_that_is_none_is_refused(pictures, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        plan(settings(tmp_path, "dense-adam", **options))


@pytest.mark.parametrize("options", [{"val_examples": 1000}, {"image_size": 9}])
def test_what_the_data_cannot_give_fails_with_a_reason(pictures, tmp_path, options):
    run = plan(settings(tmp_path, "dense-adam", **options))[0]
    with pytest.raises(ConfigError, match=r"--(val-examples 1000|image-size 9): "):
        execute(run.spec, pictures, METHODS["dense-adam"], None)


def test_first_examples_and_sizes_of_images():
    splits = images(60)
    few = first_of(splits, {"train_examples": 20, "val_examples": 4})
    assert (len(few.train), len(few.val), len(few.test)) == (20, 4, 20)
    assert torch.equal(few.train.inputs, splits.train.inputs[:20])
    assert torch.equal(first_of(splits, {}).val.inputs, splits.val.inputs)
    small = of_size(splits, 4).test.inputs
    torch.testing.assert_close(small, nn.functional.avg_pool2d(splits.test.inputs, 2))


def test_windows_are_those_of_numpy():
    x = torch.randn(9, 2, 6, 5)
    draws = draw_crops(9, torch.Generator().manual_seed(0))
    assert draws[:, :2].min() >= 0
    assert draws[:, :2].max() <= 8
    found = crop_and_flip(x, draws).numpy()
    framed = np.pad(x.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    for k, (down, right, mirrored) in enumerate(draws.tolist()):
        window = framed[k, :, down : down + 6, right : right + 5]
        assert np.array_equal(found[k], window[..., ::-1] if mirrored else window)


def test_the_linear_schedule_is_torchs():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    expected = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=10)
    for step in range(10):
        assert train._factor("linear", step, 10) == pytest.approx(expected.get_last_lr()[0])
        optimizer.step()
        expected.step()


def test_each_set_starts_from_its_own_part_of_the_draw(pictures, tmp_path):
    given = settings(tmp_path, start="own")
    planned = plan(given)
    # Dense depends on no rank, and is run once.
    assert [(p.spec.method[:4], p.spec.rank) for p in planned] == [
        ("dens", 0),
        ("svdp", 1),
        ("sttp", 1),
        ("svdp", 2),
        ("sttp", 2),
    ]
    records = run_plan(planned, given)
    assert {record["status"] for record in records} == {"ok"}
    assert len({record["w0_digest"] for record in records}) == 1
    assert max(record["w0_gap"] for record in records) < 1e-5
    model = drawn_model(pictures, 0)
    before = [w.weight.detach().flatten(1).clone() for w in weights(model).values()]
    project_(model, 2, "svdp", keep_norm=True)
    for layer, drawn in zip(weights(model).values(), before, strict=True):
        u, s, vt = torch.linalg.svd(drawn, full_matrices=False)
        best = (u[:, :2] * s[:2]) @ vt[:2]
        expected = best * drawn.norm() / best.norm()
        torch.testing.assert_close(layer.weight.flatten(1), expected)


def test_runs_go_on_from_one_dense_network_truncated(pictures, tmp_path, monkeypatch):
    given = settings(tmp_path, start="pretrained", pretrain_epochs=3)
    begun = []
    begin = train.TrainingRun.begin

    def counted(run, *rest):
        begun.append((run.spec.purpose, run.spec.method))
        begin(run, *rest)

    monkeypatch.setattr(train.TrainingRun, "begin", counted)
    records = run_plan(plan(given), given)
    assert {record["status"] for record in records} == {"ok"}
    # One network for all of them.
    assert begun.count(("pretrain", "dense-adam")) == 1
    (kept,) = (tmp_path / "cache" / "pretrained").glob("*.pt")
    state = torch.load(kept, weights_only=True)
    model = Small().double()
    model.load_state_dict(state)
    project_(model, 2, "svdp", keep_norm=False)
    for name, layer in weights(model).items():
        u, s, vt = torch.linalg.svd(
            state[f"{name}.weight"].double().flatten(1), full_matrices=False
        )
        rank = min(2, layer_shape(layer, 2, "svdp").rank)
        torch.testing.assert_close(
            layer.weight.flatten(1), (u[:, :rank] * s[:rank]) @ vt[:rank], rtol=1e-5, atol=1e-6
        )
    found = {(r["spec"]["method"], r["spec"]["rank"]): r for r in records}
    record = found["svdp-chart-adam", 2]
    model.eval()
    loss = nn.functional.cross_entropy(model(images().val.inputs.double()), images().val.targets)
    assert record["curves"]["val_loss"][0] == pytest.approx(loss.item(), rel=1e-4)
    # The same again, out of the cache: bit for bit.
    again = replace(given, out=tmp_path / "again")
    assert [*map(without_times, run_plan(plan(again), again))] == [*map(without_times, records)]
    assert begun.count(("pretrain", "dense-adam")) == 1


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["dense-sgd", "svdp-chart-adam", "sttp-riemannian-adam"])
def test_mixed_precision_stays_near_full(pictures, tmp_path, amp, method):
    full, mixed = (
        run_plan(plan(given := settings(tmp_path, method, **options)), given)[0]
        for options in ({}, {"amp": amp})
    )
    assert mixed["status"] == "ok"
    losses = [record["curves"]["train_loss"][-1] for record in (full, mixed)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_counts_have_the_statistics_of_norms(pictures, tmp_path):
    given = settings(tmp_path, "sttp-chart-adam")
    record = run_plan(plan(given), given)[0]
    assert record["own"] == {"running_statistics": 16}
    assert record["other_parameters"] == 8 + 16 + 4


@pytest.mark.parametrize("method", ["dense-adam", "sttp-riemannian-adam"])
def test_a_run_that_is_cut_within_an_epoch_ends_as_one_that_is_not(
    pictures, tmp_path, monkeypatch, method
):
    (run,) = plan(replace(settings(tmp_path, method, augment="crop-flip"), ranks=[2]))
    whole = execute(run.spec, pictures, METHODS[method], run.lr_source)
    monkeypatch.setattr(train, "_SECONDS_OF_A_PIECE", -1.0)
    parts = train.TrainingRun.of(run.spec, pictures, METHODS[method], None)
    parts.begin(torch.device("cpu"), torch.float32)
    steps = 0
    # Taken up anew after every step, by way of a file's bytes.
    more = True
    while more:
        more = parts.advance()
        steps += 1
        state = {**parts.state_dict()}
        torch.save(state, tmp_path / "state.pt")
        torch.manual_seed(steps)
        parts = train.TrainingRun.of(run.spec, pictures, METHODS[method], None)
        parts.begin(torch.device("cpu"), torch.float32)
        parts.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert steps == 2 * 4
    for name in ("train_loss", "val_loss", "val_metric", "lr"):
        found = [float(f"{value:.7g}") for value in parts.trace.curves[name]]
        assert found == whole["curves"][name]
    assert parts.progress == (8, 8)


def test_rates_of_another_network_are_guesses(pictures, tmp_path, monkeypatch):
    found = {"dense-adam": {"lr": 0.25, "at_edge": False, "model": "wrn-10-1"}}
    monkeypatch.setattr(planning, "load_tuned", lambda task, path: found)
    for options, source in (({"model": "wrn-10-1"}, "tuned"), ({}, "untuned")):
        run = plan(settings(tmp_path, "dense-adam", **options))[0]
        assert (run.spec.lr, run.lr_source) == (0.25, source)
