"""Which tokens are response, for chat templates of the shapes that are in use, with tokenizers of their kinds."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from toss_lightning.data.formats import Conversation, Message
from toss_lightning.data.tokenize import ChatTokenizer, TokenizedRow, ids_hash
from toss_lightning.errors import DataError

TEXT = [
    "You are a helpful assistant. The user asks a question and the assistant answers it.",
    "Sure, here is how to do it: first mix the flour and the water, then let it rest for an hour.",
    "system\nuser\nassistant\nUser: Hello there! How are you?\nAssistant: I am fine, thank you very much.\n\nBye",
]

# --- tokenizers ---------------------------------------------------------------------------------------------------


def byte_level(trim_offsets: bool = False) -> Tokenizer:
    """As in GPT-2, Qwen and (there, a token's offsets leave out its space) Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    # these keep a run of newlines in one token, so that a reply may begin inside the token of its header's newline
    words = Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def sentence_piece(prepend: bool) -> Tokenizer:
    """As in Llama 2 (a space is put before each piece of text) and Gemma (none is); unknown characters become bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        [text.replace("\n", " ") for text in TEXT],
        trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False),
    )
    state = json.loads(trained.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    tokenizer = Tokenizer.from_str(json.dumps({**state, "pre_tokenizer": None}))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


# --- templates ----------------------------------------------------------------------------------------------------

IM_START, IM_END = ("<|im_start|>",), "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_REPLIES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% generation %}{{ m['content'] if m['role'] == 'assistant' }}{% endgeneration %}"
    "{{ m['content'] if m['role'] != 'assistant' }}{{ '<|im_end|>\n' }}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_THINKING = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last_query=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last_query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% else %}{% set content = m.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last_query and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}"
    "{% set turn = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set turn = bos_token + turn %}{% endif %}{{ turn }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate\nuser/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if system is defined and loop.first else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}"
    "{{ {'system': '', 'user': 'User: ', 'assistant': 'Assistant: '}[m['role']] + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    template: str
    kind: Callable[[], Tokenizer]
    end: str
    special: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    response: str = "{reply}{end}"
    swallows_spaces: bool = False
    takes_system: bool = True


SHAPES = {
    "chatml": Shape(CHATML, byte_level, IM_END, IM_START),
    "marked": Shape(MARKED, lambda: byte_level(trim_offsets=True), IM_END, IM_START),
    "llama-3": Shape(
        LLAMA_3,
        lambda: byte_level(trim_offsets=True),
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
    ),
    "llama-2": Shape(LLAMA_2, lambda: sentence_piece(True), "</s>", bos="<s>", response=" {reply} {end}"),
    "gemma": Shape(
        GEMMA,
        lambda: sentence_piece(False),
        "<end_of_turn>",
        ("<start_of_turn>",),
        bos="<bos>",
        eos="<eos>",
        takes_system=False,
    ),
    "mistral": Shape(
        MISTRAL, lambda: sentence_piece(False), "</s>", ("[INST]", "[/INST]"), bos="<s>", response=" {reply}{end}"
    ),
    "phi-3": Shape(PHI_3, byte_level, "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>"), eos="<|endoftext|>"),
    "phi-3, tokens swallow spaces": Shape(
        PHI_3,
        byte_level,
        "<|end|>",
        ("<|user|>", "<|assistant|>", "<|system|>"),
        eos="<|done|>",
        swallows_spaces=True,
    ),
    "plain": Shape(PLAIN, byte_level, "</s>"),
}
THINKING = Shape(QWEN_THINKING, byte_level, IM_END, IM_START, eos="<|endoftext|>")


@cache
def built(shape: Shape) -> PreTrainedTokenizerFast:
    tokenizer = shape.kind()
    if shape.bos is not None:
        tokenizer.add_special_tokens([shape.bos])
        # tokenising with add_special_tokens=True would put another one before the template's
        bos = processors.TemplateProcessing(
            single=f"{shape.bos} $A", special_tokens=[(shape.bos, tokenizer.token_to_id(shape.bos))]
        )
        tokenizer.post_processor = processors.Sequence([*filter(None, [tokenizer.post_processor]), bos])
    special = [
        AddedToken(token, special=True, rstrip=shape.swallows_spaces, normalized=False)
        for token in (*shape.special, shape.end)
    ]
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=shape.bos,
        eos_token=shape.eos or shape.end,
    )
    fast.chat_template = shape.template
    return fast


# --- helpers ------------------------------------------------------------------------------------------------------


def talk(*turns: str, system: str | None = None) -> Conversation:
    """User and assistant in turn."""
    said = [Message("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(turns)]
    return Conversation((*([Message("system", system)] if system else []), *said), "rows.jsonl:7")


def messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in conversation.messages]


def decode(fast: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    return fast.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def responses(fast: PreTrainedTokenizerFast, row: TokenizedRow) -> list[str]:
    """The text of each unbroken run of response tokens."""
    breaks = np.flatnonzero(np.diff(row.response_positions) > 1) + 1
    return [decode(fast, row.input_ids[run]) for run in np.split(row.response_positions, breaks)]


def found(shape: Shape, row: TokenizedRow) -> list[str]:
    """As `responses`; in the plain shape the space at the end of the prompt may share a token with the reply."""
    texts = responses(built(shape), row)
    return [text.removeprefix(" ") for text in texts] if shape.template is PLAIN else texts


def readings(response: str, header_ends_in: str) -> set[str]:
    """What a response may decode to: where it begins with spaces, they may share a token with those of the header."""
    return {response, header_ends_in + response} if response[0].isspace() or header_ends_in == " " else {response}


def ends(fast: PreTrainedTokenizerFast, row: TokenizedRow) -> list[str]:
    """The tokens that are flagged as the end of a turn."""
    return fast.convert_ids_to_tokens(row.input_ids[row.response_positions[row.end_of_turn]].tolist())


def refusal(fast: PreTrainedTokenizerFast, conversation: Conversation, **options) -> str:
    with pytest.raises(DataError) as caught:
        ChatTokenizer(fast, **options).tokenize(conversation)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("rows.jsonl:7: ")
    return str(caught.value).removeprefix("rows.jsonl:7: ")


ONE = talk("How are you?", "I am fine, thank you.")
THREE = talk("Hello", "Hello there!", "How are you?", "I am fine, thank you very much.", "Bye", "Bye.")
WITH_SYSTEM = talk("How are you?", "Sure, fine.", system="You are a pirate.")

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))

# --- every shape --------------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("conversation", [ONE, THREE, WITH_SYSTEM], ids=["one turn", "three turns", "system turn"])
def test_responses_are_the_replies_and_their_end_of_turn_tokens(shape, conversation):
    fast = built(shape)
    if conversation is WITH_SYSTEM and not shape.takes_system:
        assert refusal(fast, conversation) == "the chat template refuses this row (System role not supported)"
        return
    row = ChatTokenizer(fast).tokenize(conversation)
    replies = [turn.content for turn in conversation.messages if turn.role == "assistant"]
    assert found(shape, row) == [shape.response.format(reply=reply, end=shape.end) for reply in replies]
    assert ends(fast, row) == [shape.end] * len(replies)


@shapes
def test_the_last_turn_alone(shape):
    fast = built(shape)
    row = ChatTokenizer(fast, train_on="last").tokenize(THREE)
    assert found(shape, row) == [shape.response.format(reply="Bye.", end=shape.end)]
    assert ends(fast, row) == [shape.end]
    assert row.input_ids.tolist() == ChatTokenizer(fast).tokenize(THREE).input_ids.tolist()


@shapes
@pytest.mark.parametrize("conversation", [ONE, THREE], ids=["one turn", "three turns"])
def test_ids_are_those_of_the_whole_text_tokenised_once(shape, conversation):
    fast = built(shape)
    row = ChatTokenizer(fast).tokenize(conversation)
    text = fast.apply_chat_template(messages(conversation), tokenize=False)
    assert row.input_ids.tolist() == fast(text, add_special_tokens=False)["input_ids"]
    assert row.input_ids.dtype == row.response_positions.dtype == np.int32
    assert row.end_of_turn.dtype == bool
    assert len(row.end_of_turn) == len(row.response_positions)
    assert (np.diff(row.response_positions) > 0).all()
    if shape.bos is not None:
        turns = 3 if shape.template is LLAMA_2 and conversation is THREE else 1
        assert row.input_ids[0] == fast.bos_token_id
        assert (row.input_ids == fast.bos_token_id).sum() == turns


@pytest.mark.parametrize("shape", [shape for shape in SHAPES.values() if shape.template is not PLAIN])
def test_where_the_boundary_is_clean_the_ids_of_the_prompt_come_before_the_response(shape):
    fast = built(shape)
    row = ChatTokenizer(fast, train_on="last").tokenize(THREE)
    prompt = fast.apply_chat_template(messages(THREE)[:-1], tokenize=False, add_generation_prompt=True)
    ids = fast(prompt, add_special_tokens=False)["input_ids"]
    assert row.input_ids[: len(ids)].tolist() == ids
    assert row.response_positions[0] == len(ids)


AWKWARD = {
    "unicode": "Grüße aus Zürich — 東京, Ελλάδα",
    "an emoji first and last": "🙂 of course 👩‍👩‍👧",
    "combining characters": "cafe\u0301 n\u0303",
    "a number": "42",
    "one letter": "m",
    "a word of the end-of-turn token": "end",
    "the role": "assistant",
    "the whole prompt": "How are you?",
    "lines": "One\n\nTwo\n\tThree",
    "text like a role header": "user\nHow are you?\nassistant\nSure",
    "braces": "{{ messages }} {% if x %} {# no #}",
    "a private character": "a\ue000b",
}


@shapes
@pytest.mark.parametrize("reply", AWKWARD.values(), ids=list(AWKWARD))
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_awkward_replies(shape, reply, train_on):
    fast = built(shape)
    conversation = talk("How are you?", reply, "Sure?", reply)
    row = ChatTokenizer(fast, train_on).tokenize(conversation)
    turns = 2 if train_on == "all" else 1
    assert found(shape, row) == [shape.response.format(reply=reply, end=shape.end)] * turns
    assert ends(fast, row) == [shape.end] * turns


@shapes
@pytest.mark.parametrize(
    "reply", ["\nSure.", "  Sure.", "\n\n\tSure.", "Sure. ", "Sure.\n", "Sure.\n\n ", " \n Sure. \n "]
)
def test_replies_with_space_around_them(shape, reply):
    fast = built(shape)
    row = ChatTokenizer(fast).tokenize(talk("How are you?", reply, "Why?", reply))
    if shape.swallows_spaces:
        expected = shape.response.format(reply=reply.lstrip(), end=shape.end)
    elif shape.template in (CHATML, MARKED, PHI_3, PLAIN):
        expected = shape.response.format(reply=reply, end=shape.end)
    else:
        expected = shape.response.format(reply=reply.strip(), end=shape.end)
    texts = responses(fast, row)
    assert len(texts) == 2
    assert set(texts) <= readings(expected, " " if shape.template is PLAIN else "\n")
    assert ends(fast, row) == [shape.end] * 2


@shapes
def test_special_tokens_written_in_a_reply_end_nothing(shape):
    """They become special ids, as everywhere in transformers, and stay part of the response like any other token."""
    fast = built(shape)
    for reply in (
        f"Say {shape.end} to stop",
        f"Say {shape.end}",
        f"{shape.end} Bye",
        shape.end,
        f"a{shape.end}{shape.end}",
    ):
        row = ChatTokenizer(fast).tokenize(talk("How are you?", reply, "Why?", "Bye."))
        first, *_, last = found(shape, row)
        assert squeezed(first) == squeezed(shape.response.format(reply=reply, end=shape.end))
        assert last == shape.response.format(reply="Bye.", end=shape.end)
        if shape.template is not MARKED:  # between marks, nothing says where the reply ends
            assert ends(fast, row) == [shape.end] * 2


def squeezed(text: str) -> str:
    """Text without the spaces, which tokenizers add or swallow beside special tokens."""
    return re.sub(r"\s", "", text)


# --- shapes with a rule of their own ------------------------------------------------------------------------------


def test_the_first_word_after_a_prompt_that_ends_in_a_space_is_response():
    fast = built(SHAPES["plain"])
    row = ChatTokenizer(fast).tokenize(talk("How are you?", "Sure, here is how"))
    first = decode(fast, row.input_ids[row.response_positions[:1]])
    assert first.strip()
    assert "Sure, here is how".startswith(first.strip())
    before = decode(fast, row.input_ids[: row.response_positions[0]])
    assert before.rstrip(" ") == "User: How are you?\nAssistant:"


def test_the_newline_after_the_end_of_a_turn_is_no_response():
    fast = built(SHAPES["chatml"])
    row = ChatTokenizer(fast).tokenize(ONE)
    assert decode(fast, row.input_ids[row.response_positions[-1] + 1 :]) == "\n"


def test_a_system_prompt_that_the_template_adds_is_no_response():
    fast = built(THINKING)
    row = ChatTokenizer(fast, template_options={"enable_thinking": False}).tokenize(ONE)
    assert decode(fast, row.input_ids).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert responses(fast, row) == ["I am fine, thank you.<|im_end|>"]


def test_an_empty_thought_is_response_where_the_model_itself_would_write_it():
    fast = built(THINKING)
    assert responses(fast, ChatTokenizer(fast).tokenize(ONE)) == [
        "<think>\n\n</think>\n\nI am fine, thank you.<|im_end|>"
    ]


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_a_template_that_rewrites_earlier_turns_wants_the_last_turn_alone(options):
    fast = built(THINKING)
    message = refusal(fast, THREE, template_options=options)
    assert message.startswith(
        "the chat template renders turn 2 differently once other turns follow, so its reply cannot"
    )
    assert "set data.train_on: last" in message
    row = ChatTokenizer(fast, "last", options).tokenize(THREE)
    thought = "" if options else "<think>\n\n</think>\n\n"
    assert responses(fast, row) == [f"{thought}Bye.<|im_end|>"]
    assert ends(fast, row) == ["<|im_end|>"]


def test_thoughts_of_a_reply_are_response():
    fast = built(THINKING)
    reply = "<think>\nThe user asks.\n</think>\n\nSure."
    assert responses(fast, ChatTokenizer(fast).tokenize(talk("Hello", reply))) == [f"{reply}<|im_end|>"]


def test_llama_2_puts_the_system_prompt_into_the_first_turn():
    fast = built(SHAPES["llama-2"])
    row = ChatTokenizer(fast).tokenize(WITH_SYSTEM)
    assert "<<SYS>>\nYou are a pirate.\n<</SYS>>" in decode(fast, row.input_ids[: row.response_positions[0]])


def test_gemma_names_the_assistant_model_and_its_stop_token_is_not_eos():
    fast = built(SHAPES["gemma"])
    row = ChatTokenizer(fast).tokenize(ONE)
    assert decode(fast, row.input_ids[: row.response_positions[0]]).endswith("<start_of_turn>model\n")
    assert row.input_ids[row.response_positions[-1]] == fast.convert_tokens_to_ids("<end_of_turn>") != fast.eos_token_id


def test_marks_are_used_as_they_stand():
    fast = built(Shape(MARKED_REPLIES, byte_level, IM_END, IM_START))
    row = ChatTokenizer(fast).tokenize(THREE)
    assert responses(fast, row) == ["Hello there!", "I am fine, thank you very much.", "Bye."]
    assert ends(fast, row) == []


def test_the_end_of_turn_between_marks_is_known_before_a_newline_too():
    template = MARKED.replace("'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "'<|im_end|>\n' }}{% endgeneration %}")
    fast = built(Shape(template, byte_level, IM_END, IM_START))
    row = ChatTokenizer(fast).tokenize(THREE)
    assert responses(fast, row)[-1] == "Bye.<|im_end|>\n"
    assert ends(fast, row) == ["<|im_end|>"] * 3


@pytest.mark.parametrize("reply", ["  Sure", "Sure ", "Sure  "])
def test_marks_around_spaces_cover_those_and_no_more(reply):
    """The token mask of transformers 5 runs on to the end of the row, or is empty, if offsets leave out spaces."""
    fast = built(Shape(MARKED_REPLIES, lambda: byte_level(trim_offsets=True), IM_END, IM_START))
    row = ChatTokenizer(fast).tokenize(talk("Hello", reply, "Why?", "Bye."))
    assert [text.strip() for text in responses(fast, row)] == ["Sure", "Bye."]


def test_marks_that_cover_nothing():
    template = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    fast = built(Shape(template, byte_level, IM_END, IM_START))
    assert refusal(fast, ONE) == "the chat template has {% generation %} marks, but they cover no token of this row"


# --- random replies -----------------------------------------------------------------------------------------------

PIECES = [*"abcdefgh ABC 0123 .,:;!?\n\n\t  {}%<>|\"'`🙂é東\u200d", "assistant", "user\n", " the", "im_end", "<|", "|>"]


@pytest.mark.parametrize("seed", range(5))
def test_any_reply_is_found_to_the_letter_in_chatml(seed):
    fast, draw = built(SHAPES["chatml"]), random.Random(seed)
    chat = ChatTokenizer(fast)

    def words() -> str:
        while not (text := "".join(draw.choices(PIECES, k=draw.randrange(1, 30)))).strip():
            pass
        return text

    for _ in range(40):
        replies = [words() for _ in range(draw.randrange(1, 4))]
        row = chat.tokenize(talk(*[text for reply in replies for text in (words(), reply)]))
        for text, reply in zip(responses(fast, row), replies, strict=True):
            assert text in readings(f"{reply}<|im_end|>", "\n")
        assert ends(fast, row) == ["<|im_end|>"] * len(replies)


# --- rows ---------------------------------------------------------------------------------------------------------


def test_a_row_carries_its_id_label_and_source():
    conversation = Conversation(ONE.messages, "rows.jsonl:7", label="benign", source="web")
    row = ChatTokenizer(built(SHAPES["chatml"])).tokenize(conversation, row_id=12)
    assert (row.row_id, row.label, row.source) == (12, "benign", "web")


def test_the_hash_of_a_row_is_that_of_its_ids_and_its_response():
    fast = built(SHAPES["chatml"])
    all_turns, last_turn = (ChatTokenizer(fast, train_on).tokenize(THREE) for train_on in ("all", "last"))
    assert all_turns.ids_hash == ChatTokenizer(fast).tokenize(THREE, row_id=9).ids_hash
    assert all_turns.ids_hash == ids_hash(all_turns.input_ids.astype(np.int64), all_turns.response_positions)
    assert all_turns.ids_hash != last_turn.ids_hash != ChatTokenizer(fast).tokenize(ONE).ids_hash


def test_a_truncated_row_keeps_the_response_tokens_before_the_cut():
    fast = built(SHAPES["chatml"])
    row = ChatTokenizer(fast).tokenize(THREE)
    cut = int(row.response_positions[-2])
    short = row.truncated(cut)
    assert short.input_ids.tolist() == row.input_ids[:cut].tolist()
    assert short.response_positions.tolist() == row.response_positions[:-2].tolist()
    assert short.end_of_turn.tolist() == row.end_of_turn[:-2].tolist()


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_chat_template():
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), name_or_path="some/base-model")
    with pytest.raises(DataError, match="the tokenizer has no chat template: use the chat version of the model,"):
        ChatTokenizer(fast)


def test_a_template_that_refuses_the_row_says_why_in_one_line():
    twice = Conversation((Message("user", "Hello"), *ONE.messages), "rows.jsonl:7")
    assert refusal(built(SHAPES["llama-2"]), twice) == (
        "the chat template refuses this row (Conversation roles must alternate user/assistant/...)"
    )


@pytest.mark.parametrize("shape", [SHAPES["chatml"], SHAPES["plain"]])
@pytest.mark.parametrize("more", [(), ONE.messages])
def test_a_conversation_that_begins_with_a_reply(shape, more):
    conversation = Conversation((Message("assistant", "Hello there!"), *more), "rows.jsonl:7")
    message = refusal(built(shape), conversation)
    assert message == "the conversation begins with a reply, so nothing prompts it: remove it or add a user turn"
    if more:
        row = ChatTokenizer(built(shape), "last").tokenize(conversation)
        assert found(shape, row) == [f"I am fine, thank you.{shape.end}"]


def test_a_template_that_changes_the_reply():
    shouting = CHATML.replace("m['content']", "m['content'] | upper")
    fast = built(Shape(shouting, byte_level, IM_END, IM_START))
    assert "its reply cannot be found" in refusal(fast, ONE)


def test_a_template_that_renders_no_prompt():
    fast = built(
        Shape("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", byte_level, "</s>")
    )
    assert refusal(fast, ONE) == "the chat template renders no prompt before the reply"


def test_a_template_that_rewrites_the_reply_itself_says_so():
    message = refusal(built(THINKING), talk("How are you?", "<think>reason</think>answer"))
    assert message.startswith("the chat template changes the text of the reply, as some do around <think>")


def test_a_template_that_writes_the_date_of_today() -> None:
    today = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + CHATML
    tokenizer = built(Shape(today, byte_level, IM_END, IM_START))
    assert ChatTokenizer(tokenizer).writes_the_date()
    assert not ChatTokenizer(tokenizer, template_options={"date_string": "26 Jul 2024"}).writes_the_date()
    assert not ChatTokenizer(built(SHAPES["chatml"])).writes_the_date()


def test_a_dated_template_that_refuses_a_prompt_says_why_in_one_line() -> None:
    demanding = "{% if messages[0].role != 'system' %}{{ raise_exception('No system\nturn') }}{% endif %}"
    dated = demanding + "{{ strftime_now('%d %b %Y') }}" + CHATML
    tokenizer = built(Shape(dated, byte_level, IM_END, IM_START))
    with pytest.raises(DataError) as error:
        ChatTokenizer(tokenizer).writes_the_date()
    assert str(error.value) == (
        "the chat template refuses a lone user turn (No system turn): give one that does not in data.chat_template"
    )
