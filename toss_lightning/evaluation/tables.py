"""The numbers of an evaluation as tables, for a terminal and for Markdown."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from toss_lightning.evaluation.cells import ARROWS, DASH, Cells, difference, interval, markdown_table, p_value

Names = Mapping[str, str]


def rows_of(report: Mapping[str, Any], names: Names) -> Cells:
    """The cells of the main table: a line for each measure, a column for each adapter.

    Args:
        report: as :func:`toss_lightning.evaluation.results.report` makes it.
        names: adapter -> what people call it.
    """
    adapters: list[str] = report["adapters"]
    header = ["", "judge", "n", *(names.get(name, name) for name in adapters)]
    lines = []
    for one in report["measures"]:
        judge = (one["judge"] or "") + (" (screening)" if one["screening"] else "")
        counts = [one["adapters"][name]["n"] for name in adapters]
        n = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}–{max(counts)}"
        cells = [interval(one["adapters"][name], one["share"]) for name in adapters]
        lines.append([f"{one['name']} {ARROWS[one['better']]}", judge, n, *cells])
    return header, lines


def differences_of(report: Mapping[str, Any], names: Names) -> Cells:
    """The cells of the table of differences: which are beyond the noise of these prompts."""
    header = ["", "judge", "compared", "n", "difference", "p (Holm)", "beyond noise"]
    lines = []
    for one in report["measures"]:
        for found in one["differences"]:
            if "mean" not in found:
                continue
            ours, theirs = (names.get(found[key], found[key]) for key in ("of", "against"))
            lines.append(
                [
                    f"{one['name']} {ARROWS[one['better']]}",
                    one["judge"] or "",
                    f"{ours} − {theirs}",
                    str(found["n"]),
                    difference(found, one["share"]),
                    p_value(found["p_holm"]),
                    "yes" if found["beyond_noise"] else "no",
                ]
            )
    return header, lines


def console_table(report: Mapping[str, Any], names: Names) -> Table:
    """The main table for a terminal, narrow: judges stand below their measures, and intervals below their values."""
    (_, _, *header), lines = rows_of(report, names)
    table = Table(title="Evaluation, with 95 % intervals over the prompts", title_justify="left")
    table.add_column("")
    for column in header:
        table.add_column(column, justify="right")
    for name, judge, n, *cells in lines:
        table.add_row(f"{name}\n{judge}".strip(), n, *(cell.replace(" [", "\n[", 1) for cell in cells))
    return table


def markdown(report: Mapping[str, Any], names: Names, picture: str | None = None) -> str:
    """Both tables, judge agreement, counts of what was cut and a picture, as a page.

    Args:
        report: as :func:`toss_lightning.evaluation.results.report` makes it.
        names: adapter -> what people call it.
        picture: the name of that of the divergence beside the page.
    """
    parts = ["# Evaluation", "", *markdown_table(*rows_of(report, names)), ""]
    parts += [
        "In brackets: 95 % intervals over the prompts; Wilson's for shares, Student's for means. Undecided responses",
        "are left out and counted in evaluation.json. A screening judge is no result by itself.",
        "",
    ]
    # why may be the beginning of a server's page
    reasons = {judge: why.replace("`", "'") for judge, why in report["failed_judges"].items()}
    parts += [f"**{judge} has not judged**: `{why}`\n" for judge, why in reasons.items()]
    header, lines = differences_of(report, names)
    if lines:
        parts += [
            "## Differences on the same prompts",
            "",
            *markdown_table(header, lines),
            "",
            "Paired bootstrap and sign-flip test over the prompts: they say nothing of another training seed.",
            "",
        ]
    if picture is not None:
        parts += [
            "## How far from the base",
            "",
            f"![Mean KL(base || adapter) at each response position]({picture})",
            "",
            "Mean KL(base || adapter) of the next token at each position of replies that are given, not drawn. A line",
            "that is high at the first positions alone says that how replies begin has changed.",
            "",
        ]
    header, lines = agreement_of(report)
    if lines:
        parts += ["## Agreement of the judges", "", *markdown_table(header, lines), ""]
    if cut := cut_words(report, names):
        parts += [cut, ""]
    if tasks := tasks_of(report):
        parts += [f"Tasks of lm-evaluation-harness {report['lm_eval']['version']}:", ""]
        parts += [*(f"- {one}" for one in tasks), ""]
    return "\n".join(parts)


def cut_words(report: Mapping[str, Any], names: Names) -> str:
    """How many replies were cut; nothing where none was."""
    if not any(report["cut"].values()):
        return ""
    cut = ", ".join(f"{names.get(name, name)} {count}" for name, count in report["cut"].items())
    return f"Replies that were cut at max_new_tokens: {cut}."


def agreement_of(report: Mapping[str, Any]) -> Cells:
    """The cells of the table of pairs of judges."""
    lines = [
        [
            " / ".join(one["judges"]),
            one["of"],
            _kappa(one),
            f"{one['share']:.0%}",
            str(one["decided"]),
        ]
        for one in report["agreement"]
    ]
    return ["judges", "of", "kappa", "same verdict", "responses"], lines


def _kappa(one: Mapping[str, Any]) -> str:
    """Kappa with its interval; where every draw of it gives the same, there is none."""
    if one["kappa"] is None:
        return DASH
    ends = "" if one["low"] == one["high"] else f" [{one['low']:.2f}, {one['high']:.2f}]"
    return f"{one['kappa']:.2f}{ends}".replace("-", "−")


def tasks_of(report: Mapping[str, Any]) -> list[str]:
    """Which tasks of lm-evaluation-harness were asked, and how; those of a group are counted."""
    found = report.get("lm_eval")
    if not found:
        return []
    grouped = {task for tasks in found["groups"].values() for task in tasks}
    lines = []
    for name, one in found["tasks"].items():
        if name not in grouped:
            asked = f"{one['asked']} of {one['questions']} questions"
            lines.append(f"{name}, version {one['version']}: {one['num_fewshot']}-shot, {asked}")
    for name, tasks in found["groups"].items():
        asked, whole = (sum(found["tasks"][task][key] for task in tasks) for key in ("asked", "questions"))
        shots = "/".join(sorted({str(found["tasks"][task]["num_fewshot"]) for task in tasks}))
        lines.append(f"{name}, {len(tasks)} tasks: {shots}-shot, {asked} of {whole} questions")
    return lines
