"""All frames of a vector as `torch.compile` is given them: frames and derivatives of the charts.

What torch asks of the operator by which kernels form them is in `kernel_cases.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from sttp_manifold.frames import compiled, full_frame, reduced_frame
from sttp_manifold.frames._wy_form import _Made
from sttp_manifold.frames.compiled import all_frames

DOUBLE: Any = {"dtype": torch.float64}
Sizes = list[tuple[int, int, bool]]


def length(d: int, r: int, full: bool) -> int:
    return d * r - r * (r + 1) // 2 if full else r * (d - r)


def vector_of(sizes: Sizes, seed: int = 0) -> Tensor:
    count = sum(length(*size) for size in sizes)
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def one_by_one(vector: Tensor, sizes: Sizes) -> list[Tensor]:
    parts = vector.split([length(*size) for size in sizes])
    return [
        (full_frame if full else reduced_frame)(part, d, r)
        for part, (d, r, full) in zip(parts, sizes, strict=True)
    ]


def at_once(vector: Tensor, sizes: Sizes) -> list[Tensor]:
    return all_frames(vector, [(d, r) for d, r, _ in sizes], [full for _, _, full in sizes])


frame_sizes = st.tuples(st.integers(1, 20), st.integers(0, 12), st.booleans()).map(
    lambda t: (t[0] + t[1], t[0], t[2])
)


@given(st.lists(frame_sizes, min_size=1, max_size=5), st.integers(0, 1000))
def test_frames_and_gradients_are_those_of_the_charts(sizes: Sizes, seed: int) -> None:
    vector = vector_of(sizes, seed).requires_grad_()
    found, wanted = at_once(vector, sizes), one_by_one(vector, sizes)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.mT @ a, torch.eye(a.shape[1], **DOUBLE), rtol=0, atol=1e-11)
    if vector.numel():
        slopes = [torch.linspace(-1, 1, a.numel(), **DOUBLE).view_as(a) for a in wanted]
        mine, right = (
            torch.autograd.grad(
                sum((a.sin() * g).sum() for a, g in zip(frames, slopes, strict=True)), vector
            )
            for frames in (found, wanted)
        )
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


MIXED: Sizes = [(7, 3, True), (5, 2, False), (5, 2, False), (4, 4, False), (4, 4, True)]
LARGE: Sizes = [(30, 20, True), (30, 20, True), (25, 17, False)]


@pytest.mark.parametrize("sizes", [MIXED, LARGE, MIXED[1:2]])
def test_second_derivatives_are_those_of_the_charts(sizes: Sizes) -> None:
    found = []
    for form in (at_once, one_by_one):
        vector = vector_of(sizes).requires_grad_()
        energy = sum((frame.sin() ** 2).sum() for frame in form(vector, sizes))
        (slope,) = torch.autograd.grad(energy, vector, create_graph=True)
        found.append(torch.autograd.grad((slope**2).sum(), vector)[0])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sizes", [MIXED, LARGE])
def test_a_compiler_sees_few_products_and_one_solve_a_batch(sizes: Sizes) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def seen(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(
        fw_compiler=seen, bw_compiler=seen, partition_fn=min_cut_rematerialization_partition
    )
    vector = vector_of(sizes).requires_grad_()
    compiled = torch.compile(lambda z: at_once(z, sizes), backend=compiler, fullgraph=True)
    frames = compiled(vector)
    for a, b in zip(frames, one_by_one(vector, sizes), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    sum((frame**3).sum() for frame in frames).backward()
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    batches = 1 if sizes is MIXED else 2  # equal frames; small ones of any shape
    # Forth two products and a solve, back five and one.
    assert sum("bmm" in name for name in names) == 7 * batches
    assert sum("solve_triangular" in name for name in names) == 2 * batches
    assert not any("sttp_manifold" in name for name in names)


@pytest.mark.parametrize(("d", "r"), [(7, 2), (40, 20)])
def test_a_reflector_that_overflows_is_not_a_number(d: int, r: int) -> None:
    sizes = [(d, r, True), (d, r - 1, True)]
    vector = torch.zeros(sum(length(*size) for size in sizes))
    vector[r * (r - 1) // 2] = 1e20
    first, second = at_once(vector, sizes)
    assert first.isnan().any()
    assert second.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("r", [1, 2, 3, 17, 300, 2500])
def test_places_below_the_diagonal_are_torch_s_whatever_the_default_dtype(
    r: int, dtype: torch.dtype
) -> None:
    rows, columns = torch.tril_indices(r, r, -1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made = _Made(r, torch.float32, torch.device("cpu"))
        assert torch.equal(made.pack, rows * r + columns)
        inverse = made.unpack.index_select(0, rows * r + columns)
        assert torch.equal(inverse, torch.arange(len(rows)))
    finally:
        torch.set_default_dtype(before)


class Frames(torch.nn.Module):
    """Some frames, as a network forms them."""

    def forward(self, vector: Tensor) -> list[Tensor]:
        return at_once(vector, MIXED)


def operators_of(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "sttp_manifold" in str(node.target)]


def test_where_there_are_kernels_a_graph_has_them_unless_it_is_exported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "kernels_serve", lambda device, dtype: True)
    vector, graphs = vector_of(MIXED), []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.graph)
        return lambda *inputs: [torch.empty(d, r) for d, r, _ in MIXED]

    torch._dynamo.reset()
    torch.compile(Frames(), backend=keep, fullgraph=True)(vector)
    assert len(operators_of(graphs[0])) == 1
    for strict in (False, True):
        exported = torch.export.export(Frames(), (vector,), strict=strict)
        assert not operators_of(exported.graph)
        for frame, wanted in zip(exported.module()(vector), one_by_one(vector, MIXED), strict=True):
            torch.testing.assert_close(frame, wanted, rtol=1e-10, atol=1e-10)
