"""A comparison in words and tables: for a terminal, Markdown, LaTeX and spreadsheets."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape as plain
from rich.table import Table

from toss_lightning.compare.numbers import NOISE

Content = Mapping[str, Any]
ARROWS = {"higher": "↑", "lower": "↓"}
TIME = "time"
DASH = "–"
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


def rows_of(content: Content) -> tuple[list[str], list[list[str]]]:
    """The cells of the main table: a line for each model, a column for each measure, and time.

    Args:
        content: as :func:`toss_lightning.compare.numbers.compare_outcomes` makes it.
    """
    measures = content["measures"]
    header = ["", *(f"{one['title']} {ARROWS[one['better']]}" for one in measures), TIME]
    lines = []
    for name in [content["base"], *content["methods"]]:
        cells = [_cell(one["models"].get(name), one["share"]) for one in measures]
        time = content["time"].get(name)
        lines.append([name, *cells, _factor(time) if time else ""])
    return header, lines


def differences_of(content: Content) -> tuple[list[str], list[list[str]]]:
    """The cells of the table of differences."""
    header = ["", "compared", "difference", "p (Holm)", "beyond noise", "seeds", "prompts"]
    lines = []
    for measure in content["measures"]:
        for one in measure["differences"]:
            if "p_holm" not in one:
                continue
            undecided = f" ({one['undecided']} undecided)" if one["undecided"] else ""
            lines.append(
                [
                    f"{measure['title']} {ARROWS[measure['better']]}",
                    f"{one['of']} − {one['against']}",
                    _difference(one, measure["share"]),
                    _p(one["p_holm"]),
                    (f"yes, {_word(one)}" if one["beyond_noise"] else "no"),
                    str(one["seeds"]),
                    f"{one['n']}{undecided}" if measure["per_prompt"] else DASH,
                ]
            )
    return header, lines


def statements(content: Content) -> list[str]:
    """For each pair, what of their differences is beyond noise; a line each."""
    pairs: dict[tuple[str, str], list[tuple[str, bool, Content]]] = {}
    for measure, title in zip(content["measures"], _short_titles(content["measures"]), strict=True):
        for one in measure["differences"]:
            pairs.setdefault((one["of"], one["against"]), []).append((title, measure["share"], one))
    lines = []
    for (ours, theirs), of in pairs.items():
        tested = [facts for facts in of if "p_holm" in facts[-1]]
        beyond = [
            f"{_word(one)} in {title} ({_difference(one, share)}, p {_p(one['p_holm'])})"
            for title, share, one in tested
            if one["beyond_noise"]
        ]
        within = [title for title, _, one in tested if not one["beyond_noise"]]
        parts = [*beyond, *([f"within noise: {', '.join(within)}"] if within else [])]
        left_out = max((one["undecided"] for *_, one in of), default=0)
        parts += [f"undecided prompts left out: {left_out}"] if left_out else []
        lines.append(f"{ours} against {theirs}: {'; '.join(parts) or 'no seeds and prompts in common'}.")
    return lines


def _short_titles(measures: Sequence[Content]) -> list[str]:
    """Names of measures, with the judge where several decide the same, and with what screens marked."""
    names = [one["name"] for one in measures]
    return [
        one["title"] if names.count(one["name"]) > 1 else f"{one['name']}{' (screening)' if one['screening'] else ''}"
        for one in measures
    ]


def notes(content: Content) -> list[str]:
    """How to read the numbers of this comparison, and what to beware of."""
    seeds = content["seeds"]
    most = max(len(of) for of in seeds.values())
    spread = (
        f"Means over {most} seeds with 95 % t-intervals over the seeds; the base model's are over the prompts."
        if most > 1
        else "One seed: 95 % intervals and tests are over the prompts, and say nothing of another training seed."
    )
    found = [
        spread,
        f"Beyond noise: p < {NOISE:g} after Holm's adjustment over all pairs of a measure.",
        f"Time is that of training with all that a method needs, without evaluation, over {content['baseline']}'s.",
    ]
    if any(measure["screening"] for measure in content["measures"]):
        found.append("A screening judge is no result by itself.")
    fewer = [f"{name} ({len(of)})" for name, of in seeds.items() if len(of) < most]
    found += [f"Fewer seeds than the others: {', '.join(fewer)}."] if fewer else []
    found += [f"Not there yet: {', '.join(content['missing'])}."] if content.get("missing") else []
    found += [f"{name}: {'; '.join(reasons)}." for name, reasons in content["idle"].items()]
    found += [f"Methods differ in {line}." for line in content.get("differing", [])]
    return found


# --- forms ------------------------------------------------------------------------------------------------------------


def markdown(content: Content, plot: str | None = None) -> str:
    """A page with everything.

    Args:
        content: the comparison.
        plot: the name of the picture beside the page.
    """
    parts = ["# Comparison", "", *_table(*rows_of(content)), ""]
    parts += [*(f"- {line}" for line in notes(content)), ""]
    parts += [f"![What each method costs and brings]({plot})", ""] if plot else []
    parts += ["## What is beyond noise", "", *(f"- {line}" for line in statements(content)), ""]
    header, lines = differences_of(content)
    parts += ["## Differences", "", *_table(header, lines), ""] if lines else []
    return "\n".join(parts)


def latex(content: Content) -> str:
    """The main table as a plain tabular, which needs no package."""
    header, lines = rows_of(content)
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
    for name, one in content["time"].items():
        ends = [one["value"], one["low"], one["high"], "seeds", one["seeds"], "", ""]
        writer.writerow([name, f"time over {content['baseline']}", "", "lower", *ends])
    return file.getvalue()


def show(content: Content, console: Console) -> None:
    """Prints the main table, in as many parts as a terminal is narrow, and a line for each pair."""
    header, lines = rows_of(content)
    widths = [_width(header[at], [line[at] for line in lines]) for at in range(len(header))]
    if not console.is_terminal:
        console.width = _whole(widths)
    for columns in _parts(widths, console.width):
        table = Table(title="Comparison, with 95 % intervals", title_justify="left")
        for at in columns:
            justify: Literal["left", "right"] = "left" if at == 0 else "right"
            table.add_column(plain(header[at]), justify=justify, overflow="fold", width=widths[at])
        for line in lines:
            table.add_row(*(plain(line[at]) for at in columns))
        console.print(table)
    for text in (*notes(content), "", *statements(content)):
        console.print(text, soft_wrap=True, markup=False)


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


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    return [f"| {' | '.join(rows[0])} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows[1:])]


def _cell(one: Content | None, share: bool) -> str:
    if one is None or one["value"] is None:
        return DASH
    ends = "" if one["low"] is None else f" [{number(one['low'], share)}, {number(one['high'], share)}]"
    undecided = f" ({one['undecided']} undecided)" if one["undecided"] else ""
    return number(one["value"], share) + ends + undecided


def _difference(one: Content, share: bool) -> str:
    mean, low, high = (number(one[key], share, sign=True) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _factor(one: Content) -> str:
    if one["value"] is None:
        return DASH
    ends = "" if one["low"] is None else f" [{one['low']:.2f}, {one['high']:.2f}]"
    return f"× {one['value']:.2f}{ends}"


def _word(one: Content) -> str:
    return "better" if one["better"] else "worse"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def number(value: float, share: bool, sign: bool = False) -> str:
    """A value as tables write it, shares in percent."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    form = "+" if sign else ""
    text = f"{100 * value:{form}.0f}%" if share else f"{value:{form}.3f}"
    return text.replace("-", "−")
