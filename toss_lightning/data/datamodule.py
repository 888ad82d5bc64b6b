"""The sets of a run, a loader for each stage, and the scoring of the custom set."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.data.batching import BatchLoader, Group, PassBatches, StepBatches, StepPlan, plan_pass, plan_steps
from toss_lightning.data.rowset import Overlong, RowSet, load_rows, overlaps
from toss_lightning.data.sources import Source
from toss_lightning.data.tokenize import ChatTokenizer, TokenizedRow
from toss_lightning.errors import ConfigError, DataError, StoreError
from toss_lightning.progress import progress_bar, say
from toss_lightning.scores.writer import ROW_SCHEMA, ScoreWriter
from toss_lightning.seeds import global_seed

HELD_OUT = {"utility_val": "task_loss", "harmful_val": "harmful_loss", "refusal_val": "refusal_loss"}
"""Held-out set -> what its mean token loss is called."""


class TossDataModule(LightningDataModule):
    """The custom, utility and harmful sets.

    Every set is a path (.jsonl, .json, .parquet, .csv, a `save_to_disk` folder), a hub dataset id, ``sample:NAME``, a
    :class:`~toss_lightning.data.sources.Source`, or a list of these.

    Args:
        custom: the rows to learn from, which may hold harmful ones.
        utility: rows of high quality for the same task; trains the utility reference.
        harmful: harmful requests with replies that comply; trains the degraded reference.
        utility_val: held-out utility rows, for ``task_loss``.
        harmful_val: held-out harmful rows, for ``harmful_loss`` (higher is safer).
        refusal_val: held-out refusals of harmful requests, for ``refusal_loss`` (lower is safer).
        holdout: share of the utility and harmful sets to hold out where no held-out set is given; 0 holds out none.
        max_length: tokens that a row may have.
        overlong: what happens to longer rows: drop, truncate or error.
        bad_rows: what happens to rows that cannot be read: error, or drop (they are counted).
        train_on: which assistant turns are response: all or the last.
        chat_template: a Jinja file to use instead of the tokenizer's own template.
        template_options: variables for the template, such as date_string.
        batch_size: rows per optimizer step, over all ranks.
        max_tokens: padded tokens that a device holds at once; a step's rows are cut into micro-batches of that size.
        score_every: batches that are scored between two writes to disk; what a kill can cost at most.
        num_workers: processes that prepare batches.
    """

    def __init__(
        self,
        custom: str | Source | list[str | Source] | None = None,
        utility: str | Source | list[str | Source] | None = None,
        harmful: str | Source | list[str | Source] | None = None,
        utility_val: str | Source | list[str | Source] | None = None,
        harmful_val: str | Source | list[str | Source] | None = None,
        refusal_val: str | Source | list[str | Source] | None = None,
        holdout: float = 0.1,
        max_length: int = 2048,
        overlong: Overlong = "drop",
        bad_rows: Literal["error", "drop"] = "error",
        train_on: Literal["all", "last"] = "all",
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
        batch_size: int = 64,
        max_tokens: int = 8192,
        score_every: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.specs = {
            "custom": custom,
            "utility": utility,
            "harmful": harmful,
            "utility_val": utility_val,
            "harmful_val": harmful_val,
            "refusal_val": refusal_val,
        }
        self.holdout, self.max_length, self.overlong, self.bad_rows = holdout, max_length, overlong, bad_rows
        self.train_on, self.chat_template, self.template_options = train_on, chat_template, template_options or {}
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.score_every, self.num_workers = score_every, num_workers
        self.sets: dict[str, RowSet] = {}
        self.plan: StepPlan | None = None
        self.stage_rows: list[TokenizedRow] = []
        self._stage: tuple[int, Mapping[int, np.ndarray] | None] | None = None
        self._tokenizer_parts: dict[str, str] = {}

    # --- reading --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Reads and tokenises every set that is given.

        Raises:
            ConfigError: a setting is out of range.
            DataError: a set cannot be read.
        """
        if self.sets:
            return
        self._check_settings()
        tokenizer: Any = self._fit.lightning_module.tokenizer
        if self.chat_template is not None:
            if not Path(self.chat_template).is_file():
                raise DataError(f"data.chat_template: {self.chat_template}: no such file")
            tokenizer.chat_template = Path(self.chat_template).read_text(encoding="utf-8")
        chat = ChatTokenizer(tokenizer, self.train_on, self.template_options)
        sets = {}
        for name, spec in self.specs.items():
            if spec is not None:
                sets[name] = load_rows(name, spec, chat, self.max_length, self.overlong, self.bad_rows)
        for name, held_out in (("utility", "utility_val"), ("harmful", "harmful_val")):
            if name in sets and held_out not in sets and self.holdout and len(sets[name].rows) > 1:
                sets[name], sets[held_out] = sets[name].split(self.holdout, held_out)
        self.sets = sets
        for rows in sets.values():
            if count := sum(not row.end_of_turn.any() for row in rows.rows):
                rank_zero_warn(
                    f"{count} of {len(rows.rows)} rows of the {rows.name} set hold no end-of-turn token (they are cut,"
                    " or the chat template has none): a model trained on them may not learn to stop"
                )
        for one, two, count in overlaps(list(sets.values())):
            rank_zero_warn(
                f"{count} rows stand in both the {one} and the {two} set: the results will flatter the method"
            )
        self._tokenizer_parts = {
            "tokenizer": _hash(tokenizer.backend_tokenizer.to_str()),
            "template": _hash(json.dumps([tokenizer.get_chat_template(), self.template_options], sort_keys=True)),
        }

    @property
    def _fit(self) -> Trainer:
        if self.trainer is None:
            raise ConfigError("TossDataModule: hand it to a Trainer, which knows the tokenizer and the ranks")
        return self.trainer

    def _check_settings(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"data.holdout: {self.holdout} is not a share: give a number in [0, 1)")
        for key in ("max_length", "batch_size", "max_tokens", "score_every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key}: {getattr(self, key)}: give a number of at least 1")

    def fingerprints(self) -> dict[str, str]:
        """What the token ids of the custom set depend on."""
        return {
            **self._tokenizer_parts,
            "dataset": self.sets["custom"].digest,
            "limits": f"max_length={self.max_length}, overlong={self.overlong}, train_on={self.train_on}",
            "tokens": self.sets["custom"].tokens_digest(),
        }

    def identity(self) -> dict[str, str]:
        """What the batches of every stage depend on; a checkpoint can only be resumed with the same."""
        sets = {f"{name} set": rows.tokens_digest() for name, rows in self.sets.items()}
        scored = {}
        if "custom" in self.sets:
            scored = {part: value for part, value in self.fingerprints().items() if part in ("dataset", "limits")}
        return {**sets, "data.batch_size": str(self.batch_size), **scored}

    # --- training and validation ------------------------------------------------------------------------------------

    def begin_stage(
        self,
        name: str,
        epochs: int,
        weights: Mapping[int, np.ndarray] | None = None,
        promoted: Collection[int] = (),
    ) -> None:
        """Chooses what :meth:`train_dataloader` serves.

        Args:
            name: the set.
            epochs: how often each row is served.
            weights: row id -> weight of each response token; 1 by default.
            promoted: row ids of the custom set whose rows are served beside the set's own.
        """
        self.stage_rows = list(self.sets[name].rows)
        if promoted:
            self.stage_rows += [row for row in self.sets["custom"].rows if row.row_id in promoted]
        self._stage = (epochs, weights)

    def plan_stage(self) -> StepPlan:
        """Plans the current stage's batches for the ranks at hand.

        Raises:
            ConfigError: no stage was begun, or a row is longer than ``max_tokens``.
        """
        if self._stage is None:
            raise ConfigError("loop: training needs a loop that names its stages, such as TossProLoop")
        lengths = [len(row.input_ids) for row in self.stage_rows]
        ranks = self._fit.world_size
        return plan_steps(lengths, self.batch_size, self.max_tokens, self._stage[0], ranks, global_seed())

    def train_dataloader(self) -> BatchLoader:
        """The current stage's batches; ``plan`` then says how many micro-batches make an optimizer step."""
        self.plan = self.plan_stage()
        assert self._stage is not None
        batches = StepBatches(self.stage_rows, self._stage[1], self.plan, self._fit.global_rank)
        return BatchLoader(batches, self.num_workers)

    def val_dataloader(self) -> list[BatchLoader]:
        """A loader for each held-out set."""
        return [
            BatchLoader(PassBatches(self.sets[name].rows, self._groups(self.sets[name].rows), metric), self.num_workers)
            for name, metric in HELD_OUT.items()
            if name in self.sets
        ]

    def _groups(self, rows: Sequence[TokenizedRow]) -> list[tuple[int, ...]]:
        lengths = [len(row.input_ids) for row in rows]
        return plan_pass(lengths, self.max_tokens, self._fit.world_size)[self._fit.global_rank]

    # --- scoring ------------------------------------------------------------------------------------------------------

    def score(
        self,
        trainer: Trainer,
        columns: Mapping[str, str],
        path: Path,
        round: int = 0,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Files token losses of the custom set in the store at ``path``, a column for each reference adapter.

        A column that is there already and was made from the same things is used as it is, and one that a killed run
        left unfinished is gone on with. Every row is scored once, whatever the number of ranks.

        Args:
            trainer: holds the module and the strategy to run it with.
            columns: name of a column -> name of the adapter that its losses are taken with.
            path: directory of the store.
            round: the round of TOSS-Pro that the store then ends with.
            between: called on every rank, equally often, whenever a chunk is on disk; what it raises ends the scoring.

        Raises:
            StoreError: the store cannot be written, or earlier rounds in it were made from other things.
        """
        module: Any = trainer.lightning_module
        writer = ScoreWriter(path, {**module.fingerprints(), **self.fingerprints()})
        if differing := trainer.strategy.broadcast(writer.differences()):
            if round:
                raise StoreError(
                    f"{path}: the scores of earlier rounds were made with another {', '.join(differing)}: resume with"
                    " the same, or start a new run"
                )
            say(f"scores: {path} was made with another {', '.join(differing)}: scoring again")
        if trainer.is_global_zero:
            writer.begin([_facts(row) for row in self.sets["custom"].rows])
        trainer.strategy.barrier("score store begun")
        wanted = {column: module.digest(adapter) for column, adapter in columns.items()}
        # every rank goes the way of the first, whatever its own view of the disk
        found = trainer.strategy.broadcast({column: writer.adapter_of(column) for column in columns})
        if wanted == found:
            say(f"scores: {path} was made from the same data, base and adapters: used as it is")
        missing = [column for column in columns if found[column] != wanted[column]]
        for column in missing:
            if found[column] is not None:
                say(f"scores: {path} was made with another {column} adapter: scoring again")
            if trainer.is_global_zero:
                writer.drop(column)  # all of them first: columns of two runs would make a score of neither
        trainer.strategy.barrier("stale columns dropped")
        for column in missing:
            self._score_column(trainer, writer, column, columns[column], wanted[column], between)
        if trainer.is_global_zero:
            writer.finish_round(round)
        trainer.strategy.barrier("round scored")

    def _score_column(
        self,
        trainer: Trainer,
        writer: ScoreWriter,
        column: str,
        adapter: str,
        digest: str,
        between: Callable[[], None],
    ) -> None:
        module: Any = trainer.lightning_module
        strategy, ranks, rows = trainer.strategy, trainer.world_size, self.sets["custom"].rows
        groups = plan_pass([len(row.input_ids) for row in rows], self.max_tokens)[0]
        chunks = [groups[at : at + self.score_every] for at in range(0, len(groups), self.score_every)]
        if trainer.is_global_zero:
            writer.begin_column(column, digest, _hash(json.dumps(chunks)))
        strategy.barrier("column begun")
        pending: list[int] = strategy.broadcast(writer.pending(column, len(chunks)))
        turns = -(-len(pending) // ranks)
        mine = pending[trainer.global_rank :: ranks]
        # a sharded base needs every rank in every forward pass, so all ranks run equally many batches
        batches = [_filled(chunks[chunk], self.score_every) for chunk in mine]
        batches += [_filled([], self.score_every)] * (turns - len(mine))
        loader = iter(BatchLoader(PassBatches(rows, [group for chunk in batches for group in chunk]), self.num_workers))
        done = len(rows) - sum(len(group) for chunk in pending for group in chunks[chunk])
        was_training = module.training
        module.eval()
        bar = progress_bar(f"score {column}", len(rows), "row", trainer.is_global_zero, done)
        with bar, torch.no_grad(), module.using(adapter):
            for turn in range(turns):
                served = islice(loader, self.score_every)
                flat = [strategy.predict_step(strategy.batch_to_device(batch), 0) for batch in served]
                if turn < len(mine):
                    members = [rows[index] for group in batches[turn] for index in group]
                    losses = _cut(torch.cat(flat).float().cpu().numpy(), members)
                    found = {row.row_id: values for row, values in zip(members, losses, strict=True)}
                    writer.append(column, mine[turn], found)
                bar.update(sum(len(group) for chunk in pending[turn * ranks :][:ranks] for group in chunks[chunk]))
                between()
        module.train(was_training)
        strategy.barrier("column written")
        if trainer.is_global_zero:
            writer.end_column(column)
        strategy.barrier("column in place")


def _filled(groups: Sequence[Group], count: int) -> list[Group]:
    return [*groups, *[()] * (count - len(groups))]


def _cut(flat: np.ndarray, rows: Sequence[TokenizedRow]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum([len(row.response_positions) for row in rows])[:-1])


def _facts(row: TokenizedRow) -> dict[str, Any]:
    """What the store says of a row."""
    return {field.name: getattr(row, field.name) for field in ROW_SCHEMA}


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
