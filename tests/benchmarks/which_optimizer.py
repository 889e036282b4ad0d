"""Accuracy against learning rate: does the best rate of an optimizer transfer between shapes?

A network of digits, 64 - width - width - 10, its weights all of one rank, trained for some steps by
each optimizer at each rate of one grid::

    python tests/benchmarks/which_optimizer.py                      # trains what is not there yet
    python tests/benchmarks/which_optimizer.py --steps 0            # the figure and the table only

Runs are added to ``docs/results/which-optimizer.json`` one by one; a run that is there is not done
again. Times are CPU times of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from page_command import DOCS
from torch import nn

import sttp_manifold as sm
from sttp_manifold.experiments.data import digits
from sttp_manifold.experiments.specs import derived_seed

SHAPES = ((32, 4), (128, 4), (1024, 4), (128, 16), (1024, 16), (1024, 64))
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SEEDS = (0, 1)
STEPS, BATCH = 60, 128

# Name, how a weight is held, and the optimizer.
OPTIMIZERS: dict[str, tuple[str, Callable[..., torch.optim.Optimizer]]] = {
    "Adam on charts": ("householder", torch.optim.Adam),
    "RiemannianSGD, momentum 0.9": (
        "riemannian",
        lambda p, lr: sm.optim.RiemannianSGD(p, lr=lr, momentum=0.9),
    ),
    "RiemannianAdam, a moment a frame": (
        "riemannian",
        lambda p, lr: sm.optim.RiemannianAdam(p, lr=lr, second_moment="frame"),
    ),
    "RiemannianAdam, elementwise": (
        "riemannian",
        lambda p, lr: sm.optim.RiemannianAdam(p, lr=lr, second_moment="elementwise"),
    ),
    "RiemannianMuon": ("riemannian", lambda p, lr: sm.optim.RiemannianMuon(p, lr=lr)),
}


def network(width: int, rank: int, seed: int, method: str) -> nn.Module:
    """A network whose weights have the rank from the start, and the norm of torch's own."""
    torch.manual_seed(derived_seed("which-optimizer", width, rank, seed))
    model = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                size, least = layer.weight.shape, min(rank, *layer.weight.shape)
                W = torch.randn(size[0], least) @ torch.randn(least, size[1])
                layer.weight.copy_(W * (layer.weight.norm() / W.norm()))
    return sm.nn.compress(model, rank, kind="svdp", method=method, grow="allow")


def accuracy(model: nn.Module, splits: Any) -> float:
    """Percentage of the images that were not trained on: validation and test."""
    with torch.no_grad():
        hits = [
            (model(part.inputs.float()).argmax(-1) == part.targets).sum().item()
            for part in (splits.val, splits.test)
        ]
    return 100 * sum(hits) / (len(splits.val) + len(splits.test))


def one(name: str, width: int, rank: int, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once, with a rate that decays to zero along a cosine."""
    method, make = OPTIMIZERS[name]
    splits = digits()
    model = network(width, rank, seed, method)
    optimizer = make(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(derived_seed("which-optimizer", "order", seed))
    x, y = splits.train.inputs.float(), splits.train.targets
    whole, own = [], []
    for _ in range(steps):
        index = torch.randint(len(y), (BATCH,), generator=order)
        begin = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        middle = time.process_time()
        optimizer.step()
        end = time.process_time()
        schedule.step()
        whole.append(end - begin)
        own.append(end - middle)
    return {
        **{"optimizer": name, "width": width, "rank": rank, "lr": lr, "seed": seed, "steps": steps},
        "accuracy": round(accuracy(model, splits), 3),
        # Means: on a busy machine CPU time goes by ticks, which a median of short steps misses.
        "step_ms": round(1e3 * statistics.fmean(own), 4),
        "whole_ms": round(1e3 * statistics.fmean(whole), 4),
    }


def load(path: Path) -> list[dict[str, Any]]:
    """The runs of a file, none if it is not there."""
    return json.loads(path.read_text("utf-8"))["runs"] if path.exists() else []


def train(path: Path, steps: int) -> None:
    """Do the runs that are not there, small ones and first seeds first."""
    runs = load(path)
    done = {(r["optimizer"], r["width"], r["rank"], r["lr"], r["seed"]) for r in runs}
    for seed, (width, rank), lr, name in itertools.product(SEEDS, SHAPES, RATES, OPTIMIZERS):
        if (name, width, rank, lr, seed) in done:
            continue
        runs.append(one(name, width, rank, lr, seed, steps))
        lines = ",\n".join(json.dumps(run) for run in runs)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(f'{{"torch": "{torch.__version__}", "runs": [\n{lines}\n]}}\n', "utf-8")
        part.replace(path)


def mean(runs: list[dict[str, Any]], key: str, **where: Any) -> float:
    """Mean over seeds of what was measured at one place, NaN for nothing."""
    found = [r[key] for r in runs if key in r and all(r[k] == v for k, v in where.items())]
    return statistics.fmean(found) if found else math.nan


def table(runs: list[dict[str, Any]]) -> str:
    """For each optimizer the best rate of each shape, and what one rate for all shapes costs."""
    heads = [f"{w} x {w}, rank {r}" for w, r in SHAPES]
    lines = ["| optimizer | " + " | ".join(heads) + " | one rate for all | loses |"]
    lines.append("|---|" + "---:|" * (len(heads) + 2))
    for name in OPTIMIZERS:
        at = {
            (shape, lr): mean(
                runs, "accuracy", optimizer=name, width=shape[0], rank=shape[1], lr=lr
            )
            for shape in SHAPES
            for lr in RATES
        }
        best = {s: max(RATES, key=lambda lr, s=s: at[s, lr]) for s in SHAPES}
        loss = {lr: statistics.fmean(at[s, best[s]] - at[s, lr] for s in SHAPES) for lr in RATES}
        common = min(RATES, key=lambda lr: loss[lr])
        cells = [f"{best[s]:g}: {at[s, best[s]]:.1f}" for s in SHAPES]
        lines.append(f"| {name} | {' | '.join(cells)} | {common:g} | {loss[common]:.1f} |")
    return "\n".join(lines)


def times(runs: list[dict[str, Any]]) -> str:
    """Milliseconds of a step of the optimizer alone, and of a whole one."""
    heads = [f"{w} x {w}, rank {r}" for w, r in SHAPES]
    lines = ["| optimizer | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name in OPTIMIZERS:
        cells = []
        for width, rank in SHAPES:
            here = {"optimizer": name, "width": width, "rank": rank}
            own, whole = (mean(runs, key, **here) for key in ("step_ms", "whole_ms"))
            cells.append(f"{own:.1f} of {whole:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(runs: list[dict[str, Any]], page: Path) -> None:
    """Put both tables between their marks on a page."""
    text = page.read_text("utf-8")
    for mark, lines in (("rates", table(runs)), ("times", times(runs))):
        start, end = f"<!-- {mark}:start -->\n", f"\n<!-- {mark}:end -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{lines}{end}{rest.partition(end)[2]}"
    page.write_text(text, "utf-8")


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """One panel an optimizer, one curve a shape."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(OPTIMIZERS), figsize=(15, 4), sharey=True, layout="constrained"
    )
    colours = plt.get_cmap("viridis")
    for axis, name in zip(axes, OPTIMIZERS, strict=True):
        for k, (width, rank) in enumerate(SHAPES):
            here = {"optimizer": name, "width": width, "rank": rank}
            ys = [mean(runs, "accuracy", lr=lr, **here) for lr in RATES]
            axis.plot(
                RATES,
                ys,
                "o-",
                ms=3,
                lw=1.3,
                color=colours(k / len(SHAPES)),
                label=f"width {width}, rank {rank}",
            )
            best = max(range(len(RATES)), key=lambda i, ys=ys: -1 if math.isnan(ys[i]) else ys[i])
            axis.plot(RATES[best], ys[best], "o", ms=8, mfc="none", color=colours(k / len(SHAPES)))
        axis.set_xscale("log")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("learning rate")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SHAPES), frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCS / "results" / "which-optimizer.json")
    parser.add_argument("--figure", type=Path, default=DOCS / "figures" / "which-optimizer.png")
    parser.add_argument("--page", type=Path, help="a page to put the tables on")
    parser.add_argument("--steps", type=int, default=STEPS, help="0 to train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.nn.SkippedLayerWarning)
        if arguments.steps:
            train(arguments.out, arguments.steps)
    runs = load(arguments.out)
    print(table(runs), times(runs), sep="\n\n")
    if arguments.page:
        write(runs, arguments.page)
    draw(runs, arguments.figure)


if __name__ == "__main__":
    main()
