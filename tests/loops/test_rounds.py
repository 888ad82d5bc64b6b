"""TOSS-Pro: rounds of promotion, refit and scoring, against walks and runs by hand."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback
from runs import tiny_fit
from tiny import some_pairs, write_rows

from toss_lightning.errors import ConfigError
from toss_lightning.loops.checkpoints import newest
from toss_lightning.models import Optim, References
from toss_lightning.scores import TokenScores
from toss_lightning.selection import GlobalTopFraction, PerRowTopFraction, TokenWeights

TO_SCORES = ("utility", "degraded", "score")


def promoted(run_dir: Path, round: int) -> list[int]:
    """Row ids in the order in which a round took them."""
    said = json.loads((run_dir / "promoted" / f"round-{round}.json").read_text())
    assert said["round"] == round
    return [row["row_id"] for row in said["rows"]]


def rounds(run_dir: Path) -> list[dict[str, Any]]:
    return json.loads((run_dir / "summary.json").read_text())["rounds"]


def walk(scores: TokenScores, count: int, taken: Sequence[int] = ()) -> list[int]:
    """Algorithm 1, as it is written: down the ranked tokens, each one's row unless it was taken."""
    tokens = []
    for row, losses in enumerate(scores.per_row(scores.flat("loss_utility") - scores.flat("loss_degraded"))):
        tokens += [(-score, row, position) for position, score in enumerate(losses.tolist())]
    chosen: list[int] = []
    for _, row, _ in sorted(tokens):
        row_id = int(scores.row_ids[row])
        if row_id not in taken and row_id not in chosen:
            chosen.append(row_id)
        if len(chosen) == count:
            break
    return chosen


def masked_tokens(selection: GlobalTopFraction, run_dir: Path, round: int) -> set[int]:
    """Which response tokens a round's scores would mask."""
    weights = selection.select(TokenScores(run_dir / "scores", round)).flat()
    return set(np.flatnonzero(weights == 0).tolist())


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, str]:
    """As the tiny sets, with held-out rows of their own, so that a set that grows is not split in another way."""
    folder = tmp_path_factory.mktemp("sets")
    labels = {"label": "benign"}
    return {
        "custom": write_rows(folder / "custom.jsonl", some_pairs(14), **labels),
        "utility": write_rows(folder / "utility.jsonl", some_pairs(9, start=1)),
        "harmful": write_rows(folder / "harmful.jsonl", some_pairs(8, start=2)),
        "utility_val": write_rows(folder / "utility_val.jsonl", some_pairs(3, start=3)),
        "harmful_val": write_rows(folder / "harmful_val.jsonl", some_pairs(3, start=4)),
    }


@pytest.fixture(scope="module")
def pro(tiny_model, sets, tmp_path_factory) -> Path:
    """A run of TOSS-Pro with two rounds of three rows."""
    run_dir = tmp_path_factory.mktemp("pro")
    tiny_fit(tiny_model, sets, run_dir, loop={"rounds": 2, "promote": 3})
    return run_dir


# --- what a round promotes --------------------------------------------------------------------------------------------


def test_each_round_promotes_the_rows_that_a_walk_down_the_ranked_tokens_takes(pro: Path) -> None:
    first = walk(TokenScores(pro / "scores", round=0), 3)
    second = walk(TokenScores(pro / "scores", round=1), 3, taken=first)
    assert promoted(pro, 1) == first
    assert promoted(pro, 2) == second


def test_rows_may_be_promoted_once_more_where_that_is_wanted(tiny_model, sets, tmp_path: Path) -> None:
    loop = {"rounds": 2, "promote": 6, "promote_again": True}
    tiny_fit(tiny_model, sets, tmp_path, plan=TO_SCORES, loop=loop)
    for round in (1, 2):
        assert promoted(tmp_path, round) == walk(TokenScores(tmp_path / "scores", round - 1), 6)
    both = {*promoted(tmp_path, 1), *promoted(tmp_path, 2)}
    assert len(both) < 12, "some row came twice, or this test shows nothing"
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert stages["degraded-2"]["rows"] == 8 + len(both), "a row that was promoted twice is trained on once"


def test_the_mean_score_of_a_row_can_decide(tiny_model, sets, tmp_path: Path) -> None:
    loop = {"rounds": 2, "promote": 3, "promotion": "row_mean"}
    tiny_fit(tiny_model, sets, tmp_path, plan=TO_SCORES, loop=loop)
    taken: list[int] = []
    for round in (1, 2):
        scores = TokenScores(tmp_path / "scores", round - 1)
        means = {row_id: row.mean() for row_id, row in enumerate(scores.per_row(scores.score()))}
        ranked = sorted((row_id for row_id in means if row_id not in taken), key=lambda row_id: -means[row_id])
        assert promoted(tmp_path, round) == ranked[:3]
        taken += ranked[:3]


def test_random_rows_depend_on_the_seed_and_the_round_alone(tiny_model, sets, tmp_path: Path) -> None:
    loop = {"rounds": 2, "promote": 4, "promotion": "random", "promote_again": True, "reference_epochs": 1}
    drawn = {}
    # another learning rate gives other scores, which are not to matter
    for name, seed, lr in (("one", 1, 1e-2), ("same seed", 1, 1e-3), ("other seed", 2, 1e-2)):
        run_dir = tmp_path / name
        tiny_fit(tiny_model, sets, run_dir, plan=TO_SCORES, loop=loop, seed=seed, module={"optim": Optim(lr=lr)})
        drawn[name] = [promoted(run_dir, round) for round in (1, 2)]
    assert drawn["one"] == drawn["same seed"]
    assert drawn["one"] != drawn["other seed"]
    assert drawn["one"][0] != drawn["one"][1]


@pytest.mark.parametrize(("promote", "rows"), [(1, 1), (5, 5), (0.5, 4), (0.49, 3), (1.0, 8)])
def test_promote_counts_rows_or_is_a_share_of_the_harmful_set(
    tiny_model, sets, tmp_path: Path, promote: int | float, rows: int
) -> None:
    loop = {"rounds": 1, "promote": promote, "reference_epochs": 1}
    tiny_fit(tiny_model, sets, tmp_path, plan=TO_SCORES, loop=loop)
    assert len(promoted(tmp_path, 1)) == rounds(tmp_path)[1]["promoted"] == rows


# --- what a round trains on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round", [1, 2])
def test_a_refit_equals_a_reference_trained_by_hand_on_the_grown_harmful_set(
    tiny_model, sets, tmp_path: Path, pro: Path, round: int
) -> None:
    rows = sorted(row_id for before in range(1, round + 1) for row_id in promoted(pro, before))
    custom = some_pairs(14)
    grown = write_rows(tmp_path / "grown.jsonl", [*some_pairs(8, start=2), *(custom[row_id] for row_id in rows)])
    with pytest.warns(UserWarning, match=f"{len(rows)} rows stand in both the custom and the harmful set"):
        tiny_fit(tiny_model, sets | {"harmful": grown}, tmp_path / "by_hand", plan=TO_SCORES)
    by_hand, ours = TokenScores(tmp_path / "by_hand/scores"), TokenScores(pro / "scores", round)
    np.testing.assert_array_equal(by_hand.flat("loss_degraded"), ours.flat("loss_degraded"))
    np.testing.assert_array_equal(by_hand.flat("loss_utility"), ours.flat("loss_utility"))
    weights = "adapter_model.safetensors"
    assert (tmp_path / "by_hand/adapters/degraded" / weights).read_bytes() == (
        pro / f"adapters/degraded-{round}" / weights
    ).read_bytes()


def test_a_refit_can_go_on_from_the_adapter_of_the_round_before(tiny_model, sets, tmp_path: Path, pro: Path) -> None:
    def first_losses(run_dir: Path) -> dict[str, float]:
        """The loss of the first optimizer step of each stage, before it has changed anything."""
        lines = (run_dir / "metrics.csv").read_text().splitlines()
        names = lines[0].split(",")
        found: dict[str, float] = {}
        for line in lines[1:]:
            values = dict(zip(names, line.split(","), strict=True))
            if values["loss"]:
                found.setdefault(values["stage"], float(values["loss"]))
        return found

    loop = {"rounds": 2, "promote": 3, "refit": "continue"}
    tiny_fit(tiny_model, sets, tmp_path, plan=TO_SCORES, loop=loop)
    assert promoted(tmp_path, 1) == promoted(pro, 1), "the first scores are those of any other run"
    continued, scratch = first_losses(tmp_path), first_losses(pro)
    assert continued["degraded-1"] < scratch["degraded-1"]
    assert continued["degraded-2"] < continued["degraded-1"], "two rounds of training lie behind it"
    # and the refit of a given adapter goes on from that one: the same as the second of two rounds
    references = References(str(tmp_path / "adapters/utility"), str(tmp_path / "adapters/degraded"))
    again = tmp_path / "again"
    tiny_fit(tiny_model, sets, again, plan=["score"], loop=loop | {"rounds": 1}, module={"references": references})
    ours, theirs = (TokenScores(run / "scores", 1).flat("loss_degraded") for run in (again, tmp_path))
    np.testing.assert_array_equal(ours, theirs)


# --- what a round leaves behind ---------------------------------------------------------------------------------------


def test_the_losses_of_every_round_are_kept_and_the_last_ones_decide(pro: Path) -> None:
    columns = [TokenScores(pro / "scores", round).flat("loss_degraded") for round in range(3)]
    assert not np.array_equal(columns[0], columns[1])
    assert not np.array_equal(columns[1], columns[2])
    last = TokenScores(pro / "scores")
    assert (last.round, last.rounds) == (2, [0, 1, 2])
    np.testing.assert_array_equal(last.flat("loss_degraded"), columns[2])
    chosen, by_hand = TokenWeights.load(pro / "selection"), GlobalTopFraction().select(last)
    np.testing.assert_array_equal(chosen.flat(), by_hand.flat())


def test_the_summary_tells_what_each_round_did(pro: Path) -> None:
    summary = json.loads((pro / "summary.json").read_text())
    assert [facts["round"] for facts in summary["rounds"]] == [0, 1, 2]
    masks = [masked_tokens(GlobalTopFraction(), pro, round) for round in range(3)]
    for round, facts in enumerate(summary["rounds"]):
        name = f"degraded-{round}" if round else "degraded"
        assert facts["harmful_loss"] == summary["held_out"][name]["harmful_loss"]
        assert facts["masked"] == len(masks[round])
        assert isinstance(facts["threshold"], float)
    assert "promoted" not in summary["rounds"][0]
    for round in (1, 2):
        facts, (one, two) = summary["rounds"][round], masks[round - 1 : round + 1]
        assert (facts["promoted"], facts["promoted_per_label"]) == (3, {"benign": 3})
        assert facts["jaccard"] == pytest.approx(len(one & two) / len(one | two))
    stages = summary["stages"]
    assert [(stages[name]["rows"], stages[name]["promoted"]) for name in ("degraded-1", "degraded-2")] == [
        (11, 3),
        (14, 6),
    ]
    assert {"score", "promote-1", "score-1", "promote-2", "score-2", "select"} <= set(stages)


def test_promoted_rows_can_be_looked_at(pro: Path) -> None:
    scores = TokenScores(pro / "scores", 0)
    rows = scores.per_row(scores.score())
    for row in json.loads((pro / "promoted/round-1.json").read_text())["rows"]:
        assert row["highest_score"] == pytest.approx(rows[row["row_id"]].max())
        assert row["mean_score"] == pytest.approx(rows[row["row_id"]].mean(), abs=1e-6)
        assert (row["label"], row["source"]) == ("benign", "custom")


def test_every_round_is_said_in_a_line(tiny_model, sets, tmp_path: Path, capsys) -> None:
    tiny_fit(tiny_model, sets, tmp_path, plan=TO_SCORES, loop={"rounds": 1, "promote": 2})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round ")]
    assert len(lines) == 2
    assert lines[0].startswith("round 0: held-out harmful loss of the degraded reference 4.")
    assert lines[1].startswith("round 1: 2 rows promoted (2 benign); held-out harmful loss")
    assert lines[1].endswith("with the round before (Jaccard)")


def test_the_adapter_of_every_round_is_kept_and_none_of_them_is_to_be_deployed(pro: Path) -> None:
    for name in ("degraded", "degraded-1", "degraded-2"):
        assert "DO NOT DEPLOY" in (pro / "adapters" / name / "README.md").read_text()
    weights = {
        (pro / "adapters" / name / "adapter_model.safetensors").read_bytes() for name in ("degraded-1", "target")
    }
    assert len(weights) == 2


def test_no_rounds_are_plain_toss(tiny_model, sets, tmp_path: Path) -> None:
    tiny_fit(tiny_model, sets, tmp_path)
    assert rounds(tmp_path) == []
    assert not (tmp_path / "promoted").exists()
    assert TokenScores(tmp_path / "scores").rounds == [0]


# --- a given degraded reference, and when to stop ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def strong(tiny_model, sets, tmp_path_factory) -> References:
    """References that know their sets far better than a refit of one epoch will."""
    run_dir = tmp_path_factory.mktemp("strong")
    tiny_fit(
        tiny_model, sets | {"harmful": sets["harmful_val"]}, run_dir, plan=["utility", "degraded"], loop={"epochs": 8}
    )
    return References(str(run_dir / "adapters/utility"), str(run_dir / "adapters/degraded"))


def test_rounds_begin_with_a_given_degraded_reference(tiny_model, sets, tmp_path: Path, pro: Path) -> None:
    references = References(str(pro / "adapters/utility"), str(pro / "adapters/degraded"))
    tiny_fit(tiny_model, sets, tmp_path, loop={"rounds": 2, "promote": 3}, module={"references": references})
    for round in range(3):
        ours, theirs = (TokenScores(run / "scores", round).score() for run in (tmp_path, pro))
        np.testing.assert_array_equal(ours, theirs)
    assert (promoted(tmp_path, 1), promoted(tmp_path, 2)) == (promoted(pro, 1), promoted(pro, 2))
    names = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert names == {"degraded-1", "degraded-2", "target"}, "what was given is not written again"
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (tmp_path, pro))
    for name in ("degraded", "degraded-1", "degraded-2", "target"):
        assert ours["held_out"][name] == pytest.approx(theirs["held_out"][name]), name


def test_rounds_end_when_a_refit_does_not_lower_the_harmful_loss(
    tiny_model, sets, tmp_path: Path, strong: References, capsys
) -> None:
    loop = {"rounds": 2, "promote": 3, "reference_epochs": 1, "stop_early": True}
    trainer = tiny_fit(tiny_model, sets, tmp_path, loop=loop, module={"references": strong})
    assert "round 1: the held-out harmful loss did not fall" in capsys.readouterr().out
    held_out = json.loads((tmp_path / "summary.json").read_text())["held_out"]
    assert held_out["degraded-1"]["harmful_loss"] >= held_out["degraded"]["harmful_loss"]
    assert "degraded-2" not in held_out
    assert not (tmp_path / "promoted/round-2.json").exists()
    # the target is trained with the scores of the given reference, as if there had been no rounds
    scores = TokenScores(tmp_path / "scores")
    assert (scores.round, scores.rounds) == (0, [0])
    tiny_fit(tiny_model, sets, tmp_path / "toss", module={"references": strong})
    ours, theirs = (TokenWeights.load(run / "selection") for run in (tmp_path, tmp_path / "toss"))
    np.testing.assert_array_equal(ours.flat(), theirs.flat())
    one, two = (run / "adapters/target/adapter_model.safetensors" for run in (tmp_path, tmp_path / "toss"))
    assert one.read_bytes() == two.read_bytes()
    assert trainer.global_step == 3 + 8, "one refit and the target"


def test_without_early_stopping_a_worse_refit_is_used_all_the_same(
    tiny_model, sets, tmp_path: Path, strong: References
) -> None:
    loop = {"rounds": 1, "promote": 3, "reference_epochs": 1}
    tiny_fit(tiny_model, sets, tmp_path, plan=["score", "select"], loop=loop, module={"references": strong})
    assert TokenScores(tmp_path / "scores").round == 1


def test_rounds_end_when_no_new_row_would_be_promoted(tiny_model, sets, tmp_path: Path, capsys) -> None:
    # what was trained on is more likely under the degraded adapter, and so leads the ranking again
    loop = {"rounds": 3, "promote": 14, "promote_again": True, "stop_early": True, "reference_epochs": 4}
    tiny_fit(tiny_model, sets, tmp_path, loop=loop)
    assert "round 2: no new row would be promoted, so the rounds end" in capsys.readouterr().out
    scores = TokenScores(tmp_path / "scores")
    assert (scores.round, scores.rounds) == (1, [0, 1])
    np.testing.assert_array_equal(
        TokenWeights.load(tmp_path / "selection").flat(), GlobalTopFraction().select(scores).flat()
    )
    assert not (tmp_path / "adapters/degraded-2").exists()


def test_a_run_that_stopped_its_rounds_early_resumes(tiny_model, sets, tmp_path: Path, strong: References) -> None:
    class Kill(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 5:
                raise RuntimeError("killed")

    options: dict[str, Any] = {
        "loop": {"rounds": 2, "promote": 3, "reference_epochs": 1, "stop_early": True},
        "module": {"references": strong},
    }
    tiny_fit(tiny_model, sets, tmp_path / "whole", **options)
    killed = tmp_path / "killed"
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, sets, killed, [Kill()], **options)
    tiny_fit(tiny_model, sets, killed, **options, ckpt_path=str(newest(killed / "checkpoints")))
    for name in ("degraded-1", "target"):
        one, two = (run / "adapters" / name / "adapter_model.safetensors" for run in (tmp_path / "whole", killed))
        assert one.read_bytes() == two.read_bytes()
    assert TokenScores(killed / "scores").rounds == [0]


# --- what rounds cost -------------------------------------------------------------------------------------------------


class Scored(Callback):
    """Counts how often each adapter scored each row."""

    def __init__(self) -> None:
        self.rows: Counter[tuple[str, int]] = Counter()

    def setup(self, trainer, module, stage):
        score = module.predict_step

        def counting(batch, *rest):
            adapter = module.digest(module.bank.net.active_adapter)
            self.rows.update((adapter, row_id) for row_id in batch["row_id"].tolist())
            return score(batch, *rest)

        module.predict_step = counting


@pytest.mark.parametrize("count", [0, 1, 2])
def test_rounds_cost_one_utility_pass_and_one_degraded_pass_each(tiny_model, sets, tmp_path: Path, count: int) -> None:
    scored = Scored()
    tiny_fit(tiny_model, sets, tmp_path, [scored], loop={"rounds": count, "promote": 2})
    adapters = TokenScores(tmp_path / "scores").adapters
    assert list(adapters) == ["utility", "degraded", "degraded-1", "degraded-2"][: count + 2]
    assert scored.rows == {(digest, row_id): 1 for digest in adapters.values() for row_id in range(14)}


def test_a_run_of_the_same_kind_does_not_score_again(tiny_model, sets, tmp_path: Path) -> None:
    options = {"loop": {"rounds": 2, "promote": 2}}
    tiny_fit(tiny_model, sets, tmp_path, **options)
    scored = Scored()
    tiny_fit(tiny_model, sets, tmp_path, [scored], **options, checkpoint_every=5)
    assert not scored.rows


def test_fewer_rounds_in_the_same_directory_select_by_their_own_last_round(tiny_model, sets, tmp_path: Path) -> None:
    tiny_fit(tiny_model, sets, tmp_path, loop={"rounds": 2, "promote": 2})
    tiny_fit(tiny_model, sets, tmp_path, loop={"rounds": 1, "promote": 3})
    scores = TokenScores(tmp_path / "scores")
    assert scores.round == 1
    np.testing.assert_array_equal(
        TokenWeights.load(tmp_path / "selection").flat(), GlobalTopFraction().select(scores).flat()
    )


# --- settings that cannot work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ({"rounds": 1, "promote": 0}, "loop.promote: 0 of a harmful set of 8 rows promotes none: give a whole number"),
        ({"rounds": 1, "promote": -2}, "loop.promote: -2 of a harmful set of 8 rows promotes none"),
        ({"rounds": 1, "promote": 0.1}, "loop.promote: 0.1 of a harmful set of 8 rows promotes none"),
        (
            {"rounds": 1, "promote": 15},
            "15 rows a round, 15 in all, are more than the custom set's 14 rows",
        ),
        (
            {"rounds": 3, "promote": 5},
            "5 rows a round, 15 in all, are more than the custom set's 14 rows",
        ),
        ({"rounds": 2, "promote": 15, "promote_again": True}, "15 in all, are more than the custom set's 14 rows"),
    ],
)
def test_more_rows_than_there_are_or_none(tiny_model, sets, tmp_path: Path, loop: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        tiny_fit(tiny_model, sets, tmp_path, loop=loop)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "adapters").exists(), "it is said before anything is trained"


def test_rounds_without_a_harmful_set(tiny_model, sets, tmp_path: Path, strong: References) -> None:
    with pytest.raises(ConfigError, match=r"data.harmful: 1 rounds \(loop.rounds\) promote rows into the harmful set"):
        tiny_fit(tiny_model, {"custom": sets["custom"]}, tmp_path, loop={"rounds": 1}, module={"references": strong})


def test_early_stopping_needs_held_out_harmful_rows(tiny_model, sets, tmp_path: Path) -> None:
    ours = {name: path for name, path in sets.items() if name != "harmful_val"}
    loop = {"rounds": 1, "promote": 2, "stop_early": True}
    with pytest.raises(ConfigError, match=r"loop\.stop_early: needs held-out harmful rows: give data.harmful_val"):
        tiny_fit(tiny_model, ours, tmp_path, loop=loop, data={"holdout": 0.0})
    for limit in (0, 1, 0.5):
        with pytest.raises(ConfigError, match=r"loop\.stop_early: the last round is told by all held-out rows"):
            tiny_fit(tiny_model, sets, tmp_path, loop=loop, limit_val_batches=limit)
    assert not (tmp_path / "adapters").exists()


def test_another_selection_ranks_other_masks_but_promotes_the_same_rows(
    tiny_model, sets, tmp_path: Path, pro: Path
) -> None:
    selection = PerRowTopFraction(0.3)
    tiny_fit(tiny_model, sets, tmp_path, plan=TO_SCORES, loop={"rounds": 2, "promote": 3, "selection": selection})
    assert [promoted(tmp_path, round) for round in (1, 2)] == [promoted(pro, round) for round in (1, 2)]
    assert rounds(tmp_path)[2]["masked"] == len(masked_tokens(selection, pro, 2))
