"""The runs of a comparison: which are done, and what does the others; importing this loads no torch."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from toss_lightning.cli_args import ALONE
from toss_lightning.compare.comparison import Comparison, MethodSpec
from toss_lightning.compare.settings import Flat, find_plan, fingerprint, flatten
from toss_lightning.config_files import read_config
from toss_lightning.errors import ConfigError
from toss_lightning.files import digest_of_file, write_json

State = Literal["done", "unjudged", "test", "resume", "new", "stale", "foreign"]
SAYS: dict[State, str] = {
    "done": "done",
    "unjudged": "evaluated, but for judges that failed, which try again",
    "test": "trained; to be evaluated with the settings of now",
    "resume": "begun; goes on from its checkpoint",
    "new": "to run",
    "stale": "made from other settings; is moved to earlier/ and run again",
    "foreign": "finished, but not started by this comparison: move it away, and it is run anew",
}
Part = Literal["training", "evaluation", "unjudged"]
"""Of what lies in a run's directory; ``unjudged`` is an evaluation some of whose judges failed."""
MADE_FROM = "made_from.json"
SEED = "{seed}"
"""Stands for a run's seed in values of ``set``."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    method: str
    seed: int
    directory: Path
    log: Path
    made_from: Mapping[str, str]
    """What it is trained from, and what it is asked."""
    arguments: tuple[str, ...] = field(repr=False)
    """Of the verbs fit and test alike."""

    @property
    def title(self) -> str:
        """What lines call it."""
        return f"{self.method}, seed {self.seed}"

    @property
    def evaluation(self) -> Path:
        """The numbers that it leaves behind."""
        return self.directory / "evaluation" / "evaluation.json"

    @property
    def summary(self) -> Path:
        """What happened while it trained."""
        return self.directory / "summary.json"

    def state(self) -> State:
        """What is left to do."""
        if not self.directory.exists():
            return "new"
        theirs = self._filed()
        if theirs.get("training") != self.made_from["training"]:
            is_foreign = self.summary.exists() and not (self.directory / MADE_FROM).exists()
            return "foreign" if is_foreign else "stale"
        if not self.summary.exists():
            return "resume"
        if not self.evaluation.exists() or theirs.get("result") != self.result():
            return "test"
        now = self.made_from["evaluation"]
        return "done" if theirs.get("evaluation") == now else "unjudged" if theirs.get("unjudged") == now else "test"

    @property
    def is_measured(self) -> bool:
        """Its numbers are those of the settings of now, be it without those of judges that failed."""
        return self.state() in ("done", "unjudged")

    @property
    def failed_judges(self) -> dict[str, str]:
        """Judge that could not judge -> why, as the evaluation says."""
        try:
            content = json.loads(self.evaluation.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return dict(content.get("failed_judges", {})) if isinstance(content, dict) else {}

    @property
    def has_foreign_answers(self) -> bool:
        """It was last begun with other questions than those of now, and may have answered them."""
        return self._filed().get("asked") != self.made_from["evaluation"]

    def result(self) -> str | None:
        """Tells the numbers of the comparison from those that a ``toss test`` of the same directory leaves."""
        return digest_of_file(self.evaluation) if self.evaluation.exists() else None

    def _filed(self) -> dict[str, Any]:
        try:
            content = json.loads((self.directory / MADE_FROM).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def file(self, *parts: Part) -> None:
        """Notes what is in the directory from now on, and nothing else: of no part, that its origin is unknown."""
        found: dict[str, str | None] = {}
        for part in parts:
            found[part] = self.made_from["training" if part == "training" else "evaluation"]
        if parts:
            found["asked"] = self.made_from["evaluation"]
        if {*parts} - {"training"}:
            found["result"] = self.result()
        write_json(self.directory / MADE_FROM, found)

    def command(self) -> list[str]:
        """What does what is left to do."""
        # settings that the run was evaluated with before, and that no file names any more, must not lie beneath
        verb, further = ("test", [ALONE]) if self.state() in ("test", "unjudged") else ("fit", ["--ckpt_path=auto"])
        return [sys.executable, "-m", "toss_lightning", verb, *self.arguments, *further]


def overlays(comparison: Comparison, method: MethodSpec) -> list[Flat]:
    """A method's settings, the later ones winning."""
    files = (*comparison.configs, *method.configs, *comparison.evaluation)
    contents: list[Mapping[str, Any]] = [read_config(path) for path in files]
    return [flatten(content) for content in (*contents, comparison.set, method.set)]


def of_seed(value: Any, seed: int) -> Any:
    """A value of ``set`` with the seed of a run in place of every ``{seed}``, as in the path of scores of its own."""
    if isinstance(value, str):
        return value.replace(SEED, str(seed))
    if isinstance(value, list):
        return [of_seed(one, seed) for one in value]
    return {key: of_seed(one, seed) for key, one in value.items()} if isinstance(value, dict) else value


def list_runs(comparison: Comparison) -> list[Run]:
    """Every run, the first seed of all methods first.

    Raises:
        ConfigError: a method's plan trains no target, or a file that a setting names cannot be read.
    """
    settings = {one.name: overlays(comparison, one) for one in comparison.methods}
    return [_run(comparison, one, settings[one.name], seed) for seed in comparison.seeds for one in comparison.methods]


def _run(comparison: Comparison, method: MethodSpec, settings: list[Flat], seed: int) -> Run:
    home, plan = comparison.run_dir, find_plan(settings, method.name)
    directory = home / method.slug / f"seed-{seed}"
    arguments = (
        *(f"--config={path}" for path in (*comparison.configs, *method.configs, *comparison.evaluation)),
        *(f"--{key}={_as_option(of_seed(value, seed))}" for key, value in {**comparison.set, **method.set}.items()),
        f"--loop.plan=[{', '.join(plan)}]",
        "--loop.evaluation.adapters=[base, target]",
        f"--loop.evaluation.cache={home / 'cache'}",
        f"--seed_everything={seed}",
        f"--run_dir={directory}",
    )
    log = home / "logs" / f"{method.slug}-seed-{seed}.txt"
    made_from = fingerprint(of_seed(settings, seed), plan, seed)
    return Run(method.name, seed, directory, log, made_from, arguments)


def as_of_now(comparison: Comparison, run: Run) -> Run | None:
    """A run as the files that it was listed from have it now; None where one of its own cannot be read."""
    method = next(one for one in comparison.methods if one.name == run.method)
    try:
        return _run(comparison, method, overlays(comparison, method), run.seed)
    except ConfigError:
        return None


def _as_option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def environment(comparison: Comparison, slot: int) -> dict[str, str]:
    """What is set for the run in one of the places for runs at once."""
    found = {name: str(comparison.threads) for name in THREADS}
    if comparison.gpus:
        found["CUDA_VISIBLE_DEVICES"] = comparison.gpus[slot % len(comparison.gpus)]
    return found


def show_runs(comparison: Comparison, runs: Sequence[Run]) -> None:
    """Prints what would be run."""
    for number, run in enumerate(runs):
        state = run.state()
        print(f"{run.title}: {SAYS[state]}")
        if state != "done":
            settings = [f"{name}={value}" for name, value in environment(comparison, number % comparison.jobs).items()]
            print(f"  {shlex.join([*settings, *run.command()])}")
