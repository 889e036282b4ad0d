"""Networks over two processes: `fully_shard` for charts and for points, against one process."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from networks_together import run_script
from torch import nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn import SpectralLinear, keep_whole

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import sttp_manifold as sm
from sttp_manifold.errors import OffManifoldError

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
data = torch.randn(2, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def build(method, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20), nn.Linear(20, 5))
    return sm.nn.compress(model.double(), 3, method=method, grow="allow", init="random")


def whole(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def train(method, steps=6):
    # Points of the first process count; what fully_shard cuts has to be equal as in any training.
    model, twin = build(method), build(method)
    if method == "riemannian" and rank:
        with torch.no_grad():
            model[0].spectral_weight.point.copy_(build(method, 1)[0].spectral_weight.point)
    kept = sm.nn.keep_whole(model)
    assert len(kept) == 3 * (method == "riemannian")
    fully_shard(model[2], mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    made = torch.optim.Adam if method == "householder" else sm.optim.RiemannianAdam
    optimizers = [made(m.parameters(), lr=1e-2) for m in (model, twin)]
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        # The second half in two micro-batches.
        parts = [data[rank]] if step < 3 else data[rank].chunk(2)
        for k, part in enumerate(parts):
            model.set_requires_gradient_sync(k == len(parts) - 1)
            (model(part).square().mean() / len(parts)).backward()
        (sum(twin(x).square().mean() for x in data) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(whole(p), q, rtol=1e-10, atol=1e-12)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(data[0]), twin(data[0]), rtol=1e-10, atol=1e-12)
    sm.optim.check_points(model)


train("householder")
train("riemannian")
try:
    fully_shard(build("riemannian"), mesh=mesh)
except OffManifoldError as error:
    assert "ignored_params=sm.nn.keep_whole(model)" in str(error)
else:
    raise AssertionError("a point was cut")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_fully_sharded_training_is_that_of_one_process(tmp_path: Path) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if "ignored_params" not in inspect.signature(fsdp.fully_shard).parameters:
        pytest.skip("fully_shard leaves out parameters from torch 2.7 on")
    workers = [run_script(WORKER, str(rank), str(tmp_path / "store")) for rank in range(2)]
    for worker in workers:
        _, said = worker.communicate(timeout=300)
        assert worker.returncode == 0, said.decode()


def test_without_processes() -> None:
    assert keep_whole(nn.Linear(2, 2)) == set()
    assert keep_whole(SpectralLinear(8, 6, rank=2)) == set()
    with pytest.raises(ConversionError, match="init_process_group"):
        keep_whole(SpectralLinear(8, 6, rank=2, method="riemannian"))
