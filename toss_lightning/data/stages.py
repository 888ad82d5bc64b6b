"""Which rows a stage trains on, those that stand beside them, and what each of their tokens counts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from toss_lightning.data.rowset import RowSet, name_rows
from toss_lightning.data.tokenize import TokenizedRow

Values = Mapping[str, np.ndarray]
"""Name -> a value for each response token of a row; ``weight`` is 1 and anything else 0 where it is not named."""


@dataclass(frozen=True)
class StageRows:
    """The rows that a stage trains on."""

    rows: list[TokenizedRow]
    """Companions last."""
    values: list[Values]
    """What each response token of each row counts; see :data:`Values`."""
    selected: list[bool]
    """The row is one that the selection speaks of."""
    companions: int = 0
    """Rows that stand beside the others in every step, and are not counted among those it trains on."""
    per_step: int = 0
    """Companions in each step."""
    whole_step: bool = False
    """The first micro-batch of a step holds all of the step's micro-batches of its rank."""

    @classmethod
    def plain(cls, rows: Sequence[TokenizedRow]) -> "StageRows":
        """All tokens of all rows count 1."""
        return cls(list(rows), [{} for _ in rows], [False] * len(rows))

    @property
    def own(self) -> int:
        """Rows without the companions."""
        return len(self.rows) - self.companions

    @property
    def names(self) -> list[str]:
        """Every value that some row names, and the weight."""
        return sorted({"weight", *(name for values in self.values for name in values)})


@dataclass(frozen=True)
class Companions:
    """Rows of another set that stand beside those of a stage in every step."""

    set: str
    per_step: int
    """How many, drawn anew for each step."""
    values: Mapping[str, float] = field(default_factory=dict)
    """What each of their response tokens counts; see :data:`Values`."""


def beside(stage: StageRows, rows: Sequence[TokenizedRow], values: Mapping[str, float]) -> StageRows:
    """A stage with further rows, all of whose response tokens count the same."""
    more: list[Values] = [
        {name: np.full(len(row.response_positions), value, np.float32) for name, value in values.items()}
        for row in rows
    ]
    return StageRows([*stage.rows, *rows], [*stage.values, *more], [*stage.selected, *[False] * len(rows)])


def name_rows_of(stage: StageRows, indices: Collection[int], sets: Mapping[str, RowSet]) -> str:
    """Rows of a stage as people find them: the set that each is of, and its row number there.

    Args:
        stage: serves them.
        indices: their places in it.
        sets: all sets of the run, by name; a row of none of them was made by a mixture.
    """
    names = {id(row): name for name, of in sets.items() for row in of.rows}
    found: dict[str, list[int]] = {}
    for row in (stage.rows[index] for index in indices):
        found.setdefault(names.get(id(row), "mixture"), []).append(row.row_id)
    return " and ".join(name_rows(numbers, name) for name, numbers in found.items())
