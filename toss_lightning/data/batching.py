"""Which rows stand in which batch: planned ahead, so that a batch knows the optimizer step it belongs to.

An optimizer step takes ``batch_size`` rows, over all ranks. The rows of a step are sorted by length and cut into
micro-batches of at most ``max_tokens`` padded tokens. Which rows share a step therefore depends neither on the memory
of a device nor on the number of devices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from toss_lightning.data.stages import StageRows, Values
from toss_lightning.data.tokenize import TokenizedRow
from toss_lightning.errors import ConfigError

Group = tuple[int, ...]
"""Indices, into a list of rows, of the rows in one micro-batch; may be empty."""


@dataclass(frozen=True)
class StepPlan:
    """The batches of a stage: ``steps[epoch][step][rank][micro_batch]`` is a :data:`Group`."""

    steps: list[list[list[list[Group]]]]
    accumulate: int
    """Micro-batches that each rank runs per optimizer step; the same for every step."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in each epoch."""
        return len(self.steps[0])


def plan_steps(
    lengths: Sequence[int],
    batch_size: int,
    max_tokens: int,
    epochs: int,
    world_size: int = 1,
    seed: int = 0,
    companions: int = 0,
    per_step: int = 0,
) -> StepPlan:
    """Plans the shuffled batches of every epoch of a stage.

    Args:
        lengths: tokens of each row; companions come last.
        batch_size: rows per optimizer step, over all ranks, companions not counted.
        max_tokens: padded tokens that one micro-batch may hold.
        epochs: how often each row is seen.
        world_size: ranks that share each step.
        seed: with the epoch number, fixes the order.
        companions: how many of the rows are drawn from, again and again, to stand beside the others.
        per_step: companions in each step; all of them where there are fewer.

    Raises:
        ConfigError: a row alone exceeds ``max_tokens``.
    """
    _check_fits(lengths, max_tokens)
    own, packed = len(lengths) - companions, []
    beside = _draws(companions, min(per_step, companions), seed)
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(own)
        steps = [order[at : at + batch_size] for at in range(0, own, batch_size)]
        packed.append([_pack(np.concatenate([step, own + next(beside)]), lengths, max_tokens) for step in steps])
    accumulate = max((-(-len(groups) // world_size) for epoch in packed for groups in epoch), default=1)
    spread = [[_spread(groups, accumulate, world_size, lengths) for groups in epoch] for epoch in packed]
    return StepPlan(spread, accumulate)


def _draws(count: int, per_step: int, seed: int) -> Iterator[np.ndarray]:
    """Endless draws of ``per_step`` of ``count`` rows, each row once before any comes again."""
    turn, order = 0, np.zeros(0, dtype=np.int64)
    while True:
        while len(order) < per_step:
            more = np.random.default_rng([seed, turn, count]).permutation(count)
            # a step never holds a row twice
            order, turn = np.concatenate([order, more[~np.isin(more, order)], more[np.isin(more, order)]]), turn + 1
        yield order[:per_step]
        order = order[per_step:]


def plan_pass(lengths: Sequence[int], max_tokens: int, world_size: int = 1) -> list[list[Group]]:
    """Plans one pass over all rows without an order to keep: ``[rank][batch]``, equally many batches on each rank."""
    _check_fits(lengths, max_tokens)
    groups = _pack(np.arange(len(lengths)), lengths, max_tokens)
    groups += [()] * (-len(groups) % world_size)
    return [groups[rank::world_size] for rank in range(world_size)]


def _check_fits(lengths: Sequence[int], max_tokens: int) -> None:
    if len(lengths) and max(lengths) > max_tokens:
        raise ConfigError(
            f"data.max_tokens: {max_tokens} holds no row of {max(lengths)} tokens: raise it, or lower data.max_length"
        )


def _pack(rows: np.ndarray, lengths: Sequence[int], max_tokens: int) -> list[Group]:
    """Longest first, as many rows in each group as fit; ties keep their order."""
    groups: list[Group] = []
    group: list[int] = []
    for row in sorted((int(row) for row in rows), key=lambda row: -lengths[row]):
        if group and (len(group) + 1) * lengths[group[0]] > max_tokens:
            groups.append(tuple(group))
            group = []
        group.append(row)
    return [*groups, tuple(group)] if group else groups


def _spread(groups: list[Group], accumulate: int, world_size: int, lengths: Sequence[int]) -> list[list[Group]]:
    """Halves the largest groups until each rank has ``accumulate`` of them; ``[rank][micro_batch]``."""
    groups = list(groups)
    while len(groups) < accumulate * world_size:
        at = max(range(len(groups)), key=lambda index: (len(groups[index]) > 1, len(groups[index])))
        group = groups[at]
        if len(group) < 2:
            groups.append(())
            continue
        half = (len(group) + 1) // 2
        groups[at : at + 1] = [group[:half], group[half:]]
    groups.sort(key=lambda group: -len(group) * lengths[group[0]] if group else 0)
    return [groups[rank::world_size] for rank in range(world_size)]


def collate(
    rows: Sequence[TokenizedRow], values: Sequence[Values] | None = None, names: Sequence[str] = ("weight",)
) -> dict[str, Any]:
    """Puts rows side by side, padded on the right with zeros.

    Args:
        rows: the rows.
        values: further values of each row's response tokens.
        names: which of them to take.

    Returns:
        ``input_ids`` int64 ``[B, T]``; ``row_id`` and ``length`` int64 ``[B]``; and, for the N response tokens of all
        rows in order, ``row`` int64 ``[N]`` (index in the batch), ``position`` int64 ``[N]``, ``ordinal`` int64 ``[N]``
        (which token of its row's response) and each of ``names`` float32 ``[N]``.
        No attention mask: with padding on the right, causal attention never looks at it from a real token.
    """
    width = max((len(row.input_ids) for row in rows), default=0)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.input_ids)] = row.input_ids
    counts = [len(row.response_positions) for row in rows]
    positions = [row.response_positions for row in rows]
    given = values if values is not None else [{} for _ in rows]

    def per_token(name: str) -> torch.Tensor:
        default = np.ones if name == "weight" else np.zeros
        found = [one.get(name, default(count)) for one, count in zip(given, counts, strict=True)]
        return torch.from_numpy(np.concatenate([*found, np.zeros(0)]).astype(np.float32))

    return {
        "input_ids": torch.from_numpy(input_ids),
        "row_id": torch.tensor([row.row_id for row in rows], dtype=torch.int64),
        "length": torch.tensor([len(row.input_ids) for row in rows], dtype=torch.int64),
        "row": torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
        "position": torch.from_numpy(np.concatenate([*positions, np.zeros(0)]).astype(np.int64)),
        "ordinal": torch.from_numpy(np.concatenate([*map(np.arange, counts), np.zeros(0)]).astype(np.int64)),
        **{name: per_token(name) for name in names},
    }


class StepBatches(Dataset[dict[str, Any]]):
    """The micro-batches of one rank in one epoch; each carries the totals of its whole optimizer step.

    Beside what :func:`collate` gives: ``index`` int64 ``[B]`` (the row's place in the stage), ``selected`` and
    ``companion`` bool ``[B]``; ``step_tokens`` (response tokens), ``step_weight`` (sum of their weights), ``step_rows``
    (rows with any weight), each over all micro-batches and ranks of the step without its companions, and
    ``companion_tokens``; in the first micro-batch of a step ``step``, all of the rank's micro-batches, where wanted.
    """

    def __init__(self, stage: StageRows, plan: StepPlan, rank: int = 0) -> None:
        self.stage, self.plan, self.rank = stage, plan, rank
        self.names = stage.names
        self.counts = [len(row.response_positions) for row in stage.rows]
        self.weights = [
            (float(values["weight"].sum(dtype=np.float64)), bool(values["weight"].any()))
            if "weight" in values
            else (float(count), True)
            for values, count in zip(stage.values, self.counts, strict=True)
        ]
        self.epoch = 0

    def __len__(self) -> int:
        return self.plan.steps_per_epoch * self.plan.accumulate

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, micro_batch = divmod(index, self.plan.accumulate)
        ranks = self.plan.steps[self.epoch][step]
        members = [row for groups in ranks for group in groups for row in group]
        own = [row for row in members if row < self.stage.own]
        batch = self._collate(ranks[self.rank][micro_batch]) | {
            "step_tokens": float(sum(self.counts[row] for row in own)),
            "step_weight": float(sum(self.weights[row][0] for row in own)),
            "step_rows": float(sum(self.weights[row][1] for row in own)),
            "companion_tokens": float(sum(self.counts[row] for row in members if row >= self.stage.own)),
        }
        if self.stage.whole_step and not micro_batch:
            batch["step"] = [self._collate(group) for group in ranks[self.rank]]
        return batch

    def _collate(self, group: Group) -> dict[str, Any]:
        stage = self.stage
        at = torch.tensor(group, dtype=torch.int64)
        return collate([stage.rows[row] for row in group], [stage.values[row] for row in group], self.names) | {
            "index": at,
            "selected": torch.tensor([stage.selected[row] for row in group], dtype=torch.bool),
            "companion": at >= stage.own,
        }


class PassBatches(Dataset[dict[str, Any]]):
    """The batches of one rank in one pass over all rows.

    Beside what :func:`collate` gives: ``set``, the set's name, and ``index`` int64 ``[B]``, the row's place in it.
    """

    def __init__(self, rows: Sequence[TokenizedRow], groups: Sequence[Group], name: str = "") -> None:
        self.rows, self.groups, self.name = rows, groups, name

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = self.groups[index]
        at = torch.tensor(group, dtype=torch.int64)
        return collate([self.rows[row] for row in group]) | {"set": self.name, "index": at}


class BatchLoader(DataLoader[dict[str, Any]]):
    """Serves the planned batches in order, and after a restart goes on behind the last one that was served."""

    def __init__(self, batches: StepBatches | PassBatches, num_workers: int = 0) -> None:
        super().__init__(batches, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is)
        self.batches = batches
        self.served = 0
        self._skip = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        self.served = 0
        for batch in super().__iter__():
            self.served += 1
            if self.served > skip:
                yield batch

    def set_epoch(self, epoch: int) -> None:
        """Serves the plan's batches of ``epoch`` from the next pass on."""
        if isinstance(self.batches, StepBatches):
            self.batches.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """How many batches of this epoch were served; none of the next one once all were."""
        return {"served": self.served % max(1, len(self))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Passes over the batches that were served before."""
        self.served = self._skip = state["served"]


def _as_it_is(batch: Any) -> Any:
    return batch
