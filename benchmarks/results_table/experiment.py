"""One experiment of the results table: its size, where it lies, and how its commands are run."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from rows import ALIGNMENT, SHARE, SIZES, Size

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
EPOCHS: int = yaml.safe_load((HERE / "common.yaml").read_text(encoding="utf-8"))["loop"]["reference_epochs"]
"""Passes of the references over their rows, where nothing else is asked for."""
MOST_EPOCHS = 4
BEST = "best"
"""References of which the best one of :data:`MOST_EPOCHS` is kept, as the validation split tells."""
STOPPED = 128
"""An exit code from here on is that of a signal."""


@dataclass(frozen=True)
class Experiment:
    """What is run where, and what it is called."""

    work: Path
    seeds: Sequence[int]
    base: str | None = None
    """Another one than the bundled one."""
    size: str = "medium"
    """See :data:`rows.SIZES`."""
    threads: int = 1
    """Of each process."""
    epochs: int = EPOCHS
    """Passes of the references over their rows."""
    dtype: str = "auto"
    """What is computed in, as ``model.base.dtype`` takes it."""
    label: str = ""
    """Of the pages, where the same is done once more, such as on another machine."""

    @property
    def rows(self) -> Size:
        """Of each part. Another base is not aligned."""
        size = SIZES[self.size]
        return size if self.base else replace(size, align=ALIGNMENT)

    @property
    def name(self) -> str:
        """What differs from the usual, another base, size, and so on, and what it is called."""
        parts = [Path(self.base).stem] if self.base else []
        parts += [self.size] if self.size != "medium" else []
        parts += [f"epochs-{self.epochs}"] if self.epochs != EPOCHS else []
        parts += [self.dtype] if self.dtype != "auto" else []
        parts += [self.label] if self.label else []
        return "_".join(parts)

    @property
    def command(self) -> str:
        """What writes the pages."""
        other = [f"--base PATH/{Path(self.base).name}"] if self.base else []
        other += [f"--size {self.size}"] if self.size != "medium" else []
        other += [f"--reference-epochs {self.epochs}"] if self.epochs != EPOCHS else []
        other += [f"--dtype {self.dtype}"] if self.dtype != "auto" else []
        other += [f"--name {self.label}"] if self.label else []
        return " ".join(
            ["python benchmarks/results_table --data DIR", f"--seeds {' '.join(map(str, self.seeds))}", *other]
        )

    def setup(self, epochs: str | None = None) -> list[str]:
        """What is done, in words.

        Args:
            epochs: how long references are trained, where that is not :attr:`epochs`.
        """
        epochs = epochs or f"{self.epochs} epoch{'' if self.epochs == 1 else 's'}"
        first = (
            "Bundled 135M model, aligned first on refusals, safe replies and plain tasks, then fine-tuned with LoRA on"
        )
        size = self.rows
        return [
            f"{Path(self.base).stem}, as it comes, fine-tuned with LoRA on" if self.base else first,
            f"NF4: {size.custom} custom rows, {SHARE:.0%} of them harmful (BeaverTails), the others gsm8k and general",
            f"instructions; one epoch, learning rate 5e-4; references from {size.reference} rows each, {epochs};",
            f"{size.pairs} held-out pairs and {size.task} held-out rows of the task; {size.safety} safe rows for",
            "methods that draw on such.",
        ]

    def page(self, part: str, suffix: str = ".md") -> Path:
        """The file of a page or picture; ``part`` is empty for the main one."""
        return RESULTS / (
            "_".join(["results_table", *([self.name] if self.name else []), *([part] if part else [])]) + suffix
        )

    def toss(self, *arguments: str) -> int:
        """Runs a verb of the command line in the directory of the experiment; returns its exit code.

        Raises:
            SystemExit: it was told to stop, and so is this.
        """
        settings = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        command = [sys.executable, "-m", "toss_lightning", *arguments]
        process = subprocess.Popen(command, cwd=self.work, env={**os.environ, **settings})
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # it has heard of it too, and ends when its own runs have written checkpoints
            code = max(process.wait(), STOPPED)
        if code >= STOPPED:
            raise SystemExit(code)
        return code

    def claim(self, **facts: str) -> None:
        """Notes in the directory whose it is, and what is made in it once and for all.

        Args:
            facts: what that is made from.

        Raises:
            SystemExit: it is another experiment's, whose base, rows and scores would be taken for this one's.
        """
        note = self.work / "experiment.json"
        ours = {"base": self.base, "size": self.size, "dtype": self.dtype, "epochs": self.epochs, **facts}
        theirs = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        if other := [name for name, fact in ours.items() if theirs.get(name, fact) != fact]:
            raise SystemExit(f"{self.work}: is of an experiment with another {', '.join(other)}: give another --work")
        self.work.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({**theirs, **ours}, indent=2), encoding="utf-8")

    def is_made(self, name: str) -> bool:
        """Whether a comparison has come to its end, or to a report of what is done."""
        return (self.work / name / "compare.json").exists()

    def scores(self, kind: str, custom: str, seed: int) -> Path:
        """Where the scores of another custom set lie.

        Args:
            kind: ``scores``, or ``cuts`` where held-out rows are scored too.
            custom: name of the set.
            seed: of the references.
        """
        return self.work / kind / custom / f"seed-{seed}"

    def references(self, seed: int, trained: str | None = None) -> Path:
        """Where the references of a seed lie.

        Args:
            seed: which one.
            trained: for how many epochs, or :data:`BEST`; None: those that methods use.
        """
        used = trained in (None, f"{self.epochs}")
        return self.work / ("references" if used else f"references_{trained}") / f"seed-{seed}"
