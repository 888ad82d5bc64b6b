import itertools
import math
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scores_on_disk import make_scores
from sklearn.metrics import roc_auc_score

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.scores import ScoreWriter, TokenScores
from toss_lightning.selection import GlobalTopFraction, TokenWeights
from toss_lightning.selection.chain import START, ChainSelection
from toss_lightning.selection.two_state import fit


def masked(weights: TokenWeights) -> np.ndarray:
    return weights.flat() == 0


def alpha_beta(scores: Sequence[float], stay: float, temperature: float, prior: float) -> np.ndarray:
    """P(harmful) of each token of one row: the textbook's scaled alpha and beta passes, one token at a time."""
    moves = np.array([[stay + (1 - stay) * (1 - prior), (1 - stay) * prior], [(1 - stay) * (1 - prior), 0]])
    moves[1, 1] = 1 - moves[1, 0]
    emits = [np.array([1.0, math.exp(score / temperature)]) for score in scores]
    alphas, betas = [np.array([1 - prior, prior]) * emits[0]], [np.ones(2)]
    for emit in emits[1:]:
        alphas.append(alphas[-1] / alphas[-1].sum() @ moves * emit)
    for emit in emits[:0:-1]:
        betas.append(moves @ (emit * betas[-1] / betas[-1].sum()))
    both = np.array(alphas) * np.array(betas[::-1])
    return both[:, 1] / both.sum(1)


def some_scores(path: Path, seed: int = 0) -> TokenScores:
    generator = np.random.default_rng(seed)
    return make_scores(path, [generator.normal(0, 2, size).tolist() for size in generator.integers(2, 30, 25)])


def runs_of_harm(seed: int, rows: int = 150, harmful: float = 0.2) -> tuple[list[list[float]], np.ndarray]:
    """Scores as noisy as real ones, and which tokens are harmful: the middle half of every few rows."""
    generator = np.random.default_rng(seed)
    scores, truth = [], []
    for length in generator.integers(40, 120, rows):
        run = np.zeros(length, dtype=bool)
        if generator.random() < harmful:
            run[length // 4 : 3 * length // 4] = True
        row = np.where(run, 0.5, -0.5) + generator.laplace(0, 1, length)
        scores.append([*row.tolist(), 0.0])
        truth.append([*run, False])
    return scores, np.concatenate(truth)


@pytest.mark.parametrize("protect_end", [True, False])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_the_automatic_cut_is_that_of_a_textbook_forward_backward(
    tmp_path: Path, threshold: float, protect_end: bool
) -> None:
    scores = some_scores(tmp_path / "scores")
    rows = [row[:-1] if protect_end else row for row in scores.per_row(scores.score())]
    found = [alpha_beta(row.tolist(), stay=0.8, temperature=1.5, prior=0.3) for row in rows]
    wanted = np.concatenate([np.append(row, 0.0) if protect_end else row for row in found]) > threshold
    weights = ChainSelection(None, threshold, 0.8, 1.5, 0.3, protect_end=protect_end).select(scores)
    np.testing.assert_array_equal(masked(weights), wanted)
    assert weights.report["likely_harmful"] == wanted.sum() > 0


@pytest.mark.parametrize("discard", [0.0, 0.1, 0.29, 0.5])
def test_a_given_share_takes_the_highest_posteriors(tmp_path: Path, discard: float) -> None:
    scores = some_scores(tmp_path / "scores")
    rows = [alpha_beta(row[:-1].tolist(), 0.8, 1.5, 0.3) for row in scores.per_row(scores.score())]
    order = np.argsort(-np.concatenate([np.append(row, -1.0) for row in rows]), kind="stable")
    count = int(round(discard * 1000) * len(order) // 1000)
    wanted = np.zeros(len(order), dtype=bool)
    wanted[order[:count]] = True
    np.testing.assert_array_equal(masked(ChainSelection(discard, 0.5, 0.8, 1.5, 0.3).select(scores)), wanted)


def test_a_chain_that_never_stays_ranks_as_toss_does(tmp_path: Path) -> None:
    scores = some_scores(tmp_path / "scores")
    ours = ChainSelection(0.2, stay=0.0, temperature=3.0, prior=0.1).select(scores)
    np.testing.assert_array_equal(masked(ours), masked(GlobalTopFraction(0.2).select(scores)))


def test_harmful_runs_inside_harmless_replies_are_found_where_token_scores_and_row_means_fail(tmp_path: Path) -> None:
    rows, truth = runs_of_harm(0)
    scores = make_scores(tmp_path / "scores", rows)
    chosen, toss = (method.select(scores) for method in (ChainSelection(0.05), GlobalTopFraction(0.05)))
    means = np.concatenate([np.full(len(row), np.mean(row)) for row in rows])
    by_row = np.argsort(-means, kind="stable")[: chosen.report["masked"]]
    assert truth[masked(chosen)].mean() > 0.9
    assert truth[by_row].mean() < 0.7
    assert truth[masked(toss)].mean() < 0.4


def test_the_fitted_chain_finds_share_and_place_of_harm(tmp_path: Path) -> None:
    rows, truth = runs_of_harm(1)
    weights = ChainSelection(None).select(make_scores(tmp_path / "scores", rows))
    assert weights.report["masked"] / len(truth) == pytest.approx(truth.mean(), rel=0.25)
    assert truth[masked(weights)].mean() > 0.75
    assert masked(weights)[truth].mean() > 0.8
    fitted = weights.report["fit"]
    assert fitted["converged"]
    assert fitted["fitted"] == ["prior", "stay", "temperature"]
    assert fitted["log_likelihood_over_no_harm"] > 20
    assert weights.report["chain"]["prior"] == pytest.approx(truth.mean(), abs=0.05)


def test_the_automatic_cut_leaves_a_set_without_harm_whole(tmp_path: Path) -> None:
    rows, _ = runs_of_harm(2, harmful=0.0)
    scores = make_scores(tmp_path / "scores", rows)
    assert ChainSelection(None).select(scores).report["masked"] == 0
    assert ChainSelection(0.1).select(scores).report["likely_harmful"] == 0


def test_fitting_beats_a_chain_of_wrong_numbers(tmp_path: Path) -> None:
    rows, truth = runs_of_harm(3)
    scores = make_scores(tmp_path / "scores", rows)

    def auroc(**given: float) -> float:
        shares = [share / 20 for share in range(1, 20)]
        ranks = sum(masked(ChainSelection(share, **given).select(scores)).astype(int) for share in shares)
        return float(roc_auc_score(truth, ranks))

    assert auroc() > auroc(stay=0.3, temperature=1.0, prior=0.1) + 0.05
    assert auroc() > auroc(stay=0.9999, temperature=20.0, prior=0.1) + 0.01


def test_an_end_of_turn_is_neither_masked_nor_heard_unless_that_is_asked_for(tmp_path: Path) -> None:
    rows = [[3.0, 2.0, 0.0], [-2.0, -0.3, 0.0], [1.0, 1.0, 0.0]]
    loud = [[*row[:-1], 9.0] for row in rows]
    quiet_scores, loud_scores = (make_scores(tmp_path / name, kind) for name, kind in (("q", rows), ("l", loud)))
    given = {"stay": 0.9, "temperature": 1.0, "prior": 0.2}
    protected = masked(ChainSelection(None, **given).select(loud_scores))
    np.testing.assert_array_equal(protected, masked(ChainSelection(None, **given).select(quiet_scores)))
    assert protected.tolist() == [True, True, False, False, False, False, True, True, False]
    # a loud end is masked itself, and makes its neighbour suspect
    heard = masked(ChainSelection(None, protect_end=False, **given).select(loud_scores))
    assert heard.tolist() == [True, True, True, False, True, True, True, True, True]


def test_scores_of_the_round_in_use_count(tmp_path: Path) -> None:
    rows = [[3.0, 3.0, 0.0], [3.0, 3.0, 0.0]]
    later = [[0.0, 0.0, 0.0], [6.0, 6.0, 0.0]]
    scores = make_scores(tmp_path / "scores", rows, later_rounds=[later])
    given = {"stay": 0.9, "temperature": 1.0, "prior": 0.2}
    assert masked(ChainSelection(None, **given).select(scores)).tolist() == [True, True, False, False, False, False]
    first = ChainSelection(None, **given).select(TokenScores(scores.path, round=0))
    assert masked(first).tolist() == [True, True, False, True, True, False]


def test_some_numbers_are_given_and_the_others_fitted(tmp_path: Path) -> None:
    rows, _ = runs_of_harm(4)
    scores = make_scores(tmp_path / "scores", rows)
    report = ChainSelection(0.1, stay=0.9, temperature=4).select(scores).report
    assert (report["chain"]["stay"], report["chain"]["temperature"]) == (0.9, 4.0)
    assert report["fit"]["fitted"] == ["prior"]
    assert ChainSelection(0.1, stay=0.9, temperature=4, prior=0.1).select(scores).report["fit"] is None


def test_a_large_set_is_fitted_on_some_of_its_rows_and_judged_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, truth = runs_of_harm(5, rows=300)
    scores = make_scores(tmp_path / "scores", rows)
    whole = ChainSelection(None).select(scores)
    monkeypatch.setattr("toss_lightning.selection.chain.FIT_TOKENS", len(truth) // 3)
    part = ChainSelection(None).select(scores)
    assert part.report["fit"]["tokens"] <= len(truth) // 3 < whole.report["fit"]["tokens"]
    assert (masked(part) == masked(whole)).mean() > 0.97
    assert part.digest() == ChainSelection(None).select(scores).digest()


def test_the_sample_that_is_fitted_keeps_its_rows_whole_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(6)
    rows = [generator.normal(0, 2, length).tolist() for length in (2, 90, 3, 70, 40, 2, 55, 120)]
    scores = make_scores(tmp_path / "scores", rows)
    monkeypatch.setattr("toss_lightning.selection.chain.FIT_TOKENS", 230)
    report = ChainSelection(0.1).select(scores).report
    free = [row[:-1] for row in scores.per_row(scores.score().astype(np.float64))]
    fits = []
    for chosen in itertools.chain.from_iterable(itertools.combinations(free, count) for count in range(1, 8)):
        if sum(map(len, chosen)) == report["fit"]["tokens"]:
            offsets = np.cumsum([0, *map(len, chosen)])
            sample = torch.from_numpy(np.concatenate(chosen))
            fits.append(fit(sample, offsets, START, {"stay", "temperature", "prior"}).chain._asdict())
    assert any(one == pytest.approx(report["chain"]) for one in fits)


def test_a_fitted_centre_sees_through_references_of_unequal_quality(tmp_path: Path) -> None:
    rows, truth = runs_of_harm(7)
    masks = []
    for at, shift in enumerate((0.0, 0.7)):
        moved = [[score + shift for score in row] for row in rows]
        scores = make_scores(tmp_path / f"scores-{at}", moved)
        masks.append(masked(ChainSelection(None, centre="fit").select(scores)))
    assert truth[masks[0]].mean() > 0.7
    assert (masks[0] == masks[1]).mean() > 0.999


def test_a_cut_that_takes_most_of_a_set_for_harmful_says_so(tmp_path: Path) -> None:
    rows, _ = runs_of_harm(8)
    scores = make_scores(tmp_path / "scores", [[score + 2 for score in row] for row in rows])
    with pytest.warns(
        UserWarning, match="takes 100% of the tokens for harmful.*set centre to held_out or fit, or discard"
    ):
        ChainSelection(None).select(scores)


def test_a_fit_that_has_not_converged_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = runs_of_harm(9)
    monkeypatch.setattr("toss_lightning.selection.chain.fit", partial(fit, max_iterations=2))
    with pytest.warns(UserWarning, match="EM had not converged after 2 iterations: give prior, stay, temperature"):
        ChainSelection(0.1).select(make_scores(tmp_path / "scores", rows))


def test_rows_that_are_only_an_end_are_left_alone(tmp_path: Path) -> None:
    weights = ChainSelection(None).select(make_scores(tmp_path / "scores", [[5.0], [5.0]]))
    assert not masked(weights).any()
    assert ChainSelection(0.4).select(make_scores(tmp_path / "two", [[5.0], [5.0, 1.0]])).report["masked"] == 1


def known(path: Path, rows: Sequence[Sequence[float]], kind: str = "utility_val") -> TokenScores:
    """A store of held-out rows inside another one."""
    return make_scores(path / kind, rows)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5])
def test_false_alarms_are_the_share_of_held_out_tokens_above_the_cut(tmp_path: Path, share: float) -> None:
    scores = some_scores(tmp_path / "scores")
    held_out = known(scores.path, runs_of_harm(5, rows=40, harmful=0.0)[0])
    weights = ChainSelection(None, 0.5, 0.8, 1.5, 0.3, false_alarms=share).select(scores)
    odds, theirs = (
        [alpha_beta(row[:-1].tolist(), 0.8, 1.5, 0.3) for row in one.per_row(one.score())] for one in (scores, held_out)
    )
    flat = np.sort(np.concatenate(theirs))[::-1]
    cut = flat[int(share * len(flat))]
    wanted = np.concatenate([np.append(row, 0.0) for row in odds]) > cut
    np.testing.assert_array_equal(masked(weights), wanted)
    assert weights.report["threshold"] is None
    assert 1 / (1 + math.exp(-weights.report["cut_log_odds"])) == pytest.approx(cut)


def test_the_middle_of_held_out_rows_undoes_a_shift_of_all_scores(tmp_path: Path) -> None:
    """Which references of unequal quality give them; the cut at 0 then takes all or nothing."""
    rows, truth = runs_of_harm(6)
    found: dict[str, list[np.ndarray]] = {"by held-out rows": [], "at 0": []}
    for shift in (-1.5, 0.0, 1.5):
        scores = make_scores(tmp_path / f"{shift}", [[value + shift for value in row] for row in rows])
        generator = np.random.default_rng(8)
        for kind, mean in (("utility_val", -0.5), ("harmful_val", 0.5)):
            known(scores.path, (mean + shift + generator.laplace(0, 1, (30, 60))).tolist(), kind)
        ours = ChainSelection(None, centre="held_out", false_alarms=0.05)
        found["by held-out rows"].append(masked(ours.select(scores)))
        found["at 0"].append(masked(ChainSelection(None).select(scores)))
        assert ours.select(scores).report["chain"]["centre"] == pytest.approx(shift, abs=0.05)
    for one in found["by held-out rows"]:
        assert one[truth].mean() > 0.8
        assert one[~truth].mean() < 0.1
    assert found["at 0"][0].mean() < 0.01
    assert found["at 0"][-1].mean() > 0.9


def test_held_out_rows_are_of_the_same_round(tmp_path: Path) -> None:
    two = [[-2.0, 0.0, 0.0], [0.0] * 3]
    scores = make_scores(tmp_path / "scores", [[0.0] * 3] * 2, two, later_rounds=[two])
    make_scores(scores.path / "utility_val", [[0.0] * 3], [[-1.0, 0.0, 0.0]], later_rounds=[[[-3.0, 0.0, 0.0]]])
    chain = ChainSelection(None, stay=0.0, prior=0.3, temperature=1.0, false_alarms=0.0)
    assert chain.select(TokenScores(scores.path, round=0)).report["masked"] == 1
    assert chain.select(TokenScores(scores.path, round=1)).report["masked"] == 0


def test_held_out_rows_must_have_been_scored(tmp_path: Path) -> None:
    assert [*ChainSelection(None).held_out] == []
    assert [*ChainSelection(None, false_alarms=0.2).held_out] == ["utility_val"]
    assert [*ChainSelection(centre="held_out").held_out] == ["utility_val", "harmful_val"]
    scores = make_scores(tmp_path / "scores", [[1.0, 2.0, 0.0]] * 2)
    with pytest.raises(StoreError, match="no scores of the utility_val set here: score with this selection first"):
        ChainSelection(None, false_alarms=0.2).select(scores)
    known(scores.path, [[0.0]])
    with pytest.raises(StoreError, match="utility_val: no token that may be masked, so that loop"):
        ChainSelection(None, false_alarms=0.2).select(scores)


def test_few_held_out_rows_are_said_to_be_few(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 2.0, 0.0]] * 2)
    known(scores.path, [[0.0, 1.0, 0.0]] * 9)
    with pytest.warns(UserWarning, match=r"false_alarms 0\.1 is less than one of the 9 held-out utility rows"):
        ChainSelection(None, false_alarms=0.1).select(scores)


@pytest.mark.parametrize(
    ("harmful", "message"),
    [
        ([[0.0, 0.5, 0.0]] * 9, r"by 9 and 9 held-out rows .* of utility rows is 0\.500, .* harmful ones 0\.250: too"),
        ([[0.0, 9.0, 0.0]], r"by 9 and 1 held-out rows .* too few rows \(standard error inf\)"),
        ([[0.0, 3.0, 0.0], [0.0, 4.0, 0.0]], ""),
    ],
)
def test_a_middle_of_rows_that_are_not_told_apart_is_warned_of(
    tmp_path: Path, harmful: list[list[float]], message: str
) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 2.0, 0.0]] * 2)
    known(scores.path, [[0.0, 1.0, 0.0]] * 9)
    known(scores.path, harmful, "harmful_val")
    chain = ChainSelection(0.2, stay=0.5, prior=0.1, temperature=1.0, centre="held_out")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = chain.select(scores).report
    assert report["chain"]["centre"] == (0.5 + np.mean([row[:2] for row in harmful])) / 2
    said = [str(one.message) for one in caught]
    assert len(said) == bool(message)
    assert not message or re.search(message, said[0])


def test_held_out_scores_that_are_all_the_same_set_no_cut(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 2.0, 0.0]] * 2)
    known(scores.path, [[1.0, 1.0, 1.0, 0.0]] * 30)
    with pytest.raises(StoreError, match="utility_val: all 90 tokens that may go have the same score"):
        ChainSelection(None, false_alarms=0.1, centre=0.5).select(scores)


def test_held_out_rows_of_other_adapters_are_refused(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 2.0, 0.0]] * 2)
    held_out = known(scores.path, [[0.0, 1.0, 0.0]] * 9)
    writer = ScoreWriter(held_out.path, held_out.fingerprints)
    writer.begin_column("degraded", "digest of another one", "plan")
    writer.append("degraded", 0, {row: np.zeros(3, dtype=np.float32) for row in range(9)})
    writer.end_column("degraded")
    with pytest.raises(StoreError, match="utility_val: scored with another degraded than the custom set"):
        ChainSelection(None, false_alarms=0.2).select(scores)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"discard": 1.0}, "selection.discard: 1.0 is not a share: give one in .* or null to go by threshold"),
        ({"discard": -0.1}, "selection.discard: -0.1 is not a share"),
        ({"threshold": 1.0}, "selection.threshold: 1.0 is no probability"),
        ({"threshold": 0.9}, "selection.threshold: the share of loop.selection.discard makes the cut: set discard to"),
        (
            {"discard": None, "threshold": 0.9, "false_alarms": 0.1},
            "selection.threshold: the share of loop.selection.false_alarms makes the cut: set false_alarms to null",
        ),
        ({"stay": 1.0}, "selection.stay: 1.0 is out of range"),
        ({"temperature": 0.0}, "selection.temperature: 0.0: give a number above 0, or fit"),
        ({"temperature": math.nan}, "selection.temperature: nan: give a number above 0, or fit"),
        ({"centre": math.inf}, "selection.centre: inf is no score: give a number, held_out or fit"),
        ({"centre": "middle"}, "selection.centre: middle is no score: give a number, held_out or fit"),
        ({"prior": 0.0}, "selection.prior: 0.0 is out of range"),
        ({"discard": None, "false_alarms": 1.0}, "selection.false_alarms: 1.0 is not a share: give one in"),
        ({"false_alarms": 0.1}, "selection.false_alarms: the share 0.1 of loop.selection.discard makes the cut"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_runs(given: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChainSelection(**given)


def test_more_than_may_be_masked(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, 0.0], [1.0, 0.0]])
    with pytest.raises(ConfigError, match="asks for 3 of 4 tokens, but only 2 are not end-of-turn tokens"):
        ChainSelection(0.9).select(scores)


def test_a_score_that_is_not_a_number_is_no_evidence(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores", [[1.0, math.nan, 0.0], [1.0, 2.0, 0.0]])
    with pytest.raises(StoreError, match="1 token scores are not a number: score the custom set again"):
        ChainSelection(None).select(scores)
