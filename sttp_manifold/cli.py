"""The command line, ``sttp``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import help_texts, terminal
from sttp_manifold.experiments.compare_command import compare
from sttp_manifold.experiments.gan_command import gan
from sttp_manifold.experiments.options import numbers, words
from sttp_manifold.experiments.terminal import ending, err
from sttp_manifold.experiments.terminal import out as console

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


app.command(help=help_texts.COMPARE)(compare)


app.command(help=help_texts.GAN)(gan)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `sttp compare` wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the page, where there are several. \\[runs/report]", show_default=False
        ),
    ] = None,
) -> None:
    """Make tables, figures and report again from the records of a folder, or one page of several.

    Works on a comparison that was stopped half-way, and says how much of it is missing. Runs of one
    setting in several folders, such as those of shards or of other seeds, are one comparison.
    """
    from sttp_manifold.experiments.reading.merged import write_merged
    from sttp_manifold.experiments.reading.report import write_outputs

    with ending():
        if len(folders) == 1 and out is None:
            written = write_outputs(folders[0])
        else:
            written = write_merged(folders, out or Path("runs") / "report")
        if not written:
            names = ", ".join(map(str, folders))
            err.print(f"No run of the comparison in {names} is on record yet.", soft_wrap=True)
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
            found = refit(temporary, repeats=repeats)
        console.print(str(found), soft_wrap=True)
        console.print(
            f"To use them: export {VARIABLE}={quote(str(file.resolve()))}", soft_wrap=True
        )


def main() -> None:
    """Entry point of ``sttp``."""
    terminal.prepare_streams()
    app(prog_name="sttp")
