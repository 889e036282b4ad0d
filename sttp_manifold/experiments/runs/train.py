"""Training: a model goes through its data by epochs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.common_start import common_start
from sttp_manifold.experiments.data import Examples, Splits
from sttp_manifold.experiments.models import weights
from sttp_manifold.experiments.problems import digest_of
from sttp_manifold.experiments.runs.contract import Run
from sttp_manifold.experiments.runs.trace import MAX_SINGULAR_VALUES, DivergedError, Effort
from sttp_manifold.experiments.specs import RunSpec, derived_seed
from sttp_manifold.experiments.task import Task
from sttp_manifold.experiments.trainers import Trainer
from sttp_manifold.nn import SpectralWeight
from sttp_manifold.optim import check_optimizer

__all__ = ["TrainingRun"]

_EVALUATION_BATCH = 4096


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


def _spectra(model: nn.Module, method: Trainer) -> dict[str, list[float]]:
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


class TrainingRun(Run):
    """A model goes through its data, an epoch at a time; between two it can be cut.

    Args:
        spec: of the run.
        task: with a model.
        method: how its weights are held, and what moves them.
        splits: of the task's data.

    Raises:
        ConfigError: more examples are to be trained on than there are.
    """

    kind = "train"
    reads = ("score", "curves")
    options: ClassVar[Mapping[str, str]] = {
        "epochs": "--epochs",
        "train_examples": "--train-examples",
    }

    def __init__(self, spec: RunSpec, task: Task, method: Trainer, splits: Splits) -> None:
        super().__init__(spec, task)
        self.method = method
        self.splits = splits = _fewer(splits, spec.options.get("train_examples"))
        self.examples = {name: len(getattr(splits, name)) for name in ("train", "val", "test")}
        self.iteration = 0
        self.elapsed = 0.0
        # With the whole split in every step, the loss of a step is that of an iterate.
        if task.budget is not None and spec.batch_size is None:
            self.trace.effort = Effort(task.budget.target)

    @classmethod
    def of(cls, spec: RunSpec, task: Task, method: Trainer, data_dir: Path | None) -> TrainingRun:
        """See :meth:`Run.of`.

        Raises:
            ConfigError: the task's data is not there.
        """
        assert task.load is not None
        return cls(spec, task, method, task.load(data_dir))

    @classmethod
    def spec_fields(
        cls, task: Task, method: Trainer, lr: float | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See :meth:`Run.spec_fields`."""
        # Left out where all are taken, so that the hashes of such runs stay.
        few = {"train_examples": given["train_examples"]} if given.get("train_examples") else {}
        return {
            "kind": method.kind,
            "spectrum": None if method.is_dense else method.spectrum,
            "epochs": given.get("epochs") or task.epochs,
            "batch_size": task.batch_size,
            "repeats": task.repeats,
            "schedule": "cosine",
            **few,
        }

    def begin(self, device: torch.device, dtype: torch.dtype) -> None:
        """See :meth:`Run.begin`.

        Args:
            device: where to compute.
            dtype: what in.

        Raises:
            ConfigError: the method does not hold the common initial weight.
            DivergedError: the loss is not finite at the start.
        """
        self.device, self.dtype = device, dtype
        spec, splits = self.spec, self.splits
        assert spec.epochs is not None
        assert spec.repeats is not None
        assert spec.lr is not None
        assert spec.schedule is not None
        self.train = splits.train.to(device, dtype)
        self.val = splits.val.to(device, dtype)
        self.model = self._start()
        self.optimizer = self.method.make_optimizer(self.model.parameters(), spec.lr)
        check_optimizer(self.optimizer, self.model)
        self.batch = spec.batch_size or len(self.train)
        steps = spec.epochs * spec.repeats * math.ceil(len(self.train) / self.batch)
        name = spec.schedule
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _factor(name, step, steps)
        )
        self.order = torch.Generator().manual_seed(derived_seed("order", spec.task, spec.seed))
        loss, _ = self._evaluate(self.train)
        self._observe(0, loss, spec.lr)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.trace.curves["epoch"]) - 1

    def advance(self) -> bool:
        """Train an epoch; whether there are more.

        Raises:
            DivergedError: a loss is not finite.
        """
        assert self.spec.epochs is not None
        begin = self._clock()
        loss, lr = self._epoch()
        self.elapsed += self._clock() - begin
        self._observe(self.epoch + 1, loss, lr)
        return self.epoch < self.spec.epochs

    def end(self) -> dict[str, float]:
        """See :meth:`Run.end`."""
        self._end_effort()
        end = {"val_metric": self.trace.curves["val_metric"][-1]}
        if self.spec.purpose != "tune":
            test = self.splits.test.to(self.device, self.dtype)
            end["test_loss"], end["test_metric"] = self._evaluate(test)
        return end

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Run.state_dict`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "order": self.order.get_state(),
            "iteration": self.iteration,
            "elapsed": self.elapsed,
            "trace": self.trace.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Run.load_state_dict`.

        Args:
            state: of a run of the same specification.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.order.set_state(state["order"])
        self.iteration, self.elapsed = state["iteration"], state["elapsed"]
        self.trace.load_state_dict(state["trace"])

    def _start(self) -> nn.Module:
        spec = self.spec
        model = common_start(self.task, spec.rank, spec.seed)
        before = {name: matrix.detach().clone() for name, matrix in _matrices(model).items()}
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
            "w0_digest": digest_of(before.values()),
            "w0_gap": gap,
        }
        # A method that cannot hold the common start would be compared from another one.
        scale = max(matrix.abs().max().item() for matrix in before.values())
        if gap > 1e3 * torch.finfo(self.dtype).eps * scale:
            raise ConfigError(
                f"{spec.method} does not hold the common initial weight: off by {gap:.1e}"
            )
        return model

    def _epoch(self) -> tuple[float, float]:
        """Mean loss over the steps of an epoch, and the learning rate of the last one."""
        model, optimizer, train = self.model, self.optimizer, self.train
        model.train()
        losses = []
        begin = self._clock()
        lr: float = optimizer.param_groups[0]["lr"]
        assert self.spec.repeats is not None
        for _ in range(self.spec.repeats):
            shuffled = torch.randperm(len(train), generator=self.order).to(self.device)
            for index in shuffled.split(self.batch):
                examples = train[index]
                optimizer.zero_grad()
                loss = self.task.loss(model(examples.inputs), examples.targets)
                value = loss.item()
                if not math.isfinite(value):
                    epoch = len(self.trace.curves["epoch"])
                    raise DivergedError(f"training loss {value} in epoch {epoch}")
                self._count(value, begin)
                loss.backward()
                lr = optimizer.param_groups[0]["lr"]
                optimizer.step()
                self.schedule.step()
                losses.append(value)
        return math.fsum(losses) / len(losses), lr

    def _count(self, loss: float, begin: float) -> None:
        """Take note of the loss before a step, and of the step."""
        effort = self.trace.effort
        if effort is not None:
            effort.evaluations += 1
            effort.see(math.sqrt(loss), self.elapsed + self._clock() - begin)
            effort.iterations += 1
            effort.gradients += 1
        self.iteration += 1

    def _end_effort(self) -> None:
        effort = self.trace.effort
        if effort is not None:
            effort.see(math.sqrt(self._evaluate(self.train)[0]), self.elapsed)
            effort.stopped = f"{self.spec.epochs} epochs done"

    @torch.no_grad()
    def _evaluate(self, examples: Examples) -> tuple[float, float]:
        """Mean loss and metric over a split."""
        self.model.eval()
        outputs = torch.cat([self.model(x) for x in examples.inputs.split(_EVALUATION_BATCH)])
        loss = self.task.loss(outputs, examples.targets).item()
        return loss, self.task.score(outputs, examples.targets)

    @torch.no_grad()
    def _observe(self, epoch: int, loss: float, lr: float) -> None:
        val_loss, val_metric = self._evaluate(self.val)
        if not math.isfinite(val_loss):
            raise DivergedError(f"validation loss {val_loss} after epoch {epoch}")
        self.trace.add(
            _spectra(self.model, self.method),
            epoch=epoch,
            iteration=self.iteration,
            evaluations=self.iteration,
            seconds=self.elapsed,
            train_loss=loss,
            val_loss=val_loss,
            val_metric=val_metric,
            drift=_drift(self.model),
            lr=lr,
        )

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _fewer(splits: Splits, count: Any) -> Splits:
    """The splits with the first so many examples to train on, which were put in random order.

    Raises:
        ConfigError: there are not as many.
    """
    if count is None:
        return splits
    if count > len(splits.train):
        raise ConfigError(
            f"--train-examples {count}: the train split has {len(splits.train):,}; expected that "
            "many or less"
        )
    return dataclasses.replace(splits, train=splits.train[torch.arange(count)])


def _factor(schedule: str, step: int, steps: int) -> float:
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))
