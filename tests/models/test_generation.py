import numpy as np
import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from toss_lightning.errors import ConfigError
from toss_lightning.models.generation import Sampling, generate

PROMPTS = [np.array([10, 11, 12]), np.array([20]), np.array([30, 31])]
STOP = [3, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    path = save_tiny_model(tmp_path_factory.mktemp("model"))
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return loaded


def one_by_one(model: PreTrainedModel, prompt: np.ndarray, count: int, penalty: float = 1.0) -> list[int]:
    """The likeliest continuation, a token at a time, without cache, padding or batch; what was seen is penalised."""
    ids = prompt.tolist()
    for _ in range(count):
        logits = model(torch.tensor([ids])).logits[0, -1].tolist()
        for seen in set(ids):
            logits[seen] *= penalty if logits[seen] < 0 else 1 / penalty
        ids.append(int(np.argmax(logits)))
        if ids[-1] in STOP:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("count", [1, 7])
def test_replies_are_the_likeliest_tokens_whatever_stands_beside_them(model: PreTrainedModel, count: int) -> None:
    found = generate(model, PROMPTS, Sampling(count), STOP)
    assert [reply.tolist() for reply in found] == [one_by_one(model, prompt, count) for prompt in PROMPTS]


def test_a_penalty_for_repetition_reads_a_prompt_and_no_padding(model: PreTrainedModel) -> None:
    penalised = Sampling(7, repetition_penalty=5.0)
    alone = [one_by_one(model, prompt, 7, penalty=5.0) for prompt in PROMPTS]
    assert alone != [one_by_one(model, prompt, 7) for prompt in PROMPTS]
    assert [reply.tolist() for reply in generate(model, PROMPTS, penalised, STOP)] == alone
    # where what a shorter prompt is answered with ends replies: padding with it would put it off
    shorter = min(range(len(PROMPTS)), key=lambda at: len(PROMPTS[at]))
    stop = alone[shorter][:1]
    assert generate(model, PROMPTS, penalised, stop)[shorter].tolist() == stop


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_tokens_are_drawn_as_often_as_the_temperature_makes_them(model: PreTrainedModel, temperature: float) -> None:
    prompt, draws = PROMPTS[0], 4000
    drawn = np.concatenate(generate(model, [prompt] * draws, Sampling(1, temperature), STOP))
    with torch.no_grad():
        wanted = (model(torch.tensor([prompt.tolist()])).logits[0, -1] / temperature).softmax(-1).numpy()
    assert np.abs(np.bincount(drawn, minlength=len(wanted)) / draws - wanted).sum() / 2 < 0.1


def test_a_tiny_top_p_leaves_the_likeliest_tokens(model: PreTrainedModel) -> None:
    found = generate(model, PROMPTS, Sampling(7, temperature=3.0, top_p=1e-6), STOP)
    assert [reply.tolist() for reply in found] == [one_by_one(model, prompt, 7) for prompt in PROMPTS]


def test_a_reply_ends_with_what_ends_it_while_others_go_on(model: PreTrainedModel) -> None:
    wanted = [one_by_one(model, prompt, 4) for prompt in PROMPTS]
    stop = [wanted[0][0]]
    assert not any(stop[0] in reply for reply in wanted[1:])
    found = [reply.tolist() for reply in generate(model, PROMPTS, Sampling(4), stop)]
    assert found == [wanted[0][:1], *wanted[1:]]


def test_what_the_model_brings_along_does_not_count(model: PreTrainedModel) -> None:
    plain = generate(model, PROMPTS, Sampling(6), STOP)
    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, top_k=3)
    try:
        found = generate(model, PROMPTS, Sampling(6), STOP)
        assert model.generation_config.repetition_penalty == 9.0
    finally:
        model.generation_config = own
    assert [reply.tolist() for reply in found] == [reply.tolist() for reply in plain]


def test_draws_are_fixed_by_seed_and_place_and_leave_the_global_ones_alone(model: PreTrainedModel) -> None:
    hot = Sampling(12, temperature=3.0)
    torch.manual_seed(1)
    first = generate(model, PROMPTS, hot, STOP, draw=4)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after
    same, place, seed = (
        generate(model, PROMPTS, hot, STOP, draw=4),
        generate(model, PROMPTS, hot, STOP, draw=5),
        generate(model, PROMPTS, Sampling(12, temperature=3.0, seed=1), STOP, draw=4),
    )
    texts = [[reply.tolist() for reply in one] for one in (first, same, place, seed)]
    assert texts[0] == texts[1]
    assert texts[2] != texts[0] != texts[3]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(0), "here.max_new_tokens: 0 cannot be used: give 1 or more"),
        (Sampling(temperature=-1), "here.temperature: -1 cannot be used: give 0 or more"),
        (Sampling(top_p=0), "here.top_p: 0 cannot be used"),
        (Sampling(repetition_penalty=0), "here.repetition_penalty: 0 cannot be used"),
        (Sampling(seed=-1), "here.seed: -1 cannot be used: give 0 or more"),
    ],
)
def test_settings_that_cannot_be_drawn_from(sampling: Sampling, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampling.check("here")
