"""The sets of a run, a loader for each stage, and the scoring of the custom set."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from toss_lightning.data.batching import BatchLoader, PassBatches, StepBatches, StepPlan, plan_pass, plan_steps
from toss_lightning.data.mixtures import Mixture
from toss_lightning.data.rowset import Overlong, RowSet, load_rows, warn_of_rows
from toss_lightning.data.scoring import Scoring
from toss_lightning.data.sources import Source
from toss_lightning.data.stages import Companions, StageRows, Values, beside, name_rows_of
from toss_lightning.data.tokenize import ChatTokenizer, TokenizedRow
from toss_lightning.errors import ConfigError, DataError
from toss_lightning.files import digest_of, user_path
from toss_lightning.identity import identify
from toss_lightning.seeds import global_seed

HELD_OUT_OF = {"utility_val": "utility", "harmful_val": "harmful"}
"""Held-out set -> the set of which a share stands in for it."""
HELD_OUT = {"utility_val": "task_loss", "harmful_val": "harmful_loss", "refusal_val": "refusal_loss"}
"""Held-out set -> what its mean token loss is called."""


class TossDataModule(LightningDataModule):
    """The custom, utility, harmful and safety sets.

    Every set is a path (.jsonl, .json, .parquet, .csv, a `save_to_disk` folder), a hub dataset id, ``sample:NAME``, a
    :class:`~toss_lightning.data.sources.Source`, or a list of these.

    Args:
        custom: the rows to learn from, which may hold harmful ones.
        utility: rows of high quality for the same task; trains the utility reference.
        harmful: harmful requests with replies that comply; trains the degraded reference.
        safety: harmful or borderline requests with safe replies; for methods that draw on such a set.
        mixture: rows of other sets that the target is trained on besides.
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
        safety: str | Source | list[str | Source] | None = None,
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
        mixture: Mixture | None = None,
    ) -> None:
        super().__init__()
        self.specs = {
            "custom": custom,
            "utility": utility,
            "harmful": harmful,
            "safety": safety,
            "utility_val": utility_val,
            "harmful_val": harmful_val,
            "refusal_val": refusal_val,
        }
        self.holdout, self.max_length, self.overlong, self.bad_rows = holdout, max_length, overlong, bad_rows
        self.train_on, self.chat_template, self.template_options = train_on, chat_template, template_options or {}
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.score_every, self.num_workers = score_every, num_workers
        self.mixture = mixture
        self.sets: dict[str, RowSet] = {}
        self.plan: StepPlan | None = None
        self.stage_rows: StageRows | None = None
        self.stage_mixed = 0
        self._epochs = 0
        self.chat: ChatTokenizer | None = None
        self._tokenizer_parts: dict[str, str] = {}

    # --- reading --------------------------------------------------------------------------------------------------

    def read_only(self, names: Collection[str]) -> None:
        """Leaves out all sets but these, and those that they are held out of: of a run that is looked at later.

        Args:
            names: the sets.
        """
        kept = {*names}
        for held_out, name in HELD_OUT_OF.items():
            if held_out in kept and self.specs[held_out] is None:
                kept.add(name)
        self.specs = {name: spec if name in kept else None for name, spec in self.specs.items()}
        self.mixture = None

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
            template = user_path(self.chat_template)
            if not template.is_file():
                raise DataError(f"data.chat_template: {self.chat_template}: no such file")
            try:
                tokenizer.chat_template = template.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"data.chat_template: {self.chat_template}: not in UTF-8: save it as that") from error
        self.chat = chat = ChatTokenizer(tokenizer, self.train_on, self.template_options)
        if chat.writes_the_date():
            rank_zero_warn(
                "the chat template writes the date of today: tomorrow rows have other tokens, and checkpoints, scores"
                ' and selections of today are refused: fix it, with data.template_options: {date_string: "26 Jul 2024"}'
                " where the template knows that name, or with a data.chat_template of your own"
            )
        wanted = {name: spec for name, spec in self.specs.items() if spec is not None}
        how = (chat, self.max_length, self.overlong, self.bad_rows, self._fit.global_rank == 0)
        # the custom set may take an hour, before which it should be known that the others can be read
        read = {name: load_rows(name, wanted[name], *how) for name in sorted(wanted, key="custom".__eq__)}
        sets = {name: read[name] for name in wanted}
        for held_out, name in HELD_OUT_OF.items():
            if name in sets and held_out not in sets and self.holdout and len(sets[name].rows) > 1:
                sets[name], sets[held_out] = sets[name].split(self.holdout, held_out)
        warn_of_rows([*sets.values()])
        self.sets = sets
        self._tokenizer_parts = {
            "tokenizer": digest_of(tokenizer.backend_tokenizer.to_str()),
            "template": digest_of(json.dumps([tokenizer.get_chat_template(), self.template_options], sort_keys=True)),
        }

    @property
    def _fit(self) -> Trainer:
        if self.trainer is None:
            raise ConfigError("TossDataModule: hand it to a Trainer, which knows the tokenizer and the ranks")
        return self.trainer

    def _check_settings(self) -> None:
        for name in self.mixture.sets if self.mixture is not None else ():
            if self.specs[name] is None:
                raise ConfigError(f"data.{name}: data.mixture draws on this set: give a path to it")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"data.holdout: {self.holdout} is not a share: give a number in [0, 1)")
        for key in ("max_length", "batch_size", "max_tokens", "score_every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key}: {getattr(self, key)}: give a number of at least 1")

    def fingerprints(self, set: str = "custom") -> dict[str, str]:
        """What the token ids of a set depend on."""
        return {
            **self._tokenizer_parts,
            "dataset": self.sets[set].digest,
            "limits": f"max_length={self.max_length}, overlong={self.overlong}, train_on={self.train_on}",
            "tokens": self.sets[set].tokens_digest(),
        }

    def identity(self) -> dict[str, str]:
        """What the batches of every stage depend on; a checkpoint can only be resumed with the same."""
        sets = {f"{name} set": rows.tokens_digest() for name, rows in self.sets.items()}
        scored = {}
        if "custom" in self.sets:
            scored = {part: value for part, value in self.fingerprints().items() if part in ("dataset", "limits")}
        return {**sets, "data.batch_size": str(self.batch_size), "data.mixture": identify(self.mixture), **scored}

    def check_fits(self, names: Collection[str], context: int | None = None) -> None:
        """Refuses rows that no batch can hold, or that the model cannot read, before anything is trained.

        Args:
            names: sets that will be served.
            context: how many tokens the model reads at most; None where it does not say.

        Raises:
            ConfigError: a row is longer than ``max_tokens`` or than ``context``.
        """
        for name in sorted(names):
            longest = max(self.sets[name].rows, key=lambda row: len(row.input_ids))
            if len(longest.input_ids) > self.max_tokens:
                raise ConfigError(
                    f"data.{name}: row {longest.row_id} has {len(longest.input_ids)} tokens, and data.max_tokens holds"
                    f" {self.max_tokens}: raise data.max_tokens, or lower data.max_length"
                )
            if context is not None and len(longest.input_ids) > context:
                raise ConfigError(
                    f"data.{name}: row {longest.row_id} has {len(longest.input_ids)} tokens, and the model reads"
                    f" {context}: lower data.max_length"
                )

    # --- training and validation ------------------------------------------------------------------------------------

    def begin_stage(
        self,
        name: str,
        epochs: int,
        values: Mapping[str, Mapping[int, np.ndarray]] | None = None,
        left_out: Collection[int] = (),
        promoted: Collection[int] = (),
        mixed: bool = False,
        companions: Companions | None = None,
        whole_step: bool = False,
    ) -> None:
        """Chooses what :meth:`train_dataloader` serves.

        Args:
            name: the set.
            epochs: how often each row is served.
            values: ``weight`` and others -> row id -> a value for each response token; a weight is 1 by default.
            left_out: row ids of rows of the set that are not served.
            promoted: row ids of the custom set whose rows are served beside the set's own.
            mixed: the mixture's rows are served too.
            companions: rows that stand beside the others in every step.
            whole_step: the first micro-batch of a step brings all of them.
        """
        rows = [row for row in self.sets[name].rows if row.row_id not in left_out]
        if promoted:
            rows += [row for row in self.sets["custom"].rows if row.row_id in promoted]
        stage = StageRows.plain(rows)
        if values is not None:
            of_rows: list[Values] = [{key: of[row.row_id] for key, of in values.items()} for row in rows]
            stage = StageRows(rows, of_rows, [True] * len(rows))
        more = self.mixture.rows(self.sets, global_seed()) if mixed and self.mixture is not None else []
        self.stage_mixed = len(more)
        if more:
            stage = beside(stage, more, {})
        if companions is not None:
            more = self.sets[companions.set].rows
            stage = beside(stage, more, companions.values)
            stage = replace(stage, companions=len(more), per_step=companions.per_step)
        self.stage_rows, self._epochs = replace(stage, whole_step=whole_step), epochs

    def named(self, indices: Collection[int]) -> str:
        """Rows of the current stage as people find them: the set that each is of, and its row number there."""
        assert self.stage_rows is not None
        return name_rows_of(self.stage_rows, indices, self.sets)

    def plan_stage(self) -> StepPlan:
        """Plans the current stage's batches for the ranks at hand.

        Raises:
            ConfigError: no stage was begun, or a row is longer than ``max_tokens``.
        """
        stage = self.stage_rows
        if stage is None:
            raise ConfigError("loop: training needs a loop that names its stages, such as TossProLoop")
        lengths = [len(row.input_ids) for row in stage.rows]
        sizes = (self.batch_size, self.max_tokens, self._epochs, self._fit.world_size)
        return plan_steps(lengths, *sizes, global_seed(), stage.companions, stage.per_step)

    def train_dataloader(self) -> BatchLoader:
        """The current stage's batches; ``plan`` then says how many micro-batches make an optimizer step."""
        self.plan = self.plan_stage()
        assert self.stage_rows is not None
        return BatchLoader(StepBatches(self.stage_rows, self.plan, self._fit.global_rank), self.num_workers)

    def batches(self, name: str, indices: Sequence[int]) -> list[dict[str, Any]]:
        """This rank's batches of some rows of a set; ``index`` is the row's place in the set.

        Args:
            name: the set.
            indices: places in it.
        """
        rows = self.sets[name].rows
        lengths = [len(rows[index].input_ids) for index in indices]
        mine = plan_pass(lengths, self.max_tokens, self._fit.world_size)[self._fit.global_rank]
        groups = [tuple(indices[at] for at in group) for group in mine]
        served = PassBatches(rows, groups, name)
        return [served[at] for at in range(len(groups))]

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
        features: Mapping[str, Sequence[str]] | None = None,
        selector: Sequence[float] | None = None,
        held_out: Sequence[str] = (),
    ) -> None:
        """Files what a selection reads in the store at ``path``: token losses of the custom set, features of rows.

        A column that is there already and was made from the same things is used as it is, and one that a killed run
        left unfinished is gone on with. Every row is scored once, whatever the number of ranks.

        Args:
            trainer: holds the module and the strategy to run it with.
            columns: name of a column -> name of the adapter that its losses are taken with, or ``base`` for none.
            path: directory of the store.
            round: the round of TOSS-Pro that the store then ends with.
            between: called on every rank, equally often, whenever a chunk is on disk; what it raises ends the scoring.
            features: kind of row feature -> the sets that it is wanted of.
            selector: the logit of each custom row, where such a feature is wanted.
            held_out: sets of which the same token losses are wanted, each in a store of its own inside this one.

        Raises:
            StoreError: the store cannot be written, or earlier rounds in it were made from other things.
        """
        settings = (self.max_tokens, self.score_every, self.num_workers)
        for name in ("custom", *held_out):
            place = path if name == "custom" else path / name
            scoring = Scoring(trainer, self.sets, name, place, self.fingerprints(name), *settings, between)
            scoring.begin(round)
            scoring.columns(columns)
            if name == "custom":
                scoring.features(features or {}, selector)
            if trainer.is_global_zero:
                scoring.writer.finish_round(round)
            trainer.strategy.barrier("round scored")
