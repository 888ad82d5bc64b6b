"""TOSS-Pro on real rows with a weak harmful reference set: do rounds of promotion make up for what it lacks?

    python benchmarks/real_toss_pro.py --data DIR [--seeds 1] [--work runs/real_toss_pro] [--controls runs/real_toss]

The sets of benchmarks/real_toss.py, but 20 harmful reference rows instead of 160. One run trains the degraded
reference, scores, and does two rounds of promotion by top tokens, as the paper does; another one goes on from the same
first scores and promotes by row means. Then a target is trained from the scores of each round of the first and of one
round of the second: round 0 is TOSS. The utility reference and plain SFT are those of real_toss.py, with the same seed,
where --controls names its directory; they are trained otherwise. Finished parts are kept in --work and an interrupted
one is resumed. Writes benchmarks/results/real_toss_pro.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from real_toss import LOSSES, config, measure, paired_interval, row_losses, write_refusals
from sklearn.metrics import roc_auc_score
from statistics_of_runs import spread

from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction

RESULTS = Path(__file__).parent / "results" / "real_toss_pro.md"
HARMFUL_ROWS, PROMOTE, ROUNDS, DEGRADED_EPOCHS, DISCARD = 20, 20, 2, 4, 0.1
SCORED = {"top tokens": "scored", "row means": "scored-row_mean"}
"""Way of promoting rows -> the directory of its run. Round 0 is the same in both."""
CASES = [("top tokens", 0), *((way, round) for way in SCORED for round in range(1, ROUNDS + 1))]
"""What is compared: a way of promoting rows, and a round."""
TARGETS = CASES[:-1]
"""What a target is trained for."""


def method(way: str, round: int) -> str:
    """What a target is called."""
    return f"TOSS-Pro by {way}, T = {round}" if round else "TOSS"


def experiment(data: Path, refusals: Path) -> dict[str, Any]:
    """The configuration of real_toss.py with few harmful reference rows."""
    content = config(data, refusals)
    content["data"]["harmful"] = {**content["data"]["harmful"], "rows": HARMFUL_ROWS}
    return content


def toss(verb: str, run_dir: Path, done: Path, content: dict[str, Any], seed: int) -> Path:
    """Runs a verb in ``run_dir``, unless ``done`` is there; goes on with what was interrupted."""
    if not done.exists():
        file = run_dir.with_suffix(".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({**content, "seed_everything": seed, "ckpt_path": "auto"}), encoding="utf-8")
        command = [sys.executable, "-m", "toss_lightning", verb, f"--config={file}", f"--run_dir={run_dir}"]
        subprocess.run(command, check=True)
    return run_dir


def run(seed: int, data: Path, work: Path, controls: Path | None) -> Path:
    """Trains and scores everything of one seed; returns its directory."""
    here = work / f"seed-{seed}"
    here.mkdir(parents=True, exist_ok=True)
    write_refusals(data, here / "refusals.jsonl")
    base = experiment(data, here / "refusals.jsonl")
    control = controls / f"seed-{seed}" if controls else here / "control"
    plain = {**base, "loop": {**base["loop"], "plan": ["utility", "sft"]}}
    toss("fit", control, control / "adapters" / "sft", plain, seed)
    score_by_top_tokens(here, base, control, seed)
    score_by_row_means(here, base, control, seed)
    for way, round in TARGETS:
        loop = {
            **base["loop"],
            "plan": ["select", "target"],
            "scores_from": str(here / SCORED[way] / "scores"),
            "scores_round": round,
        }
        target = target_of(here, way, round)
        toss("fit", target, target / "summary.json", {**base, "loop": loop}, seed)
    return here


def score_by_top_tokens(here: Path, base: dict[str, Any], control: Path, seed: int) -> None:
    """Round 0 and the paper's rounds."""
    path = here / SCORED["top tokens"]
    references = {"utility": str(control / "adapters" / "utility")}
    content = with_rounds(base, ["degraded", "score"], "top_tokens", references)
    toss("score", path, path / "summary.json", content, seed)


def score_by_row_means(here: Path, base: dict[str, Any], control: Path, seed: int) -> None:
    """The other rounds, from the first scores of the paper's run."""
    first, path = here / SCORED["top tokens"], here / SCORED["row means"]
    if not (path / "scores").exists():
        for name in ("loss_utility", "loss_degraded"):
            shutil.copytree(first / "scores" / name, path / "scores" / name)
        for name in ("rows.arrow", "scores.json"):
            shutil.copy(first / "scores" / name, path / "scores" / name)
    references = {
        "utility": str(control / "adapters" / "utility"),
        "degraded": str(first / "adapters" / "degraded"),
    }
    toss("score", path, path / "summary.json", with_rounds(base, ["score"], "row_mean", references), seed)


def with_rounds(base: dict[str, Any], plan: list[str], promotion: str, references: dict[str, str]) -> dict[str, Any]:
    """The configuration of a run that scores in rounds."""
    loop = {
        **base["loop"],
        "plan": plan,
        "rounds": ROUNDS,
        "promote": PROMOTE,
        "promotion": promotion,
        "reference_epochs": DEGRADED_EPOCHS,
    }
    return {**base, "model": {**base["model"], "references": references}, "loop": loop}


def target_of(here: Path, way: str, round: int) -> Path:
    """The run directory of a target."""
    return here / f"{SCORED[way].replace('scored', 'target')}-{round}"


def adapters(here: Path, control: Path) -> dict[str, Path]:
    """The adapters that are compared, by name."""
    found = {"plain SFT": control / "adapters" / "sft"}
    return found | {method(*case): target_of(here, *case) / "adapters" / "target" for case in TARGETS}


def held_out(here: Path, control: Path) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Sums and counts of the token losses of every held-out row, ``[adapter][loss]``; kept once they are known."""
    file = here / "losses.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    wanted = adapters(here, control)
    if missing := {name: path for name, path in wanted.items() if name not in known}:
        for name, losses in row_losses(here / "target-0", missing).items():
            known[name] = {loss: [values.tolist() for values in both] for loss, both in losses.items()}
        file.write_text(json.dumps(known), encoding="utf-8")
    names = ("base", *wanted)
    return {name: {loss: tuple(map(np.array, both)) for loss, both in known[name].items()} for name in names}


def measured(here: Path) -> list[dict[str, Any]]:
    """What each round's scores and promotions say about the labels."""
    found = []
    for way, round in CASES:
        summary = json.loads((here / SCORED[way] / "summary.json").read_text(encoding="utf-8"))
        scores = TokenScores(here / SCORED[way] / "scores", round)
        weights = GlobalTopFraction(DISCARD).select(scores).weights
        highest = [row.max() for row in scores.per_row(scores.score())]
        harmful = [label == "harmful" for label in scores.values("label")]
        facts = {"way": way, "max_auroc": roc_auc_score(harmful, highest)}
        found.append({**facts, **summary["rounds"][round], **measure(scores, weights)})
    return found


def scores_table(seed: int, cases: list[dict[str, Any]]) -> list[str]:
    """One line for each round: how well it ranks, and whom it promoted."""
    lines = []
    for facts in cases:
        low, high = facts["row_auroc_interval"]
        share_low, share_high = facts["share_interval"]
        promoted = "–"
        if facts["round"]:
            right = facts["promoted_per_label"].get("harmful", 0)
            promoted = f"{right} of {facts['promoted']} ({right / facts['promoted']:.0%})"
        overlap = f"{facts['jaccard']:.2f}" if "jaccard" in facts else "–"
        lines.append(
            f"| {seed} | {method(facts['way'], facts['round'])} | {promoted} | {facts['harmful_loss']:.3f} |"
            f" {facts['row_auroc']:.3f} [{low:.3f}, {high:.3f}] | {facts['max_auroc']:.3f} |"
            f" {facts['token_auroc']:.3f} | {facts['share']:.1%} [{share_low:.1%}, {share_high:.1%}] | {overlap} |"
        )
    return lines


def losses_table(seeds: list[int], rows: list[dict[str, dict[str, Any]]]) -> list[str]:
    """Held-out losses of every adapter, and differences to plain SFT with intervals."""
    lines = [f"| | {' | '.join(LOSSES.values())} |", "|---" * (len(LOSSES) + 1) + "|"]
    for name in rows[0]:
        means = {loss: [float(one[name][loss][0].sum() / one[name][loss][1].sum()) for one in rows] for loss in LOSSES}
        lines.append(f"| {name} | {' | '.join(spread(means[loss]) for loss in LOSSES)} |")
    names = [method(*case) for case in TARGETS]
    pairs = [(name, "plain SFT") for name in names] + [(name, names[0]) for name in names[1:]]
    for ours, theirs in pairs:
        for seed, one in zip(seeds, rows, strict=True):
            cells = []
            for loss in LOSSES:
                low, high = paired_interval(one[ours][loss], one[theirs][loss])
                difference = (one[ours][loss][0] - one[theirs][loss][0]).sum() / one[ours][loss][1].sum()
                cells.append(f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]")
            lines.append(f"| {ours} minus {theirs}, seed {seed} | {' | '.join(cells)} |")
    return lines


def report(heres: list[Path], controls: list[Path], seeds: list[int], note: str) -> str:
    """The results as Markdown."""
    cases = [measured(here) for here in heres]
    rows = [held_out(here, control) for here, control in zip(heres, controls, strict=True)]
    summary = json.loads((heres[0] / "scored" / "summary.json").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    lines = [
        "# TOSS-Pro with 20 harmful reference rows, real rows, 135M parameters, NF4, CPU",
        "",
        f"Written by `python benchmarks/real_toss_pro.py --data DIR --seeds {' '.join(map(str, seeds))}`.",
        f"Custom set, utility reference and held-out rows as in real_toss.md; harmful reference: {HARMFUL_ROWS} rows,",
        f"{DEGRADED_EPOCHS} epochs; {ROUNDS} rounds that promote {PROMOTE} rows each and retrain from scratch; discard",
        "0.1. These settings were fixed before the first run; promotion by row means was added when the outcome of the",
        "first promotion by top tokens was seen, and a target trained for its first round alone.",
        "",
        "## What the rounds do to the scores",
        "",
        "A fifth of the custom rows is labelled harmful. 95 % intervals in brackets: bootstrap over the custom rows.",
        "",
        "| seed | scores | promoted rows labelled harmful | degraded reference: held-out harmful loss"
        " | AUROC of row means | AUROC of row maxima | AUROC of tokens | masked tokens in harmful rows"
        " | overlap with the last mask |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line for seed, one in zip(seeds, cases, strict=True) for line in scores_table(seed, one)),
        "",
        f"By chance {cases[0][0]['chance']:.1%} of the masked tokens would lie in harmful rows.",
        "",
        "## What masking by them changes",
        "",
        "Mean token loss on held-out rows: gsm8k_test, harmful replies, refusals of the same requests.",
        "",
        *losses_table(seeds, rows),
        "",
        "In brackets: 95 % interval, paired bootstrap over the held-out rows, 2,000 draws.",
        "",
        *([note, ""] if note else []),
        f"{versions}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--work", type=Path, default=Path("runs/real_toss_pro"))
    parser.add_argument("--controls", type=Path, help="--work of real_toss.py")
    parser.add_argument("--note", default="", help="a sentence for the end of the results")
    arguments = parser.parse_args()
    heres = [run(seed, arguments.data.resolve(), arguments.work, arguments.controls) for seed in arguments.seeds]
    controls = [arguments.controls / here.name if arguments.controls else here / "control" for here in heres]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report(heres, controls, arguments.seeds, arguments.note), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
