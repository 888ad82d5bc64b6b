"""What a comparison leaves behind: numbers, tables and a picture."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from toss_lightning.compare.comparison import Comparison
from toss_lightning.compare.measured import read_outcomes
from toss_lightning.compare.numbers import compare_outcomes
from toss_lightning.compare.plot_svg import have_both, scatter
from toss_lightning.compare.runs import Run
from toss_lightning.compare.tables import latex, markdown, sheet_of_runs, show, spreadsheet
from toss_lightning.compare.win_rate import measure_win_rates
from toss_lightning.evaluation.divergence_svg import draw_divergence, has_moved
from toss_lightning.files import write_json, write_text

PICTURE = "compare.svg"
MOVED = "divergence.svg"
SAFETY = ("harmful compliance", "refusal of harmful", "margin of the safe", "held-out harmful loss")
"""How the names of measures begin that the picture shows upward by default, the first that is there."""
UTILITY = ("over-refusal",)
"""The same for what it shows to the right, where there is no measure of utility."""


def report_comparison(
    comparison: Comparison, runs: Sequence[Run], differ: Sequence[str], helped: Sequence[str]
) -> None:
    """Writes compare.json, .md, .csv, .tex, .svg, compare_runs.csv and divergence.svg into its directory, and prints.

    Args:
        comparison: what was asked for.
        runs: all of its runs, done or not.
        differ: settings in which the methods differ beside those that make them what they are, in words.
        helped: methods that were given references, scores or a selection.

    Raises:
        StoreError: no run is done, a file is damaged, or the disk refuses.
    """
    home, methods = comparison.run_dir, [one.name for one in comparison.methods]
    outcomes = read_outcomes(runs)
    win_rates, unjudged = measure_win_rates(comparison, runs) if comparison.win_rate is not None else ([], [])
    named = (comparison.baseline, comparison.oracle, win_rates, comparison.against)
    content = compare_outcomes(outcomes, methods, *named)
    content["missing"] = [run.title for run in runs if run.seed not in outcomes.get(run.method, {})]
    content["unjudged"] = unjudged
    content["differing"] = list(differ)
    content["given"] = list(helped)
    axes, problems = choose_axes(content["measures"], comparison.plot)
    if axes:
        content["plot"] = {axis: one["title"] for axis, one in axes.items()}
    write_json(home / "compare.json", content)
    moved = MOVED if has_moved(content["divergence"]) else None
    write_text(home / "compare.md", markdown(content, PICTURE if axes else None, moved))
    if moved:
        write_text(home / moved, draw_divergence(content["divergence"], {}))
    write_text(home / "compare.csv", spreadsheet(content))
    write_text(home / "compare_runs.csv", sheet_of_runs(content))
    write_text(home / "compare.tex", latex(content))
    if axes:
        write_text(home / PICTURE, scatter(content, axes["x"], axes["y"]))
    console = Console(highlight=False)
    show(content, console)
    left = f"Numbers, tables and a picture are in {home}: compare.md, .json, .csv, .tex, .svg and compare_runs.csv"
    if not axes:
        left = f"Numbers and tables are in {home}: compare.md, .json, .csv, .tex and compare_runs.csv"
    for line in (*problems, left):
        console.print(line, soft_wrap=True, markup=False)


def choose_axes(
    measures: Sequence[Mapping[str, Any]], wanted: Mapping[str, str]
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The measures of the picture: those that are named, otherwise utility to the right and safety upward.

    Returns:
        Axis -> measure, empty where there are no two that some model has; and what is wrong with the names, a line
        each. A wrong name does not cost the report of runs that took hours.
    """
    problems = []
    chosen: dict[str, Mapping[str, Any]] = {}
    for axis, name in wanted.items():
        found = _named(measures, name)
        if found is not None:
            chosen[axis] = found
            continue
        titles = [one["title"] for one in measures]
        near = difflib.get_close_matches(name, titles, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(titles)}"
        problems.append(f"plot.{axis}: no measure {name!r}, so the usual one is shown; {hint}")
    utility = [one for one in measures if one["is_utility"]] + _beginning(measures, UTILITY)
    safety = _beginning(measures, SAFETY)
    for axis, candidates in (("x", utility), ("y", safety)):
        free = [one for one in candidates if one not in chosen.values() and _is_known(one)]
        if axis not in chosen and free:
            chosen[axis] = free[0]
    if len(chosen) < 2:
        return {}, problems
    if not have_both(chosen["x"], chosen["y"]):
        titles = [chosen[axis]["title"] for axis in ("x", "y")]
        return {}, [*problems, f"no picture: no model has both {titles[0]} and {titles[1]}; name others with plot"]
    return chosen, problems


def _is_known(measure: Mapping[str, Any]) -> bool:
    """Some model has a value of it: a judge may leave every reply undecided."""
    return any(model["value"] is not None for model in measure["models"].values())


def _named(measures: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    name = name.lower()
    return next((one for one in measures if name in (one["title"].lower(), one["name"].lower())), None)


def _beginning(measures: Sequence[Mapping[str, Any]], starts: Sequence[str]) -> list[Mapping[str, Any]]:
    found = [one for start in starts for one in measures if one["name"].startswith(start)]
    return sorted(found, key=lambda one: bool(one["screening"]))
