"""What a finished run of the demo shows, as benchmarks/results/demo.md.

toss fit --run_dir runs/demo
python benchmarks/demo.py --run runs/demo
"""

import argparse
import json
from pathlib import Path

from toss_lightning.report.summary import Summary, held_out_lines, plain_words

RESULTS = Path(__file__).parent / "results" / "demo.md"


def main() -> None:
    """Writes the closing table, the sentence, and what the run took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    content = json.loads((parser.parse_args().run / "summary.json").read_text(encoding="utf-8"))
    summary = Summary(content["stages"], content["held_out"], content["selection"])
    lines = [
        "# The demo",
        "",
        *held_out_lines(summary, list(summary.held_out)),
        "",
        plain_words(summary),
        "",
        f"Mean token losses on held-out rows with seed {content['seed']} alone: an illustration. The stages",
        f"took {content['seconds'] / 60:.1f} minutes on {content['threads']} CPU threads; peak memory"
        f" {content['peak_memory_mib'] / 1024:.1f} GiB. Written by `python benchmarks/demo.py`.",
        "",
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
