"""What GANs are judged by beside their metric: a table, and sentences that it allows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from sttp_manifold.experiments.records import Record, read_for

__all__ = ["GAN_HEADER", "GAN_NOTE", "gan_lines", "say_gans"]

GAN_HEADER = (
    "rank",
    "method",
    "trained numbers",
    "kernel distance",
    "precision",
    "recall",
    "stable rank",
    "smallest / largest",
    "alarms",
    "ms a step",
)

GAN_NOTE = (
    "Means over seeds, of the averaged generator's images and as many real ones of the test split. "
    "Trained numbers are all of the discriminator's, biases included. Kernel distance: squared MMD "
    "of a cubic kernel. Precision: part of the generated images that lies among the real ones; "
    "recall: the reverse. Stable rank and smallest over largest singular value are means over the "
    "discriminator's layers, before the first step and after the last. Alarms: layers of all seeds "
    "that SpectrumMonitor called collapsing. Features are those of a small classifier trained on "
    "the task's own labels: no FID, no KID."
)

_PUBLISHED = {"fid": "FID", "kid": "KID", "inception_score": "Inception Score"}


def _groups(records: Sequence[Record]) -> dict[tuple[int, str], list[Record]]:
    """Runs that ended well, by rank and method."""
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        if read_for(record, "gan") and record["status"] == "ok":
            spec = record["spec"]
            groups.setdefault((spec["rank"], spec["method"]), []).append(record)
    return groups


def _mean(group: Sequence[Record], name: str, spec: str) -> str:
    values = [r["own"][name] for r in group if r["own"].get(name) is not None]
    return format(statistics.fmean(values), spec) if values else "-"


def _course(group: Sequence[Record], name: str, spec: str) -> str:
    """A curve's mean before the first step, and after the last."""
    ends = [(r["curves"][name][0], r["curves"][name][-1]) for r in group]
    first, last = (statistics.fmean(values) for values in zip(*ends, strict=True))
    return f"{first:{spec}} to {last:{spec}}"


def gan_lines(records: Sequence[Record]) -> list[list[str]]:
    """Cells below :data:`GAN_HEADER`, the best distance first; none where no GAN is done."""
    lines = []
    groups = _groups(records)

    def score(key: tuple[int, str]) -> tuple[int, float]:
        values = [r["test_metric"] for r in groups[key] if r["test_metric"] is not None]
        return key[0], statistics.fmean(values) if values else 0.0

    for rank, method in sorted(groups, key=score):
        group = groups[rank, method]
        first = group[0]
        steps = first["curves"]["iteration"][-1] or 1
        lines.append(
            [
                str(rank),
                method,
                f"{first['stored_parameters'] + first['other_parameters']:,}",
                _mean(group, "kernel", ".3f"),
                _mean(group, "precision", ".2f"),
                _mean(group, "recall", ".2f"),
                _course(group, "stable_rank", ".1f"),
                _course(group, "ratio", ".2g"),
                str(sum(len(r["own"].get("alarms", [])) for r in group)),
                f"{1e3 * statistics.median(_seconds(r) for r in group) / steps:.0f}",
            ]
        )
    return lines


def _seconds(record: Record) -> float:
    return float(record["curves"]["seconds"][-1])


def say_gans(records: Sequence[Record]) -> list[str]:
    """What the floor is, whether spectra collapsed, and what the published metrics are."""
    groups = _groups(records)
    if not groups:
        return []
    group = [record for found in groups.values() for record in found]
    said = [sentence for sentence in (_floor(group), _collapse(groups)) if sentence]
    for name, words in _PUBLISHED.items():
        values = [
            f"{method} {_mean(found, name, '.3g')}"
            for (_, method), found in groups.items()
            if any(name in r["own"] for r in found)
        ]
        if values:
            said.append(f"{words}, by torch-fidelity, means over seeds: {', '.join(values)}.")
    return said


def _floor(group: Sequence[Record]) -> str:
    own: list[dict[str, Any]] = [r["own"] for r in group if r["own"].get("floor") is not None]
    if not own:
        return ""
    accuracy = statistics.fmean(o["classifier_accuracy"] for o in own)
    floor = statistics.fmean(o["floor"] for o in own)
    classifiers = len({o["classifier"] for o in own})
    text = (
        f"The floor is {floor:.2f}: the distance of as many real training images to the test "
        f"split, on features of a small classifier that is right on {accuracy:.1f} % of it. These "
        "distances are no FID."
    )
    if classifiers > 1:
        text += (
            f" The runs used {classifiers} classifiers: their distances are not those of one scale."
        )
    return text


def _collapse(groups: dict[tuple[int, str], list[Record]]) -> str:
    counts = {
        f"{method} at rank {rank}": sum(bool(r["own"].get("alarms")) for r in found)
        for (rank, method), found in groups.items()
    }
    hit = {name: count for name, count in counts.items() if count}
    runs = sum(map(len, groups.values()))
    if not hit:
        return f"No spectrum collapsed: SpectrumMonitor raised no alarm in any of the {runs} runs."
    names = ", ".join(f"{name} ({count} runs)" for name, count in hit.items())
    return f"SpectrumMonitor raised an alarm of collapsing spectra in {names}, of {runs} runs."
