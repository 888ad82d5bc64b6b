"""The number a reply settles on, against replies read by a person."""

from fractions import Fraction

import pytest

from toss_lightning.errors import DataError
from toss_lightning.evaluation.answers import extract_number, is_right, words

MARKED = [
    ("6 * 7 = 42\n#### 42", "42"),
    ("#### $1,234.50", "1234.5"),
    ("#### -7", "-7"),
    ("####42 apples", "42"),
    ("The answer is 42.", "42"),
    ("So the final answer is: **42**", "42"),
    ("**Answer:** 18 dollars", "18"),
    ("Answer:\n\n42", "42"),
    ("answer = 42", "42"),
    ("The answer to question 3 is 42.", "42"),
    ("The correct answer should be about 42 km.", "42"),
    (r"Therefore $x = \boxed{42}$.", "42"),
    (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{-\dfrac{3}{4}}", "-3/4"),
    (r"\boxed{1\frac{3}{4}}", "7/4"),
    (r"\boxed{\$1{,}234}", "1234"),
    (r"\boxed{1\,234\text{ m}}", "1234"),
    (r"\boxed{x = 5 \text{ cm}^2}", "5"),
    (r"\boxed{ 42\% }", "42"),
    ("The answer is:\n\\[\n42\n\\]", "42"),
    ("The answer is:\n$$\nx = 42\n$$", "42"),
    ("The answer is 40 + 2 = 42.", "42"),
    ("The answer is 6 eggs x 7 = 42 eggs.", "42"),
    ("The answer is 10% of 420 = 42.", "42"),
    ("The answer is 42% of all.", "42"),
    ("The answer is 42% of 100 marbles.", "42"),
    ("The answer is 42, since 6 × 7 is 30 + 12.", "42"),
    ("The answer is 42 = 6 × 7.", "42"),
    ("The answer is 10-3=7.", "7"),
    ("Answer: 12/4 = 3 per child", "3"),
    ("The answer is 42 - 10 more than before.", "42"),
    ("The answer is 1 234 euros.", "1234"),
    ("The answer is −5 degrees.", "-5"),
    ("The answer is –5.", "-5"),
    ("The answer is -$5.", "-5"),
    ("The answer is $-5.", "-5"),
    ("The answer is .5", "1/2"),
    ("The answer is 42.0.", "42"),
]
PLAIN = [
    ("42", "42"),
    ("42.", "42"),
    ("1 234", "1234"),
    ("There are 1 234 567 stars.", "1234567"),
    ("There are 12\u202f345 stars.", "12345"),
    ("She pays $1 250 for it.", "1250"),
    ("She makes 9 * 2 = $18 every day.", "18"),
    ("16 - 3 - 4 = 9, and 9 * $2 = $18", "18"),
    ("It costs $1,234.50 in all.", "1234.5"),
    ("That is 42% of them", "42"),
    ("They walk 42km.", "42"),
    ("He eats 3/4 of the cake.", "3/4"),
    ("He needs 1 3/4 cups.", "7/4"),
    ("The temperature is -5 °C", "-5"),
    ("10 - 5", "5"),
    ("10 -5", "5"),
    ("- 5 apples", "5"),
    ("It is 42 cm^2.", "42"),
    ("2^3 = 8", "8"),
    ("1. Add 40.\n2. Add 2, which is 42.\n3. Done.", "42"),
    ("42. That is all there is to say.", "42"),
    ("<<48/2=24>>24 clips", "24"),
]
ADVERSARIAL = [
    ("Of 3 cats and 4 dogs, 2 left. The answer is 5 of 7.", "5"),
    ("In 2019 she had 5, in 2021 twice that. The answer is 10 in 2021.", "10"),
    ("The answer is that in 2021 she had 42 apples.", "42"),
    ("The answer is between 3 and 5, so 4.", "4"),
    ("It is between 3 and 5 cats, hence I say 4", "4"),
    ("It takes 3-5 days for 20 km, 4 on average; the answer is 4.", "4"),
    ("The answer is 12. Wait, 12 -> the answer is 14", "14"),
    ("#### 12\nWait, I forgot the 2 others. #### 14", "14"),
    ("The answer is 12. Wait, that forgets two. It must be 14.", "14"),
    ("The answer is 12 -> no, 14", "14"),
    (r"\boxed{12} Hmm, let me check: 7 * 2 = 14.", "14"),
    ("The answer is 12, and no other 3 boxes are left.", "12"),
    ("The answer is not 12, it is 14.", "14"),
    ("The answer isn't 12 but 14.", "14"),
    ("The answer is 14. I first thought of 12.", "14"),
    ("Answer: She has 3 cats. She buys 4 more, so there are 7.", "7"),
    ("#### Step 1: add\n3 + 4 = 7", "7"),
    ("#### 1. Add\n3 + 4 = 7\n#### 2. Say it\nSeven is what we get", "7"),
    ("Answer:\n1. She has 3 cats.\n2. She buys 4, which makes 7.", "7"),
    ("He comes 1st at 10:30 on 05/12/2024 and 2024-12-05 with 42 points, for the 2nd time", "42"),
    ("The answer is about to come. 40 + 2 = 42", "42"),
    ("Final answer: 1,2 and then 1,2345", "1"),
]
NONE = ["", "I cannot help with that.", "The answer is 3 or 4.", "between 3 and 5", "$3-$5", "10:30", "1/0", "10^4",
        "1e999999999", "H2O and v1.2.3"]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), MARKED + PLAIN + ADVERSARIAL)
def test_the_number_that_a_person_reads(text: str, number: str) -> None:
    assert extract_number(text) == Fraction(number)


@pytest.mark.parametrize("text", NONE)
def test_replies_without_a_number(text: str) -> None:
    assert extract_number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "1 ",
        " ",
        "\n",
        "the answer is ",
        "\\boxed{",
        "1,111",
        "answer: 1 + ",
        "####",
        "- ",
        "1/",
        "answer is 1.\n",
        "x^",
    ],
)
def test_a_model_that_repeats_itself_is_read_all_the_same(text: str) -> None:
    text *= 50_000 // len(text)  # what takes quadratic time would not end here
    for tail in ("", "?"):
        extract_number(text + tail)
        is_right(text + tail, "words")
    assert extract_number(f"{text} The answer is 42.") == 42


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("That makes $18.00 a day.", "18"),
        ("The answer is 1,234.", "1234"),
        ("The answer is 1234", "1,234"),
        ("#### 18", "She sells 9 for $2 each: 9 * 2 = <<9*2=18>>18\n#### 18"),
        ("0.75", "3/4"),
        ("It is 42 %.", "42%"),
        ("Yes.", "yes"),
        ("The answer is  YES!", "yes"),
        (r"Thus \boxed{\text{New York}}.", "new-york"),
        ("Answer: (B)", "B"),
        ("ｆｕｌｌ width", "full width"),
        ("10:30", "10:30"),
    ],
)
def test_right_answers(response: str, answer: str) -> None:
    assert is_right(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 12 or 18.", "18"),
        ("Of 18 she eats 3. The answer is 15.", "18"),
        ("-18", "18"),
        ("I do not know.", "18"),
        ("", "18"),
        ("", "yes"),
        ("Yes and no.", "yes"),
        ("The answer is no. Yes is wrong.", "yes"),
        ("3.5", "version 35"),
        ("0.42", "42%"),
    ],
)
def test_wrong_answers(response: str, answer: str) -> None:
    assert not is_right(response, answer)


def test_words() -> None:
    assert words("  The  U.S., “B_c”! ") == "the u s b c"


def test_an_answer_that_is_nothing() -> None:
    with pytest.raises(DataError, match=r"answer ' \?' has neither a number nor words: give one, or leave the row out"):
        is_right("yes", " ?")
