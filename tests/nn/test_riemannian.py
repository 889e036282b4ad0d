"""Points that have left their manifold are refused where they are evaluated, and no others."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sttp_manifold as sm
from sttp_manifold.errors import OffManifoldError
from sttp_manifold.nn import RiemannianWeight, SpectralLinear, together
from sttp_manifold.tt import SPECTRA

RETRACTIONS = ("newton_schulz", "qr", "polar", "cayley", "pogo")


def network(dtype: torch.dtype = torch.float32, spectrum: str = "free") -> nn.Sequential:
    torch.manual_seed(0)
    how = {"method": "riemannian", "init": "random", "dtype": dtype, "spectrum": spectrum}
    return together(
        nn.Sequential(SpectralLinear(24, 16, 4, **how), nn.Tanh(), SpectralLinear(16, 6, 3, **how))
    )


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(32, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    after: Callable[[], object] = lambda: None,
) -> None:
    x = batch(next(model.parameters()).dtype)
    wanted = x[:, :6].sin()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - wanted).square().mean().backward()
        optimizer.step()
        after()


def evaluate(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch(next(model.parameters()).dtype))


@pytest.mark.filterwarnings("ignore::sttp_manifold.nn.OffManifoldWarning")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_points_of_a_euclidean_optimizer_are_refused(
    spectrum: str, mode: Callable[[], torch.no_grad]
) -> None:
    model = network(spectrum=spectrum)
    evaluate(model)
    train(model.train(), torch.optim.SGD(model.parameters(), lr=0.5), 5)
    model.eval()
    apart = together(copy.deepcopy(model), False)
    for _ in range(2):  # not only the first time
        with mode(), pytest.raises(OffManifoldError, match=r"proj_"):
            model(batch())
        with mode(), pytest.raises(OffManifoldError):
            apart(batch())
    with torch.no_grad():
        for weight in model.modules():
            if isinstance(weight, RiemannianWeight):
                weight.point.proj_()
    evaluate(model)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.99)])
def test_euclidean_averages_are_refused_and_those_of_the_manifold_are_not(
    average: Callable[..., None] | None,
) -> None:
    model = network()
    wrong = AveragedModel(model, multi_avg_fn=average)
    right = AveragedModel(
        model, multi_avg_fn=sm.optim.get_manifold_multi_avg_fn(model, average), use_buffers=True
    )

    def update() -> None:
        wrong.update_parameters(model)
        right.update_parameters(model)

    train(model, sm.optim.RiemannianAdam(model.parameters(), lr=0.02), 30, update)
    evaluate(right)
    evaluate(model)
    with pytest.raises(OffManifoldError, match="get_manifold_multi_avg_fn"):
        evaluate(wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_points_that_were_trained_right_are_not_refused(
    retraction: str, dtype: torch.dtype
) -> None:
    model = network(dtype)
    for kind, lr in ((sm.optim.RiemannianSGD, 0.3), (sm.optim.RiemannianAdam, 0.05)):
        train(model.train(), kind(model.parameters(), lr=lr, retraction=retraction), 20)
        evaluate(model)


def test_a_long_training_is_not_refused() -> None:
    torch.manual_seed(0)
    model = SpectralLinear(24, 6, 3, method="riemannian", init="random")
    train(model, sm.optim.RiemannianAdam(model.parameters(), lr=0.01), 1_000)
    evaluate(model)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_what_half_precision_has_rounded_is_not_refused(half: torch.dtype) -> None:
    model = network(half)
    state = copy.deepcopy(model.state_dict())
    for dtype in (half, torch.float32, torch.float64):
        evaluate(copy.deepcopy(model).to(dtype))
        loaded = network(dtype)
        loaded.load_state_dict(state)
        evaluate(loaded)
    evaluate(network().to(half).double())
    file = io.BytesIO()
    torch.save(network(half).float(), file)
    file.seek(0)
    evaluate(torch.load(file, weights_only=False))


def test_a_value_is_looked_at_once_for_each_version(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    error = RiemannianWeight._error
    monkeypatch.setattr(RiemannianWeight, "_error", lambda w: looks.append(1) or error(w))
    model = network()
    for _ in range(3):
        evaluate(model)
    assert len(looks) == 2
    with torch.no_grad():
        model[0].spectral_weight.point.mul_(1)
    evaluate(model)
    assert len(looks) == 3
    model.train()
    model(batch()).sum().backward()
    with torch.no_grad():
        model(batch())
    model.eval()
    model(batch())
    assert len(looks) == 3


@pytest.mark.filterwarnings("ignore::sttp_manifold.nn.OffManifoldWarning")
def test_nothing_is_looked_at_where_no_value_is_to_be_read() -> None:
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), 5)
    model.eval()
    with torch.no_grad():
        torch.func.vmap(model)(batch())
        others = {name: p.detach() for name, p in model.named_parameters()}
        torch.func.functional_call(model, others, (batch(),))
        torch.export.export(model, (batch(),))
        torch.compile(model, backend="eager", fullgraph=True)(batch())
        copy.deepcopy(model).to("meta")(batch().to("meta"))
        with pytest.raises(OffManifoldError):
            model(batch())


def test_a_training_that_diverged_shows_it() -> None:
    model = network()
    with torch.no_grad():
        model[0].spectral_weight.point.fill_(torch.nan)
    assert evaluate(model).isnan().all()
