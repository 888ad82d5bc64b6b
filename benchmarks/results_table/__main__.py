"""The results table: which method keeps a fine-tuned model safe, and what it costs of the task.

    python benchmarks/results_table --data DIR [--work runs/results_table] [--seeds 1 2 3] [--jobs 2] [--only NAME ...]
        [--base MODEL] [--small]

DIR holds gsm8k_train.jsonl, gsm8k_test.jsonl, general.jsonl, harmful.jsonl, refusals.jsonl, benign_risky.jsonl and
prompts_*.jsonl. The bundled model is aligned first (`align.py`), for it comes without safety to lose; another base is
taken as it is. It needs a --work of its own, and so does --small. Then, for each seed, references are trained on rows
of their own and score each custom set once; and each comparison of this folder is run by ``toss compare``: methods x
seeds, resumable, on rows that `rows.py` deals out. What is done is not done again.

- main: all methods on a custom set of which a fifth is harmful;
- ablations: settings of TOSS, on the validation split;
- contamination: other shares of harmful rows, none among them;
- risky: harmless rows that erode safety most.

Writes benchmarks/results/results_table*.md and .svg, of another base with its name; with --report, from what is there.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import ablations
import shares
from align import align
from report import page, short_page
from rows import ALIGNMENT, SHARE, SHARES, SMALL, Size, write_prompts, write_rows
from tables import asked, read

from toss_lightning.data.scoring import digest_of
from toss_lightning.models.base import Base, resolve

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
BUNDLED = "bundled:smollm2-135m-instruct"
PARTS = ("main", "ablations", "contamination", "risky")
STOPPED = 128
"""An exit code from here on is that of a signal."""
OTHER_SHARES = [f"{share:g}" for share in SHARES if share != SHARE]
"""Of harmful rows, but for that of the main comparison, which need not be made twice."""


@dataclass(frozen=True)
class Experiment:
    """What is run where, and what it is called."""

    work: Path
    seeds: Sequence[int]
    base: str | None = None
    """Another one than the bundled one."""
    small: bool = False
    """Half as many rows of everything."""
    threads: int = 1
    """Of each process."""

    @property
    def size(self) -> Size:
        """Rows of each part. Another base is not aligned."""
        size = SMALL if self.small else Size()
        return size if self.base else replace(size, align=ALIGNMENT)

    @property
    def name(self) -> str:
        """Of another base; nothing for the bundled one."""
        return Path(self.base).stem if self.base else ""

    @property
    def command(self) -> str:
        """What writes the pages."""
        other = [f"--base {self.name}"] if self.base else []
        other += ["--small"] if self.small else []
        return " ".join(
            ["python benchmarks/results_table --data DIR", f"--seeds {' '.join(map(str, self.seeds))}", *other]
        )

    @property
    def setup(self) -> list[str]:
        """What is done, in words."""
        first = (
            "Bundled 135M model, aligned first on refusals, safe replies and plain tasks, then fine-tuned with LoRA on"
        )
        size = self.size
        return [
            f"{self.name}, as it comes, fine-tuned with LoRA on" if self.base else first,
            f"NF4: {size.custom} custom rows, {SHARE:.0%} of them harmful (BeaverTails), the others gsm8k and general",
            f"instructions; references from {size.reference} rows each; one epoch, learning rate 5e-4; {size.pairs}",
            f"held-out pairs and {size.task} held-out rows of the task; {size.safety} safe rows for methods that draw",
            "on such.",
        ]

    def page(self, part: str, suffix: str = ".md") -> Path:
        """The file of a page or picture; ``part`` is empty for the main one."""
        return RESULTS / (
            "_".join(["results_table", *([self.name] if self.base else []), *([part] if part else [])]) + suffix
        )

    def toss(self, *arguments: str) -> int:
        """Runs a verb of the command line in the directory of the experiment; returns its exit code.

        Raises:
            SystemExit: it was told to stop, and so is this.
        """
        settings = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        command = [sys.executable, "-m", "toss_lightning", *arguments]
        code = subprocess.run(command, cwd=self.work, env={**os.environ, **settings}).returncode
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
        ours, note = {"base": self.base, "small": self.small, **facts}, self.work / "experiment.json"
        theirs = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        if other := [name for name, fact in ours.items() if theirs.get(name, fact) != fact]:
            raise SystemExit(f"{self.work}: is of an experiment with another {', '.join(other)}: give another --work")
        self.work.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({**theirs, **ours}, indent=2), encoding="utf-8")

    def is_made(self, name: str) -> bool:
        """Whether a comparison has come to its end, or to a report of what is done."""
        return (self.work / name / "compare.json").exists()


def prepare(experiment: Experiment, data: Path) -> None:
    """Deals out the rows, makes the base, and lays the configurations beside them."""
    work = experiment.work
    write_rows(data, work / "rows", experiment.size, experiment.seeds)
    write_prompts(data, work / "rows")
    for file in (*HERE.glob("*.yaml"), HERE / "labels.py"):
        shutil.copy(file, work)
    contamination = (work / "contamination.yaml").read_text(encoding="utf-8")
    (work / "contamination.yaml").unlink()
    for share in OTHER_SHARES:
        text = contamination.replace("{share}", share)
        (work / f"contamination_{share}.yaml").write_text(text, encoding="utf-8")
    once = [work / "common.yaml", work / "references.yaml", work / "rows" / "align.jsonl"]
    once += [work / "rows" / f"{kind}_{seed}.jsonl" for kind in ("utility", "harmful") for seed in experiment.seeds]
    experiment.claim(**{file.name: digest_of(file.read_text(encoding="utf-8")) for file in once})
    if experiment.base is None:
        alone = replace(experiment, threads=os.cpu_count() or 1)
        align(BUNDLED, work / "rows" / "align.jsonl", work / "base", work, alone.toss)
    elif not (work / "base").exists():
        (work / "base").symlink_to(Path(resolve(Base(experiment.base))).resolve())


def comparisons(parts: Sequence[str]) -> list[str]:
    """Names of the compare files of each part."""
    of_shares = [f"contamination_{share}" for share in OTHER_SHARES]
    return [name for part in parts for name in (of_shares if part == "contamination" else [part])]


def train_references(experiment: Experiment, seed: int) -> None:
    """Trains the references of a seed and scores the main custom set with them, unless that is done."""
    sets = [f"--data.utility=rows/utility_{seed}.jsonl", f"--data.harmful=rows/harmful_{seed}.jsonl"]
    score(experiment, experiment.work / "references" / f"seed-{seed}", ["--config=references.yaml", *sets], seed)


def score_custom(experiment: Experiment, custom: str, seed: int) -> None:
    """Scores another custom set with the references of a seed, unless that is done."""
    adapters = f"references/seed-{seed}/adapters"
    sets = [f"--model.references.{role}={adapters}/{role}" for role in ("utility", "degraded")]
    sets += [f"--data.custom=rows/custom_{custom}.jsonl", "--loop.plan=[score]"]
    score(experiment, experiment.work / "scores" / custom / f"seed-{seed}", sets, seed)


def score(experiment: Experiment, run_dir: Path, settings: Sequence[str], seed: int) -> None:
    """Runs ``toss score``, unless it is done.

    Raises:
        SystemExit: it fails, for which it has given the reason.
    """
    if not (run_dir / "summary.json").exists():
        options = [f"--seed_everything={seed}", f"--run_dir={run_dir}", "--ckpt_path=auto"]
        if experiment.toss("score", "--config=common.yaml", *settings, *options):
            raise SystemExit(f"{run_dir}: no scores")


def report(experiment: Experiment, parts: Sequence[str]) -> None:
    """Writes the pages and pictures of these parts, of what has been run of them."""
    work, command, setup = experiment.work, experiment.command, experiment.setup

    def write(text: str, part: str, suffix: str = ".md") -> None:
        experiment.page(part, suffix).write_text(text, encoding="utf-8")

    if "main" in parts and experiment.is_made("main"):
        tested = [*setup, *asked(HERE / "test.yaml")]
        write(page(work, f"{command} --only main", tested), "")
        if experiment.base is None:
            write(short_page(work, f"{command} --only main", tested), "short")
        shutil.copy(work / "main" / "compare.svg", experiment.page("", ".svg"))
    if "ablations" in parts and experiment.is_made("ablations"):
        validated = [*setup, *asked(HERE / "validation.yaml")]
        write(ablations.page(work, f"{command} --only ablations", validated), "ablations")
        write(ablations.picture(work), "ablations", ".svg")
    found = dict(by_share(experiment))
    if {"contamination", "risky"} & {*parts} and (found or experiment.is_made("risky")):
        risky = (read(work / "risky"), work / "risky") if experiment.is_made("risky") else None
        other = [
            setup[0],
            f"NF4, as in the results table, but for the share of harmful rows; {SHARE:.0%} are from there.",
        ]
        write(shares.page(found, risky, f"{command} --only main contamination risky", other), "contamination")
        if found:
            write(shares.picture(found), "contamination", ".svg")


def by_share(experiment: Experiment) -> Iterator[tuple[float, shares.Comparison]]:
    """Shares of harmful rows whose comparison has been made."""
    for share in SHARES:
        name = "main" if share == SHARE else f"contamination_{share:g}"
        if experiment.is_made(name):
            yield share, (read(experiment.work / name), experiment.work / name)


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/results_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], choices=range(1, 100), metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--base", help="another chat model: a directory, a hub id or a .gguf file")
    parser.add_argument("--small", action="store_true", help="half as many rows of everything")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    experiment = Experiment(args.work.resolve(), args.seeds, args.base, args.small, threads)
    options = [f"--seeds={args.seeds}", f"--jobs={args.jobs}", *(["--report"] if args.report else [])]
    experiment.claim()
    if not args.report:
        prepare(experiment, args.data.resolve())
        customs = [*(OTHER_SHARES if "contamination" in args.only else []), *({"risky"} & {*args.only})]
        of_each = [(custom, seed) for custom in customs for seed in args.seeds]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: train_references(experiment, seed), args.seeds))
            list(pool.map(lambda one: score_custom(experiment, *one), of_each))
    names = [name for name in comparisons(args.only) if not args.report or (experiment.work / name).exists()]
    failed = [name for name in names if experiment.toss("compare", f"{name}.yaml", *options)]
    report(experiment, args.only)
    if failed:
        raise SystemExit(f"not complete: {', '.join(failed)}; the same command goes on")


if __name__ == "__main__":
    main()
