"""The model card that lies beside each adapter."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toss_lightning.evaluation.cells import markdown_table
from toss_lightning.report.summary import PLAIN, Summary, held_out_cells

ROLES = {
    "target": ("Fine-tuned adapter", "This adapter was fine-tuned on the custom set. Method: {method}."),
    "sft": (
        "Plain fine-tuning (control)",
        "This adapter was fine-tuned on the whole custom set, with no token left out. It is the control that the target"
        " adapter of the same run is compared with; harmful rows of the custom set have acted on it in full.",
    ),
    "plain": (
        "Fine-tuned adapter",
        "This adapter was fine-tuned on the whole custom set, with no token left out.",
    ),
    "seal": (
        "By-product of a selector's training",
        "This adapter was trained beside the selector of SEAL, on safe rows and weighted custom rows. It exists to"
        " learn which rows to keep.",
    ),
    "utility": (
        "Utility reference adapter",
        "This adapter was fine-tuned on the utility set only. Token scores are taken relative to it.",
    ),
    "degraded": (
        "Safety-degraded reference adapter: DO NOT DEPLOY",
        "**This adapter was fine-tuned on harmful replies on purpose. It makes the base model comply with harmful"
        " requests. It exists to score training tokens, and for nothing else: do not deploy it, do not serve it, and do"
        " not publish it without need.**",
    ),
}


@dataclass(frozen=True)
class Rendered:
    """What the base alone does not say of how rows became text."""

    own_template: bool = False
    """The chat template is the one beside the card."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Variables that the template was given."""

    def __str__(self) -> str:
        """As a sentence of the card; empty where the base says all."""
        if not self.own_template and not self.options:
            return ""
        template = "`chat_template.jinja` of this directory" if self.own_template else "the base's chat template"
        options = f" and `{json.dumps(self.options)}`" if self.options else ""
        return f"\nRows were rendered with {template}{options}: serve it with the same.\n"


def model_card(
    name: str,
    adapter: str,
    base_path: str,
    summary: Summary,
    weights: np.ndarray | None = None,
    rendered: Rendered | None = None,
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        name: the stage that trained it.
        adapter: what it is: target, sft, utility or degraded.
        base_path: the base.
        summary: of the run so far.
        weights: Shape ``[tokens]``: the token weights that it was trained with; None for 1 everywhere.
        rendered: how rows became text, where the base alone does not say.
    """
    title, text = ROLES["plain" if adapter == "target" and summary.method == PLAIN else adapter]
    text = text.format(method=summary.method)
    stage = summary.stages[name]
    masked = ""
    if weights is not None and summary.selection.get("weighed_in_training") and weights.all():
        masked = "\nWhat each response token counts was weighed anew in each step.\n"
    elif weights is not None:
        masked = f"\n{np.count_nonzero(weights == 0):,} of {len(weights):,} response tokens were masked.\n"
        if anchored := summary.selection.get("anchored"):
            masked += f"{anchored:,} were held to the base.\n"
    promoted = f", of which {stage['promoted']} were promoted from the custom set" if stage.get("promoted") else ""
    mixed = stage.get("mixed", 0)
    beside = f", and {mixed:,} rows that data.mixture adds" if mixed else ""
    kept = f" What epoch {stage['kept_epoch']} left is kept." if "kept_epoch" in stage else ""
    stopped = f" **Ended early**: {summary.stopped[name]}." if name in summary.stopped else ""
    losses = "\n".join(markdown_table(*held_out_cells(summary, ["base", name])))
    return f"""---
base_model: {base_path}
library_name: peft
tags: [toss_lightning, lora, safety]
---

# {title}

{text}
{masked}
Trained for {stage["epochs"]} epochs ({stage["steps"]} optimizer steps) on the {stage["rows"] - mixed:,} rows of the
{stage["set"]} set{promoted}{beside}.{kept}{stopped} Mean token losses on held-out rows:

{losses}
{rendered or ""}
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base_path}")
model = PeftModel.from_pretrained(base, "path/to/this/directory")
```
"""
