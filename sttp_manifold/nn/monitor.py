"""`SpectrumMonitor`: singular values of a network while it trains, and an alarm for collapse."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.display import box_html, table_html
from sttp_manifold.errors import SpectrumError
from sttp_manifold.nn.collapse import CollapseRule, Measures, SpectrumAlarm, measures_of
from sttp_manifold.nn.monitor_plot import NotebookPlace, png_of, spectra_figure
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.nn.weight import SpectralWeight

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SpectrumCollapseWarning", "SpectrumMonitor", "SpectrumReading", "SpectrumWriter"]

_HEADERS = ("layer", "values", "largest", "smallest", "smallest / largest", "stable rank", "alarm")


class SpectrumCollapseWarning(UserWarning):
    """Singular values of a layer that collapse, or are about to."""


class SpectrumWriter(Protocol):
    """What readings are written to: a ``torch.utils.tensorboard.SummaryWriter``, or its like."""

    def add_scalar(self, tag: str, value: float, global_step: int | None = None) -> Any:
        """Take a number."""
        ...

    def add_histogram(self, tag: str, values: Tensor, global_step: int | None = None) -> Any:
        """Take a set of numbers."""
        ...


@dataclass(frozen=True)
class SpectrumReading:
    """The singular values of a network at one time.

    Attributes:
        step: when.
        spectra: of each layer the singular values, in descending order, on the CPU in float64.
        measures: of each layer what alarms go by.
        alarms: those that this reading raised.

    Shape:
        spectra: each ``(r,)``
    """

    step: int
    spectra: Mapping[str, Tensor]
    measures: Mapping[str, Measures]
    alarms: tuple[SpectrumAlarm, ...]


class SpectrumMonitor:
    r"""Watch the singular values of a network's weights, and tell when they collapse.

    Spectral weights know theirs: they are read without an SVD, and without computing a frame. Of
    dense weights, parametrized ones included (spectral normalization), they are computed, of the
    matrix ``(d_out, -1)``. Weights with fewer than two singular values are left out, and so are
    those of norms and embeddings of other modules than linear and convolution layers, unless they
    are spectral.

    Of each layer two measures are kept: the **stable rank** :math:`\sum s_i^2 / s_1^2`, how many
    directions share the weight, and the **ratio** :math:`s_r / s_1` of the smallest to the
    largest. A :class:`CollapseRule` says when they are an alarm.

    Args:
        model: any network; compressing it later needs a new monitor.
        rule: when there is an alarm.
        writer: where every reading is written as well, ``SummaryWriter()`` of TensorBoard.
        on_alarm: called with each alarm; by default it is a :class:`SpectrumCollapseWarning`.

    Attributes:
        readings: all of them, in order.
        alarms: all that were raised. A layer raises each kind once until it has recovered.

    Raises:
        SpectrumError: a network without such weights.

    References:
        Miyato et al. 2018, Sec. 3 (concentration of spectra in GANs); Liu et al. 2019, *Spectral
        regularization for combating mode collapse in GANs* (spectral collapse); Rudelson &
        Vershynin 2007 (stable rank).

    Example:
        >>> import sttp_manifold as sm
        >>> model = sm.nn.compress(nn.Sequential(nn.Linear(64, 32)), rank=4)
        >>> monitor = sm.nn.SpectrumMonitor(model)
        >>> for step in range(10):
        ...     reading = monitor.read(step)  # each hundred steps of a training, say
        >>> len(reading.spectra["0"]), monitor.alarms
        (4, [])
    """

    @explained
    def __init__(
        self,
        model: nn.Module,
        *,
        rule: CollapseRule | None = None,
        writer: SpectrumWriter | None = None,
        on_alarm: Callable[[SpectrumAlarm], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SpectrumError(
                f"SpectrumMonitor takes a network, got {type(model).__name__}; call "
                "SpectrumMonitor(model)"
            )
        self.model = model
        self.rule = CollapseRule() if rule is None else rule
        self.writer = writer
        self.on_alarm = _warn if on_alarm is None else on_alarm
        self.readings: list[SpectrumReading] = []
        self.alarms: list[SpectrumAlarm] = []
        self._raised: set[tuple[str, str]] = set()
        self._place: NotebookPlace | None = None
        if not any(True for _ in _places(model)):
            raise SpectrumError(
                f"{type(model).__name__} has no weight with two singular values or more to watch; "
                "expected linear, convolution or spectral layers"
            )

    @explained
    @torch.no_grad()
    def read(self, step: int | None = None) -> SpectrumReading:
        """Read all spectra now, keep them, write them, and raise the alarms they give cause for.

        The network is as it was before: training mode and the buffers of spectral normalization
        as well. On an accelerator this waits for it.

        Args:
            step: when; the number of readings so far if absent.

        Raises:
            SpectrumError: a weight with entries that are not finite, or whose layer had another
                number of singular values before.
        """
        step = len(self.readings) if step is None else step
        spectra = _spectra(self.model)
        self._check(spectra)
        reading = self._keep(step, spectra)
        self._write(reading)
        if self._place is not None:
            self._place.show(png_of(self.figure()))
        for alarm in reading.alarms:
            self.on_alarm(alarm)
        return reading

    def figure(self) -> Figure:
        """Singular values and stable ranks over the readings, as a figure of matplotlib.

        Of many layers six are drawn, from the first to the last; a red line is an alarm.

        Raises:
            SpectrumError: nothing has been read yet.
        """
        spectra = {name: self.history(name) for name in self.layers} if self.readings else {}
        if not spectra:
            raise SpectrumError("nothing has been read yet; call monitor.read(step) in the loop")
        ranks = {name: self.series(name, "stable_rank") for name in spectra}
        steps = [reading.step for reading in self.readings]
        return spectra_figure(steps, spectra, ranks, [(a.layer, a.step) for a in self.alarms])

    def live(self) -> SpectrumMonitor:
        """From now on each reading redraws the figure, below the cell of a notebook that reads.

        Returns:
            The monitor itself.

        Raises:
            SpectrumError: IPython is not installed.
        """
        self._place = NotebookPlace()
        return self

    @property
    def layers(self) -> list[str]:
        """Names of the layers that are watched."""
        return list(self.readings[-1].spectra) if self.readings else list(_spectra(self.model))

    def history(self, layer: str) -> Tensor:
        """All singular values of a layer that were read.

        Args:
            layer: its name, one of :attr:`layers`.

        Shape:
            - output: ``(readings, r)``, float64, each row in descending order

        Raises:
            SpectrumError: no such layer, or nothing read yet.
        """
        if not self.readings:
            raise SpectrumError("nothing has been read yet; call monitor.read(step) in the loop")
        if layer not in self.readings[-1].spectra:
            there = ", ".join(map(repr, self.readings[-1].spectra))
            raise SpectrumError(f"no layer {layer!r}; those that are watched are {there}")
        return torch.stack([reading.spectra[layer] for reading in self.readings])

    def series(self, layer: str, measure: str) -> list[float]:
        """A measure of a layer at each reading.

        Args:
            layer: its name, one of :attr:`layers`.
            measure: ``"stable_rank"``, ``"ratio"``, ``"largest"`` or ``"smallest"``.

        Raises:
            SpectrumError: no such layer or measure, or nothing read yet.
        """
        self.history(layer)
        if measure not in Measures._fields:
            names = ", ".join(map(repr, Measures._fields))
            raise SpectrumError(f"unknown measure {measure!r}; expected one of {names}")
        return [getattr(reading.measures[layer], measure) for reading in self.readings]

    def state_dict(self) -> dict[str, Any]:
        """All readings, for a checkpoint: tensors, numbers and texts."""
        return {
            "steps": [reading.step for reading in self.readings],
            "spectra": {
                name: self.history(name) for name in (self.layers if self.readings else [])
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; alarms are those that the readings give.

        Args:
            state: of a monitor of the same network and the same rule. No alarm is told twice.
        """
        self.readings, self.alarms, self._raised = [], [], set()
        for k, step in enumerate(state["steps"]):
            self._keep(step, {name: rows[k].clone() for name, rows in state["spectra"].items()})

    def _keep(self, step: int, spectra: Mapping[str, Tensor]) -> SpectrumReading:
        measures = {name: measures_of(s) for name, s in spectra.items()}
        reading = SpectrumReading(step, spectra, measures, tuple(self._judge(step, measures)))
        self.readings.append(reading)
        self.alarms.extend(reading.alarms)
        return reading

    def _check(self, spectra: Mapping[str, Tensor]) -> None:
        for name, s in spectra.items():
            if not bool(s.isfinite().all()):
                raise SpectrumError(
                    f"the weight of {name!r} has entries that are not finite: training has diverged"
                )
        if self.readings:
            before = {name: len(s) for name, s in self.readings[-1].spectra.items()}
            now = {name: len(s) for name, s in spectra.items()}
            if before != now:
                raise SpectrumError(
                    "the network's weights have changed since the last reading (layers or ranks); "
                    "make a new SpectrumMonitor(model)"
                )

    def _judge(self, step: int, measures: Mapping[str, Measures]) -> Iterator[SpectrumAlarm]:
        for name, now in measures.items():
            past = [reading.measures[name] for reading in self.readings]
            kinds = {alarm.kind: alarm for alarm in self.rule.judge(name, step, [*past, now])}
            for kind in self.rule.kinds:
                key = (name, kind)
                if kind not in kinds:
                    self._raised.discard(key)
                elif key not in self._raised:
                    self._raised.add(key)
                    yield kinds[kind]

    def _write(self, reading: SpectrumReading) -> None:
        if self.writer is None:
            return
        for name, s in reading.spectra.items():
            measures = reading.measures[name]
            self.writer.add_histogram(f"spectrum/{name}", s, reading.step)
            self.writer.add_scalar(f"stable_rank/{name}", measures.stable_rank, reading.step)
            self.writer.add_scalar(f"smallest_over_largest/{name}", measures.ratio, reading.step)
            self.writer.add_scalar(f"largest/{name}", measures.largest, reading.step)

    def _lines(self) -> list[tuple[str, ...]]:
        lines = []
        for name, now in (self.readings[-1].measures if self.readings else {}).items():
            raised = ", ".join(kind for layer, kind in sorted(self._raised) if layer == name)
            size = str(len(self.readings[-1].spectra[name]))
            numbers = (now.largest, now.smallest, now.ratio, now.stable_rank)
            lines.append((name or "(root)", size, *(f"{x:.4g}" for x in numbers), raised))
        return lines

    def __str__(self) -> str:
        from tabulate import tabulate

        if not self.readings:
            return "SpectrumMonitor: nothing read yet"
        table = tabulate(self._lines(), headers=_HEADERS, disable_numparse=True)
        return f"step {self.readings[-1].step}, {len(self.readings)} readings\n{table}"

    def _repr_html_(self) -> str:
        if not self.readings:
            return box_html(str(self))
        head = f"step {self.readings[-1].step}, {len(self.readings)} readings"
        return box_html(head, table_html(_HEADERS, self._lines(), right=range(1, 6)))


def _warn(alarm: SpectrumAlarm) -> None:
    warnings.warn(str(alarm), SpectrumCollapseWarning, stacklevel=3)


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Spectral weights, and dense layers with two singular values or more, by name."""
    for name, module in model.named_modules():
        if isinstance(module, SpectralWeight):
            if module.shape.rank > 1:
                # The layer's name is what users know.
                yield name.removesuffix("spectral_weight").removesuffix("."), module
        elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not _is_held(module):
            weight = _stored(module)
            if weight is not None and min(weight.flatten(1).shape) > 1:
                yield name, module


def _is_held(module: nn.Module) -> bool:
    """Whether a spectral weight stands behind a layer's tensor: it is watched itself."""
    return any(isinstance(child, SpectralWeight) for child in module.modules() if child != module)


def _stored(module: nn.Module) -> Tensor | None:
    """The weight that a layer computes with, without a change of what it is computed from."""
    weight: Any = module._parameters.get("weight")
    if weight is None:
        # Parametrized, or computed by a hook before each forward.
        with _evaluating(module):
            weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or nn.parameter.is_lazy(weight) or not has_values(weight):
        return None
    return weight


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that spectral normalization does no iteration of its power method."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = False
        yield
    finally:
        for child, training in modes:
            child.training = training


def _spectra(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in _places(model):
        if isinstance(module, SpectralWeight):
            bond = module.bond().detach()
            values = bond.abs() if bond.ndim == 1 else _svdvals(bond)
        else:
            weight = _stored(module)
            assert weight is not None
            values = _svdvals(weight.detach().flatten(1))
        found[name] = values.to("cpu", torch.float64).sort(descending=True).values
    return found


def _svdvals(matrix: Tensor) -> Tensor:
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if not bool(wide.isfinite().all()):
        return wide.new_full((min(wide.shape),), float("nan"))
    return torch.linalg.svdvals(wide)
