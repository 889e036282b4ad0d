"""State dicts of spectral weights say what their numbers mean, and what does not fit is refused."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from typing import Any

import pytest
import torch
from strategies import bound_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from ways_to_hold import METHODS, every_method

from sttp_manifold import TTShape, tt_svd
from sttp_manifold.nn import SpectralConv2d, SpectralLinear, compress, make_weight, switch
from sttp_manifold.nn.state import EXTRA, from_tensor, to_tensor
from sttp_manifold.optim import RiemannianAdam
from sttp_manifold.tt import SPECTRA

SHAPE = TTShape.for_matrix(12, 20, 3)

every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)
strictly = pytest.mark.parametrize(
    "how", [{}, {"strict": False}, {"assign": True}, {"strict": False, "assign": True}]
)


def network(**how: Any) -> nn.Sequential:
    """Nested, with a tied weight."""
    how = {"init": "random", **how}
    inner = nn.Sequential(nn.Flatten(), SpectralLinear(16, 12, 3, **how), nn.BatchNorm1d(12))
    inner.append(SpectralLinear(16, 12, weight=inner[1].spectral_weight))
    return nn.Sequential(SpectralConv2d(4, 16, 2, 3, **how), inner[:3])


def image() -> Tensor:
    return torch.randn(3, 4, 2, 2)


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- what fits ---------------------------------------------------------------------------------


@every_method
@every_spectrum
def test_a_state_says_what_its_weight_is(method: str, spectrum: str) -> None:
    weight = make_weight(method, SHAPE, spectrum, bound=bound_of(spectrum, 0.5))
    held = json.loads(bytes(weight.state_dict()[EXTRA].tolist()))
    assert (held["method"], held["spectrum"]) == (method, spectrum)
    assert (held["out_modes"], held["in_modes"]) == ([2, 2, 3], [2, 2, 5])
    assert tuple(held["ranks"]) == SHAPE.ranks
    assert held.get("bound") == (0.5 if spectrum == "bounded" else None)
    assert weight.state_dict()[EXTRA].dtype == torch.uint8


@every_method
@every_spectrum
@strictly
def test_states_that_fit_are_loaded(method: str, spectrum: str, how: Any) -> None:
    one, two = (network(method=method, spectrum=spectrum).eval() for _ in range(2))
    result = two.load_state_dict(through_file(one.state_dict()), **how)
    assert not result.missing_keys
    assert not result.unexpected_keys
    x = image()
    assert torch.equal(one(x), two(x))


@every_method
def test_parts_prefixes_and_wrappers(method: str) -> None:
    one, two = network(method=method), network(method=method)
    part = {k: v for k, v in one.state_dict().items() if k.startswith("0.spectral_weight")}
    result = two.load_state_dict(part, strict=False)
    assert f"1.1.spectral_weight.{EXTRA}" in result.missing_keys
    assert torch.equal(one[0].weight, two[0].weight)
    wrapped = nn.DataParallel(network(method=method))
    wrapped.load_state_dict({f"module.{k}": v for k, v in one.state_dict().items()})
    assert torch.equal(wrapped.module[0].weight, one[0].weight)


@every_method
def test_copies_pickles_averages_and_functional_calls(method: str) -> None:
    model = network(method=method).eval()
    x = image()
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        assert other.state_dict().keys() == model.state_dict().keys()
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    again = AveragedModel(network(method=method).eval(), use_buffers=True)
    again.load_state_dict(through_file(averaged.state_dict()))
    torch.testing.assert_close(again(x), y)
    tensors = {k: v for k, v in model.state_dict().items() if not k.endswith(EXTRA)}
    for state in (tensors, model.state_dict()):
        torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), y)
    assert not any(EXTRA in vars(module) for module in model.modules())
    mean = {k: (v + v) / 2 for k, v in model.state_dict().items()}
    other = network(method=method).eval()
    other.load_state_dict(mean)
    torch.testing.assert_close(other(x), y)


@every_method
def test_a_run_is_resumed(method: str) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(1)
        optimizer.zero_grad()
        model(image()).square().sum().backward()
        optimizer.step()

    one, two = network(method=method), network(method=method)
    a, b = (RiemannianAdam(m.parameters(), lr=1e-2) for m in (one, two))
    step(one, a)
    two.load_state_dict(through_file(one.state_dict()))
    b.load_state_dict(through_file(a.state_dict()))
    step(one, a)
    step(two, b)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_safetensors_take_it(tmp_path: Any) -> None:
    model = network()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), tmp_path / "a.safetensors")
    other = network()
    other.load_state_dict(safetensors.load_file(tmp_path / "a.safetensors"))
    assert torch.equal(other[0].weight, model[0].weight)


@every_method
def test_distributed_data_parallel_takes_it(method: str, tmp_path: Any) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(network(method=method))
        model(image()).sum().backward()
        state = through_file(model.state_dict())
        other = nn.parallel.DistributedDataParallel(network(method=method))
        other.load_state_dict(state)
        assert torch.equal(other.module[0].weight, model.module[0].weight)
    finally:
        torch.distributed.destroy_process_group()


# -- what does not -----------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "spectrum": ({"spectrum": "bounded"}, {"spectrum": "free"}, "spectrum='bounded', bound=1.0"),
    "normalized": ({"spectrum": "normalized"}, {"spectrum": "free"}, "spectrum='normalized'"),
    "bound": (
        {"spectrum": "bounded", "bound": 2.0},
        {"spectrum": "bounded", "bound": 1.0},
        "spectrum='bounded', bound=2.0",
    ),
    "full": ({"spectrum": "full"}, {"spectrum": "free"}, "spectrum='full'"),
    "identity": ({"spectrum": "identity"}, {"spectrum": "free"}, "spectrum='identity'"),
    "kind": ({"kind": "svdp"}, {"kind": "sttp"}, "kind='svdp'"),
    "rank": ({"rank": 4}, {"rank": 2}, "rank=4"),
    "modes": ({"rank": 3}, {"rank": 3, "kernel": "factored"}, r"modes 2·2·2·2 \| 2·2·4"),
}


def layers(how: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(nn.Identity(), SpectralConv2d(4, 16, 2, **{"rank": 3, **how}))


@every_method
@pytest.mark.parametrize(("stored", "own", "said"), OTHERS.values(), ids=OTHERS)
@strictly
def test_another_weight_is_refused(
    method: str, stored: dict[str, Any], own: dict[str, Any], said: str, how: Any
) -> None:
    one, two = layers({**stored, "method": method}), layers({**own, "method": method})
    before = copy.deepcopy(two.state_dict())
    with pytest.raises(RuntimeError, match=rf"'1\.spectral_weight' does not fit.*{said}"):
        two.load_state_dict(through_file(one.state_dict()), **how)
    for key, value in two.state_dict().items():
        assert torch.equal(value, before[key]) or not key.startswith("1.spectral_weight")


@every_method
@strictly
def test_another_method_is_refused_until_switched(method: str, how: Any) -> None:
    other = METHODS[1 - METHODS.index(method)]
    one, two = layers({"method": method, "init": "random"}), layers({"method": other})
    state = one.state_dict()
    with pytest.raises(RuntimeError, match=rf"call switch\(model, '{method}'\) before loading"):
        two.load_state_dict(state, **how)
    switch(two, method).load_state_dict(state, **how)
    switch(two, other)
    torch.testing.assert_close(two[1].weight, one[1].weight, rtol=0, atol=1e-5)


def test_all_that_does_not_fit_is_said_at_once() -> None:
    one, two = network(spectrum="bounded"), network(spectrum="free")
    with pytest.raises(RuntimeError) as caught:
        two.load_state_dict(one.state_dict())
    assert str(caught.value).count("does not fit") == 2


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spectrum", SPECTRA)
@strictly
def test_numbers_that_are_not_finite_are_refused(
    method: str, spectrum: str, value: float, how: Any
) -> None:
    model = layers({"method": method, "spectrum": spectrum})
    for key in model.state_dict():
        if EXTRA in key or "bias" in key:
            continue
        state = copy.deepcopy(model.state_dict())
        state[key].view(-1)[-1] = value
        with pytest.raises(RuntimeError, match=rf"{key} has 1 of \d+ entries.*not finite"):
            model.load_state_dict(state, **how)
        assert model[1].weight.isfinite().all()


def test_signs_that_are_none_are_refused() -> None:
    model = layers({"spectrum": "identity"})
    state = copy.deepcopy(model.state_dict())
    state["1.spectral_weight.signs"][0] = 0.5
    with pytest.raises(RuntimeError, match="are no signs"):
        model.load_state_dict(state)


@every_method
@strictly
def test_a_dense_state_names_compress_and_encode(method: str, how: Any) -> None:
    stock = nn.Sequential(nn.Conv2d(4, 16, 2), nn.Flatten(), nn.Linear(16, 12))
    model = compress(copy.deepcopy(stock), rank=3, method=method)
    with pytest.raises(RuntimeError, match=r"'2\.weight'.*compress\(model.*encode_") as caught:
        model.load_state_dict(stock.state_dict(), **how)
    assert "'0.weight'" in str(caught.value)
    state = stock.state_dict()
    W = state["2.weight"].flatten(1)
    w = model.get_submodule("2.spectral_weight")
    w.encode_(tt_svd(W, w.shape))


# -- old files, and broken ones ----------------------------------------------------------------


@every_method
@strictly
def test_files_without_it_load_with_one_warning(method: str, how: Any) -> None:
    one, two = network(method=method).eval(), network(method=method).eval()
    state = {k: v for k, v in one.state_dict().items() if not k.endswith(EXTRA)}
    with pytest.warns(UserWarning, match="does not say its plan") as seen:
        result = two.load_state_dict(state, **how)
    assert len(seen) == 1
    assert not result.missing_keys
    with pytest.warns(UserWarning, match="does not say its plan") as seen:
        two.load_state_dict(state, **how)
    assert len(seen) == 1
    assert torch.equal(one(image().fill_(1)), two(image().fill_(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two.load_state_dict({}, strict=False)


@pytest.mark.parametrize(
    "broken",
    [
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.full((5,), float("nan")),
        to_tensor({"other": 1}),
        "text",
        None,
    ],
)
def test_what_cannot_be_read_is_refused(broken: Any) -> None:
    model = layers({})
    state = model.state_dict() | {f"1.spectral_weight.{EXTRA}": broken}
    with pytest.raises(RuntimeError, match="cannot be read"):
        model.load_state_dict(state)
    assert from_tensor(broken) is None


def test_a_later_format_is_refused() -> None:
    model = layers({})
    key = f"1.spectral_weight.{EXTRA}"
    state = model.state_dict()
    held = from_tensor(state[key])
    assert held is not None
    state[key] = to_tensor({**held, "sttp": 2})
    with pytest.raises(RuntimeError, match="update the package"):
        model.load_state_dict(state)


def test_a_state_on_meta_fits() -> None:
    model = layers({}).to("meta")
    state = {k: v.to("meta") for k, v in model.state_dict().items()}
    layers({}).to("meta").load_state_dict(state, assign=True)
