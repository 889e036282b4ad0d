"""What `compress` reaches in networks that people have, and what it costs them in time.

    pip install -c constraints.txt '.[minilm]' timm torchvision
    python tests/benchmarks/treated.py

What is not installed is left out. Counts are of the networks at their usual size, made without
memory: the share of elements that is treated, Z at rank 8, and the smallest budget of the whole
network. Times are of small ones of the same kind on one thread: forward, and forward with backward,
over the dense one, run in turn in one process. Writes docs/results/networks.json and prints the
table of docs/networks.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sttp_manifold as sm
from sttp_manifold.experiments.models import network

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "networks.json"
RANK, BUDGET, REPEATS = 8, 0.2, 3


@dataclass(frozen=True)
class Network:
    """A network at its usual size and a small one with an input.

    Attributes:
        whole: makes it.
        small: makes a small one.
        inputs: of the small one.
    """

    whole: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Tensor]]


class Tagger(nn.Module):
    """A recurrent network over words, tied to nothing."""

    def __init__(self, kind: type[nn.RNNBase], words: int, size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, size)
        self.recurrent = kind(size, size, 2, batch_first=True)
        self.out = nn.Linear(size, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.recurrent(self.words(x))[0])


def ids(words: int = 100, length: int = 32) -> Tensor:
    return torch.randint(words, (4, length))


def images(size: int = 64) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


SMALL = {
    "vocab_size": 200, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 512, "d_model": 128, "n_embd": 128, "n_layer": 2, "n_head": 4,
    "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 32, "d_ff": 512,
    "num_key_value_heads": 4, "dim": 128, "n_layers": 2, "n_heads": 4, "hidden_dim": 512,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512,
    "embedding_size": 64, "num_local_experts": 4, "head_dim": 32, "image_size": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip


def of_transformers(kind: str, inputs: Callable[[], Mapping[str, Tensor]], **how: Any) -> Network:
    """A model of `transformers` by its configuration, random."""
    import transformers

    config = getattr(transformers, f"{kind}Config")
    own = how.pop("small", None)

    def make(settings: Mapping[str, Any]) -> nn.Module:
        return transformers.AutoModel.from_config(config(**settings))

    def small() -> nn.Module:
        known = set(config().to_dict()) | set(getattr(config, "attribute_map", ()))
        return make(own if own is not None else {k: v for k, v in SMALL.items() if k in known})

    return Network(lambda: make(how), small, inputs)


def of_timm(name: str, small: str, size: int = 64, **how: Any) -> Network:
    """A network of `timm`, random; the small one for images of a size."""
    import timm

    def image() -> dict[str, Tensor]:
        return {"x": torch.randn(2, 3, size, size)}

    return Network(lambda: timm.create_model(name), lambda: timm.create_model(small, **how), image)


def of_torchvision(name: str, small: str, size: int = 64, **how: Any) -> Network:
    """A network of `torchvision`, random; the small one for images of a size."""
    from torchvision import models

    def image() -> dict[str, Tensor]:
        return {"x": torch.randn(2, 3, size, size)}

    return Network(lambda: models.get_model(name), lambda: models.get_model(small, **how), image)


def of_images() -> dict[str, Network]:
    """Those of the two libraries of image networks, where they are."""
    found: dict[str, Network] = {}
    if importlib.util.find_spec("timm"):
        found |= {
            "timm vit_base_patch16_224": of_timm(
                "vit_base_patch16_224", "vit_tiny_patch16_224", img_size=64, depth=2
            ),
            "timm resnet50": of_timm("resnet50", "resnet18"),
            "timm convnext_tiny": of_timm("convnext_tiny", "convnext_atto"),
            "timm efficientnet_b0": of_timm("efficientnet_b0", "efficientnet_b0"),
            "timm mixer_b16_224": of_timm("mixer_b16_224", "mixer_s32_224", 224),
        }
    if importlib.util.find_spec("torchvision"):
        found |= {
            "torchvision vgg16": of_torchvision("vgg16", "vgg11"),
            "torchvision densenet121": of_torchvision("densenet121", "densenet121"),
            "torchvision mobilenet_v3_large": of_torchvision(
                "mobilenet_v3_large", "mobilenet_v3_small"
            ),
            "torchvision vit_b_16": of_torchvision("vit_b_16", "vit_b_16", 224),
            "torchvision swin_t": of_torchvision("swin_t", "swin_t"),
        }
    return found


def networks() -> dict[str, Network]:
    """The networks, by name."""
    words = lambda: {"input_ids": ids()}  # noqa: E731
    both = lambda: {"input_ids": ids(), "decoder_input_ids": ids()}  # noqa: E731
    x = lambda: {"x": ids()}  # noqa: E731
    found = {
        "torch LSTM tagger": Network(
            lambda: Tagger(nn.LSTM, 10_000, 512), lambda: Tagger(nn.LSTM, 200, 128), x
        ),
        "torch GRU tagger": Network(
            lambda: Tagger(nn.GRU, 10_000, 512), lambda: Tagger(nn.GRU, 200, 128), x
        ),
        "torch Transformer": Network(
            lambda: nn.Transformer(batch_first=True),
            lambda: nn.Transformer(128, 4, 2, 2, 512, batch_first=True),
            lambda: {"src": torch.randn(4, 32, 128), "tgt": torch.randn(4, 32, 128)},
        ),
        "torch TransformerEncoder": Network(
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8), 6),
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(128, 4, 512, batch_first=True), 2
            ),
            lambda: {"src": torch.randn(4, 32, 128)},
        ),
    }
    for name, size in (("resnet-32", 32), ("wrn-28-10", 32), ("sngan-32-discriminator", 32)):
        small = "resnet-20" if name != "sngan-32-discriminator" else name
        found[name] = Network(
            lambda name=name: network(name), lambda small=small: network(small),
            lambda size=size: {"x": torch.randn(4, 3, size, size)},
        )  # fmt: skip
    for kind in ("Bert", "Roberta", "DistilBert", "Albert", "Electra", "GPT2", "GPTNeoX", "OPT"):
        found[kind] = of_transformers(kind, words)
    for kind in ("Llama", "Qwen2", "Gemma", "Mixtral", "Mamba"):
        found[kind] = of_transformers(kind, words)
    for kind in ("T5", "Bart"):
        found[kind] = of_transformers(kind, both)
    for kind in ("ViT", "DeiT", "Dinov2"):
        found[kind] = of_transformers(kind, images)
    for kind in ("ResNet", "ConvNext", "MobileNetV2", "Swin", "Segformer"):
        # Windows of 7 x 7 patches of 4 pixels: Swin's last stage has one of them.
        size = 224 if kind == "Swin" else 64
        found[kind] = of_transformers(kind, partial(images, size), small={})
    found["Whisper"] = of_transformers(
        "Whisper",
        lambda: {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": ids()[:1]},
    )
    return found | of_images()


@dataclass
class Row:
    """What is known of a network."""

    name: str
    parameters: int = 0
    treated: float = 0.0
    Z: float = 0.0
    least: float | None = None
    left: str = ""
    forward: float | None = None
    training: float | None = None
    note: str = ""


def counted(row: Row, make: Callable[[], nn.Module]) -> None:
    """Counts of a network of its usual size."""
    with torch.device("meta"):
        model = make()
        dense = sm.nn.summary(model).total.dense
        sm.nn.compress(model, rank=RANK, init="eye", together=False)
    table = sm.nn.summary(model)
    rows = [r for r in table.rows if r.kind != "dense" and r.shared is None]
    row.parameters = dense
    row.treated = 100 * sum(r.dense for r in rows) / dense
    row.Z = table.Z
    outside = dense - sum(r.dense for r in rows)
    row.least = (outside + sum(_at_rank_one(r) for r in rows)) / dense
    kinds: dict[str, int] = {}
    for r in table.left:
        kinds[r.layer] = r.dense
    for r in table.rows:
        if r.kind == "dense":
            kinds[f"weight {r.layer}"] = r.dense
    large = sorted(kinds.items(), key=lambda item: -item[1])[:2]
    row.left = ", ".join(f"{k} {100 * n / dense:.1f} %" for k, n in large if n > 0.001 * dense)


def _at_rank_one(row: sm.nn.SummaryRow) -> int:
    size = row.shape
    shape = sm.TTShape.for_weight((size[0], row.dense // size[0]), 1)
    return shape.num_parameters() * max(1, row.dense // shape.numel)


def timed(row: Row, make: Callable[[], nn.Module], inputs: Mapping[str, Tensor]) -> None:
    """Times of a small network over those of the dense one."""
    torch.manual_seed(0)
    dense = make().eval()
    made = sm.nn.compress(copy.deepcopy(dense), rank=RANK, init="random")
    ratios: dict[str, list[float]] = {"forward": [], "training": []}
    for k in range(REPEATS + 1):
        spent = {}
        for which, model in (("dense", dense), ("made", made)):
            start = time.process_time()
            with torch.no_grad():
                _run(model, inputs)
            middle = time.process_time()
            _run(model, inputs).square().mean().backward()
            spent[which] = (middle - start, time.process_time() - middle)
        if k:
            for j, key in enumerate(ratios):
                ratios[key].append(spent["made"][j] / spent["dense"][j])
    row.forward, row.training = (statistics.median(ratios[key]) for key in ratios)


def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    out = model(**inputs)
    if isinstance(out, Tensor):
        return out
    return next(v for v in out.values() if isinstance(v, Tensor) and v.is_floating_point())


def table(rows: list[dict[str, Any]]) -> str:
    """The table of the page."""
    lines = [
        "| network | elements | treated | Z at rank 8 | least Z | budget 0.2 | forward | training "
        "| left dense |",
        "|---|---:|---:|---:|---:|---|---:|---:|---|",
    ]
    for row in rows:
        times = [f"{row[key]:.1f}" if row[key] else "" for key in ("forward", "training")]
        reached = "yes" if row["least"] is not None and row["least"] <= BUDGET else "no"
        lines.append(
            f"| {row['name']} | {row['parameters'] / 1e6:.1f} M | {row['treated']:.1f} % "
            f"| {row['Z']:.1f} | {100 * (row['least'] or 0):.1f} | {reached} "
            f"| {' | '.join(times)} | {row['left'] or row['note']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every network and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", help="some of the networks")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--no-counts", action="store_true", help="take them from --out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    there = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else []
    known = {row["name"]: Row(**row) for row in there}
    for name, one in networks().items():
        if given.names and name not in given.names:
            continue
        row = known.setdefault(name, Row(name))
        row.note = ""
        try:
            if not given.no_counts:
                counted(row, one.whole)
            if not given.no_times:
                timed(row, one.small, one.inputs())
        except Exception as error:
            row.note = f"{type(error).__name__}: {error}"[:300]
        rows = [vars(row) for row in known.values()]
        print(
            name,
            row.treated,
            row.Z,
            row.least,
            row.left,
            row.forward,
            row.training,
            row.note,
            flush=True,
        )
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table([vars(row) for row in known.values()]))


if __name__ == "__main__":
    main()
