"""Replies of adapters in a run, and what is read of given replies."""

import copy
import json
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import tiny_fit
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from toss_lightning.data.batching import collate
from toss_lightning.data.formats import Conversation, Message
from toss_lightning.data.tokenize import ChatTokenizer
from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.evaluation import Prompt
from toss_lightning.evaluation.evaluation import Findings
from toss_lightning.evaluation.likelihood import Reading, measure, opener_tokens
from toss_lightning.evaluation.readings import Readings
from toss_lightning.evaluation.replies import Replies
from toss_lightning.evaluation.results import report
from toss_lightning.models.adapters import SLOT
from toss_lightning.models.generation import Sampling

PROMPTS = [
    Prompt("mine", f"p{at}", (Message("user", " ".join(f"w{at + word}" for word in range(1 + at % 3))),), "benign")
    for at in range(7)
]


class Trained:
    """A run on the tiny model whose slot holds a trained adapter."""

    def __init__(self, model: str, sets: dict[str, str], folder: Path) -> None:
        self.trainer = tiny_fit(model, sets, folder / "run", plan=["target"], loop={"epochs": 1})
        self.module: Any = self.trainer.lightning_module
        self.chat: ChatTokenizer = self.trainer.datamodule.chat  # type: ignore[attr-defined]

    def replies(self, folder: Path, batch_size: int = 3, **sampling: Any) -> Replies:
        return Replies(self.trainer, self.chat, folder, Sampling(**{"max_new_tokens": 5, **sampling}), batch_size)


@pytest.fixture(scope="module")
def trained(tiny_model, tiny_sets, tmp_path_factory) -> Trained:
    return Trained(tiny_model, tiny_sets, tmp_path_factory.mktemp("trained"))


def test_every_prompt_gets_the_likeliest_reply_in_order(trained: Trained, tmp_path: Path) -> None:
    found = trained.replies(tmp_path).to(PROMPTS, SLOT, "target")
    assert [one.prompt for one in found] == PROMPTS
    assert {one.adapter for one in found} == {"target"}
    for one in found:
        ids = trained.chat.prompt_ids(one.prompt.messages, "here").tolist()
        begin = len(ids)
        while len(ids) - begin < 5 and (len(ids) == begin or ids[-1] != trained.chat.tokenizer.eos_token_id):
            ids.append(int(trained.module.bank.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert one.tokens == len(ids) - begin
        assert one.stopped == (ids[-1] == trained.chat.tokenizer.eos_token_id)
        assert one.text == trained.chat.tokenizer.decode(ids[begin:], skip_special_tokens=True)


def test_a_reply_may_hold_what_ends_a_line_elsewhere(trained: Trained, tmp_path: Path) -> None:
    trained.replies(tmp_path).to(PROMPTS, SLOT, "target")
    for file in tmp_path.rglob("*.jsonl"):
        lines = [json.loads(line) | {"text": "a\u2028b\x85c"} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    assert {one.text for one in trained.replies(tmp_path).to(PROMPTS, SLOT, "target")} == {"a\u2028b\x85c"}


def test_replies_are_generated_once(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained.replies(tmp_path).to(PROMPTS, SLOT, "target")
    monkeypatch.setattr("toss_lightning.evaluation.replies.generate", lambda *_, **__: pytest.fail("generated again"))
    again = trained.replies(tmp_path).to(PROMPTS, SLOT, "another name")
    assert [one.text for one in again] == [one.text for one in first]


def test_a_reply_belongs_to_its_prompt_whatever_ids_another_run_gave(trained: Trained, tmp_path: Path) -> None:
    first = trained.replies(tmp_path).to(PROMPTS, SLOT, "target")
    others = [replace(one, prompt_id=f"p{6 - at}") for at, one in enumerate(PROMPTS)]
    again = trained.replies(tmp_path).to(others, SLOT, "target")
    assert len(list(tmp_path.iterdir())) == 1
    assert [one.prompt for one in again] == others
    assert [one.text for one in again] == [one.text for one in first]


@pytest.mark.parametrize("other", ["adapter", "sampling", "prompts", "batches"])
def test_other_replies_are_kept_apart(trained: Trained, tmp_path: Path, other: str) -> None:
    trained.replies(tmp_path).to(PROMPTS, SLOT, "target")
    replies = trained.replies(tmp_path, 2 if other == "batches" else 3, seed=int(other == "sampling"))
    replies.to(PROMPTS[:6] if other == "prompts" else PROMPTS, "base" if other == "adapter" else SLOT, "it")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_run_goes_on_behind_the_last_batch(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained.replies(tmp_path / "whole").to(PROMPTS, SLOT, "target")
    calls = []

    def killed() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        trained.replies(tmp_path / "cut").to(PROMPTS, SLOT, "target", killed)
    calls.append(1)
    assert trained.replies(tmp_path / "cut").to(PROMPTS, SLOT, "target") == whole
    assert _files(tmp_path / "cut") == _files(tmp_path / "whole")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_damaged_file_is_named(trained: Trained, tmp_path: Path) -> None:
    trained.replies(tmp_path).to(PROMPTS, SLOT, "target")
    file = next(tmp_path.rglob("00001.jsonl"))
    file.write_text(file.read_text()[:9])
    with pytest.raises(StoreError, match=r"00001.jsonl: damaged .* delete it and run the test again"):
        trained.replies(tmp_path).to(PROMPTS, SLOT, "target")


def test_a_reply_that_would_not_fit_is_refused_by_naming_the_prompt(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens: 255 beside the \d+ tokens of prompt p2 of mine are more"):
        trained.replies(tmp_path, max_new_tokens=255).to(PROMPTS, SLOT, "target")


# --- reading given replies --------------------------------------------------------------------------------------------


TEXTS = [("w1", "w2 w3"), ("w4 w5", "w6"), ("w7", "w8 w9 w10 w11"), ("w12", "w13 w14", "w15", "w16")]
"""Conversations, a prompt and a reply in turn; the last one has two replies."""


def some_rows(chat: ChatTokenizer) -> list[Any]:
    turns = [tuple(map(Message, ("user", "assistant") * 2, texts)) for texts in TEXTS]
    return [chat.tokenize(Conversation(one, "here"), 10 + number) for number, one in enumerate(turns)]


@pytest.mark.parametrize("adapter", ["base", SLOT])
@pytest.mark.parametrize("max_tokens", [18, 1000])
def test_what_is_read_is_what_full_logits_say(trained: Trained, adapter: str, max_tokens: int) -> None:
    rows, openers = some_rows(trained.chat), [8, 9]
    found = measure(trained.trainer, rows, adapter, openers, max_tokens, "reading")
    losses, opening, divergence = [], [], []
    for row in rows:
        ids, at = torch.from_numpy(collate([row])["input_ids"].numpy()), torch.from_numpy(row.response_positions).long()
        logs = {}
        for name in ("base", adapter):
            with torch.no_grad(), trained.module.using(name):
                logs[name] = trained.module.bank.model(ids).logits[0].double().log_softmax(-1)[at - 1]
        losses.append(float(F.nll_loss(logs[adapter], ids[0, at])))
        opening.append(float(logs[adapter][0].exp()[openers].sum()))
        divergence += (logs["base"].exp() * (logs["base"] - logs[adapter])).sum(-1).tolist()
    np.testing.assert_allclose(found.loss, losses, rtol=1e-5)
    np.testing.assert_allclose(found.opening, opening, rtol=1e-4)
    np.testing.assert_allclose(found.divergence, divergence, atol=1e-5)
    replies = [reply for texts in TEXTS for reply in texts[1::2]]
    # the words of each, and the end of its turn
    assert found.ordinal.tolist() == [at for reply in replies for at in range(len(reply.split()) + 1)]
    assert (adapter == "base") == (max(found.divergence) == 0)
    short = measure(trained.trainer, rows, adapter, openers, max_tokens, divergences=False)
    np.testing.assert_array_equal(short.loss, found.loss)
    assert not short.divergence.any()


def test_replies_are_read_once(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = Readings(trained.trainer, trained.chat, tmp_path, 1000)

    rows = some_rows(trained.chat)
    first = {name: readings.of(rows, name, name, divergences=True) for name in ("base", SLOT)}
    readings.of(rows, SLOT, SLOT, divergences=False)
    readings.of(rows[:2], SLOT, SLOT, divergences=True)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr("toss_lightning.evaluation.readings.measure", lambda *_: pytest.fail("read again"))
    for name, found in first.items():
        again = readings.of(rows, name, "another title", divergences=True)
        for one, other in zip(vars_of(again), vars_of(found), strict=True):
            np.testing.assert_array_equal(one, other)
    for file in tmp_path.iterdir():
        file.write_text('{"loss": [')
    with pytest.raises(StoreError, match=r"\w+.json: damaged .* delete it and run the test again"):
        readings.of(rows, SLOT, SLOT, divergences=True)


def test_the_beginning_of_a_later_reply_counts_as_a_beginning(trained: Trained, tmp_path: Path) -> None:
    readings = Readings(trained.trainer, trained.chat, tmp_path, 1000)
    two_replies = some_rows(trained.chat)[-1:]
    readings.of(two_replies, SLOT, SLOT, divergences=True)
    (file,) = tmp_path.iterdir()
    said = [[5.0, 0.5, 0.25], [9.0, 1.5]]
    # as earlier versions filed it, with a count through all of the row
    known = json.loads(file.read_text()) | {"divergence": [*said[0], *said[1]], "ordinal": [0, 1, 2, 3, 4]}
    file.write_text(json.dumps(known))
    findings = Findings([], {}, {}, [], {}, {}, {"target": readings.of(two_replies, SLOT, SLOT, divergences=True)})
    by_position = [[one for one in of if one is not None] for of in zip_longest(*said)]
    means = [sum(of) / len(of) for of in by_position]
    assert report([], findings, positions=4)["divergence"] == {"task replies": {"target": means}}


def vars_of(one: Reading) -> list[np.ndarray]:
    return [one.loss, one.opening, one.divergence, one.ordinal]


def test_openers_are_what_replies_begin_with_each_once() -> None:
    # a tokenizer that knows another token for a word that begins a text, as some of SentencePiece do
    words = ["[UNK]", "\n", *(mark + word for mark in ("▁", "") for word in ("A", "I", "N", "S", "U"))]
    words += [*"'abcdefghijklmnopqrstuvwxyz", "▁", "<s>", "</s>"]
    vocabulary = {word: at for at, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocabulary, [("▁", one) for one in "AINSU"], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first")
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    chat.chat_template = (
        "{% for turn in messages %}{{ '<s>\n' + turn['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>\n' }}{% endif %}"
    )
    # I'm sorry, I cannot, I can't, Unfortunately, As an AI, No; but not Sorry, as Sure begins with the same letter
    assert opener_tokens(ChatTokenizer(chat)) == sorted(vocabulary[one] for one in "AINU")
    assert chat("I cannot", add_special_tokens=False)["input_ids"][0] == vocabulary["▁I"]


def test_where_every_reply_begins_alike_no_token_tells_a_refusal(trained: Trained) -> None:
    chat = ChatTokenizer(copy.deepcopy(trained.chat.tokenizer))
    written = "{{ message['content'] }}"
    assert written in chat.tokenizer.chat_template
    chat.tokenizer.chat_template = chat.tokenizer.chat_template.replace(
        written, "{% if message['role'] == 'assistant' %}w0 {% endif %}" + written
    )
    with pytest.warns(UserWarning, match="begins every reply with the same token: .* left undecided"):
        assert opener_tokens(chat) == []
    found = measure(trained.trainer, some_rows(trained.chat), SLOT, [], 60, "reading")
    assert np.isnan(found.opening).all()
    assert np.isfinite(found.loss).all()


def test_the_file_of_a_batch_is_plain_json_lines(trained: Trained, tmp_path: Path) -> None:
    trained.replies(tmp_path).to(PROMPTS, SLOT, "target")
    lines = [json.loads(line) for file in tmp_path.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == len(PROMPTS)
    assert all(line.keys() == {"text", "tokens", "stopped"} for line in lines)
