"""Fused kernels: in Triton's interpreter against the optimizers without, and compiled for GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kernels.triton_process import needs_triton, run_with_triton

from sttp_manifold import SpectralTTManifold, TTShape
from sttp_manifold.errors import OptimizerError
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD

HERE = Path(__file__).parent
# Products are the kernel's own, and each step is rounded in another order; where steps are long,
# the Q factor is only as near as the frame is well conditioned.
LIMITS = {"adam, long steps": 2e-4}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    cases = str(HERE / "fused_cases.py")
    return run_with_triton(tmp_path_factory.mktemp("cache"), cases, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_the_steps_are_those_of_the_reference(interpreted):
    cases = {k: v for k, v in interpreted.items() if k not in ("half", "handed over", "refused")}
    assert len(cases) == 9
    for name, errors in cases.items():
        limit = LIMITS.get(name, 5e-6)
        assert max(errors.values()) < limit, (name, errors)
        assert errors["orthonormality"] < 2e-6, (name, errors)


@needs_triton
@pytest.mark.slow
def test_half_precision_is_rounded_once(interpreted):
    errors = interpreted["half"]
    assert errors["point"] < 8e-3  # a rounding of bfloat16
    assert errors["exp_avg"] < 1e-6


@needs_triton
@pytest.mark.slow
def test_state_goes_from_one_way_to_the_other(interpreted):
    assert interpreted["handed over"]["point"] < 5e-6


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
    }
    assert interpreted["refused"].keys() == words.keys()
    for name, word in words.items():
        assert word in interpreted["refused"][name]


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD, RiemannianMuon])
def test_without_a_gpu_it_is_refused_and_the_reason_said(cls):
    x = SpectralTTManifold(TTShape((4, 3), (5, 2), rank=3)).random_parameter()
    if cls is RiemannianMuon:
        with pytest.raises(TypeError):
            cls([x], lr=0.1, fused=True)
        return
    with pytest.raises(OptimizerError, match=r"cannot honour fused=True.*(Triton|CUDA|float64)"):
        cls([x], lr=0.1, fused=True)


COMPILE = """
import sys, json
sys.path.insert(0, sys.argv[1])
import triton.language as tl
from compiling import usage
from sttp_manifold.frames._tiles import SIZES
from sttp_manifold.optim import _fused
numbers = tuple("lr sign w1 w2 eps log1 log2 keep fresh decay apart".split())
tables = dict(table="*i64", gradients="*i64")
flags = dict(AMSGRAD=True, MOMENTUM=True, NESTEROV=False, LR_TENSOR=True, DTYPE=tl.float32)
found = []
for arch, R, rule, entries in ((80, 16, 0, True), (80, 64, 0, False), (90, 128, 1, False)):
    how = dict(flags, RULE=rule, ELEMENTWISE=entries, SHORTEN=rule == 1, R=R, **SIZES[R])
    found.append((arch, R, *usage(_fused.step_frames, tables, numbers, arch, **how)))
how = dict(flags, RULE=0, BLOCK=128, num_warps=4)
found.append((80, 0, *usage(_fused.step_coordinates, tables, numbers, 80, **how)))
json.dump(found, sys.stdout)
"""


@needs_triton
@pytest.mark.slow
def test_compiled_for_gpus_that_need_not_be_there(tmp_path):
    found = run_with_triton(tmp_path, "-c", COMPILE, str(HERE.parent / "kernels"))
    for arch, width, registers, stack, shared, threads in found:
        case = arch, width, registers, stack, shared
        assert registers * threads <= 65536, case  # of one multiprocessor
        assert stack <= 1024, case
        assert shared <= 96 * 1024, case  # of one block, since compute capability 8.0


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
