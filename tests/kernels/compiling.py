"""Compile Triton kernels for GPUs that need not be there, and read what they use of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Usage(NamedTuple):
    """What a program of a kernel takes: registers a thread, bytes of stack, bytes shared."""

    registers: int
    stack: int
    shared: int
    threads: int


def usage(
    kernel: Any, pointers: dict[str, str], numbers: tuple[str, ...], arch: int, **constants: Any
) -> Usage:
    """Compile a kernel.

    Args:
        kernel: the kernel.
        pointers: Triton types of arguments that are no float32 pointers, no numbers, no constants.
        numbers: arguments that are numbers.
        arch: compute capability, as 80 or 90.
        constants: what it is compiled for, with ``num_warps`` and ``num_stages``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    signature = {}
    for name in kernel.arg_names:
        kind = "constexpr" if name in constants else "fp32" if name in numbers else "*fp32"
        signature[name] = pointers.get(name, kind)
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    said = _resources(made.asm["cubin"])
    registers, stack = (int(re.search(rf"{key}:(\d+)", said)[1]) for key in ("REG", "STACK"))
    return Usage(registers, stack, made.metadata.shared, 32 * options.get("num_warps", 4))


def _resources(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return said.stdout + said.stderr
