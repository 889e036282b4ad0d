from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.common_start import common_start, layer_shape
from sttp_manifold.experiments.compare import Planned, Settings, plan
from sttp_manifold.experiments.data import Splits
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.models import digits_mlp, fashion_convnet, weights
from sttp_manifold.experiments.records import Record, validate
from sttp_manifold.experiments.runs import device as devices
from sttp_manifold.experiments.runs import train
from sttp_manifold.experiments.runs.execute import execute
from sttp_manifold.experiments.task import Task
from sttp_manifold.experiments.tasks import TASKS
from sttp_manifold.experiments.trainers import Trainer
from sttp_manifold.tt import TTShape, tt_svd

from ..conftest import TRAINING, tiny_splits


def run(task: Task, method: str, **changes: object) -> Record:
    settings = Settings(out=None, task="tiny", methods=[method], seeds=[0], device="cpu")
    (planned,) = plan(settings)
    spec = replace(planned.spec, **changes)
    record = execute(spec, task, METHODS[method], planned.lr_source)
    validate(record)
    return record


def without_times(record: Record) -> Record:
    kept = {k: v for k, v in record.items() if k not in ("started", "seconds")}
    kept["curves"] = {k: v for k, v in record["curves"].items() if k != "seconds"}
    return kept


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_methods_start_from_one_weight(tiny, dtype):
    records = [run(tiny, method.name, dtype=dtype, epochs=1) for method in TRAINING]
    assert [record["status"] for record in records] == ["ok"] * len(records)
    assert len({record["w0_digest"] for record in records}) == 1
    eps = torch.finfo(devices.DTYPES[dtype]).eps
    assert max(record["w0_gap"] for record in records) < 50 * eps
    # The same weights and biases give the same losses before the first step.
    for name in ("train_loss", "val_loss"):
        first = [record["curves"][name][0] for record in records]
        assert max(first) - min(first) < 200 * eps


def test_seeds_and_ranks_give_other_starts(tiny):
    digests = {
        run(tiny, "dense-adam", seed=seed, rank=rank, epochs=1)["w0_digest"]
        for seed in (0, 1)
        for rank in (1, 2)
    }
    assert len(digests) == 4


def test_counts_are_those_of_the_shapes(tiny):
    shapes = {
        kind: [layer_shape(layer, 2, kind) for layer in weights(tiny.model()).values()]
        for kind in ("svdp", "sttp")
    }
    dense = 8 * 12 + 3 * 8
    for method in TRAINING:
        record = run(tiny, method.name, epochs=1)
        assert record["dense_elements"] == dense
        assert record["other_parameters"] == 8 + 3
        if method.is_dense:
            assert record["stored_parameters"] == record["dimension"] == dense
            assert record["curves"]["drift"] == [None, None]
            continue
        dimension = sum(shape.dim("free") for shape in shapes[method.kind])
        assert record["dimension"] == dimension
        if method.parameterization == "householder":
            assert record["stored_parameters"] == dimension
        else:
            assert record["stored_parameters"] > dimension
        assert all(0 <= value < 1e-5 for value in record["curves"]["drift"])


@pytest.mark.parametrize("model", [digits_mlp, fashion_convnet])
def test_the_common_start_has_the_norm_of_the_draw_and_the_rank_asked_for(model):
    task = replace(TASKS["digits"], model=model)
    before = torch.random.get_rng_state()
    start = common_start(task, 3, 0)
    assert torch.equal(before, torch.random.get_rng_state())
    for layer in weights(start).values():
        matrix = layer.weight.detach().flatten(1)
        shape = layer_shape(layer, 3)
        expected = TTShape.for_conv(tuple(layer.weight.shape), 3)
        assert shape == expected
        torch.testing.assert_close(tt_svd(matrix, shape).to_matrix(), matrix)
        # torch draws from U(-1/sqrt(n), 1/sqrt(n)) with n inputs.
        rms = matrix.square().mean().sqrt().item()
        assert rms == pytest.approx(1 / math.sqrt(3 * matrix.shape[1]), rel=0.2)


@pytest.mark.parametrize("method", [method.name for method in TRAINING])
def test_convolutions_are_held_by_every_method(method):
    task = replace(TASKS["digits"], name="convolutions", model=fashion_convnet)
    model = common_start(task, 4, 0)
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    expected = model(x)
    METHODS[method].convert(model, 4)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("method", ["dense-sgd", "svdp-chart-adam", "sttp-riemannian-adam"])
def test_a_run_is_repeatable_whatever_the_global_seed(tiny, method):
    torch.manual_seed(1)
    first = run(tiny, method)
    torch.manual_seed(2)
    assert without_times(run(tiny, method)) == without_times(first)


@pytest.mark.parametrize("method", ["dense-sgd", "sttp-chart-sgd", "sttp-riemannian-sgd"])
def test_a_run_that_diverges_is_recorded_so(tiny, method):
    record = run(tiny, method, lr=1e30, epochs=4)
    assert record["status"] == "diverged"
    assert record["reason"]
    assert record["test_metric"] is None
    assert record["w0_digest"] is not None
    assert 1 <= len(record["curves"]["epoch"]) < 5


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of smoke")


def test_a_run_that_fails_is_recorded_with_its_error(tiny):
    record = run(replace(tiny, model=Broken), "dense-adam")
    assert (record["status"], record["reason"]) == ("failed", "RuntimeError: out of smoke")


def test_a_plain_optimizer_on_a_manifold_is_caught(tiny, monkeypatch):
    monkeypatch.setitem(
        __import__("sttp_manifold.experiments.trainers", fromlist=["_"])._OPTIMIZERS,
        (True, "adam"),
        lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    )
    record = run(tiny, "sttp-riemannian-adam")
    assert record["status"] == "failed"
    assert record["reason"].startswith("OptimizerError")


def test_a_method_that_misses_the_start_is_refused(tiny, monkeypatch):
    def shifted(self: object, model: nn.Module, rank: int) -> None:
        with torch.no_grad():
            model[0].weight += 0.01

    monkeypatch.setattr(Trainer, "convert", shifted)
    record = run(tiny, "dense-adam")
    assert record["status"] == "failed"
    assert "does not hold the common initial weight: off by 1.0e-02" in record["reason"]


class Watched(Splits):
    looks = 0

    def __getattribute__(self, name: str) -> object:
        if name == "test":
            Watched.looks += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize(("purpose", "looks"), [("compare", 1), ("tune", 0)])
def test_the_test_split_is_looked_at_once_and_never_by_tuning(tiny, purpose, looks, monkeypatch):
    monkeypatch.setattr(Watched, "looks", 0)
    splits = tiny_splits()
    watched = Watched(splits.train, splits.val, splits.test)
    record = run(replace(tiny, load=lambda root: watched), "dense-adam", purpose=purpose)
    # One more look is the length that the record gives.
    assert Watched.looks == looks + 1
    assert (record["test_metric"] is None) == (purpose == "tune")
    assert record["val_metric"] is not None


def test_the_schedule_goes_down_to_zero():
    factors = [train._factor("cosine", step, 10) for step in range(11)]
    assert factors[0] == 1
    assert factors[10] == pytest.approx(0)
    assert factors == sorted(factors, reverse=True)
    assert train._factor("constant", 7, 10) == 1


def test_devices_are_named_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.resolve_device("auto") == devices.resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"'tpu'.*auto, cpu, cuda"):
        devices.resolve_device("tpu")
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        devices.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.resolve_device("auto") == devices.resolve_device("cuda") == "cuda"


def test_completion_recovers_the_matrix():
    # Where geometry shows: from a quarter of the entries, to a thousandth within seconds.
    settings = Settings(out=None, task="completion", methods=["sttp-riemannian-adam"], device="cpu")
    planned: Planned = plan(replace(settings, ranks=[4], seeds=[0], lrs={"all": 1.0}, epochs=15))[0]
    record = execute(
        planned.spec, TASKS["completion"], METHODS[planned.spec.method], planned.lr_source
    )
    assert record["curves"]["val_metric"][0] > 0.5
    assert record["test_metric"] < 1e-3
    s = torch.tensor(record["spectra"]["matrix"][-1])
    torch.testing.assert_close(s, 4 * torch.logspace(0, -1, 4), rtol=1e-3, atol=0)
