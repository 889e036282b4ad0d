"""When layers keep a weight between forwards without gradient, and who sees it."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from networks_together import (
    DOUBLE,
    agree,
    alone,
    every_method,
    every_spectrum,
    fresh,
    image,
    keeping_nothing,
    made,
    run,
    run_script,
    snapshots,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sttp_manifold.errors import ShapeError
from sttp_manifold.nn import (
    HouseholderWeight,
    SpectralConv2d,
    SpectralLayer,
    SpectralLinear,
    batch,
    kept,
    scope,
    together,
)
from sttp_manifold.nn.kept import _records
from sttp_manifold.nn.weight import SpectralWeight

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def layer_of(
    method: str = "householder", kind: str = "sttp", spectrum: str = "free"
) -> SpectralLinear:
    torch.manual_seed(0)
    how = {"method": method, "kind": kind, "spectrum": spectrum, "init": "random", **DOUBLE}
    return SpectralLinear(60, 48, 6, **how).eval()


def vectors(count: int = 5) -> Tensor:
    return torch.randn(count, 60, generator=torch.Generator().manual_seed(3), **DOUBLE)


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[SpectralWeight]:
    """Weights that are formed, each time that one is."""
    log: list[SpectralWeight] = []
    form = SpectralWeight._value

    def spy(self: SpectralWeight) -> object:
        log.append(self)
        return form(self)

    monkeypatch.setattr(SpectralWeight, "_value", spy)
    return log


def without_gradient(module: nn.Module, x: Tensor, times: int = 1) -> Tensor:
    with torch.no_grad():
        for _ in range(times):
            y = module(x)
    return y


@every_method
@every_spectrum
@pytest.mark.parametrize("kind", ["sttp", "svdp"])
def test_the_third_forward_forms_nothing(
    method: str, spectrum: str, kind: str, formed: list[SpectralWeight]
) -> None:
    layer, x = layer_of(method, kind, spectrum), vectors()
    wanted = nn.functional.linear(x, layer.weight, layer.bias).detach()
    formed.clear()
    for count in (1, 2, 2, 2):
        y = without_gradient(layer, x)
        assert len(formed) == count
        torch.testing.assert_close(y, wanted, **CLOSE)
    assert snapshots(layer) != [None]


@every_method
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [3, 40])
def test_convolutions(method: str, groups: int, size: int, formed: list[SpectralWeight]) -> None:
    how = {"method": method, "init": "random", "padding_mode": "circular", **DOUBLE}
    layer = SpectralConv2d(8, 12, 3, 4, padding=1, groups=groups, **how)
    x = torch.randn(2, 8, size, size, **DOUBLE)
    wanted = layer.to_layer()(x).detach()
    formed.clear()
    for _ in range(4):
        torch.testing.assert_close(without_gradient(layer, x), wanted, **CLOSE)
    assert len(formed) == 2


def test_the_form_follows_the_number_of_vectors(formed: list[SpectralWeight]) -> None:
    """One vector takes ``W`` of a small layer, many take its factors."""
    layer = layer_of()
    without_gradient(layer, vectors(1), 3)
    assert set(snapshots(layer)[0].forms) == {"dense"}
    many = vectors(1000)
    torch.testing.assert_close(without_gradient(layer, many), fresh(layer, many), **CLOSE)
    assert set(snapshots(layer)[0].forms) == {"dense", "factors"}
    formed.clear()
    for count in (1, 1000):
        without_gradient(layer, vectors(count))
    assert not formed


def test_what_is_kept_is_no_larger_than_it_need_be() -> None:
    for size, rank, form in ((256, 8, "factors"), (256, 128, "dense"), (256, 200, "dense")):
        layer = SpectralLinear(size, size, rank)
        without_gradient(layer, torch.randn(32, size), 2)
        (snapshot,) = snapshots(layer)
        assert set(snapshot.forms) == {form}
        count = sum(t.numel() for t in snapshot.forms[form])
        assert count == min(size * size, 2 * size * rank)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in snapshot.forms[form])


@every_method
def test_training_keeps_nothing(method: str) -> None:
    layer, x = layer_of(method), vectors()
    without_gradient(layer, x, 3)
    assert snapshots(layer) != [None]
    layer(x).sum().backward()
    assert layer.spectral_weight not in _records
    for _ in range(4):
        without_gradient(layer, x)
        layer(x)
        assert snapshots(layer) == [None]


@every_method
def test_parameters_that_move_are_not_copied(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop without gradient that changes parameters, as evolution strategies do."""
    copies: list[Tensor] = []
    of = kept.Bytes.of.__func__
    monkeypatch.setattr(kept.Bytes, "of", classmethod(lambda c, t: copies.append(t) or of(c, t)))
    layer, x = layer_of(method), vectors()
    p = next(layer.spectral_weight.parameters())
    with torch.no_grad():
        for _ in range(6):
            layer(x)
            p.mul_(1.01)
        assert not copies
        kept_at = []
        for step in range(200):  # nothing but the values tells these changes
            torch.testing.assert_close(layer(x), fresh(layer, x), **CLOSE)
            if copies:
                kept_at.append(step)
                copies.clear()
            p.data.mul_(1.001)
    assert 0 < len(kept_at) < 10
    without_gradient(layer, x, 70)
    assert snapshots(layer) != [None]


@every_method
@pytest.mark.parametrize("count", [1, 1000])
def test_callers_own_what_they_get(method: str, count: int) -> None:
    layer, x = layer_of(method), vectors(count)
    wanted = without_gradient(layer, x, 3)
    weight = layer.spectral_weight
    stored = {p.untyped_storage().data_ptr() for p in weight.parameters()}
    with torch.no_grad():
        for _ in range(2):
            tt = weight.tt()
            given = [weight(), *weight.factors(), layer.weight, layer(x), *tt.left, *tt.right]
            for tensor in given:
                if tensor.untyped_storage().data_ptr() not in stored:  # the cores of a point are
                    tensor.zero_()
            torch.testing.assert_close(layer(x), wanted, **CLOSE)


def test_copies_and_pickles_take_nothing_along() -> None:
    layer, x = layer_of(), vectors()
    sizes = [len(pickle.dumps(layer)), len(pickle.dumps(layer.state_dict()))]
    attributes = set(vars(layer.spectral_weight))
    wanted = without_gradient(layer, x, 3)
    assert sizes == [len(pickle.dumps(layer)), len(pickle.dumps(layer.state_dict()))]
    assert attributes == set(vars(layer.spectral_weight))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        copy.copy(layer.spectral_weight),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert snapshots(other) == [None]
        if isinstance(other, SpectralLayer):
            torch.testing.assert_close(without_gradient(other, x, 3), wanted)
    assert snapshots(layer) != [None]


def test_a_weight_is_freed_when_it_is_let_go() -> None:
    layer = layer_of()
    without_gradient(layer, vectors(), 3)
    before = len(_records)
    del layer
    assert len(_records) == before - 1


@pytest.mark.parametrize("where", ["hook", "pre-hook", "global hook", "global pre-hook", "forward"])
def test_hooks_on_a_weight_are_run(where: str) -> None:
    layer = SpectralConv2d(8, 12, 3, 4, groups=2, init="random", **DOUBLE)  # asks for W itself
    x = torch.randn(2, 8, 5, 5, **DOUBLE)
    without_gradient(layer, x, 3)
    assert all(snapshots(layer))
    weight, calls = layer.spectral_weight, []

    def note(module: nn.Module, *_: object) -> None:
        if module is weight:
            calls.append(module)

    torch_hooks = nn.modules.module
    register = {
        "hook": weight.register_forward_hook,
        "pre-hook": weight.register_forward_pre_hook,
        "global hook": torch_hooks.register_module_forward_hook,
        "global pre-hook": torch_hooks.register_module_forward_pre_hook,
    }
    if where == "forward":
        forward = weight.forward
        weight.forward = lambda: note(weight) or forward()
    else:
        handle = register[where](note)
    without_gradient(layer, x, 3)
    assert calls == [weight] * 3
    if where == "forward":
        del weight.forward
    else:
        handle.remove()
    without_gradient(layer, x, 3)
    assert len(calls) == 3


def test_subclasses_form_their_own() -> None:
    class Twice(HouseholderWeight):
        method = "twice"

        def forward(self) -> Tensor:
            return 2 * super().forward()

        def factors(self) -> tuple[Tensor, Tensor]:
            us, vt = super().factors()
            return 2 * us, vt

    weight = Twice(layer_of().spectral_weight.shape, **DOUBLE)
    layer = SpectralLinear(60, 48, weight=weight, **DOUBLE)
    for _ in range(4):
        without_gradient(layer, vectors(1))
    assert weight not in _records


def test_layers_share_what_is_kept_of_a_shared_weight(formed: list[SpectralWeight]) -> None:
    first = layer_of()
    second = SpectralLinear(60, 48, weight=first.spectral_weight, **DOUBLE)
    x = vectors()
    without_gradient(first, x, 2)
    formed.clear()
    y = without_gradient(second, x)
    assert not formed
    torch.testing.assert_close(y, fresh(second, x), **CLOSE)


def test_threads() -> None:
    """Some infer, one changes parameters and back, one trains."""
    layer, x = layer_of(), vectors()
    p = layer.spectral_weight.coordinates
    values = [p.detach().clone(), 1.5 * p.detach()]
    wanted = []
    for value in values:
        p.data.copy_(value)
        wanted.append(fresh(layer, x))
    errors: list[BaseException] = []
    lock = threading.Lock()

    def infer(times: int) -> None:
        try:
            for _ in range(times):
                with torch.no_grad(), lock:  # a write in the middle of a forward is anybody's guess
                    y, now = layer(x), int(torch.equal(p, values[1]))
                torch.testing.assert_close(y, wanted[now], **CLOSE)
        except BaseException as error:
            errors.append(error)

    def write(times: int) -> None:
        for k in range(times):
            with lock:
                p.data.copy_(values[k % 2])

    def train(times: int) -> None:
        for _ in range(times):
            layer(x)

    threads = [
        threading.Thread(target=work, args=(times,))
        for work, times in ((infer, 150), (infer, 150), (write, 50), (train, 50))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_write_while_a_weight_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, say, and then back to what it was."""
    layer, x = layer_of(), vectors()
    wanted = without_gradient(layer, x)
    p, form = layer.spectral_weight.coordinates, SpectralWeight._value
    old = p.detach().clone()

    def interrupted(self: SpectralWeight) -> object:
        p.data.mul_(1.5)
        return form(self)

    with monkeypatch.context() as patched:
        patched.setattr(SpectralWeight, "_value", interrupted)
        without_gradient(layer, x)
    p.data.copy_(old)
    for _ in range(4):
        torch.testing.assert_close(without_gradient(layer, x), wanted, **CLOSE)


def test_replicas_of_data_parallel_keep_nothing() -> None:
    layer, x = layer_of(), vectors()
    wanted = without_gradient(layer, x, 3)
    weight = layer.spectral_weight
    for _ in range(3):
        replica, inner = layer._replicate_for_data_parallel(), weight._replicate_for_data_parallel()
        frames = weight.frames._replicate_for_data_parallel()
        for name, p in weight.frames.named_parameters():
            setattr(frames, name, p.detach() * 2)
        inner.coordinates = weight.coordinates.detach() * 2
        replica.bias = layer.bias.detach()
        inner._modules["frames"], replica._modules["spectral_weight"] = frames, inner
        y = without_gradient(replica, x)
        assert inner not in _records or _records[inner].snapshot is None
        assert not torch.allclose(y, wanted)
        torch.testing.assert_close(without_gradient(layer, x), wanted, **CLOSE)


def test_autocast() -> None:
    layer, x = layer_of().float(), vectors().float()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = fresh(layer, x)
        for _ in range(3):
            y = without_gradient(layer, x)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.05)
    (snapshot,) = snapshots(layer)
    assert all(t.dtype == torch.float32 for form in snapshot.forms.values() for t in form)
    exact = fresh(copy.deepcopy(layer).double(), x.double()).float()
    torch.testing.assert_close(without_gradient(layer, x), exact, rtol=1e-5, atol=1e-6)


def test_inference_mode_and_afterwards() -> None:
    layer, x = layer_of(), vectors()
    with torch.inference_mode():
        for _ in range(3):
            layer(x)
    (snapshot,) = snapshots(layer)
    assert not any(t.is_inference() or t.requires_grad for f in snapshot.forms.values() for t in f)
    y = without_gradient(layer, x)
    assert not y.is_inference()
    head = nn.Linear(48, 2, **DOUBLE)
    head(y).sum().backward()
    layer(x).sum().backward()
    assert layer.spectral_weight.coordinates.grad is not None
    assert layer.spectral_weight not in _records


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = layer_of()
        for _ in range(3):
            torch.testing.assert_close(layer(vectors()), fresh(layer, vectors()), **CLOSE)
    assert snapshots(layer) == [None]


@pytest.mark.parametrize("count", [4, 1000])
def test_wrong_inputs_are_refused_as_ever(count: int) -> None:
    layer = SpectralLinear(512, 512, 16, **DOUBLE)
    good = torch.randn(count, 512, **DOUBLE)
    bad = [good.float(), good[:, :-1], good.int(), torch.tensor(1.0, **DOUBLE)]

    def errors() -> list[type[Exception]]:
        found = []
        for x in bad:
            with pytest.raises((RuntimeError, ShapeError)) as caught:
                without_gradient(layer, x)
            found.append(caught.type)
        return found

    with keeping_nothing():
        wanted = errors()
    without_gradient(layer, good, 3)
    assert snapshots(layer) != [None]
    assert errors() == wanted
    assert (ShapeError in wanted) == (count == 4)
    assert without_gradient(layer, good[:0], 3).shape == (0, 512)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_transforms_tracing_and_counters() -> None:
    layer, x = layer_of(), vectors()
    wanted = without_gradient(layer, x, 3)
    named = {k: v.detach() for k, v in layer.named_parameters()}
    with torch.no_grad():
        rows = torch.func.vmap(lambda row: layer(row))(x)
        torch.testing.assert_close(rows, wanted, **CLOSE)
        call = lambda p: torch.func.functional_call(layer, p, (x,))  # noqa: E731
        y, _ = torch.func.jvp(call, (named,), (named,))
        torch.testing.assert_close(y, wanted, **CLOSE)
        exported = torch.export.export(layer, (x,)).module()
        for p in layer.parameters():
            p.mul_(1.5)
        other = copy.deepcopy(layer)
        exported.load_state_dict(other.state_dict())
        torch.testing.assert_close(exported(x), fresh(other, x), **CLOSE)
        counts = []
        for _ in range(4):
            with FlopCounterMode(display=False) as counter:
                layer(x)
            counts.append(counter.get_total_flops())
        assert len(set(counts)) == 1


COMPILED = """
import torch
from sttp_manifold.nn import SpectralLinear
from sttp_manifold.nn.kept import _records
layer = SpectralLinear(60, 48, 6, init="random", dtype=torch.float64)
x = torch.randn(5, 60, dtype=torch.float64)
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
with torch.no_grad():
    for _ in range(3):
        layer(x)
    for _ in range(3):
        assert _records[layer.spectral_weight].snapshot is not None
        wanted = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(compiled(x), wanted)
        torch.testing.assert_close(layer(x), wanted)
        layer.spectral_weight.frames[0].add_(0.1)
        for _ in range(3):
            layer(x)
"""


@pytest.mark.slow
def test_compiled_layers_form_their_own() -> None:
    worker = run_script(COMPILED)
    _, said = worker.communicate(timeout=300)
    assert worker.returncode == 0, said.decode()


def test_other_devices_keep_nothing() -> None:
    weight = layer_of().to("meta").spectral_weight
    with torch.no_grad():
        for _ in range(3):
            assert kept.kept(weight, lambda at_hand: "factors") is None
    assert weight not in _records


# -- together with all weights of a network at once ------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each batch is asked for."""
    log: list[int] = []
    compute = batch.compute

    def spy(weights: list[object], layouts: dict[object, object]) -> object:
        log.append(len(weights))
        return compute(weights, layouts)

    monkeypatch.setattr(batch, "compute", spy)
    return log


@every_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_computes_a_batch_only_for_what_is_not_kept(
    method: str,
    mode: Callable[[], object],
    taken: list[bool],
    formed: list[SpectralWeight],
    asked: list[int],
) -> None:
    model, x = made(method).eval(), image()

    def step() -> tuple[list[int], int, int]:
        """Sizes of batches, weights taken from them, weights formed by layers."""
        wanted = fresh(alone(model), x)
        for log in (asked, taken, formed):
            log.clear()
        with mode():
            y = model(x)
        torch.testing.assert_close(y.clone(), wanted, **CLOSE)
        assert all(taken)
        return list(asked), len(taken), len(formed)

    alone_, together_, kept_ = ([], 0, 10), ([10], 10, 0), ([], 0, 0)
    assert [step() for _ in range(3)] == [alone_, together_, kept_]
    for _ in range(40):  # more than after which a root rests that had nothing to gain
        assert step() == kept_
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    assert [step() for _ in range(3)] == [together_, together_, kept_]
    for p in model.parameters():
        p.data.mul_(1.01)
    # Nothing but the values tells, which are compared where the weight is used.
    assert [step() for _ in range(3)] == [alone_, together_, kept_]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1)
    assert step() == kept_
    with torch.no_grad():
        next(model.linears[0].spectral_weight.parameters()).mul_(1.01)
    one = ([1], 0, 1)
    assert [step() for _ in range(3)] == [one, one, kept_]


def test_a_batch_of_a_few_is_no_verdict(taken: list[bool], asked: list[int]) -> None:
    """Weights that change one at a time leave a root ready for all of them."""
    model, x = made().eval(), image()
    weights = [m for m in model.modules() if isinstance(m, SpectralWeight)]
    with torch.no_grad():
        for step in range(60):
            model(x)
            if step % 3 == 2:
                weights[step % 10].coordinates.mul_(1.01)
        for p in model.parameters():
            p.mul_(1.01)
        asked.clear()
        torch.testing.assert_close(model(x), fresh(alone(model), x), **CLOSE)
    assert asked == [10]


def test_plans_of_batches_do_not_pile_up(taken: list[bool]) -> None:
    model, x = made().eval(), image()
    weights = [m for m in model.modules() if isinstance(m, SpectralWeight)]
    with torch.no_grad():
        for first in range(10):
            for second in range(first):
                for weight in (weights[first], weights[second]):
                    weight.coordinates.mul_(1.01)
                for _ in range(3):
                    model(x)
                layouts = scope._memories[model][False, False].layouts
                assert len(layouts) <= scope._LAYOUTS + 1
    assert layouts


def test_training_and_inference_in_turn(taken: list[bool]) -> None:
    model, x = made(), image()
    other = alone(model)
    for _ in range(3):
        agree(run(model, x), run(other, x))
        for _ in range(3):
            torch.testing.assert_close(without_gradient(model, x), fresh(other, x), **CLOSE)
        for m in (model, other):
            with torch.no_grad():
                for p in m.parameters():
                    p.data.mul_(1.01)
    assert all(taken)


def test_a_layer_called_twice_in_a_forward(taken: list[bool]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(
                SpectralLinear(12, 12, 4, init="random", **DOUBLE) for _ in "abc"
            )

        def forward(self, x: Tensor) -> Tensor:
            for part in (*self.parts, *self.parts):
                x = part(x).tanh()
            return x + self.parts[0].weight.sum()

    model, x = together(Model()), torch.randn(4, 12, **DOUBLE)
    for _ in range(4):
        torch.testing.assert_close(without_gradient(model, x), fresh(alone(model), x), **CLOSE)
    assert all(snapshots(model))
    agree(run(model, x), run(alone(model), x))
