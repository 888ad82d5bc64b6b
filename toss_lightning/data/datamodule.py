"""The sets of a run, a loader for each stage, and the scoring of the custom set."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.data.batching import BatchLoader, PassBatches, StepBatches, StepPlan, plan_pass, plan_steps
from toss_lightning.data.rowset import Overlong, RowSet, load_rows, overlaps
from toss_lightning.data.sources import Source
from toss_lightning.data.tokenize import ChatTokenizer, TokenizedRow
from toss_lightning.errors import ConfigError, DataError
from toss_lightning.files import new_directory
from toss_lightning.progress import progress_bar, say
from toss_lightning.scores.store import ScoreWriter, TokenScores, write_manifest
from toss_lightning.seeds import global_seed

HELD_OUT = {"utility_val": "task_loss", "harmful_val": "harmful_loss", "refusal_val": "refusal_loss"}
"""Held-out set -> what its mean token loss is called."""
SWITCH_EVERY = 32
"""Batches scored with one reference adapter before the other takes its turn."""


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
        self.batch_size, self.max_tokens, self.num_workers = batch_size, max_tokens, num_workers
        self.sets: dict[str, RowSet] = {}
        self.plan: StepPlan | None = None
        self._stage: tuple[str, Mapping[int, np.ndarray] | None, int] | None = None
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
        for key in ("max_length", "batch_size", "max_tokens"):
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
        return {**sets, "data.batch_size": str(self.batch_size), "data.max_tokens": str(self.max_tokens)}

    # --- training and validation ------------------------------------------------------------------------------------

    def begin_stage(self, name: str, epochs: int, weights: Mapping[int, np.ndarray] | None = None) -> None:
        """Chooses what :meth:`train_dataloader` serves: the set ``name``, each token with its weight, or with 1."""
        self._stage = (name, weights, epochs)

    def train_dataloader(self) -> BatchLoader:
        """The current stage's batches; ``plan`` then says how many micro-batches make an optimizer step."""
        if self._stage is None:
            raise ConfigError("loop: training needs a loop that names its stages, such as TossProLoop")
        name, weights, epochs = self._stage
        rows = self.sets[name].rows
        lengths = [len(row.input_ids) for row in rows]
        self.plan = plan_steps(lengths, self.batch_size, self.max_tokens, epochs, self._fit.world_size, global_seed())
        return BatchLoader(StepBatches(rows, weights, self.plan, self._fit.global_rank), self.num_workers)

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
        self, trainer: Trainer, references: Sequence[str], fingerprints: Mapping[str, str], path: Path
    ) -> TokenScores:
        """Files the token losses of the custom set under each reference adapter in a store at ``path``.

        A store that is there already and was made from the same things is used as it is. Every row is scored once,
        whatever the number of ranks; each rank writes a file of its own.

        Args:
            trainer: holds the module and the strategy to run it with.
            references: names of the adapters, a column ``loss_<name>`` each.
            fingerprints: what the losses depend on beside the data.
            path: directory of the store.

        Raises:
            StoreError: the store cannot be written; nothing half-written remains.
        """
        fingerprints = {**fingerprints, **self.fingerprints()}
        # every rank goes the way of the first, whatever its own view of the disk
        differing = trainer.strategy.broadcast(TokenScores.differences(path, fingerprints))
        if differing == []:
            say(f"scores: {path} was made from the same data, base and adapters: used as it is")
            return TokenScores(path)
        if differing:
            say(f"scores: {path} was made with another {', '.join(differing)}: scoring again")
        rows = self.sets["custom"].rows
        strategy, main = trainer.strategy, trainer.is_global_zero
        with new_directory(path) if main else nullcontext() as directory:
            shared: Any = strategy.broadcast(directory)
            with ScoreWriter(shared, trainer.global_rank, trainer.world_size) as writer:
                for done in self._scored(trainer, references, rows):
                    writer.append(_columns(done))
            strategy.barrier("scores written")
            if main:
                write_manifest(shared, fingerprints, len(rows), sum(len(row.response_positions) for row in rows))
        strategy.barrier("scores in place")
        scores = TokenScores(path)
        scores.check(self.sets["custom"].hashes())
        return scores

    def _scored(
        self, trainer: Trainer, references: Sequence[str], rows: Sequence[TokenizedRow]
    ) -> Iterator[list[tuple[TokenizedRow, dict[str, np.ndarray]]]]:
        """Yields this rank's rows with their losses, some batches at a time."""
        module: Any = trainer.lightning_module
        strategy = trainer.strategy
        groups = self._groups(rows)
        loader = BatchLoader(PassBatches(rows, groups), self.num_workers)
        was_training = module.training
        module.eval()
        bar = progress_bar("score", sum(len(group) for group in groups), "row", trainer.is_global_zero)
        with bar, torch.no_grad():
            batches = zip(groups, loader, strict=True)
            while chunk := list(islice(batches, SWITCH_EVERY)):
                members = [rows[index] for group, _ in chunk for index in group]
                losses: dict[str, list[np.ndarray]] = {}
                for name in references:
                    with module.using(name):
                        flat = [strategy.predict_step(strategy.batch_to_device(batch), 0) for _, batch in chunk]
                    losses[name] = _cut(torch.cat(flat).float().cpu().numpy(), members)
                yield [
                    (row, {f"loss_{name}": values[index] for name, values in losses.items()})
                    for index, row in enumerate(members)
                ]
                bar.update(len(members))
        module.train(was_training)


def _cut(flat: np.ndarray, rows: Sequence[TokenizedRow]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum([len(row.response_positions) for row in rows])[:-1])


def _columns(scored: Iterable[tuple[TokenizedRow, dict[str, np.ndarray]]]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for row, losses in scored:
        values = {
            "row_id": row.row_id,
            "input_ids": row.input_ids,
            "response_positions": row.response_positions,
            "end_of_turn": row.end_of_turn,
            "ids_hash": row.ids_hash,
            "label": row.label,
            "source": row.source,
            **losses,
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return columns


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
