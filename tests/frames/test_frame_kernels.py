"""Kernels of frames: in Triton's interpreter against float64, and compiled for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernels.triton_process import compile_within_bounds, needs_triton, run_with_triton

from sttp_manifold.frames import _kernel_table
from sttp_manifold.frames._kernel_table import has_kernel, kernels_serve

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    cases = str(HERE / "kernel_cases.py")
    return run_with_triton(tmp_path_factory.mktemp("cache"), cases, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_frames_and_gradients_are_those_of_the_charts(interpreted):
    assert len(interpreted["cases"]) == 12
    for name, errors in interpreted["cases"].items():
        assert errors.pop("left alone") == 0.0, name
        assert max(errors.values()) < 1.5e-6, (name, errors)


@needs_triton
@pytest.mark.slow
def test_a_network_trains_through_them(interpreted):
    errors = interpreted["network"]
    assert errors["gradient"] < 3e-6
    assert errors["batched"] < 1e-6
    assert errors["second"] < 2e-5


@needs_triton
@pytest.mark.slow
def test_torch_accepts_the_operator(interpreted):
    assert max(interpreted["operator"].values()) < 1.5e-6


@needs_triton
@pytest.mark.slow
def test_a_reflector_that_overflows_makes_its_frame_nan_and_no_other(interpreted):
    assert interpreted["overflown"] == [True, False]


COMPILE = """
from sttp_manifold.frames import _kernels
for arch, R in ((80, 16), (80, 64), (90, 128)):
    for kernel in (_kernels.form_frames, _kernels.pull_back_frames):
        add(kernel, dict(table="*i64"), (), arch, R=R, **SIZES[R])
"""


@needs_triton
@pytest.mark.slow
def test_compiled_for_gpus_that_need_not_be_there(tmp_path):
    compile_within_bounds(tmp_path, COMPILE, 6)


def test_where_kernels_serve(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(_kernel_table, "has_triton", lambda: True)
    assert kernels_serve(cuda, torch.float32)
    with monkeypatch.context() as patch:
        patch.setenv("STTP_KERNELS", "0")
        assert not kernels_serve(cuda, torch.float32)
    assert not kernels_serve(cpu, torch.float32)
    assert not kernels_serve(cuda, torch.float64)
    assert has_kernel(512, 128)
    assert not has_kernel(513, 4)
    assert not has_kernel(200, 129)
    assert not has_kernel(3, 0)
