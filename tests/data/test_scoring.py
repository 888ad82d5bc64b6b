"""Scoring the custom set: the same losses however it is cut, and nothing scored twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import tree
from lightning.pytorch import Trainer
from runs import tiny_fit

from toss_lightning.errors import ConfigError
from toss_lightning.scores import TokenScores

BOTH = {"utility": "utility", "degraded": "degraded"}


@pytest.fixture(scope="module")
def trained(tiny_model: str, tiny_sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A Trainer whose module holds two reference adapters."""
    return tiny_fit(tiny_model, tiny_sets, tmp_path_factory.mktemp("trained"), plan=("utility", "degraded"))


@pytest.fixture
def scoring(trained: Trainer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Scores into a directory; returns how many batches went through the model."""
    module, datamodule = trained.lightning_module, trained.datamodule
    plain, calls = module.predict_step, []

    def counted(batch: dict[str, Any], batch_idx: int = 0) -> torch.Tensor:
        calls.append(batch["row_id"].tolist())
        return plain(batch, batch_idx)

    monkeypatch.setattr(module, "predict_step", counted)

    def score(path: Path, columns: dict[str, str] = BOTH, round: int = 0, between: Any = None, **settings: int) -> int:
        with monkeypatch.context() as context:
            for name, value in {"max_tokens": 20, "score_every": 2, **settings}.items():
                context.setattr(datamodule, name, value)
            calls.clear()
            try:
                datamodule.score(trained, columns, path, round, **({"between": between} if between else {}))
            finally:
                score.batches = list(calls)
        return len(calls)

    return score


def losses(path: Path) -> np.ndarray:
    scores = TokenScores(path)
    return np.stack([scores.flat("loss_utility"), scores.flat("loss_degraded")])


def test_losses_are_those_of_each_row_by_itself(scoring, trained: Trainer, tmp_path: Path) -> None:
    scoring(tmp_path / "scores")
    scores, module = TokenScores(tmp_path / "scores"), trained.lightning_module
    module.eval()
    for column in BOTH:
        found = dict(zip(scores.row_ids.tolist(), scores.per_row(scores.flat(f"loss_{column}")), strict=True))
        for row in trained.datamodule.sets["custom"].rows:
            ids = torch.from_numpy(row.input_ids).long()
            with torch.no_grad(), module.using(column):
                log_p = module.bank.model(ids.unsqueeze(0)).logits[0].log_softmax(-1)
            naive = [-log_p[position - 1, ids[position]].item() for position in row.response_positions]
            np.testing.assert_allclose(found[row.row_id], naive, rtol=1e-4, atol=1e-5)
    scores.check(trained.datamodule.sets["custom"].hashes())


def test_scores_do_not_depend_on_how_rows_are_cut_into_batches_and_chunks(scoring, tmp_path: Path) -> None:
    scoring(tmp_path / "scores")
    wanted = losses(tmp_path / "scores")
    for number, settings in enumerate(
        [{"max_tokens": 20, "score_every": 1}, {"max_tokens": 20, "score_every": 100}, {"max_tokens": 1000}]
    ):
        scoring(tmp_path / str(number), **settings)
        found = losses(tmp_path / str(number))
        if "score_every" in settings:
            np.testing.assert_array_equal(found, wanted)  # the same batches, filed otherwise
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_each_row_is_scored_once_with_each_adapter(scoring, trained: Trainer, tmp_path: Path) -> None:
    scoring(tmp_path / "scores", score_every=3)
    rows = [row for batch in scoring.batches for row in batch]
    ids = sorted(row.row_id for row in trained.datamodule.sets["custom"].rows)
    assert sorted(rows) == sorted(ids * 2)


def test_what_is_there_is_used_as_it_is(scoring, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scoring(tmp_path / "scores") > 0
    before = tree(tmp_path)
    # other batches give the same losses, so they are no reason to score again
    assert scoring(tmp_path / "scores", max_tokens=1000, score_every=1) == 0
    assert tree(tmp_path) == before
    assert "used as it is" in capsys.readouterr().out


def test_a_round_scores_with_the_degraded_adapter_alone(scoring, tmp_path: Path) -> None:
    both = scoring(tmp_path / "scores")
    assert scoring(tmp_path / "scores", {"degraded-1": "utility"}, round=1) == both // 2
    scores = TokenScores(tmp_path / "scores")
    assert scores.round == 1
    assert not scores.score().any(), "the degraded adapter of round 1 was the utility adapter"
    assert TokenScores(tmp_path / "scores", 0).score().any()


def test_a_column_of_another_adapter_is_scored_again(
    scoring, trained: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scoring(tmp_path / "scores")
    before = losses(tmp_path / "scores")
    assert scoring(tmp_path / "scores", {"utility": "utility", "degraded": "slot"}) == 0, "the slot is the last stage's"
    bank = trained.lightning_module.bank
    kept = {name: value.detach().clone() for name, value in bank.parameters("slot")}
    with torch.no_grad():
        bank.reset()
        try:
            scoring(tmp_path / "scores", {"utility": "utility", "degraded": "slot"})
        finally:
            for name, value in bank.parameters("slot"):
                value.copy_(kept[name])
    assert "another degraded adapter: scoring again" in capsys.readouterr().out
    after = losses(tmp_path / "scores")
    np.testing.assert_array_equal(after[0], before[0])
    assert (after[1] != before[1]).any()


def test_something_can_be_done_between_two_chunks(scoring, trained: Trainer, tmp_path: Path) -> None:
    seen: list[int] = []
    path = tmp_path / "scores"
    batches = scoring(path, between=lambda: seen.append(len(list(path.rglob("0*.arrow")))), score_every=2)
    # called when a chunk is on disk, and for every chunk; the last ones of a column hold fewer than two batches
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) == 2 * -(-(batches // 2) // 2)
    assert trained.lightning_module.bank.net.active_adapter == "slot", "the slot is in use again"


@pytest.mark.parametrize("after", [1, 2, 4, 5, 7])
def test_interrupted_between_chunks_only_the_missing_ones_are_scored(scoring, tmp_path: Path, after: int) -> None:
    whole = tmp_path / "whole"
    chunks: list[None] = []
    batches = scoring(whole, between=lambda: chunks.append(None), score_every=1)
    assert batches == len(chunks) > after

    done = 0

    def stop() -> None:
        nonlocal done
        done += 1
        if done == after:
            raise KeyboardInterrupt

    path = tmp_path / "scores"
    with pytest.raises(KeyboardInterrupt):
        scoring(path, between=stop, score_every=1)
    first = scoring.batches
    assert len(first) == after
    assert scoring(path, score_every=1) == batches - after
    assert tree(path) == tree(whole)


def test_a_column_begun_in_other_batches_is_begun_again(scoring, tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    path = tmp_path / "scores"
    with pytest.raises(KeyboardInterrupt):
        scoring(path, between=stop, score_every=1)
    scoring(tmp_path / "whole", score_every=2)
    scoring(path, score_every=2)
    assert tree(path) == tree(tmp_path / "whole")


def test_a_row_that_no_batch_holds(scoring, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.max_tokens: 5 holds no row of \d+ tokens"):
        scoring(tmp_path / "scores", max_tokens=5)
