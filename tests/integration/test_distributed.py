"""Two processes, on one node or on two, end where one does, and each goes on with what the other left."""

from pathlib import Path
from typing import Any

import pytest
from ranks import assert_equal, by_lightning, by_torchrun, one_run, promoted

from toss_lightning.scores import TokenScores

KILLS: dict[str, dict[str, Any]] = {
    "training": {"step": 14},  # in the middle of an epoch of the first round
    "scoring": {"column": "degraded-1"},
}


@pytest.fixture(scope="module")
def runs(tiny_model: str, tiny_sets: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one process, on two, on two nodes; killed on one and resumed on two, and the other way round."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, ranks: int, **options: Any) -> dict[str, Any]:
        devices = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
        return {"model": tiny_model, "sets": tiny_sets, "run_dir": str(folder / name), **devices, **options}

    one_run(**run("one", 1))
    for name, kill in KILLS.items():
        one_run(**run(f"one-to-two-{name}", 1, kill=kill))
    by_lightning(
        [
            run("two", 2),
            *(run(f"one-to-two-{name}", 2, resume=True) for name in KILLS),
            *(run(f"two-to-one-{name}", 2, kill=kill) for name, kill in KILLS.items()),
        ],
        folder,
    )
    for name in KILLS:
        one_run(**run(f"two-to-one-{name}", 1, resume=True))
    by_torchrun([run("nodes", 1, num_nodes=2, strategy="ddp")], folder)
    return folder


COPIES = ["two", "nodes", *(f"{way}-{name}" for way in ("one-to-two", "two-to-one") for name in KILLS)]


@pytest.mark.parametrize("name", COPIES)
def test_scores_masks_promoted_rows_and_adapters_are_those_of_one_process(runs: Path, name: str) -> None:
    assert promoted(runs / "one") == promoted(runs / name)
    assert len({row for rows in promoted(runs / "one") for row in rows}) == 4
    assert_equal(runs / "one", runs / name, losses=1e-5, adapters=1e-4)


@pytest.mark.parametrize("name", ["two", "nodes"])
def test_a_chunk_holds_the_same_rows_whatever_the_number_of_processes(runs: Path, name: str) -> None:
    def chunks(run: Path) -> dict[str, list[int]]:
        store = TokenScores(run / "scores")
        files = sorted(run.glob("scores/loss_*/*.arrow"))
        return {str(file.relative_to(run)): store._read(file)["row_id"].to_pylist() for file in files}

    assert chunks(runs / name) == chunks(runs / "one")
    assert len(chunks(runs / "one")) == 4 * 5
