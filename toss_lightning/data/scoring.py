"""Fills a store: token losses of a set under adapters, and what selections read of whole rows."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from toss_lightning.data.batching import BatchLoader, Group, PassBatches, plan_pass
from toss_lightning.data.rowset import RowSet
from toss_lightning.data.tokenize import TokenizedRow
from toss_lightning.errors import StoreError
from toss_lightning.files import digest_of
from toss_lightning.progress import progress_bar, say
from toss_lightning.scores.writer import ROW_SCHEMA, ScoreWriter


class Scoring:
    """Scores with whatever module and strategy a Trainer holds; what a killed run left unfinished is gone on with.

    Args:
        trainer: holds the module and the strategy.
        sets: the sets of the run.
        scored: name of the one whose token losses are filed.
        path: directory of the store.
        fingerprints: what the token ids of that set depend on.
        max_tokens: padded tokens that a device holds at once.
        score_every: batches between two writes to disk.
        num_workers: processes that prepare batches.
        between: called on every rank, equally often, whenever a chunk is on disk; what it raises ends the scoring.
    """

    def __init__(
        self,
        trainer: Trainer,
        sets: Mapping[str, RowSet],
        scored: str,
        path: Path,
        fingerprints: Mapping[str, str],
        max_tokens: int,
        score_every: int,
        num_workers: int,
        between: Callable[[], None],
    ) -> None:
        self.trainer, self.sets, self.scored, self.path = trainer, sets, scored, path
        module: Any = trainer.lightning_module
        self.module, self.strategy = module, trainer.strategy
        self.max_tokens, self.score_every, self.num_workers = max_tokens, score_every, num_workers
        self.between = between
        self.writer = ScoreWriter(path, {**module.fingerprints(), **fingerprints})

    def begin(self, round: int) -> None:
        """Files the rows of the set, unless they are there.

        Raises:
            StoreError: the store cannot be written, or earlier rounds in it were made from other things.
        """
        if differing := self.strategy.broadcast(self.writer.differences()):
            if round:
                raise StoreError(
                    f"{self.path}: the scores of earlier rounds were made with another {', '.join(differing)}: resume"
                    " with the same, or start a new run"
                )
            say(f"scores: {self.path} was made with another {', '.join(differing)}: scoring again")
        if self.trainer.is_global_zero:
            self.writer.begin([_facts(row) for row in self.sets[self.scored].rows])
        self.strategy.barrier("score store begun")

    def columns(self, columns: Mapping[str, str]) -> None:
        """Files columns of token losses; one that is there already and was made from the same things stays.

        Args:
            columns: name of a column -> name of the adapter that its losses are taken with.
        """
        wanted = {column: self.module.digest(adapter) for column, adapter in columns.items()}
        # every rank goes the way of the first, whatever its own view of the disk
        found = self.strategy.broadcast({column: self.writer.adapter_of(column) for column in columns})
        if columns and wanted == found:
            say(f"scores: {self.path} was made from the same data, base and adapters: used as it is")
        missing = [column for column in columns if found[column] != wanted[column]]
        for column in missing:
            if found[column] is not None:
                say(f"scores: {self.path} was made with another {column} adapter: scoring again")
            if self.trainer.is_global_zero:
                self.writer.drop(column)  # all of them first: columns of two runs would make a score of neither
        self.strategy.barrier("stale columns dropped")
        for column in missing:
            self._column(column, columns[column], wanted[column])

    def _column(self, column: str, adapter: str, digest: str) -> None:
        ranks, rows = self.trainer.world_size, self.sets[self.scored].rows
        groups = plan_pass([len(row.input_ids) for row in rows], self.max_tokens)[0]
        chunks = [groups[at : at + self.score_every] for at in range(0, len(groups), self.score_every)]
        if self.trainer.is_global_zero:
            self.writer.begin_column(column, digest, digest_of(json.dumps(chunks)))
        self.strategy.barrier("column begun")
        pending: list[int] = self.strategy.broadcast(self.writer.pending(column, len(chunks)))
        turns = -(-len(pending) // ranks)
        mine = pending[self.trainer.global_rank :: ranks]
        # a sharded base needs every rank in every forward pass, so all ranks run equally many batches
        batches = [_filled(chunks[chunk], self.score_every) for chunk in mine]
        batches += [_filled([], self.score_every)] * (turns - len(mine))
        loader = iter(BatchLoader(PassBatches(rows, [group for chunk in batches for group in chunk]), self.num_workers))
        done = len(rows) - sum(len(group) for chunk in pending for group in chunks[chunk])
        was_training = self.module.training
        self.module.eval()
        title = f"score {column}" if self.scored == "custom" else f"score {column} on {self.scored}"
        bar = progress_bar(title, len(rows), "row", self.trainer.is_global_zero, done)
        with bar, torch.no_grad(), self.module.using(adapter):
            for turn in range(turns):
                served = islice(loader, self.score_every)
                flat = [self.strategy.predict_step(self.strategy.batch_to_device(batch), 0) for batch in served]
                if turn < len(mine):
                    members = [rows[index] for group in batches[turn] for index in group]
                    losses = _cut(torch.cat(flat).float().cpu().numpy(), members)
                    found = {row.row_id: values for row, values in zip(members, losses, strict=True)}
                    self.writer.append(column, mine[turn], found)
                bar.update(sum(len(group) for chunk in pending[turn * ranks :][:ranks] for group in chunks[chunk]))
                self.between()
        self.module.train(was_training)
        self.strategy.barrier("column written")
        if self.trainer.is_global_zero:
            self.writer.end_column(column)
        self.strategy.barrier("column in place")

    def features(self, features: Mapping[str, Sequence[str]], selector: Sequence[float] | None) -> None:
        """Files what a selection reads of whole rows; what is there already and was made from the same things stays.

        Args:
            features: kind -> names of the sets.
            selector: the logit of each custom row, for the kind ``selector``.
        """
        for kind, names in features.items():
            for name in names:
                made_from = self._made_from(kind, name, selector)
                if self.strategy.broadcast(self.writer.feature_of(kind, name)) == made_from:
                    continue
                if kind == "embedding":
                    values: Any = self._embeddings(name)
                else:
                    values = selector if kind == "selector" else self.sets[name].texts
                if self.trainer.is_global_zero:
                    row_ids = [row.row_id for row in self.sets[name].rows]
                    self.writer.write_feature(kind, name, row_ids, values, made_from)
                self.strategy.barrier("feature written")

    def _made_from(self, kind: str, name: str, selector: Sequence[float] | None) -> str:
        rows = self.sets[name]
        further = {"selector": selector, "embedding": sorted(self.module.fingerprints().items())}
        return f"{rows.tokens_digest()} {digest_of(json.dumps([kind, name, rows.digest, further.get(kind)]))}"

    def _embeddings(self, name: str) -> np.ndarray:
        """The base's last hidden state at the last token of each row; ``[R, D]``."""
        rows = self.sets[name].rows
        groups = plan_pass([len(row.input_ids) for row in rows], self.max_tokens, self.trainer.world_size)
        loader = BatchLoader(PassBatches(rows, groups[self.trainer.global_rank]), self.num_workers)
        found: torch.Tensor | None = None
        was_training = self.module.training
        self.module.eval()
        bar = progress_bar(f"embed {name}", len(loader), "batch", self.trainer.is_global_zero)
        with bar, torch.no_grad(), self.module.using("base"):
            for batch in loader:
                there = self.strategy.batch_to_device(batch)
                part = self.module.embeddings(there)
                if found is None:
                    found = part.new_zeros((len(rows), part.shape[1]))
                found[there["index"]] = part
                bar.update(1)
                self.between()
        self.module.train(was_training)
        assert found is not None
        # each row was embedded on one rank, and is 0 on the others
        whole: np.ndarray = self.strategy.reduce(found, reduce_op="sum").cpu().numpy()
        return whole


def _filled(groups: Sequence[Group], count: int) -> list[Group]:
    return [*groups, *[()] * (count - len(groups))]


def _cut(flat: np.ndarray, rows: Sequence[TokenizedRow]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum([len(row.response_positions) for row in rows])[:-1])


def _facts(row: TokenizedRow) -> dict[str, Any]:
    """What the store says of a row."""
    return {field.name: getattr(row, field.name) for field in ROW_SCHEMA}
