"""A network in one file: it comes back as it was, or what does not fit is said."""

from __future__ import annotations

import contextlib
import copy
import json
import pickletools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from ways_to_hold import METHODS, every_method

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn import (
    Recipe,
    SpectralLinear,
    SpectralWeight,
    compress,
    decompress,
    load,
    make_weight,
    save,
    summary,
    switch,
    weights_of,
)
from sttp_manifold.nn.held import HeldWeight, put_behind
from sttp_manifold.nn.stack import MatrixView
from sttp_manifold.nn.stored_network import KEY
from sttp_manifold.nn.together import is_together
from sttp_manifold.optim import RiemannianAdam
from sttp_manifold.tt import SPECTRA, TTShape

every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


class Net(nn.Module):
    """Layers of both kinds, buffers, a tie that is compressed and one that stays dense."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.one = nn.Linear(12, 20)
        self.two = nn.Linear(12, 20)
        self.scale = nn.Parameter(torch.rand(20))
        self.again = nn.Parameter(torch.rand(20))
        self.last = nn.Linear(20, 8)
        self.register_buffer("shift", torch.rand(12))
        if tied:
            self.two.weight = self.one.weight
            self.again = self.scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((-2, -1)) + self.shift
        return self.last(self.one(x) * self.scale + self.two(x).tanh() * self.again)


def net(
    seed: int = 0, *, rank: int = 3, dtype: torch.dtype = torch.float32, **how: Any
) -> nn.Module:
    torch.manual_seed(seed)
    how = {"grow": "allow", "project": True, **how}
    return compress(Net().to(dtype), rank=rank, skip=["last"], **how).eval()


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def close(a: Tensor, b: Tensor) -> None:
    eps = torch.finfo(a.dtype).eps
    torch.testing.assert_close(a, b, rtol=200 * eps, atol=200 * eps)


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[KEY])


def rewrite(path: Path, said: Any, **tensors: Tensor) -> None:
    """The same file with another header, or other tensors."""
    save_file(
        load_file(path) | tensors, path, {KEY: said if isinstance(said, str) else json.dumps(said)}
    )


# -- what comes back --------------------------------------------------------------------------


def bounded(spectrum: str) -> dict[str, float]:
    return {"bound": 0.7} if spectrum == "bounded" else {}


@every_method
@every_spectrum
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_into_the_stock_network(
    tmp_path: Path, method: str, spectrum: str, dtype: torch.dtype
) -> None:
    model = net(
        dtype=dtype, method=method, spectrum=spectrum, bound=0.7 if spectrum == "bounded" else 1.0
    )
    save(model, tmp_path / "a.safetensors")
    other = load(tmp_path / "a.safetensors", into=Net().to(dtype)).eval()
    close(other(image(dtype)), model(image(dtype)))
    assert other.one.spectral_weight is other.two.spectral_weight
    assert other.scale is other.again
    assert str(summary(other)) == str(summary(model))
    assert is_together(other)
    assert isinstance(other.last, nn.Linear)
    for one, two in zip(other.parameters(), model.parameters(), strict=True):
        assert (type(one), one.shape, one.dtype) == (type(two), two.shape, two.dtype)
    for a, b in zip(other.modules(), model.modules(), strict=True):
        if isinstance(a, SpectralWeight):
            assert a.get_extra_state().equal(b.get_extra_state())
            assert float(a.tt().detach().orthonormality_error()) < 20 * torch.finfo(dtype).eps


@every_method
def test_into_one_that_is_compressed_already(tmp_path: Path, method: str) -> None:
    model = net(0, method=method)
    save(model, tmp_path / "a.safetensors")
    other = net(1, method=method)
    parameters = list(other.parameters())
    assert load(tmp_path / "a.safetensors", into=other) is other
    assert all(a is b for a, b in zip(other.parameters(), parameters, strict=True))
    close(other(image()), model(image()))


def test_charts_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = net()
    save(model, tmp_path / "a.safetensors")
    other = load(tmp_path / "a.safetensors", into=Net()).eval()
    for (name, a), (_, b) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_exact_points_go_on_training_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(image()).square().mean().backward()
        optimizer.step()

    model = net(method="riemannian")
    optimizer = RiemannianAdam(model.parameters(), lr=0.01)
    step(model, optimizer)
    save(model, tmp_path / "a.safetensors", exact=True)
    other = load(tmp_path / "a.safetensors", into=Net()).eval()
    second = RiemannianAdam(other.parameters(), lr=0.01)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(model, optimizer)
        step(other, second)
    assert torch.equal(model(image()), other(image()))


@every_method
@every_spectrum
@pytest.mark.parametrize("kind", ["sttp", "svdp"])
def test_a_file_holds_no_more_numbers_than_the_dimension_and_what_is_dense(
    tmp_path: Path, method: str, spectrum: str, kind: str
) -> None:
    model = net(
        method=method, spectrum=spectrum, kind=kind, bound=0.7 if spectrum == "bounded" else 1.0
    )
    save(model, tmp_path / "a.safetensors")
    total = summary(model).total
    beside = model.shift.numel() + 1  # a buffer of its own, and num_batches_tracked
    redundant = 2 if spectrum == "normalized" else 0  # its scale, in each of two weights
    numbers = sum(t.numel() for t in load_file(tmp_path / "a.safetensors").values())
    assert numbers == total.dimension + redundant + beside


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    model = net(method=method).to(dtype)
    save(model, tmp_path / "a.safetensors")
    other = load(tmp_path / "a.safetensors", into=Net().to(dtype)).eval()
    assert {p.dtype for p in other.parameters()} == {dtype}
    W, V = model.one.weight.float(), other.one.weight.float()
    assert (W - V).norm() < 4 * torch.finfo(dtype).eps * W.norm()
    wide = load(tmp_path / "a.safetensors", into=Net()).eval()
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert float(wide.one.spectral_weight.tt().detach().orthonormality_error()) < 1e-6


@every_method
def test_a_skeleton_takes_dtypes_and_memory_from_the_file(tmp_path: Path, method: str) -> None:
    model = net(method=method).to(torch.bfloat16)
    model.norm.float()
    save(model, tmp_path / "a.safetensors")
    with torch.device("meta"):
        other = Net().eval()
    other = load(tmp_path / "a.safetensors", into=other)
    assert not any(t.is_meta for t in (*other.parameters(), *other.buffers()))
    assert [p.dtype for p in other.parameters()] == [p.dtype for p in model.parameters()]
    assert other.scale is other.again
    assert torch.equal(other.shift, model.shift)
    with torch.device("meta"):
        third = net(method=method, init="eye")
    third = load(tmp_path / "a.safetensors", into=third)
    assert not any(t.is_meta for t in (*third.parameters(), *third.buffers()))
    assert torch.equal(third.one.weight, other.one.weight)


def test_frozen_weights_modes_hooks_and_marks_are_those_of_the_network(tmp_path: Path) -> None:
    model = net()
    save(model, tmp_path / "a.safetensors")
    other, seen = Net(), []
    other.conv.weight.requires_grad_(False)
    other.one.weight.mark = "kept"
    other.conv.register_forward_hook(lambda *args: seen.append(1))
    other = load(tmp_path / "a.safetensors", into=other)
    assert other.training
    assert not other.conv.spectral_weight.trainable
    assert other.conv.bias.requires_grad
    assert other.one.spectral_weight.trainable
    assert next(other.one.spectral_weight.parameters()).mark == "kept"
    other(image())
    assert seen


def test_a_single_layer_a_weight_and_a_network_without_spectral_ones(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    layer = SpectralLinear(20, 12, 3, init="random")
    save(layer, path)
    made = load(path, into=nn.Linear(20, 12))
    assert isinstance(made, SpectralLinear)
    assert torch.equal(made.weight, layer.weight)
    weight = make_weight("riemannian", TTShape.svd(6, 5, 2), "identity", "random")
    save(weight, path)
    other = make_weight("riemannian", TTShape.svd(6, 5, 2), "identity", "random")
    assert load(path, into=other) is other
    close(other(), weight())
    plain = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    save(plain, path)
    assert torch.equal(load(path, into=copy.deepcopy(plain))[0].weight, plain[0].weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_a_compiled_network_is_its_own(tmp_path: Path) -> None:
    model = net()
    save(torch.compile(model), tmp_path / "a.safetensors")
    assert set(header(tmp_path / "a.safetensors")["layers"]) == {"conv", "one", "two"}
    other = Net().eval()
    load(tmp_path / "a.safetensors", into=torch.compile(other))
    close(other(image()), model(image()))


@every_method
def test_weights_behind_tensors_of_modules_that_stay(tmp_path: Path, method: str) -> None:
    """A stack of three, one of them shared with another module."""

    def attention() -> nn.ModuleDict:
        torch.manual_seed(0)
        one, two = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        two.in_proj_weight = one.in_proj_weight
        return nn.ModuleDict({"one": one, "two": two})

    model, view = attention(), MatrixView((24, 8), count=3)
    weight = Recipe(rank=3, method=method, init="pretrained").make_behind(
        model["one"].in_proj_weight, view
    )
    for module in model.values():
        put_behind(module, {"in_proj_weight": HeldWeight(weight, view)})
    save(model, tmp_path / "a.safetensors")
    other = load(tmp_path / "a.safetensors", into=attention())
    assert type(other["one"]).__name__ == "ParametrizedMultiheadAttention"
    assert len(weights_of(other["one"])) == 3
    held = [module.parametrizations.in_proj_weight[0].weight for module in other.values()]
    assert held[0] is held[1]
    x = torch.randn(2, 5, 8)
    for name in model:
        close(other[name](x, x, x)[0], model[name](x, x, x)[0])
    again = load(tmp_path / "a.safetensors", into=other)
    assert again is other
    wrong = attention()
    wrong["two"] = nn.MultiheadAttention(4, 2)
    with pytest.raises(ConversionError, match=r"'two'.*\(12, 4\)"):
        load(tmp_path / "a.safetensors", into=wrong)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.sampled_from(SPECTRA),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_any_plan(
    tmp_path_factory: Any, method: str, spectrum: str, out: Any, inside: Any, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    path = tmp_path_factory.mktemp("plan") / "a.safetensors"
    shape, double = TTShape(out, inside, rank=rank), torch.float64
    weight = make_weight(method, shape, spectrum, "random", dtype=double)
    with torch.no_grad():
        for p in weight.parameters():
            if method == "householder":
                p.add_(torch.randn_like(p))
    save(weight, path)
    other = load(path, into=make_weight(method, shape, spectrum, dtype=double))
    torch.testing.assert_close(other(), weight(), rtol=1e-10, atol=1e-10)


# -- what does not fit ------------------------------------------------------------------------


def wider() -> nn.Module:
    model = Net()
    model.one = nn.Linear(12, 21)
    model.two = nn.Linear(12, 20)
    return model


REFUSED: dict[str, tuple[Any, list[str]]] = {
    "another size": (wider, ["'one'", "(21, 12)", "20 x 12"]),
    "another type": (
        lambda: replaced("one", nn.Identity()),
        ["'one'", "Identity", "SpectralLinear"],
    ),
    "no such module": (lambda: nn.Sequential(nn.Linear(3, 3)), ["'conv'", "no module"]),
    "another rank": (lambda: net(rank=2), ["ranks", "rank=3", "without spectral layers"]),
    "another spectrum": (lambda: net(spectrum="full"), ["spectrum='full'", "spectrum='free'"]),
    "another method": (lambda: net(method="riemannian"), ["switch(model, 'householder')"]),
    "more spectral layers": (
        lambda: compress(Net(), rank=3, grow="allow"),
        ["'last", "decompress(model)"],
    ),
    "no ties": (lambda: untied(), ["shared by other layers"]),
    "fewer tensors": (
        lambda: replaced("norm", nn.Identity()), ["not in the network", "'norm.bias'"]
    ),
    "more tensors": (
        lambda: replaced("extra", nn.Linear(2, 2)), ["not in the file", "'extra.bias'"]
    ),
    "another bias": (lambda: replaced("last", nn.Linear(20, 9)), ["'last.", "(9,"]),
    "a parametrized layer": (
        lambda: parametrized(),
        ["'one'", "remove_parametrizations"],
    ),
}  # fmt: skip


def replaced(name: str, module: nn.Module) -> nn.Module:
    model = Net()
    setattr(model, name, module)
    return model


def untied() -> nn.Module:
    return compress(Net(tied=False), rank=3, skip=["last"], grow="allow")


def parametrized() -> nn.Module:
    model = Net(tied=False)
    nn.utils.parametrizations.orthogonal(model.one)
    return model


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_has_changed(tmp_path: Path, case: Any) -> None:
    make, words = case
    save(net(), tmp_path / "a.safetensors")
    other = make()
    before = copy.deepcopy(other.state_dict())
    modules = list(other.modules())
    with pytest.raises(ConversionError) as caught:
        load(tmp_path / "a.safetensors", into=other)
    for word in (*words, "a.safetensors"):
        assert word in str(caught.value)
    assert all(a is b for a, b in zip(other.modules(), modules, strict=True))
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_ties_of_the_network_that_the_file_has_not(tmp_path: Path) -> None:
    save(Net(tied=False), tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match="untie"):
        load(tmp_path / "a.safetensors", into=Net())
    save(Net(tied=True), tmp_path / "a.safetensors")
    other = load(tmp_path / "a.safetensors", into=Net(tied=False))
    assert torch.equal(other.again, other.scale)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"one": torch.ones(3)}, path)
    with pytest.raises(ConversionError, match=r"load_file\(.*compress"):
        load(path, into=Net())
    path.write_bytes(b"not at all")
    with pytest.raises(ConversionError, match="no whole safetensors file"):
        load(path, into=Net())
    save(net(), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConversionError, match="no whole safetensors file"):
        load(path, into=Net())
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "b.safetensors", into=Net())
    with pytest.raises(TypeError, match="path"):
        load(3, into=Net())  # type: ignore[arg-type]


def test_later_versions_bad_numbers_and_damaged_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(net(method="riemannian"), path, exact=True)
    said = header(path)
    point = load_file(path)["one.spectral_weight.point"]
    key = "one.spectral_weight.point"
    for tensor, words in ((2 * point, "orthonormal"), (point * torch.nan, "not finite")):
        rewrite(path, said, **{key: tensor})
        with pytest.raises(ConversionError, match=words):
            load(path, into=Net())
    rewrite(path, said, **{key: point[:-1].clone()})
    with pytest.raises(ConversionError, match="damaged"):
        load(path, into=Net())
    rewrite(path, said | {"format": 99}, **{key: point})
    with pytest.raises(ConversionError, match="update the package"):
        load(path, into=Net())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.sampled_from(["a", "free"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("a"), inner, max_size=1),
    max_leaves=3,
)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_headers_of_anybody_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever one entry of the header is: the network is loaded, or an error of ours says no."""
    path = tmp_path / "a.safetensors"
    model = net(spectrum=data.draw(st.sampled_from(["identity", "bounded", "fixed"])))
    save(model, path)
    said = header(path)
    place, key, holder = said, "", {"": said}
    while isinstance(place, (dict, list)) and place and (place is said or data.draw(st.booleans())):
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key, holder = data.draw(st.sampled_from(keys)), place
        place = place[key]
    if data.draw(st.booleans()) and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = data.draw(JSON)
    rewrite(path, said)
    with contextlib.suppress(ConversionError):
        load(path, into=Net())


def test_what_no_file_of_tensors_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(ConversionError, match="pickle"):
        save(Odd(2, 2), path)
    with pytest.raises(ConversionError, match="no numbers"):
        save(nn.Linear(2, 2, device="meta"), path)
    with pytest.raises(ConversionError, match="no numbers"):
        save(SpectralLinear(6, 4, 2, device="meta"), path)
    with pytest.raises(ConversionError, match="no numbers"):
        save(nn.LazyLinear(2), path)
    sparse = nn.Module()
    sparse.register_buffer("a", torch.eye(3).to_sparse())
    with pytest.raises(ConversionError, match="sparse"):
        save(sparse, path)
    broken = SpectralLinear(6, 4, 2)
    with torch.no_grad():
        broken.spectral_weight.coordinates[0] = torch.nan
    with pytest.raises(ConversionError, match="not finite"):
        save(broken, path)
    assert not list(tmp_path.iterdir())


def test_a_skeleton_with_buffers_that_no_file_holds(tmp_path: Path) -> None:
    model = Net()
    save(net(), tmp_path / "a.safetensors")
    model.register_buffer("loose", torch.ones(2), persistent=False)
    with pytest.raises(ConversionError, match="'loose'"):
        load(tmp_path / "a.safetensors", into=model.to("meta"))


def test_the_old_file_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save(net(0), path)
    before = path.read_bytes()

    def fails(tensors: Any, target: str, metadata: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("sttp_manifold.nn.saving.save_file", fails)
    with pytest.raises(OSError, match="space"):
        save(net(1), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(net(), path)
    with pytest.raises(ValueError, match=r"opcode|pickle"):
        list(pickletools.genops(path.read_bytes()))


@every_method
def test_views_and_memory_in_common(tmp_path: Path, method: str) -> None:
    model = compress(nn.Sequential(nn.Linear(20, 12)), rank=2, method=method)
    whole = torch.arange(12.0)
    model.register_buffer("whole", whole)
    model.register_buffer("part", whole[3:7])
    model.register_buffer("turned", whole.view(3, 4).T)
    model.register_buffer("flat", whole.view(3, 4))
    save(model, tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(20, 12))
    for name, buffer in list(model.named_buffers()):
        if "." not in name:
            other.register_buffer(name, torch.zeros_like(buffer))
    load(tmp_path / "a.safetensors", into=other)
    assert torch.equal(other.turned, whole.view(3, 4).T)
    assert torch.equal(other.part, whole[3:7])


def test_a_state_is_refused_by_another_plan_as_a_file_is(tmp_path: Path) -> None:
    """`load_state_dict` and `load` agree about what fits."""
    for how in ({"rank": 2}, {"spectrum": "full"}, {"kind": "svdp"}, {"method": "riemannian"}):
        other = net(**how)
        with pytest.raises(RuntimeError, match="does not fit"):
            other.load_state_dict(net().state_dict())
        save(net(), tmp_path / "a.safetensors")
        with pytest.raises(ConversionError, match="does not fit"):
            load(tmp_path / "a.safetensors", into=other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switch(other, "householder")
        load(tmp_path / "a.safetensors", into=other)
    assert all(w.method == "householder" for m in other.modules() for w in weights_of(m).values())


SMALL = {
    "Bert": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32},
    "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8},
}


@pytest.mark.parametrize("kind", SMALL)
def test_hugging_face_networks_and_their_ties(tmp_path: Path, kind: str) -> None:
    """Saved beside their configuration, and loaded into a network made from it."""
    transformers = pytest.importorskip("transformers")
    auto = "AutoModelForMaskedLM" if kind == "Bert" else "AutoModelForCausalLM"

    def make(config: Any) -> nn.Module:
        torch.manual_seed(0)
        return getattr(transformers, auto).from_config(config).eval()

    ends = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**ends, **SMALL[kind])
    model = compress(make(config), rank=4, kind="svdp", grow="allow")
    tokens = torch.arange(12).reshape(2, 6)
    model.config.save_pretrained(tmp_path)
    save(model, tmp_path / "spectral.safetensors")
    for where in ("cpu", "meta"):
        with torch.device(where):
            other = make(transformers.AutoConfig.from_pretrained(tmp_path))
        if where == "meta":  # buffers that no file holds
            for name, buffer in make(config).named_buffers():
                owner = other.get_submodule(name.rpartition(".")[0])
                owner._buffers[name.rpartition(".")[2]] = buffer
        other = load(tmp_path / "spectral.safetensors", into=other)
        with torch.no_grad():
            assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)
    inner, outer = other.get_input_embeddings(), other.get_output_embeddings()
    assert inner.spectral_weight is outer.spectral_weight
    # What transformers itself says, before anything of this package runs; docs/compress.md.
    with pytest.raises(TypeError, match="SpectralEmbedding"):
        other.resize_token_embeddings(70)
    with pytest.raises((AttributeError, ValueError), match=r"wte\.weight|word_embeddings\.weight"):
        other.tie_weights()
    with pytest.raises(RuntimeError, match="spectral_weight"):
        other.save_pretrained(tmp_path / "pretrained")
    logits = other(input_ids=tokens).logits
    decompress(other).resize_token_embeddings(70, mean_resizing=False)
    close(other(input_ids=tokens).logits[..., :60], logits)
    assert compress(other, rank=4, grow="allow").get_input_embeddings().num_embeddings == 70
