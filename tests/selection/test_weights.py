"""TokenWeights on disk: what the select stage leaves behind and the target stage trains with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from kills import killed_everywhere, tree
from scores_on_disk import make_scores

from toss_lightning.errors import StoreError
from toss_lightning.files import restore_directory
from toss_lightning.scores import TokenScores
from toss_lightning.selection import (
    GlobalTopFraction,
    Selection,
    TokenWeights,
    mask_weights,
    row_weights,
    token_weights,
)
from toss_lightning.selection.base import NAMES

MADE_FROM = {"tokenizer": "t", "template": "c", "dataset": "d", "tokens": "x"}


def weights_of(*rows: list[float], made_from: dict[str, str] | None = None) -> TokenWeights:
    weights = {row_id: np.array(row, dtype=np.float32) for row_id, row in enumerate(rows)}
    hashes = {row_id: f"hash {row_id}" for row_id in weights}
    return TokenWeights(weights, hashes, {"masked": 1}, MADE_FROM if made_from is None else made_from)


def test_weights_are_written_with_their_report_and_read_back(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 5.0, 0.0], [2.0, 0.0]])
    chosen = GlobalTopFraction(0.3).select(scores)
    chosen.save(tmp_path / "selection")
    again = TokenWeights.load(tmp_path / "selection")
    assert {row: weight.tolist() for row, weight in again.weights.items()} == {0: [1, 0, 1], 1: [1, 1]}
    assert again.hashes == chosen.hashes
    assert again.report == chosen.report
    assert again.made_from == chosen.made_from == scores.fingerprints
    written = json.loads((tmp_path / "selection/selection.json").read_text())
    assert written == {**chosen.report, "made_from": chosen.made_from}
    again.check(chosen.hashes, tmp_path)
    with pytest.raises(StoreError, match="row 1 has other tokens than the row that was selected from"):
        again.check(chosen.hashes | {1: "other"}, tmp_path)


def test_a_selection_says_what_its_scores_were_made_from(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 0.0]])
    scores.fingerprints = MADE_FROM
    GlobalTopFraction(0.5).select(scores).save(tmp_path / "selection")
    assert json.loads((tmp_path / "selection/selection.json").read_text())["made_from"] == MADE_FROM


def test_the_weights_are_plain_arrow_that_other_tools_read(tmp_path: Path) -> None:
    weights_of([1.0, 0.0], [0.5]).save(tmp_path / "selection")
    table = Dataset.from_file(str(tmp_path / "selection/weights.arrow"))
    others = {"ids_hash": ["hash 0", "hash 1"], "left_out": [False, False]}
    assert table[:] == {"row_id": [0, 1], "weight": [[1.0, 0.0], [0.5]], **others}


def test_rows_that_are_missing_or_new_are_named(tmp_path: Path) -> None:
    weights = weights_of([1.0], [0.0])
    with pytest.raises(StoreError, match="row 1 has other tokens"):
        weights.check({0: "hash 0"}, tmp_path)
    with pytest.raises(StoreError, match="row 2 has other tokens"):
        weights.check({**weights.hashes, 2: "hash 2"}, tmp_path)


def test_weights_that_leave_no_token_to_train_on_are_refused(tmp_path: Path) -> None:
    nothing = weights_of([0.0, 0.0], [0.0])
    with pytest.raises(StoreError, match=r"every token the weight 0, which leaves no token to train on: select again"):
        nothing.check(nothing.hashes, tmp_path)
    replace(nothing, anchor={0: np.float32([0, 1]), 1: np.float32([0])}).check(nothing.hashes, tmp_path)
    weights_of([0.0, 0.0], [1e-9]).check(nothing.hashes, tmp_path)


def test_weights_of_another_program_must_be_one_for_each_token(tmp_path: Path) -> None:
    weights = weights_of([1.0, 0.5], [1.0])
    weights.check(weights.hashes, tmp_path, tokens={0: 2, 1: 1})
    with pytest.raises(StoreError, match="row 1: 1 values of weight for 3 response tokens: give one for each"):
        weights.check(weights.hashes, tmp_path, tokens={0: 2, 1: 3})
    for value in (np.nan, np.inf):
        odd = weights_of([1.0, value], [1.0])
        with pytest.raises(StoreError, match="row 0: a weight is not a finite number: give one for each token"):
            odd.check(odd.hashes, tmp_path)


def test_a_file_without_weights_is_named(tmp_path: Path) -> None:
    weights_of([1.0]).save(tmp_path / "selection")
    with pa.OSFile(str(tmp_path / "selection" / "weights.arrow"), "wb") as sink:
        table = pa.table({"row_id": [0], "ids_hash": ["hash 0"]})
        with pa.ipc.new_stream(sink, table.schema) as file:
            file.write_table(table)
    with pytest.raises(StoreError, match=r"weights.arrow: no column weight: run the select stage again"):
        TokenWeights.load(tmp_path / "selection")


TABLE = {"row_id": [0, 1], "ids_hash": ["hash 0", "hash 1"], "weight": [[1.0], [0.5, 0.0]]}


def foreign(path: Path, columns: dict[str, Any], report: Any = "{}") -> Path:
    """What another program may write as a selection."""
    path.mkdir()
    table = pa.table(columns)
    with pa.OSFile(str(path / "weights.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as file:
        file.write_table(table)
    (path / "selection.json").write_text(report)
    return path


@pytest.mark.parametrize("lost", ["row_id", "ids_hash", "weight"])
def test_a_column_that_another_program_leaves_out(tmp_path: Path, lost: str) -> None:
    path = foreign(tmp_path / "selection", {name: values for name, values in TABLE.items() if name != lost})
    with pytest.raises(StoreError, match=rf"^{path}/weights\.arrow: no column {lost}: run the select stage again$"):
        TokenWeights.load(path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("weight", [["a"], ["b", "c"]], "weight holds no list of numbers for each row: leave it out"),
        ("mine", [["1"], ["2"]], "mine holds no list of numbers for each row: leave it out"),
        ("mine", [[[1.0]], [[2.0]]], "mine holds no list of numbers for each row: leave it out"),
        ("mine", pa.array(["a", "b"]).dictionary_encode(), "mine holds no list of numbers for each row: leave it out"),
        ("row_id", ["a", "b"], "row_id does not hold a whole number for each row: run the select stage again"),
        ("row_id", [0, None], "row_id does not hold a whole number for each row: run the select stage again"),
        ("ids_hash", [1, 2], "ids_hash does not hold a text for each row: run the select stage again"),
        ("left_out", ["no", "no"], "left_out does not hold true or false for each row: run the select stage again"),
    ],
)
def test_a_column_of_another_program_that_holds_something_else(
    tmp_path: Path, name: str, values: Any, message: str
) -> None:
    path = foreign(tmp_path / "selection", TABLE | {name: values})
    with pytest.raises(StoreError, match=rf"^{path}/weights\.arrow: {message}$"):
        TokenWeights.load(path)


@pytest.mark.parametrize("report", ["[]", '"text"', "3", '{"made_from": []}'])
def test_a_report_that_is_none(tmp_path: Path, report: str) -> None:
    path = foreign(tmp_path / "selection", TABLE, report)
    with pytest.raises(StoreError, match=rf"^{path}/selection\.json: not the report of a selection: run the select"):
        TokenWeights.load(path)


def test_a_program_may_say_which_rows_are_left_out(tmp_path: Path) -> None:
    for number, (flags, left_out) in enumerate((([True, None], {0}), ([0, 1], {1}))):
        path = foreign(tmp_path / str(number), TABLE | {"left_out": flags})
        assert TokenWeights.load(path).left_out == left_out


def written(path: Path, *weights: pa.ChunkedArray | pa.Array) -> TokenWeights:
    """A file of another program, a record batch for each of ``weights``, read back."""
    count = sum(map(len, weights))
    weights_of(*([1.0] for _ in range(count))).save(path)
    schema = pa.schema([("row_id", pa.int64()), ("ids_hash", pa.string()), ("weight", weights[0].type)])
    with pa.OSFile(str(path / "weights.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as file:
        first = 0
        for batch in weights:
            rows = range(first, first := first + len(batch))
            file.write_batch(pa.record_batch([pa.array(rows), [f"hash {row}" for row in rows], batch], schema=schema))
    return TokenWeights.load(path)


@pytest.mark.parametrize("of", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.int8())], ids=str)
def test_weights_of_another_program_in_its_own_types_and_batches(tmp_path: Path, of: pa.DataType) -> None:
    batches = [pa.array(rows, of) for rows in ([[7], [1, 0]], [], [[0, 2, 0], [], [3]])]
    again = written(tmp_path / "selection", batches[0][1:], *batches[1:])
    assert plain(again.weights) == {0: [1, 0], 1: [0, 2, 0], 2: [], 3: [3]}
    for values in again.weights.values():
        assert values.dtype == np.float32
        assert values.flags.writeable, "torch warns of arrays that are not"
        assert values.base is None, "a row holds no other rows in memory"


def test_a_column_of_another_program_that_is_of_no_token(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"weights\.arrow: weight holds no list of numbers for each row: leave it out"):
        written(tmp_path / "selection", pa.array([1, 2]))


def test_a_row_for_which_another_program_has_no_weights(tmp_path: Path) -> None:
    again = written(tmp_path / "selection", pa.array([[1.0], None, [0.5, None]], pa.list_(pa.float32())))
    with pytest.raises(StoreError, match="row 1: 0 values of weight for 2 response tokens: give one for each"):
        again.check(again.hashes, tmp_path, tokens={0: 1, 1: 2, 2: 2})
    with pytest.raises(StoreError, match="row 2: a weight is not a finite number: give one for each token"):
        again.check(again.hashes, tmp_path)


def test_what_differs_is_named_where_it_is_known(tmp_path: Path) -> None:
    weights = weights_of([1.0])

    def said(weights: TokenWeights, made_from: dict[str, str] | None) -> str:
        with pytest.raises(StoreError, match=r"use the same data, tokenizer, template and limits") as error:
            weights.check({0: "other"}, Path("runs/x/selection"), made_from)
        assert str(error.value).startswith("runs/x/selection: row 0 has other tokens")
        return str(error.value)

    assert "(another tokenizer, template)" in said(
        weights, {**MADE_FROM, "tokenizer": "other", "template": "other", "tokens": "y"}
    )
    assert "another" not in said(weights, {**MADE_FROM, "tokens": "y"}).partition("selected from")[2]
    assert "another" not in said(weights, None).partition("selected from")[2]
    # a selection of the user's own need not say what it was made from
    assert "another" not in said(weights_of([1.0], made_from={}), MADE_FROM).partition("selected from")[2]


def test_the_same_tokens_from_another_base_are_welcome(tmp_path: Path) -> None:
    weights = weights_of([1.0], made_from={**MADE_FROM, "base": "small"})
    weights.check({0: "hash 0"}, tmp_path, {**MADE_FROM, "base": "large"})


def test_the_digest_is_that_of_the_weights_whatever_else_is_said(tmp_path: Path) -> None:
    weights = weights_of([1.0, 0.0], [0.5])
    weights.save(tmp_path / "selection")
    assert TokenWeights.load(tmp_path / "selection").digest() == weights.digest()
    assert weights_of([1.0, 0.0], [0.5], made_from={}).digest() == weights.digest()
    assert weights_of([1.0, 0.0], [0.4]).digest() != weights.digest()
    assert weights_of([0.0, 1.0], [0.5]).digest() != weights.digest()


# --- anchors and columns ----------------------------------------------------------------------------------------------


def full() -> TokenWeights:
    """Weights with an anchor, and with values for training."""
    anchor = {0: np.float32([0, 2.5]), 1: np.float32([0.125])}
    columns = {
        "loss_base": {0: np.float32([1, 2]), 1: np.float32([3])},
        "excess": {0: np.float32([-1, 0]), 1: np.float32([1e-7])},
    }
    return replace(weights_of([1.0, 0.0], [0.5]), anchor=anchor, columns=columns)


def plain(values: dict[int, np.ndarray]) -> dict[int, list[float]]:
    return {row_id: of_row.tolist() for row_id, of_row in values.items()}


def test_anchors_and_columns_are_written_and_read_back(tmp_path: Path) -> None:
    full().save(tmp_path / "selection")
    again = TokenWeights.load(tmp_path / "selection")
    assert plain(again.weights) == {0: [1, 0], 1: [0.5]}
    assert plain(again.anchor) == plain(full().anchor)
    assert {name: plain(values) for name, values in again.columns.items()} == {
        name: plain(values) for name, values in full().columns.items()
    }
    assert again.values().keys() == {"weight", "anchor", "loss_base", "excess"}
    assert {values[0].dtype for values in again.values().values()} == {np.dtype(np.float32)}
    assert again.digest() == full().digest()
    again.check(full().hashes, tmp_path)
    with pytest.raises(StoreError, match="row 1 has other tokens than the row that was selected from"):
        again.check(full().hashes | {1: "other"}, tmp_path)
    table = Dataset.from_file(str(tmp_path / "selection/weights.arrow"))
    assert table["anchor"][:] == [[0, 2.5], [0.125]]


def test_weights_alone_have_neither(tmp_path: Path) -> None:
    weights_of([1.0, 0.0], [0.5]).save(tmp_path / "selection")
    again = TokenWeights.load(tmp_path / "selection")
    assert (again.anchor, again.columns) == ({}, {})
    assert again.values().keys() == {"weight"}


def test_the_digest_is_that_of_anchors_and_columns_too() -> None:
    one = full()
    other = {0: np.float32([0, 2.5]), 1: np.float32([0.25])}
    digests = {
        weights.digest()
        for weights in (
            one,
            replace(one, anchor={}),
            replace(one, anchor=other),
            replace(one, columns={}),
            replace(one, columns={**one.columns, "excess": other}),
        )
    }
    assert len(digests) == 5
    assert one.digest() == replace(one, columns=dict(reversed(one.columns.items()))).digest()


def test_flat_weights_anchors_and_columns_are_cut_into_rows_and_counted(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 5.0, 0.0], [2.0, 0.0]], labels=["a", "b"])
    chosen = token_weights(
        scores,
        np.array([1, 0, 0.5, 0, 0]),
        np.array([0, 2, 0, 1, 0]),
        {"loss_utility": scores.flat("loss_utility")},
        flavour="mine",
    )
    assert plain(chosen.weights) == {0: [1, 0, 0.5], 1: [0, 0]}
    assert plain(chosen.anchor) == {0: [0, 2, 0], 1: [1, 0]}
    assert plain(chosen.columns["loss_utility"]) == {0: [1, 5, 0], 1: [2, 0]}
    counts = {"tokens": 5, "masked": 3, "kept": 2, "rows": 2, "rows_fully_masked": 1, "anchored": 2, "flavour": "mine"}
    assert counts.items() <= chosen.report.items()
    assert chosen.report["masked_share_per_label"]["a"]["share_of_its_tokens_masked"] == pytest.approx(1 / 3)


def test_labels_and_sources_beyond_the_commonest_are_counted_together(tmp_path: Path) -> None:
    """As where each row's source is the address that it came from: the report goes into every checkpoint."""
    others = [f"of row {row}" for row in range(NAMES + 9)]
    labels = ["harmful", "(12 more)", *others, "common", "common"]
    scores = make_scores(tmp_path / "scores", [[1.0], [1.0] * 9, *([[1.0] * 2] * (len(labels) - 2))], labels=labels)
    weights = np.ones(int(scores.offsets[-1]))
    weights[:20] = 0
    found = token_weights(scores, weights).report["masked_share_per_label"]
    assert len(found) == NAMES + 1
    # what is harmful is named however few tokens it has, and nothing can be mistaken for the others
    assert found["harmful"]["masked"] == 1
    assert found["common"]["tokens"] == 4
    assert found["(12 more)"]["tokens"] == 9 + 2 * 11
    assert sum(one["tokens"] for one in found.values()) == len(weights)
    assert sum(one["masked"] for one in found.values()) == 20
    assert sum(one["share_of_masked_tokens"] for one in found.values()) == pytest.approx(1)
    assert set(token_weights(scores, weights).report["masked_share_per_source"]) == {"made"}


def test_so_many_labels_are_each_counted_by_themselves(tmp_path: Path) -> None:
    labels = [f"{row:02}" for row in range(NAMES)]
    scores = make_scores(tmp_path / "scores", [[1.0]] * NAMES, labels=labels)
    assert list(token_weights(scores, np.ones(NAMES)).report["masked_share_per_label"]) == labels


def test_an_anchor_of_0_everywhere_is_none(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 0.0]])
    chosen = token_weights(scores, np.ones(2), np.zeros(2))
    assert chosen.anchor == {}
    assert chosen.report["anchored"] == 0


def test_weights_of_rows_are_the_same_for_all_of_their_tokens(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 5.0, 0.0], [2.0, 0.0], [1.0]])
    chosen = row_weights(scores, np.array([0.5, 0, 1]))
    assert plain(chosen.weights) == {0: [0.5] * 3, 1: [0, 0], 2: [1]}
    assert (chosen.report["masked"], chosen.report["rows_fully_masked"]) == (2, 1)
    assert (chosen.left_out, chosen.report["rows_left_out"]) == ({1}, 1)


def test_rows_that_are_left_out_are_written_and_read_back_and_count_in_the_digest(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 5.0], [2.0, 0.0]])
    of_rows = row_weights(scores, np.array([1.0, 0.0]))
    of_tokens = token_weights(scores, np.array([1.0, 1.0, 0.0, 0.0]))
    of_rows.save(tmp_path / "selection")
    again = TokenWeights.load(tmp_path / "selection")
    assert again.left_out == {1}
    assert again.digest() == of_rows.digest() != of_tokens.digest()
    assert of_tokens.left_out == frozenset()


# --- others' selections, and damage -----------------------------------------------------------------------------------


def test_a_selection_of_ones_own_needs_no_more_than_weights(tmp_path: Path) -> None:
    class Halves(Selection):
        def select(self, scores: TokenScores) -> TokenWeights:
            return mask_weights(scores, scores.score() > 1, flavour="halves")

    chosen = Halves().select(make_scores(tmp_path / "scores", [[2.0, 0.5], [1.5, 0.0]]))
    assert chosen.flat().tolist() == [0, 1, 0, 1]
    assert chosen.report["flavour"] == "halves"


def test_a_selection_that_is_not_there_or_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no selection to be had"):
        TokenWeights.load(tmp_path)
    for name in ("weights.arrow", "selection.json"):
        for damage in (b"", b"\x00\x80\xff" * 50, b"["):
            path = tmp_path / "selection"
            weights_of([1.0, 0.0]).save(path)
            (path / name).write_bytes(damage)
            with pytest.raises(StoreError, match=rf"had \({name}: .*\): run the select stage again") as error:
                TokenWeights.load(path)
            assert "\n" not in str(error.value)


def test_a_killed_save_leaves_the_old_selection_or_the_new_one(tmp_path: Path) -> None:
    script = """
import numpy as np
from toss_lightning.selection import TokenWeights
TokenWeights({{0: np.array([{0}], dtype=np.float32)}}, {{0: "h"}}).save(path / "selection")
"""
    *killed, done = killed_everywhere(tmp_path / "runs", script.format("0.0"), script.format("1.0"))
    seen = set()
    for path in [*killed, done]:
        restore_directory(path / "selection")
        seen.add(float(TokenWeights.load(path / "selection").flat()[0]))
        assert set(tree(path / "selection")) == {"weights.arrow", "selection.json"}
    assert seen == {0.0, 1.0}
