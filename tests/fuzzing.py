"""A fuzz over the public interface: what is called, with what, and what may come of it.

`targets` finds every public function, class and method by the packages' ``__all__``. A `Setting` is
one draw: a plan, a dtype, a device, a scale, and right values for every name of a parameter.
`attempt` calls a target with right arguments, some of which are spoiled, and says what is wrong
with the outcome: a value that an oracle refutes, or an error that does not name its culprit.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import math
import os
import random
import re
import signal
import tempfile
import threading
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpt2_layer import conv1d
from torch import Tensor, nn

import sttp_manifold as sm
from sttp_manifold import FixedTTRankManifold, SpectralTT, SpectralTTManifold, TTShape, tt_svd
from sttp_manifold.chart import HouseholderChart
from sttp_manifold.errors import SttpError
from sttp_manifold.frames import full_frame, haar_frame, reduced_frame
from sttp_manifold.spectrum import SpectrumMap
from sttp_manifold.tt import SPECTRA

PACKAGES = ("", ".tt", ".frames", ".spectrum", ".manifolds", ".checks", ".optim", ".nn", ".chart",
            ".quotient")  # fmt: skip
SECONDS = 20
FILE = Path("a.safetensors")

# Protocols, abstract bases and plain records, whose fields nobody computes with.
LEFT_OUT = {
    "Holder", "Law", "MinimizeResult", "SkippedLayerWarning", "Slope", "SpectralLayer",
    "SpectralWeight", "Summary", "SummaryRow", "CheckResult", "ChartPoint",
    "SpectrumAlarm", "SpectrumReading", "SpectrumCollapseWarning",
    "form_together", "joined",  # which the package asks of its layers and views
    "keep_whole", "OffManifoldWarning",  # for processes, and what is warned of
    "register", "unregister",  # whose effect outlives the call
}  # fmt: skip


def normal(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Setting:
    """Right values for every parameter, drawn from a seed.

    Args:
        seed: what all follows from.
        plain: float64 on the CPU, of unit scale, without batch.
    """

    def __init__(self, seed: int, *, plain: bool = False) -> None:
        rng = self.rng = random.Random(seed)
        self.seed = seed
        modes = [[rng.randint(1, 4) for _ in range(rng.randint(1, 3))] for _ in range(2)]
        self.shape = TTShape(*modes, rank=rng.randint(1, 5))
        dtypes = 3 * [torch.float32] + 4 * [torch.float64] + [torch.float16, torch.bfloat16]
        self.dtype = torch.float64 if plain else rng.choice(dtypes)
        self.device = "cpu" if plain or rng.random() < 0.93 else "meta"
        self.scale = 1.0 if plain else rng.choice(7 * [1.0] + [0.0, 1e-20, 1e20])
        self.batch = () if plain else rng.choice([(), (), (2,), (0,)])
        self.spectrum = "free" if plain else rng.choice(SPECTRA)
        self.method = rng.choice(["householder", "riemannian"])
        self.kind = rng.choice(["sttp", "svdp"])

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(self.device)

    def tensor(self, *size: int, key: int = 0) -> Tensor:
        return self.cast(normal(self.seed + key, *size) * self.scale)

    # -- values of the package -----------------------------------------------------------------

    @cached_property
    def W(self) -> Tensor:
        return self.tensor(*self.batch, self.shape.d_out, self.shape.d_in)

    def value(self, *, key: int = 0, batch: tuple[int, ...] | None = None) -> SpectralTT:
        batch = self.batch if batch is None else batch
        tt = tt_svd(normal(self.seed + key, *batch, self.shape.d_out, self.shape.d_in), self.shape)
        held = SpectrumMap(self.spectrum, self.shape.rank)
        theta = normal(self.seed + key + 1, *batch, *held.coordinate_shape)
        s = held(theta * self.scale if self.spectrum == "free" else theta)
        value = SpectralTT(tt.left, s, tt.right, self.shape)
        return value.to(self.dtype).to(self.device)

    @cached_property
    def tt(self) -> SpectralTT:
        return self.value()

    @cached_property
    def chart(self) -> HouseholderChart:
        return HouseholderChart(self.shape, self.spectrum)

    @cached_property
    def M(self) -> SpectralTTManifold:
        return SpectralTTManifold(self.shape, self.spectrum)

    @cached_property
    def F(self) -> FixedTTRankManifold:
        return FixedTTRankManifold(
            self.shape, "identity" if self.spectrum == "identity" else "full"
        )

    def manifold(self) -> Any:
        return self.rng.choice([self.M, self.F])

    def point(self, M: Any) -> Tensor:
        torch.manual_seed(self.seed)
        return self.cast(M.random(*self.sizes(M), dtype=torch.float64))

    def sizes(self, M: Any) -> tuple[int, ...]:
        return (*self.batch, M.n_elements) if self.batch else ()

    def tangent(self, M: Any, key: int = 0) -> Tensor:
        torch.manual_seed(self.seed)  # the point that `point` gives
        x = M.random(*self.sizes(M), dtype=torch.float64)
        return self.cast(M.proju(x, normal(self.seed + key, *x.shape)) * min(self.scale, 1.0))

    def layer(self) -> nn.Module:
        kinds = {"dtype": self.dtype, "device": self.device, "method": self.method}
        if self.rng.random() < 0.5:
            return sm.nn.SpectralLinear(6, 4, 2, spectrum=self.spectrum, **kinds)
        return sm.nn.SpectralConv2d(3, 4, 3, rank=2, spectrum=self.spectrum, **kinds)

    def model(self) -> nn.Module:
        return nn.Sequential(self.layer(), nn.ReLU())

    def adapted(self) -> nn.Module:
        self.network = sm.nn.adapt(self.dense_model(), 2, method=self.method)
        return self.network

    def written_adapter(self) -> Path:
        model = self.adapted()
        if self.device != "meta":
            sm.nn.save_adapter(model, FILE)
        return FILE

    def followed(self) -> torch.optim.Optimizer:
        self.network = self.model()
        return sm.optim.RiemannianAdam(self.network.parameters(), lr=0.01)

    def loss(self) -> Tensor:
        return self.network(self.tensor(3, 24)).square().mean()

    @cached_property
    def layer_of_chart(self) -> nn.Module:
        return sm.nn.SpectralLinear(8, 6, rank=2)

    @cached_property
    def saved(self) -> nn.Module:
        return self.model()

    def written(self) -> Path:
        if self.device != "meta":
            sm.nn.save(self.saved, FILE)
        return FILE

    def dense_model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
        return model.to(self.dtype).to(self.device)

    def weight(self, method: str | None = None) -> nn.Module:
        method = self.method if method is None else method
        return sm.nn.make_weight(method, self.shape, self.spectrum, dtype=self.dtype,
                                 device=self.device)  # fmt: skip

    @cached_property
    def leaf(self) -> nn.Parameter:
        return nn.Parameter(self.tensor(4))

    def cost(self) -> Callable[..., Tensor]:
        def cost(tt: Any) -> Tensor:
            W = tt.to_matrix() if isinstance(tt, SpectralTT) else tt
            return (W - 0.3).square().mean()

        return cost

    def optimizer(self) -> torch.optim.Optimizer:
        model = self.model()
        kind = self.rng.choice([sm.optim.RiemannianAdam, sm.optim.RiemannianSGD])
        optimizer = kind(model.parameters(), lr=0.01)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        return optimizer


Values = dict[str, Callable[[Setting, Any], Any]]

# By the name of the parameter; ``o`` is the object whose method is called.
GOOD: Values = {
    "out_modes": lambda s, o: s.shape.out_modes,
    "in_modes": lambda s, o: s.shape.in_modes,
    "rank": lambda s, o: s.rng.randint(1, 3),
    "d_out": lambda s, o: s.shape.d_out,
    "d_in": lambda s, o: s.shape.d_in,
    "size": lambda s, o: None,
    "kernel_shape": lambda s, o: (6, 4, 3, 3),
    "kind": lambda s, o: s.kind,
    "kernel": lambda s, o: s.rng.choice(["flat", "factored"]),
    "spectrum": lambda s, o: s.spectrum,
    "bound": lambda s, o: 2.0 if s.spectrum == "bounded" else 1.0,  # which others have not
    "shape": lambda s, o: s.shape,
    "W": lambda s, o: s.W,
    "tt": lambda s, o: s.tt,
    "other": lambda s, o: s.value(key=3),
    "left": lambda s, o: s.tt.left,
    "bond": lambda s, o: s.tt.spectrum,
    "right": lambda s, o: s.tt.right,
    "n": lambda s, o: s.rng.choice([1, 12, 97, 2**61 - 1]),
    "i": lambda s, o: torch.tensor([0, s.shape.d_out - 1]),
    "j": lambda s, o: torch.tensor([s.shape.d_in - 1, 0]),
    "values": lambda s, o: s.tensor(*s.batch, 2),
    "rtol": lambda s, o: 1e-3,
    "atol": lambda s, o: 0.0,
    "d": lambda s, o: 5,
    "r": lambda s, o: 3,
    "parameters": lambda s, o: s.tensor(*s.batch, 9),
    "transposed": lambda s, o: False,
    "Q": lambda s, o: s.cast(haar_frame(5, 3, *s.batch, dtype=torch.float64)),
    "s": lambda s, o: s.tensor(*s.batch, 4),
    "eps": lambda s, o: 1e-6,
    "name": lambda s, o: s.spectrum,
    "project": lambda s, o: s.rng.random() < 0.5,
    "theta": lambda s, o: s.tensor(*s.batch, *o.coordinate_shape),
    "x": lambda s, o: s.point(o),
    "y": lambda s, o: s.point(o),
    "u": lambda s, o: s.tangent(o, 1),
    "v": lambda s, o: s.tangent(o, 2),
    "w": lambda s, o: s.tangent(o, 3),
    "more": lambda s, o: s.tangent(o, 4),
    "keepdim": lambda s, o: False,
    "Z": lambda s, o: s.W,
    "z": lambda s, o: s.tensor(*s.batch, o.n_elements),
    "signs": lambda s, o: None,
    "dtype": lambda s, o: s.dtype,
    "device": lambda s, o: s.device,
    "generator": lambda s, o: None,
    "seed": lambda s, o: 0,
    "raises": lambda s, o: False,
    "order": lambda s, o: 1,
    "retraction": lambda s, o: None,
    "damping": lambda s, o: 1e-3,
    "model": lambda s, o: s.model(),
    "module": lambda s, o: s.model(),
    "method": lambda s, o: s.method,
    "init": lambda s, o: "noisy_eye",
    "init_std": lambda s, o: 1e-2,
    "in_features": lambda s, o: 6,
    "out_features": lambda s, o: 4,
    "num_embeddings": lambda s, o: 6,
    "embedding_dim": lambda s, o: 4,
    "padding_idx": lambda s, o: 0,
    "in_channels": lambda s, o: 3,
    "out_channels": lambda s, o: 4,
    "kernel_size": lambda s, o: 3,
    "bias": lambda s, o: True,
    "optimizer": lambda s, o: s.optimizer(),
    "params": lambda s, o: list(s.model().parameters()),
    "lr": lambda s, o: 0.01,
    "cost": lambda s, o: s.cost(),
    "on": lambda s, o: True,
    "grow": lambda s, o: "skip",
    "skip": lambda s, o: [],
    "together": lambda s, o: True,
    "max_iterations": lambda s, o: 3,
    "max_sweeps": lambda s, o: 3,
    "progress": lambda s, o: False,
    "batch": lambda s, o: s.batch,
    "point": lambda s, o: o.unflatten(s.tensor(*s.batch, o.n_elements)),
    "path": lambda s, o: None,
    "closure": lambda s, o: None,
    "step": lambda s, o: 0.1,
    "layer": lambda s, o: stock(s, o),
    "targets": lambda s, o: s.rng.choice([None, ["0"], "*", nn.Linear]),
    "alpha": lambda s, o: 0.5,
    "names": lambda s, o: s.rng.choice(["default", ["default"]]),
    "base": lambda s, o: s.dense_model()[0],
    "recipe": lambda s, o: sm.nn.Recipe(rank=2),
    "matrix": lambda s, o: s.W,
}

# Where the name alone does not tell.
SPECIAL: dict[str, Values] = {
    "capture_step": {
        "model": lambda s, o: nn.Linear(3, 2),
        "optimizer": lambda s, o: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1),
        "loss_fn": lambda s, o: lambda model, x: model(x).sum(),
        "example": lambda s, o: (torch.ones(4, 3),),
    },
    "CapturedStep": {
        "model": lambda s, o: nn.Linear(3, 2),
        "optimizer": lambda s, o: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1),
        "loss_fn": lambda s, o: lambda model, x: model(x).sum(),
        "example": lambda s, o: (torch.ones(4, 3),),
    },
    "TTShape.for_weight": {"size": lambda s, o: (6, 4, 3)},
    "TTShape.dim": {},
    "SpectralTT": {"spectrum": lambda s, o: s.tt.spectrum, "shape": lambda s, o: s.shape},
    "SpectralTT.matvec": {"x": lambda s, o: s.tensor(*s.batch, 3, s.shape.d_in)},
    "SpectralTT.rmatvec": {"y": lambda s, o: s.tensor(*s.batch, 3, s.shape.d_out)},
    "SpectralTT.to": {"args": lambda s, o: (s.dtype,)},
    "truncate": {"rank": lambda s, o: 1},
    "tt_fit": {
        "W": lambda s, o: s.tensor(s.shape.d_out, s.shape.d_in),
        "left": lambda s, o: s.tensor(s.shape.d_out).abs(),
        "right": lambda s, o: s.tensor(9, s.shape.d_in).mT @ s.tensor(9, s.shape.d_in),
    },
    "truncate_": {
        "energy": lambda s, o: 0.9,
        "rank": lambda s, o: None,
        "tol": lambda s, o: None,
    },
    "check_values": {"name": lambda s, o: "fixed", "values": lambda s, o: [2.0, 1.0]},
    "HouseholderChart.cores": {
        "frames": lambda s, o: o.unflatten(s.tensor(*s.batch, o.n_elements)).frames
    },
    "rotate": {
        "left": lambda s, o: [s.cast(torch.eye(c.shape[-1])) for c in s.tt.left[:-1]],
        "right": lambda s, o: [s.cast(torch.eye(c.shape[-1])) for c in s.tt.right[:-1]],
    },
    "reduced_frame": {"parameters": lambda s, o: s.tensor(*s.batch, 6)},
    "haar_frame": {"batch": lambda s, o: s.batch, "dtype": lambda s, o: s.dtype},
    "random_rotation": {"batch": lambda s, o: s.batch, "dtype": lambda s, o: s.dtype},
    "SpectrumMap": {"rank": lambda s, o: s.shape.rank},
    "spectrum_map": {"rank": lambda s, o: s.shape.rank},
    "SpectrumMap.inverse": {"spectrum": lambda s, o: o(s.tensor(*s.batch, *o.coordinate_shape))},
    "SpectrumMap.nearest": {"spectrum": lambda s, o: o(s.tensor(*s.batch, *o.coordinate_shape))},
    "hold_spectrum": {"spectrum": lambda s, o: SpectrumMap(s.spectrum, s.shape.rank)},
    "FixedTTRankManifold": {"spectrum": lambda s, o: "full"},
    "FixedTTRankManifold.from_matrix": {"W": lambda s, o: s.W},
    "FixedTTRankManifold.pack": {"tt": lambda s, o: s.F.unpack(s.point(s.F))},
    "FixedTTRankManifold.project_chain": {"chain": lambda s, o: chain_of(s)},
    "HouseholderWeight.decay_": {"amount": lambda s, o: 0.1},
    "decay_weights": {
        "model": lambda s, o: s.layer_of_chart,
        "optimizer": lambda s, o: torch.optim.SGD(s.layer_of_chart.parameters(), lr=0.1),
        "weight_decay": lambda s, o: 0.1,
    },
    "FixedTTRankManifold.weight_decay_grad": {"weight_decay": lambda s, o: 0.1},
    "FixedTTRankManifold.random": {"size": lambda s, o: s.sizes(o)},
    "FixedTTRankManifold.origin": {"size": lambda s, o: s.sizes(o)},
    "FixedTTRankManifold.random_parameter": {"size": lambda s, o: s.sizes(o)},
    "SpectralTTManifold.random": {"size": lambda s, o: s.sizes(o)},
    "SpectralTTManifold.origin": {"size": lambda s, o: s.sizes(o)},
    "SpectralTTManifold.random_parameter": {"size": lambda s, o: s.sizes(o)},
    "SpectralTTManifold.cores": {"spectrum": lambda s, o: o.map},
    "SpectralTTManifold.join": {
        "frames": lambda s, o: s.M.unpack(s.point(s.M)).core_frames(),
        "coordinates": lambda s, o: s.point(o)[..., o.spectrum_slice],
    },
    "TTShape": {"rank": lambda s, o: 2},
    "follow": {"optimizer": lambda s, o: s.followed(), "model": lambda s, o: s.network},
    "clip_grad_norm_": {
        "parameters": lambda s, o: s.optimizer().param_groups[0]["params"],
        "max_norm": lambda s, o: 1.0,
    },
    "gradient_noise_scale": {
        "losses": lambda s, o: [(s.leaf - k).square().sum() for k in range(3)],
        "parameters": lambda s, o: [s.leaf],
    },
    "HouseholderWeight.set_extra_state": {"state": lambda s, o: o.get_extra_state()},
    "RiemannianWeight.set_extra_state": {"state": lambda s, o: o.get_extra_state()},
    "TrustRegionOptions": {"theta": lambda s, o: 0.5},
    "minimize": {
        "manifold": lambda s, o: s.picked,
        "x0": lambda s, o: s.point(s.picked),
        "method": lambda s, o: s.rng.choice(
            ["trust_regions", "conjugate_gradient", "lbfgs", "steepest_descent"]
        ),
    },
    "transfer": {
        "source": lambda s, o: s.M, "target": lambda s, o: s.M, "x": lambda s, o: s.point(s.M),
    },
    "transfer_vector": {
        "source": lambda s, o: s.M, "target": lambda s, o: s.F, "x": lambda s, o: s.point(s.M),
        "u": lambda s, o: s.tangent(s.M),
    },
    "adapt": {"model": lambda s, o: s.dense_model(), "spectrum": lambda s, o: "full",
              "init": lambda s, o: "random", "name": lambda s, o: "default"},
    "adapters": {"model": lambda s, o: s.adapted()},
    "align_adapters": {"model": lambda s, o: s.adapted(), "loss": lambda s, o: s.loss},
    "merge": {"model": lambda s, o: s.adapted()},
    "unmerge": {"model": lambda s, o: s.adapted()},
    "remove_adapter": {"model": lambda s, o: s.adapted()},
    "set_adapter": {"model": lambda s, o: s.adapted()},
    "without_adapters": {"model": lambda s, o: s.adapted()},
    "save_adapter": {"model": lambda s, o: s.adapted(), "path": lambda s, o: FILE,
                     "name": lambda s, o: "default"},
    "load_adapter": {"path": lambda s, o: s.written_adapter(),
                     "into": lambda s, o: s.dense_model(), "name": lambda s, o: "mine"},
    "SpectralUpdate": {"weight": lambda s, o: s.weight()},
    "save": {"model": lambda s, o: s.saved, "path": lambda s, o: FILE, "exact": lambda s, o: True},
    "load": {"path": lambda s, o: s.written(), "into": lambda s, o: copy.deepcopy(s.saved)},
    "SpectrumMonitor": {
        "rule": lambda s, o: sm.nn.CollapseRule(), "writer": lambda s, o: None,
        "on_alarm": lambda s, o: None, "model": lambda s, o: nn.Sequential(nn.Linear(6, 4)),
    },
    "CollapseRule": {
        "fall": lambda s, o: 0.4, "least_ratio": lambda s, o: 1e-2, "patience": lambda s, o: 2,
        "reference": lambda s, o: 2, "window": lambda s, o: 11, "z": lambda s, o: 3.0,
    },
    "spectral_penalty": {"name": lambda s, o: s.rng.choice(["d_optimal", "divergence"])},
    "compress": {
        "model": lambda s, o: s.dense_model(), "init": lambda s, o: "pretrained",
        "spectrum": lambda s, o: "free", "rank": lambda s, o: 4,
        "data": lambda s, o: s.rng.choice([None, [s.tensor(3, 24)]]),
        "only": lambda s, o: s.rng.choice([None, "0", [nn.Linear]]),
        "of": lambda s, o: "treated", "allocate": lambda s, o: "uniform",
    },
    "hold": {
        "model": lambda s, o: s.dense_model(), "name": lambda s, o: "0.weight",
        "init": lambda s, o: "pretrained", "spectrum": lambda s, o: "free",
        "count": lambda s, o: 2, "stacked": lambda s, o: False, "order": lambda s, o: (1, 0),
        "rows": lambda s, o: 1,
    },
    "MatrixView": {
        "shape": lambda s, o: (8, 3, 4), "count": lambda s, o: 2, "stacked": lambda s, o: False,
        "order": lambda s, o: (0, 2, 1), "rows": lambda s, o: 2,
    },
    "MatrixView.split": {"parameter": lambda s, o: s.tensor(*o.shape)},
    "MatrixView.join": {"matrices": lambda s, o: s.tensor(o.count, *o.sizes)},
    "WeightStack": {"weights": lambda s, o: [s.weight(), s.weight()]},
    "WeightStack.encode_": {
        "tt": lambda s, o: sm.tt_svd(s.tensor(2, o.shape.d_out, o.shape.d_in), o.shape),
        "project": lambda s, o: True,
    },
    "AdaptedTensor": {"base": lambda s, o: nn.Parameter(s.tensor(12, 4)),
                      "view": lambda s, o: sm.nn.MatrixView((12, 4), 3)},
    "RiemannianAdam": {"retraction": lambda s, o: "newton_schulz"},
    "RiemannianSGD": {"retraction": lambda s, o: "newton_schulz"},
}  # fmt: skip
for _name in ("check_manifold", "check_retraction", "check_vector_transport", "check_gradient",
              "check_hessian", "to_pymanopt", "pymanopt_problem"):  # fmt: skip
    SPECIAL[_name] = {
        "M": lambda s, o: s.picked, "manifold": lambda s, o: s.picked,
        "x": lambda s, o: s.point(s.picked), "u": lambda s, o: s.tangent(s.picked, 1),
        "v": lambda s, o: s.tangent(s.picked, 2),
    }  # fmt: skip


# Layers: the stock one by its arguments, which ours has as well, and the size of an input; for
# those that take indices, the indices.
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[Any, ...], Any]] = {
    "SpectralLinear": (nn.Linear, (6, 4), (2, 6)),
    "SpectralConv1d": (nn.Conv1d, (3, 4, 3), (2, 3, 5)),
    "SpectralConv2d": (nn.Conv2d, (3, 4, 3), (2, 3, 5, 5)),
    "SpectralConv3d": (nn.Conv3d, (3, 4, 3), (2, 3, 5, 3, 4)),
    "SpectralConvTranspose1d": (nn.ConvTranspose1d, (3, 4, 3), (2, 3, 5)),
    "SpectralConvTranspose2d": (nn.ConvTranspose2d, (3, 4, 3), (2, 3, 5, 4)),
    "SpectralConvTranspose3d": (nn.ConvTranspose3d, (3, 4, 3), (2, 3, 2, 3, 2)),
    "SpectralTransposedLinear": (lambda nx, nf: conv1d(nf, nx), (6, 4), (2, 6)),
    "SpectralEmbedding": (nn.Embedding, (6, 4), torch.tensor([[5, 0, 0]])),
    "SpectralEmbeddingBag": (nn.EmbeddingBag, (6, 4), torch.tensor([[5, 0, 0]])),
}


def stock(s: Setting, o: Any) -> nn.Module:
    kind, sizes, _ = LAYERS[type(o).__name__ if o is not None else "SpectralLinear"]
    return kind(*sizes).to(s.dtype).to(s.device)


def dense_layer(s: Setting, o: Any, named: dict[str, Any], result: Any) -> tuple[Any, Any]:
    """What a layer gives, and what the stock one gives with the dense weight."""
    kind, sizes, _ = LAYERS[type(o).__name__]
    bias = getattr(o, "bias", None)
    tensors = {"weight": o.weight} | ({} if bias is None else {"bias": bias})
    x = [named[n] for n in named]
    return result, torch.func.functional_call(kind(*sizes).to(s.dtype), tensors, tuple(x))


def layer_values(name: str) -> None:
    _, _, size = LAYERS[name]
    SPECIAL[name] = SPECIAL[f"{name}.from_layer"] = {"rank": lambda s, o: 2}
    SPECIAL[f"{name}.shape_of"] = {"name": lambda s, o: "weight"}
    SPECIAL[f"{name}.view_of"] = {"name": lambda s, o: "weight"}
    SPECIAL[f"{name}.in_place_of"] = {"weights": lambda s, o: {"weight": o.spectral_weight}}
    SPECIAL[f"{name}.forward"] = {
        "x": lambda s, o: s.tensor(*size) if isinstance(size, tuple) else size.to(s.device)
    }


for _name in LAYERS:
    layer_values(_name)


def chain_of(s: Setting) -> Any:
    from sttp_manifold.manifolds.fixed_tt_geometry import Vector
    from sttp_manifold.tt.contract import mirror

    tt = s.tt.merged()
    return Vector(tt.left, tt.bond, mirror(tt.right))


# Objects whose methods are called.
OBJECTS: dict[str, Callable[[Setting], Any]] = {
    "TTShape": lambda s: s.shape,
    "SpectralTT": lambda s: s.tt,
    "SpectrumMap": lambda s: SpectrumMap(s.spectrum, s.shape.rank),
    "HouseholderChart": lambda s: s.chart,
    "SpectralTTManifold": lambda s: s.M,
    "FixedTTRankManifold": lambda s: s.F,
    "HouseholderWeight": lambda s: s.weight("householder"),
    "RiemannianWeight": lambda s: s.weight("riemannian"),
    "MatrixView": lambda s: sm.nn.MatrixView((8, 3, 4), 2, order=(0, 2, 1), rows=2),
    "WeightStack": lambda s: sm.nn.WeightStack([s.weight(), s.weight()]),
}


def spectral(name: str) -> Callable[[Setting], Any]:
    def make(s: Setting) -> Any:
        kinds = {"dtype": s.dtype, "device": s.device, "method": s.method}
        return getattr(sm.nn, name)(*LAYERS[name][1], rank=2, **kinds)

    return make


OBJECTS |= {name: spectral(name) for name in LAYERS}


# -- what is called -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A public function, class or method."""

    name: str
    of: str = ""
    method: str = ""
    function: Any = field(default=None, compare=False, repr=False)

    def bound(self, s: Setting) -> tuple[Any, Any]:
        """The callable, and the object that it belongs to."""
        if not self.of:
            return self.function, None
        o = OBJECTS[self.of](s)
        return getattr(o, self.method), o


def targets() -> list[Target]:
    found: dict[str, Target] = {}
    for package in PACKAGES:
        module = importlib.import_module("sttp_manifold" + package)
        for name in module.__all__:
            thing = getattr(module, name)
            if not callable(thing) or name in LEFT_OUT or inspect.ismodule(thing):
                continue
            found.setdefault(name, Target(name, function=thing))
            if inspect.isclass(thing) and name in OBJECTS:
                for method in public_methods(thing):
                    found.setdefault(f"{name}.{method}", Target(f"{name}.{method}", name, method))
    return list(found.values())


def public_methods(cls: type) -> Iterator[str]:
    seen = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("sttp_manifold"):
            continue
        for name, value in vars(base).items():
            plain = inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod))
            if plain and not name.startswith("_") and name not in seen | LEFT_OUT:
                seen.add(name)
                yield name


# -- what is given ------------------------------------------------------------------------------

WRONG: list[Callable[[Any], Any]] = [
    lambda good: None, lambda good: "nonsense", lambda good: "", lambda good: 3, lambda good: -1,
    lambda good: 0, lambda good: 2.5, lambda good: float("nan"), lambda good: float("inf"),
    lambda good: 2**70, lambda good: 10**15, lambda good: True, lambda good: object(),
    lambda good: [], lambda good: [1, 2], lambda good: {}, lambda good: b"x",
    lambda good: (1, "a", None), lambda good: torch.tensor(1.0), lambda good: torch.zeros(0),
    lambda good: torch.ones(1), lambda good: torch.ones(1).double(),
    lambda good: torch.ones(2, 3, 4), lambda good: torch.full((3,), float("nan")),
    lambda good: torch.ones(3, dtype=torch.int64), lambda good: torch.ones(3).cfloat(),
    lambda good: torch.tensor([True, False]), lambda good: torch.ones(3, device="meta"),
    lambda good: np.ones(3), lambda good: (lambda *a, **k: None), lambda good: torch.float16,
    lambda good: nn.ReLU(), lambda good: TTShape((7,), (3,), rank=2),
    lambda good: tt_svd(torch.ones(7, 3), TTShape((7,), (3,), rank=2)),
]  # fmt: skip


def near(good: Any) -> list[Callable[[Any], Any]]:
    """Values that are almost right."""
    if isinstance(good, Tensor):
        return [
            lambda g: g[..., :1] if g.ndim else g, lambda g: g.unsqueeze(0), torch.flatten,
            lambda g: g * float("nan"), lambda g: g.to(torch.float16), lambda g: g.double(),
            lambda g: g.to("meta"), lambda g: g.int(), lambda g: g.tolist(), lambda g: g.cfloat(),
            lambda g: g.sum(), lambda g: torch.cat([g, g], -1), lambda g: g.float().numpy(),
            lambda g: g.mT if g.ndim > 1 else g.unsqueeze(-1), lambda g: g.requires_grad_(),
            lambda g: torch.zeros_like(g), lambda g: g * float("inf"), lambda g: g.to_sparse(),
        ]  # fmt: skip
    if isinstance(good, bool) or good is None or isinstance(good, str):
        return []
    if isinstance(good, int):
        return [lambda g: g + 1, lambda g: -g, float, str, lambda g: g - 1, lambda g: [g]]
    if isinstance(good, (tuple, list)):
        return [
            lambda g: g[:-1], lambda g: (*g, *g), lambda g: list(g), lambda g: tuple(reversed(g)),
            lambda g: (None, *g[1:]), lambda g: [spoilt(v) for v in g[:3]],
        ]  # fmt: skip
    if isinstance(good, SpectralTT):
        return [
            lambda g: g.to(torch.float16), lambda g: g.to("meta"), lambda g: g.to_matrix(),
            lambda g: SpectralTT(g.left, g.spectrum * float("nan"), g.right, g.shape),
            lambda g: SpectralTT([c * float("nan") for c in g.left], g.spectrum, g.right, g.shape),
            lambda g: SpectralTT([c * 2 for c in g.left], g.spectrum, g.right, g.shape),
            lambda g: g._map(lambda t: t.unsqueeze(0)), lambda g: g.double(),
        ]  # fmt: skip
    return []


def spoilt(value: Any) -> Any:
    return value * float("nan") if isinstance(value, Tensor) else str(value)


def spoil(rng: random.Random, good: Any) -> Any:
    pool = near(good)
    pick = rng.choice(pool) if pool and rng.random() < 0.6 else rng.choice(WRONG)
    try:
        return pick(good)
    except Exception:
        return rng.choice(WRONG)(good)


def arguments(
    target: Target, call: Any, o: Any, s: Setting, spoilt_count: int, optional: float = 0.4
) -> tuple[list[Any], dict[str, Any], list[str]]:
    """Positional and named arguments, and the names of those that are spoilt."""
    given: dict[str, Any] = {}
    special = SPECIAL.get(target.name, {})
    parameters = inspect.signature(call).parameters
    for name, p in parameters.items():
        known = special.get(name, GOOD.get(name))
        required = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if known is None:
            if required:
                raise LookupError(f"no value for parameter {name!r} of {target.name}")
            continue
        if p.kind == p.VAR_KEYWORD or not (
            required or name in special or s.rng.random() < optional
        ):
            continue
        given[name] = known(s, o)
    wrong = s.rng.sample(sorted(given), min(spoilt_count, len(given)))
    for name in wrong:
        given[name] = spoil(s.rng, given[name])
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for name, value in given.items():
        if parameters[name].kind == inspect.Parameter.VAR_POSITIONAL:
            positional += list(value) if isinstance(value, (tuple, list)) else [value]
        elif parameters[name].kind == inspect.Parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            named[name] = value
    return positional, named, wrong


# -- what comes of it ---------------------------------------------------------------------------

_TORCH = re.compile(
    r"\w+\(\)[:,]? |argument '|must be Tensor|expected Tensor|invalid combination of arguments|"
    r"expected .* as element|Overflow when unpacking|Tensor|torch\.|dtype|optimizer|params",
)


def fault(error: BaseException) -> str | None:
    """What is wrong with an error, or None if it is one that names its culprit."""
    text = str(error).strip()
    where = traceback.extract_tb(error.__traceback__)
    last = where[-1].filename if where else ""
    told = f"{type(error).__name__}: {text[:200]}"
    place = next((f"{f.filename.split('sttp_manifold/')[-1]}:{f.lineno}"
                  for f in reversed(where) if "/sttp_manifold/" in f.filename), "")  # fmt: skip
    told = f"{told} [{place}]"
    if not text:
        return f"no word: {told}"
    if isinstance(error, SttpError):
        return None
    if isinstance(error, (RecursionError, SlowError)):
        return told
    if isinstance(error, OSError):
        return None  # the system's, which names the file
    if isinstance(error, TypeError) and ("fuzzing.py" in last or "unexpected keyword" in text):
        return None  # a call that does not bind, as Python says it
    if type(error).__name__ == "TypeCheckError":
        return None  # shapes in signatures, which tests check
    outside = re.search(r"/(torch|geoopt)/", last) and "/sttp_manifold/" not in last
    if outside and not isinstance(error, (AttributeError, AssertionError, KeyError)):
        return None
    if isinstance(error, (RuntimeError, MemoryError)):
        return None  # torch's, NotImplementedError among them
    if isinstance(error, (TypeError, ValueError, IndexError)) and _TORCH.match(text):
        return None
    return told


class SlowError(Exception):
    """A call that does not end."""


@contextlib.contextmanager
def limited(seconds: int = SECONDS) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise SlowError(f"a call took over {seconds} s")

    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread only
        return
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Files that are written lie in a folder that goes."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, SpectralTT):
        yield from (*value.left, value.spectrum, *value.right)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


@dataclass
class Outcome:
    """A call and what came of it."""

    call: str
    spoilt: list[str]
    result: Any = None
    error: BaseException | None = None
    wrong: str | None = None


def attempt(target: Target, seed: int, *, plain: bool = False) -> Outcome:
    """Call a target once; with ``plain``, only with right arguments."""
    s = Setting(zlib.crc32(target.name.encode()) + seed, plain=plain)
    s.picked = s.manifold()
    count = 0 if plain else s.rng.choice([0, 1, 1, 1, 2])
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), apart():
        warnings.simplefilter("ignore")
        call, o = target.bound(s)
        positional, named, wrong = arguments(target, call, o, s, count, 0.0 if plain else 0.4)
        told = ", ".join([*map(brief, positional), *(f"{k}={brief(v)}" for k, v in named.items())])
        outcome = Outcome(f"seed {seed}: {target.name}({told})", wrong)
        kept = copy.copy(named)
        try:
            with limited():
                outcome.result = call(*positional, **named)
                repr(outcome.result)
        except Exception as error:
            outcome.error, outcome.wrong = error, fault(error)
            return outcome
        if not wrong:
            outcome.wrong = refuted(target, s, o, positional, kept, outcome.result)
    return outcome


def brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{tuple(value.shape)}{'@meta' * value.is_meta}"
    return re.sub(r"\s+", " ", f"{value!r:.70}")


def refuted(
    target: Target, s: Setting, o: Any, positional: list[Any], named: dict[str, Any], result: Any
) -> str | None:
    """What is wrong with the result of right arguments."""
    ordinary = s.scale == 1 and s.dtype in (torch.float32, torch.float64) and s.device == "cpu"
    if not ordinary:
        return None
    if not all(bool(t.isfinite().all()) for t in tensors(result) if not t.is_meta):
        return "a result that is not finite"
    oracle = ORACLES.get(target.name)
    if oracle is None:
        return None
    found, wanted = oracle(s, o, named, result)
    tolerance = 1e-8 if s.dtype == torch.float64 else 2e-3
    try:
        torch.testing.assert_close(
            torch.as_tensor(found).double(), torch.as_tensor(wanted).double(),
            rtol=tolerance, atol=tolerance,
        )  # fmt: skip
    except AssertionError as error:
        return f"refuted by its oracle: {str(error)[:200]}"
    return None


def dense(tt: SpectralTT) -> Tensor:
    """The definition of a weight, by einsum over one mode after another."""
    u = torch.ones(*tt.batch_shape, 1, 1, dtype=tt.dtype)
    for core in tt.left:
        u = torch.einsum("...xr,...rns->...xns", u, core).flatten(-3, -2)
    vt = torch.ones(*tt.batch_shape, 1, 1, dtype=tt.dtype)
    for core in reversed(tt.right):
        vt = torch.einsum("...rms,...sy->...rmy", core, vt).flatten(-2)
    bond = tt.spectrum if tt.is_full else torch.diag_embed(tt.spectrum)
    return u @ bond @ vt


def quasi_optimal(W: Tensor, tt: SpectralTT) -> bool:
    """Whether the error is within the bound of TT-SVD: the tails of all unfoldings together."""
    modes, ranks = tt.shape.out_modes + tt.shape.in_modes, tt.shape.ranks
    bound = torch.zeros(W.shape[:-2], dtype=W.dtype)
    for k in range(1, len(modes)):
        unfolding = W.reshape(*W.shape[:-2], math.prod(modes[:k]), math.prod(modes[k:]))
        bound = bound + torch.linalg.svdvals(unfolding)[..., ranks[k] :].square().sum(-1)
    # The centre comes first, and its error is carried outwards by orthogonal projections.
    error = torch.linalg.matrix_norm(W - dense(tt))
    size = torch.linalg.matrix_norm(W)
    return bool((error <= bound.sqrt() * (1 + math.sqrt(len(modes))) + 1e-5 * size).all())


def gram_error(Q: Tensor) -> Tensor:
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().sum()


Oracle = Callable[[Setting, Any, dict[str, Any], Any], tuple[Any, Any]]

# What is computed, and what it should be by a way that is not ours.
ORACLES: dict[str, Oracle] = {
    "TTShape.dim": lambda s, o, a, r: (r <= s.shape.numel, True),
    "prime_factors": lambda s, o, a, r: (int(np.prod(r, dtype=object)) == a["n"], True),
    "SpectralTT.to_matrix": lambda s, o, a, r: (r, dense(o)),
    "SpectralTT.matvec": lambda s, o, a, r: (r, (dense(o) @ a["x"].mT).mT),
    "SpectralTT.rmatvec": lambda s, o, a, r: (r, a["y"] @ dense(o)),
    "SpectralTT.entries": lambda s, o, a, r: (r, dense(o)[..., a["i"], a["j"]]),
    "SpectralTT.norm": lambda s, o, a, r: (r, torch.linalg.matrix_norm(dense(o))),
    "SpectralTT.merged": lambda s, o, a, r: (dense(r), dense(o)),
    "SpectralTT.clone": lambda s, o, a, r: (dense(r), dense(o)),
    "SpectralTT.singular_values": lambda s, o, a, r: (
        r, torch.linalg.svdvals(dense(o))[..., : o.shape.rank],
    ),
    "SpectralTT.distance": lambda s, o, a, r: (
        r, torch.linalg.matrix_norm(dense(o) - dense(a["other"])),
    ),
    "orthogonalize": lambda s, o, a, r: (dense(r), dense(s.tt)),
    "canonical_gauge": lambda s, o, a, r: (dense(r), dense(s.tt)),
    "rotate": lambda s, o, a, r: (dense(r), dense(s.tt)),
    "full_frame": lambda s, o, a, r: (gram_error(r.mT if a.get("transposed") else r), 0.0),
    "reduced_frame": lambda s, o, a, r: (gram_error(r.mT if a.get("transposed") else r), 0.0),
    "full_reflectors": lambda s, o, a, r: (full_frame(r[0], 5, 3), a["Q"] * r[1].unsqueeze(-2)),
    "reduced_reflectors": lambda s, o, a, r: (reduced_frame(r[0], 5, 3), a["Q"] @ r[1]),
    "haar_frame": lambda s, o, a, r: (gram_error(r), 0.0),
    "random_rotation": lambda s, o, a, r: (gram_error(r), 0.0),
    "SpectrumMap.inverse": lambda s, o, a, r: (
        o(r).abs() if o.name == "identity" else o(r), a["spectrum"],
    ),
    "HouseholderChart.unpack": lambda s, o, a, r: (r.orthonormality_error(), 0.0),
    "SpectralTTManifold.unpack": lambda s, o, a, r: (r.orthonormality_error(), 0.0),
    "SpectralTTManifold.to_matrix": lambda s, o, a, r: (r, dense(o.unpack(a["x"]))),
    "FixedTTRankManifold.to_matrix": lambda s, o, a, r: (r, dense(o.unpack(a["x"]))),
    "SpectralTTManifold.pack": lambda s, o, a, r: (dense(o.unpack(r)), dense(a["tt"])),
    "FixedTTRankManifold.pack": lambda s, o, a, r: (dense(o.unpack(r)), dense(a["tt"])),
    "FixedTTRankManifold.inner": lambda s, o, a, r: (
        r.flatten(),
        (o.ambient_vector(a["x"], a["u"]) * o.ambient_vector(a["x"], a.get("v", a["u"]))).sum(
            (-2, -1)
        ).flatten(),
    ),
    "FixedTTRankManifold.retr": lambda s, o, a, r: (o.unpack(r).orthonormality_error(), 0.0),
    "SpectralTTManifold.retr": lambda s, o, a, r: (o.unpack(r).orthonormality_error(), 0.0),
    "tt_svd": lambda s, o, a, r: (quasi_optimal(a["W"], r), True),
    "truncate": lambda s, o, a, r: (quasi_optimal(dense(a["tt"]), r), True),
    "hold_spectrum": lambda s, o, a, r: (dense(r), dense(a["tt"])),
    "d_optimal": lambda s, o, a, r: (
        r, -(a["s"].abs() / a["s"].abs().amax(-1, keepdim=True)).log().mean(-1),
    ),
    "HouseholderChart.pack": lambda s, o, a, r: (dense(o.unpack(r)), dense(a["tt"])),
    "FixedTTRankManifold.project_matrix": lambda s, o, a, r: (
        (o.ambient_vector(a["x"], r) * (a["Z"] - o.ambient_vector(a["x"], r))).sum((-2, -1)), 0.0
    ),
    "FixedTTRankManifold.proju": lambda s, o, a, r: (o.proju(a["x"], r), r),
    "SpectralTTManifold.proju": lambda s, o, a, r: (o.proju(a["x"], r), r),
    "minimize": lambda s, o, a, r: (
        bool(r.fun <= float(a["cost"](a["manifold"].unpack(a["x0"]))) + 1e-6), True,
    ),
    "transfer": lambda s, o, a, r: (dense(s.M.unpack(r)), dense(s.M.unpack(a["x"]))),
}  # fmt: skip

ORACLES |= {f"{name}.forward": dense_layer for name in LAYERS}
