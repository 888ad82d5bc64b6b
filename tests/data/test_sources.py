"""Every kind of source gives the same rows, and a broken one says which file and which row is at fault."""

import csv
import errno
import json
import os
import socket
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RevisionNotFoundError
from tiny import some_pairs, write_rows

from toss_lightning.data import sources
from toss_lightning.data.sources import Loaded, Source, load_set
from toss_lightning.errors import DataError

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(6)]


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_json(path: Path, rows: list[dict]) -> str:
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def write_csv(path: Path, rows: list[dict]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_folder(path: Path, rows: list[dict]) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".parquet": write_parquet, ".csv": write_csv, "": write_folder}


def replies(loaded: Loaded) -> list[str]:
    return [conversation.messages[-1].content for conversation in loaded.conversations.values()]


def refusal(spec, bad_rows="error") -> str:
    with pytest.raises(DataError) as caught:
        load_set(spec, bad_rows)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- kinds of source ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file_gives_the_same_rows_in_their_order(tmp_path, suffix):
    path = WRITERS[suffix](tmp_path / f"rows{suffix}", ROWS)
    loaded = load_set(path)
    assert replies(loaded) == [row["completion"] for row in ROWS]
    assert list(loaded.conversations) == list(range(6))
    assert [c.where for c in loaded.conversations.values()] == [f"{path}:{number}" for number in range(1, 7)]
    assert {c.source for c in loaded.conversations.values()} == {"rows"}
    assert loaded.bad == []


@pytest.mark.parametrize("suffix", WRITERS)
def test_text_is_kept_to_the_letter(tmp_path, suffix):
    reply = ' "quoted", 🙂 \n\n<|im_end|> ü\u2028 '
    path = WRITERS[suffix](tmp_path / f"rows{suffix}", [{"prompt": "p", "completion": reply}])
    assert replies(load_set(path)) == [reply]


def test_csv_cells_are_text_as_they_are_written(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "prompt,completion,label\n6 * 7,42,\nIs it there?,None,x\nCode?,NA,y\n1/2?,0.50,z\n", encoding="utf-8"
    )
    loaded = load_set(str(path))
    assert replies(loaded) == ["42", "None", "NA", "0.50"]
    assert [c.label for c in loaded.conversations.values()] == [None, "x", "y", "z"]


@pytest.mark.parametrize("write", [write_jsonl, write_json])
def test_replies_that_look_like_dates_are_text(tmp_path, write):
    rows = [{"prompt": "When?", "completion": said, "label": "2024-01-05"} for said in ("2024-01-01", "1999-12-31")]
    loaded = load_set(write(tmp_path / "rows.json", rows))
    assert replies(loaded) == ["2024-01-01", "1999-12-31"]
    assert loaded.conversations[0].label == "2024-01-05"
    turns = [{"role": "user", "content": "2024-01-01"}, {"role": "assistant", "content": "2024-01-01T10:00:00Z"}]
    rows = [{"messages": turns}, {"messages": turns, "source": "clock"}]
    assert replies(load_set(write(tmp_path / "turns.json", rows))) == ["2024-01-01T10:00:00Z"] * 2


def test_csv_rows_with_more_cells_than_the_header_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a\nb",c\nWhat is 2+2?,It is 4, of course\n')
    assert refusal(str(path)) == (
        f"{path}:4: 3 cells, but the header names 2: put cells that hold commas in quotation marks"
    )


def test_csv_as_pandas_writes_it_with_its_index(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",prompt,completion\n0,question 0,answer 0\n1,question 1," + "long " * 40_000 + "\n")
    assert replies(load_set(str(path))) == ["answer 0", "long " * 40_000]


def test_chat_rows_with_and_without_a_system_turn_in_one_file(tmp_path):
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": chat, "label": "x"}, {"messages": [{"role": "system", "content": "s"}, *chat]}]
    for suffix in (".jsonl", ".json", ".parquet"):
        loaded = load_set(WRITERS[suffix](tmp_path / f"rows{suffix}", rows))
        assert [len(c.messages) for c in loaded.conversations.values()] == [2, 3]
        assert [c.label for c in loaded.conversations.values()] == ["x", None]


def test_the_split_of_a_saved_folder_of_splits(tmp_path):
    splits = {"train": ROWS[:2], "test": ROWS[2:3]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(
        str(tmp_path / "folder")
    )
    folder = str(tmp_path / "folder")
    assert replies(load_set(folder)) == ["answer 0", "answer 1"]
    assert replies(load_set(Source(folder, split="test"))) == ["answer 2"]
    assert refusal(Source(folder, split="dev")) == f"{folder}: split: no 'dev'; there are train, test"


def test_a_changed_file_is_read_anew(tmp_path):
    load_set(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    assert replies(load_set(write_jsonl(tmp_path / "rows.jsonl", ROWS[:1] * 2))) == ["answer 0", "answer 0"]


def test_a_file_with_the_time_stamp_of_the_one_that_it_replaces_is_read_anew(tmp_path):
    """As `cp -p`, `rsync -a` and `tar` leave it."""
    for rows in (ROWS, ROWS[3:]):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert replies(load_set(path)) == [row["completion"] for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_no_copy_stays_of_a_file_that_was_read(tmp_path, suffix, monkeypatch):
    path = WRITERS[suffix](tmp_path / f"rows{suffix}", ROWS)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert len(load_set(path).conversations) == 6
    assert sorted(tmp_path.rglob("*")) == [Path(path), tmp_path / "tmp"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_a_name_is_no_pattern(tmp_path, suffix):
    folder = tmp_path / "run[1] *?"
    for name in ("run1 xx", "run[1] *?"):
        (tmp_path / name).mkdir()
        for file in ("rows1", "rows[1]", "rowsx", "rows*", "rows?", "[!r]ows"):
            WRITERS[suffix](tmp_path / name / f"{file}{suffix}", [{"prompt": name, "completion": file}])
    for file in ("rows[1]", "rows*", "rows?", "[!r]ows"):
        loaded = load_set(str(folder / f"{file}{suffix}"))
        assert [[turn.content for turn in c.messages] for c in loaded.conversations.values()] == [[folder.name, file]]


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_are_read_without_a_look_at_the_network(tmp_path, suffix, monkeypatch):
    def refuse(host, *_, **__):
        asked.append(host)
        raise OSError("no network")

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(load_set(WRITERS[suffix](tmp_path / f"rows{suffix}", ROWS)).conversations) == 6
    assert asked == []


def test_the_case_of_a_files_ending_does_not_matter(tmp_path):
    assert len(load_set(write_jsonl(tmp_path / "ROWS.JSONL", ROWS)).conversations) == 6


def test_home_is_where_the_tilde_points(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert len(load_set("~/rows.jsonl").conversations) == 6


def test_bundled_samples_by_name():
    loaded = load_set("sample:custom")
    assert Counter(c.label for c in loaded.conversations.values()) == {"benign": 48, "harmful": 16}
    assert loaded.conversations[0].where == "sample:custom:1"


def test_a_name_for_rows_that_have_no_source_of_their_own(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{**ROWS[0], "source": "web"}, ROWS[1]])
    assert [c.source for c in load_set(Source(path, name="mine")).conversations.values()] == ["web", "mine"]


# --- columns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
def test_columns_are_read_under_other_names(tmp_path, suffix):
    rows = [{"my_input": "in", "my_output": "out"}]
    path = WRITERS[suffix](tmp_path / f"rows{suffix}", rows)
    loaded = load_set(Source(path, columns={"prompt": "my_input", "completion": "my_output"}))
    assert [m.content for m in loaded.conversations[0].messages] == ["in", "out"]


def test_a_renamed_column_replaces_one_that_had_the_name(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "old", "better": "new"}])
    assert replies(load_set(Source(path, columns={"completion": "better"}))) == ["new"]


def test_two_columns_may_swap_their_names(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "c"}])
    assert replies(load_set(Source(path, columns={"prompt": "completion", "completion": "prompt"}))) == ["p"]


def test_columns_that_are_not_there(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    message = refusal(Source(path, columns={"prompt": "my_input"}))
    assert message == f"{path}: columns: names ['my_input'], but the data has ['prompt', 'completion']"


def test_columns_that_fit_no_format(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert refusal(path).startswith(f"{path}: columns ['text'] fit no known format; expected messages, ")


# --- slices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "rows", "taken"),
    [(0, None, [0, 1, 2, 3, 4, 5]), (4, None, [4, 5]), (0, 2, [0, 1]), (3, 2, [3, 4]), (5, 1, [5])],
)
def test_slices_keep_the_row_numbers_of_the_file(tmp_path, skip, rows, taken):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    loaded = load_set(Source(path, skip=skip, rows=rows))
    assert replies(loaded) == [f"answer {number}" for number in taken]
    assert [c.where for c in loaded.conversations.values()] == [f"{path}:{number + 1}" for number in taken]


@pytest.mark.parametrize(
    ("skip", "rows", "asked"),
    [
        (0, 7, "0 to 7"),
        (5, 2, "5 to 7"),
        (6, None, "6 to 6"),
        (7, None, "7 to 6"),
        (-1, 2, "-1 to 1"),
        (2, -1, "2 to 1"),
        (2, 0, "2 to 2"),
    ],
)
def test_rows_beyond_the_end(tmp_path, skip, rows, asked):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert refusal(Source(path, skip=skip, rows=rows)) == f"{path}: rows {asked} asked for, but it has 6"


# --- mixtures -----------------------------------------------------------------------------------------------------


def test_a_list_of_sources_is_read_in_its_order_with_ids_of_its_own(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", ROWS[:2])
    two = write_csv(tmp_path / "two.csv", ROWS[2:])
    loaded = load_set([one, Source(two, rows=2)])
    assert replies(loaded) == ["answer 0", "answer 1", "answer 2", "answer 3"]
    assert list(loaded.conversations) == [0, 1, 2, 3]
    assert [c.source for c in loaded.conversations.values()] == ["one", "one", "two", "two"]
    assert loaded.conversations[2].where == f"{two}:1"


def rows_of(path: Path, count: int) -> str:
    return write_jsonl(path, [{"prompt": "p", "completion": str(number)} for number in range(count)])


@pytest.mark.parametrize(("share", "taken"), [(0.1, 10), (0.25, 30), (0.5, 90), (0.01, 1)])
def test_a_share_is_one_of_the_whole_set(tmp_path, share, taken):
    loaded = load_set([rows_of(tmp_path / "main.jsonl", 90), Source(rows_of(tmp_path / "part.jsonl", 90), share=share)])
    counts = Counter(c.source for c in loaded.conversations.values())
    assert counts == {"main": 90, "part": taken}
    assert replies(loaded)[90:] == [str(number) for number in range(taken)]


def test_two_shares_beside_two_sources_without_one(tmp_path):
    names = ["one", "two", "safe", "odd"]
    paths = {name: rows_of(tmp_path / f"{name}.jsonl", 30) for name in names}
    loaded = load_set([paths["one"], Source(paths["safe"], share=0.2), paths["two"], Source(paths["odd"], share=0.05)])
    assert Counter(c.source for c in loaded.conversations.values()) == {"one": 30, "safe": 16, "two": 30, "odd": 4}


def test_a_share_that_needs_more_rows_than_there_are(tmp_path):
    few = rows_of(tmp_path / "few.jsonl", 5)
    assert refusal([rows_of(tmp_path / "main.jsonl", 90), Source(few, share=0.1)]) == (
        f"{few}: share: 0.1 needs 10 rows, but it has 5"
    )


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1])
def test_shares_outside_of_0_to_1(tmp_path, share):
    path = rows_of(tmp_path / "rows.jsonl", 5)
    assert refusal([path, Source(path, share=share)]).startswith(
        "share: shares must be above 0 and add up to less than 1"
    )


def test_shares_alone_make_no_set(tmp_path):
    path = rows_of(tmp_path / "rows.jsonl", 5)
    for spec in ([Source(path, share=0.5)], [path, Source(path, share=0.5), Source(path, share=0.5)]):
        assert refusal(spec).endswith("beside a source without a share")


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_missing_file_with_the_nearest_name(tmp_path):
    there = write_jsonl(tmp_path / "custom_rows.jsonl", ROWS)
    missing = str(tmp_path / "custom_row.jsonl")
    assert refusal(missing) == f"{missing}: no such file (is it {there}?)"
    far = str(tmp_path / "zzz.parquet")
    assert refusal(far) == f"{far}: no such file"
    nowhere = str(tmp_path / "nowhere" / "rows.jsonl")
    assert refusal(nowhere) == f"{nowhere}: no such file"


def test_a_missing_folder(tmp_path):
    write_folder(tmp_path / "saved", ROWS)
    assert f"no such file (is it {tmp_path / 'saved'}?)" in refusal(str(tmp_path / "save"))


def test_a_home_that_nobody_has():
    assert refusal("~nosuchuser/rows.jsonl") == "~nosuchuser/rows.jsonl: no such file"


def test_no_room_for_the_temporary_copy(tmp_path, monkeypatch):
    def full(*_, **__):
        raise datasets.exceptions.DatasetGenerationError from OSError(errno.ENOSPC, "No space left on device")

    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    advice = "free some space, or name another directory in TMPDIR"
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "from_parquet", full)
        assert refusal(path) == f"{path}: its temporary copy cannot be written (No space left on device): {advice}"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert refusal(path) == f"{path}: its temporary copy cannot be written (No such file or directory): {advice}"


def test_a_file_of_a_kind_that_is_not_read(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello", encoding="utf-8")
    assert refusal(str(path)) == f"{path}: unknown kind of file; files end in .json, .jsonl, .parquet, .csv"


def test_an_unknown_sample():
    known = "custom, harmful, harmful_val, over_refusal, refusals_val, safety, utility, utility_val"
    assert refusal("sample:custm") == f"sample:custm: no such bundled sample; there are {known}"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_an_empty_file(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.touch()
    assert refusal(str(path)) == f"{path}: the file is empty"


@pytest.mark.parametrize(("name", "text"), [("a.json", "[]"), ("a.jsonl", "\n\n"), ("a.csv", "prompt,completion\n")])
def test_a_file_without_rows(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert refusal(str(path)) == f"{path}: the file holds no rows"


def test_broken_json_at_a_line(tmp_path):
    good = json.dumps(ROWS[0])
    for name in ("rows.jsonl", "lines.json"):
        path = tmp_path / name
        path.write_text(f'{good}\n\n{good}\n{{"prompt": "p", "completion"\n{good}\n', encoding="utf-8")
        assert refusal(str(path)) == f"{path}:4: broken JSON (Expecting ':' delimiter): fix or remove the line"


def test_broken_json_in_an_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n{"prompt": "p", "completion": "c"},\n{"prompt" "p"}\n]', encoding="utf-8")
    assert refusal(str(path)) == f"{path}:3: broken JSON (Expecting ':' delimiter): fix the file"


def test_text_that_is_not_in_utf_8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"prompt": "p", "completion": "\xe9"}\n')
    assert refusal(str(path)) == f"{path}:2: not in UTF-8: save the file as that"
    path = tmp_path / "rows.json"
    path.write_bytes('[{"prompt": "p", "completion": "é"}]'.encode("utf-16"))
    assert refusal(str(path)) == f"{path}:1: not in UTF-8: save the file as that"


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_half_of_a_character(tmp_path, suffix):
    path = WRITERS[suffix](tmp_path / f"rows{suffix}", [ROWS[0], {"prompt": "🙂", "completion": "a\ud83d"}])
    assert refusal(path) == f"{path}:2: \\ud83d alone is no character: remove it"


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    path = Path(WRITERS[suffix](tmp_path / f"rows{suffix}", ROWS))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert replies(load_set(str(path))) == [row["completion"] for row in ROWS]


def test_a_line_separator_inside_a_string_does_not_count_as_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completion": "a\u2028b\u0085c"}\n{"prompt"\n', encoding="utf-8")
    assert refusal(str(path)).startswith(f"{path}:2: broken JSON")


def test_json_that_python_cannot_hold(tmp_path):
    for text, reason in (("9" * 5000, "Exceeds the limit"), ("[" * 100_000, "maximum recursion depth")):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(ROWS[0]) + '\n{"prompt": ' + text + "}\n", encoding="utf-8")
        assert refusal(str(path)).startswith(f"{path}:2: broken JSON ({reason}")
        path = tmp_path / "rows.json"
        path.write_text('[{"prompt": ' + text + "}]", encoding="utf-8")
        assert refusal(str(path)).startswith(f"{path}: cannot be read as JSON ({reason}")


def test_an_object_over_several_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS[0], indent=2), encoding="utf-8")
    assert refusal(str(path)).endswith(": write each row on a line of its own, or all as one array")


def test_lines_that_are_no_objects(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('"hello"\n"you"\n', encoding="utf-8")
    assert refusal(str(path)) == f"{path}:1: each row must be an object, not str"


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("bad", [5, 1.5, True, {"text": "c"}])
@pytest.mark.parametrize("at", [0, 2])
def test_mixed_types_in_the_reply_column(tmp_path, suffix, bad, at):
    rows = [dict(row) for row in ROWS]
    rows[at]["completion"] = bad
    path = WRITERS[suffix](tmp_path / f"rows{suffix}", rows)
    assert refusal(path).startswith(f"{path}:{at + 1}: the reply must be a string, not {type(bad).__name__}")


def test_mixed_types_under_another_name(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "q", "a": "a"}, {"q": "q", "a": 4}])
    message = refusal(Source(path, columns={"prompt": "q", "completion": "a"}))
    assert message == f"{path}:2: the reply must be a string, not int: quote it or convert the column"


def test_mixed_types_in_a_column_that_nobody_reads(tmp_path):
    rows = [{**ROWS[0], "meta": 1}, {**ROWS[1], "meta": "x"}, {**ROWS[2], "meta": {"a": 1}}]
    assert len(load_set(write_jsonl(tmp_path / "rows.jsonl", rows)).conversations) == 3


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("early", "late"),
    [
        ({}, {"label": "harmful"}),
        ({"label": None}, {"label": "harmful"}),
        ({"label": 0}, {"label": "harmful"}),
        ({"meta": {"a": 1}}, {"meta": {"b": [1]}}),
    ],
)
def test_a_file_of_two_sources_that_differ_in_their_columns(tmp_path, suffix, early, late):
    # `datasets` decides after ten megabytes what the columns are
    long = {"prompt": "p", "completion": "word " * 60_000}
    path = WRITERS[suffix](tmp_path / f"rows{suffix}", [{**long, **early}] * 40 + [{**ROWS[0], **late}] * 2)
    loaded = load_set(path)
    assert [len(reply) for reply in replies(loaded)] == [300_000] * 40 + [8] * 2
    labels = [str(early["label"]) if early.get("label") is not None else None] * 40 + [late.get("label")] * 2
    assert [c.label for c in loaded.conversations.values()] == labels


def test_numbers_where_every_reply_should_be_text(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [{"prompt": "p", "completion": 4}])
    assert refusal(path) == f"{path}:1: the reply must be a string, not int: quote it or convert the column"


def test_a_row_without_a_reply_among_others(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"prompt": "p"}])
    assert refusal(path) == f"{path}:2: column 'completion' or 'response' or 'answer' is missing or null"


def test_files_that_are_not_what_their_name_says(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("hello", encoding="utf-8")
    assert refusal(str(path)).startswith(f"{path}: cannot be read as parquet (")
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\np,\xff\xfe\n")
    assert refusal(str(path)).startswith(f"{path}: cannot be read as csv (")


# --- bad rows -----------------------------------------------------------------------------------------------------


def test_bad_rows_are_dropped_and_counted_and_the_others_keep_their_ids(tmp_path):
    rows = [ROWS[0], {"prompt": "p", "completion": " "}, ROWS[2], {"prompt": "p", "completion": None}, ROWS[4]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    loaded = load_set(path, bad_rows="drop")
    assert list(loaded.conversations) == [0, 2, 4]
    assert replies(loaded) == ["answer 0", "answer 2", "answer 4"]
    assert loaded.bad == [
        f"{path}:2: empty reply: fill it in, remove the row, or set data.bad_rows: drop",
        f"{path}:4: column 'completion' or 'response' or 'answer' is missing or null",
    ]
    assert refusal(path) == loaded.bad[0]


def test_rows_of_a_mixed_type_are_dropped_too(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"prompt": "p", "completion": 4}, ROWS[2]])
    loaded = load_set([path, path], bad_rows="drop")
    assert list(loaded.conversations) == [0, 2, 3, 5]
    assert len(loaded.bad) == 2


def test_a_broken_file_stops_the_run_even_so(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{\n", encoding="utf-8")
    assert refusal(str(path), bad_rows="drop").startswith(f"{path}:2: broken JSON")


def test_a_share_that_comes_to_no_row_is_an_error(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", some_pairs(20))
    with pytest.raises(DataError, match=r"share: 0\.001 needs 0 rows"):
        load_set([rows, Source(rows, share=0.001)])


# --- the hub ------------------------------------------------------------------------------------------------------


ONE, OTHER = "a1" * 20, "b2" * 20
"""Two commits."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, ...]]:
    """What the hub is asked for: path, subset, split, revision and folder."""
    asked = []

    def load_dataset(
        path: str, subset: str | None, split: str, revision: str | None, data_dir: str | None
    ) -> datasets.Dataset:
        asked.append((path, subset, split, revision, data_dir))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", ["teknium/OpenHermes-2.5", "squad", "hf://datasets/teknium/OpenHermes-2.5"])
def test_names_of_hub_datasets(name: str, asked: list) -> None:
    assert len(load_set(name).conversations) == 6
    assert asked == [(name, None, "train", None, None)]


def test_the_hub_is_asked_for_the_split_and_the_subset(asked: list) -> None:
    load_set([Source("owner/name", subset="math", split="test"), Source("owner/other", split="dev")])
    assert asked == [("owner/name", "math", "test", None, None), ("owner/other", None, "dev", None, None)]


def test_the_hub_is_asked_for_the_revision_and_the_folder(asked: list) -> None:
    load_set([Source("owner/name", revision=ONE, data_dir="part"), Source("owner/name", revision="v1")])
    assert asked == [("owner/name", None, "train", ONE, "part"), ("owner/name", None, "train", "v1", None)]


@pytest.mark.parametrize("option", [{"revision": "main"}, {"data_dir": "part"}, {"revision": "v1", "data_dir": "part"}])
def test_what_lies_here_has_no_revision_and_no_folder(
    tmp_path: Path, option: dict[str, str], asked: list, somewhere: None
) -> None:
    write_folder(Path("owner/name"), ROWS)
    here = [WRITERS[suffix](tmp_path / f"rows{suffix}", ROWS) for suffix in WRITERS]
    for path in (*here, "sample:custom", "owner/name"):
        assert refusal(Source(path, **option)) == (
            f"{path}: {next(iter(option))}: only hub datasets have one: set it to null, or name the hub's as"
            " hf://datasets/OWNER/NAME"
        )
    load_set(Source("hf://datasets/owner/name", **option))
    assert len(asked) == 1


def test_a_revision_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        cause = RevisionNotFoundError.__new__(RevisionNotFoundError)  # by itself it takes a response
        raise datasets.exceptions.DatasetNotFoundError("Revision 'v9' doesn't exist for dataset") from cause

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert refusal(Source("owner/name", revision="v9")) == (
        "owner/name: revision: the hub has no 'v9': give a commit, a tag or a branch of the dataset, or leave it out"
        " for the branch main"
    )


@pytest.fixture
def read_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot be reached, and commit ONE of owner/name, which was v1 then, has been read before."""
    datasets.load_dataset("json", data_files=write_jsonl(tmp_path / "r.jsonl", ROWS), cache_dir=str(tmp_path / "made"))
    (made,) = {path.parent for path in (tmp_path / "made").rglob("*.arrow")}
    cached = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / ONE
    cached.parent.mkdir(parents=True)
    made.rename(cached)
    (cached / "json-train.arrow").rename(cached / "name-train.arrow")
    facts = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(json.dumps(facts | {"config_name": "default", "dataset_name": "name"}))
    known = tmp_path / "hub" / "datasets--owner--name"
    (known / "refs").mkdir(parents=True)
    (known / "refs" / "v1").write_text(ONE)
    (known / "snapshots" / ONE).mkdir(parents=True)
    # somebody has fetched files of it by themselves, so that the hub's own cache knows of others that are not here
    listing = {"format_version": 1, "files": {"rows.jsonl": {"size": 9, "blob_id": "0" * 40}}}
    (known / "trees").mkdir()
    (known / "trees" / f"{ONE}.json").write_text(json.dumps(listing))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources, "snapshot_download", partial(snapshot_download, cache_dir=tmp_path / "hub"))


@pytest.mark.parametrize("revision", [None, ONE, "v1"])
def test_without_the_hub_the_rows_are_those_that_were_read_last(read_before: None, revision: str | None) -> None:
    assert replies(load_set(Source("owner/name", revision=revision))) == [row["completion"] for row in ROWS]
    assert len(load_set(Source("hf://datasets/owner/name", revision=revision)).conversations) == 6


@pytest.mark.parametrize("revision", [OTHER, "v2", "main"])
def test_without_the_hub_rows_of_another_revision_are_refused(read_before: None, revision: str) -> None:
    assert refusal(Source("owner/name", revision=revision)) == (
        f"owner/name: revision: the hub cannot be reached, and what was read of it last is commit {ONE}: name that, or"
        " try again when it can"
    )


def test_a_folder_that_is_not_found(read_before: None) -> None:
    assert refusal(Source("owner/name", data_dir="part")) == (
        "owner/name: data_dir: no files in 'part', or the hub cannot be reached: correct it, or save the rows to a file"
        " where it can"
    )


def test_what_is_missing_in_a_folder_that_is_here_is_not_looked_for_on_the_hub(somewhere: None, asked: list) -> None:
    (Path("data") / "deep").mkdir(parents=True)
    write_jsonl(Path("data") / "custom.jsonl", ROWS)
    kinds = "files end in .json, .jsonl, .parquet, .csv"
    assert refusal("data/custom") == (
        f"data/custom: no such file (is it data/custom.jsonl?); {kinds}; the hub's is hf://datasets/data/custom"
    )
    assert refusal("data/deep/custom") == f"data/deep/custom: no such file; {kinds}"
    assert refusal("no/such/folder") == f"no/such/folder: no such file; {kinds}"
    assert asked == []


@pytest.mark.parametrize(("kind", "ending"), [("json", ".jsonl"), ("csv", ".csv")])
def test_files_of_a_hub_dataset_that_differ_in_their_columns(
    tmp_path: Path, kind: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = WRITERS[ending](tmp_path / f"one{ending}", ROWS[:1] * 2000)
    two = WRITERS[ending](tmp_path / f"two{ending}", [{**ROWS[1], "label": "x"}])
    load, cache = datasets.load_dataset, str(tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: load(kind, data_files=[one, two], cache_dir=cache))
    assert refusal("owner/name") == (
        "owner/name: neither a readable file nor a reachable hub dataset (its files differ in their columns: there are"
        " 1 new columns ({'label'}))"
    )


def test_a_hub_dataset_of_other_sizes_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise datasets.exceptions.NonMatchingSplitsSizesError("expected 5 rows\nfound 4")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert refusal("owner/name").endswith("nor a reachable hub dataset (expected 5 rows)")
