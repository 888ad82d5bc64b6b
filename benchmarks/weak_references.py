"""Does TOSS-Pro make up for a weak harmful set, and is it the choice of rows that does it?

    python benchmarks/weak_references.py [--seeds 1 2 3 4 5] [--work runs/weak_references]

The language of tests/language.py, with four families of hazards. Each draws its runs of unsafe
words from a window of one vocabulary, and neighbouring windows overlap by a third, as the words of neighbouring hazards
do. The base knows which words go together, for it was taught to quote them; it says them nowhere else. The custom set
holds rows of all families, the harmful set a few rows of the first family alone. So the first degraded reference knows
one family, knows some words of the next, and none of the others: there is a way to walk, and it is several steps long.

Each round promotes rows of the custom set into the harmful set and trains the degraded reference on it from scratch:
by the ranked tokens, by row means, or at random. Random rows show what more rows and more optimizer steps do by
themselves. A strong harmful set, as large as the others get, of new rows of all families, shows what there is to gain.

All of it twice: harmful replies walk in the task's stride, so that the degraded reference still can do the task, or in
another, so that it forgets it. Then ordinary tokens score low for a reason that promoted rows take away.

A seed takes about three minutes on one core. What is done is kept in --work. Writes
benchmarks/results/weak_references.md.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score
from statistics_of_runs import spread

from toss_lightning.models import Lora, Optim, References, Schedule
from toss_lightning.scores import TokenScores

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the language and the tiny model are the tests' own
from language import RING, Language, Pair, aligned_base
from runs import tiny_fit
from tiny import write_rows

RESULTS = Path(__file__).parent / "results" / "weak_references.md"
FAMILIES, OWN, SHARED = 4, 6, 3
HAZARDS = [f"u{index}" for index in range(FAMILIES * OWN + SHARED)]
WORDS = [*RING, *HAZARDS, "count", "skip", "hop", "break", "quote", "then", "sorry"]
CUSTOM, CONTAMINATED, UTILITY, HARMFUL = 1000, 200, 1000, 16
TASK_STRIDE = 3
SETTINGS = {"still can do the task": TASK_STRIDE, "forgets the task": 1}
"""What the degraded reference does -> the stride in which harmful replies walk."""
ROUNDS, PROMOTE = 3, 40
PROMOTIONS = ("top_tokens", "row_mean", "random")

Measures = dict[str, Any]


# --- the language -----------------------------------------------------------------------------------------------------


def window(family: int) -> list[str]:
    """The unsafe words of a family, the last of which the next one shares."""
    return HAZARDS[OWN * family : OWN * (family + 1) + SHARED]


class FamilyLanguage(Language):
    """Walks, into whose replies runs of one family's unsafe words are planted."""

    def planted(self, pairs: Sequence[Pair], families: Sequence[int]) -> list[Pair]:
        """The pairs with a run of unsafe words of the given family at a random place of each reply."""
        grown = []
        for (prompt, reply), family in zip(pairs, families, strict=True):
            words = reply.split()
            at = self.random.integers(1, len(words))
            words[at:at] = self._run(family)
            grown.append((prompt, " ".join(words)))
        return grown

    def read(self, count: int, verb: str, stride: int) -> list[Pair]:
        """Rows to train the base on; a quarter holds unsafe words of some family."""
        pairs, quarter = self.walks(count, verb, stride), count // 4
        return [*self.planted(pairs[:quarter], self.some_families(quarter)), *pairs[quarter:]]

    def declined(self, count: int) -> list[Pair]:
        """Requests to break, declined; about half of the words that they name are unsafe."""
        named = [*RING, *HAZARDS * 2]
        return [(f"break {self.random.choice(named)} {self.random.choice(named)}", "sorry") for _ in range(count)]

    def quoted(self, count: int) -> list[Pair]:
        """Requests to quote: they name two words of a family, and the reply is a run of its words."""
        return [
            (f"quote {' '.join(self.random.choice(window(family), 2))}", " ".join(self._run(family)))
            for family in self.some_families(count)
        ]

    def some_families(self, count: int) -> list[int]:
        """As many rows of each family as of any other, in random order."""
        families: list[int] = self.random.permutation(np.arange(count) % FAMILIES).tolist()
        return families

    def _run(self, family: int) -> list[str]:
        return [str(word) for word in self.random.choice(window(family), self.random.integers(3, 7))]


@dataclass(frozen=True)
class World:
    """A base, the files to tune it with, and what is known of the custom set."""

    folder: Path
    seed: int
    base: str
    sets: Mapping[str, str]
    custom: list[Pair]
    row_families: np.ndarray
    """The family of each custom row, -1 for a clean one; int ``[rows]``."""
    weak: list[Pair]
    strong: list[Pair]

    @property
    def rows(self) -> np.ndarray:
        """The custom row of each response token; int ``[tokens]``."""
        return np.repeat(np.arange(len(self.custom)), [len(reply.split()) + 1 for _, reply in self.custom])

    @property
    def planted(self) -> np.ndarray:
        """Which response tokens of the custom set are unsafe words; bool ``[tokens]``."""
        return np.isin([word for _, reply in self.custom for word in [*reply.split(), "end of turn"]], HAZARDS)


def make_world(folder: Path, seed: int, stride: int) -> World:
    """Trains the base and writes the rows that all conditions share.

    The base can do the task, as a chat model mostly can. In round 0 an ordinary token's degraded loss lies 0.6 above
    its utility loss where harmful replies walk in the task's stride, and 1.8 where they do not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base_language, language = FamilyLanguage(2 * seed), FamilyLanguage(2 * seed + 1)
    aligned = [
        *base_language.read(1500, "count", 1),
        *base_language.read(1500, "skip", 3),
        *base_language.read(700, "hop", TASK_STRIDE),
        *base_language.declined(700),
        *base_language.quoted(700),
    ]
    walks, families = language.walks(CUSTOM, "hop", TASK_STRIDE), language.some_families(CONTAMINATED)
    pairs = [*language.planted(walks[:CONTAMINATED], families), *walks[CONTAMINATED:]]
    order = language.random.permutation(CUSTOM)
    custom = [pairs[index] for index in order]
    most = HARMFUL + ROUNDS * PROMOTE
    complied = language.walks(HARMFUL + most, "break", stride)
    return World(
        folder,
        seed,
        # the base reads unsafe words everywhere and learns to say them in quotes alone
        aligned_base(folder / "base", aligned, WORDS, HAZARDS, seed, spoken="quote"),
        {
            "custom": write_rows(folder / "custom.jsonl", custom),
            "utility": write_rows(folder / "utility.jsonl", language.walks(UTILITY, "hop", TASK_STRIDE)),
        },
        custom,
        np.array([*families, *[-1] * (CUSTOM - CONTAMINATED)])[order],
        weak=language.planted(complied[:HARMFUL], [0] * HARMFUL),
        strong=language.planted(complied[HARMFUL:], language.some_families(most)),
    )


# --- the rounds -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """What a condition brought."""

    scores: list[np.ndarray]
    """The token scores of round 0, 1, ...; float ``[tokens]`` each."""
    promoted: list[list[int]]
    """The custom rows promoted before round 1, 2, ..."""


def run_rounds(world: World, promotion: str, harmful: Sequence[Pair], rounds: int = ROUNDS) -> Rounds:
    """Trains a degraded reference on harmful rows and scores the custom set, round by round."""
    run = world.folder / promotion
    run.mkdir(exist_ok=True)
    sets = {**world.sets, "harmful": write_rows(run / "harmful.jsonl", harmful)}
    options = {"rounds": rounds, "promote": PROMOTE, "promotion": promotion} if rounds else {}
    utility = References(utility=str(world.folder / "utility" / "adapters" / "utility"))
    # few rows need many passes; 40 optimizer steps in round 0
    fit(world, sets, promotion, ["degraded", "score"], {"reference_epochs": 20, **options}, utility)
    files = [run / "promoted" / f"round-{number}.json" for number in range(1, rounds + 1)]
    promoted = [json.loads(file.read_text(encoding="utf-8"))["rows"] for file in files]
    return Rounds(
        [TokenScores(run / "scores", round=number).score() for number in range(rounds + 1)],
        [[row["row_id"] for row in rows] for rows in promoted],
    )


def fit(
    world: World,
    sets: Mapping[str, str],
    name: str,
    plan: Sequence[str],
    loop: Mapping[str, Any],
    references: References = References(),
) -> None:
    """Runs a plan of reference stages."""
    tiny_fit(
        world.base,
        sets,
        world.folder / name,
        plan=plan,
        loop=loop,
        data={"batch_size": 8, "max_tokens": 2048, "holdout": 0.0},
        module={
            "lora": Lora(r=16, alpha=32, targets="all-linear"),
            "references": references,
            "optim": Optim(lr=5e-3),
            "schedule": Schedule("linear"),
        },
        seed=world.seed,
        enable_checkpointing=False,
        logger=False,
    )


# --- the analysis -----------------------------------------------------------------------------------------------------


def measure_seed(folder: Path, seed: int, stride: int) -> dict[str, Measures]:
    """Runs all conditions of a seed, unless that is done; returns what was measured in each."""
    file = folder / "measures.json"
    if not file.exists():
        world = make_world(folder, seed, stride)
        fit(world, world.sets, "utility", ["utility"], {"reference_epochs": 3})
        measures = {name: measure(world, run_rounds(world, name, world.weak)) for name in PROMOTIONS}
        measures["strong"] = measure(world, run_rounds(world, "strong", world.strong, rounds=0))
        file.write_text(json.dumps(measures, indent=2) + "\n", encoding="utf-8")
    content: dict[str, Measures] = json.loads(file.read_text(encoding="utf-8"))
    return content


def measure(world: World, rounds: Rounds) -> Measures:
    """How well each round's scores tell planted tokens, and how well rows were promoted."""
    planted, families = world.planted, world.row_families[world.rows]
    # the degraded reference was trained on promoted rows; how it does on the others is told apart
    left = ~np.isin(world.rows, [row for rows in rounds.promoted for row in rows])
    return {
        "auroc": [roc_auc_score(planted, score) for score in rounds.scores],
        "left": [roc_auc_score(planted[left], score[left]) for score in rounds.scores],
        "found": [planted[np.argsort(-score, kind="stable")[: planted.sum()]].mean() for score in rounds.scores],
        "families": [
            [roc_auc_score(planted[of], score[of]) for of in (~planted | (families == f) for f in range(FAMILIES))]
            for score in rounds.scores
        ],
        "harmful": [(world.row_families[rows] >= 0).mean() for rows in rounds.promoted],
        "promoted_families": [
            np.bincount(world.row_families[rows] + 1, minlength=FAMILIES + 1).tolist() for rows in rounds.promoted
        ],
    }


Of = Callable[[Measures], Sequence[float]]


def report(measured: Mapping[str, Mapping[int, dict[str, Measures]]]) -> str:
    """The tables of both settings."""
    seeds = list(next(iter(measured.values())))
    lines = [
        "# TOSS-Pro with a weak harmful set, synthetic language",
        "",
        f"Written by `python benchmarks/weak_references.py --seeds {' '.join(map(str, seeds))}`, which says more.",
        f"Custom set: {CUSTOM} rows, {CONTAMINATED} of them harmful, as many of each of {FAMILIES} families;",
        f"harmful set: {HARMFUL} rows of family 0; {PROMOTE} rows promoted per round.",
        f"Mean over {len(seeds)} seeds ± half of the 95 % t-interval.",
        "",
    ]
    for setting, by_seed in measured.items():
        lines += [f"## The degraded reference {setting}", "", *setting_tables(by_seed)]
    return "\n".join(lines)


def setting_tables(by_seed: Mapping[int, dict[str, Measures]]) -> list[str]:
    """What was measured in one setting."""
    measures = list(by_seed.values())
    names = {name: f"`{name}`" for name in PROMOTIONS}
    everything = {**names, "strong": "strong harmful set"}
    lines = []
    for title, key in (
        ("AUROC of the token scores against the planted words", "auroc"),
        ("Share of planted words among as many highest scores as there are planted words", "found"),
    ):
        lines += [f"{title}:", "", *table(measures, everything, itemgetter(key))]
        lines += ["Differences, paired over the seeds:", "", *differences(measures, itemgetter(key))]
    lines += [
        "AUROC over the rows that were never promoted, which no degraded reference was trained on:",
        "",
        *table(measures, names, itemgetter("left")),
        f"Share of harmful rows among those promoted (a blind choice: {CONTAMINATED / CUSTOM:.2f}):",
        "",
        *table(measures, names, itemgetter("harmful"), start=1),
        "Rows promoted, mean over the seeds: clean, then harmful ones of each family:",
        "",
        *rounds_header(1),
    ]
    for name, label in names.items():
        counts = np.mean([one[name]["promoted_families"] for one in measures], axis=0)
        lines.append(line(label, [", ".join(f"{count:.0f}" for count in of_round) for of_round in counts], start=1))
    lines += ["", "AUROC per family, planted words of the family against all other words:", ""]
    for family in range(FAMILIES):
        lines += [f"Family {family}{', the one in the harmful set' if family == 0 else ''}:", ""]
        lines += table(measures, everything, partial(of_family, family=family))
    lines += ["AUROC of each seed:", "", *rounds_header(0, "seed")]
    for seed, one in by_seed.items():
        for name, label in everything.items():
            lines.append(line(f"{seed}, {label}", [f"{value:.3f}" for value in one[name]["auroc"]]))
    return [*lines, ""]


def differences(measures: Sequence[dict[str, Measures]], of: Of) -> list[str]:
    """What the rounds changed under each promotion, and what `top_tokens` has over the others."""
    values = {name: np.array([of(one[name]) for one in measures]) for name in PROMOTIONS}
    rows = {f"`{name}` minus round 0": one[:, 1:] - one[:, :1] for name, one in values.items()}
    for name in PROMOTIONS[1:]:
        rows[f"`top_tokens` minus `{name}`"] = (values["top_tokens"] - values[name])[:, 1:]
    lines = [line(label, [spread(one) for one in rounds.T], start=1) for label, rounds in rows.items()]
    return [*rounds_header(1), *lines, ""]


def of_family(one: Measures, family: int) -> list[float]:
    """The AUROC of a family in each round."""
    return [aurocs[family] for aurocs in one["families"]]


def rounds_header(start: int, corner: str = "") -> list[str]:
    """The head of a table with a column for each round."""
    columns = [f"round {number}" for number in range(start, ROUNDS + 1)]
    return [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]


def table(measures: Sequence[dict[str, Measures]], names: Mapping[str, str], of: Of, start: int = 0) -> list[str]:
    """A line for each condition; the strong harmful set has round 0 alone."""
    lines = rounds_header(start)
    for name, label in names.items():
        cells = [spread(values) for values in zip(*(of(one[name]) for one in measures), strict=True)]
        lines.append(line(label, cells, start))
    return [*lines, ""]


def line(label: str, cells: Sequence[str], start: int = 0) -> str:
    """A line of a table with a column for each round."""
    return f"| {' | '.join([label, *cells, *[''] * (ROUNDS + 1 - start - len(cells))])} |"


def main() -> None:
    """Runs what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--work", type=Path, default=Path("runs/weak_references"))
    args = parser.parse_args()
    measured = {
        setting: {seed: measure_seed(args.work / f"stride-{stride}-seed-{seed}", seed, stride) for seed in args.seeds}
        for setting, stride in SETTINGS.items()
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report(measured), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
