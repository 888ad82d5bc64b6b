"""The results table: which method keeps a fine-tuned model safe, and what it costs of the task.

    python benchmarks/results_table --data DIR [--work WORK] [--seeds 1 2 3] [--jobs 2] [--only NAME ...]
        [--base MODEL] [--size medium] [--reference-epochs 2] [--dtype auto] [--name NAME]

DIR holds gsm8k_train.jsonl, gsm8k_test.jsonl, general.jsonl, harmful.jsonl, refusals.jsonl, benign_risky.jsonl and
prompts_*.jsonl; `get_data.py --to DIR` makes them of public sets, docs/results.md says what a row holds, data.sha256
whether they are those of the committed pages. The bundled model is aligned first (`align.py`), for it comes without
safety to lose; another base is taken as it is. WORK is runs/results_table; another --base, --size, --reference-epochs,
--dtype and --name have one of their own. Then, for each seed, references are trained on rows of their own and score
each custom set once; and each comparison of this folder is run by ``toss compare``: methods x seeds, resumable, on rows
that `rows.py` deals out. What is done is not done again.

- main: all methods on a custom set of which a fifth is harmful;
- ablations: settings of TOSS, on the validation split;
- contamination: other shares of harmful rows, none among them;
- risky: harmless rows that erode safety most;
- references: how long references are trained, and what they know then;
- cuts: where TOSS-Chain's cut should stand.

Writes benchmarks/results/results_table*.md, .svg and .csv (what each run measured), of another base or size with its
name; with --report, from what is there.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import ablations
import cuts
import references
import risky
import shares
from align import align
from experiment import BEST, EPOCHS, HERE, MOST_EPOCHS, Experiment
from report import page, short_page
from rows import SHARE, SHARES, SIZES, check_apart, count_rows, differing, write_prompts, write_rows
from tables import asked, read

from toss_lightning.files import digest_of
from toss_lightning.models.base import Base, resolve

BUNDLED = "bundled:smollm2-135m-instruct"
COMPARED = ("main", "ablations", "contamination", "risky")
PARTS = (*COMPARED, "references", "cuts")
OTHER_SHARES = [f"{share:g}" for share in SHARES if share != SHARE]
"""Of harmful rows, but for that of the main comparison, which need not be made twice."""
DTYPES = ("auto", "float32", "bfloat16")
TRAINED = ("1", "2", BEST)
"""Passes of the references over their rows, to see what these are worth."""


def prepare(experiment: Experiment, data: Path) -> None:
    """Deals out the rows, makes the base, and lays the configurations beside them.

    Raises:
        SystemExit: see :func:`rows.check_apart` and :meth:`Experiment.claim`; nothing is changed then.
    """
    work = experiment.work
    work.mkdir(parents=True, exist_ok=True)
    if others := differing(data):
        print(f"{data}: not what the committed pages were made from: {', '.join(others)}", file=sys.stderr)
    with TemporaryDirectory(prefix="prepared-", dir=work) as temporary:
        new = Path(temporary)
        write_rows(data, new / "rows", experiment.rows, experiment.seeds)
        write_prompts(data, new / "rows")
        check_apart(new / "rows")
        lay_out(experiment, new)
        once = [new / "common.yaml", new / "references.yaml", new / "rows" / "align.jsonl"]
        once += [new / "rows" / f"{kind}_{seed}.jsonl" for kind in ("utility", "harmful") for seed in experiment.seeds]
        experiment.claim(**{file.name: digest_of(file.read_text(encoding="utf-8")) for file in once})
        shutil.copytree(new, work, dirs_exist_ok=True)
    if experiment.base is None:
        alone = replace(experiment, threads=os.cpu_count() or 1)
        align(BUNDLED, work / "rows" / "align.jsonl", work / "base", work, alone.toss)
    elif not (work / "base").exists():
        (work / "base").symlink_to(Path(resolve(Base(experiment.base))).resolve())


def lay_out(experiment: Experiment, to: Path) -> None:
    """Writes the configurations, with what they leave open filled in."""
    for file in (*HERE.glob("*.yaml"), HERE / "labels.py"):
        shutil.copy(file, to)
    common, test, contamination = to / "common.yaml", to / "test.yaml", to / "contamination.yaml"
    text = common.read_text(encoding="utf-8").replace(f"_epochs: {EPOCHS}\n", f"_epochs: {experiment.epochs}\n")
    if experiment.dtype != "auto":
        text = text.replace("quantization: nf4}", f"quantization: nf4, dtype: {experiment.dtype}}}")
    common.write_text(text, encoding="utf-8")
    asked_of = {test: experiment.rows.prompts, to / "validation.yaml": experiment.rows.validation_prompts}
    for file, prompts in asked_of.items():
        text = file.read_text(encoding="utf-8").replace("{prompts}", str(prompts))
        file.write_text(text, encoding="utf-8")
    text = contamination.read_text(encoding="utf-8")
    contamination.unlink()
    for share in OTHER_SHARES:
        (to / f"contamination_{share}.yaml").write_text(text.replace("{share}", share), encoding="utf-8")


def comparisons(parts: Sequence[str]) -> list[str]:
    """Names of the compare files of each part."""
    of_shares = [f"contamination_{share}" for share in OTHER_SHARES]
    return [name for part in parts if part in COMPARED for name in (of_shares if part == "contamination" else [part])]


def train_references(experiment: Experiment, seed: int, trained: str | None = None) -> None:
    """Trains the references of a seed and scores the main custom set with them, unless that is done."""
    settings = [f"--data.utility=rows/utility_{seed}.jsonl", f"--data.harmful=rows/harmful_{seed}.jsonl"]
    if trained == BEST:
        settings += ["--loop.keep_epoch=best", "--data.utility_val=rows/task_validation.jsonl"]
        settings += ["--data.harmful_val=rows/pairs_validation.jsonl"]
    epochs = MOST_EPOCHS if trained == BEST else trained or experiment.epochs
    settings = ["--config=references.yaml", *settings, f"--loop.reference_epochs={epochs}"]
    score(experiment, experiment.references(seed, trained), settings, seed)


def score_custom(experiment: Experiment, custom: str, seed: int, held_out: bool = False) -> None:
    """Scores another custom set with the references of a seed, and held-out rows, unless that is done."""
    adapters = f"references/seed-{seed}/adapters"
    sets = [f"--model.references.{role}={adapters}/{role}" for role in ("utility", "degraded")]
    sets += [f"--data.custom=rows/custom_{custom}.jsonl", "--loop.plan=[score]"]
    sets += ["--config=cuts.yaml"] if held_out else []
    score(experiment, experiment.scores("cuts" if held_out else "scores", custom, seed), sets, seed)


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
    work, command, setup = experiment.work, experiment.command, experiment.setup()

    def write(text: str, part: str, suffix: str = ".md") -> None:
        experiment.page(part, suffix).write_text(text, encoding="utf-8")

    for name in comparisons(parts):
        if (runs := work / name / "compare_runs.csv").exists():
            shutil.copy(runs, experiment.page("" if name == "main" else name, ".csv"))
    if "main" in parts and experiment.is_made("main"):
        tested = [*setup, *asked(work / "test.yaml")]
        write(page(work, f"{command} --only main", tested), "")
        if not experiment.name:
            write(short_page(work, f"{command} --only main", tested), "short")
        shutil.copy(work / "main" / "compare.svg", experiment.page("", ".svg"))
    if "ablations" in parts and experiment.is_made("ablations"):
        validated = [*setup, *asked(work / "validation.yaml")]
        write(ablations.page(work, f"{command} --only ablations", validated), "ablations")
        write(ablations.picture(work), "ablations", ".svg")
    if "references" in parts and any((runs := by_epochs(experiment)).values()):
        trained = experiment.setup("for the epochs below")
        write(references.page(runs, f"{command} --only references", trained), "references")
    if "cuts" in parts:
        found_of = {
            share: [experiment.scores("cuts", share, seed) for seed in experiment.seeds] for share in cuts.CUSTOM
        }
        done = {share: [run for run in of if (run / "summary.json").exists()] for share, of in found_of.items()}
        if all(done.values()):
            write(cuts.page(done, f"{command} --only cuts", setup), "cuts")
    if "contamination" in parts and (found := dict(by_share(experiment))):
        of = f"NF4, as in the results table, but for the share of harmful rows; {SHARE:.0%} are from there."
        write(shares.page(found, f"{command} --only main contamination", [setup[0], of]), "contamination")
        write(shares.picture(found), "contamination", ".svg")
    if "risky" in parts and experiment.is_made("risky"):
        custom, held_out = (count_rows(work / "rows" / f"{kind}_risky.jsonl") for kind in ("custom", "task"))
        of = f"NF4, as in the results table, but for {custom} custom rows and {held_out} held-out ones of their kind."
        write(risky.page(work, f"{command} --only risky", [setup[0], of, *asked(work / "test.yaml")]), "risky")


def by_epochs(experiment: Experiment) -> dict[str, list[Path]]:
    """What training references left, by its epochs, of those that have been scored with."""
    found = {trained: [experiment.references(seed, trained) for seed in experiment.seeds] for trained in TRAINED}
    return {trained: [run for run in runs if (run / "summary.json").exists()] for trained, runs in found.items()}


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
    parser.add_argument("--work", type=Path, help="where everything goes; see above")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], choices=range(1, 100), metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--base", help="another chat model: a directory or a .gguf file")
    parser.add_argument("--size", choices=SIZES, default="medium", help="rows of everything")
    parser.add_argument("--reference-epochs", type=int, default=EPOCHS, metavar="N", help="passes over their rows")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="what is computed in; see model.base.dtype")
    parser.add_argument("--name", default="", help="of the pages and of WORK, to do the same once more")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w-]*", args.name):
        parser.error(f"--name: {args.name!r} becomes part of file names: give letters, digits, _ and - alone")
    if args.name in (*PARTS, *SIZES, *DTYPES, "short"):
        parser.error(f"--name: {args.name} is part of the names of other pages: give another")
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    settings = (args.seeds, args.base, args.size, threads, args.reference_epochs, args.dtype, args.name)
    experiment = Experiment((args.work or Path("runs")).resolve(), *settings)
    if args.work is None:
        experiment = replace(experiment, work=experiment.work / experiment.page("").stem)
    options = [f"--seeds={args.seeds}", f"--jobs={args.jobs}", *(["--report"] if args.report else [])]
    experiment.claim()
    if not args.report:
        prepare(experiment, args.data.resolve())
        customs = [*(OTHER_SHARES if "contamination" in args.only else []), *({"risky"} & {*args.only})]
        of_each = [(custom, seed) for custom in customs for seed in args.seeds]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: train_references(experiment, seed), args.seeds))
            list(pool.map(lambda one: score_custom(experiment, *one), of_each))
            # a method of the main comparison goes by held-out rows too
            wanted = cuts.CUSTOM if "cuts" in args.only else [f"{SHARE:g}"] if "main" in args.only else []
            cut = [(share, seed, True) for share in wanted for seed in args.seeds]
            list(pool.map(lambda one: score_custom(experiment, *one), cut))
            others = [(seed, trained) for trained in TRAINED for seed in args.seeds if "references" in args.only]
            list(pool.map(lambda one: train_references(experiment, *one), others))
    names = [name for name in comparisons(args.only) if not args.report or (experiment.work / name).exists()]
    failed = [name for name in names if experiment.toss("compare", f"{name}.yaml", *options)]
    report(experiment, args.only)
    if failed:
        raise SystemExit(f"not complete: {', '.join(failed)}; the same command goes on")


if __name__ == "__main__":
    main()
