"""Every row of the table of targets: each function measures one, and returns its records.

A target is a ratio to a peer in the same run, over one where we are ahead. Rows without a target
are there because somebody will ask.
"""

from __future__ import annotations

from collections.abc import Callable

import ablation
import networks
import plans
import steps
from layers import layer_case, low_rank_case
from orthonormality import drifts
from peers import absence
from records import BACKWARD, FORWARD, STEP, Record, Setting, timed, versions_of
from timing import AT_MOST, Measured, geometric

NETWORK_TARGETS = {
    "ResNet-20": 9.0,
    "ResNet-32": 11.0,
    "SNGAN-32 discriminator": 7.5,
    "WRN-28-10": 4.5,
}
# A peer whose one call took longer than this is not called again with more threads.
ONCE = 2 * AT_MOST


def _mean(records: list[Record], target: float | None, case: str) -> list[Record]:
    """One record for the geometric mean of the ratios of others."""
    ratios = [record.ratio for record in records if record.ratio]
    first = records[0]
    ratio = geometric(ratios) if len(ratios) == len(records) else None
    turns = min(record.turns for record in records)
    return [
        Record(
            first.row, case, first.work, first.ours, first.peer, first.threads, turns,
            ratio=ratio, target=target, note=first.note if ratio is None else "geometric mean",
            versions=first.versions,
        )
    ]  # fmt: skip


def frames(setting: Setting) -> list[Record]:
    """The frame map against torch-householder and torch.linalg.householder_product."""
    shapes = steps.FRAMES[-1:] if setting.small else steps.FRAMES
    found: list[Record] = []
    against_householder: dict[str, list[Record]] = {FORWARD: [], BACKWARD: []}

    def leave_out(*case: object) -> bool:
        return setting.slow.get(case, 0.0) > ONCE

    for case in steps.frame_cases(setting.within(1.5), shapes, leave_out):
        ours = (steps.FRAME, case.measured[steps.FRAME])
        work = BACKWARD if case.backward else FORWARD
        label = f"{case.batch} x {case.d} x {case.r}"
        key = (case.batch, case.d, case.r, case.backward)
        linalg = case.measured[steps.LINALG]
        note = f"left out: one call took {setting.slow[key]:.0f} s" if linalg is None else ""
        if linalg is not None:
            setting.slow[key] = linalg.seconds
        target = 0.95 if not case.backward else 20.0 if case.batch > 1 else None
        found.append(
            timed(
                "frame map", label, work, ours, (steps.LINALG, linalg), setting,
                target=target, note=note,
            )
        )  # fmt: skip
        against_householder[work].append(
            timed(
                "frame map", label, work, ours,
                (steps.HOUSEHOLDER, case.measured[steps.HOUSEHOLDER]), setting, steps.HOUSEHOLDER,
            )
        )  # fmt: skip
    for work, target in ((BACKWARD, 13.0), (FORWARD, None)):
        records = against_householder[work]
        found += records + _mean(records, target, "all of them")
    return found


def weights(setting: Setting) -> list[Record]:
    """All weights of a network against torch-householder and opt_einsum."""
    found = []
    for name, target in NETWORK_TARGETS.items():
        if setting.small and name != "ResNet-20":
            continue
        for backward in (False, True):
            rank = 4 if setting.small else 64
            measured = networks.weights_case(
                name, rank, "householder", setting.within(4.0), backward
            )
            ours = (networks.TOGETHER, measured[networks.TOGETHER])
            for peer in (f"{networks.ALTERNATIVE}, {chain}" for chain in networks.CHAINS):
                found.append(
                    timed(
                        "all weights of a network", f"{name}, rank {rank}",
                        BACKWARD if backward else FORWARD, ours, (peer, measured[peer]), setting,
                        "torch-householder", "opt_einsum", target=target if backward else None,
                    )
                )  # fmt: skip
    return found


def parts_of_together(setting: Setting) -> list[Record]:
    """What each part of forming all weights together brings, and the calls it takes."""
    found = []
    cases = [(ablation.DIGITS, 4)] + [(name, 64) for name in NETWORK_TARGETS]
    for name, rank in cases[:1] if setting.small else cases:
        for method in ("householder", "riemannian"):
            measured, calls = ablation.ablation_case(name, rank, method, setting.within(2.0))
            ours = ablation.SHARED
            for peer in (ablation.ALONE, ablation.FRAMES):
                found.append(
                    timed(
                        "parts of forming weights together", f"{name}, rank {rank}, {method}",
                        BACKWARD, (ours, measured[ours]), (peer, measured[peer]), setting,
                        note=f"{calls[ours].total()} calls for {calls[peer].total()}",
                    )
                )  # fmt: skip
    return found


def convolutions(setting: Setting) -> list[Record]:
    """The chosen plan of a convolution against the kernel formed."""
    chosen = plans.CONVOLUTIONS[:1] if setting.small else plans.CONVOLUTIONS
    found = []
    for backward in (False, True):
        for case in plans.conv_cases(setting.within(1.0), backward, chosen):
            formed = case.measured[plans.FORMED]
            assert formed is not None
            own = plans.FACTORIZED if case.chosen == "factorized" else plans.FORMED
            large = case.channels >= 512 and case.rank == 64
            target = 6.0 if large else 0.95
            found.append(
                timed(
                    "convolution", case.label, BACKWARD if backward else FORWARD,
                    (f"chosen: {case.chosen}", case.measured[own]), ("kernel formed", formed),
                    setting, target=target,
                )
            )  # fmt: skip
    return found


def linear(setting: Setting) -> list[Record]:
    """A linear map from cores against opt_einsum, and the regret of the chosen plan."""
    maps = [(24, 30, 4, 8)] if setting.small else plans.LINEAR
    found = []
    for backward, target in ((False, 2.4), (True, 1.7)):
        work = BACKWARD if backward else FORWARD
        cases = list(plans.linear_cases(setting.within(0.25), backward, maps))
        records = [
            timed(
                "linear map from cores", "{} x {}, rank {}, batch {}".format(*case.place), work,
                (plans.MATVEC, case.measured[plans.MATVEC]),
                (plans.EINSUM, case.measured[plans.EINSUM]), setting, "opt_einsum",
            )
            for case in cases
        ]  # fmt: skip
        found += records + _mean(records, target, f"all {len(maps)} maps")
        regrets = [case.regret for case in cases]
        found.append(
            Record(
                "linear map from cores", f"all {len(maps)} maps", work, "regret of the chosen plan",
                "fastest plan", setting.threads, setting.timer.turns, "times the fastest",
                ours_value=geometric(regrets), peer_value=1.0, measure="ours", target=1.1,
                at_most=True, note=f"geometric mean; worst {max(regrets):.2f}",
                versions=versions_of(),
            )
        )  # fmt: skip
    return found


def inference(setting: Setting) -> list[Record]:
    """A linear layer without gradient against a dense one."""
    found = []
    for width, rank, count in [(64, 4, 8)] if setting.small else plans.INFERENCE:
        measured = plans.inference_case(width, rank, count, setting.within(0.5))
        for name in (plans.THIN, plans.COLUMNS, plans.LAYER):
            target = 5.0 if count == 1 else 22.0 if width == 4096 else None
            found.append(
                timed(
                    "linear inference", f"{width} x {width}, rank {rank}, batch {count}", FORWARD,
                    (name, measured[name]), (plans.DENSE, measured[plans.DENSE]), setting,
                    target=None if name == plans.LAYER else target,
                )
            )  # fmt: skip
    return found


def optimizer(setting: Setting) -> list[Record]:
    """A step of RiemannianAdam against geoopt's, torch's Adam and pogo-torch."""
    layers = [((16, 3, 3, 3), 2)] if setting.small else steps.LAYERS
    measured = steps.adam_case(setting.within(10.0), layers)
    network = "two convolutions" if setting.small else f"ResNet-32, rank {steps.RANK}"
    found = []
    for name, theirs in measured.items():
        if name == steps.STEP:
            continue
        needs = [n for n in ("geoopt", "pogo-torch") if name.startswith(n)]
        target = None
        if name.endswith("all cores"):
            target = 8.0 if "Euclidean" in name else 14.0 if "geoopt" in name else 1.0
        ours = (steps.STEP, measured[steps.STEP])
        found.append(
            timed(
                "optimizer step", network, STEP, ours, (name, theirs), setting, *needs,
                target=target,
            )
        )  # fmt: skip
    return found


def orthonormality(setting: Setting) -> list[Record]:
    """How far frames stray in a thousand float32 steps; threads make no difference."""
    if setting.threads > 1:
        return []
    count = 20 if setting.small else 1000
    found = []
    for lr, strayed in drifts(count, small=setting.small).items():
        mine, *others = strayed.items()
        for k, (peer, theirs) in enumerate(others):
            found.append(
                Record(
                    "orthonormality", f"lr {lr:g}", f"{count:,} float32 steps", mine[0], peer,
                    setting.threads, 1, "max-norm of QᵀQ - I", mine[1], theirs,
                    theirs / mine[1], "ours", None if k else 2e-6, True,
                    versions=versions_of("geoopt"),
                )
            )  # fmt: skip
    return found


def layers(setting: Setting) -> list[Record]:
    """A layer in training against other packages that compress or constrain; no targets."""
    found = []
    cases: tuple[tuple[str, Callable[..., tuple[str, dict[str, Measured | None]]]], ...] = (
        ("geotorch", low_rank_case),
        ("tensorly-torch", layer_case),
    )
    for needs, case in cases:
        label, measured = case(setting.within(2.0), small=setting.small)
        (ours, mine), *others = measured.items()
        for name, theirs in others:
            wanted = (needs,) if needs in name else ()
            note = absence(*wanted) or ""
            found.append(
                timed(
                    "linear layer in training", label, BACKWARD, (ours, mine), (name, theirs),
                    setting, *wanted, note=note,
                )
            )  # fmt: skip
    return found


PARTS: dict[str, Callable[[Setting], list[Record]]] = {
    "frames": frames,
    "weights": weights,
    "ablation": parts_of_together,
    "convolutions": convolutions,
    "linear": linear,
    "inference": inference,
    "optimizer": optimizer,
    "orthonormality": orthonormality,
    "layers": layers,
}
