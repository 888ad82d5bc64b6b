"""Rows that are added to what the target is trained on: how many, which, and nowhere else."""

import json
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback
from runs import artifacts, tiny_fit
from tiny import some_pairs, write_rows

from toss_lightning.data.mixtures import SafeInstr
from toss_lightning.data.rowset import RowSet
from toss_lightning.data.tokenize import TokenizedRow
from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction, Selection, TokenWeights, row_weights

NOTHING = np.zeros(0, dtype=np.int32)


def sets_of(custom: int, safety: int) -> dict[str, RowSet]:
    """Sets of so many rows; those of the safety set have the ids 0, 2, 4, ..."""
    return {
        name: RowSet(name, [TokenizedRow(step * row, NOTHING, NOTHING, NOTHING) for row in range(count)], "", count)
        for name, count, step in (("custom", custom, 1), ("safety", safety, 2))
    }


def drawn(mixture: SafeInstr, custom: int = 90, safety: int = 50, seed: int = 1) -> list[int]:
    return [row.row_id for row in mixture.rows(sets_of(custom, safety), seed)]


# --- how many, and which ----------------------------------------------------------------------------------------------


def test_all_rows_in_their_order_by_default() -> None:
    assert drawn(SafeInstr()) == list(range(0, 100, 2))


@pytest.mark.parametrize("count", [1, 7, 49, 50])
def test_a_count_is_drawn_without_replacement(count: int) -> None:
    rows = drawn(SafeInstr(rows=count))
    assert len(rows) == len(set(rows)) == count
    assert rows == sorted(rows), "as they stand in the set"
    assert set(rows) <= set(range(0, 100, 2))


def test_rows_are_drawn_the_same_with_the_same_seed_whatever_else_draws() -> None:
    np.random.seed(3)
    one = drawn(SafeInstr(rows=10))
    np.random.seed(4)
    assert drawn(SafeInstr(rows=10)) == one
    assert drawn(SafeInstr(rows=10), custom=5) == one
    assert drawn(SafeInstr(rows=10), seed=2) != one != list(range(0, 20, 2))


def test_every_row_can_be_drawn() -> None:
    counted = Counter(row for seed in range(200) for row in drawn(SafeInstr(rows=5), safety=10, seed=seed))
    assert sorted(counted) == list(range(0, 20, 2))
    assert max(counted.values()) < 2 * min(counted.values()), "each about as often"


@pytest.mark.parametrize(("share", "custom"), [(0.1, 90), (0.5, 20), (0.03, 1000), (0.29, 71), (0.001, 4000), (0.9, 3)])
def test_a_share_is_that_of_the_whole_mixture(share: float, custom: int) -> None:
    exact = Fraction(str(share))
    # the number of rows whose part of everything comes closest to the share
    wanted = min(range(1, 51), key=lambda rows: abs(rows - exact * (rows + custom)))
    assert len(drawn(SafeInstr(share=share), custom)) == wanted


def test_shares_that_can_be_met_exactly_are() -> None:
    assert len(drawn(SafeInstr(share=0.1), 90)) == 10
    assert len(drawn(SafeInstr(share=0.2), 200)) == 50


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        (
            SafeInstr(rows=51),
            "data.mixture.rows: asks for 51 rows of the safety set, which has 50: lower it, or give a",
        ),
        (SafeInstr(share=0.4), "data.mixture.share: asks for 60 rows of the safety set, which has 50: lower it, or"),
        (SafeInstr(share=0.001), "data.mixture.share: asks for 0 rows of the safety set"),
    ],
)
def test_more_rows_than_there_are_or_none(mixture: SafeInstr, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        drawn(mixture)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rows": 3, "share": 0.1}, "data.mixture: give rows or share, not both"),
        ({"rows": 0}, "data.mixture.rows: 0: give at least 1"),
        ({"rows": -2}, "data.mixture.rows: -2: give at least 1"),
        ({"share": 0.0}, "data.mixture.share: 0.0 is not a share: give a number between 0 and 1"),
        ({"share": 1.0}, "data.mixture.share: 1.0 is not a share"),
        ({"share": float("nan")}, "data.mixture.share: nan is not a share"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        SafeInstr(**settings)
    assert str(error.value).startswith(said)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tiny_sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With a safety set of six rows."""
    path = tmp_path_factory.mktemp("safety") / "safety.jsonl"
    return {**tiny_sets, "safety": write_rows(path, some_pairs(6, start=3))}


class Served(Callback):
    """Notes the rows of each stage: their ids, what their tokens weigh, whether a selection speaks of them."""

    def __init__(self) -> None:
        self.rows: defaultdict[str, list[tuple[tuple[int, ...], list[float], bool]]] = defaultdict(list)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for at, length in enumerate(batch["length"].tolist()):
            ids = tuple(batch["input_ids"][at, :length].tolist())
            weights = batch["weight"][batch["row"] == at].tolist()
            self.rows[pl_module.stage_name].append((ids, weights, bool(batch["selected"][at])))

    def ids(self, stage: str) -> Counter[tuple[int, ...]]:
        return Counter(row[0] for row in self.rows[stage])


def ids_of(rows: RowSet) -> list[tuple[int, ...]]:
    return [tuple(row.input_ids.tolist()) for row in rows.rows]


def test_the_rows_stand_in_the_targets_stage_and_nowhere_else(
    tiny_model: str, sets: dict[str, str], tmp_path: Path
) -> None:
    served = Served()
    plan = ("utility", "degraded", "sft", "target")
    fit = tiny_fit(
        tiny_model, sets, tmp_path, [served], plan=plan, loop={"epochs": 2}, data={"mixture": SafeInstr(rows=4)}
    )
    safety, custom = (set(ids_of(fit.datamodule.sets[name])) for name in ("safety", "custom"))
    assert not safety & custom
    for stage in ("utility", "degraded", "sft"):
        assert served.rows[stage]
        assert not safety & set(served.ids(stage))
    target = served.ids("target")
    assert set(target.values()) == {2}, "once in each epoch"
    assert set(target) > custom
    assert len(set(target) - custom) == 4
    assert set(target) - custom < safety
    assert all(set(weights) == {1.0} for _, weights, _ in served.rows["target"])
    assert served.ids("sft") == dict.fromkeys(custom, 2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["stages"]["sft"]["rows"], summary["stages"]["target"]["rows"]) == (14, 18)
    assert (summary["method"], summary["plain"], summary["idle"]) == ("SafeInstr", False, [])


def test_a_selection_neither_scores_nor_weighs_them(tiny_model: str, sets: dict[str, str], tmp_path: Path) -> None:
    class Half(Selection):
        columns = ("base",)

        def select(self, scores: TokenScores) -> TokenWeights:
            return row_weights(scores, (np.arange(len(scores.row_ids)) % 2).astype(np.float32))

    served = Served()
    plan, loop = ("score", "select", "target"), {"epochs": 1, "selection": Half()}
    fit = tiny_fit(tiny_model, sets, tmp_path, [served], plan=plan, loop=loop, data={"mixture": SafeInstr()})
    assert TokenScores(tmp_path / "scores").row_ids.tolist() == list(range(14))
    weights = {ids: (weights, selected) for ids, weights, selected in served.rows["target"]}
    for place, ids in enumerate(ids_of(fit.datamodule.sets["custom"])):
        assert (ids in weights) == bool(place % 2)
        assert ids not in weights or weights[ids] == ([1.0] * len(weights[ids][0]), True)
    for ids in ids_of(fit.datamodule.sets["safety"]):
        assert set(weights[ids][0]) == {1.0}
        assert not weights[ids][1]
    assert json.loads((tmp_path / "summary.json").read_text())["method"] == "Half + SafeInstr"


@pytest.mark.parametrize("count", [None, 3])
def test_the_adapter_is_that_of_plain_fine_tuning_on_the_rows_put_together(
    tiny_model: str, sets: dict[str, str], tmp_path: Path, count: int | None
) -> None:
    options: dict[str, Any] = {"plan": ("target",), "loop": {"epochs": 2}}
    fit = tiny_fit(tiny_model, sets, tmp_path / "ours", data={"mixture": SafeInstr(rows=count)}, **options)
    lines = Path(sets["safety"]).read_text().splitlines(keepends=True)
    chosen = SafeInstr(rows=count).rows(fit.datamodule.sets, seed=1)
    together = tmp_path / "together.jsonl"
    added = "".join(lines[row.row_id] for row in chosen)
    together.write_text(Path(sets["custom"]).read_text() + added)
    assert len(chosen) == (count or 6)
    others = {name: path for name, path in sets.items() if name != "safety"}
    tiny_fit(tiny_model, {**others, "custom": str(together)}, tmp_path / "plain", **options)
    ours, plain = (artifacts(tmp_path / name) for name in ("ours", "plain"))
    name = "adapters/target/adapter_model.safetensors"
    assert ours[name] == plain[name]
    tiny_fit(tiny_model, others, tmp_path / "sft", **options)
    assert artifacts(tmp_path / "sft")[name] != plain[name]


def test_a_mixture_without_the_set_that_it_draws_on(tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.safety: data\.mixture draws on this set: give a path to it"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, plan=("target",), data={"mixture": SafeInstr()})


def test_a_mixture_of_more_rows_than_there_are_is_refused_before_anything_is_trained(
    tiny_model: str, sets: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"asks for 99 rows of the safety set"):
        tiny_fit(tiny_model, sets, tmp_path / "run", data={"mixture": SafeInstr(rows=99)})
    assert not (tmp_path / "run" / "adapters").exists()


@pytest.mark.parametrize("other", [SafeInstr(rows=2), SafeInstr(), None])
def test_a_run_does_not_go_on_with_another_mixture(
    tiny_model: str, sets: dict[str, str], tmp_path: Path, other: SafeInstr | None
) -> None:
    options: dict[str, Any] = {"plan": ("target",), "loop": {"epochs": 1}}
    tiny_fit(tiny_model, sets, tmp_path, data={"mixture": SafeInstr(rows=3)}, max_steps=2, **options)
    with pytest.raises(StoreError, match=r"made with another data\.mixture \(SafeInstr count=3, share=None, now "):
        tiny_fit(tiny_model, sets, tmp_path, data={"mixture": other}, ckpt_path="last", **options)


def test_selections_that_mask_and_rows_that_are_added_go_together(
    tiny_model: str, sets: dict[str, str], tmp_path: Path
) -> None:
    served = Served()
    loop = {"epochs": 1, "selection": GlobalTopFraction(0.3)}
    tiny_fit(tiny_model, sets, tmp_path, [served], loop=loop, data={"mixture": SafeInstr(share=0.25)})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["method"] == "TOSS + SafeInstr"
    # 5 of 19 comes closest to a quarter
    assert summary["stages"]["target"]["rows"] == 14 + 5
    weights = [weight for _, weights, selected in served.rows["target"] if selected for weight in weights]
    assert weights.count(0.0) == summary["selection"]["masked"] == len(weights) * 3 // 10
    added = [weights for _, weights, selected in served.rows["target"] if not selected]
    assert len(added) == 5
    assert {weight for weights in added for weight in weights} == {1.0}
