"""Fused kernels: in Triton's interpreter against the optimizers without, and compiled for GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kernels.triton_process import compile_within_bounds, needs_triton, run_with_triton

from sttp_manifold import SpectralTTManifold, TTShape
from sttp_manifold.errors import OptimizerError
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD

HERE = Path(__file__).parent
# Products are the kernel's own, and each step is rounded in another order; where steps are long,
# the Q factor is only as near as the frame is well conditioned; Muon's polynomials let small
# singular values grow by up to 425, with their rounding errors.
LIMITS = {"adam, long steps": 2e-4, "muon": 5e-5, "muon, capturable": 1e-4, "muon, all of it": 3e-4}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    cases = str(HERE / "fused_cases.py")
    return run_with_triton(tmp_path_factory.mktemp("cache"), cases, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_the_steps_are_those_of_the_reference(interpreted):
    assert len(interpreted["cases"]) == 12
    for name, errors in interpreted["cases"].items():
        limit = LIMITS.get(name, 5e-6)
        assert max(errors.values()) < limit, (name, errors)
        assert errors["orthonormality"] < 2e-6, (name, errors)


@needs_triton
@pytest.mark.slow
def test_half_precision_is_rounded_once(interpreted):
    errors = interpreted["half"]
    assert errors["point"] < 8e-3  # a rounding of bfloat16
    assert errors["exp_avg"] < 1e-6
    # What Muon makes of a point that is orthonormal to 4e-3 depends on the way by that much.
    assert interpreted["half, muon"]["point"] < 1.2e-2
    assert interpreted["half, muon"]["exp_avg"] < 2e-3


@needs_triton
@pytest.mark.slow
def test_state_goes_from_one_way_to_the_other(interpreted):
    assert interpreted["handed over"]["RiemannianAdam"] < 5e-6
    assert interpreted["handed over"]["RiemannianMuon"] < 2e-4


@needs_triton
@pytest.mark.slow
def test_muon_in_a_kernel_is_near_to_float64(interpreted):
    """Of gradients of all sizes; the reference in float32 takes another way for short frames."""
    assert interpreted["beside double"]["plain"] < 1e-5
    assert interpreted["beside double"]["fused"] < 1e-5


@needs_triton
@pytest.mark.slow
def test_muon_in_a_kernel_rests_where_there_is_no_gradient(interpreted):
    assert interpreted["resting"]["rest"] < 1e-6
    assert interpreted["resting"]["turn"] < 1e-3  # of the polynomials


@needs_triton
@pytest.mark.slow
def test_one_huge_gradient_is_taken_as_without_kernels(interpreted):
    assert len(interpreted["spiked"]) == 10
    for name, errors in interpreted["spiked"].items():
        assert errors["point"] < (1e-4 if name.startswith("muon") else 5e-6), (name, errors)
        assert errors["hidden"] == 0, name  # a gradient that is NaN shows


@needs_triton
@pytest.mark.slow
def test_what_a_kernel_cannot_do_is_said(interpreted):
    words = {
        "retraction": "newton_schulz",
        "columns": "130",
        "double": "float64",
        "decay": "bounded",
        "stabilize": "stabilize=5",
        "betas": "betas",
        "muon, betas": "betas that are numbers",
        "muon, matrices": "torch.optim.Muon has no fused kernel",
        "muon, foreach": "foreach=True",
        "muon, retraction": "newton_schulz",
    }
    assert interpreted["refused"].keys() == words.keys()
    for name, word in words.items():
        assert word in interpreted["refused"][name]


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD, RiemannianMuon])
def test_without_a_gpu_it_is_refused_and_the_reason_said(cls):
    x = SpectralTTManifold(TTShape((4, 3), (5, 2), rank=3)).random_parameter()
    with pytest.raises(OptimizerError, match=r"cannot honour fused=True.*(Triton|CUDA|float64)"):
        cls([x], lr=0.1, fused=True)


COMPILE = """
import triton.language as tl
from sttp_manifold.optim import _fused, _fused_muon
numbers = tuple("lr sign w1 w2 eps log1 log2 keep fresh decay apart cos sin".split())
kinds = dict(table="*i64", gradients="*i64", last="i32")
on = dict(NESTEROV=True, DTYPE=tl.float32)
flags = dict(on, AMSGRAD=True, MOMENTUM=True, LR_TENSOR=True)
for arch, R, rule, entries in ((80, 16, 0, True), (80, 64, 0, False), (90, 128, 1, False)):
    how = dict(flags, RULE=rule, ELEMENTWISE=entries, SHORTEN=rule == 1, R=R, **SIZES[R])
    add(_fused.step_frames, kinds, numbers, arch, **how)
    how = dict(on, ON_DEVICE=rule == 0, R=R, **SIZES[R])
    add(_fused_muon.turn_frames, kinds, numbers, arch, **how)
how = dict(flags, RULE=0, ELEMENTWISE=True, SHORTEN=True, BLOCK=128, num_warps=4)
add(_fused.step_coordinates, kinds, numbers, 80, **how)
"""


@needs_triton
@pytest.mark.slow
def test_compiled_for_gpus_that_need_not_be_there(tmp_path):
    compile_within_bounds(tmp_path, COMPILE, 7)


def test_nothing_of_triton_is_imported_without_need():
    code = (
        "import sys, torch\n"
        "from sttp_manifold.optim import RiemannianAdam\n"
        "from sttp_manifold import SpectralTTManifold, TTShape\n"
        "x = SpectralTTManifold(TTShape((4, 3), (5, 2), rank=3)).random_parameter()\n"
        "x.grad = torch.ones_like(x)\n"
        "RiemannianAdam([x], lr=0.1).step()\n"
        "assert 'sttp_manifold.optim._fused' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
