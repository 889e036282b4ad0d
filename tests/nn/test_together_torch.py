"""Weights computed together under what torch may do around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks_together import (
    DOUBLE,
    Heads,
    Net,
    agree,
    alone,
    gradients,
    image,
    made,
    run,
    run_script,
    warm,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from ways_to_hold import every_method

from sttp_manifold import TTShape
from sttp_manifold.nn import SpectralWeight, make_weight, together


def test_two_forwards_before_one_backward(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)

    def both(m: nn.Module) -> tuple[Tensor, list[Tensor | None]]:
        m.zero_grad()
        first, second = m(x), m(image(3, seed=7))
        (first.square().sum() + second.sin().sum()).backward()
        return torch.cat((first, second)).detach(), gradients(m)

    agree(both(model), both(alone(model)))
    assert all(taken)


def test_backward_passes_through_different_weights_do_not_meet(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    other = alone(model)
    for _ in range(3):
        for m in (model, other):
            m.zero_grad()
            first, second, third = m(x)
            second.square().sum().backward()
            first.sum().backward()
            third.sin().sum().backward(retain_graph=True)
            third.cos().sum().backward()
        agree((x, gradients(model)), (x, gradients(other)))
    assert all(taken)


def test_a_graph_that_was_freed_says_so(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    model(x)
    loss = sum(y.sum() for y in model(x))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@every_method
def test_gradients_are_written_into_one_by_one(method: str, taken: list[bool]) -> None:
    model, x = made(method), image()
    vectors = [next(layer.spectral_weight.parameters()) for layer in model.linears]
    first, second = torch.autograd.grad(model(x).square().sum(), vectors)
    scale = torch.ones((), requires_grad=True, **DOUBLE)
    y = (scale * first).sum()
    second.mul_(2)
    y.backward()
    torch.testing.assert_close(scale.grad, first.sum())
    assert all(taken)


def test_a_backward_pass_inside_of_a_forward_leaves_the_rest_alone(taken: list[bool]) -> None:
    class Model(Heads):
        def forward(self, x: Tensor) -> Tensor:
            first = self.parts[0](x)
            inner = next(self.parts[0].spectral_weight.parameters())
            (slope,) = torch.autograd.grad(first.square().sum(), inner)
            return self.parts[2](self.parts[1](x)) + slope.sum()

    model, x = together(Model()), torch.randn(4, 12, **DOUBLE)
    other = alone(model)
    for _ in range(3):
        agree(run(model, x), run(other, x))
    assert True in taken


def test_a_weight_left_out_gets_no_gradient(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    other = alone(model)

    def step(m: Heads) -> tuple[Tensor, list[Tensor | None]]:
        m.zero_grad()
        y = torch.stack(m(x))
        y.square().sum().backward()
        return y.detach(), gradients(m)

    for leave_out in ({}, {}, {1}, {0}, {0, 2}, {}, {}):
        for m in (model, other):
            m.leave_out = set(leave_out)
        agree(step(model), step(other))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_gradient_checkpointing(reentrant: bool, whole: bool, taken: list[bool]) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks[:2]:
                x = checkpoint(block, x, use_reentrant=reentrant)
            x = self.blocks[2](x)
            x = self.wide[1](self.wide[0](x)).flatten(1)[:, :60]
            return self.linears[1](self.linears[0](x))

    torch.manual_seed(0)
    model = together(Net() if whole else Checkpointed())
    other = alone(model)
    for _ in range(4):
        x = image().requires_grad_()
        found = []
        for m in (model, other):
            m.zero_grad()
            y = checkpoint(m, x, use_reentrant=reentrant) if whole else m(x)
            y.square().sum().backward()
            found.append((y.detach(), gradients(m)))
        agree(found[0], found[1])
    if not whole:
        assert True in taken


def test_saved_tensor_hooks(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    wanted = run(alone(model), x)
    model.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    y.square().sum().backward()
    agree((y.detach(), gradients(model)), wanted)


COMPILED = """
import copy
import sys
import torch
from torch import nn
from sttp_manifold.nn import compress, together
from sttp_manifold.nn.formed import Entry
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(),
    nn.Sequential(nn.Linear(36, 36), nn.Tanh(), nn.Linear(36, 36)),
).double()
compress(model, 4, method=sys.argv[1], init="random", grow="allow")
twin = together(copy.deepcopy(model), False)
x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
def same(f, g):
    ours, wanted = f(x), g(x)
    torch.testing.assert_close(ours, wanted)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), list(model.parameters())),
        torch.autograd.grad(wanted.square().sum(), list(twin.parameters())),
    ):
        torch.testing.assert_close(a, b)
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
for step in range(3):
    same(compiled, twin)
    for m in (model, twin):
        if sys.argv[1] == "householder":
            with torch.no_grad():
                m[0].spectral_weight.coordinates.add_(0.1)
for count in (3, 5):  # torch makes the size a symbol
    x = torch.randn(count, 4, 3, 3, dtype=torch.float64)
    same(compiled, twin)
taken, take = [], Entry.take
Entry.take = lambda entry, given: taken.append(take(entry, given)) or taken[-1]
model[3] = torch.compile(model[3], backend="aot_eager")
for _ in range(3):
    same(model, twin)
assert taken and None not in taken, "the rest of a model is computed together"
"""


@pytest.mark.slow
@every_method
def test_compiled(method: str) -> None:
    worker = run_script(COMPILED, method)
    _, said = worker.communicate(timeout=300)
    assert worker.returncode == 0, said.decode()


@pytest.mark.parametrize("frozen", ["biases", "some weights", "all"])
@every_method
def test_partial_freezing(method: str, frozen: str, taken: list[bool]) -> None:
    model, x = made(method), image()
    names = {
        "biases": lambda k: k.endswith("bias"),
        "some weights": lambda k: "blocks.0" in k or "linears.1" in k or "first" in k,
        "all": lambda k: True,
    }
    for name, p in model.named_parameters():
        p.requires_grad_(not names[frozen](name))
    other = alone(model)
    for _ in range(3):
        for m in (model, other):
            m.zero_grad()
        ours, wanted = model(x), other(x)
        assert ours.requires_grad == wanted.requires_grad
        if ours.requires_grad:
            ours.square().sum().backward()
            wanted.square().sum().backward()
        agree((ours.detach(), gradients(model)), (wanted.detach(), gradients(other)))
    assert True in taken
    for p in model.parameters():
        p.requires_grad_(True)
    for _ in range(2):
        agree(run(model, x), run(alone(model), x))


def test_a_frozen_weight_asks_for_no_graph(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    model.parts[0].requires_grad_(False)
    model.parts[1].requires_grad_(False)
    for _ in range(3):
        assert [y.requires_grad for y in model(x)] == [False, False, True]
    assert len(taken) >= 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_method
def test_without_gradient(method: str, mode: Callable[[], object], taken: list[bool]) -> None:
    model, x = made(method).eval(), image()
    wanted = alone(model)(x).detach()
    for _ in range(3):
        with mode():
            y = model(x)
        assert not y.requires_grad
        torch.testing.assert_close(y.clone(), wanted, rtol=1e-10, atol=1e-12)
    assert all(taken)
    assert len(taken) == 30
    model.train()
    agree(run(model, x), run(alone(model), x))


def test_a_change_of_grad_mode_in_the_middle(taken: list[bool]) -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.blocks[1](self.blocks[0](x))
            return self.wide[1](self.blocks[2](x))

    class Opened(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[1](self.blocks[0](x))
            with torch.enable_grad():
                return self.wide[1](self.blocks[2](x))

    torch.manual_seed(0)
    model, x = together(Model()), image()
    for _ in range(3):
        agree(run(model, x), run(alone(model), x))
    opened = together(Opened())
    for _ in range(3):
        opened.zero_grad()
        with torch.no_grad():
            y = opened(x)
        y.square().sum().backward()
        assert opened.wide[1].spectral_weight.coordinates.grad is not None
        assert opened.blocks[0].first.spectral_weight.coordinates.grad is None


def test_autocast(taken: list[bool]) -> None:
    model, x = made().float(), image().float()
    warm(model, x, taken)
    other = alone(model)
    for _ in range(2):
        found = []
        for m in (model, other):
            m.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = m(x)
            y.float().square().sum().backward()
            found.append((y.detach().float(), gradients(m)))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=0.05, atol=0.05)
        for mine, wanted in zip(found[0][1], found[1][1], strict=True):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, wanted, rtol=0.2, atol=0.2)
    assert all(taken)


def test_transforms_of_torch_func() -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    other = alone(model)
    for _ in range(2):
        model(x)
    named = {k: v.detach() for k, v in model.named_parameters()}

    def loss(m: nn.Module) -> Callable[..., Tensor]:
        return lambda p, row: sum(
            y.square().sum() for y in torch.func.functional_call(m, p, (row,))
        )

    ours, wanted = (torch.func.grad(loss(m))(named, x) for m in (model, other))
    torch.testing.assert_close(ours, wanted)
    rows = torch.func.vmap(lambda row: torch.stack(model(row)))(x)
    torch.testing.assert_close(rows, torch.stack(other(x), 1))


@every_method
@pytest.mark.parametrize("size", [40, 300], ids=["a batch", "one by one"])
@pytest.mark.parametrize("form", ["dense", "factors", "rows", "cores"])
def test_a_batch_of_cotangents(method: str, size: int, form: str, taken: list[bool]) -> None:
    """What torch can compute for many cotangents at once are not all operations."""
    shape = TTShape.for_matrix(size, size, rank=4)
    weights = nn.ModuleList(make_weight(method, shape, init="random", **DOUBLE) for _ in range(4))
    parameters = list(weights.parameters())

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = weights

        def forward(self) -> Tensor:
            return torch.stack(
                [sum(t.square().sum(1).sin().sum() for t in self.parts(w)) for w in self.weights]
            )

        def parts(self, weight: SpectralWeight) -> tuple[Tensor, ...]:
            if form == "dense":
                return (weight(),)
            if form == "factors":
                return weight.factors()
            if form == "rows":
                return weight.row_factors()
            tt = weight.tt()
            return (*(core.flatten(1) for core in (*tt.left, *tt.right)), tt.spectrum[None])

    model = together(Squares())
    model()
    rows = torch.randn(3, 4, **DOUBLE)
    taken.clear()
    found = torch.autograd.grad(model(), parameters, rows, is_grads_batched=True)
    assert taken == [True] * 4
    for k, row in enumerate(rows):
        wanted = torch.autograd.grad(Squares()(), parameters, row)
        for mine, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine[k], other, rtol=1e-9, atol=1e-11)


def test_tracing() -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    for _ in range(2):
        model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


WORKER = """
import sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from sttp_manifold.nn import compress, together
rank, store, method = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method="file://" + store, rank=rank, world_size=2
)
torch.manual_seed(0)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.spare = nn.Linear(12, 12)
    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x
model = compress(Model().double(), 3, method=method, grow="allow")
twin = together(__import__("copy").deepcopy(model), False)
ddp = DistributedDataParallel(model, find_unused_parameters=True)
data = torch.randn(2, 5, 12, dtype=torch.float64)
for step in range(4):
    model.zero_grad(); twin.zero_grad()
    ddp(data[rank]).square().mean().backward()
    (sum(twin(x).square().mean() for x in data) / 2).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if name.startswith("spare"):
            assert p.grad is None and q.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
from sttp_manifold.nn.together import _plans
assert len(_plans[model]) == 1
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@every_method
def test_distributed_data_parallel(method: str, tmp_path: Path) -> None:
    """Two processes average their gradients; a twin sees the data of both."""
    workers = [run_script(WORKER, str(rank), str(tmp_path / "store"), method) for rank in range(2)]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said.decode()
