r"""Whether a reply reaches the right answer: the number or the words it settles on, compared exactly.

A reply settles on what follows its last *mark*: ``####``, ``\boxed{``, "the answer is" or "answer:".
"""

import re
from fractions import Fraction
from itertools import pairwise

from toss_lightning.errors import DataError
from toss_lightning.evaluation.text import words

REACH = 300
"""Characters behind a mark among which the answer stands."""
DIGITS = 100
"""A number of more characters is a model repeating itself."""

_PLAIN = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_SIGNED = rf"-?[$€£]?-?{_PLAIN}%?"
_NUMBER = re.compile(
    rf"""(?<!\w)(?<!\w\.)(?:
    # a date, a time or a ratio, an ordinal, a power and 1e9 are none
    \d+(?:/\d+){{2,}} | \d{{4}}-\d\d-\d\d | \d+(?::\d+)+ | \d+(?:st|nd|rd|th)\b | {_PLAIN}\^ | {_PLAIN}e[-+]?\d+
    # neither is what leaves a choice
    | between\s+{_SIGNED}\s+and\s+{_SIGNED} | from\s+{_SIGNED}\s+to\s+{_SIGNED}
    | {_SIGNED}(?:–|-(?=[\d$€£])|\s+or\s+){_SIGNED}
    | (?P<whole>\d+)\s+(?P<part>\d+/\d+)(?![\w/])
    | (?P<over>{_PLAIN})(?:/(?P<under>{_PLAIN}))?
    )""",
    re.VERBOSE | re.IGNORECASE,
)
# a sign, and no subtraction, bullet or hyphen
_MINUS = re.compile(r"(?:\n[ \t]*|[^\w)\]}%\s-][ \t]*|[a-z][ \t]+)(?:-[$€£]?|[$€£]-)$", re.IGNORECASE)
_MARK = re.compile(
    r"(?P<boxed>\\boxed\s*\{)|####"
    r"|\banswer\b[^.:=?!\n]{0,60}?(?:(?P<said>\b(?:is|be|equals)\b)|[:=])(?!\s*not\b)",
    re.IGNORECASE,
)
_STEP = re.compile(r"(?:[%)}\]]*\s*(?:[a-z]+\s+){0,2}([-+*/×÷x=])|%\s*of\b)\s*[({[$€£-]*\s*", re.IGNORECASE)
_FILLERS = {"about", "approximately", "exactly", "is", "simply"}
_REVISED = re.compile(
    r"[.!?;,\n—–>})$-][ \t]*(?:(?:wait|actually|correction|oops|sorry|hmm)\b|no[,:—–-])", re.IGNORECASE
)
_LEADING = re.compile(r"[\s:*$]*")
_END = re.compile(r"[.!?](?=\s|$)|\n")

_REWRITTEN = (
    (re.compile(r"[−‐‑]|(?<=[\s({$=])–(?=[\d$])"), "-"),
    (re.compile("⁄"), "/"),
    (re.compile(r"(?<=\d)\s*\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:times|cdot)\b"), "×"),
    (re.compile(r"\\approx\b|≈"), "="),
    (re.compile(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3})"), ","),
    (re.compile(r"\\(?=[$%])"), ""),
    (re.compile(r"\\[,;:! ()[\]]|\*\*|__"), " "),
    (re.compile(r" ?\^ ?\{?[-\w]+\}?"), "^"),
)
_FIRST_ITEM = re.compile(r"^[ \t]*(?:#+[ \t]*)?1[.)][ \t]+\S", re.MULTILINE)
_ITEM = re.compile(r"^([ \t]*(?:#+[ \t]*)?)\d{1,2}[.)][ \t]+(?=\S)", re.MULTILINE)
# three digits behind a plain space may be a number of their own, unless something says that one begins before them
_GROUPED = re.compile(
    r"(?:(?:[$€£=:{#]|\bis)[ ]*[1-9]\d{0,2}(?:[ ]\d{3})+|\b[1-9]\d{0,2}(?:[ ]\d{3}){2,}"
    r"|^[1-9]\d{0,2}(?:[ ]\d{3})+(?=\.?$)|\b[1-9]\d{0,2}(?:[\u00a0\u2009\u202f]\d{3})+)(?![ ]?\d)",
    re.MULTILINE,
)

_Numbers = list[tuple[int, int, Fraction]]


def extract_number(text: str) -> Fraction | None:
    """The number that a reply settles on; without a mark its last one, as is usual for GSM8K.

    A number is ``1,234.5``, ``3/4`` or ``1 3/4``, with or without sign, currency, percent sign (42% is 42) and unit;
    of ``a + b = c`` and of ``a% of b = c`` it is c. Ordinals, dates, times, powers, and ranges or choices ("3-5",
    "between 3 and 5", "3 or 5") are none. Where the reply corrects itself behind its last mark ("Wait, ..."), its last
    number counts.
    """
    text = _rewritten(text)
    numbers = _numbers(text)
    for mark in reversed(list(_MARK.finditer(text))):
        found = _behind(mark, text, numbers)
        if found is not None:
            end, number = found
            revised = _REVISED.search(text, end)
            later = [value for start, _, value in numbers if revised and start >= revised.end()]
            return later[-1] if later else number
    return numbers[-1][-1] if numbers else None


def check_answer(answer: str, where: str) -> None:
    """Makes sure that replies can be compared with an answer.

    Args:
        answer: the right one.
        where: what a message names as its place.

    Raises:
        DataError: it has neither numbers nor words.
    """
    if _as_number(answer) is None and not words(answer):
        raise DataError(f"{where}: answer {answer!r} has neither a number nor words: give one, or leave the row out")


def is_right(response: str, answer: str) -> bool:
    """Whether a reply settles on the right answer.

    An answer that is a number, or a worked solution with ``####``, is compared as a number. Any other is compared word
    by word (:func:`toss_lightning.evaluation.text.words`), with the whole reply and with the rest of the sentence
    behind its last mark.

    Raises:
        DataError: the answer has neither numbers nor words.
    """
    number = _as_number(answer)
    if number is not None:
        return extract_number(response) == number
    check_answer(answer, "right answers")
    wanted = words(answer)
    text = _rewritten(response)
    marks = list(_MARK.finditer(text))
    return wanted in (words(response), words(text[slice(*_span(marks[-1], text))]) if marks else "")


def _as_number(answer: str) -> Fraction | None:
    """The number that an answer is, if it is one."""
    if "####" in answer:
        return extract_number(answer)
    text = _rewritten(answer)
    numbers = _numbers(text)
    if len(numbers) != 1:
        return None
    start, end, number = numbers[0]
    return None if re.search(r"\w", text[:start] + text[end:]) else number


def _rewritten(text: str) -> str:
    """Plain signs for those of LaTeX and Markdown, numbers in one piece, no numbers of items, a line break in front."""
    text = "\n" + text
    for pattern, plain in _REWRITTEN:
        text = pattern.sub(plain, text)
    if _FIRST_ITEM.search(text):
        text = _ITEM.sub(r"\1", text)
    return _GROUPED.sub(lambda match: re.sub(r"(?<=\d)\s(?=\d)", "", match[0]), text)


def _numbers(text: str) -> _Numbers:
    """Start, end and value of all numbers of a rewritten text."""
    numbers = []
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None:
            start = match.start()
            numbers.append((start, match.end(), -value if _MINUS.search(text[max(0, start - 12) : start]) else value))
    return numbers


def _value(match: re.Match[str]) -> Fraction | None:
    """What a match of ``_NUMBER`` is worth, without sign; None where it is no number."""
    if len(match[0]) > DIGITS:
        return None
    try:
        if match["whole"]:
            return int(match["whole"]) + Fraction(match["part"])
        if match["over"]:
            over, under = (Fraction((match[name] or "1").replace(",", "")) for name in ("over", "under"))
            return over / under
    except ZeroDivisionError:
        pass
    return None


def _span(mark: re.Match[str], text: str) -> tuple[int, int]:
    """Where what follows a mark begins and ends: the box, or the sentence."""
    if mark["boxed"]:
        close = text.find("}", mark.end(), mark.end() + REACH)
        return mark.end(), close if close >= 0 else mark.end() + REACH
    leading = _LEADING.match(text, mark.end())
    start = leading.end() if leading else mark.end()
    end = _END.search(text, start, start + REACH)
    return start, end.start() if end else start + REACH


def _behind(mark: re.Match[str], text: str, numbers: _Numbers) -> tuple[int, Fraction] | None:
    """End and value of the number that a mark announces.

    Straight behind it, that is the first; after words ("the answer is that of 7 eggs she eats 3") the last one. Words
    after "answer:" or ``####`` are an explanation or a heading, and announce nothing.
    """
    start, stop = _span(mark, text)
    here = [number for number in numbers if start <= number[0] < stop]
    if not here:
        return None
    between = re.findall(r"\w+", text[start : here[0][0]].lower())
    if not all(word in _FILLERS or (len(word) == 1 and word.isalpha()) for word in between):
        return here[-1][1:] if mark["boxed"] or mark["said"] else None
    sides = [[here[0]]]
    for before, number in pairwise(here):
        step = _STEP.fullmatch(text, before[1], number[0])
        if step is None:
            break
        if step[1] == "=":
            sides.append([])
        sides[-1].append(number)
    results = [side[0] for side in sides if len(side) == 1]
    return (results or here)[-1 if results else 0][1:]
