"""Which rows stand in which batch: planned ahead, so that a batch knows the optimizer step it belongs to.

An optimizer step takes ``batch_size`` rows, over all ranks. The rows of a step are sorted by length and cut into
micro-batches of at most ``max_tokens`` padded tokens. Which rows share a step therefore depends neither on the memory
of a device nor on the number of devices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

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
    lengths: Sequence[int], batch_size: int, max_tokens: int, epochs: int, world_size: int = 1, seed: int = 0
) -> StepPlan:
    """Plans the shuffled batches of every epoch of a stage.

    Args:
        lengths: tokens of each row.
        batch_size: rows per optimizer step, over all ranks.
        max_tokens: padded tokens that one micro-batch may hold.
        epochs: how often each row is seen.
        world_size: ranks that share each step.
        seed: with the epoch number, fixes the order.

    Raises:
        ConfigError: a row alone exceeds ``max_tokens``.
    """
    _check_fits(lengths, max_tokens)
    packed = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        packed.append(
            [_pack(order[at : at + batch_size], lengths, max_tokens) for at in range(0, len(order), batch_size)]
        )
    accumulate = max((-(-len(groups) // world_size) for epoch in packed for groups in epoch), default=1)
    spread = [[_spread(groups, accumulate, world_size, lengths) for groups in epoch] for epoch in packed]
    return StepPlan(spread, accumulate)


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


def collate(rows: Sequence[TokenizedRow], weights: Sequence[np.ndarray] | None = None) -> dict[str, Any]:
    """Puts rows side by side, padded on the right with zeros.

    Returns:
        ``input_ids`` int64 ``[B, T]``; ``row_id`` int64 ``[B]``; and, for the N response tokens of all rows in order,
        ``row`` int64 ``[N]`` (index in the batch), ``position`` int64 ``[N]`` and ``weight`` float32 ``[N]``.
        No attention mask: with padding on the right, causal attention never looks at it from a real token.
    """
    width = max((len(row.input_ids) for row in rows), default=0)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.input_ids)] = row.input_ids
    counts = [len(row.response_positions) for row in rows]
    positions = [row.response_positions for row in rows]
    given = weights if weights is not None else [np.ones(count, dtype=np.float32) for count in counts]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "row_id": torch.tensor([row.row_id for row in rows], dtype=torch.int64),
        "row": torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
        "position": torch.from_numpy(np.concatenate([*positions, np.zeros(0)]).astype(np.int64)),
        "weight": torch.from_numpy(np.concatenate([*given, np.zeros(0)]).astype(np.float32)),
    }


class StepBatches(Dataset[dict[str, Any]]):
    """The micro-batches of one rank in one epoch; each carries the totals of its whole optimizer step.

    Beside what :func:`collate` gives: ``step_tokens`` (response tokens), ``step_weight`` (sum of their weights) and
    ``step_rows`` (rows with any weight), each over all micro-batches and ranks of the step.
    """

    def __init__(
        self, rows: Sequence[TokenizedRow], weights: Mapping[int, np.ndarray] | None, plan: StepPlan, rank: int = 0
    ) -> None:
        self.rows, self.plan, self.rank = rows, plan, rank
        self.weights = [
            weights[row.row_id] if weights is not None else np.ones(len(row.response_positions), dtype=np.float32)
            for row in rows
        ]
        self.epoch = 0

    def __len__(self) -> int:
        return self.plan.steps_per_epoch * self.plan.accumulate

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, micro_batch = divmod(index, self.plan.accumulate)
        ranks = self.plan.steps[self.epoch][step]
        members = [row for groups in ranks for group in groups for row in group]
        group = ranks[self.rank][micro_batch]
        return collate([self.rows[row] for row in group], [self.weights[row] for row in group]) | {
            "step_tokens": float(sum(len(self.weights[row]) for row in members)),
            "step_weight": float(sum(self.weights[row].sum(dtype=np.float64) for row in members)),
            "step_rows": float(sum(bool(self.weights[row].any()) for row in members)),
        }


class PassBatches(Dataset[dict[str, Any]]):
    """The batches of one rank in one pass over all rows; each carries the name of its ``set``."""

    def __init__(self, rows: Sequence[TokenizedRow], groups: Sequence[Group], name: str = "") -> None:
        self.rows, self.groups, self.name = rows, groups, name

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return collate([self.rows[row] for row in self.groups[index]]) | {"set": self.name}


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
