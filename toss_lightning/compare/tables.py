"""A comparison as a page, LaTeX, a spreadsheet, and on a terminal."""

import csv
import io
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape as plain
from rich.table import Table

from toss_lightning.compare.beside import divergence_cells
from toss_lightning.compare.cells import Cells, Content, differences_of, oracle_tables, rows_of
from toss_lightning.compare.statements import notes, statements
from toss_lightning.evaluation.cells import DASH, markdown_table
from toss_lightning.evaluation.tables import agreement_of

LATEX = {
    **{one: f"\\{one}" for one in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "∞": r"$\infty$",
    DASH: "--",
}
"""Sign -> how LaTeX writes it."""


def markdown(content: Content, plot: str | None = None, moved: str | None = None) -> str:
    """A page with everything.

    Args:
        content: the comparison.
        plot: the name of the picture beside the page.
        moved: the name of that of the divergence from the base.
    """
    parts = ["# Comparison", "", *markdown_table(*rows_of(content)), ""]
    parts += [*(f"- {line}" for line in notes(content)), ""]
    for title, cells in oracle_tables(content):
        parts += [f"## {title}", "", *markdown_table(*cells), ""]
    parts += [f"![What each method costs and brings]({plot})", ""] if plot else []
    parts += ["## What is beyond noise", "", *(f"- {line}" for line in statements(content)), ""]
    header, lines = differences_of(content)
    parts += ["## Differences", "", *markdown_table(header, lines), ""] if lines else []
    header, lines = agreement_of(content)
    if lines:
        parts += ["## Agreement of the judges", "", "Over the replies of all runs, and of the base once.", ""]
        parts += [*markdown_table(header, lines), ""]
    if moved is not None:
        header, *lines = divergence_cells(content)
        parts += ["## How far from the base", "", f"![Mean KL(base || method) at each response position]({moved})", ""]
        parts += ["Mean KL(base || method) of the next token in nats, over the seeds, of replies that are given, not"]
        parts += ["drawn.", "", *markdown_table(header, lines), ""]
    return "\n".join(parts)


def latex(content: Content) -> str:
    """The tables of values as plain tabulars, which need no package; what each is stands above it as a comment."""
    parts = [_tabular(rows_of(content))]
    for title, cells in oracle_tables(content):
        parts.append(f"\n% {escape(title)}\n{_tabular(cells)}")
    return "".join(parts)


def _tabular(cells: Cells) -> str:
    header, lines = cells
    rows = [" & ".join(map(escape, line)) + r" \\" for line in (header, *lines)]
    columns = "l" + "r" * (len(header) - 1)
    inside = [r"\hline", rows[0], r"\hline", *rows[1:], r"\hline"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *inside, r"\end{tabular}", ""])


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(LATEX.get(sign, sign) for sign in text)


def spreadsheet(content: Content) -> str:
    """A line for each model and measure."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    numbers = ("value", "low", "high", "over", "seeds", "n", "undecided")
    writer.writerow(["model", "measure", "judge", "better", *numbers])
    for measure in content["measures"]:
        for name, one in measure["models"].items():
            facts = [measure["name"], measure["judge"], measure["better"], *(one[key] for key in numbers)]
            writer.writerow([name, *facts] if measure["per_prompt"] else [name, *facts[:-2], "", ""])
        for name, one in measure.get("gap_closed", {"methods": {}})["methods"].items():
            writer.writerow(
                [name, f"share of the gap to {content['oracle']} closed, {measure['name']}", *_share(measure, one)]
            )
        for name, one in measure.get("utility_kept", {"methods": {}})["methods"].items():
            writer.writerow(
                [name, f"utility kept relative to {content['oracle']}, {measure['name']}", *_share(measure, one)]
            )
    for name, one in content["time"].items():
        ends = [one["value"], one["low"], one["high"], "seeds", one["seeds"], "", ""]
        writer.writerow([name, f"time over {content['baseline']}", "", "lower", *ends])
    return file.getvalue()


def sheet_of_runs(content: Content) -> str:
    """A line for each run, with every measure, for statistics of one's own."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    titles = [one["title"] for one in content["measures"]]
    writer.writerow(["method", "seed", "seconds", *titles])
    for run in content["runs"]:
        writer.writerow([run["method"], run["seed"], run["seconds"], *(run["values"][title] for title in titles)])
    return file.getvalue()


def _share(measure: Content, one: Content) -> list[Any]:
    """The cells behind the name of a share, of which more is better whatever it is a share of."""
    return [measure["judge"], "higher", *(one[key] for key in ("value", "low", "high", "over", "seeds")), "", ""]


def show(content: Content, console: Console) -> None:
    """Prints the tables of values, in as many parts as a terminal is narrow, and a line for each pair."""
    _print_table("Comparison, with 95 % intervals", rows_of(content), console)
    for title, cells in oracle_tables(content):
        _print_table(title, cells, console)
    for text in (*notes(content), "", *statements(content)):
        console.print(text, soft_wrap=True, markup=False)


def _print_table(title: str, cells: Cells, console: Console) -> None:
    header, lines = cells
    widths = [_width(header[at], [line[at] for line in lines]) for at in range(len(header))]
    if not console.is_terminal:
        console.width = _whole(widths)
    for columns in _parts(widths, console.width):
        table = Table(title=plain(title), title_justify="left")
        for at in columns:
            justify: Literal["left", "right"] = "left" if at == 0 else "right"
            table.add_column(plain(header[at]), justify=justify, overflow="fold", width=widths[at])
        for line in lines:
            table.add_row(*(plain(line[at]) for at in columns))
        console.print(table)


def _parts(widths: Sequence[int], width: int) -> list[list[int]]:
    """The columns of each part that fits into a width, every part with the first one."""
    found, part = [], [0]
    for at in range(1, len(widths)):
        if len(part) > 1 and _whole([widths[column] for column in (*part, at)]) > width:
            found.append(part)
            part = [0]
        part.append(at)
    return [*found, part]


def _width(heading: str, cells: Sequence[str]) -> int:
    """Of a column whose heading may fold into a few lines, and whose cells do not fold."""
    return max(len(heading) // 3, *map(len, [*heading.split(), *cells]))


def _whole(widths: Sequence[int]) -> int:
    """Of a table, with frames."""
    return 1 + sum(3 + width for width in widths)
