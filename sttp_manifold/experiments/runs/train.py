"""Training: a model goes through its data by epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.common_start import common_start, drawn_model, project_
from sttp_manifold.experiments.data import Examples, Splits
from sttp_manifold.experiments.distributed import (
    is_first,
    process,
    processes,
    sum_over_all,
    wrapped,
)
from sttp_manifold.experiments.problems import digest_of
from sttp_manifold.experiments.runs.images import crop_and_flip, draw_crops, first_of, of_size
from sttp_manifold.experiments.runs.measures import counts, drift, matrices, spectra
from sttp_manifold.experiments.runs.over_data import RunOverData
from sttp_manifold.experiments.runs.pretrained import PRETRAIN, PRETRAINER, kept_state, pretraining
from sttp_manifold.experiments.runs.trace import DivergedError, Effort
from sttp_manifold.experiments.runs.train_options import OPTIONS, checked_options
from sttp_manifold.experiments.specs import RunSpec, derived_seed
from sttp_manifold.experiments.task import Task
from sttp_manifold.experiments.trainers import Trainer
from sttp_manifold.optim import check_optimizer

__all__ = ["TrainingRun"]

# Of an evaluation: so many examples at a time, fewer where they are large.
_MOST_EXAMPLES = 4096
_MOST_NUMBERS = 2**21
# Between two pieces a run can be cut; a clock decides where, and changes no number.
_SECONDS_OF_A_PIECE = 10.0


class TrainingRun(RunOverData):
    """A model goes through its data, a piece of an epoch at a time; between two it can be cut.

    Args:
        spec: of the run.
        task: with a model.
        method: how its weights are held, and what moves them.
        splits: of the task's data.

    Raises:
        ConfigError: more examples are wanted, or larger images, than there are.
    """

    kind = "train"
    method: Trainer
    reads = ("score", "curves")
    options: ClassVar[Mapping[str, str]] = OPTIONS

    def __init__(self, spec: RunSpec, task: Task, method: Trainer, splits: Splits) -> None:
        used, size = first_of(splits, spec.options), spec.options.get("image_size")
        used = used if size is None else of_size(used, int(size))
        super().__init__(spec, task, method, used)
        self.whole = splits
        self.iteration = 0
        # With the whole split in every step, the loss of a step is that of an iterate.
        if task.budget is not None and spec.batch_size is None:
            self.trace.effort = Effort(task.budget.target)

    @classmethod
    def spec_fields(
        cls, task: Task, method: Trainer, lr: float | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See :meth:`Run.spec_fields`.

        Raises:
            ConfigError: an option whose value is none.
        """
        epochs = given.get("epochs") or task.epochs
        return {
            "kind": method.kind,
            "spectrum": None if method.is_dense else method.spectrum,
            "epochs": epochs,
            "batch_size": given.get("batch_size") or task.batch_size,
            "repeats": task.repeats,
            "schedule": given.get("schedule") or "cosine",
            **checked_options(given, epochs),
        }

    @classmethod
    def rank_of(cls, method: Trainer, rank: int, given: Mapping[str, Any]) -> int:
        """See :meth:`Run.rank_of`."""
        own = given.get("start") not in (None, "common")
        return 0 if method.is_dense and own else rank

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
        # After what came before it: a network out of the cache draws no noise.
        torch.manual_seed(derived_seed("noise", spec.task, spec.seed, process()))
        self.forward = wrapped(self.model, device)
        self.optimizer = self.method.make_optimizer(self.model.parameters(), spec.lr)
        check_optimizer(self.optimizer, self.model)
        amp = spec.options.get("amp")
        self.amp = None if amp is None else getattr(torch, str(amp))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        self.batch = spec.batch_size or len(self.train)
        steps = spec.epochs * spec.repeats * math.ceil(len(self.train) / self.batch)
        self.steps = steps
        name = spec.schedule
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _factor(name, step, steps)
        )
        self.order = torch.Generator().manual_seed(derived_seed("order", spec.task, spec.seed))
        self.pending = torch.empty(0, dtype=torch.int64)
        self.passes = 0
        self.losses: list[Tensor] = []
        loss, _ = self._evaluate(self.train)
        self._observe(0, loss, spec.lr)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.trace.curves["epoch"]) - 1

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done, and in all."""
        return self.iteration, self.steps

    def advance(self) -> bool:
        """Train to the end of the epoch, or for some seconds; whether there is more to do.

        Raises:
            DivergedError: a loss is not finite.
        """
        assert self.spec.epochs is not None
        begin = self._clock()
        lr = self._train(begin)
        over = not len(self.pending) and self.passes == self.spec.repeats
        losses = self._looked_at() if over else []
        self.elapsed += self._clock() - begin
        if over:
            self.losses, self.passes = [], 0
            self._observe(self.epoch + 1, math.fsum(losses) / len(losses), lr)
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
        cuda = self.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "order": self.order.get_state(),
            "noise": torch.get_rng_state(),
            "cuda_noise": torch.cuda.get_rng_state() if cuda else None,
            "pending": self.pending,
            "passes": self.passes,
            "losses": [loss.cpu() for loss in self.losses],
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
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.order.set_state(state["order"])
        self.pending, self.passes = state["pending"], state["passes"]
        self.losses = [loss.to(self.device) for loss in state["losses"]]
        self.iteration, self.elapsed = state["iteration"], state["elapsed"]
        self.trace.load_state_dict(state["trace"])
        if is_first():
            torch.set_rng_state(state["noise"])
            if state["cuda_noise"] is not None:
                torch.cuda.set_rng_state(state["cuda_noise"])
        else:
            # The state is the first one's: noise goes on, but not where it was.
            parts = ("noise", self.spec.task, self.spec.seed, process(), self.iteration)
            torch.manual_seed(derived_seed(*parts))

    def _start(self) -> nn.Module:
        spec = self.spec
        model = self._stock()
        before = {name: matrix.detach().clone() for name, matrix in matrices(model).items()}
        dense = sum(matrix.numel() for matrix in before.values())
        digest = digest_of(before.values())
        how = spec.options.get("start", "common")
        if how != "common" and not self.method.is_dense:
            project_(model, spec.rank, spec.kind, keep_norm=how == "own")
            before = {name: matrix.detach().clone() for name, matrix in matrices(model).items()}
        model = model.to(self.dtype)
        self.method.convert(model, spec.rank)
        model = model.to(self.device)
        with torch.no_grad():
            gap = max(
                (matrix.double().cpu() - before[name]).abs().max().item()
                for name, matrix in matrices(model).items()
            )
        found = counts(model, dense)
        own = {"running_statistics": found.pop("running_statistics")}
        self.trace.facts = {**found, "w0_digest": digest, "w0_gap": gap, "own": own}
        # A method that cannot hold the common start would be compared from another one.
        scale = max(matrix.abs().max().item() for matrix in before.values())
        if gap > 1e3 * torch.finfo(self.dtype).eps * scale:
            raise ConfigError(
                f"{spec.method} does not hold the common initial weight: off by {gap:.1e}"
            )
        return model

    def _stock(self) -> nn.Module:
        """The stock model that the run starts from, in float64."""
        spec = self.spec
        how = spec.options.get("start", "common")
        if how == "common" and spec.purpose != PRETRAIN:
            return common_start(self.task, spec.rank, spec.seed)
        model = drawn_model(self.task, spec.seed)
        if how == "pretrained":
            before = pretraining(spec)

            def run() -> TrainingRun:
                return TrainingRun(before, self.task, PRETRAINER, self.whole)

            model.load_state_dict(kept_state(before.hash, run, self.device, self.dtype))
        return model

    def _train(self, begin: float) -> float:
        """Steps to the end of the epoch, or until time is up; the learning rate of the last one.

        Raises:
            DivergedError: a loss is not finite.
        """
        assert self.spec.repeats is not None
        self.model.train()
        lr: float = self.optimizer.param_groups[0]["lr"]
        while len(self.pending) or self.passes < self.spec.repeats:
            if not len(self.pending):
                self.pending = torch.randperm(len(self.train), generator=self.order)
                self.passes += 1
            index, self.pending = self.pending[: self.batch], self.pending[self.batch :]
            lr = self.optimizer.param_groups[0]["lr"]
            self._step(index, begin)
            if self._clock(wait=False) - begin > _SECONDS_OF_A_PIECE:
                break
        return lr

    def _step(self, index: Tensor, begin: float) -> None:
        # Of several processes each takes a share; drawn for all alike, whoever uses it.
        draws = draw_crops(len(index), self.order) if self.spec.options.get("augment") else None
        share = slice(process(), None, processes())
        mine = index[share] if len(index[share]) else index[:1]
        part = len(index[share]) * processes() / len(index)
        examples = self.train[mine.to(self.device)]
        inputs = examples.inputs
        if draws is not None:
            inputs = crop_and_flip(inputs, draws[share] if len(index[share]) else draws[:1])
        self.optimizer.zero_grad()
        with self._autocast():
            loss = self.task.loss(self.forward(inputs), examples.targets)
        # The mean over all processes is that over the batch, also where shares differ.
        loss = loss if processes() == 1 else loss * part
        self.losses.append(sum_over_all(loss.detach()) / processes())
        if self.trace.effort is not None or self.device.type == "cpu":
            self._count(self._looked_at(latest=True)[0], begin)
        else:
            self.iteration += 1
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()

    def _looked_at(self, *, latest: bool = False) -> list[float]:
        """Losses of the epoch's steps as numbers: an accelerator is not waited for at each.

        Raises:
            DivergedError: one of them is not finite.
        """
        values = torch.stack(self.losses[-1:] if latest else self.losses).tolist()
        bad = next((value for value in values if not math.isfinite(value)), None)
        if bad is not None:
            raise DivergedError(f"training loss {bad} in epoch {self.epoch + 1}")
        return list(map(float, values))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.amp)

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
        with self._autocast():
            numbers = examples.inputs[:1].numel()
            size = max(1, min(_MOST_EXAMPLES, _MOST_NUMBERS // max(1, numbers)))
            parts = [self.model(x) for x in examples.inputs.split(size)]
        outputs = torch.cat(parts).to(self.dtype)
        loss = self.task.loss(outputs, examples.targets).item()
        return loss, self.task.score(outputs, examples.targets)

    @torch.no_grad()
    def _observe(self, epoch: int, loss: float, lr: float) -> None:
        val_loss, val_metric = self._evaluate(self.val)
        if not math.isfinite(val_loss):
            raise DivergedError(f"validation loss {val_loss} after epoch {epoch}")
        self.trace.add(
            spectra(self.model, self.spec.epochs + 1 if self.spec.epochs else 1),
            epoch=epoch,
            iteration=self.iteration,
            evaluations=self.iteration,
            seconds=self.elapsed,
            train_loss=loss,
            val_loss=val_loss,
            val_metric=val_metric,
            drift=drift(self.model),
            lr=lr,
        )

    def _clock(self, *, wait: bool = True) -> float:
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _factor(schedule: str, step: int, steps: int) -> float:
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - step / steps
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))
