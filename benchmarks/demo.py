"""What finished runs of the demo show, as benchmarks/results/demo.md.

for seed in 1 2 3; do toss fit --run_dir runs/demo-$seed --seed_everything $seed; done
python benchmarks/demo.py runs/demo-1 runs/demo-2 runs/demo-3
"""

import argparse
import json
from pathlib import Path
from typing import Any

from statistics_of_runs import spread

from toss_lightning.report.summary import HINTS, LOSSES, Summary, stage_name

RESULTS = Path(__file__).parent / "results" / "demo.md"


def report(runs: list[dict[str, Any]]) -> str:
    """The closing table of the demo over its seeds, what was masked, and what it took."""
    summary = Summary(runs[0]["stages"], runs[0]["held_out"], runs[0]["selection"])
    lines = [
        "# The demo",
        "",
        f"| | {' | '.join(f'{LOSSES[name]} ({HINTS[name]})' for name in LOSSES)} |",
        "|---|---|---|---|",
    ]
    for stage in summary.held_out:
        cells = [spread([run["held_out"][stage][name] for run in runs], "{:.2f}") for name in LOSSES]
        lines.append(f"| {stage_name(summary, stage)} | {' | '.join(cells)} |")
    harmful = [run["selection"]["masked_share_per_label"]["harmful"] for run in runs]
    hit = spread([100 * one["share_of_masked_tokens"] for one in harmful], "{:.0f}")
    chance = 100 * harmful[0]["tokens"] / summary.selection["tokens"]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    # the evaluation at the end is no stage
    seconds = [sum(of["seconds"] for name, of in run["stages"].items() if name != "test") for run in runs]
    minutes, memory = max(seconds) / 60, max(run["peak_memory_mib"] for run in runs) / 1024
    lines += [
        "",
        f"Mean token losses on held-out rows; mean over seeds {seeds} ± half of the 95 % t-interval. Of the tokens",
        f"that were masked, {hit} % lay in contaminated rows; a blind choice would have hit {chance:.0f} %. Training,",
        f"scoring and selecting took at most {minutes:.1f} minutes on {runs[0]['threads']} CPU threads and",
        f"{memory:.1f} GiB of memory, without loading and without the evaluation that the demo ends with.",
        "Written by `python benchmarks/demo.py RUN ...` from runs of `toss fit --seed_everything SEED`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Reads the runs and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    paths = parser.parse_args().runs
    runs = [json.loads((path / "summary.json").read_text(encoding="utf-8")) for path in paths]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report(runs), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
