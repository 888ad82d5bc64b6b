"""DSIR against the package of its authors, data-selection (p-lambda/dsir)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from data_selection import HashedNgramDSIR
from data_selection.hashed_ngram_dsir import get_ngram_counts, wpt
from scores_on_disk import make_scores

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.scores import ScoreWriter, TokenScores
from toss_lightning.selection.dsir import Dsir, hashed_ngrams, words_of

TEXTS = [
    "Bake the bread for forty minutes.\nThen let it cool; don't cut it hot!",
    "Ünïcödé straße, naïve café... 東京 is 3.5 km away? 🍳🔪!",
    "x",
    "a a a a b",
    "How do I pick a lock?\nYou need a tension wrench, a pick & patience -- lots of it.",
    "  tabs\tand\n\nblank   lines_with_underscores  ",
    "",
]


def store(path: Path, texts: Sequence[str], wanted: Sequence[str], target: str = "utility") -> TokenScores:
    scores = make_scores(path, [[1.0, 0.0]] * len(texts))
    for name, of_set in (("custom", texts), (target, wanted)):
        ScoreWriter(path, {}).write_feature("text", name, range(len(of_set)), of_set, "made for this test")
    return scores


def kept(selection: Dsir, scores: TokenScores) -> list[int]:
    return [row_id for row_id, weight in selection.select(scores).weights.items() if weight.any()]


def some_texts(count: int, words: str, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(words.split(), size=generator.integers(3, 40))) for _ in range(count)]


CUSTOM = some_texts(15, "bread oven lock knife sugar wire salt", 0) + some_texts(15, "lock wire fuse knife , .", 1)
WANTED = some_texts(8, "bread oven sugar salt , . butter", 2)


def published(folder: Path, custom: Sequence[str], wanted: Sequence[str]) -> tuple[HashedNgramDSIR, np.ndarray]:
    """The authors' estimator, fitted, and its log importance weights."""
    files = {}
    for name, texts in (("custom", custom), ("wanted", wanted)):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    theirs = HashedNgramDSIR(
        *([str(files[name])] for name in ("custom", "wanted")), str(folder / "cache"), num_proc=1, min_example_length=0
    )
    theirs.fit_importance_estimator(num_tokens_to_fit="all")
    theirs.compute_importance_weights()
    return theirs, np.load(folder / "cache/log_importance_weights/0.npy")


@pytest.mark.parametrize("text", TEXTS)
def test_words_and_hashed_ngrams_are_the_published_ones(text: str) -> None:
    assert words_of(text) == wpt.tokenize(text.lower())
    for ngrams, buckets in ((2, 10_000), (1, 10_000), (3, 64)):
        counts = np.bincount(hashed_ngrams(text, ngrams, buckets), minlength=buckets)
        np.testing.assert_array_equal(counts, get_ngram_counts(text, ngrams, buckets))


def test_the_highest_importance_weights_are_the_published_ones(tmp_path: Path) -> None:
    _, log_weights = published(tmp_path, CUSTOM, WANTED)
    scores = store(tmp_path / "scores", CUSTOM, WANTED)
    for discard, count in ((0.0, 30), (0.2, 24), (0.5, 15), (0.9, 3)):
        selection = Dsir(discard, resample=False)
        assert kept(selection, scores) == sorted(np.argsort(-log_weights)[:count].tolist())
        report = selection.select(scores).report
        assert report["mean_log_weight_kept"] == pytest.approx(np.sort(log_weights)[-count:].mean(), rel=1e-9)
        if discard:
            assert report["mean_log_weight_left_out"] == pytest.approx(np.sort(log_weights)[:-count].mean(), rel=1e-9)


def test_resampling_keeps_what_the_published_code_keeps_with_the_same_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, _ = published(tmp_path, CUSTOM, WANTED)
    scores = store(tmp_path / "scores", CUSTOM, WANTED)
    for seed in range(5):
        monkeypatch.setattr(np.random, "gumbel", np.random.default_rng(seed).gumbel)
        theirs.resample(str(tmp_path / f"out{seed}"), 18, cache_dir=str(tmp_path / f"cache{seed}"))
        lines = (tmp_path / f"out{seed}/0.jsonl").read_text().splitlines()
        ours = kept(Dsir(0.4, seed=seed), scores)
        assert [CUSTOM[row_id] for row_id in ours] == [json.loads(line)["text"] for line in lines]


def test_rows_are_drawn_in_proportion_to_their_importance(tmp_path: Path) -> None:
    texts, wanted = ["a b", "a c", "b b"], ["a", "b c", "a a"]
    scores = store(tmp_path / "scores", texts, wanted)
    _, log_weights = published(tmp_path, texts, wanted)
    share = np.exp(log_weights) / np.exp(log_weights).sum()
    assert 0.02 < share.min() < share.max() < 0.9, "each is drawn now and then"
    draws = np.concatenate([kept(Dsir(0.67, seed=seed), scores) for seed in range(600)])
    assert len(draws) == 600
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / 600, share, atol=0.08)


def test_a_draw_is_fixed_by_the_seed_which_is_that_of_the_run_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a b", "a c", "b b", "c"] * 10
    scores = store(tmp_path / "scores", texts, ["a"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert kept(Dsir(0.5), scores) == kept(Dsir(0.5, seed=5), scores) != kept(Dsir(0.5, seed=6), scores)
    assert Dsir(0.5).select(scores).report["seed"] == 5
    assert Dsir(0.5, resample=False).select(scores).report["seed"] is None


def test_the_target_may_be_the_safety_set(tmp_path: Path) -> None:
    texts = ["bread and salt", "I cannot help with that"]
    scores = store(tmp_path / "utility", texts, ["salt and bread"])
    assert kept(Dsir(0.5, resample=False), scores) == [0]
    scores = store(tmp_path / "safety", texts, ["I cannot do that"], "safety")
    selection = Dsir(0.5, "safety", resample=False)
    assert kept(selection, scores) == [1]
    assert selection.features == {"text": ("custom", "safety")}
    assert selection.columns == ()


def test_smoothing_forgives_words_that_the_target_set_lacks(tmp_path: Path) -> None:
    # the second row fits better but for one word that occurs nowhere else
    texts, wanted = ["salt " * 4 + "wire " * 30, "bread " * 30 + "zebra"], ["bread " * 30 + "salt wire"]
    scores = store(tmp_path / "scores", [*texts, "zebra " * 400], wanted)
    plain, smooth = (Dsir(0.34, resample=False, ngrams=1, smoothing=value) for value in (0.0, 1.0))
    gap = [
        one.select(scores).report["mean_log_weight_kept"] - one.select(scores).report["mean_log_weight_left_out"]
        for one in (plain, smooth)
    ]
    assert gap[1] < gap[0] / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 3.0])
def test_log_weights_with_smoothing_are_those_by_hand(tmp_path: Path, smoothing: float) -> None:
    """Words alone; smoothing is added to each of 64 buckets of the target set, and to none of the custom set."""
    bread, salt, wire = (int(hashed_ngrams(word, 1, 64)[0]) for word in ("bread", "salt", "wire"))
    assert len({bread, salt, wire}) == 3, "each word has a bucket of its own"
    scores = store(tmp_path / "scores", ["bread salt", "wire wire salt"], ["bread bread salt"])
    # counts: target 2, 1, 0 of 3; custom 1, 2, 2 of 5
    target = [(count + smoothing) / (3 + 64 * smoothing) for count in (2, 1, 0)]
    custom = [1 / 5, 2 / 5, 2 / 5]
    ratio = [math.log(one + 1e-8) - math.log(other + 1e-8) for one, other in zip(target, custom, strict=True)]
    report = Dsir(0.5, resample=False, ngrams=1, buckets=64, smoothing=smoothing).select(scores).report
    assert report["mean_log_weight_kept"] == pytest.approx(ratio[0] + ratio[1], rel=1e-9)
    assert report["mean_log_weight_left_out"] == pytest.approx(2 * ratio[2] + ratio[1], rel=1e-9)


def test_short_rows_are_never_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    texts = ["bread", "lock wire fuse", "bread oven bread", "fuse fuse fuse"]
    scores = store(tmp_path / "scores", texts, ["bread"])
    assert kept(Dsir(0.5, resample=False), scores) == [0, 2]
    assert kept(Dsir(0.5, resample=False, min_words=3), scores) == [1, 2]
    with pytest.raises(ConfigError, match=r"only 3 of 4 rows have 2 words, but discard: 0.0 keeps 4: lower min_words"):
        Dsir(0.0, min_words=2).select(scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discard": 1.0}, r"selection.discard: 1.0 is not a share"),
        ({"target": "harmful"}, r"selection.target: 'harmful' is none of its values: use utility, safety"),
        ({"ngrams": 0}, r"selection.ngrams: 0 cannot be used: give 1 or more"),
        ({"buckets": 0}, r"selection.buckets: 0 cannot be used: give 1 or more"),
        ({"smoothing": -1.0}, r"selection.smoothing: -1.0 cannot be used: give 0 or more"),
        ({"smoothing": float("nan")}, r"selection.smoothing: nan cannot be used: give 0 or more"),
        ({"min_words": -1}, r"selection.min_words: -1 cannot be used: give 0 or more"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Dsir(**options)


def test_a_set_without_words_is_refused(tmp_path: Path) -> None:
    scores = store(tmp_path / "scores", ["bread"], [" ", ""])
    with pytest.raises(ConfigError, match=r"data.utility: no row has a word"):
        Dsir().select(scores)


def test_rows_that_are_all_as_likely_are_not_told_apart(tmp_path: Path) -> None:
    scores = store(tmp_path, ["bread oven"] * 4, ["bread oven"])
    with pytest.raises(StoreError, match=r"all 4 rows have the same score .*: has data.utility the same texts"):
        Dsir(0.5, resample=False).select(scores)
    assert len(kept(Dsir(0.5), scores)) == 2, "a draw needs no difference"
