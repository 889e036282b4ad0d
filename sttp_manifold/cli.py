"""The command line, ``sttp``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import help_texts, terminal
from sttp_manifold.experiments.gan_command import gan
from sttp_manifold.experiments.options import numbers, rates, words
from sttp_manifold.experiments.terminal import ending, err
from sttp_manifold.experiments.terminal import out as console

if TYPE_CHECKING:
    from sttp_manifold.experiments.compare import Settings
    from sttp_manifold.experiments.records import Record

__all__ = ["app", "main"]


app = typer.Typer(
    name="sttp",
    help=help_texts.TEACH,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(value: bool) -> None:
    if value:
        from sttp_manifold.experiments.runs.device import versions

        typer.echo(f"sttp {versions()['sttp_manifold']}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command(help=help_texts.COMPARE)
def compare(
    task: Annotated[
        str,
        typer.Option(
            help="digits, fashion-mnist, completion, completion-tensor or completion-matrix; see "
            "`sttp tasks`."
        ),
    ] = "digits",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Names or wildcards, parted by commas; see `sttp methods`. "
            "\\[all that apply to the task]"
        ),
    ] = None,
    ranks: Annotated[
        list[str] | None, typer.Option(help="Ranks, as in 4,8 or 2-4. \\[the task's]")
    ] = None,
    seeds: Annotated[
        list[str] | None, typer.Option(help="Seeds, as in 0,1,2 or 0-2. \\[the task's]")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs to train. \\[the task's]", show_default=False)
    ] = None,
    train_examples: Annotated[
        int | None,
        typer.Option(
            help="Train on the first so many examples of the split, the same for all methods and "
            "seeds. \\[all]",
            show_default=False,
        ),
    ] = None,
    max_evaluations: Annotated[
        int | None,
        typer.Option(
            help="Solvers: calls of the cost function, at most. \\[the task's]", show_default=False
        ),
    ] = None,
    max_iterations: Annotated[
        int | None,
        typer.Option(help="Solvers: iterations, at most. \\[no limit]", show_default=False),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            help="Solvers: seconds, at most, looked at after each iteration; where it ends a run, "
            "its numbers depend on the machine. \\[no limit]",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(help="Learning rate of all methods, or METHOD=RATE. \\[the tuned ones]"),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto (a CUDA GPU if there is one), cpu or cuda.")
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or float64. \\[the task's]", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to. \\[runs/TASK]", show_default=False)
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Runs at a time, one thread each; numbers do not depend on it. "
            "\\[one a core; one on a GPU]",
            show_default=False,
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="First choose each method's learning rate from the task's grid, on the "
            "validation split and seeds of its own, and keep it with the task.",
        ),
    ] = False,
    tuned_file: Annotated[
        Path | None,
        typer.Option(
            help="Read (with --tune: write) learning rates here instead of with the task.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the task's data files.", show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
) -> None:
    """Run a comparison."""
    from sttp_manifold.experiments.compare import Settings
    from sttp_manifold.experiments.files import file_name

    with ending("Stopped. What is done is kept; the same command goes on from here."):
        settings = Settings(
            task=task,
            methods=words(["all"] if methods is None else methods),
            ranks=numbers(ranks, "--ranks"),
            seeds=numbers(seeds, "--seeds"),
            epochs=epochs,
            max_iterations=max_iterations,
            max_evaluations=max_evaluations,
            max_seconds=max_seconds,
            lrs=rates(lr),
            device=device,
            dtype=dtype,
            jobs=jobs,
            out=out or Path("runs") / file_name(task),
            data_dir=data_dir,
            tuned_file=tuned_file,
            options={} if train_examples is None else {"train_examples": train_examples},
        )
        records = _compare(settings, tune=tune, quiet=quiet)
    statuses = [record["status"] for record in records]
    if "failed" in statuses or "ok" not in statuses:
        raise typer.Exit(1)


def _compare(settings: Settings, *, tune: bool, quiet: bool) -> list[Record]:
    from sttp_manifold.experiments import compare as comparing
    from sttp_manifold.experiments.methods import left_out
    from sttp_manifold.experiments.progress import RunProgress
    from sttp_manifold.experiments.reading.report import write_outputs
    from sttp_manifold.experiments.tasks import TASKS

    task = TASKS[settings.task]
    metric = task.metric
    if not tune:
        # Names and numbers first: an error must not leave a folder behind.
        comparing.plan(settings)
    for method in [] if quiet else left_out(task, settings.methods):
        err.print(
            f"{method.name} is left out: {method.requires} is not installed "
            f"(pip install 'sttp-manifold[{method.requires}]')",
            soft_wrap=True,
        )
    if tune:
        with RunProgress(err, metric, "tuning", quiet=quiet) as progress:
            path, found = comparing.tune(
                settings, on_start=progress.start, on_record=progress.record
            )
        if not quiet:
            terminal.show_rates(path, found)
    runs = comparing.plan(settings)
    with RunProgress(err, metric, settings.task, quiet=quiet) as progress:

        def begin(total: int, skipped: int, torn_bytes: int) -> None:
            comparing.save_comparison(settings, runs)
            progress.start(total, skipped, torn_bytes)

        records = comparing.run_plan(runs, settings, on_start=begin, on_record=progress.record)
    written = write_outputs(settings.out)
    if not quiet:
        _show_outcome(settings.out, written)
    return records


def _show_outcome(out: Path, written: Sequence[Path]) -> None:
    from sttp_manifold.experiments.reading.comparison import load_comparison

    comparison = load_comparison(out)
    *effort, results = comparison.tables
    if any(row.scored for row in comparison.rows):
        terminal.show_table(comparison.task, results.titles, results.lines)
    for pair in comparison.pairs:
        terminal.show_pairs(f"{pair.name} (* told apart)", pair.titles, pair.lines())
    for table in effort:
        terminal.show_table(f"{comparison.task}: what it took", table.titles, table.lines)
    console.print(f"Report: {written[-1]}", soft_wrap=True)


app.command(help=help_texts.GAN)(gan)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `sttp compare` wrote.")],
) -> None:
    """Make tables, figures and report again from the records of a folder.

    Works on a comparison that was stopped half-way, and says how much of it is missing.
    """
    from sttp_manifold.experiments.reading.report import write_outputs

    with ending():
        written = write_outputs(folder)
        if not written:
            err.print(f"No run of the comparison in {folder} is on record yet.", soft_wrap=True)
            raise typer.Exit(1)
        for path in written:
            typer.echo(path)


@app.command(help=help_texts.PAPER)
def paper(
    networks: Annotated[
        list[str] | None,
        typer.Option(
            help="resnet-D, wrn-D-K, sngan-S-discriminator, sngan-S-generator, parted by commas. "
            "\\[those of the paper]"
        ),
    ] = None,
    ranks: Annotated[
        list[str] | None, typer.Option(help="Ranks, as in 4,8 or 2-4. \\[4,8,16, ..., 256]")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="text, markdown or csv.")] = "text",
    out: Annotated[
        Path | None, typer.Option(help="File to write to. \\[the terminal]", show_default=False)
    ] = None,
) -> None:
    """Recompute the counts of the paper."""
    from sttp_manifold.experiments.files import named_errors, write_text
    from sttp_manifold.experiments.paper import RANKS, paper_counts, written

    with ending():
        names = None if networks is None else words(networks)
        if names == []:
            raise ConfigError("--networks is empty: expected names, as in wrn-28-10,resnet-32")
        counts = paper_counts(names, numbers(ranks, "--ranks") or RANKS)
        text = written(counts, form)
        if out is None:
            typer.echo(text, nl=False)
        else:
            with named_errors(out, "name another file with --out"):
                write_text(out, text)
    if any(count.agrees is False for count in counts):
        raise typer.Exit(1)


@app.command()
def methods() -> None:
    """List the methods, and what each one does."""
    from sttp_manifold.experiments.methods import METHODS
    from sttp_manifold.experiments.tasks import TASKS

    # Methods of equal reach follow each other: what they are for is said once, above them.
    table = Table("method", "what it does", box=None)
    reach: list[str] = []
    for method in METHODS:
        fits = [task.name for task in TASKS if method.applies_to(task)]
        if fits != reach:
            table.add_row("", Text(", ".join(fits), style="bold"))
            reach = fits
        absent = "" if method.is_available else f" ({method.requires} is not installed)"
        table.add_row(method.name, method.summary + absent)
    with ending():
        console.print(table)


@app.command()
def tasks() -> None:
    """List the tasks, with their defaults."""
    from sttp_manifold.experiments.tasks import TASKS
    from sttp_manifold.experiments.tune import load_tuned

    table = Table(Column("task", no_wrap=True), "what it is, and what a comparison does", box=None)
    for task in TASKS:
        unit = f" ({task.metric.unit})" if task.metric.unit else ""
        with ending():
            tuned = len(load_tuned(task))
        facts = [
            f"judged by test {task.metric.name}{unit}",
            f"ranks {', '.join(map(str, task.ranks))}",
            f"{len(task.seeds)} seeds",
        ]
        if task.epochs is not None:
            facts.append(f"{task.epochs} epochs")
        if task.budget is not None:
            facts.append(f"{task.budget.evaluations:,} calls of the cost")
        facts.append(f"learning rates of {tuned} method{'s' * (tuned != 1)} tuned")
        words = Text.assemble(task.summary, "\n", ("; ".join(facts), "dim"))
        table.add_row(task.name, words)
    with ending():
        console.print(table)


@app.command("refit-costs")
def refit_costs(
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    repeats: Annotated[int, typer.Option(min=1, help="How often each plan is timed.")] = 7,
) -> None:
    """Fit the cost model of linear maps to this machine.

    Takes a minute, best on an idle machine. The file is read when STTP_COSTS names it.
    """
    from shlex import quote

    from sttp_manifold.experiments.files import named_errors, replacing
    from sttp_manifold.tt.cost_model import VARIABLE
    from sttp_manifold.tt.refit_costs import refit

    with ending(), named_errors(file, "name a file that can be written"):
        if file.is_dir():
            raise ConfigError(f"{file} is a folder; name a file, as in {file / 'costs.json'}")
        # Before a minute of timing, not after it.
        with replacing(file) as temporary:
            try:
                found = refit(temporary, repeats=repeats)
            except RuntimeError as error:
                raise ConfigError(f"{error}; try again when it is idle") from error
        console.print(str(found), soft_wrap=True)
        console.print(
            f"To use them: export {VARIABLE}={quote(str(file.resolve()))}", soft_wrap=True
        )


def main() -> None:
    """Entry point of ``sttp``."""
    terminal.prepare_streams()
    app(prog_name="sttp")
