import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from kills import killed_everywhere, tree
from scores_on_disk import add_base, make_scores

from toss_lightning.data.tokenize import ids_hash
from toss_lightning.errors import StoreError
from toss_lightning.scores import ScoreWriter, TokenScores

FINGERPRINTS = {"base": "b", "dataset": "d", "precision": "p"}
CHUNKS = [[4, 0], [3, 1], [2]]
"""Which rows stand in which chunk; the order is not that of the custom set, as with batches of equal lengths."""
FILES = ["rows.arrow", "loss_utility/00000.arrow"]


def facts(row_id: int) -> dict[str, Any]:
    """Row r has r + 1 response tokens."""
    ids, positions = np.arange(row_id + 4, dtype=np.int32), np.arange(3, row_id + 4, dtype=np.int32)
    return {
        "row_id": row_id,
        "input_ids": ids,
        "response_positions": positions,
        "end_of_turn": np.arange(row_id + 1) == row_id,
        "ids_hash": ids_hash(ids, positions),
        "label": "harmful" if row_id % 2 else None,
        "source": "made",
    }


def losses(column: str, row_ids: Sequence[int]) -> dict[int, np.ndarray]:
    """r + 0.1, r + 1.1, ... under utility; r of the base; 0.5 under degraded, 1.5 in round 1 and so on."""
    if column == "utility":
        return {row: np.arange(row + 1, dtype=np.float32) + row + 0.1 for row in row_ids}
    if column == "base":
        return {row: np.full(row + 1, row, dtype=np.float32) for row in row_ids}
    level = 0.5 + int(column.partition("-")[2] or 0)
    return {row: np.full(row + 1, level, dtype=np.float32) for row in row_ids}


def score(writer: ScoreWriter, column: str, chunks: Sequence[Sequence[int]] = CHUNKS, adapter: str = "a") -> list[int]:
    """What scoring does with a column: only chunks that are not there; returns their numbers."""
    writer.begin_column(column, adapter, "plan")
    pending = writer.pending(column, len(chunks))
    for chunk in pending:
        writer.append(column, chunk, losses(column, chunks[chunk]))
    writer.end_column(column)
    return pending


def make_store(path: Path, columns: Sequence[str] = ("utility", "degraded"), round: int = 0) -> Path:
    writer = ScoreWriter(path, FINGERPRINTS)
    writer.begin([facts(row) for row in sorted(row for chunk in CHUNKS for row in chunk)])
    for column in columns:
        score(writer, column)
    writer.finish_round(round)
    return path


def write_batches(file: Path, *tables: pa.Table) -> None:
    """A stream of several record batches, as Arrow itself cuts what one cannot hold."""
    file.unlink()  # who has mapped the old one keeps it
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, tables[0].schema) as stream:
        for table in tables:
            stream.write_table(table)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_rows_come_back_in_order_whichever_chunk_they_stand_in(tmp_path: Path) -> None:
    scores = TokenScores(make_store(tmp_path / "scores"))
    assert scores.row_ids.tolist() == [0, 1, 2, 3, 4]
    assert scores.offsets.tolist() == [0, 1, 3, 6, 10, 15]
    rows = scores.per_row(scores.flat("loss_utility"))
    assert [len(row) for row in rows] == [1, 2, 3, 4, 5]
    for row_id, row in enumerate(rows):
        np.testing.assert_array_equal(row, losses("utility", [row_id])[row_id])
    assert scores.values("label") == [None, "harmful", None, "harmful", None]
    assert [row.tolist() for row in scores.per_row(scores.flat("end_of_turn"))][2] == [False, False, True]


def test_lists_of_each_row_prompts_included(tmp_path: Path) -> None:
    scores = TokenScores(make_store(tmp_path / "scores"))
    for column in ("input_ids", "response_positions", "end_of_turn"):
        assert [row.tolist() for row in scores.lists(column)] == [facts(row)[column].tolist() for row in range(5)]


def test_score_is_utility_minus_degraded_loss_with_weights(tmp_path: Path) -> None:
    scores = TokenScores(make_store(tmp_path / "scores"))
    np.testing.assert_allclose(scores.score()[1:3], [0.6, 1.6], rtol=1e-6)
    np.testing.assert_allclose(scores.score(2.0, 0.5)[1:3], [1.95, 3.95], rtol=1e-6)
    np.testing.assert_array_equal(scores.combine({"loss_degraded": 3.0}), np.float32(3) * scores.flat("loss_degraded"))


def test_a_sum_of_columns_is_that_of_numpy_to_the_bit_and_takes_little_memory(tmp_path: Path) -> None:
    writer, generator = ScoreWriter(tmp_path / "scores", FINGERPRINTS), np.random.default_rng(0)
    writer.begin([{**facts(0), "response_positions": np.arange(10**6), "end_of_turn": np.zeros(10**6, dtype=bool)}])
    for column in ("base", "utility", "degraded"):
        writer.begin_column(column, "a", "plan")
        writer.append(column, 0, {0: generator.exponential(size=10**6).astype(np.float32)})
        writer.end_column(column)
    scores = TokenScores(tmp_path / "scores")
    weights = {"loss_utility": 1.0, "loss_degraded": -1.0, "loss_base": 0.3}
    columns = [np.float32(weight) * scores.flat(name) for name, weight in weights.items()]
    tracemalloc.start()
    found = scores.combine(weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, np.sum([np.zeros_like(found), *columns], 0))
    assert found.dtype == np.float32
    assert peak < 3 * found.nbytes


def test_losses_that_all_readers_share_cannot_be_written_to(tmp_path: Path) -> None:
    scores = TokenScores(make_store(tmp_path / "scores"))
    with pytest.raises(ValueError, match="read-only"):
        scores.flat("loss_utility")[0] = 1.0


def test_what_nobody_asks_for_stays_on_disk(tmp_path: Path) -> None:
    many = np.arange(10**6, dtype=np.int32)
    row = {**facts(0), "input_ids": many, "response_positions": many, "end_of_turn": many < 0}
    ScoreWriter(tmp_path / "scores", FINGERPRINTS).begin([row])
    before = pa.total_allocated_bytes()
    scores = TokenScores(tmp_path / "scores")
    assert pa.total_allocated_bytes() - before < 10**5
    assert scores.values("input_ids")[0] == many.tolist()


def test_rows_of_any_order_and_in_any_number_of_batches(tmp_path: Path) -> None:
    """Where the offsets of one list array would not hold all tokens, Arrow makes several."""
    path = make_store(tmp_path / "scores")
    wanted = TokenScores(path).flat("loss_utility")
    rows, chunk = (pa.ipc.open_stream((path / name).read_bytes()).read_all() for name in FILES)
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        write_batches(path / FILES[0], rows.take(order[:2]), rows.take(order[2:]))
        write_batches(path / FILES[1], chunk[:1], chunk[:0], chunk[1:])
        scores = TokenScores(path)
        assert scores.row_ids.tolist() == [0, 1, 2, 3, 4]
        assert scores.offsets.tolist() == [0, 1, 3, 6, 10, 15]
        assert np.flatnonzero(scores.flat("end_of_turn")).tolist() == [0, 2, 5, 9, 14]
        np.testing.assert_array_equal(scores.flat("loss_utility"), wanted)


def test_a_column_of_weight_0_may_hold_anything(tmp_path: Path) -> None:
    scores = TokenScores(make_store(tmp_path / "scores"))
    scores._losses["loss_utility"] = np.full_like(scores.flat("loss_utility"), np.inf)
    np.testing.assert_array_equal(scores.score(0.0, 1.0), -scores.flat("loss_degraded"))
    assert not scores.score(0.0, 0.0).any()


def test_the_files_are_plain_arrow_that_other_tools_read(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores")
    rows = Dataset.from_file(str(path / "rows.arrow"))
    assert rows["row_id"][:] == [0, 1, 2, 3, 4]
    schema = rows.data.schema
    assert schema.field("row_id").type == pa.int64()
    assert schema.field("input_ids").type == pa.list_(pa.int32())
    assert schema.field("response_positions").type == pa.list_(pa.int32())
    assert {"end_of_turn", "ids_hash", "label", "source"} <= set(schema.names)
    chunk = Dataset.from_file(str(path / "loss_utility" / "00001.arrow"))
    assert chunk["row_id"][:] == CHUNKS[1]
    assert chunk.data.schema.field("loss").type == pa.list_(pa.float32())


def test_the_manifests_can_be_read_by_people(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores")
    manifest = {"fingerprints": FINGERPRINTS, "rows": 5, "tokens": 15, "round": 0}
    assert json.loads((path / "scores.json").read_text()) == manifest
    assert json.loads((path / "loss_utility" / "column.json").read_text()) == {"adapter": "a", "plan": "plan"}


def test_nothing_but_the_store_lies_in_its_directory(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores")
    assert {file.name for file in path.iterdir()} == {"scores.json", "rows.arrow", "loss_utility", "loss_degraded"}


def test_scores_of_other_data_name_the_row(tmp_path: Path) -> None:
    scores = TokenScores(make_store(tmp_path / "scores"))
    hashes = dict(zip(scores.row_ids.tolist(), scores.values("ids_hash"), strict=True))
    scores.check(hashes)
    without = {row: value for row, value in hashes.items() if row != 1}
    for other in (hashes | {1: "x"}, without, hashes | {7: "new"}):
        with pytest.raises(StoreError, match=r"scores: row [17] is not the one that was scored"):
            scores.check(other)


def test_losses_of_the_base_are_a_column_like_the_others(tmp_path: Path) -> None:
    scores = TokenScores(make_store(tmp_path / "scores", ["base", "utility", "degraded"]))
    assert [row.tolist() for row in scores.per_row(scores.flat("loss_base"))] == [[r] * (r + 1) for r in range(5)]
    assert scores.adapters == dict.fromkeys(["base", "utility", "degraded"], "a")
    made = make_scores(tmp_path / "made", [[1.0, 2.0], [3.0]])
    assert "base" not in made.adapters
    assert add_base(made, [[5.0, 6.0], [7.0]]).flat("loss_base").tolist() == [5, 6, 7]


# --- what whole rows are like -----------------------------------------------------------------------------------------

FEATURES: dict[str, list[Any]] = {
    "text": ["first\nsecond", "", "ünï 火", "a" * 10_000, "w1"],
    "embedding": [np.float32([row, -0.5, 1e-20, row / 3]) for row in range(5)],
    "selector": [0.1, -2.5, 0.0, 1e6, -0.0],
}
"""Kind -> a value for each row of the store."""


@pytest.mark.parametrize("kind", FEATURES)
def test_a_feature_comes_back_as_it_was_filed(tmp_path: Path, kind: str) -> None:
    path, values = make_store(tmp_path / "scores"), FEATURES[kind]
    writer = ScoreWriter(path, FINGERPRINTS)
    assert writer.feature_of(kind, "custom") is None
    writer.write_feature(kind, "custom", range(5), values, "one thing")
    writer.write_feature(kind, "harmful", [7, 3], values[:2], "another")
    assert (writer.feature_of(kind, "custom"), writer.feature_of(kind, "harmful")) == ("one thing", "another")
    found, of_harmful = TokenScores(path).feature(kind), TokenScores(path).feature(kind, "harmful")
    if kind == "text":
        assert (found, of_harmful) == (values, values[:2])
    else:
        assert found.dtype == np.float32
        assert found.shape == ((5, 4) if kind == "embedding" else (5,))
        np.testing.assert_array_equal(found, np.float32(values))
        np.testing.assert_array_equal(of_harmful, np.float32(values[:2]))


@pytest.mark.parametrize("kind", FEATURES)
def test_a_feature_comes_back_from_any_number_of_batches(tmp_path: Path, kind: str) -> None:
    """Where the offsets of one array of strings, or of vectors, would not hold all of them, Arrow makes several."""
    path = make_store(tmp_path / "scores")
    ScoreWriter(path, FINGERPRINTS).write_feature(kind, "custom", range(5), FEATURES[kind], "one thing")
    whole = TokenScores(path).feature(kind)
    file = path / f"feature_{kind}" / "custom.arrow"
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    write_batches(file, table[:2], table[2:])
    found = TokenScores(path).feature(kind)
    assert type(found) is type(whole)
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("kind", FEATURES)
def test_a_feature_that_was_made_from_other_things_is_replaced(tmp_path: Path, kind: str) -> None:
    path, values = make_store(tmp_path / "scores"), FEATURES[kind]
    writer = ScoreWriter(path, FINGERPRINTS)
    writer.write_feature(kind, "custom", range(5), values, "one thing")
    writer.write_feature(kind, "custom", range(5), values[::-1], "another")
    assert writer.feature_of(kind, "custom") == "another"
    found = TokenScores(path).feature(kind)
    np.testing.assert_array_equal(np.array(found), np.array(values[::-1], None if kind == "text" else np.float32))
    assert {file.name for file in (path / f"feature_{kind}").iterdir()} == {"custom.arrow"}


def test_the_features_of_a_store_go_with_it(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores")
    ScoreWriter(path, FINGERPRINTS).write_feature("selector", "custom", range(5), [0.0] * 5, "x")
    ScoreWriter(path, {**FINGERPRINTS, "base": "other"}).begin([facts(0)])
    assert not (path / "feature_selector").exists()


@pytest.mark.parametrize("row_ids", [[0, 1, 2, 3], [0, 1, 2, 3, 5], [1, 0, 2, 3, 4]])
def test_a_feature_of_other_custom_rows_is_refused(tmp_path: Path, row_ids: list[int]) -> None:
    path = make_store(tmp_path / "scores")
    ScoreWriter(path, FINGERPRINTS).write_feature("selector", "custom", row_ids, [0.0] * len(row_ids), "x")
    with pytest.raises(StoreError, match=r"feature_selector/custom.arrow: not of the rows that it should be: delete"):
        TokenScores(path).feature("selector")


def test_a_feature_that_was_never_filed_or_is_damaged(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores")
    with pytest.raises(StoreError, match="scores: no embedding of the harmful set here: score with this selection"):
        TokenScores(path).feature("embedding", "harmful")
    ScoreWriter(path, FINGERPRINTS).write_feature("embedding", "harmful", [0], [[1.0]], "x")
    cut(path / "feature_embedding" / "harmful.arrow")
    with pytest.raises(StoreError, match=r"harmful.arrow: the store is damaged .* delete it and score again"):
        TokenScores(path).feature("embedding", "harmful")


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_each_round_has_degraded_losses_of_its_own(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores", ["utility", "degraded", "degraded-1", "degraded-2"], round=2)
    last = TokenScores(path)
    assert (last.round, last.rounds) == (2, [0, 1, 2])
    for round in last.rounds:
        scores = TokenScores(path, round)
        assert set(scores.flat("loss_degraded").tolist()) == {0.5 + round}
        np.testing.assert_array_equal(scores.score(), scores.flat("loss_utility") - np.float32(0.5 + round))
    np.testing.assert_array_equal(last.flat("loss_degraded"), last.flat("loss_degraded-2"))
    assert last.adapters == dict.fromkeys(["utility", "degraded", "degraded-1", "degraded-2"], "a")


def test_the_last_round_is_the_one_that_was_finished(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores", ["utility", "degraded", "degraded-1"], round=0)
    assert TokenScores(path).round == 0
    ScoreWriter(path, FINGERPRINTS).finish_round(1)
    assert TokenScores(path).round == 1


@pytest.mark.parametrize(("dropped", "last"), [("utility", 0), ("degraded", 0), ("degraded-1", 0), ("degraded-2", 1)])
def test_the_last_round_is_one_that_is_still_there(tmp_path: Path, dropped: str, last: int) -> None:
    path = make_store(tmp_path / "scores", ["utility", "degraded", "degraded-1", "degraded-2"], round=2)
    ScoreWriter(path, FINGERPRINTS).drop(dropped)
    scores = TokenScores(path)
    assert (scores.round, scores.rounds) == (last, list(range(last + (dropped != "degraded"))))


def test_the_losses_of_the_base_belong_to_no_round(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores", ["base", "utility", "degraded", "degraded-1"], round=1)
    ScoreWriter(path, FINGERPRINTS).drop("base")
    assert (TokenScores(path).round, TokenScores(path).rounds) == (1, [0, 1])


def test_a_round_that_was_never_scored(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores", ["utility", "degraded", "degraded-1"])
    for round in (2, -1):
        with pytest.raises(StoreError, match=rf"scores: no scores of round {round} here \(rounds: 0, 1\): score again"):
            TokenScores(path, round)


def test_a_selection_without_a_degraded_reference_needs_no_rounds(tmp_path: Path) -> None:
    scores = TokenScores(make_store(tmp_path / "scores", ["base", "utility"]))
    assert (scores.round, scores.rounds) == (0, [])
    assert scores.adapters == {"base": "a", "utility": "a"}
    assert len(scores.flat("loss_base")) == len(scores.flat("loss_utility")) == 15
    with pytest.raises(StoreError, match="scores: no column loss_degraded here: score with this reference first"):
        scores.score()


def test_made_stores_can_have_rounds(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 2.0]], later_rounds=[[[0.5, 0.5]], [[0.0, 3.0]]])
    assert scores.round == 2
    assert scores.score().tolist() == [1.0, -1.0]
    assert TokenScores(scores.path, 0).score().tolist() == [1.0, 2.0]


# --- going on with what is there --------------------------------------------------------------------------------------


def test_a_column_left_unfinished_is_gone_on_with_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole = tree(make_store(tmp_path / "whole"))
    path = make_store(tmp_path / "scores", ["utility"])
    killed = ScoreWriter(path, FINGERPRINTS)
    killed.begin_column("degraded", "a", "plan")
    killed.append("degraded", 1, losses("degraded", CHUNKS[1]))
    kept = (path / ".loss_degraded.part" / "00001.arrow").stat().st_ino
    with pytest.raises(StoreError, match="no column loss_degraded here: score with this reference first"):
        TokenScores(path).score()

    assert score(ScoreWriter(path, FINGERPRINTS), "degraded") == [0, 2]
    assert tree(path) == whole
    assert (path / "loss_degraded" / "00001.arrow").stat().st_ino == kept, "the chunk was not written again"


def test_what_a_kill_left_half_written_never_reaches_the_finished_column(tmp_path: Path) -> None:
    whole = tree(make_store(tmp_path / "whole"))
    path = make_store(tmp_path / "scores", ["utility"])
    ScoreWriter(path, FINGERPRINTS).begin_column("degraded", "a", "plan")
    (path / ".loss_degraded.part" / ".00000.arrow.123.tmp").write_bytes(b"half a chunk")
    assert score(ScoreWriter(path, FINGERPRINTS), "degraded") == [0, 1, 2]
    assert tree(path) == whole


@pytest.mark.parametrize("other", [("another adapter", "plan"), ("a", "another plan")])
def test_a_column_begun_with_another_adapter_or_plan_is_begun_again(tmp_path: Path, other: tuple[str, str]) -> None:
    whole = tree(make_store(tmp_path / "whole"))
    path = make_store(tmp_path / "scores", ["utility"])
    killed = ScoreWriter(path, FINGERPRINTS)
    killed.begin_column("degraded", *other)
    killed.append("degraded", 0, {0: np.array([99.0], dtype=np.float32)})
    assert score(ScoreWriter(path, FINGERPRINTS), "degraded") == [0, 1, 2]
    assert tree(path) == whole


def test_the_adapter_of_a_column_is_known_once_it_is_complete(tmp_path: Path) -> None:
    writer = ScoreWriter(make_store(tmp_path / "scores", ["utility"]), FINGERPRINTS)
    assert writer.adapter_of("utility") == "a"
    writer.begin_column("degraded", "h", "plan")
    assert writer.adapter_of("degraded") is None
    score(writer, "degraded", adapter="h")
    assert writer.adapter_of("degraded") == "h"


def test_a_column_of_another_adapter_takes_the_place_of_the_old_one_when_it_is_complete(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores")
    writer = ScoreWriter(path, FINGERPRINTS)
    writer.begin_column("utility", "b", "plan")
    assert writer.adapter_of("utility") == "a"
    assert TokenScores(path).adapters["utility"] == "a"
    # a column in fewer chunks than before leaves none of the old ones behind
    assert score(writer, "utility", [[0, 1, 2, 3, 4]], "b") == [0]
    assert TokenScores(path).adapters["utility"] == "b"
    assert len(TokenScores(path).flat("loss_utility")) == 15


def test_a_second_run_learns_which_parts_differ_and_begins_anew(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores", ["utility", "degraded", "degraded-1"], round=1)
    assert ScoreWriter(path, FINGERPRINTS).differences() == []
    assert ScoreWriter(tmp_path / "nothing", FINGERPRINTS).differences() == []
    other = ScoreWriter(path, {"base": "other", "dataset": "d", "limits": "l"})
    assert other.differences() == ["base", "limits", "precision"]
    other.begin([facts(0)])
    assert {file.name for file in path.iterdir()} == {"scores.json", "rows.arrow"}
    assert json.loads((path / "scores.json").read_text())["round"] == 0
    assert other.differences() == []
    # once emptied, no trash stands beside it
    assert [file.name for file in tmp_path.iterdir()] == ["scores"]


def test_a_store_of_the_same_things_keeps_its_columns(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores")
    before = tree(path)
    ScoreWriter(path, FINGERPRINTS).begin([facts(0)])
    assert tree(path) == before


def whole_store_script() -> str:
    """The store of :func:`make_store` in code that needs no test framework."""
    return f"""
import numpy as np
from toss_lightning.scores.writer import ScoreWriter

chunks = {CHUNKS}
rows = [dict(row_id=row, input_ids=[1] * (row + 2), response_positions=list(range(1, row + 2)),
             end_of_turn=[False] * (row + 1), ids_hash=str(row), label=None, source=None) for row in range(5)]
writer = ScoreWriter(path / "scores", {FINGERPRINTS})
writer.begin(rows)
for column in ("utility", "degraded"):
    if writer.adapter_of(column) != "new":
        writer.begin_column(column, "new", "plan")
        for chunk in writer.pending(column, len(chunks)):
            writer.append(column, chunk, {{row: np.full(row + 1, 2.0, dtype=np.float32) for row in chunks[chunk]}})
        writer.end_column(column)
writer.finish_round(0)
"""


@pytest.mark.parametrize("there_was", ["nothing", "other adapters", "other fingerprints"])
def test_killed_anywhere_and_started_again_the_store_is_that_of_an_undisturbed_run(
    tmp_path: Path, there_was: str
) -> None:
    script = whole_store_script()
    before = {
        "nothing": "",
        "other adapters": script.replace('"new"', '"old"').replace("2.0", "1.0"),
        "other fingerprints": script.replace("'precision': 'p'", "'precision': 'q'").replace("2.0", "1.0"),
    }[there_was]
    *killed, done = killed_everywhere(tmp_path / "runs", script, before)
    whole = tree(done / "scores")
    assert len(killed) > 20
    for path in killed:
        exec(script, {"path": path})
        found = tree(path / "scores")
        assert {name: found[name] for name in whole} == whole, path.name
        assert set(TokenScores(path / "scores").flat("loss_degraded").tolist()) == {2.0}
        leftovers = {name for name in found if name not in whole}
        assert not leftovers, f"{path.name}: {leftovers}"


def test_a_kill_never_leaves_a_column_under_its_name_that_is_not_whole(tmp_path: Path) -> None:
    script = whole_store_script()
    before = script.replace('"new"', '"old"').replace("2.0", "1.0")
    for path in killed_everywhere(tmp_path / "runs", script, before):
        for column in ("utility", "degraded"):
            directory = path / "scores" / f"loss_{column}"
            if directory.exists():
                names = {file.name for file in directory.iterdir()}
                assert names == {"column.json", "00000.arrow", "00001.arrow", "00002.arrow"}, path.name


# --- damage -----------------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def garbage(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 4)


def load(path: Path) -> None:
    scores = TokenScores(path)
    scores.score()
    scores.check(dict(zip(scores.row_ids.tolist(), scores.values("ids_hash"), strict=True)))


@pytest.mark.parametrize("damage", [cut, empty, garbage, os.remove], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["scores.json", "rows.arrow", "loss_degraded/00001.arrow", "loss_utility/00000.arrow"])
def test_a_damaged_file_is_one_line_that_names_the_store(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    path = make_store(tmp_path / "scores")
    damage(path / name)
    with pytest.raises(StoreError) as error:
        load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert any(advice in str(error.value) for advice in ("delete it", f"delete {path}", "run the reference and score"))


@pytest.mark.parametrize("damage", [cut, empty, garbage], ids=lambda damage: damage.__name__)
def test_a_column_whose_json_is_damaged(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = make_store(tmp_path / "scores")
    damage(path / "loss_utility" / "column.json")
    with pytest.raises(
        StoreError, match=r"loss_utility/column.json: damaged \(.*delete .*loss_utility and score again"
    ):
        ScoreWriter(path, FINGERPRINTS).adapter_of("utility")


@pytest.mark.parametrize("content", ["[]", "{}", '{"fingerprints": {}, "rows": 5, "tokens": 15}'])
def test_a_json_file_that_says_something_else(tmp_path: Path, content: str) -> None:
    """The last one is what stores looked like before they had rounds."""
    path = make_store(tmp_path / "scores")
    (path / "scores.json").write_text(content)
    with pytest.raises(StoreError, match=r"scores.*score again"):
        TokenScores(path)


def test_rows_that_are_missing_or_stand_twice_are_refused(tmp_path: Path) -> None:
    changes: dict[str, Mapping[str, Any]] = {"rows": {"rows": 6}, "tokens": {"tokens": 14}}
    for name, change in changes.items():
        path = make_store(tmp_path / name)
        edit(path / "scores.json", **change)
        with pytest.raises(StoreError, match="the store does not hold the rows it should: delete it and score again"):
            TokenScores(path)
    path = make_store(tmp_path / "double")
    shutil.copy(path / "loss_utility" / "00001.arrow", path / "loss_utility" / "00003.arrow")
    with pytest.raises(StoreError, match="loss_utility: not the rows that it should hold: delete it"):
        TokenScores(path).score()


def test_losses_of_other_lengths_are_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores", ["degraded"])
    writer = ScoreWriter(path, FINGERPRINTS)
    writer.begin_column("utility", "a", "plan")
    # as many tokens in all, but shifted from one row to another
    sizes = {0: 2, 1: 1, 2: 3, 3: 4, 4: 5}
    writer.append("utility", 0, {row: np.zeros(size, dtype=np.float32) for row, size in sizes.items()})
    writer.end_column("utility")
    with pytest.raises(StoreError, match="not the rows that it should hold"):
        TokenScores(path).score()


def test_no_store_and_no_such_column(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no token scores here: run the reference and score stages first"):
        TokenScores(tmp_path)
    path = make_store(tmp_path / "scores", ["degraded"])
    with pytest.raises(StoreError, match="no column loss_utility here: score with this reference first"):
        TokenScores(path).score()
