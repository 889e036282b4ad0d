"""One run: from a specification to a record."""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConfigError, FrameOverflowError
from sttp_manifold.experiments.data import Examples
from sttp_manifold.experiments.methods import Method, common_start
from sttp_manifold.experiments.models import weights
from sttp_manifold.experiments.records import CURVES, SCHEMA_VERSION, Record, rounded
from sttp_manifold.experiments.specs import RunSpec, derived_seed
from sttp_manifold.experiments.tasks import Task
from sttp_manifold.nn import SpectralWeight
from sttp_manifold.optim import check_optimizer

__all__ = ["DTYPES", "DivergedError", "device_in_words", "execute", "resolve_device", "versions"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}

# Spectra of wide dense layers would make up most of a record.
MAX_SINGULAR_VALUES = 64

_EVALUATION_BATCH = 4096


class DivergedError(Exception):
    """A run whose numbers stopped being numbers. Its text is the record's reason."""


def versions() -> dict[str, str]:
    """Versions of whatever decides the numbers."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for key, package in (
        ("geoopt", "geoopt"),
        ("numpy", "numpy"),
        ("sttp_manifold", "sttp-manifold"),
    ):
        try:
            found[key] = version(package)
        except PackageNotFoundError:
            found[key] = "not installed"
    return found


def resolve_device(name: str) -> str:
    """The device that a name stands for here: ``auto`` is a CUDA GPU if there is one, else the CPU.

    Raises:
        ConfigError: no such device, or not on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}. The devices are: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' asked for, but torch finds no CUDA GPU; use --device auto")
    return name


def device_in_words(device: str) -> str:
    """What a device is, for the record."""
    if device == "cuda":
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu: {platform.machine()}, 1 thread"


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, so that sums are added in one order whatever runs beside this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _held(model: nn.Module) -> dict[str, SpectralWeight]:
    return {
        name.removesuffix(".spectral_weight"): module
        for name, module in model.named_modules()
        if isinstance(module, SpectralWeight)
    }


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """Every weight matrix of a model, in order, however it is held.

    Shape:
        out: each (d_out, d_in).
    """
    held = {name: weight() for name, weight in _held(model).items()}
    for name, layer in weights(model).items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        held[name] = weight.flatten(1)
    return held


def _spectra(model: nn.Module, method: Method) -> dict[str, list[float]]:
    if method.is_dense:
        values = {
            name: torch.linalg.svdvals(matrix.double()) for name, matrix in _matrices(model).items()
        }
    else:
        values = {name: weight.tt().singular_values() for name, weight in _held(model).items()}
    return {name: s[:MAX_SINGULAR_VALUES].tolist() for name, s in values.items()}


def _drift(model: nn.Module) -> float | None:
    """Largest ``|Q^T Q - I|`` over the frames of all layers."""
    errors = [
        float(weight.tt().to(dtype=torch.float64).orthonormality_error())
        for weight in _held(model).values()
    ]
    return max(errors) if errors else None


@dataclass
class _Trace:
    """What a run has to tell so far. A run that stops early leaves what it has."""

    curves: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in CURVES})
    spectra: dict[str, list[list[float]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, spectra: dict[str, list[float]], **values: Any) -> None:
        for name in CURVES:
            self.curves[name].append(values[name])
        for name, s in spectra.items():
            self.spectra.setdefault(name, []).append(s)


class _Run:
    """State of one run while it goes on."""

    def __init__(self, spec: RunSpec, task: Task, method: Method, data_dir: Path | None) -> None:
        self.spec, self.task, self.method, self.data_dir = spec, task, method, data_dir
        self.device = torch.device(spec.device)
        self.dtype = DTYPES[spec.dtype]
        self.trace = _Trace()

    def run(self) -> dict[str, float]:
        """Train and evaluate; the numbers of the end.

        Raises:
            DivergedError: a loss or a metric is not finite.
        """
        spec, task = self.spec, self.task
        splits = task.load(self.data_dir)
        train = splits.train.to(self.device, self.dtype)
        val = splits.val.to(self.device, self.dtype)
        model = self._start()
        optimizer = self.method.make_optimizer(model.parameters(), spec.lr)
        check_optimizer(optimizer, model)
        batch = spec.batch_size or len(train)
        steps = spec.epochs * spec.repeats * math.ceil(len(train) / batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _factor(spec.schedule, step, steps)
        )
        order = torch.Generator().manual_seed(derived_seed("order", spec.task, spec.seed))
        elapsed = 0.0
        loss, _ = self._evaluate(model, train)
        val_loss, val_metric = self._observe(model, val, 0, elapsed, loss, spec.lr)
        for epoch in range(1, spec.epochs + 1):
            begin = self._clock()
            loss, lr = self._epoch(model, optimizer, schedule, train, batch, order)
            elapsed += self._clock() - begin
            val_loss, val_metric = self._observe(model, val, epoch, elapsed, loss, lr)
        if not math.isfinite(val_loss):
            raise DivergedError(f"validation loss {val_loss} after the last epoch")
        end = {"val_metric": val_metric}
        if spec.purpose != "tune":
            test = splits.test.to(self.device, self.dtype)
            end["test_loss"], end["test_metric"] = self._evaluate(model, test)
        return end

    def _start(self) -> nn.Module:
        spec = self.spec
        model = common_start(self.task, spec.rank, spec.seed)
        before = {name: matrix.detach().clone() for name, matrix in _matrices(model).items()}
        digest = hashlib.sha256()
        for matrix in before.values():
            digest.update(matrix.contiguous().numpy().tobytes())
        dense = sum(matrix.numel() for matrix in before.values())
        model = model.to(self.dtype)
        self.method.convert(model, spec.rank)
        model = model.to(self.device)
        with torch.no_grad():
            gap = max(
                (matrix.double().cpu() - before[name]).abs().max().item()
                for name, matrix in _matrices(model).items()
            )
        held = _held(model)
        total = sum(p.numel() for p in model.parameters())
        stored = dense
        dimension = dense
        if held:
            stored = sum(p.numel() for weight in held.values() for p in weight.parameters())
            dimension = sum(weight.shape.dim(weight.spectrum) for weight in held.values())
        self.trace.facts = {
            "stored_parameters": stored,
            "dimension": dimension,
            "dense_elements": dense,
            "other_parameters": total - stored,
            "w0_digest": digest.hexdigest()[:16],
            "w0_gap": gap,
        }
        # A method that cannot hold the common start would be compared from another one.
        scale = max(matrix.abs().max().item() for matrix in before.values())
        if gap > 1e3 * torch.finfo(self.dtype).eps * scale:
            raise ConfigError(
                f"{spec.method} does not hold the common initial weight: off by {gap:.1e}"
            )
        return model

    def _epoch(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        train: Examples,
        batch: int,
        order: torch.Generator,
    ) -> tuple[float, float]:
        """Mean loss over the steps of an epoch, and the learning rate of the last one."""
        model.train()
        losses = []
        lr = self.spec.lr
        for _ in range(self.spec.repeats):
            shuffled = torch.randperm(len(train), generator=order).to(self.device)
            for index in shuffled.split(batch):
                examples = train[index]
                optimizer.zero_grad()
                loss = self.task.loss(model(examples.inputs), examples.targets)
                value = loss.item()
                if not math.isfinite(value):
                    epoch = len(self.trace.curves["epoch"])
                    raise DivergedError(f"training loss {value} in epoch {epoch}")
                loss.backward()
                lr = optimizer.param_groups[0]["lr"]
                optimizer.step()
                schedule.step()
                losses.append(value)
        return math.fsum(losses) / len(losses), lr

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, examples: Examples) -> tuple[float, float]:
        """Mean loss and metric over a split."""
        model.eval()
        outputs = torch.cat([model(x) for x in examples.inputs.split(_EVALUATION_BATCH)])
        loss = self.task.loss(outputs, examples.targets).item()
        return loss, self.task.score(outputs, examples.targets)

    @torch.no_grad()
    def _observe(
        self, model: nn.Module, val: Examples, epoch: int, elapsed: float, loss: float, lr: float
    ) -> tuple[float, float]:
        val_loss, val_metric = self._evaluate(model, val)
        if not math.isfinite(val_loss):
            raise DivergedError(f"validation loss {val_loss} after epoch {epoch}")
        self.trace.add(
            _spectra(model, self.method),
            epoch=epoch,
            seconds=elapsed,
            train_loss=loss,
            val_loss=val_loss,
            val_metric=val_metric,
            drift=_drift(model),
            lr=lr,
        )
        return val_loss, val_metric

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _factor(schedule: str, step: int, steps: int) -> float:
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


def execute(
    spec: RunSpec, task: Task, method: Method, lr_source: str, data_dir: Path | None = None
) -> Record:
    """Do one run. It always gives a record, whose status says how the run went.

    Raises:
        ConfigError: the task's data is not there.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begin = time.perf_counter()
    status, reason, end = "ok", None, {}
    run = _Run(spec, task, method, data_dir)
    splits = task.load(data_dir)
    with _one_thread():
        try:
            end = run.run()
        except (DivergedError, FrameOverflowError) as error:
            status, reason = "diverged", str(error)
        except torch.linalg.LinAlgError as error:
            # A factorization of numbers that are no longer numbers, or nearly so.
            status, reason = "diverged", f"linear algebra: {error}"
        except Exception as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"
    facts = dict.fromkeys(
        (
            "stored_parameters",
            "dimension",
            "dense_elements",
            "other_parameters",
            "w0_digest",
            "w0_gap",
        )
    )
    ends = dict.fromkeys(("val_metric", "test_loss", "test_metric"))
    metric = task.metric
    record: Record = {
        "schema": SCHEMA_VERSION,
        "hash": spec.hash,
        "status": status,
        "reason": reason,
        "spec": spec.to_dict(),
        "lr_source": lr_source,
        "versions": versions(),
        "device": device_in_words(spec.device),
        "started": started,
        "seconds": rounded(time.perf_counter() - begin),
        "metric": {
            "name": metric.name,
            "unit": metric.unit,
            "higher": metric.higher,
            "log": metric.log,
            "spec": metric.spec,
        },
        "examples": {name: len(getattr(splits, name)) for name in ("train", "val", "test")},
        **facts,
        **rounded(run.trace.facts),
        "curves": rounded(run.trace.curves),
        "spectra": rounded(run.trace.spectra, digits=5),
        **ends,
        **rounded(end),
    }
    return record
