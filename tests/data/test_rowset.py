"""A set knows what became of every row that was read for it."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from toss_lightning.data import rowset
from toss_lightning.data.rowset import RowSet, load_rows, overlaps
from toss_lightning.data.tokenize import ChatTokenizer, TokenizedRow
from toss_lightning.errors import DataError

WORDS = ["<unk>", "User", "Bot", "</s>", *(f"w{number}" for number in range(30))]
TEMPLATE = (
    "{% for m in messages %}{{ 'User ' if m.role == 'user' else 'Bot ' }}{{ m.content }}"
    "{{ ' </s> ' if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'Bot ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    """A row of p prompt words and r reply words is 3 + p + r tokens: User, Bot and </s> beside the words."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return ChatTokenizer(fast)


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{(start + number) % 30}" for number in range(count))


def write(path: Path, sizes: list[tuple[int, int]], start: int = 0) -> str:
    """Rows of so many prompt and reply words."""
    rows = [
        {"prompt": words(prompt, start + number), "completion": words(reply, start + number)}
        for number, (prompt, reply) in enumerate(sizes)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


SIZES = [(2, 3), (1, 9), (9, 2), (2, 4)]  # 8, 13, 14 and 9 tokens


def lengths(rows: RowSet) -> dict[int, int]:
    return {row.row_id: len(row.input_ids) for row in rows.rows}


# --- large sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("show", "patience", "seen"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)])
def test_a_bar_shows_how_far_a_set_is_that_takes_long(chat, tmp_path, monkeypatch, capsys, show, patience, seen):
    monkeypatch.setattr(rowset, "PATIENCE", patience)
    load_rows("custom", write(tmp_path / "rows.jsonl", SIZES), chat, max_length=14, show=show)
    assert ("reading custom: 100%" in capsys.readouterr().err) == seen


# --- long rows ----------------------------------------------------------------------------------------------------


def test_rows_that_fit_are_all_kept(chat, tmp_path):
    rows = load_rows("custom", write(tmp_path / "rows.jsonl", SIZES), chat, max_length=14, overlong="error")
    assert lengths(rows) == {0: 8, 1: 13, 2: 14, 3: 9}
    assert (rows.name, rows.read, rows.overlong, rows.truncated) == ("custom", 4, 0, 0)


def test_long_rows_are_dropped_and_counted(chat, tmp_path):
    rows = load_rows("custom", write(tmp_path / "rows.jsonl", SIZES), chat, max_length=9)
    assert lengths(rows) == {0: 8, 3: 9}
    assert (rows.read, rows.overlong, rows.truncated, rows.without_response) == (4, 2, 0, 0)


def test_long_rows_are_truncated_and_counted_and_dropped_where_no_response_is_left(chat, tmp_path):
    rows = load_rows("custom", write(tmp_path / "rows.jsonl", SIZES), chat, max_length=9, overlong="truncate")
    assert lengths(rows) == {0: 8, 1: 9, 3: 9}
    assert (rows.read, rows.overlong, rows.truncated, rows.without_response) == (4, 0, 1, 1)
    cut = rows.rows[1]
    assert cut.response_positions.tolist() == [3, 4, 5, 6, 7, 8]
    assert not cut.end_of_turn.any()


def test_a_long_row_can_be_an_error(chat, tmp_path):
    path = write(tmp_path / "rows.jsonl", SIZES)
    with pytest.raises(DataError) as caught:
        load_rows("custom", path, chat, max_length=9, overlong="error")
    assert str(caught.value) == (
        f"{path}:2: 13 tokens, but data.max_length is 9: raise it, or set data.overlong to drop or truncate"
    )


@pytest.mark.parametrize(
    ("overlong", "counts"),
    [("drop", "4 longer than data.max_length (2), 0"), ("truncate", "0 longer than data.max_length (2), 4")],
)
def test_no_rows_left(chat, tmp_path, overlong, counts):
    with pytest.raises(DataError) as caught:
        load_rows("utility", write(tmp_path / "rows.jsonl", SIZES), chat, max_length=2, overlong=overlong)
    assert str(caught.value) == (
        f"data.utility: no rows left of 4: 0 bad, {counts} without a response token once truncated"
    )


# --- bad rows -----------------------------------------------------------------------------------------------------


def test_bad_rows_are_counted_whether_they_cannot_be_read_or_rendered(chat, tmp_path):
    user, bot = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
    unreadable, unrendered = [user, {**bot, "content": ""}], [bot, user, bot]
    path = tmp_path / "rows.jsonl"
    chats = [[user, bot], unreadable, unrendered, [user, bot, user, bot]]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"data\.custom: bad rows are left out, 2 of 4\. .*:2: empty reply.*; "):
        rows = load_rows("custom", str(path), chat, max_length=100, bad_rows="drop")
    assert lengths(rows) == {0: 5, 3: 10}
    assert (rows.read, rows.bad) == (4, 2)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: empty reply"):
        load_rows("custom", str(path), chat, max_length=100)


def test_only_bad_rows(chat, tmp_path):
    path = write(tmp_path / "rows.jsonl", [(2, 0), (3, 0)])
    with pytest.raises(
        DataError, match=r"^data\.custom: no rows left of 2: 2 bad \(the first: .*jsonl:1: .*\), 0 longer"
    ):
        load_rows("custom", path, chat, max_length=100, bad_rows="drop")


# --- counts -------------------------------------------------------------------------------------------------------


def test_counts_of_a_set_made_by_hand():
    def row(row_id, length, response):
        at = np.arange(length - response, length, dtype=np.int32)
        return TokenizedRow(row_id, np.zeros(length, dtype=np.int32), at, np.zeros(response, dtype=bool))

    rows = RowSet(
        "custom", [row(0, 10, 4), row(3, 30, 6)], "d", read=9, bad=1, overlong=4, truncated=1, without_response=2
    )
    assert rows.counts() == {
        "set": "custom",
        "rows": 2,
        "tokens": 40,
        "response_tokens": 10,
        "dropped": 7,
        "dropped_bad": 1,
        "dropped_overlong": 4,
        "dropped_without_response": 2,
        "truncated": 1,
        "longest": 30,
        "prompt_share": 0.75,
    }


def test_counts_of_a_set_that_was_read(chat, tmp_path):
    counts = load_rows("custom", write(tmp_path / "rows.jsonl", SIZES), chat, 9, overlong="truncate").counts()
    assert counts == {
        "set": "custom",
        "rows": 3,
        "tokens": 26,
        "response_tokens": 4 + 6 + 5,
        "dropped": 1,
        "dropped_bad": 0,
        "dropped_overlong": 0,
        "dropped_without_response": 1,
        "truncated": 1,
        "longest": 9,
        "prompt_share": pytest.approx(11 / 26),
    }


# --- holding out --------------------------------------------------------------------------------------------------


@pytest.fixture
def twenty(chat, tmp_path) -> RowSet:
    return load_rows("utility", write(tmp_path / "rows.jsonl", [(2, 2 + number) for number in range(20)]), chat, 99)


@pytest.mark.parametrize(("share", "held"), [(0.1, 2), (0.5, 10), (0.001, 1), (0.999, 19), (0.25, 5)])
def test_a_split_takes_the_share_and_empties_neither_side(twenty, share, held):
    kept, out = twenty.split(share, "utility_val")
    assert (kept.name, out.name) == ("utility", "utility_val")
    assert (len(kept.rows), len(out.rows)) == (20 - held, held)
    ids = [{row.row_id for row in part.rows} for part in (kept, out)]
    assert ids[0] | ids[1] == {row.row_id for row in twenty.rows}
    assert not ids[0] & ids[1]


def test_a_split_of_two_rows_leaves_one_on_each_side(chat, tmp_path):
    rows = load_rows("harmful", write(tmp_path / "rows.jsonl", [(2, 2), (2, 3)]), chat, 99)
    for share in (0.01, 0.5, 0.99):
        assert [len(part.rows) for part in rows.split(share, "harmful_val")] == [1, 1]


def test_a_split_is_the_same_each_time_and_not_simply_the_first_rows(twenty):
    one, two = (twenty.split(0.5, "utility_val")[1] for _ in range(2))
    assert [row.row_id for row in one.rows] == [row.row_id for row in two.rows]
    assert [row.row_id for row in one.rows] != list(range(10))


def test_a_split_loses_no_count(chat, tmp_path):
    path = write(tmp_path / "rows.jsonl", [(2, 3), (2, 50), (2, 4), (2, 5), (2, 0)])
    rows = load_rows("utility", path, chat, max_length=20, bad_rows="drop")
    kept, out = rows.split(0.3, "utility_val")
    assert (kept.read, kept.counts()["dropped"], kept.overlong, kept.bad) == (4, 2, 1, 1)
    assert (out.read, out.counts()["dropped"]) == (1, 0)


# --- what rows say ------------------------------------------------------------------------------------------------


def test_a_set_knows_what_the_rows_that_are_left_say(chat, tmp_path):
    path = write(tmp_path / "rows.jsonl", [(2, 3), (1, 9), (2, 0), (2, 4)])
    rows = load_rows("custom", path, chat, max_length=9, bad_rows="drop")
    assert [row.row_id for row in rows.rows] == [0, 3]
    assert rows.texts == ["w0 w1\nw0 w1 w2", "w3 w4\nw3 w4 w5 w6"]


def test_a_truncated_row_still_says_all_of_its_messages(chat, tmp_path):
    said = [("system", "w9"), ("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    rows = load_rows("custom", str(tmp_path / "rows.jsonl"), chat, max_length=8, overlong="truncate")
    assert rows.truncated == 1
    assert rows.texts == ["w9\nw1 w2\nw3\nw4\nw5 w6"]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_split_leaves_each_row_its_text(twenty, share):
    texts = dict(zip([row.row_id for row in twenty.rows], twenty.texts, strict=True))
    assert len(set(twenty.texts)) == 20
    for part in twenty.split(share, "utility_val"):
        assert part.texts == [texts[row.row_id] for row in part.rows]


# --- identity -----------------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_the_conversations_and_of_nothing_else(chat, tmp_path):
    (tmp_path / "copy").mkdir()
    path, copy = write(tmp_path / "rows.jsonl", SIZES), write(tmp_path / "copy" / "rows.jsonl", SIZES)
    digest = load_rows("custom", path, chat, 99).digest
    assert load_rows("utility", copy, chat, 9).digest == digest
    assert load_rows("custom", write(tmp_path / "rows.jsonl", SIZES[::-1]), chat, 99).digest != digest


def test_sets_with_rows_in_common(chat, tmp_path):
    sizes = [(2, 3), (3, 3), (4, 3), (5, 3)]
    custom = load_rows("custom", write(tmp_path / "a.jsonl", sizes), chat, 99)
    utility = load_rows("utility", write(tmp_path / "b.jsonl", [*sizes[:3], (9, 9)]), chat, 99)
    harmful = load_rows("harmful", write(tmp_path / "c.jsonl", sizes, start=11), chat, 99)
    again = load_rows("harmful_val", write(tmp_path / "d.jsonl", sizes[:1], start=11), chat, 99)
    assert overlaps([custom, utility, harmful, again]) == [("custom", "utility", 3), ("harmful", "harmful_val", 1)]
    assert overlaps([custom, harmful]) == overlaps([custom]) == overlaps([]) == []


def test_the_sides_of_a_split_have_no_row_in_common(twenty):
    assert overlaps(list(twenty.split(0.3, "utility_val"))) == []
