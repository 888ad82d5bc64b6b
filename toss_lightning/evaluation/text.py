"""Words of a text in any script, for what is compared word by word."""

import re
import unicodedata

from torchmetrics.functional.text import rouge_score

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Characters, as a regular expression names them, of scripts that put no space between words: Thai, Lao, Burmese,
Khmer, Japanese, Chinese. Each counts as a word of its own, with the marks that follow it."""
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)
MARKS = "".join(
    chr(code)
    for code in range(0x300, 0x20000)
    if unicodedata.category(chr(code)) in ("Mn", "Mc") and code not in _VARIATION_SELECTORS
)
"""Characters that belong to the letter before them, as many vowels do in Devanagari; ``\\w`` of ``re`` knows none."""
_WORD = re.compile(rf"[{UNSPACED}][{MARKS}]*|[^\s{UNSPACED}]+")
_OTHERS = re.compile(rf"(?:[^\w{MARKS}]|_)+")


def words(text: str) -> str:
    """Letters and digits without case, all else one space: ``"Yes,  B!"`` is ``"yes b"``."""
    return " ".join(_OTHERS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).split())


def beginning(text: str, count: int) -> str:
    """A text up to the end of so many of its words."""
    ends = [match.end() for match, _ in zip(_WORD.finditer(text), range(count), strict=False)]
    return text[: ends[-1]] if ends else ""


def rouge_l(reply: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (ROUGE-L, Lin 2004); 0 where either has none."""
    # torchmetrics' own rules know no letters but a to z
    scores = rouge_score(reply, reference, normalizer=words, tokenizer=_WORD.findall, rouge_keys="rougeL")
    return float(scores["rougeL_fmeasure"])
