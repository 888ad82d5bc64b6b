"""How far two pages of the results table say the same: methods x measures of one, by the intervals of the other.

    python benchmarks/results_table/agreement.py results_table.md results_table_gpu.md

Both are in benchmarks/results; the first one's intervals are over seeds. Writes NAME_agreement.md there, NAME being the
second one's. For each measure: how many values of the second page lie in the first one's intervals, and how alike the
order of the methods is. Printed numbers are compared, as they stand in the tables.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from experiment import RESULTS
from scipy.stats import spearmanr
from tables import CLOSED_IN, SHOWN

from toss_lightning.evaluation.cells import DASH, markdown_table, number

Table = dict[str, dict[str, str]]
COMPARED = (*SHOWN.values(), *CLOSED_IN, "utility kept")
VALUE = re.compile(r"[−-]?\d+(?:\.\d+)?")
FEWEST = 3
"""Methods of which there is an order worth telling."""


def read_table(page: Path) -> Table:
    """The first table of a page: method -> column -> cell."""
    text = page.read_text(encoding="utf-8")
    found = [line.strip("|").split("|") for line in text[text.index("\n|") + 1 :].split("\n\n")[0].splitlines()]
    header, _, *rows = [[cell.strip() for cell in line] for line in found]
    return {name: dict(zip(header[1:], cells, strict=True)) for name, *cells in rows}


def values(cell: str) -> list[float]:
    """The value of a cell and, where it has one, both ends of its interval."""
    return [float(one.replace("−", "-")) for one in VALUE.findall(cell)]


def line_of(column: str, ours: Table, theirs: Table) -> list[str] | None:
    """One measure; None where it stands in one page alone, or has no intervals there."""
    told = {name: (ours[name].get(column, DASH), theirs[name].get(column, DASH)) for name in ours if name in theirs}
    both: Mapping[str, tuple[list[float], list[float]]] = {
        name: (values(first), values(second)) for name, (first, second) in told.items() if DASH not in (first, second)
    }
    known = {name: (first, second[0]) for name, (first, second) in both.items() if len(first) == 3}
    if len(known) < FEWEST:
        return None
    outside = [name for name, (first, value) in known.items() if not first[1] <= value <= first[2]]
    order = spearmanr([first[0] for first, _ in both.values()], [second[0] for _, second in both.values()])
    inside = f"{len(known) - len(outside)} of {len(known)}"
    return [column, inside, number(float(order.statistic), False), ", ".join(outside) or DASH]


def page(first: Path, second: Path) -> str:
    """Everything, as Markdown."""
    ours, theirs = read_table(first), read_table(second)
    # what no seed changes has an interval over prompts, or none
    for table in (ours, theirs):
        table.pop("base model")
    lines = [line for column in COMPARED if (line := line_of(column, ours, theirs)) is not None]
    return "\n".join(
        [
            "# Whether two runs of the results table agree",
            "",
            f"Written by `python benchmarks/results_table/agreement.py {first.name} {second.name}`.",
            f"Of {len(ours.keys() & theirs.keys())} methods that both have: how many values of the second page lie in",
            "the first one's 95 % intervals, which are over seeds, of a mean, and wide where these are few; and",
            "Spearman's correlation of the methods' order. Left out is what one of the two does not tell.",
            "",
            *markdown_table(["measure", "inside", "order", "outside"], lines),
            "",
        ]
    )


def main() -> None:
    """Writes the page."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    first, second = (RESULTS / name for name in sys.argv[1:])
    (RESULTS / f"{second.stem}_agreement.md").write_text(page(first, second), encoding="utf-8")


if __name__ == "__main__":
    main()
