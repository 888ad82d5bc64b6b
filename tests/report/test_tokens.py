"""Rows token by token: texts that join to what the row says, numbers that stand where the store has them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reported import LABELS, NASTY, save_reported_model, write_labelled
from runs import tiny_fit
from scores_on_disk import add_base, make_scores
from tiny import word_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from toss_lightning.errors import ConfigError
from toss_lightning.report.finished import FinishedRun, read_run
from toss_lightning.report.tokens import Rows, choose_rows, facts_of, pieces, risk_score
from toss_lightning.scores import ScoreWriter, TokenScores
from toss_lightning.selection.base import mask_weights, token_weights

TEXTS = ["a quick look: 中文字 and 😀👍🏽!", "  two spaces\n\tand more  ", "naïve café", "no", "😀😀", "字"]


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2 and its kin: any bytes are tokens, and some pairs of bytes, whole characters or not."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS[:3], trainers.BpeTrainer(vocab_size=264, initial_alphabet=alphabet, show_progress=False)
    )
    return fast(backend)


def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece without bytes: a word begins with a mark for its space, which is lost at a text's beginning."""
    words = ["<unk>", "▁", *(f"▁w{at}" for at in range(9)), *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁quick"]
    backend = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return fast(backend)


def llama() -> PreTrainedTokenizerFast:
    """As Llama 2: marks for spaces, and bytes for what the vocabulary lacks."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz!:"]
    vocabulary = {word: at for at, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(backend)


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# --- what each token says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level, metaspace, llama, word_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_what_the_row_says(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>" if make is word_tokenizer else "<|end|>")
    for row in (ids, [*ids, end], [end, *ids, end, *ids]):
        found = pieces(tokenizer, row)
        assert len(found) == len(row)
        assert "".join(found) == decoded(tokenizer, row)


@pytest.mark.parametrize("make", [byte_level, llama])
def test_a_character_of_several_tokens_stands_at_its_last_one(make: Any) -> None:
    tokenizer = make()
    for character in "字😀é":
        ids = tokenizer.encode(f"go {character} on", add_special_tokens=False)
        found = pieces(tokenizer, ids)
        assert not any("\ufffd" in piece for piece in found)
        assert any(character in piece for piece in found)
    ids = llama().encode("x😀y", add_special_tokens=False)
    assert pieces(llama(), ids)[-6:] == ["x", "", "", "", "😀", "y"]


@pytest.mark.parametrize("make", [byte_level, llama])
def test_a_character_that_was_cut_off_is_still_shown(make: Any) -> None:
    tokenizer = make()
    for size in (1, 2, 3):
        ids = tokenizer.encode("x", add_special_tokens=False) + tokenizer.encode("😀", add_special_tokens=False)[:size]
        assert "".join(pieces(tokenizer, ids)) == decoded(tokenizer, ids)


def test_bytes_that_are_no_character_do_not_swallow_what_follows() -> None:
    tokenizer = byte_level()
    stray = tokenizer.encode("中", add_special_tokens=False)[0]
    letters = tokenizer.encode("xq", add_special_tokens=False)
    found = pieces(tokenizer, [letters[0], stray, *letters])
    assert found[0] == "x"
    assert found[-1] == "q"
    assert "".join(found) == decoded(tokenizer, [letters[0], stray, *letters])


def test_the_sign_for_a_broken_character_may_be_what_a_row_says() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("x\ufffdq", add_special_tokens=False)
    found = pieces(tokenizer, ids)
    assert "".join(found) == "x\ufffdq"
    assert (found[0], len(found)) == ("x", len(ids))


@pytest.mark.parametrize("make", [metaspace, llama])
def test_a_token_keeps_the_space_that_it_begins_with(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer.encode("a quick a", add_special_tokens=False)
    assert decoded(tokenizer, ids[-2:]).strip() == decoded(tokenizer, ids[-2:]), "alone it would lose it"
    assert "".join(pieces(tokenizer, ids)) == "a quick a"


def test_a_long_row_is_not_decoded_from_its_beginning_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, sizes = byte_level(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: sizes.append(len(ids)) or decode(ids, **how))
    pieces(tokenizer, tokenizer.encode("x😀" * 100, add_special_tokens=False))
    assert max(sizes) <= 8


def test_no_tokens_say_nothing() -> None:
    assert pieces(byte_level(), []) == []


# --- the score ------------------------------------------------------------------------------------------------------

UTILITY, DEGRADED, BASE = [[1.0, 2.0], [5.0]], [[0.25, 4.0], [1.0]], [[3.0, 3.5], [0.5]]


def without(path: Path, *columns: str) -> TokenScores:
    """The store without some of its losses."""
    for column in columns:
        (path / f"loss_{column}").rename(path / f"gone_{column}")
    return TokenScores(path)


@pytest.mark.parametrize(
    ("gone", "made_of", "values", "said"),
    [
        ([], ("utility", "degraded"), [0.75, -2, 4], "the utility reference minus that of the degraded reference"),
        (["utility"], ("base", "degraded"), [2.75, -0.5, -0.5], "the base model minus that of the degraded reference"),
    ],
)
def test_the_base_stands_for_a_utility_reference_that_was_not_scored(
    tmp_path: Path, gone: list[str], made_of: tuple[str, str], values: list[float], said: str
) -> None:
    add_base(make_scores(tmp_path, UTILITY, DEGRADED), BASE)
    score = risk_score(without(tmp_path, *gone))
    assert score is not None
    assert score.made_of == made_of
    assert score.values.tolist() == values
    assert score.said == f"token loss of {said}"


@pytest.mark.parametrize("gone", [["utility", "degraded"], ["utility", "base"], ["degraded", "base"], ["degraded"]])
def test_without_a_degraded_reference_and_another_side_there_is_no_score(tmp_path: Path, gone: list[str]) -> None:
    add_base(make_scores(tmp_path, UTILITY, DEGRADED), BASE)
    assert risk_score(without(tmp_path, *gone)) is None


def test_a_store_of_rows_alone_has_no_score(tmp_path: Path) -> None:
    make_scores(tmp_path, UTILITY, DEGRADED)
    assert risk_score(without(tmp_path, "utility", "degraded")) is None


def test_the_score_is_that_of_the_round_in_use(tmp_path: Path) -> None:
    scores = make_scores(tmp_path, UTILITY, DEGRADED, later_rounds=[[[0.0, 0.0], [9.0]]])
    last = risk_score(scores)
    assert last is not None
    assert last.made_of == ("utility", "degraded-1")
    assert last.values.tolist() == [1, 2, -4]
    assert last.said.endswith("minus that of the degraded reference, round 1")
    first = risk_score(TokenScores(tmp_path, 0))
    assert first is not None
    assert (first.made_of, first.values.tolist()) == (("utility", "degraded"), [0.75, -2, 4])


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """TOSS-Pro on rows of two labels and of none."""
    folder = tmp_path_factory.mktemp("run")
    loop = {"rounds": 1, "promote": 3, "epochs": 1}
    tiny_fit(save_reported_model(folder / "model"), write_labelled(folder), folder / "run", loop=loop)
    return read_run(folder / "run")


@pytest.fixture(scope="module")
def rows(run: FinishedRun) -> Rows:
    assert run.scores is not None
    return Rows(run.scores, run.weights, run.tokenizer(), risk_score(run.scores))


def test_numbers_stand_at_the_tokens_that_the_store_has_them_of(run: FinishedRun, rows: Rows) -> None:
    assert run.scores is not None
    assert run.weights is not None
    score = risk_score(run.scores)
    assert score is not None
    flat = {name: run.scores.flat(f"loss_{name}") for name in ("utility", "degraded-1")}
    for at, row_id in enumerate(run.scores.row_ids.tolist()):
        row, positions = rows[row_id], run.scores.lists("response_positions")[at].tolist()
        tokens = [row.tokens[position] for position in positions]
        assert row.response_tokens == len(positions)
        assert [token.ordinal for token in tokens] == [*range(1, len(positions) + 1)]
        for name, values in flat.items():
            assert [(token.losses or {})[name] for token in tokens] == run.scores.per_row(values)[at].tolist()
        assert [token.score for token in tokens] == run.scores.per_row(score.values)[at].tolist()
        assert [token.weight for token in tokens] == run.weights.weights[row_id].tolist()
        assert [token.masked for token in tokens] == (run.weights.weights[row_id] == 0).tolist()
        assert row.masked == (run.weights.weights[row_id] == 0).sum()
        assert row.mean_score == pytest.approx(run.scores.per_row(score.values)[at].mean())


def test_losses_are_of_the_round_that_was_selected_from(rows: Rows) -> None:
    losses = next(token.losses for token in rows[0].tokens if token.losses)
    assert {*losses} == {"utility", "degraded-1"}


def test_prompt_and_template_have_texts_and_no_numbers(run: FinishedRun, rows: Rows) -> None:
    row = rows[0]
    others = [token for token in row.tokens if token.ordinal is None]
    assert len(others) + row.response_tokens == len(row.tokens)
    for token in others:
        assert (token.losses, token.score, token.weight, token.masked) == (None, None, None, False)
    assert "".join(token.text for token in row.tokens).startswith("<|im_start|> user w")
    assert [token.text.strip() for token in row.tokens if token.ordinal] == ["w1", NASTY, "w2", "<|im_end|>"]


def test_a_row_says_what_is_known_of_it(rows: Rows) -> None:
    row = rows[0]
    assert (row.row_id, row.label, row.source, row.left_out) == (0, "harmful", "made <here>", False)
    assert row.mean_score is not None
    mean = f"{row.mean_score:+.2f}".replace("-", "−")
    masked = dataclasses.replace(row, tokens=[dataclasses.replace(token, weight=1.0) for token in row.tokens])
    assert facts_of(masked) == ["harmful", "made <here>", "4 response tokens", f"mean score {mean}"]
    tokens = [dataclasses.replace(token, weight=0.0 if token.ordinal in (1, 2) else None) for token in row.tokens]
    bare = dataclasses.replace(row, label=None, source=None, tokens=tokens, mean_score=None, left_out=True)
    assert facts_of(bare) == ["no label", "2 of 4 response tokens masked", "left out of the batches"]


def test_labels_are_those_of_the_rows(rows: Rows) -> None:
    assert [rows[row_id].label for row_id in range(len(LABELS))] == LABELS


@pytest.mark.parametrize("row_id", [len(LABELS), -1])
def test_a_row_that_is_not_there_is_named(rows: Rows, row_id: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"--row {row_id}: no such row in .*scores, whose row ids go from 0 to {len(LABELS) - 1}"
    ):
        rows[row_id]


def test_without_a_selection_tokens_have_no_weights(run: FinishedRun) -> None:
    assert run.scores is not None
    row = Rows(run.scores, None, run.tokenizer(), risk_score(run.scores))[0]
    assert {token.weight for token in row.tokens} == {None}
    assert not any(token.masked for token in row.tokens)


def test_without_losses_tokens_have_no_score(run: FinishedRun) -> None:
    assert run.scores is not None
    row = Rows(run.scores, run.weights, run.tokenizer(), None)[0]
    assert row.mean_score is None
    assert {token.score for token in row.tokens} == {None}


def test_gaps_between_row_ids_shift_nothing(tmp_path: Path) -> None:
    """Rows that were left out of the set are counted."""
    made = []
    for row_id, size in ((2, 3), (5, 2), (9, 4)):
        ids, positions = np.arange(10, 12 + size, dtype=np.int32), np.arange(2, size + 2, dtype=np.int32)
        facts = {"row_id": row_id, "input_ids": ids, "response_positions": positions, "ids_hash": str(row_id)}
        made.append({**facts, "end_of_turn": np.zeros(size, dtype=bool), "label": None, "source": None})
    writer = ScoreWriter(tmp_path, {})
    writer.begin(made)
    for at, name in enumerate(("utility", "degraded")):
        writer.begin_column(name, "digest", "plan")
        writer.append(name, 0, {row["row_id"]: np.arange(len(row["end_of_turn"])) * (2.0 - at) for row in made})
        writer.end_column(name)
    writer.finish_round(0)
    scores = TokenScores(tmp_path)
    weights = token_weights(scores, np.arange(9) / 10)
    rows = Rows(scores, weights, word_tokenizer(), risk_score(scores))
    row = rows[5]
    assert [token.score for token in row.tokens] == [None, None, 0, 1]
    assert [token.weight for token in row.tokens[2:]] == pytest.approx([0.3, 0.4])
    assert [token.text.strip() for token in row.tokens] == ["w3", "w4", "w5", "w6"]
    with pytest.raises(ConfigError, match=r"--row 3: no such row in .*, whose row ids go from 2 to 9"):
        rows[3]


# --- which rows are worth a look ------------------------------------------------------------------------------------

RISKIEST, LEAST, MOST, RANDOM = (
    "Riskiest, by the mean score of their tokens",
    "Labelled harmful, and masked least",
    "Labelled otherwise, and masked most",
    "Drawn at random",
)


def twenty(path: Path, labels: list[str | None] | None = None) -> TokenScores:
    """Row r has a mean score of r, and the last 10 rows are harmful by default."""
    chosen = ["benign"] * 10 + ["harmful"] * 10 if labels is None else labels
    utility = [[float(at), at + 1.0, at - 1.0] for at in range(20)]
    return make_scores(path, utility, labels=chosen)


@pytest.mark.parametrize("count", [1, 3, 7, 50])
def test_no_heading_has_a_row_twice_or_more_than_asked_for(tmp_path: Path, count: int) -> None:
    scores = twenty(tmp_path)
    weights = mask_weights(scores, np.random.default_rng(0).random(60) < 0.3)
    chosen = choose_rows(scores, weights, risk_score(scores), count)
    assert list(chosen) == [RISKIEST, LEAST, MOST, RANDOM]
    for ids in chosen.values():
        assert 0 < len(ids) == len({*ids}) <= count
        assert {*ids} <= {*range(20)}
    assert chosen[RISKIEST] == [19 - at for at in range(min(count, 20))]


def test_what_stands_below_each_heading(tmp_path: Path) -> None:
    scores = twenty(tmp_path)
    masked = np.zeros(60, dtype=bool)
    masked[[3 * 4, 3 * 6, 3 * 6 + 1]] = True  # benign rows 4 and 6
    masked[3 * 10 :] = True
    masked[[3 * 12, 3 * 15, 3 * 15 + 1]] = False  # harmful rows 12 and 15
    chosen = choose_rows(scores, mask_weights(scores, masked), risk_score(scores), 2)
    assert list(chosen) == [RISKIEST, LEAST, MOST, RANDOM]
    assert chosen[RISKIEST] == [19, 18]
    assert chosen[LEAST] == [15, 12]
    assert chosen[MOST] == [6, 4]
    chosen = choose_rows(scores, mask_weights(scores, masked), risk_score(scores), 5)
    assert chosen[MOST] == [6, 4], "rows that lose nothing are not there"


def test_the_rows_drawn_at_random_are_the_same_each_time(tmp_path: Path) -> None:
    scores = twenty(tmp_path)
    first, again = (choose_rows(scores, None, risk_score(scores), 3) for _ in range(2))
    assert first == again
    assert list(first) == [RISKIEST, RANDOM], "nothing was selected yet"


@pytest.mark.parametrize("labels", [[None] * 20, ["benign"] * 20])
def test_without_harmful_rows_there_are_no_headings_of_labels(tmp_path: Path, labels: list[str | None]) -> None:
    scores = twenty(tmp_path, labels)
    weights = mask_weights(scores, np.arange(60) % 5 == 0)
    assert list(choose_rows(scores, weights, risk_score(scores), 3)) == [RISKIEST, "Masked most", RANDOM]


def test_without_scores_the_rows_that_are_masked_most_come_first(tmp_path: Path) -> None:
    scores = twenty(tmp_path, [None] * 20)
    masked = np.zeros(60, dtype=bool)
    masked[[21, 22, 23, 30]] = True  # all of row 7, and a third of row 10
    chosen = choose_rows(scores, mask_weights(scores, masked), None, 2)
    assert list(chosen) == ["Masked most", RANDOM]
    assert chosen["Masked most"] == [7, 10]
    assert choose_rows(scores, mask_weights(scores, masked), None, 5)["Masked most"] == [7, 10], "others lose nothing"
    nothing = mask_weights(scores, np.zeros(60, dtype=bool))
    assert list(choose_rows(scores, nothing, None, 2)) == [RANDOM]


def test_rows_without_a_label_are_not_labelled_otherwise(tmp_path: Path) -> None:
    scores = twenty(tmp_path, ["harmful"] * 2 + [None] * 9 + ["benign"] * 9)
    weights = mask_weights(scores, np.arange(60) % 3 == 0)
    chosen = choose_rows(scores, weights, risk_score(scores), 4)
    assert chosen[LEAST] == [0, 1]
    assert {*chosen[MOST]} <= {*range(11, 20)}
