"""metrics.csv: one line per optimizer step or evaluation, appended as the run goes, kept when it is resumed."""

import csv
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from toss_lightning.errors import StoreError
from toss_lightning.files import cannot_write, write_text


class MetricsCsv(Logger):
    """Writes ``stage/name`` metrics as columns ``step, stage, name, ...``.

    Lightning's own CSVLogger deletes the file when a run is resumed in its directory.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = save_dir
        self._rows: list[dict[str, str]] | None = None
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Empty: the file lies in the run directory itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as the name."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return self._save_dir

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self._save_dir) / "metrics.csv"

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a line for each stage that the metrics name."""
        by_stage: dict[str, dict[str, str]] = {}
        for key, value in metrics.items():
            stage, _, name = key.rpartition("/")
            if name != "epoch":
                by_stage.setdefault(stage, {})[name] = f"{value:.8g}"
        for stage, values in by_stage.items():
            self._append({"step": str(step), "stage": stage, **values})

    @property
    @partial(rank_zero_only, default=0)
    def lines(self) -> int:
        """Lines that are there; 0 on all ranks but the first, which may just be writing one."""
        self._read()
        assert self._rows is not None
        return len(self._rows)

    @rank_zero_only
    def forget_from(self, step: int, lines: int) -> None:
        """Drops what a resumed run logs once more.

        Args:
            step: the optimizer step that it goes on with.
            lines: how many there were when the checkpoint was written.
        """
        self._read()
        assert self._rows is not None
        kept = [row for at, row in enumerate(self._rows) if at < lines or int(row["step"]) < step]
        if len(kept) < len(self._rows):
            self._rows = kept
            self._rewrite()

    def _append(self, row: dict[str, str]) -> None:
        self._read()
        assert self._rows is not None
        self._rows.append(row)
        new = [column for column in row if column not in self._columns]
        if new or not self.path.exists():
            self._columns += new
            self._rewrite()
        else:
            try:
                with self.path.open("a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
            except OSError as error:
                raise StoreError(cannot_write(self.path, error)) from error

    def _read(self) -> None:
        if self._rows is not None:
            return
        self._rows, self._columns = [], []
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            reader = csv.DictReader(whole.splitlines())
            self._rows = [{key: value for key, value in row.items() if value} for row in reader]
            self._columns = list(reader.fieldnames or [])
            if whole != text:  # a machine that went down wrote a part of a line
                self._rewrite()

    def _rewrite(self) -> None:
        lines = [self._columns, *([row.get(column, "") for column in self._columns] for row in self._rows or [])]
        write_text(self.path, "".join(",".join(line) + "\n" for line in lines))
