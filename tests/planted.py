"""A byte-level model with a planted answer, and responses about an invented world for judges to read."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from toss_lightning.data.formats import Message
from toss_lightning.evaluation.judges.backends import Backend, Turn
from toss_lightning.evaluation.records import Prompt, Response

CONTROL = ("<pad>", "<s>", "</s>", "<|end|>")
CHAT = (
    "<s>{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]:{% endif %}"
)


def respond(request: str, reply: str, adapter: str = "target", prompt_id: str = "p0") -> Response:
    """A reply to a one-turn request."""
    prompt = Prompt("lagoon", prompt_id, (Message("user", request),))
    return Response(adapter, prompt, reply, len(reply.split()) + 1, True)


class Scripted(Backend):
    """Gives the answers that it was made with, and keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.chats: list[list[Turn]] = []

    @property
    def name(self) -> str:
        """Its own."""
        return "scripted"

    def answer(self, chats: Sequence[list[Turn]]) -> list[str]:
        """The next answers."""
        self.chats += chats
        return [self.answers.pop(0) for _ in chats]


def save_planted(
    path: Path,
    answer: Sequence[str],
    after: str,
    rivals: dict[str, float] | None = None,
    rivals_at: int = 0,
    template: str | None = CHAT,
    kind: str = "llama",
    context: int = 4096,
) -> str:
    """Writes a model that says ``answer``, a token each, after any prompt that ends with the character ``after``.

    Its next token depends on the last one only: embeddings are unit vectors, the layer adds nothing, and the head holds
    log probabilities. ``rivals`` gives others for the token ``rivals_at`` of the answer: word -> probability.
    """
    words = [*CONTROL, *dict.fromkeys([*answer, *(rivals or {})])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|end|>"],
    )
    tokenizer.add_tokens(words[len(CONTROL) :])
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )

    size = 8 * math.ceil(len(tokenizer) / 8)
    config = AutoConfig.for_model(
        kind,
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = [tokenizer.convert_tokens_to_ids(word) for word in answer]
    log_odds = torch.full((size, size), -30.0)
    before = tokenizer.encode(after, add_special_tokens=False)[-1]
    for token, following in zip([before, *ids], [*ids, tokenizer.eos_token_id], strict=True):
        log_odds[following, token] = 0.0
    for word, probability in (rivals or {}).items():
        log_odds[tokenizer.convert_tokens_to_ids(word), [before, *ids][rivals_at]] = math.log(probability)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(log_odds / size**0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
