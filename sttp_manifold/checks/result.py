"""What a numerical check found: laws, slopes, a verdict; as text, as a table, as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from sttp_manifold.checks.slopes import Slope
from sttp_manifold.display import box_html, table_html
from sttp_manifold.errors import CheckError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CheckResult", "Law"]


@dataclass(frozen=True)
class Law:
    """An equation that has to hold up to rounding.

    Attributes:
        name: the equation.
        error: by how much it is violated, relative to the size of its sides.
        tolerance: how much of that is rounding.
        detail: what else there is to say.
    """

    name: str
    error: float
    tolerance: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; one that is not a number is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check. It is true where the check passed.

    Attributes:
        check: name of the function.
        subject: what was checked, in words.
        laws: the equations, each with its error and tolerance.
        slopes: the errors that have to fall with the step, the most telling one last.
        skipped: laws that were not asked for, with the reason: a method that the manifold does not
            offer, say.
        notes: how the check was carried out, where there was a choice.

    Example:
        >>> import sttp_manifold as sm
        >>> result = sm.check_retraction(sm.SpectralTTManifold(sm.TTShape.for_matrix(6, 4, rank=2)))
        >>> result.passed, round(result.slope)
        (True, 2)
        >>> print(result)
        check_retraction of SpectralTTManifold(2·3 | 2·2, ranks 1-2-2-2-1, spectrum='free'),
        torch.float64: passed
        ...
    """

    check: str
    subject: str
    laws: tuple[Law, ...]
    slopes: tuple[Slope, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """The verdict: every law holds and every slope is steep enough."""
        return not self.failures

    def __bool__(self) -> bool:
        return self.passed

    @property
    def parts(self) -> tuple[Law | Slope, ...]:
        """The laws, then the slopes."""
        laws: tuple[Law | Slope, ...] = self.laws
        return laws + self.slopes

    @property
    def failures(self) -> tuple[Law | Slope, ...]:
        """The laws and slopes that did not pass."""
        return tuple(part for part in self.parts if not part.passed)

    def __getitem__(self, name: str) -> Law | Slope:
        """A law or slope by its name."""
        for part in self.parts:
            if part.name == name:
                return part
        names = [part.name for part in self.parts]
        raise KeyError(f"{name!r} is none of the laws and slopes of {self.check}: {names}")

    @property
    def slope(self) -> float:
        """Slope found of the most telling error; ``nan`` where that is exactly zero."""
        return self.slopes[-1].found

    @property
    def expected_slope(self) -> float:
        """The slope that it should have at least."""
        return self.slopes[-1].expected

    @property
    def tolerance(self) -> float:
        """How far below the expected slope it may be."""
        return self.slopes[-1].tolerance

    @property
    def steps(self) -> tuple[float, ...]:
        """Steps of the most telling error."""
        return self.slopes[-1].steps

    @property
    def errors(self) -> tuple[float, ...]:
        """The most telling error at these steps."""
        return self.slopes[-1].errors

    def raise_if_failed(self) -> CheckResult:
        """This result, if it passed.

        Raises:
            CheckError: if it did not; the error has the result.
        """
        if not self.passed:
            raise CheckError(str(self), result=self)
        return self

    @property
    def _title(self) -> str:
        return f"{self.check} of {self.subject}: {'passed' if self.passed else 'FAILED'}"

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        for law in self.laws:
            name = f"{law.name} ({law.detail})" if law.detail else law.name
            yield _mark(law), name, f"{law.error:.1e}", f"<= {law.tolerance:.0e}"
        for slope in self.slopes:
            wanted = f">= {slope.expected:g} - {slope.tolerance:g}"
            yield _mark(slope), f"slope of {slope.name}", slope.verdict, wanted
        for name, reason in self.skipped:
            yield "skip", name, reason, ""

    def __str__(self) -> str:
        rows = [("", "law", "found", "wanted"), *self._rows()]
        width = max(len(row[1]) for row in rows)
        lines = [f"  {a:4}  {b:{width}}  {c:>8}  {d}".rstrip() for a, b, c, d in rows]
        return "\n".join([self._title, *lines, *(f"  note  {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        """A table for notebooks; what failed stands out."""
        rows = list(self._rows())
        failed = [k for k, row in enumerate(rows) if row[0] == "FAIL"]
        # Reasons are sentences, in the column of the numbers.
        wrap = (1, 2) if self.skipped else (1,)
        table = table_html(("", "law", "found", "wanted"), rows, wrap=wrap, bold=failed)
        notes = (f"<small>{escape(note)}</small>" for note in self.notes)
        return box_html(f"<b>{escape(self._title)}</b>", table, *notes)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the errors against the step in log-log axes, each with the slope it should have.

        A thick piece marks the fitted points, a dashed line the reference, a shaded area what
        counts as rounding.

        Args:
            ax: where to draw; a new figure of ``matplotlib.pyplot`` if absent.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
        top, bottom = 0.0, 1e300
        for k, slope in enumerate(self.slopes):
            points = [(t, e) for t, e in zip(slope.steps, slope.errors, strict=True) if e > 0]
            color = f"C{k}"
            label = f"{slope.name}: {'' if slope.exact else 'slope '}{slope.verdict}"
            ax.plot(
                [t for t, _ in points], [e for _, e in points], color=color, lw=1.2, label=label
            )
            top = max([top, *(e for _, e in points if e < 1e300)])
            bottom = min([bottom, *(e for _, e in points), *slope.rounding])
            if slope.window is not None:
                first, last = slope.window
                part = slice(first, last + 1)
                ax.plot(
                    slope.steps[part], slope.errors[part], color=color, lw=4, alpha=0.5, zorder=3
                )
                t0, e0 = slope.steps[last], slope.errors[last]
                reference = [e0 * (t / t0) ** slope.expected for t in slope.steps]
                ax.plot(
                    slope.steps,
                    reference,
                    "--",
                    color=color,
                    lw=0.9,
                    label=f"slope {slope.expected:g}, wanted",
                )
        ax.set_xscale("log")
        ax.set_yscale("log")
        last_slope = self.slopes[-1]
        ax.fill_between(
            last_slope.steps,
            1e-300,
            last_slope.rounding,
            color="0.5",
            alpha=0.15,
            lw=0,
            label="rounding",
        )
        top = top if top > 0 else 1.0
        ax.set_ylim(max(bottom, 1e-30) / 30, top * 30)
        ax.set_xlabel("step t")
        ax.set_ylabel("error")
        verdict = "passed" if self.passed else "FAILED"
        ax.set_title(f"{self.subject}\n{self.check}: {verdict}", fontsize="small", parse_math=False)
        ax.grid(alpha=0.25, lw=0.5)
        ax.legend(fontsize="small", frameon=False, loc="upper left")
        return ax


def _mark(part: Law | Slope) -> str:
    return "ok" if part.passed else "FAIL"
