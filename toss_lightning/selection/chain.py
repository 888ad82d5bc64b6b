"""TOSS-Chain, our own: harm comes in runs, so a token is judged by the scores around it as well as by its own."""

import math
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from toss_lightning.errors import ConfigError
from toss_lightning.scores.ranking import exact_top
from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.base import Selection, TokenWeights, mask_weights
from toss_lightning.selection.checks import SAME_REFERENCES, check_told_apart, masked_count
from toss_lightning.selection.two_state import Chain, fit, pack, posterior

Number = float | Literal["fit"]

FIT_TOKENS = 1 << 19
"""Tokens that are enough to fit three numbers."""
START = Chain(stay=0.95, prior=0.1, temperature=2.0)
"""Where EM begins."""


class ChainSelection(Selection):
    """Masks the tokens that most probably lie in a harmful run, given the scores of their whole response.

    Each response is read as a chain of hidden states, benign or harmful, of which token scores are noisy evidence
    (:mod:`toss_lightning.selection.two_state`). Tokens are ranked by the posterior log odds of the harmful state.

    Args:
        discard: share of the response tokens that get weight 0, in [0, 1), as in :class:`GlobalTopFraction`; ``null``
            masks every token whose posterior probability of harm is above ``threshold`` instead.
        threshold: that probability, in (0, 1); lower masks more.
        stay: probability that the state stays from one token to the next, in [0, 1), before it is drawn anew; 0 judges
            every token alone, and towards 1 whole responses are judged. ``fit`` fits it to the custom set's scores.
        temperature: what a score is divided by to be evidence, above 0; 1 takes it for the log-likelihood ratio that it
            is of the two references, higher numbers for a weaker one. ``fit`` fits it, at 1 or above.
        prior: share of harmful tokens to expect, in (0, 1). ``fit`` fits it.
        centre: the score that speaks for neither state, in nats. 0 is where the two references agree; ``fit`` fits it,
            for references of unequal quality, whose scores are shifted as a whole.
        protect_end: never mask an end-of-turn token, and leave it out of the chain: its score tells whether the
            references would have stopped here, which is a matter of style and not of harm.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        discard: float | None = 0.1,
        threshold: float = 0.5,
        stay: Number = "fit",
        temperature: Number = "fit",
        prior: Number = "fit",
        centre: Number = 0.0,
        protect_end: bool = True,
    ) -> None:
        if discard is not None and not 0 <= discard < 1:
            raise ConfigError(
                f"loop.selection.discard: {discard} is not a share: give one in [0, 1), or null to go by threshold"
            )
        if not 0 < threshold < 1:
            raise ConfigError(f"loop.selection.threshold: {threshold} is no probability: give a number in (0, 1)")
        if stay != "fit" and not 0 <= stay < 1:
            raise ConfigError(f"loop.selection.stay: {stay} is out of range: give a number in [0, 1), or fit")
        if temperature != "fit" and not temperature > 0:
            raise ConfigError(f"loop.selection.temperature: {temperature}: give a number above 0, or fit")
        if prior != "fit" and not 0 < prior < 1:
            raise ConfigError(f"loop.selection.prior: {prior} is out of range: give a number in (0, 1), or fit")
        if centre != "fit" and not math.isfinite(centre):
            raise ConfigError(f"loop.selection.centre: {centre} is no score: give a number, or fit")
        self.discard, self.threshold, self.protect_end = discard, threshold, protect_end
        numbers = {"stay": stay, "temperature": temperature, "prior": prior, "centre": centre}
        self.given = {name: float(value) for name, value in numbers.items() if value != "fit"}

    def select(self, scores: TokenScores) -> TokenWeights:
        """Masks the tokens of harmful runs.

        Raises:
            ConfigError: ``discard`` is more than there are tokens that may be masked.
            StoreError: a score is not finite, or all are equal and ``discard`` wants some of them.
        """
        score, end = scores.score().astype(np.float64), scores.flat("end_of_turn")
        free = ~end if self.protect_end else np.ones_like(end)
        values, offsets = torch.from_numpy(score[free]), np.concatenate([[0], np.cumsum(free)])[scores.offsets]
        chain, fitted = self._chain(values, offsets)
        odds = log_odds(values, offsets, chain).numpy()
        likely = odds > math.log(self.threshold / (1 - self.threshold))
        if self.discard is None:
            chosen = likely
        else:
            count = masked_count(self.discard, len(score), len(odds))
            # of scores, for the odds of equal ones differ by where in a row they stand
            check_told_apart(score[free], count, scores.path, "tokens that may go", SAME_REFERENCES)
            chosen = exact_top(odds, count)
        self._warn(fitted, float(likely.mean()) if len(likely) else 0.0)
        masked = np.zeros_like(end)
        masked[free] = chosen
        return mask_weights(
            scores,
            masked,
            discard=self.discard,
            threshold=self.threshold,
            likely_harmful=int(likely.sum()),
            least_log_odds=float(odds[chosen].min()) if chosen.any() else None,
            end_tokens=int(end.sum()),
            chain=chain._asdict(),
            fit=fitted,
        )

    def _warn(self, fitted: dict[str, Any] | None, likely: float) -> None:
        """Says where the fit or the automatic cut is not to be trusted."""
        if fitted is not None and not fitted["converged"]:
            rank_zero_warn(
                f"loop.selection: EM had not converged after {fitted['iterations']} iterations: give"
                f" {', '.join(fitted['fitted'])}, or look at the chain in selection.json before you trust it"
            )
        if self.discard is None and likely > 0.5:
            rank_zero_warn(
                f"loop.selection: the automatic cut takes {likely:.0%} of the tokens for harmful. Where the references"
                " are of unequal quality all scores are shifted: set centre: fit, or discard to a share"
            )

    def _chain(self, scores: Tensor, offsets: np.ndarray) -> tuple[Chain, dict[str, Any] | None]:
        """The chain with what was given and the rest fitted, and a report of the fit."""
        start = Chain(**{**START._asdict(), **self.given})
        free = set(Chain._fields) - self.given.keys()
        if not free or not len(scores):
            return start, None
        rows = np.random.default_rng(0).permutation(len(offsets) - 1)
        some = np.sort(rows[: max(1, int(np.searchsorted(np.cumsum(np.diff(offsets)[rows]), FIT_TOKENS, "right")))])
        sample = torch.cat([scores[offsets[row] : offsets[row + 1]] for row in some])
        if "centre" in free:
            start = start._replace(centre=float(sample.mean()))  # so that a shift of all scores shifts it and no more
        found = fit(sample, np.concatenate([[0], np.cumsum(np.diff(offsets)[some])]), start, free)
        return found.chain, {
            "fitted": sorted(free),
            "tokens": len(sample),
            "iterations": len(found.log_likelihoods) - 1,
            "converged": found.converged,
            "log_likelihood": found.log_likelihoods[-1],
            "log_likelihood_over_no_harm": found.evidence,
        }


def log_odds(scores: Tensor, offsets: np.ndarray, chain: Chain) -> Tensor:
    """Posterior log odds of harm of every token.

    Args:
        scores: Shape ``[tokens]``, rows one after the other.
        offsets: Shape ``[R + 1]``: row r's tokens are ``offsets[r]:offsets[r + 1]``.
        chain: its parameters.

    Returns:
        Shape ``[tokens]``, as ``scores``.
    """
    odds = torch.empty_like(scores)
    for batch in pack(offsets):
        odds[batch.tokens] = posterior(chain.evidence(scores[batch.tokens]), batch.sizes, chain)
    return odds
