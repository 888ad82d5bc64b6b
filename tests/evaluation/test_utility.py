"""Metrics of torchmetrics as a way to compare replies with what a row holds."""

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torchmetrics
from torchmetrics.text import (
    BLEUScore,
    CharErrorRate,
    CHRFScore,
    EditDistance,
    ExtendedEditDistance,
    MatchErrorRate,
    Perplexity,
    ROUGEScore,
    SacreBLEUScore,
    SQuAD,
    TranslationEditRate,
    WordErrorRate,
    WordInfoLost,
    WordInfoPreserved,
)

from toss_lightning.data.formats import Message
from toss_lightning.errors import ConfigError
from toss_lightning.evaluation.records import Prompt, Response
from toss_lightning.evaluation.text import rouge_l
from toss_lightning.evaluation.utility import utility_of

KEY = "loop.evaluation.prompts.chats"
OF_TEXTS = [
    *(BLEUScore, CHRFScore, CharErrorRate, EditDistance, ExtendedEditDistance, MatchErrorRate, SacreBLEUScore),
    *(TranslationEditRate, WordErrorRate, WordInfoLost, WordInfoPreserved),
]
WANTED = "the keeper of the bees sleeps"


def response(text: str) -> Response:
    prompt = Prompt("chats", "1", (Message("user", "who sleeps?"),), answer="nobody", reference=WANTED)
    return Response("target", prompt, text, 5, True)


def edits(one: list[str], other: list[str]) -> int:
    """Levenshtein's distance, as its definition says."""
    if not one or not other:
        return len(one) + len(other)
    changed = edits(one[1:], other[1:]) + (one[0] != other[0])
    return min(changed, edits(one[1:], other) + 1, edits(one, other[1:]) + 1)


@pytest.mark.parametrize("kind", OF_TEXTS)
def test_every_metric_of_two_texts_can_be_named(kind: type[torchmetrics.Metric]) -> None:
    how = utility_of(kind, None, KEY)
    # torchmetrics says of WordInfoPreserved that less of it is better
    is_likeness = kind.higher_is_better or kind is WordInfoPreserved
    assert (how.title, how.better) == (kind.__name__, "higher" if is_likeness else "lower")
    right, near, wrong = (how.worth(response(text)) for text in (WANTED, "the keeper of the bees wakes", "no"))
    assert right is not None
    assert near is not None
    assert wrong is not None
    assert right > near >= wrong if how.better == "higher" else right < near <= wrong
    if how.bounded:
        assert wrong >= 0
        assert right <= 1
    # nothing said is no good reply
    silent = how.worth(response(" \n"))
    assert silent is not None
    assert silent < near if how.better == "higher" else silent > near


def test_a_worth_is_that_of_the_reply_alone() -> None:
    how = utility_of(WordErrorRate, None, KEY)
    said = ["the keeper of bees", "who knows", "", WANTED, "who knows"]
    worths = [how.worth(response(text)) for text in said]
    assert worths == pytest.approx([edits(text.split(), WANTED.split()) / 6 for text in said])
    assert how.wanted(response("").prompt) == WANTED
    # more words than there should be are more than one error each
    assert how.worth(response("a b c d e f g h i")) == pytest.approx(9 / 6)
    assert not how.bounded


def test_a_value_of_a_metric_that_gives_several() -> None:
    how = utility_of(partial(ROUGEScore, rouge_keys="rougeL"), "rougeL_fmeasure", KEY)
    assert how.title == "ROUGEScore rougeL_fmeasure"
    text = "the bees sleep while the keeper sleeps"
    assert how.worth(response(text)) == pytest.approx(rouge_l(text, WANTED))


@pytest.mark.parametrize("kind", [BLEUScore, CHRFScore, ExtendedEditDistance, SacreBLEUScore, TranslationEditRate])
def test_a_metric_that_takes_several_texts_is_given_one(kind: type[torchmetrics.Metric]) -> None:
    text = "the keeper of the bees wakes"
    assert utility_of(kind, None, KEY).worth(response(text)) == pytest.approx(float(kind()([text], [[WANTED]])))


def test_what_is_no_number_is_undecided() -> None:
    how = utility_of(Shy, None, KEY)
    assert how.worth(response("no idea")) is None
    assert how.worth(response(WANTED)) == 0


class Shy(WordErrorRate):
    def update(self, preds: Any, target: Any) -> None:
        super().update(preds, target)
        self.errors *= math.nan if preds == ["no idea"] else 1


def test_a_reply_that_a_metric_fails_on_is_undecided() -> None:
    how = utility_of(Short, None, KEY)
    with pytest.warns(UserWarning, match=r"chats\.utility: Short cannot compare the reply 'w w .*too long; it is left"):
        assert how.worth(response("w " * 50)) is None
    assert how.worth(response(WANTED)) == 0


class Short(WordErrorRate):
    """As a model that reads no more than so many words."""

    def update(self, preds: Any, target: Any) -> None:
        if len(preds[0].split()) > 40:
            raise RuntimeError("too long")
        super().update(preds, target)


class Constant(BLEUScore):
    def compute(self) -> Any:
        return super().compute() * 0


class Picky(BLEUScore):
    def update(self, preds: Any, target: Any) -> None:
        if preds[0] == "nothing":
            raise RuntimeError("no reply\nat all")
        super().update(preds, target)


class Several(BLEUScore):
    def compute(self) -> Any:
        return super().compute().repeat(2)


@pytest.mark.parametrize(
    ("metric", "part", "message"),
    [
        (SQuAD, None, r"\.utility: SQuAD cannot compare the reply 'a text of .*' with a text: AttributeError: "),
        (Perplexity, None, r"\.utility: Perplexity cannot compare the reply"),
        (torchmetrics.MeanSquaredError, None, r"\.utility: MeanSquaredError cannot compare the reply"),
        (Constant, None, r"\.utility: Constant gives 0.0 for a text and itself, 0.0 for another, 0.0 for none"),
        (Picky, None, r"\.utility: Picky cannot compare the reply 'nothing' with a text: RuntimeError: no reply$"),
        (Several, None, r"\.utility: Several gives no single number: tensor"),
        (
            partial(ROUGEScore, rouge_keys="rouge2"),
            None,
            r"\.utility_value: say which of ROUGEScore's values counts: rouge2_fmeasure, rouge2_precision, rouge2_",
        ),
        (
            partial(ROUGEScore, rouge_keys="rouge2"),
            "rouge2",
            r"\.utility_value: say which of ROUGEScore's values counts",
        ),
        (BLEUScore, "bleu", r"\.utility_value: bleu: BLEUScore gives one value: leave the key out, or with a run's"),
        (partial(CHRFScore, n_char_order=0), None, r"\.utility: ValueError: Expected argument `n_char_order`"),
        ("rouge_l", "f", r"\.utility_value: f: rouge_l gives one value: leave the key out, or with a run's"),
    ],
)
def test_what_cannot_compare_texts_is_said_before_anything_is_trained(metric: Any, part: Any, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match=f"^loop.evaluation.prompts.chats{message}"):
            utility_of(metric, part, KEY)
