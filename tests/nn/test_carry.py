"""What hangs on a layer is carried over by every conversion, or refused by name."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from sttp_manifold.errors import ConversionError, OffManifoldError, ShapeError
from sttp_manifold.nn import (
    SkippedLayerWarning,
    SpectralConv2d,
    SpectralLayer,
    SpectralLinear,
    compress,
    decompress,
    switch,
)

DOUBLE: Any = {"dtype": torch.float64}
RANK = 1000

STOCK: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 6, **DOUBLE),
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1, **DOUBLE),
}
every_layer = pytest.mark.parametrize("make", STOCK.values(), ids=STOCK)


def example(layer: nn.Module) -> Tensor:
    torch.manual_seed(5)
    conv = isinstance(layer, (nn.Conv2d, SpectralConv2d))
    return torch.randn((2, 4, 5, 5) if conv else (3, 8), **DOUBLE)


def model_of(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Identity(), layer)


def there_and_back(layer: nn.Module, look: Callable[[nn.Module], None]) -> None:
    """Outputs stay, and `look` finds what it wants, on the spectral layer and on the stock one."""
    model, x = model_of(layer), example(layer)
    look(model[1])
    y = model(x)
    for change in (
        lambda m: compress(m, rank=RANK, grow="allow"),
        lambda m: switch(m, "riemannian"),
        lambda m: switch(m, "householder"),
        decompress,
    ):
        change(model)
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-10)
        look(model[1])
    assert type(model[1]) is type(layer)


def refused(layer: nn.Module, message: str, change: Callable[[nn.Module], Any]) -> None:
    """A conversion raises, names the layer, and has changed nothing."""
    model = model_of(layer)
    before = [*model.modules()], [*model.named_parameters()], dict(layer.__dict__)
    with pytest.raises(ConversionError, match=rf"'1.*{message}") as caught:
        change(model)
    assert caught.value.layer.startswith("1")
    assert [*model.modules()] == before[0]
    for (name, p), (other, q) in zip(model.named_parameters(), before[1], strict=True):
        assert name == other
        assert p is q
    assert layer.__dict__ == before[2]


# -- carried over ------------------------------------------------------------------------------


@every_layer
def test_attributes_that_a_hook_reads(make: Callable[[], nn.Module]) -> None:
    layer = make()
    layer.factor, layer.seen = 2.5, []
    object.__setattr__(layer, "me", layer)
    layer.scaled = MethodType(lambda self, y: y * self.factor, layer)

    def hook(module: Any, args: Any, y: Tensor) -> Tensor:
        module.seen.append(1)
        assert module.me is module
        return module.scaled(y)

    layer.register_forward_hook(hook)

    def look(module: Any) -> None:
        assert module.factor == 2.5
        assert module.seen is layer.seen
        assert module.scaled.__self__ is module

    there_and_back(layer, look)


@every_layer
def test_parameters_buffers_and_submodules(make: Callable[[], nn.Module]) -> None:
    layer = make()
    layer.register_parameter("scale", nn.Parameter(torch.tensor(2.0, **DOUBLE)))
    layer.register_parameter("nothing", None)
    layer.register_buffer("shift", torch.tensor(0.5, **DOUBLE))
    layer.register_buffer("steps", torch.tensor(3), persistent=False)
    layer.gate = nn.PReLU(**DOUBLE)
    layer.register_forward_hook(lambda m, _, y: m.gate(y * m.scale + m.shift))

    def look(module: Any) -> None:
        assert module.scale is layer.scale
        assert module.nothing is None
        assert module.shift is layer.shift
        assert module.gate is layer.gate
        keys = module.state_dict().keys()
        assert {"scale", "shift", "gate.weight"} <= keys
        assert "steps" not in keys
        assert {"steps", "shift"} <= dict(module.named_buffers()).keys()

    there_and_back(layer, look)


def test_a_stock_layer_on_a_stock_layer_is_converted_too() -> None:
    layer = nn.Linear(8, 6, **DOUBLE)
    layer.down, layer.up = nn.Linear(8, 2, False, **DOUBLE), nn.Linear(2, 6, False, **DOUBLE)
    layer.register_forward_hook(lambda m, args, y: y + m.up(m.down(args[0])))
    model, x = model_of(layer), example(layer)
    y = model(x)
    compress(model, rank=RANK)
    assert isinstance(model[1], SpectralLinear)
    assert isinstance(model[1].down, SpectralLinear)
    torch.testing.assert_close(model(x), y)
    decompress(model)
    assert type(model[1].up) is nn.Linear
    torch.testing.assert_close(model(x), y)


@every_layer
def test_every_kind_of_hook_and_its_handle(make: Callable[[], nn.Module]) -> None:
    layer, seen = make(), []
    note = lambda what: lambda *_, **__: seen.append(what)  # noqa: E731
    handles = [
        layer.register_forward_pre_hook(note("pre"), with_kwargs=True),
        layer.register_forward_hook(note("after"), with_kwargs=True, always_call=True),
        layer.register_full_backward_pre_hook(note("back pre")),
        layer.register_full_backward_hook(note("back")),
    ]
    model, x = model_of(layer), example(layer).requires_grad_()
    for change in (lambda m: compress(m, rank=RANK, grow="allow"), decompress):
        change(model)
        seen.clear()
        model(x).sum().backward()
        assert seen == ["pre", "after", "back pre", "back"]
    compress(model, rank=RANK, grow="allow")
    for handle in handles:
        handle.remove()
    seen.clear()
    model(x).sum().backward()
    assert not seen


@every_layer
def test_a_layer_of_its_own_copies_hooks(make: Callable[[], nn.Module]) -> None:
    layer, seen = make(), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    kind = SpectralLinear if isinstance(layer, nn.Linear) else SpectralConv2d
    made = kind.from_layer(layer, RANK)
    made.register_forward_hook(lambda *_: seen.append(2))
    back = made.to_layer()
    for module, wanted in ((layer, [1]), (made, [1, 2]), (back, [1, 2])):
        seen.clear()
        module(example(layer))
        assert seen == wanted


@every_layer
def test_marks_on_parameters(make: Callable[[], nn.Module]) -> None:
    layer = make()
    layer.weight.no_decay = True  # type: ignore[union-attr]
    model = model_of(layer)

    def marked() -> bool:
        bias = model[1].bias
        return all(getattr(p, "no_decay", False) for p in model.parameters() if p is not bias)

    compress(model, rank=RANK, grow="allow")
    assert marked()
    switch(model, "riemannian")
    assert marked()
    decompress(model)
    assert marked()
    assert not hasattr(model[1].weight, "manifold")


def test_references_that_torch_does_not_register() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8, **DOUBLE)
            self.plain = [self.fc]
            self.named = {"fc": self.fc, "other": 3}
            self.pair = (self.fc, "fc")
            self.call = self.fc.forward
            object.__setattr__(self, "hidden", self.fc)

        def forward(self, x: Tensor) -> Tensor:
            return self.call(self.hidden(self.pair[0](self.named["fc"](self.plain[0](x)))))

    model, x = Net(), torch.randn(3, 8, **DOUBLE)
    y, plain = model(x), model.plain
    for change, kind in ((lambda m: compress(m, rank=8), SpectralLinear), (decompress, nn.Linear)):
        change(model)
        assert type(model.fc) is kind
        assert model.plain is plain
        assert model.plain[0] is model.named["fc"] is model.pair[0] is model.hidden is model.fc
        assert model.call.__self__ is model.fc
        assert model.named["other"] == 3
        torch.testing.assert_close(model(x), y)


class Indirect(nn.Module):
    """A network that calls its layer by something else than its name."""

    def __init__(self, refer: Callable[[nn.Module], Any], call: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.fc = nn.Linear(8, 8, **DOUBLE)
        self.held = refer(self.fc)
        self.itself = [self]
        self._call = call

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self.held, x)


class Holder:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


Pair = namedtuple("Pair", "layer name")

FOLLOWED: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Tensor], Tensor]]] = {
    "nested": (lambda m: {"a": [(m, 1)]}, lambda h, x: h["a"][0][0](x)),
    "ordered dict": (lambda m: OrderedDict(a=m), lambda h, x: h["a"](x)),
    "deque": (lambda m: deque([m]), lambda h, x: h[0](x)),
    "named tuple": (lambda m: Pair(m, "fc"), lambda h, x: h.layer(x)),
    "partial": (lambda m: partial(m), lambda h, x: h(x)),
    "partial of a method": (lambda m: partial(m.forward), lambda h, x: h(x)),
    "partial with it": (lambda m: partial(lambda x, layer: layer(x), layer=m), lambda h, x: h(x)),
}
NOT_FOLLOWED: dict[str, Callable[[Any], Any]] = {
    "closure": lambda m: lambda x: m(x),
    "default": lambda m: eval("lambda x, m=m: m(x)", {"m": m}),
    "weak reference": weakref.ref,
    "object": Holder,
    "set": lambda m: {m},
    "in a list": lambda m: [Holder(m)],
}


@pytest.mark.parametrize(("refer", "call"), FOLLOWED.values(), ids=FOLLOWED)
def test_containers_and_partials_are_followed(refer: Any, call: Any) -> None:
    model, x = Indirect(refer, call), torch.randn(3, 8, **DOUBLE)
    y = model(x)
    for change in (lambda m: compress(m, rank=3), decompress):
        change(model)
        torch.testing.assert_close(model(x), model.fc(x))
        assert model.itself[0] is model
    assert not torch.allclose(model(x), y)  # the rank was low: this is not the old layer


@pytest.mark.parametrize("refer", NOT_FOLLOWED.values(), ids=NOT_FOLLOWED)
def test_references_that_cannot_be_followed_are_named(refer: Any) -> None:
    model = Indirect(refer, lambda h, x: x)
    before = model.fc
    with pytest.raises(ConversionError, match=r"'held' of the root module.*layer 'fc'") as caught:
        compress(model, rank=3)
    assert caught.value.layer == "fc"
    assert model.fc is before


def test_a_hook_that_holds_another_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    first = model[0]
    model[1].register_forward_hook(lambda m, _, y: y + first.weight.sum())
    with pytest.raises(ConversionError, match=r"'_forward_hooks' of '1'.*layer '0'"):
        compress(model, rank=3)
    assert [type(layer) for layer in model] == [nn.Linear] * 2


def test_a_part_of_another_parameter_is_left_with_a_warning() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model.register_parameter("both", nn.Parameter(torch.randn(16, 8)))
    model["a"].weight = nn.Parameter(model.both.detach()[4:12])
    with pytest.warns(SkippedLayerWarning, match=r"'a' shares its weight with 'both'"):
        compress(model, rank=2)
    assert [type(layer) for layer in model.values()] == [nn.Linear, SpectralLinear]


@every_layer
@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, torch.bool], ids=str
)
def test_weights_of_other_numbers_are_named(make: Any, dtype: torch.dtype) -> None:
    layer = make()
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    refused(layer, f"weight of {dtype}", lambda m: compress(m, rank=2))


def test_a_sparse_weight_and_an_empty_layer_are_named() -> None:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.eye(8).to_sparse())
    refused(layer, "layout torch.sparse_coo", lambda m: compress(m, rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it initializes nothing
        empty = nn.Linear(0, 8)
    with pytest.raises(ShapeError, match=r"'1'.*positive integer"):
        compress(model_of(empty), rank=2)


@pytest.mark.parametrize("wrap", [lambda p: [p], lambda p: (p,), lambda p: {"w": p}])
def test_a_tie_that_torch_does_not_register_is_left_with_a_warning(
    wrap: Callable[[Any], Any],
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.tied = wrap(model[0].weight)
    with pytest.warns(SkippedLayerWarning, match=r"'0' shares its weight with 'tied'"):
        compress(model, rank=2)
    assert [type(layer) for layer in model] == [nn.Linear, SpectralLinear]


# -- biases that are no parameters -------------------------------------------------------------


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "bias", 3)


def plain_tensor(layer: Any) -> None:
    bias = layer.bias.detach().clone()
    del layer.bias
    layer.bias = bias


def buffer(layer: Any) -> None:
    bias = layer.bias.detach().clone()
    del layer.bias
    layer.register_buffer("bias", bias, persistent=False)


def old_weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer, "bias")


BIASES = {"pruned": pruned, "tensor": plain_tensor, "buffer": buffer, "old norm": old_weight_norm}
every_bias = pytest.mark.parametrize("change", BIASES.values(), ids=BIASES)


@every_layer
@every_bias
def test_a_bias_that_is_no_parameter_is_carried(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], None]
) -> None:
    layer = make()
    change(layer)
    names = {name for name, _ in layer.named_parameters()} - {"weight"}
    stored = layer.state_dict().keys() - {"weight"}

    def look(module: Any) -> None:
        held = {n: p for n, p in module.named_parameters() if "weight" not in n or "bias" in n}
        assert held.keys() == names
        assert all(p is getattr(layer, n) for n, p in held.items())
        kept = {k for k in module.state_dict() if not k.startswith(("weight", "spectral_weight"))}
        assert kept == stored
        assert isinstance(module.bias, Tensor)

    there_and_back(layer, look)


@every_layer
@every_bias
def test_such_a_bias_by_from_layer_and_to_layer(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], None]
) -> None:
    layer = make()
    change(layer)
    kind = SpectralLinear if isinstance(layer, nn.Linear) else SpectralConv2d
    x = example(layer)
    made = kind.from_layer(layer, RANK)
    torch.testing.assert_close(made(x), layer(x))
    torch.testing.assert_close(made.to_layer()(x), layer(x))
    if change is pruned:
        prune.remove(made, "bias")
        assert isinstance(made.bias, nn.Parameter)
        torch.testing.assert_close(made(x), layer(x))


@every_layer
def test_a_frozen_and_a_shared_bias(make: Callable[[], nn.Module]) -> None:
    a, b = make(), make()
    a.bias.requires_grad_(False)  # type: ignore[union-attr]
    b.bias = a.bias
    model = nn.Sequential(a, b)
    compress(model, rank=RANK, grow="allow")
    assert model[0].bias is model[1].bias is a.bias
    decompress(model)
    assert model[0].bias is model[1].bias is a.bias


# -- refused by name ---------------------------------------------------------------------------


def patched(layer: nn.Module) -> None:
    layer.forward = MethodType(lambda self, x: x, layer)  # type: ignore[method-assign]


def compiled(layer: nn.Module) -> None:
    layer.compile(backend="eager")


def gone(layer: nn.Module) -> None:
    del layer.bias


def post_hook(layer: nn.Module) -> None:
    layer.register_state_dict_post_hook(lambda *_: None)


def number(layer: Any) -> None:
    del layer.bias
    layer.bias = 0.0


def parametrized_bias(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "bias", nn.Identity())


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "forward": (patched, "'forward' of its own"),
    "compiled": (compiled, "'_compiled_call_impl' of its own"),
    "extra_repr": (lambda m: setattr(m, "extra_repr", str), "'extra_repr' of its own"),
    "state-dict hook": (lambda m: m._register_state_dict_hook(print), "state-dict hook"),
    "state-dict pre-hook": (lambda m: m.register_state_dict_pre_hook(print), "pre-hook"),
    "state-dict post-hook": (
        lambda m: m.register_state_dict_post_hook(lambda *_: None),
        "state-dict hook",
    ),
    "load pre-hook": (lambda m: m.register_load_state_dict_pre_hook(print), "before load"),
    "load post-hook": (lambda m: m.register_load_state_dict_post_hook(print), "after load"),
    "no bias": (gone, "no bias at all"),
    "a number": (number, "bias that is a float"),
    "parametrized bias": (parametrized_bias, r"bias of .*remove_parametrizations\(layer, 'bias'\)"),
}


@every_layer
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_carried_is_refused(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], Any], message: str
) -> None:
    layer = make()
    made = compress(copy.deepcopy(layer), rank=RANK, grow="allow")
    change(layer)
    refused(layer, message, lambda m: compress(m, rank=RANK, grow="allow"))
    change(made)
    refused(made, message, decompress)


def grad_hook(layer: Any) -> None:
    layer.weight.register_hook(lambda g: 2 * g)


def accumulated_hook(layer: Any) -> None:
    layer.weight.register_post_accumulate_grad_hook(lambda p: None)


def own_weight(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(type("Int4", (Tensor,), {})))


COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 3), r"prune\.remove\(layer, 'weight'"),
    "new weight norm": (parametrizations.weight_norm, r"remove_parametrizations\(layer, 'weight'"),
    "new spectral norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "old spectral norm": (nn.utils.spectral_norm, r"remove_spectral_norm\(layer, 'weight'"),
    "grad hook": (grad_hook, "hook on the gradient"),
    "accumulated": (accumulated_hook, "hook on the gradient"),
    "a name that is taken": (lambda m: setattr(m, "weight_shape", 3), "give it another name"),
    "a submodule": (lambda m: m.add_module("spectral_weight", nn.Identity()), "another name"),
    "tensor subclass": (own_weight, "type Int4"),
}


@every_layer
@pytest.mark.parametrize(("change", "message"), COMPUTED.values(), ids=COMPUTED)
def test_weights_that_are_not_ordinary_are_refused(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], Any], message: str
) -> None:
    layer = make()
    change(layer)
    refused(layer, message, lambda m: compress(m, rank=RANK, grow="allow"))


@every_layer
def test_the_old_weight_norm_names_its_remover(make: Callable[[], nn.Module]) -> None:
    layer = make()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)
    refused(layer, r"remove_weight_norm\(layer, 'weight'", lambda m: compress(m, rank=RANK))


def other_value(weight: Any) -> None:
    kind = type(weight)
    weight.__class__ = type("Twice", (kind,), {"forward": lambda self: 2 * kind.forward(self)})


ON_WEIGHTS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "parametrized": (
        lambda w: parametrize.register_parametrization(
            w, next(n for n, _ in w.named_parameters(recurse=False)), nn.Identity()
        ),
        "remove_parametrizations",
    ),
    "grad hook": (lambda w: next(w.parameters()).register_hook(lambda g: g), "gradient"),
    "pruned": (
        lambda w: prune.l1_unstructured(w, next(n for n, _ in w.named_parameters()), 3),
        r"prune\.remove\(layer, '(coordinates|point)'",
    ),
    "class": (other_value, "Twice has a forward of its own"),
    "forward": (patched, "'forward' of its own"),
    "load hook": (lambda w: w.register_load_state_dict_pre_hook(print), "hook"),
}


@every_layer
@pytest.mark.parametrize("method", ["householder", "riemannian"])
@pytest.mark.parametrize(("change", "message"), ON_WEIGHTS.values(), ids=ON_WEIGHTS)
def test_what_hangs_on_a_spectral_weight_is_refused(
    make: Callable[[], nn.Module], method: str, change: Callable[[nn.Module], Any], message: str
) -> None:
    made: Any = compress(make(), rank=RANK, grow="allow", method=method)
    if change is ON_WEIGHTS["pruned"][0] and method == "riemannian":
        with pytest.raises(OffManifoldError, match="ManifoldParameter"):
            change(made.spectral_weight)
        return
    change(made.spectral_weight)
    other = {"householder": "riemannian", "riemannian": "householder"}[method]
    refused(made, message, lambda m: switch(m, other))
    refused(made, message, decompress)


@every_layer
def test_hooks_on_a_spectral_weight_go_along_or_are_refused(make: Callable[[], nn.Module]) -> None:
    made, seen = compress(make(), rank=RANK, grow="allow"), []
    assert isinstance(made, SpectralLayer)
    made.spectral_weight.mark = "kept"
    switch(made, "riemannian")
    assert made.spectral_weight.mark == "kept"
    made.spectral_weight.register_forward_hook(lambda *_: seen.append(1))
    switch(made, "householder")
    made.spectral_weight()
    assert seen == [1]
    refused(made, "a hook, and no module takes its place", decompress)


def test_a_subclass_with_a_forward_of_its_own_is_refused_and_another_one_is_not() -> None:
    class Twice(SpectralLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Named(SpectralLinear):
        def __init__(self, name: str) -> None:
            super().__init__(8, 6, 3)
            self.name = name

    refused(Twice(8, 6, 3), "forward of its own", decompress)
    model = decompress(model_of(Named("mine")))
    assert type(model[1]) is nn.Linear
    assert model[1].name == "mine"


def test_subclasses_of_stock_layers_with_a_forward_of_their_own_are_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Standardized(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight / weight.std(), bias)

    class Named(nn.Linear):
        name = "mine"

    with pytest.raises(ConversionError, match=r"Doubled is .* with a forward of its own"):
        SpectralLinear.from_layer(Doubled(8, 6), 3)
    with pytest.raises(
        ConversionError, match=r"Standardized is .* with a _conv_forward of its own"
    ):
        SpectralConv2d.from_layer(Standardized(4, 6, 3), 3)
    made = SpectralLinear.from_layer(Named(8, 6, **DOUBLE), RANK)
    assert made.weight.shape == (6, 8)


def test_a_padding_that_was_changed_afterwards_is_what_torch_does_or_an_error() -> None:
    for mode in ("zeros", "circular"):
        layer = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode, **DOUBLE)
        layer.padding = (2, 2)
        x = torch.randn(2, 4, 5, 5, **DOUBLE)
        if mode == "zeros":
            torch.testing.assert_close(SpectralConv2d.from_layer(layer, RANK)(x), layer(x))
        else:
            refused(layer, "make it anew", lambda m: compress(m, rank=2))
    layer = nn.Conv2d(4, 6, 3, **DOUBLE)
    layer.stride = (2, 1)
    torch.testing.assert_close(SpectralConv2d.from_layer(layer, RANK)(x), layer(x))


def test_a_compiled_layer_is_named_and_a_compiled_network_is_not() -> None:
    model = nn.Sequential(nn.Linear(8, 8), torch.compile(nn.Linear(8, 8), backend="eager"))
    before = list(model.modules())
    with pytest.raises(ConversionError, match=r"'1' is torch\.compile's"):
        compress(model, rank=3)
    assert list(model.modules()) == before
    whole = torch.compile(nn.Sequential(nn.Linear(8, 8)), backend="eager")
    compress(whole, rank=3)
    assert isinstance(whole._orig_mod[0], SpectralLinear)


@pytest.mark.parametrize("hold", ["buffer", "attribute", "list"])
def test_memory_that_a_buffer_or_an_attribute_shares_is_left_with_a_warning(hold: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    view = model[0].weight.detach().T
    if hold == "buffer":
        model.register_buffer("view", view)
    else:
        model.view = view if hold == "attribute" else [view]
    with pytest.warns(SkippedLayerWarning, match="'0' shares its weight with 'view'"):
        compress(model, rank=2)
    assert [type(layer) for layer in model] == [nn.Linear, SpectralLinear]


@every_layer
@pytest.mark.parametrize("form", ["dense", "factors"])
def test_conversions_do_not_look_at_autocast_or_inference_mode(make: Any, form: str) -> None:
    stock = make().float()
    wanted = stock.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        made = compress(copy.deepcopy(stock), rank=RANK, grow="allow")
        switch(made, "riemannian")
        close = made.weight
        switch(made, "householder")
        low = compress(copy.deepcopy(stock), rank=2)
        back, thin = decompress(made), decompress(low, form=form)
    for W in (close, back.weight):
        torch.testing.assert_close(W.float(), wanted, rtol=0, atol=1e-5)
    for model in (back, thin):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        model(example(stock).float()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
