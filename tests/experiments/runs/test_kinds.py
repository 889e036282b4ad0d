"""A third kind of run is one file and one row: everything else goes by the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.compare import Settings, plan, run_plan, save_comparison
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.reading.comparison import load_comparison
from sttp_manifold.experiments.reading.report import write_outputs
from sttp_manifold.experiments.runs.contract import Run
from sttp_manifold.experiments.runs.kinds import RUNS


class Guessing(Run):
    """Guesses what entries are; stands for a kind that nobody has thought of."""

    kind = "guess"
    reads = ("score",)
    options: ClassVar[dict[str, str]] = {"guesses": "--guesses"}

    @classmethod
    def of(cls, spec, task, method, data_dir):
        return cls(spec, task)

    @classmethod
    def spec_fields(cls, task, method, lr, given):
        return {"kind": "dense", "guesses": given.get("guesses", 3), "temper": "mild"}

    def begin(self, device, dtype) -> None:
        self.done = 0

    def advance(self) -> bool:
        self.trace.add(
            {},
            **dict.fromkeys(("epoch", "drift", "lr"), None),
            iteration=self.done,
            evaluations=self.done,
            seconds=0.0,
            train_loss=1.0,
            val_loss=1.0,
            val_metric=50.0 + self.spec.seed,
        )
        self.done += 1
        return self.done < self.spec.options["guesses"]

    def end(self) -> dict[str, float]:
        return {"val_metric": 50.0, "test_loss": 1.0, "test_metric": 50.0 + self.spec.seed}


@dataclass(frozen=True)
class Guess:
    name: str = "guess"
    summary: str = "a guess"
    run: str = "guess"
    parameterization: str = "none"
    optimizer: str = "luck"
    momentum: Any = None
    untuned_lr: Any = None
    requires: Any = None
    is_available: bool = True
    cpu_only: bool = False

    def applies_to(self, task) -> bool:
        return task.name == "tiny"


def test_a_kind_of_ones_own_is_planned_run_recorded_and_reported(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(RUNS, "guess", Guessing)
    monkeypatch.setitem(METHODS._entries, "guess", Guess())
    settings = Settings(
        tmp_path / "out",
        "tiny",
        ["guess", "dense-adam"],
        ranks=[2],
        seeds=[0, 1],
        epochs=1,
        device="cpu",
        jobs=1,
        options={"guesses": 4},
    )
    runs = plan(settings)
    save_comparison(settings, runs)
    records = run_plan(runs, settings)
    guesses = [record for record in records if record["run"] == "guess"]
    assert [record["spec"]["options"]["guesses"] for record in guesses] == [4, 4]
    assert all(len(record["curves"]["iteration"]) == 4 for record in guesses)
    assert run_plan(runs, settings) == records
    # Read where nobody knows the kind any longer.
    monkeypatch.undo()
    comparison = load_comparison(settings.out)
    assert "--guesses 4" in comparison.note["command"]
    row = next(row for row in comparison.rows if row.method == "guess")
    assert (row.test, row.scored) == ({0: 50.0, 1: 51.0}, True)
    assert write_outputs(settings.out)[-1].is_file()


def test_an_option_that_no_kind_heeds_is_refused(tiny, tmp_path):
    settings = Settings(tmp_path, "tiny", ["dense-adam"], options={"guesses": 4})
    with pytest.raises(ConfigError, match="guesses 4: none of the methods chosen heeds it"):
        plan(settings)
