"""GAN training: a generator and a discriminator, whose weights are held one way or another."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from sttp_manifold.experiments.data import Splits
from sttp_manifold.experiments.gan.entrants import GanEntrant, wide_discriminator
from sttp_manifold.experiments.gan.judge import Judge
from sttp_manifold.experiments.gan.samples import grid_of, products, strips_of
from sttp_manifold.experiments.gan.setting import FLAGS, GanSetting
from sttp_manifold.experiments.models import SNGANGenerator, weights
from sttp_manifold.experiments.runs.over_data import RunOverData
from sttp_manifold.experiments.runs.trace import MAX_SINGULAR_VALUES, DivergedError
from sttp_manifold.experiments.specs import RunSpec, derived_seed
from sttp_manifold.experiments.task import Task
from sttp_manifold.nn import SpectralWeight, SpectrumMonitor
from sttp_manifold.optim import check_optimizer

__all__ = ["GanRun", "hinge"]

# Steps between two moments at which a run can be cut.
_PIECE = 25
_AT_ONCE = 512
_WARM = 10


def hinge(real: Tensor, generated: Tensor) -> Tensor:
    """The discriminator's loss: both sets are to be beyond one, on their own sides.

    Shape:
        - real, generated: any, scores
        - output: a scalar
    """
    return relu(1 - real).mean() + relu(1 + generated).mean()


class GanRun(RunOverData):
    """Two networks against each other; cut between any two pieces of some steps."""

    kind = "gan"
    method: GanEntrant
    command = "gan"
    reads = ("score", "gan")
    options: ClassVar[Mapping[str, str]] = FLAGS

    def __init__(self, spec: RunSpec, task: Task, method: GanEntrant, splits: Splits) -> None:
        super().__init__(spec, task, method, splits)
        self.setting = GanSetting.of({**spec.options, "batch_size": spec.batch_size})
        self.step = 0
        self.losses: list[float] = []

    @classmethod
    def spec_fields(
        cls, task: Task, method: GanEntrant, lr: float | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See :meth:`Run.spec_fields`.

        Raises:
            ConfigError: a setting out of range.
        """
        setting = GanSetting.of({**(task.gan or {}), **given})
        return {
            "kind": method.kind,
            "spectrum": method.spectrum,
            "schedule": "linear",
            "bias_share": method.bias_share,
            **asdict(setting),
        }

    @classmethod
    def rates(cls, task: Task, method: GanEntrant) -> tuple[float, ...]:
        """See :meth:`Run.rates`."""
        return method.rates(task)

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done, and steps in all."""
        return self.step, self.setting.steps

    def begin(self, device: torch.device, dtype: torch.dtype) -> None:
        """See :meth:`Run.begin`.

        Args:
            device: where to compute.
            dtype: what in.

        Raises:
            ConfigError: images without classes, or no place to keep their classifier.
        """
        spec, setting = self.spec, self.setting
        assert spec.lr is not None
        self.device, self.dtype = device, dtype
        self.images = self.splits.train.inputs.to(device, dtype)
        channels = self.images.shape[1]
        with torch.random.fork_rng(devices=[]):
            # One generator for all discriminators of a seed.
            torch.manual_seed(derived_seed("init", spec.task, spec.seed))
            generator = SNGANGenerator.for_images(
                setting.size, channels, ngf=setting.ngf, latent=setting.latent
            )
            discriminator = self.method.make(setting, channels, spec.rank)
        self.generator = generator.to(device, dtype)
        self.discriminator = discriminator.to(device, dtype)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.trace.facts = self._counts()
        self.d_optimizer = self.method.make_optimizer(self.discriminator, spec.lr)
        check_optimizer(self.d_optimizer, self.discriminator)
        self.g_optimizer = torch.optim.Adam(
            self.generator.parameters(), setting.generator_lr, betas=(0.0, 0.9)
        )
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(0.0, 1 - k / setting.steps))
            for optimizer in (self.d_optimizer, self.g_optimizer)
        ]
        self.order = torch.Generator().manual_seed(derived_seed("order", spec.task, spec.seed))
        self.noise = torch.Generator(device).manual_seed(
            derived_seed("noise", spec.task, spec.seed)
        )
        self.monitor = SpectrumMonitor(self.discriminator, on_alarm=lambda alarm: None)
        self.judge = Judge(
            f"{spec.task} {spec.data}",
            self.splits,
            setting,
            derived_seed("judged", spec.task, spec.seed),
            device,
        )
        self.trace.facts["own"] = dict(self.judge.facts)
        self._look(None)

    def advance(self) -> bool:
        """Do some steps; whether there are more.

        Raises:
            DivergedError: a loss, a weight or a distance is not finite.
        """
        setting = self.setting
        last = min(self.step + _PIECE, setting.steps, self._next_look())
        begin = self._clock()
        losses = []
        while self.step < last:
            losses.append(self._steps())
            self.step += 1
        # One wait for the device a piece, not one a step.
        values = torch.stack(losses).tolist()
        self.elapsed += self._clock() - begin
        if not all(map(math.isfinite, values)):
            raise DivergedError(f"discriminator's loss {values[-1]} after {self.step} steps")
        self.losses += values
        if self.step == self._next_look(self.step - 1):
            self._look(math.fsum(self.losses) / len(self.losses))
        return self.step < setting.steps

    def end(self) -> dict[str, float]:
        """See :meth:`Run.end`."""
        end = {"val_metric": self.trace.curves["val_metric"][-1]}
        own = self.trace.facts["own"]
        own["alarms"] = [str(alarm) for alarm in self.monitor.alarms]
        if self.spec.purpose != "tune":
            images = self.judge.images(self.average)
            end["test_metric"], found = self.judge.test(images)
            end["test_loss"] = self._hinge(self.splits.test.inputs, images)
            own.update(found)
        return end

    def products(self) -> dict[str, bytes]:
        """See :meth:`Run.products`: pictures, and the averaged generator's weights."""
        if self.spec.purpose == "tune":
            return {}
        return products(
            self.average, asdict(self.setting), grid_of(self.average), strips_of(self.average)
        )

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Run.state_dict`."""
        return {
            "generator": self.generator.state_dict(),
            "average": self.average.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "g_optimizer": self.g_optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "order": self.order.get_state(),
            "noise": self.noise.get_state(),
            "monitor": self.monitor.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "losses": list(self.losses),
            "trace": self.trace.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Run.load_state_dict`.

        Args:
            state: of a run of the same specification.
        """
        for name in ("generator", "average", "discriminator", "g_optimizer", "d_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        for schedule, values in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(values)
        self.order.set_state(state["order"])
        self.noise.set_state(state["noise"])
        self.monitor.load_state_dict(state["monitor"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.losses = list(state["losses"])
        self.trace.load_state_dict(state["trace"])

    # -- a step ----------------------------------------------------------------------------------

    def _steps(self) -> Tensor:
        """Steps of the discriminator and one of the generator; the discriminator's last loss."""
        setting = self.setting
        for _ in range(setting.discriminator_steps):
            loss = self._discriminator_step()
        self._generator_step()
        for schedule in self.schedules:
            schedule.step()
        with torch.no_grad():
            # A short memory at first, so that the start is soon forgotten.
            decay = min(setting.ema, (1 + self.step) / (_WARM + self.step))
            pairs = zip(
                self.average.state_dict().values(),
                self.generator.state_dict().values(),
                strict=True,
            )
            for kept, now in pairs:
                if kept.is_floating_point():
                    kept.lerp_(now, 1 - decay)
                else:
                    kept.copy_(now)
        return loss

    def _discriminator_step(self) -> Tensor:
        n = self.setting.batch_size
        index = torch.randint(len(self.images), (n,), generator=self.order)
        real = self.images[index.to(self.device)]
        self.d_optimizer.zero_grad()
        with self._autocast():
            with torch.no_grad():
                generated = self.generator(self._noise(n))
            scores = self.discriminator(torch.cat([real, generated.to(real.dtype)]))
            loss = hinge(*scores.to(self.dtype).split(n))
        total = (
            loss if self.method.penalty is None else loss + self.method.penalty(self.discriminator)
        )
        total.backward()
        self.d_optimizer.step()
        return loss.detach()

    def _generator_step(self) -> None:
        trained = [p for p in self.discriminator.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        self.g_optimizer.zero_grad()
        with self._autocast():
            scores = self.discriminator(self.generator(self._noise(self.setting.batch_size)))
        (-scores.to(self.dtype).mean()).backward()
        self.g_optimizer.step()
        for p in trained:
            p.requires_grad_(True)

    def _noise(self, n: int) -> Tensor:
        return torch.randn(
            n,
            self.setting.latent,
            generator=self.noise,
            device=self.device,
            dtype=self.dtype,
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.setting.amp is not None
        )

    def _next_look(self, after: int | None = None) -> int:
        """The first step after one at which images are looked at; the last step is."""
        after = self.step if after is None else after
        every, steps = self.setting.every, self.setting.steps
        return min((after // every + 1) * every, steps)

    # -- looking ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _hinge(self, real: Tensor, generated: Tensor) -> float:
        """The discriminator's loss, without a trace of it left in the discriminator."""
        net, count = self.discriminator, self.setting.samples
        training = net.training
        net.eval()
        scores = [
            torch.cat([net(x.to(self.device, self.dtype)) for x in part[:count].split(_AT_ONCE)])
            for part in (real, generated)
        ]
        net.train(training)
        return float(hinge(*scores))

    def _look(self, train_loss: float | None) -> None:
        """Judge images and read spectra, for the record."""
        images = self.judge.images(self.average)
        if not bool(images.isfinite().all()):
            raise DivergedError(f"generated images are not finite after {self.step} steps")
        val_loss = self._hinge(self.splits.val.inputs, images)
        if not math.isfinite(val_loss):
            raise DivergedError(f"discriminator's loss {val_loss} after {self.step} steps")
        reading = self.monitor.read(self.step)
        measures = list(reading.measures.values())
        self.trace.add(
            {name: s[:MAX_SINGULAR_VALUES].tolist() for name, s in reading.spectra.items()},
            epoch=None,
            iteration=self.step,
            evaluations=self.step * self.setting.discriminator_steps,
            seconds=self.elapsed,
            # Nothing has been trained before the first step.
            train_loss=val_loss if train_loss is None else train_loss,
            val_loss=val_loss,
            drift=self._drift(),
            lr=self.d_optimizer.param_groups[0]["lr"],
            **self.judge.look(images),
            stable_rank=math.fsum(m.stable_rank for m in measures) / len(measures),
            least_stable_rank=min(m.stable_rank for m in measures),
            ratio=math.fsum(m.ratio for m in measures) / len(measures),
            alarms=len(self.monitor.alarms),
        )
        self.losses = []

    def _drift(self) -> float | None:
        """Largest ``|Q^T Q - I|`` over the frames of all layers."""
        errors = [
            float(module.tt().detach().to(dtype=torch.float64).orthonormality_error())
            for module in self.discriminator.modules()
            if isinstance(module, SpectralWeight)
        ]
        return max(errors, default=None)

    def _counts(self) -> dict[str, Any]:
        held = [m for m in self.discriminator.modules() if isinstance(m, SpectralWeight)]
        total = sum(p.numel() for p in self.discriminator.parameters())
        with torch.random.fork_rng(devices=[]):
            dense_net = weights(wide_discriminator(self.setting, self.images.shape[1])).values()
        dense = sum(map(_numel, dense_net))
        if held:
            stored = sum(p.numel() for weight in held for p in weight.parameters())
            dimension = sum(weight.shape.dim(weight.spectrum) for weight in held)
        else:
            own = weights(self.discriminator).values()
            stored = dimension = sum(_numel(layer) for layer in own)
        return {
            "stored_parameters": stored,
            "dimension": dimension,
            "dense_elements": dense,
            "other_parameters": total - stored,
        }

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _numel(layer: nn.Module) -> int:
    """Elements of a layer's weight, parametrized or not."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.numel()
