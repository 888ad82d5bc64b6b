"""The cells of a comparison's tables."""

from collections.abc import Mapping
from typing import Any

from toss_lightning.evaluation.cells import ARROWS, DASH, difference, interval, number, p_value

Content = Mapping[str, Any]
Cells = tuple[list[str], list[list[str]]]
"""A header and lines."""
TIME = "time"


def rows_of(content: Content) -> Cells:
    """The cells of the main table: a line for each model, a column for each measure, and time.

    Args:
        content: as :func:`toss_lightning.compare.numbers.compare_outcomes` makes it.
    """
    measures = content["measures"]
    header = ["", *(f"{one['title']} {ARROWS[one['better']]}" for one in measures), TIME]
    lines = []
    for name in [content["base"], *content["methods"]]:
        cells = [interval(one["models"].get(name), one["share"]) for one in measures]
        time = content["time"].get(name)
        lines.append([name, *cells, _factor(time) if time else ""])
    return header, lines


def differences_of(content: Content) -> Cells:
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
                    difference(one, measure["share"]),
                    p_value(one["p_holm"]),
                    _verdict(one),
                    str(one["seeds"]),
                    f"{one['n']}{undecided}" if measure["per_prompt"] else DASH,
                ]
            )
    return header, lines


def oracle_tables(content: Content) -> list[tuple[str, Cells]]:
    """Titles and cells of what is told of the way to the oracle; none where no method is one."""
    oracle, baseline = content["oracle"], content["baseline"]
    if oracle is None:
        return []
    others = [name for name in content["methods"] if name != oracle]
    closed = [(one["title"], one["gap_closed"], "no gap") for one in content["measures"]]
    kept = [
        (f"{one['title']} ({one['utility_kept']['of']})", one["utility_kept"], "no gain")
        for one in content["measures"]
        if "utility_kept" in one
    ]
    tables = {
        f"Share of the gap closed, from {baseline} (0 %) to {oracle} (100 %)": (
            closed,
            [name for name in others if name != baseline],
        ),
        f"Utility kept, relative to {oracle} (100 %)": (kept, others),
    }
    return [
        (
            title,
            (
                ["", *(heading for heading, *_ in columns)],
                [[name, *(_share(facts, name, nothing) for _, facts, nothing in columns)] for name in names],
            ),
        )
        for title, (columns, names) in tables.items()
        if columns and names
    ]


def _share(facts: Content, name: str, nothing: str) -> str:
    """What a method reaches of what the oracle does."""
    if facts.get("beyond_noise") is False or (nothing == "no gain" and facts.get("oracle_better") is False):
        return nothing
    one = facts["methods"].get(name)
    if one is None or one["value"] is None:
        return DASH
    if one["over"] is None:
        return number(one["value"], True)
    ends = "unbounded" if one["low"] is None else f"{number(one['low'], True)}, {number(one['high'], True)}"
    return f"{number(one['value'], True)} [{ends}]"


def _factor(one: Content) -> str:
    if one["value"] is None:
        return DASH
    ends = "" if one["low"] is None else f" [{one['low']:.2f}, {one['high']:.2f}]"
    return f"× {one['value']:.2f}{ends}"


def _verdict(one: Content) -> str:
    if one["beyond_noise"] is None:
        return "one seed"
    return f"yes, {word(one)}" if one["beyond_noise"] else "no"


def word(one: Content) -> str:
    """Which way a difference goes."""
    return "better" if one["better"] else "worse"
