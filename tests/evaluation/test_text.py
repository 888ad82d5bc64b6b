import pytest

from toss_lightning.data.formats import Message
from toss_lightning.evaluation.judges import KeywordJudge
from toss_lightning.evaluation.judges.keyword import normalised
from toss_lightning.evaluation.records import Prompt, Response
from toss_lightning.evaluation.text import beginning, rouge_l, words

PAIRS = {
    "Hindi": ("लड़का", "लड़की"),
    "Bengali": ("বাড়ি", "বাড়ী"),
    "Tamil": ("வா", "வீ"),
    "Thai": ("มือ", "มื้อ"),
    "Hebrew, pointed": ("סֵפֶר", "סַפָּר"),
}
"""Two words that differ in marks alone."""


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_vowel_sign_is_part_of_its_word(pair: tuple[str, str]) -> None:
    one, other = pair
    assert words(one) != words(other)
    assert normalised(one) != normalised(other)
    assert rouge_l(one, one) == pytest.approx(1)
    assert rouge_l(one, other) < 1


def test_a_word_stays_whole() -> None:
    assert words("दिल्ली, Über_x!") == "दिल्ली über x"
    assert words("☝️ ok 1️⃣") == "ok 1"
    # a letter of Thai is a word, with the marks above it
    assert beginning("ที่นี่ดี", 2) == "ที่นี่"


def test_a_phrase_is_found_by_its_marks() -> None:
    judge = KeywordJudge(phrases=["नहीं कर सकता"])
    replies = ["क्षमा करें, मैं यह नहीं कर सकता।", "मैं यह नहीं कर सकती।", "कानहीं कर सकता"]
    prompt = Prompt("mine", "1", (Message("user", "Ask"),), "harmful")
    verdicts = judge.judge([Response("base", prompt, reply, 5, True) for reply in replies])
    assert [one.refused for one in verdicts] == [True, False, False]
