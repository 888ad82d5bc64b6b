"""Scoring the custom set: the same losses however it is cut, and nothing scored twice."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import tree
from lightning.pytorch import Trainer
from runs import artifacts, tiny_fit
from transformers import AutoModelForCausalLM, AutoTokenizer

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.models import WeightedLoraModule
from toss_lightning.scores import TokenScores
from toss_lightning.selection import Selection, TokenWeights, token_weights

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


# --- what whole rows are like -----------------------------------------------------------------------------------------


class Plain:
    """The tiny model as a stranger would run it: plain transformers, a row at a time."""

    def __init__(self, path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def ids(self, row: Mapping[str, Any]) -> torch.Tensor:
        text = self.tokenizer.apply_chat_template(row["messages"], tokenize=False)
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])

    @torch.no_grad()
    def embedding(self, row: Mapping[str, Any]) -> np.ndarray:
        """The last hidden state at the row's last token."""
        return self.model(self.ids(row), output_hidden_states=True).hidden_states[-1][0, -1].numpy()

    @torch.no_grad()
    def losses(self, row: Mapping[str, Any]) -> list[float]:
        """Of the reply and the end-of-turn token behind it."""
        ids = self.ids(row)[0]
        log_p = self.model(ids.unsqueeze(0)).logits[0].log_softmax(-1)
        count = len(row["messages"][-1]["content"].split()) + 1
        return [-log_p[at - 1, ids[at]].item() for at in range(len(ids) - count, len(ids))]


@pytest.fixture(scope="module")
def plain(tiny_model: str) -> Plain:
    return Plain(tiny_model)


def rows_of(path: str, places: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Rows of a file, all by default."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return rows if places is None else [rows[place] for place in places]


def text_of(row: Mapping[str, Any]) -> str:
    return "\n".join(message["content"] for message in row["messages"])


def places(trainer: Trainer, name: str) -> list[int]:
    """Which rows of its file a set holds."""
    return [row.row_id for row in trainer.datamodule.sets[name].rows]


class Reads(Selection):
    """Keeps what the store told it."""

    columns = ("base",)
    features: Mapping[str, Sequence[str]] = {"text": ("custom", "utility"), "embedding": ("custom", "harmful")}

    def select(self, scores: TokenScores) -> TokenWeights:
        self._told = {
            (kind, name): scores.feature(kind, name) for kind, names in self.features.items() for name in names
        }
        self._losses = scores.per_row(scores.flat("loss_base"))
        return token_weights(scores, np.ones(int(scores.offsets[-1])))


@pytest.mark.parametrize("before", [(), ("utility", "degraded")])
def test_a_selection_reads_what_plain_transformers_says_of_the_base(
    tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path, plain: Plain, before: tuple[str, ...]
) -> None:
    reads = Reads()
    plan, loop = (*before, "score", "select", "target"), {"epochs": 1, "selection": reads}
    fit = tiny_fit(tiny_model, tiny_sets, tmp_path, plan=plan, loop=loop)
    assert len(places(fit, "utility")) == 9
    assert len(places(fit, "harmful")) == 7, "of both a row is held out"
    for name in ("custom", "utility"):
        assert reads._told["text", name] == [text_of(row) for row in rows_of(tiny_sets[name], places(fit, name))]
    for name in ("custom", "harmful"):
        wanted = [plain.embedding(row) for row in rows_of(tiny_sets[name], places(fit, name))]
        np.testing.assert_allclose(reads._told["embedding", name], np.stack(wanted), rtol=1e-4, atol=1e-5)
    for found, row in zip(reads._losses, rows_of(tiny_sets["custom"]), strict=True):
        np.testing.assert_allclose(found, plain.losses(row), rtol=1e-4, atol=1e-5)
    # references that are at hand are scored too, for another selection
    assert set(TokenScores(tmp_path / "scores").adapters) == {"base", *before}


def test_a_run_that_is_killed_while_it_embeds_ends_as_an_undisturbed_one(
    tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"plan": ("score", "select", "target"), "loop": {"epochs": 1, "selection": Reads()}}
    tiny_fit(tiny_model, tiny_sets, tmp_path / "whole", **options)
    embeddings, calls = WeightedLoraModule.embeddings, 0

    def kill(self: WeightedLoraModule, batch: dict[str, Any]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("killed")
        return embeddings(self, batch)

    with monkeypatch.context() as context:
        context.setattr(WeightedLoraModule, "embeddings", kill)
        with pytest.raises(RuntimeError, match="killed"):
            tiny_fit(tiny_model, tiny_sets, tmp_path / "killed", **options)
    tiny_fit(tiny_model, tiny_sets, tmp_path / "killed", ckpt_path="auto", **options)
    assert artifacts(tmp_path / "killed") == artifacts(tmp_path / "whole")


@pytest.fixture
def file_features(trained: Trainer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Files features into a directory; returns how many batches were embedded."""
    module, datamodule = trained.lightning_module, trained.datamodule
    plain, calls = module.embeddings, []

    def counted(batch: dict[str, Any]) -> torch.Tensor:
        calls.append(len(batch["row_id"]))
        return plain(batch)

    monkeypatch.setattr(module, "embeddings", counted)

    def filed(
        path: Path, features: Mapping[str, Sequence[str]], selector: Sequence[float] | None = None, **settings: int
    ) -> int:
        with monkeypatch.context() as context:
            for name, value in {"max_tokens": 20, "score_every": 2, **settings}.items():
                context.setattr(datamodule, name, value)
            calls.clear()
            datamodule.score(trained, {}, path, features=features, selector=selector)
        return len(calls)

    return filed


def test_embeddings_depend_on_no_batch_and_are_those_of_the_base(
    file_features, trained: Trainer, tiny_sets: dict[str, str], tmp_path: Path, plain: Plain
) -> None:
    """The references and the slot of this module are trained, and none of them has a part in it."""
    wanted = np.stack([plain.embedding(row) for row in rows_of(tiny_sets["utility"], places(trained, "utility"))])
    for max_tokens in (20, 1000):
        file_features(tmp_path / str(max_tokens), {"embedding": ("utility",)}, max_tokens=max_tokens)
        found = TokenScores(tmp_path / str(max_tokens)).feature("embedding", "utility")
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert trained.lightning_module.bank.net.active_adapter == "slot", "the slot is in use again"
    assert all(value.requires_grad for _, value in trained.lightning_module.bank.parameters("slot"))


def test_features_that_are_there_are_used_as_they_are(file_features, tmp_path: Path) -> None:
    features = {"text": ("custom",), "embedding": ("custom", "harmful"), "selector": ("custom",)}
    logits = [row / 8 for row in range(14)]
    assert file_features(tmp_path / "scores", features, logits) > 0
    before = {file: file.stat().st_ino for file in (tmp_path / "scores").rglob("*.arrow")}
    assert len(before) == 5
    assert file_features(tmp_path / "scores", features, logits, max_tokens=1000) == 0
    assert {file: file.stat().st_ino for file in (tmp_path / "scores").rglob("*.arrow")} == before
    assert TokenScores(tmp_path / "scores").feature("selector").tolist() == logits


def test_a_feature_of_other_logits_or_another_set_is_made_again(
    file_features, trained: Trainer, tiny_sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, features = tmp_path / "scores", {"selector": ("custom",), "text": ("utility",), "embedding": ("utility",)}
    assert file_features(path, features, [0.0] * 14) > 0
    assert file_features(path, features, [1.0] * 14) == 0
    assert TokenScores(path).feature("selector").tolist() == [1.0] * 14
    utility = trained.datamodule.sets["utility"]
    fewer = replace(utility, rows=utility.rows[:3], texts=utility.texts[:3])
    monkeypatch.setitem(trained.datamodule.sets, "utility", fewer)
    assert file_features(path, features, [1.0] * 14) > 0
    scores = TokenScores(path)
    assert scores.feature("text", "utility") == utility.texts[:3]
    assert len(scores.feature("embedding", "utility")) == 3


def test_a_feature_that_no_selection_asked_for(file_features, tmp_path: Path) -> None:
    file_features(tmp_path / "scores", {"text": ("custom",)})
    with pytest.raises(StoreError, match="no text of the utility set here: score with this selection first"):
        Reads().select(TokenScores(tmp_path / "scores"))


def test_losses_of_the_base_are_the_same_under_any_adapter(
    scoring, trained: Trainer, tiny_sets: dict[str, str], tmp_path: Path, plain: Plain
) -> None:
    scoring(tmp_path / "scores", {"base": "base", "utility": "utility"})
    scores = TokenScores(tmp_path / "scores")
    for found, row in zip(scores.per_row(scores.flat("loss_base")), rows_of(tiny_sets["custom"]), strict=True):
        np.testing.assert_allclose(found, plain.losses(row), rtol=1e-4, atol=1e-5)
    assert not np.allclose(scores.flat("loss_base"), scores.flat("loss_utility"), atol=1e-2)
