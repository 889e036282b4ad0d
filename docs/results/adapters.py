"""Adapters of this package and LoRA at equal parameters, on Fashion-MNIST: writes adapters.json.

    python docs/results/adapters.py            # about two minutes on one core
    python docs/results/adapters.py --ranks 2 4 8 --seeds 10 --methods all    # half an hour
    python docs/results/adapters.py --table    # the tables of docs/adapters.md from what is there

A small convolutional network is trained on five classes of clothes (T-shirt, trouser, pullover,
dress, coat) and then adapted to the other five (sandal, shirt, sneaker, bag, boot) from 50 images
of each: body frozen, a new head, and an adapter beside each of its four layers. LoRA is PEFT's.
Every method has as many numbers to train as LoRA of the rank, layer by layer, or just below. Each
takes the learning rate that is best on images of its own, over seeds of its own; the table is over
other seeds and the 5,000 test images of the five classes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sttp_manifold as sm
from sttp_manifold.experiments.data import fashion_mnist

HERE = Path(__file__).parent
RANKS = (4,)
TUNING, TESTING = range(100, 102), range(4)
STEPS, BATCH, SHOTS, HEAD_LR = 80, 32, 50, 3e-3
LAYERS = ("0", "2", "5", "7")


@dataclass(frozen=True)
class Method:
    """A way to adapt: how it is put in, how it steps, and the rates that are tried."""

    rates: tuple[float, ...]
    how: dict[str, Any] | None = None
    muon: bool = False
    aligned: bool = False


ADAM = (1e-2, 3e-2, 1e-1)
ANGLES = (1e-2, 3e-2, 1e-1)
METHODS: dict[str, Method] = {
    "head alone": Method((0.0,)),
    "all weights": Method((3e-4, 1e-3, 3e-3)),
    "LoRA": Method(ADAM),
    "SVDP chart": Method(ADAM, {"kind": "svdp"}),
    "SVDP chart, aligned": Method(ADAM, {"kind": "svdp"}, aligned=True),
    "SVDP Muon, aligned": Method(
        ANGLES, {"kind": "svdp", "method": "riemannian"}, muon=True, aligned=True
    ),
    "STTP chart": Method(ADAM, {"kind": "sttp"}),
    "STTP chart, aligned": Method(ADAM, {"kind": "sttp"}, aligned=True),
    "STTP Muon, aligned": Method(
        ANGLES, {"kind": "sttp", "method": "riemannian"}, muon=True, aligned=True
    ),
}  # fmt: skip


SHOWN = [name for name in METHODS if name not in ("SVDP chart", "SVDP Muon, aligned")]


def network() -> nn.Sequential:
    """The network that is trained first, with a head of five classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 5),
    )


@dataclass(frozen=True)
class Data:
    """Images and classes, of the first five classes and of the others."""

    first: tuple[Tensor, Tensor]
    other: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load() -> Data:
    """Both halves of Fashion-MNIST."""
    splits = fashion_mnist()

    def of(part: Any, is_first: bool) -> tuple[Tensor, Tensor]:
        x = part.inputs.float().reshape(-1, 1, 28, 28)
        y = part.targets.long()
        keep = (y < 5) == is_first
        return x[keep], y[keep] if is_first else y[keep] - 5

    return Data(of(splits.train, True), of(splits.train, False), of(splits.test, False))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(a).argmax(-1) == b).sum())
            for a, b in zip(x.split(1000), y.split(1000), strict=True)
        )
    model.train()
    return 100.0 * right / len(y)


def pretrain(data: Data) -> nn.Sequential:
    """Two epochs of Adam on the first five classes."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = data.first
    for _ in range(2):
        for batch in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


# -- one run -----------------------------------------------------------------------------------


def rank_within(layer: nn.Module, count: int, how: dict[str, Any]) -> int:
    """The largest rank at which an update of a layer has no more numbers than LoRA's."""
    size = layer.weight.shape
    best = 0
    for rank in range(1, min(size[0], size[1:].numel()) + 1):
        plan = sm.TTShape.for_weight(tuple(size), rank, kind=how["kind"])
        if plan.num_parameters("full") <= count:
            best = rank
    return best


def adapted(model: nn.Sequential, name: str, rank: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of the network with an adapter, and what is trained of it beside the head."""
    method, model = METHODS[name], copy.deepcopy(model)
    model[-1].reset_parameters()
    head = list(model[-1].parameters())
    if name == "all weights":
        return model, [p for p in model.parameters() if not any(p is h for h in head)]
    if name == "LoRA":
        import peft

        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(LAYERS), modules_to_save=None
        )
        tuned = peft.inject_adapter_in_model(config, model)
        parameters = [p for n, p in tuned.named_parameters() if "lora_" in n]
    elif method.how is not None:
        for at in LAYERS:
            layer = model.get_submodule(at)
            size = layer.weight.shape
            count = rank * (size[0] + size[1:].numel())
            own = rank_within(layer, count, method.how)
            sm.nn.adapt(model, own, [at], **method.how)
        tuned = model
        parameters = [p for p in model.parameters() if p.requires_grad]
    else:
        tuned, parameters = model.requires_grad_(False), []
    for p in head:
        p.requires_grad_(True)
    return tuned, parameters


def optimizer_for(method: Method, lr: float, parameters: list[Any], head: list[Any]) -> Any:
    """Head and adapter by one optimizer, the head at a rate that is the same for all."""
    groups: list[dict[str, Any]] = [{"params": head, "lr": HEAD_LR}]
    if method.muon:
        groups[0]["adam_lr"] = HEAD_LR
        groups.append({"params": parameters, "lr": lr, "adam_lr": lr})
        return sm.optim.RiemannianMuon(groups)
    if parameters:
        groups.append({"params": parameters, "lr": lr})
    if method.how is not None and method.how.get("method") == "riemannian":
        return sm.optim.RiemannianAdam(groups, second_moment="frame")
    return torch.optim.Adam(groups)


def run(
    model: nn.Sequential, data: Data, name: str, rank: int, lr: float, seed: int, *, tuning: bool
) -> dict[str, Any]:
    """Train once; accuracy on test images, or on images of the training set for a rate."""
    torch.manual_seed(seed)
    method = METHODS[name]
    x, y = data.other
    order = torch.randperm(len(y))
    chosen = torch.cat([order[y[order] == k][:SHOTS] for k in range(5)])
    held = order[torch.isin(order, chosen, invert=True)][:2000]
    tuned, parameters = adapted(model, name, rank)
    head = [p for p in tuned.parameters() if p.requires_grad]
    head = [p for p in head if not any(p is q for q in parameters)]
    batches = [torch.randint(len(chosen), (BATCH,)) for _ in range(STEPS)]
    if method.aligned:
        first = chosen
        sm.nn.align_adapters(tuned, lambda: nn.functional.cross_entropy(tuned(x[first]), y[first]))
    optimizer = optimizer_for(method, lr, parameters, head)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    began = time.process_time()
    for batch in batches:
        some = chosen[batch]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(tuned(x[some]), y[some])
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - began
    scored = (x[held], y[held]) if tuning else data.test
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return {
        "method": name,
        "rank": rank,
        "lr": lr,
        "seed": seed,
        "accuracy": accuracy(tuned, *scored),
        "loss": float(loss.detach()),
        "trained": sum(p.numel() for p in parameters),
        "dimension": dimension(tuned, parameters),
        "step_ms": 1e3 * seconds / STEPS,
        "train_kb": sum(t.nbytes for t in (*parameters, *parameters, *state)) / 1024,
    }


def dimension(tuned: nn.Module, parameters: list[nn.Parameter]) -> int:
    """Of the set of updates: LoRA's factors have ``r^2`` numbers too many in each layer."""
    weights = [m for m in tuned.modules() if isinstance(m, sm.nn.SpectralWeight)]
    if weights:
        return sum(w.shape.dim(w.spectrum) for w in weights)
    return sum(p.numel() for p in parameters) - sum(
        p.shape[0] ** 2 for n, p in tuned.named_parameters() if "lora_A" in n
    )


# -- all of them -------------------------------------------------------------------------------


def experiment(out: Path, methods: list[str], ranks: tuple[int, ...], seeds: int) -> None:
    """Rates on seeds of their own, then the runs that are reported; all of it into one file."""
    data = load()
    model = pretrain(data)
    found: dict[str, Any] = {
        "about": __doc__,
        "torch": torch.__version__,
        "settings": {"steps": STEPS, "batch": BATCH, "shots": SHOTS, "head_lr": HEAD_LR},
        "methods": {name: asdict(method) for name, method in METHODS.items()},
        "tuning": [],
        "runs": [],
    }
    for rank in ranks:
        rates: dict[str, float] = {}
        for name in methods:
            if METHODS[name].how is None and name != "LoRA" and rank != ranks[0]:
                continue  # they have no rank
            rates[name] = best_rate(model, data, name, rank, found["tuning"])
        for seed in range(seeds):
            # In turn, so that times are of one machine in one mood.
            for name, lr in rates.items():
                found["runs"].append(run(model, data, name, rank, lr, seed, tuning=False))
            out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found))


def best_rate(
    model: nn.Sequential, data: Data, name: str, rank: int, records: list[dict[str, Any]]
) -> float:
    """The rate of the highest mean accuracy on images that are not trained on."""
    means = {}
    for lr in METHODS[name].rates:
        some = [run(model, data, name, rank, lr, seed, tuning=True) for seed in TUNING]
        records += some
        means[lr] = statistics.fmean(r["accuracy"] for r in some)
    print(f"rank {rank}, {name}: " + ", ".join(f"{lr:g}: {a:.2f}" for lr, a in means.items()))
    return max(means, key=lambda lr: means[lr])


def table(found: dict[str, Any]) -> str:
    """The table of a file in Markdown: means with 95 % intervals, differences to LoRA paired."""
    runs = found["runs"]
    lines = [
        "| rank | method | dimension | stored | rate | accuracy (%) | against LoRA | step | KB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rank in sorted({r["rank"] for r in runs}):
        mine = {
            name: [r for r in runs if (r["rank"], r["method"]) == (rank, name)] for name in METHODS
        }
        lora = {r["seed"]: r for r in mine["LoRA"]}
        for name, some in mine.items():
            if not some:
                continue
            gap = [r["accuracy"] - lora[r["seed"]]["accuracy"] for r in some]
            time = statistics.median(r["step_ms"] / lora[r["seed"]]["step_ms"] for r in some)
            scores = [r["accuracy"] for r in some]
            one = some[0]
            against = "" if name == "LoRA" else interval(gap, sign=True)
            lines.append(
                f"| {rank} | {name} | {one['dimension']:,} | {one['trained']:,} | {one['lr']:g} | "
                f"{interval(scores)} | {against} | {time:.2f} | {one['train_kb']:.0f} |"
            )
    return "\n".join(lines)


def interval(values: list[float], sign: bool = False) -> str:
    """Mean and half of its 95 % interval, by Student's t."""
    from scipy.stats import t

    mean, n = statistics.fmean(values), len(values)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    return f"{mean:+.2f} ± {half:.2f}" if sign else f"{mean:.2f} ± {half:.2f}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "adapters.json")
    parser.add_argument("--methods", nargs="+", default=SHOWN, help="names, or 'all'")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--seeds", type=int, default=len(TESTING))
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.out.read_text("utf-8"))))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    methods = list(METHODS) if given.methods == ["all"] else given.methods
    experiment(given.out, methods, tuple(given.ranks), given.seeds)


if __name__ == "__main__":
    main()
