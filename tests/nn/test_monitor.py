"""`SpectrumMonitor` reads what is there, leaves no trace, and tells."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import sttp_manifold as sm
from sttp_manifold.errors import SpectrumError
from sttp_manifold.nn import CollapseRule, SpectrumCollapseWarning, SpectrumMonitor


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6),
        nn.Linear(6, 1),
    )  # fmt: skip


SPECTRA = ("identity", "free", "normalized", "bounded", "full", "fixed")


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(SPECTRA),
    st.sampled_from(["householder", "riemannian"]),
    st.sampled_from(["svdp", "sttp"]),
    st.integers(2, 6),
    st.integers(0, 2**31),
)
def test_spectra_are_those_of_lapack(spectrum, method, kind, rank, seed):
    torch.manual_seed(seed)
    model = network().double()
    init = "pretrained" if spectrum == "fixed" else "random"
    model = sm.nn.compress(
        model, rank, spectrum=spectrum, method=method, kind=kind, init=init, grow="allow"
    )
    if spectrum not in ("fixed", "identity"):
        with torch.no_grad():
            for weight in model.modules():
                if isinstance(weight, sm.nn.HouseholderWeight):
                    for p in weight.parameters():
                        p.add_(0.1 * torch.randn_like(p))
    reading = SpectrumMonitor(model).read(7)
    assert reading.step == 7
    assert list(reading.spectra) == ["0", "4"]  # a layer of one singular value is left out
    for name, s in reading.spectra.items():
        weight = model.get_submodule(name).spectral_weight
        expected = torch.linalg.svdvals(weight())[: weight.shape.rank]
        torch.testing.assert_close(s, expected)


def test_reading_spectral_weights_takes_no_svd_and_no_frame(monkeypatch):
    model = sm.nn.compress(network(), 4, grow="allow")
    monitor = SpectrumMonitor(model)
    monkeypatch.setattr(torch.linalg, "svdvals", lambda *_: pytest.fail("an SVD"))
    monkeypatch.setattr(sm.nn.SpectralWeight, "_formed", lambda *_: pytest.fail("a weight"))
    assert len(monitor.read().spectra["0"]) == 4


@pytest.mark.parametrize("training", [True, False])
def test_spectral_normalization_is_read_as_it_is_and_left_so(training):
    torch.manual_seed(0)
    model = network().double()
    parametrizations.spectral_norm(model[0], n_power_iterations=3)
    parametrizations.orthogonal(model[4])
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    reading = SpectrumMonitor(model).read()
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.eval()
    for name in ("0", "4"):
        expected = torch.linalg.svdvals(model.get_submodule(name).weight.flatten(1))
        torch.testing.assert_close(reading.spectra[name], expected.detach())


def test_a_held_tensor_is_watched_once():
    layer = nn.Linear(8, 6)
    nn.utils.parametrize.register_parametrization(layer, "weight", _Held(layer.weight))
    assert SpectrumMonitor(nn.Sequential(layer)).layers == ["0.parametrizations.weight.0.held"]


class _Held(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.held = sm.nn.make_weight("householder", sm.TTShape.for_matrix(6, 8, rank=3))

    def forward(self, weight):
        return self.held()


def collapse(model: nn.Module, factor: float) -> None:
    """Shrink all but the first singular value of every dense weight."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                u, s, vt = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
                s[1:] *= factor
                layer.weight.copy_(((u * s) @ vt).view_as(layer.weight))


def test_a_made_collapse_is_told_once_a_layer_and_again_after_recovery():
    torch.manual_seed(0)
    model = network()
    start = copy.deepcopy(model.state_dict())
    told = []
    monitor = SpectrumMonitor(model, on_alarm=told.append)
    for step in range(5):
        assert monitor.read(step).alarms == ()
    for step in range(5, 30):
        collapse(model, 0.7)
        monitor.read(step)
    kinds = {(alarm.layer, alarm.kind) for alarm in told}
    assert {("0", "stable rank"), ("4", "stable rank"), ("0", "ratio"), ("4", "ratio")} <= kinds
    assert len(told) == len(kinds)  # each once
    assert monitor.alarms == told
    assert "stable rank" in str(monitor)
    assert "stable rank" in monitor._repr_html_()
    model.load_state_dict(start)
    for step in range(30, 33):
        monitor.read(step)
    count = len(told)
    for step in range(33, 60):
        collapse(model, 0.7)
        monitor.read(step)
    assert ("0", "stable rank") in {(a.layer, a.kind) for a in told[count:]}


@settings(deadline=None, max_examples=4)
@given(st.integers(0, 2**31), st.sampled_from(["adam", "sgd"]))
def test_a_healthy_training_raises_nothing(seed, name):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    optimizer = make(model.parameters(), 1e-2)
    x, y = torch.randn(64, 12), torch.randn(64, 4)
    monitor = SpectrumMonitor(model)
    for step in range(45):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if step % 3 == 0:
            monitor.read(step)
    assert monitor.alarms == []


def test_by_default_an_alarm_is_a_warning():
    model = nn.Sequential(nn.Linear(8, 6))
    monitor = SpectrumMonitor(model, rule=CollapseRule(patience=1, reference=1, least_ratio=1e-9))
    monitor.read(0)
    for _ in range(20):
        collapse(model, 0.7)
    with pytest.warns(SpectrumCollapseWarning, match=r"0 at step 1: the stable rank has fallen"):
        monitor.read(1)


def test_a_state_goes_on_and_tells_nothing_twice():
    torch.manual_seed(0)
    model = network()
    told: list = []
    first = SpectrumMonitor(model, on_alarm=told.append)
    for step in range(20):
        collapse(model, 0.8)
        first.read(step)
    assert told
    second = SpectrumMonitor(model, on_alarm=lambda alarm: pytest.fail("told twice"))
    second.load_state_dict(first.state_dict())
    assert second.alarms == first.alarms
    assert second.read(20).alarms == ()
    torch.testing.assert_close(second.history("0")[:-1], first.history("0"))
    empty = SpectrumMonitor(model)
    empty.load_state_dict(SpectrumMonitor(model).state_dict())
    assert empty.readings == []


class Writer:
    """What TensorBoard's writer has."""

    def __init__(self):
        self.scalars, self.histograms = [], []

    def add_scalar(self, tag, value, global_step=None):
        self.scalars.append((tag, value, global_step))

    def add_histogram(self, tag, values, global_step=None):
        self.histograms.append((tag, tuple(values.shape), global_step))


def test_readings_are_written():
    writer = Writer()
    SpectrumMonitor(network(), writer=writer).read(3)
    assert writer.histograms == [("spectrum/0", (8,), 3), ("spectrum/4", (6,), 3)]
    assert {tag for tag, _, _ in writer.scalars} == {
        f"{what}/{layer}"
        for what in ("stable_rank", "smallest_over_largest", "largest")
        for layer in ("0", "4")
    }


def test_figures_anywhere_and_live_in_a_notebook(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown: list[tuple[str, int]] = []

    class Handle:
        def update(self, image):
            shown.append(("again", len(image.data)))

    def first(image, display_id):
        shown.append(("first", len(image.data)))
        return Handle()

    monkeypatch.setattr(display, "display", first)
    monitor = SpectrumMonitor(network())
    with pytest.raises(SpectrumError, match="nothing has been read yet"):
        monitor.figure()
    monitor.live()
    for _ in range(3):
        monitor.read()
    assert [kind for kind, _ in shown] == ["first", "again", "again"]
    assert len(monitor.figure().axes) == 3
    many = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    monitor = SpectrumMonitor(many)
    monitor.read()
    assert len(monitor.figure().axes) == 7


def test_errors_name_what_is_wrong():
    with pytest.raises(SpectrumError, match="takes a network, got int"):
        SpectrumMonitor(3)
    with pytest.raises(SpectrumError, match="ReLU has no weight with two singular values"):
        SpectrumMonitor(nn.ReLU())
    model = network()
    monitor = SpectrumMonitor(model)
    with pytest.raises(SpectrumError, match="nothing has been read yet"):
        monitor.history("0")
    monitor.read()
    with pytest.raises(SpectrumError, match=r"no layer 'x'; those that are watched are '0', '4'"):
        monitor.history("x")
    with pytest.raises(SpectrumError, match="unknown measure 'rank'; expected one of 'stable_rank"):
        monitor.series("0", "rank")
    sm.nn.compress(model, 3, grow="allow")
    with pytest.raises(SpectrumError, match="have changed since the last reading"):
        monitor.read()
    model = network()
    monitor = SpectrumMonitor(model)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(SpectrumError, match="'0' has entries that are not finite"):
        monitor.read()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_and_zeros(dtype):
    model = network().to(dtype)
    with torch.no_grad():
        model[4].weight.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reading = SpectrumMonitor(model).read()
    assert reading.measures["4"].stable_rank == 0
    assert reading.spectra["0"].dtype == torch.float64
