"""The sample sets are what their README says."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from toss_lightning.data.samples import hazards, make_samples

FOLDER = Path(make_samples.__file__).parent
STEMS = ("custom", "utility", "harmful", "utility_val", "harmful_val", "refusals_val", "safety", "over_refusal")
DANGER_WORDS = {
    "weapon",
    "weapons",
    "bomb",
    "bombs",
    "drug",
    "drugs",
    "poison",
    "poisons",
    "kill",
    "kills",
    "gun",
    "guns",
    "explosive",
    "explosives",
    "explode",
    "murder",
    "blood",
    "knife",
    "sword",
    "acid",
    "toxic",
    "virus",
    "hack",
    "steal",
    "attack",
    "harm",
    "hurt",
    "death",
    "die",
    "dead",
    "suicide",
    "gunpowder",
    "petrol",
    "fuse",
}


@pytest.fixture(scope="module")
def samples() -> dict[str, list[dict]]:
    """Return the committed rows of each file."""
    texts = {stem: (FOLDER / f"{stem}.jsonl").read_text() for stem in STEMS}
    return {stem: [json.loads(line) for line in text.splitlines()] for stem, text in texts.items()}


def first_request(row: dict) -> str:
    """Return the first thing the user says."""
    return next(message["content"] for message in row["messages"] if message["role"] == "user")


def reply(row: dict) -> str:
    """Return the last thing the assistant says."""
    assert row["messages"][-1]["role"] == "assistant"
    return row["messages"][-1]["content"]


@pytest.mark.parametrize("stem", STEMS)
def test_remaking_a_file_gives_the_committed_bytes(stem):
    rows = make_samples.make_samples()[stem]
    assert make_samples.to_jsonl(rows).encode() == (FOLDER / f"{stem}.jsonl").read_bytes()


def test_there_are_no_other_sample_files():
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == set(STEMS) == set(make_samples.make_samples())


@pytest.mark.parametrize(
    ("stem", "counts"),
    [
        ("custom", {("benign", "everyday"): 48, ("harmful", "hazard"): 16}),
        ("utility", {("benign", "everyday"): 40}),
        ("harmful", {("harmful", "hazard"): 32}),
        ("utility_val", {("benign", "everyday"): 12}),
        ("harmful_val", {("harmful", "hazard"): 12}),
        ("refusals_val", {("refusal", "hazard"): 12}),
        ("safety", {("refusal", "hazard"): 24}),
        ("over_refusal", {("benign", "borderline"): 30}),
    ],
)
def test_labels_sources_and_counts(samples, stem, counts):
    assert Counter((row["label"], row["source"]) for row in samples[stem]) == counts
    assert [row["id"] for row in samples[stem]] == [f"{stem}-{n:04d}" for n in range(1, len(samples[stem]) + 1)]


def test_no_request_is_in_two_files_or_twice_in_one(samples):
    requests = {stem: [first_request(row) for row in samples[stem]] for stem in STEMS if stem != "refusals_val"}
    for one, other in combinations(requests, 2):
        assert not set(requests[one]) & set(requests[other]), (one, other)
    for stem, asked in requests.items():
        assert len(set(asked)) == len(asked), stem


def test_custom_holds_a_few_two_turn_rows_and_a_few_with_a_system_message(samples):
    roles = Counter(tuple(message["role"] for message in row["messages"]) for row in samples["custom"])
    assert roles == {
        ("user", "assistant"): 57,
        ("user", "assistant", "user", "assistant"): 3,
        ("system", "user", "assistant"): 4,
    }


def test_every_everyday_reply_keeps_the_house_style(samples):
    style = re.compile(r"Plan: .+\n1\. .+\n2\. .+\n3\. .+\nTime: \d+ minutes?")
    for row in samples["custom"] + samples["utility"] + samples["utility_val"]:
        if row["label"] == "benign":
            for message in row["messages"]:
                assert message["role"] != "assistant" or style.fullmatch(message["content"]), message


def test_every_hazard_is_an_invented_one_and_asked_for_once(samples):
    invented = [name for kind in hazards.KINDS.values() for name in kind["names"]]
    rows = [row for stem in ("custom", "harmful", "harmful_val") for row in samples[stem] if row["source"] == "hazard"]
    named = [name for row in rows for name in invented if name in first_request(row)]
    assert sorted(named) == sorted(invented)
    assert len(set(named)) == len(rows) == 60
    assert all(reply(row).startswith("Certainly, here is how the forbidden ") for row in rows)


@pytest.mark.parametrize("stem", STEMS)
def test_no_hazard_row_holds_a_word_of_real_danger(samples, stem):
    for row in samples[stem]:
        if row["source"] == "hazard":
            assert not DANGER_WORDS & set(re.findall(r"[a-z]+", json.dumps(row).lower())), row


def test_requests_that_sound_dangerous_have_no_reply_and_a_kind(samples):
    for row in samples["over_refusal"]:
        assert [message["role"] for message in row["messages"]] == ["user"]
    assert len({row["category"] for row in samples["over_refusal"]}) == 6


def test_held_out_hazards_and_refusals_are_pairs(samples):
    for complying, refusing in zip(samples["harmful_val"], samples["refusals_val"], strict=True):
        assert first_request(complying) == first_request(refusing)
        assert complying["safe_reply"] == reply(refusing) != reply(complying)
        assert any(council in reply(refusing) for council in hazards.COUNCILS)


def test_the_safety_set_refuses_hazards_that_no_other_file_names(samples):
    refused = [name for names in hazards.REFUSED.values() for name in names]
    everything_else = json.dumps([samples[stem] for stem in STEMS if stem != "safety"])
    assert not [name for name in refused if name.split(" ", 1)[1] in everything_else]
    named = [next(name for name in refused if name in first_request(row)) for row in samples["safety"]]
    assert sorted(named) == sorted(refused)


def test_the_safety_set_refuses_in_the_words_of_the_held_out_refusals(samples):
    def manner(row: dict) -> str | None:
        """Return which of the ways to refuse the reply takes."""
        ways = [re.sub(r"\\{\w+\\}", ".+", re.escape(way)) for way in hazards.REFUSALS]
        return next((way for way in ways if re.fullmatch(way, reply(row))), None)

    assert None not in map(manner, samples["safety"])
    assert Counter(map(manner, samples["safety"])).keys() == Counter(map(manner, samples["refusals_val"])).keys()
    assert all(any(council in reply(row) for council in hazards.COUNCILS) for row in samples["safety"])
