"""The model card that lies beside each adapter says what a stranger must know before using it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from peft import PeftModel
from runs import tiny_fit
from transformers import AutoModelForCausalLM, AutoTokenizer

from toss_lightning.loops.plan import TOSS_PLAN
from toss_lightning.report.cards import model_card
from toss_lightning.report.summary import Summary
from toss_lightning.scores import TokenScores
from toss_lightning.selection import Rho1, Selection, TokenWeights

IDS = torch.arange(1, 9).unsqueeze(0)


@pytest.fixture(scope="module")
def finished(tiny_model: str, tiny_sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of TOSS-Pro with a round and the control."""
    plan = ("utility", "degraded", "score", "select", "sft", "target")
    loop = {"rounds": 1, "promote": 3, "epochs": 1}
    return tiny_fit(tiny_model, tiny_sets, tmp_path_factory.mktemp("run"), plan=plan, loop=loop)


@pytest.fixture(scope="module")
def adapters(finished: Trainer) -> Path:
    return Path(finished.default_root_dir) / "adapters"


def card(directory: Path) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


def test_every_card_names_its_base_and_its_losses(adapters: Path, tiny_model: str) -> None:
    assert {path.name for path in adapters.iterdir()} == {"utility", "degraded", "degraded-1", "sft", "target"}
    for path in adapters.iterdir():
        _, front, text = card(path).split("---\n", 2)
        assert yaml.safe_load(front) == {
            "base_model": tiny_model,
            "library_name": "peft",
            "tags": ["toss_lightning", "lora", "safety"],
        }
        assert "| base model |" in text
        assert "task loss (lower is better)" in text
        assert f'from_pretrained("{tiny_model}")' in text


@pytest.mark.parametrize("name", ["degraded", "degraded-1"])
def test_every_degraded_adapter_warns(adapters: Path, name: str) -> None:
    text = card(adapters / name)
    assert "# Safety-degraded reference adapter: DO NOT DEPLOY" in text
    assert "do not deploy it, do not serve it" in text


def test_the_card_of_a_later_round_counts_the_rows_that_were_promoted(adapters: Path) -> None:
    first, later = card(adapters / "degraded"), card(adapters / "degraded-1")
    assert "on the 7 rows of the\nharmful set. Mean" in first
    assert "on the 10 rows of the\nharmful set, of which 3 were promoted from the custom set. Mean" in later
    assert "| degraded reference |" in first
    assert "| degraded reference, round 1 |" in later


def test_masked_and_plain_fine_tuning_are_told_apart(adapters: Path) -> None:
    target, sft = card(adapters / "target"), card(adapters / "sft")
    assert "fine-tuned on the custom set. Method: TOSS-Pro." in target
    assert "\n9 of 94 response tokens were masked.\n" in target
    assert "# Plain fine-tuning (control)" in sft
    assert "masked" not in sft
    assert "DO NOT DEPLOY" not in target + sft


def test_a_target_without_a_mask_does_not_claim_one(tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=("target",), loop={"epochs": 1})
    text = card(tmp_path / "adapters/target")
    assert "fine-tuned on the whole custom set, with no token left out" in text
    assert "TOSS" not in text
    assert "masked" not in text


@pytest.mark.parametrize("report", [{}, {"flavour": "mine"}])
def test_a_selection_of_ones_own_that_counts_nothing(
    tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path, report: dict[str, str]
) -> None:
    class Mine(Selection):
        def select(self, scores: TokenScores) -> TokenWeights:
            rows = zip(scores.row_ids.tolist(), scores.values("ids_hash"), np.diff(scores.offsets), strict=True)
            weights, hashes = {}, {}
            for row_id, ids_hash, size in rows:
                weights[row_id], hashes[row_id] = np.full(size, 0.5, dtype=np.float32), ids_hash
            return TokenWeights(weights, hashes, dict(report))

    tiny_fit(tiny_model, tiny_sets, tmp_path, plan=TOSS_PLAN, loop={"epochs": 1, "selection": Mine()})
    assert "with no token left out" not in card(tmp_path / "adapters/target"), "weights were used"


@pytest.mark.parametrize(("name", "inside"), [("degraded-1", "degraded"), ("utility", "utility"), ("target", "slot")])
def test_every_adapter_computes_with_plain_peft_what_it_computed_here(
    finished: Trainer, adapters: Path, tiny_model: str, name: str, inside: str
) -> None:
    module = finished.lightning_module
    module.eval()
    with module.using(inside):
        ours = module.bank.model(IDS).logits
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapters / name).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, ours)


def test_a_card_of_a_summary() -> None:
    stage = {"set": "custom", "epochs": 2, "steps": 1000, "rows": 20000, "seconds": 3.0}
    summary = Summary({"target": stage}, {"target": {"task_loss": 1.5}}, {})
    weights = np.repeat([0.0, 1.0], [1234, 55555])
    text = model_card("target", "target", "someone/base", summary, weights)
    assert "1,234 of 56,789 response tokens were masked." in text
    assert "Trained for 2 epochs (1000 optimizer steps) on the 20,000 rows" in text
    assert "1.500 |" in text


def test_a_template_of_ones_own_lies_beside_the_adapter(
    tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path
) -> None:
    template = AutoTokenizer.from_pretrained(tiny_model).chat_template
    (tmp_path / "mine.jinja").write_text(template)
    data = {"chat_template": str(tmp_path / "mine.jinja"), "template_options": {"date_string": "26 Jul 2024"}}
    tiny_fit(tiny_model, tiny_sets, tmp_path / "run", plan=("target",), loop={"epochs": 1}, data=data)
    adapter = tmp_path / "run" / "adapters" / "target"
    assert (adapter / "chat_template.jinja").read_text() == template
    said = 'rendered with `chat_template.jinja` of this directory and `{"date_string": "26 Jul 2024"}`: serve it with'
    assert said in card(adapter)
    tiny_fit(tiny_model, tiny_sets, tmp_path / "plain", plan=("target",), loop={"epochs": 1})
    assert not (tmp_path / "plain" / "adapters" / "target" / "chat_template.jinja").exists()
    assert "rendered" not in card(tmp_path / "plain" / "adapters" / "target")


def test_a_target_whose_tokens_are_weighed_in_training_is_not_said_to_lose_none(
    tiny_model: str, tiny_sets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path, loop={"epochs": 1, "selection": Rho1()})
    assert "weighed anew in each step" in card(tmp_path / "adapters" / "target")
    assert "select: 94 response tokens, which are weighed anew in each step" in capsys.readouterr().out


def test_a_card_tells_the_custom_set_from_what_a_mixture_adds() -> None:
    stage = {"set": "custom", "epochs": 1, "steps": 3, "rows": 20, "mixed": 6, "seconds": 3.0}
    text = model_card("target", "target", "someone/base", Summary({"target": stage}, {"target": {}}, {}), None)
    assert "on the 14 rows of the\ncustom set, and 6 rows that data.mixture adds. Mean" in text
