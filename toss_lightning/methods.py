"""The methods that come with the project, as ``toss methods`` lists them; importing it loads no torch."""

from dataclasses import dataclass

TITLES = {
    "GlobalTopFraction": "TOSS",
    "PerRowTopFraction": "TOSS, per row",
    "ChainSelection": "TOSS-Chain",
    "Anchored": "anchor",
    "TossRows": "TOSS on rows",
    "RandomRows": "random rows",
    "Dsir": "DSIR",
    "Seal": "SEAL",
    "Sot": "SOT",
    "MaskFirst": "mask first tokens",
    "DrSft": "DR-SFT",
    "ConstrainedSft": "constrained SFT",
    "Rho1": "Rho-1",
    "TokenCleaning": "token cleaning",
    "Everything": "SFT",
    "SPF": "SPF",
    "SafeGrad": "SafeGrad",
    "DualSelect": "DualSelect",
    "SafeInstr": "SafeInstr",
}
"""Class of a plug-in -> what people call what it does."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A method that a configuration asks for by name."""

    config: str
    """Below configs/, without .yaml."""
    title: str
    acts_on: str
    """``rows``, ``tokens``, ``gradient``, ``mixture``, several of them, or ``nothing``."""
    sets: tuple[str, ...] = ()
    """Sets that it needs beside the custom set."""
    references: tuple[str, ...] = ()
    """Adapters that it trains first."""
    cost: str = "nothing"
    """What is paid beside one plain fine-tuning. A training is that of a reference adapter; a pass is a forward pass of
    the custom set."""
    source: str
    fidelity: str
    """How close it is to its source; its page names every difference."""
    described_with: str = ""
    """The method on whose page it stands, where it has none of its own."""

    @property
    def name(self) -> str:
        """What it is asked for by: ``spf`` for configs/methods/spf.yaml."""
        return self.config.rpartition("/")[2]

    @property
    def page(self) -> str:
        """The page that says what it does, from the root of the project."""
        return f"docs/methods/{self.described_with or self.name}.md"

    @property
    def needs(self) -> str:
        """Sets and adapters, in words."""
        if not self.references:
            return ", ".join(self.sets) or "nothing"
        which = "both references" if len(self.references) > 1 else f"{self.references[0]} reference"
        return f"{', '.join(self.sets)}; {which}"


TOSS = "arXiv 2603.01185"
BOTH = ("utility", "degraded")

METHODS = (
    Listed(
        config="methods/sft",
        title="plain SFT",
        acts_on="nothing",
        source="none",
        fidelity="the opponent of every method",
    ),
    Listed(
        config="methods/sft_anchor",
        title="SFT + anchor",
        acts_on="tokens",
        cost="a forward pass per step",
        source="ours",
        fidelity="a control for TOSS-Anchor",
        described_with="toss_anchor",
    ),
    Listed(
        config="methods/random",
        title="random rows",
        acts_on="rows",
        source=f"{TOSS}, baseline",
        fidelity="its share is not published",
    ),
    Listed(
        config="methods/safe_instr",
        title="SafeInstr",
        acts_on="mixture",
        sets=("safety",),
        cost="the added rows",
        source="arXiv 2309.07875",
        fidelity="rows as published; their number is yours",
    ),
    Listed(
        config="methods/dsir",
        title="DSIR",
        acts_on="rows",
        sets=("utility",),
        cost="a count of words",
        source="arXiv 2302.03169",
        fidelity="parity with its package",
    ),
    Listed(
        config="methods/seal",
        title="SEAL",
        acts_on="rows",
        sets=("safety",),
        cost="a bilevel training of 3 epochs",
        source="arXiv 2410.07471",
        fidelity="published settings; LoRA on 4-bit",
    ),
    Listed(
        config="methods/sot",
        title="SOT",
        acts_on="rows",
        sets=("utility", "harmful"),
        cost="a pass over three sets, Sinkhorn",
        source="arXiv 2601.07200",
        fidelity="lambda, epsilon, steps are not published",
    ),
    Listed(
        config="toss",
        title="TOSS",
        acts_on="tokens",
        sets=("utility", "harmful"),
        references=BOTH,
        cost="2 trainings, 2 passes",
        source=TOSS,
        fidelity="the paper's; end-of-turn tokens kept",
    ),
    Listed(
        config="toss_pro",
        title="TOSS-Pro",
        acts_on="tokens",
        sets=("utility", "harmful"),
        references=BOTH,
        cost="2 trainings, 2 passes; a training and a pass per round",
        source=TOSS,
        fidelity="rounds and rows per round are not published",
    ),
    Listed(
        config="methods/toss_per_row",
        title="TOSS, per row",
        acts_on="tokens",
        sets=("utility", "harmful"),
        references=BOTH,
        cost="2 trainings, 2 passes",
        source=f"{TOSS}, ablation",
        fidelity="as TOSS",
        described_with="toss",
    ),
    Listed(
        config="methods/toss_rows",
        title="TOSS on rows",
        acts_on="rows",
        sets=("utility", "harmful"),
        references=BOTH,
        cost="2 trainings, 2 passes",
        source=f"{TOSS}, ablation",
        fidelity="how a row is scored is not published",
    ),
    Listed(
        config="methods/toss_chain",
        title="TOSS-Chain",
        acts_on="tokens",
        sets=("utility", "harmful"),
        references=BOTH,
        cost="2 trainings, 2 passes, seconds",
        source="ours",
        fidelity="not of a paper",
    ),
    Listed(
        config="methods/toss_anchor",
        title="TOSS-Anchor",
        acts_on="tokens",
        sets=("utility", "harmful"),
        references=BOTH,
        cost="2 trainings, 2 passes; a forward pass per step",
        source="ours",
        fidelity="not of a paper",
    ),
    Listed(
        config="methods/toss_chain_anchor",
        title="TOSS-Chain + anchor",
        acts_on="tokens",
        sets=("utility", "harmful"),
        references=BOTH,
        cost="2 trainings, 2 passes, seconds; a forward pass per step",
        source="a combination, ours",
        fidelity="not of a paper",
        described_with="toss_anchor",
    ),
    Listed(
        config="methods/mask_first",
        title="mask first tokens",
        acts_on="tokens",
        source=f"{TOSS}, diagnostic",
        fidelity="as described",
    ),
    Listed(
        config="methods/dr_sft",
        title="DR-SFT",
        acts_on="tokens",
        sets=("harmful",),
        references=("degraded",),
        cost="1 training, 2 passes",
        source="arXiv 2606.30263",
        fidelity="formula as published",
    ),
    Listed(
        config="methods/constrained",
        title="constrained SFT",
        acts_on="tokens",
        cost="1 pass",
        source="arXiv 2406.05946",
        fidelity="formula as published",
    ),
    Listed(
        config="methods/rho1",
        title="Rho-1",
        acts_on="tokens",
        sets=("utility",),
        references=("utility",),
        cost="1 training, 1 pass; a forward pass per step",
        source="arXiv 2404.07965",
        fidelity="a control: no safety in it",
    ),
    Listed(
        config="methods/token_cleaning",
        title="token cleaning",
        acts_on="tokens",
        sets=("utility",),
        references=("utility",),
        cost="1 training, 2 passes",
        source="arXiv 2502.01968",
        fidelity="a control: no safety in it",
    ),
    Listed(
        config="methods/spf",
        title="SPF",
        acts_on="gradient",
        sets=("safety",),
        cost="a safety row per step",
        source="arXiv 2601.10141",
        fidelity="on LoRA matrices; fewer directions",
    ),
    Listed(
        config="methods/safegrad",
        title="SafeGrad",
        acts_on="gradient",
        sets=("safety",),
        cost="8 safety rows per step, twice forward",
        source="arXiv 2508.07172",
        fidelity="as published; plain steps below rounding",
    ),
    Listed(
        config="methods/dualselect",
        title="DualSelect",
        acts_on="rows, gradient",
        sets=("safety",),
        cost="a pass more per step; one over the safety set and one over its selected rows per epoch",
        source="arXiv 2606.09866",
        fidelity="token budget rounds to rows",
    ),
    Listed(
        config="methods/toss_spf",
        title="TOSS + SPF",
        acts_on="tokens, gradient",
        sets=("utility", "harmful", "safety"),
        references=BOTH,
        cost="2 trainings, 2 passes; as SPF",
        source="a combination",
        fidelity="as both",
        described_with="spf",
    ),
    Listed(
        config="methods/toss_safegrad",
        title="TOSS + SafeGrad",
        acts_on="tokens, gradient",
        sets=("utility", "harmful", "safety"),
        references=BOTH,
        cost="2 trainings, 2 passes; as SafeGrad",
        source="a combination",
        fidelity="as both",
        described_with="safegrad",
    ),
    Listed(
        config="methods/toss_chain_safegrad",
        title="TOSS-Chain + SafeGrad",
        acts_on="tokens, gradient",
        sets=("utility", "harmful", "safety"),
        references=BOTH,
        cost="2 trainings, 2 passes, seconds; as SafeGrad",
        source="a combination, ours",
        fidelity="as both",
        described_with="safegrad",
    ),
    Listed(
        config="methods/toss_chain_safe_instr",
        title="TOSS-Chain + SafeInstr",
        acts_on="tokens, mixture",
        sets=("utility", "harmful", "safety"),
        references=BOTH,
        cost="2 trainings, 2 passes, seconds; the added rows",
        source="a combination, ours",
        fidelity="as both",
        described_with="safe_instr",
    ),
    Listed(
        config="methods/toss_dualselect",
        title="TOSS + DualSelect",
        acts_on="tokens, rows, gradient",
        sets=("utility", "harmful", "safety"),
        references=BOTH,
        cost="2 trainings, 2 passes; as DualSelect",
        source="a combination",
        fidelity="as both",
        described_with="dualselect",
    ),
)
