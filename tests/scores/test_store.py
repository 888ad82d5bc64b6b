import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from toss_lightning.data.tokenize import ids_hash
from toss_lightning.errors import StoreError
from toss_lightning.scores.store import ScoreWriter, TokenScores, write_manifest

FINGERPRINTS = {"base": "b", "dataset": "d", "utility adapter": "u", "degraded adapter": "h"}


def columns(row_ids: list[int]) -> dict[str, list]:
    """Row r has r + 1 response tokens with losses r + 0.1, r + 1.1, ... under utility and 0.5 under degraded."""
    ids = [np.arange(row + 4, dtype=np.int32) for row in row_ids]
    positions = [np.arange(3, row + 4, dtype=np.int32) for row in row_ids]
    return {
        "row_id": row_ids,
        "input_ids": ids,
        "response_positions": positions,
        "end_of_turn": [np.arange(row + 1) == row for row in row_ids],
        "ids_hash": [ids_hash(*pair) for pair in zip(ids, positions, strict=True)],
        "label": ["harmful" if row % 2 else None for row in row_ids],
        "source": ["made"] * len(row_ids),
        "loss_utility": [np.arange(row + 1, dtype=np.float32) + row + 0.1 for row in row_ids],
        "loss_degraded": [np.full(row + 1, 0.5, dtype=np.float32) for row in row_ids],
    }


def make_store(path: Path, shards: list[list[int]], rows: int | None = None) -> Path:
    path.mkdir()
    for rank, row_ids in enumerate(shards):
        with ScoreWriter(path, rank, len(shards)) as writer:
            for row_id in row_ids:
                writer.append(columns([row_id]))
    every = [row for shard in shards for row in shard]
    write_manifest(path, FINGERPRINTS, rows or len(every), sum(row + 1 for row in every))
    return path


def test_rows_come_back_in_order_whoever_wrote_them(tmp_path: Path) -> None:
    scores = TokenScores(make_store(tmp_path / "scores", [[4, 0, 2], [3, 1]]))
    assert scores.row_ids.tolist() == [0, 1, 2, 3, 4]
    assert [len(row) for row in scores.per_row(scores.flat("loss_utility"))] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(scores.flat("loss_utility")[:3], [0.1, 1.1, 2.1], rtol=1e-6)
    assert scores.values("label") == [None, "harmful", None, "harmful", None]


def test_score_is_utility_minus_degraded_loss_with_weights(tmp_path: Path) -> None:
    scores = TokenScores(make_store(tmp_path / "scores", [[1]]))
    np.testing.assert_allclose(scores.score(), [0.6, 1.6], rtol=1e-6)
    np.testing.assert_allclose(scores.score(2.0, 0.5), [1.95, 3.95], rtol=1e-6)


def test_the_files_are_plain_arrow_with_the_promised_columns(tmp_path: Path) -> None:
    make_store(tmp_path / "scores", [[0, 1]])
    schema = Dataset.from_file(str(tmp_path / "scores/scores-00000-of-00001.arrow")).data.schema
    assert schema.field("row_id").type == pa.int64()
    assert schema.field("input_ids").type == pa.list_(pa.int32())
    assert schema.field("response_positions").type == pa.list_(pa.int32())
    assert schema.field("loss_utility").type == schema.field("loss_degraded").type == pa.list_(pa.float32())
    assert {"ids_hash", "label", "source"} <= set(schema.names)


def test_a_second_run_learns_which_part_differs(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores", [[0]])
    assert TokenScores.differences(path, FINGERPRINTS) == []
    assert TokenScores.differences(path, FINGERPRINTS | {"utility adapter": "x"}) == ["utility adapter"]
    assert TokenScores.differences(tmp_path / "nothing", FINGERPRINTS) is None


def test_scores_of_other_data_name_the_row(tmp_path: Path) -> None:
    scores = TokenScores(make_store(tmp_path / "scores", [[0, 1]]))
    hashes = dict(zip(scores.row_ids.tolist(), scores.values("ids_hash"), strict=True))
    scores.check(hashes)
    for other in (hashes | {1: "x"}, {0: hashes[0]}, hashes | {7: "new"}):
        with pytest.raises(StoreError, match=r"scores: row [17] is not the one that was scored"):
            scores.check(other)


def test_a_store_with_missing_or_double_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not hold the rows it should"):
        TokenScores(make_store(tmp_path / "missing", [[0, 1]], rows=3))
    with pytest.raises(StoreError, match="does not hold the rows it should"):
        TokenScores(make_store(tmp_path / "double", [[0, 1], [1]]))


def test_no_store_and_a_damaged_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no token scores here"):
        TokenScores(tmp_path)
    path = make_store(tmp_path / "scores", [[0]])
    file = next(path.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StoreError, match="the store is damaged"):
        TokenScores(path)


def test_the_manifest_can_be_read_by_people(tmp_path: Path) -> None:
    path = make_store(tmp_path / "scores", [[0, 1]])
    assert json.loads((path / "scores.json").read_text()) == {"fingerprints": FINGERPRINTS, "rows": 2, "tokens": 3}
