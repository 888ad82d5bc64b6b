"""TOSS-Chain, our own: harm comes in runs, so a token is judged by the scores around it as well as by its own."""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from toss_lightning.errors import ConfigError, StoreError
from toss_lightning.scores.ranking import exact_top, share_of
from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.base import Selection, mask_weights
from toss_lightning.selection.checks import SAME_REFERENCES, check_told_apart, masked_count
from toss_lightning.selection.two_state import Chain, fit, pack, posterior
from toss_lightning.selection.weights import TokenWeights

Number = float | Literal["fit"]

HARMLESS, HARMFUL = "utility_val", "harmful_val"
"""Rows whose kind is known, and that no reference was trained on."""

EVEN = 0.5
"""The probability of harm above which it is likelier than not."""
FIT_TOKENS = 1 << 19
"""Tokens that are enough to fit three numbers."""
START = Chain(stay=0.95, prior=0.1, temperature=2.0)
"""Where EM begins."""


class ChainSelection(Selection):
    """Masks the tokens that most probably lie in a harmful run, given the scores of their whole response.

    Each response, which is all replies of a row, is read as a chain of hidden states, benign or harmful, of which token
    scores are noisy evidence (:mod:`toss_lightning.selection.two_state`). Tokens are ranked by the posterior log odds
    of the harmful state.

    Args:
        discard: share of the response tokens that get weight 0, in [0, 1), as in :class:`GlobalTopFraction`; ``null``
            masks every token whose posterior probability of harm is above ``threshold`` instead.
        threshold: that probability, in (0, 1); lower masks more.
        stay: probability that the state stays from one token to the next, in [0, 1), before it is drawn anew; 0 judges
            every token alone, and towards 1 whole responses are judged. ``fit`` fits it to the custom set's scores.
        temperature: what a score is divided by to be evidence, above 0; 1 takes it for the log-likelihood ratio that it
            is of the two references, higher numbers for a weaker one. ``fit`` fits it, at 1 or above.
        prior: share of harmful tokens to expect, in (0, 1). ``fit`` fits it.
        centre: the score that speaks for neither state, in nats. 0 is where the two references agree. For references of
            unequal quality, whose scores are shifted as a whole, ``held_out`` takes the middle between the mean scores
            of held-out utility rows and of held-out harmful rows, and ``fit`` fits it.
        protect_end: never mask an end-of-turn token, and leave it out of the chain: its score tells whether the
            references would have stopped here, which is a matter of style and not of harm.
        false_alarms: with ``discard: null``, the share that the cut may take at most, in [0, 1), of those tokens of
            held-out utility rows that may be masked. It then stands where these rows say, and not at ``threshold``.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        discard: float | None = 0.1,
        threshold: float = EVEN,
        stay: Number = "fit",
        temperature: Number = "fit",
        prior: Number = "fit",
        centre: Number | Literal["held_out"] = 0.0,
        protect_end: bool = True,
        false_alarms: float | None = None,
    ) -> None:
        if discard is not None and not 0 <= discard < 1:
            raise ConfigError(
                f"loop.selection.discard: {discard} is not a share: give one in [0, 1), or null to go by threshold"
            )
        if not 0 < threshold < 1:
            raise ConfigError(f"loop.selection.threshold: {threshold} is no probability: give a number in (0, 1)")
        if threshold != EVEN and (discard is not None or false_alarms is not None):
            key = "discard" if discard is not None else "false_alarms"
            raise ConfigError(
                f"loop.selection.threshold: the share of loop.selection.{key} makes the cut: set {key} to null, or"
                " leave threshold out"
            )
        if false_alarms is not None and not 0 <= false_alarms < 1:
            raise ConfigError(
                f"loop.selection.false_alarms: {false_alarms} is not a share: give one in [0, 1), or null"
            )
        if false_alarms is not None and discard is not None:
            raise ConfigError(
                f"loop.selection.false_alarms: the share {discard} of loop.selection.discard makes the cut: set discard"
                " to null, or false_alarms"
            )
        if stay != "fit" and not 0 <= stay < 1:
            raise ConfigError(f"loop.selection.stay: {stay} is out of range: give a number in [0, 1), or fit")
        if temperature != "fit" and not temperature > 0:
            raise ConfigError(f"loop.selection.temperature: {temperature}: give a number above 0, or fit")
        if prior != "fit" and not 0 < prior < 1:
            raise ConfigError(f"loop.selection.prior: {prior} is out of range: give a number in (0, 1), or fit")
        if centre not in ("fit", "held_out") and (isinstance(centre, str) or not math.isfinite(centre)):
            raise ConfigError(f"loop.selection.centre: {centre} is no score: give a number, held_out or fit")
        self.discard, self.threshold, self.protect_end = discard, threshold, protect_end
        self.centre, self.false_alarms = centre, false_alarms
        if centre == "held_out":
            self.held_out = (HARMLESS, HARMFUL)
        elif false_alarms is not None:
            self.held_out = (HARMLESS,)
        numbers = {"stay": stay, "temperature": temperature, "prior": prior, "centre": centre}
        self.given = {name: float(value) for name, value in numbers.items() if value not in ("fit", "held_out")}

    def select(self, scores: TokenScores) -> TokenWeights:
        """Masks the tokens of harmful runs.

        Raises:
            ConfigError: ``discard`` is more than there are tokens that may be masked.
            StoreError: a score is not finite, or all are equal and ``discard`` wants some of them; or held-out rows
                are wanted and were not scored.
        """
        ours, known = self._tokens(scores), {name: self._known(scores.held_out(name)) for name in self.held_out}
        given = self.given if self.centre != "held_out" else {**self.given, "centre": self._middle(known)}
        chain, fitted = _chain(ours, given)
        odds = log_odds(ours.scores, ours.offsets, chain).numpy()
        cut = math.log(self.threshold / (1 - self.threshold))
        if self.false_alarms is not None:
            cut = self._cut(known[HARMLESS], chain, self.false_alarms, scores.path / HARMLESS)
        likely = odds > cut
        if self.discard is None:
            chosen = likely
        else:
            count = masked_count(self.discard, len(ours.free), len(odds))
            # of scores, for the odds of equal ones differ by where in a row they stand
            check_told_apart(ours.scores.numpy(), count, scores.path, "tokens that may go", SAME_REFERENCES)
            chosen = exact_top(odds, count)
        self._warn(fitted, float(likely.mean()) if len(likely) else 0.0)
        masked = np.zeros_like(ours.free)
        masked[ours.free] = chosen
        return mask_weights(
            scores,
            masked,
            discard=self.discard,
            threshold=self.threshold if self.discard is None and self.false_alarms is None else None,
            false_alarms=self.false_alarms,
            held_out={name: tokens.about() for name, tokens in known.items()},
            cut_log_odds=cut if self.discard is None else None,
            likely_harmful=int(likely.sum()),
            least_log_odds=float(odds[chosen].min()) if chosen.any() else None,
            end_tokens=int(scores.flat("end_of_turn").sum()),
            chain=chain._asdict(),
            fit=fitted,
        )

    def _tokens(self, scores: TokenScores) -> "_Tokens":
        end = scores.flat("end_of_turn")
        free = ~end if self.protect_end else np.ones_like(end)
        values = torch.from_numpy(scores.score()[free].astype(np.float64))
        return _Tokens(values, np.concatenate([[0], np.cumsum(free)])[scores.offsets], free)

    def _known(self, scores: TokenScores) -> "_Tokens":
        tokens = self._tokens(scores)
        if not len(tokens.scores):
            raise StoreError(
                f"{scores.path}: no token that may be masked, so that loop.selection has nothing to go by: hold out"
                " more rows"
            )
        return tokens

    def _middle(self, known: Mapping[str, "_Tokens"]) -> float:
        """The score halfway from what harmless rows have to what harmful ones have."""
        kinds = [known[name] for name in (HARMLESS, HARMFUL)]
        harmless, harmful = (float(one.scores.mean()) for one in kinds)
        error = math.hypot(*(one.standard_error() for one in kinds))
        if not harmful - harmless > 2 * error:
            rows = " and ".join(str(len(one.offsets) - 1) for one in kinds)
            rank_zero_warn(
                f"loop.selection: by {rows} held-out rows the mean score of utility rows is {harmless:.3f}, and that of"
                f" harmful ones {harmful:.3f}: too close, or of too few rows (standard error {error:.3f}), to trust"
                " what is masked"
            )
        return (harmless + harmful) / 2

    def _cut(self, harmless: "_Tokens", chain: Chain, share: float, path: Path) -> float:
        """The lowest log odds that no more than a share of the tokens of harmless rows exceeds."""
        rows, tokens = len(harmless.offsets) - 1, len(harmless.scores)
        if 0 < rows * share < 1:
            rank_zero_warn(
                f"loop.selection: false_alarms {share:g} is less than one of the {rows} held-out utility rows, on which"
                " the cut rests: hold out more of them, or allow more"
            )
        most = share_of(share, tokens)
        check_told_apart(harmless.scores.numpy(), max(most, 1), path, "tokens that may go", SAME_REFERENCES)
        return float(np.sort(log_odds(harmless.scores, harmless.offsets, chain).numpy())[tokens - 1 - most])

    def _warn(self, fitted: dict[str, Any] | None, likely: float) -> None:
        """Says where the fit or the automatic cut is not to be trusted."""
        if fitted is not None and not fitted["converged"]:
            rank_zero_warn(
                f"loop.selection: EM had not converged after {fitted['iterations']} iterations: give"
                f" {', '.join(fitted['fitted'])}, or look at the chain in selection.json before you trust it"
            )
        if self.discard is None and likely > 0.5:
            free = "discard" if isinstance(self.centre, str) else "centre to held_out or fit, or discard"
            rank_zero_warn(
                f"loop.selection: the automatic cut takes {likely:.0%} of the tokens for harmful. Where the references"
                f" are of unequal quality all scores are shifted: set {free} to a share"
            )


class _Tokens(NamedTuple):
    """The tokens of a set that may be masked."""

    scores: Tensor
    """Shape ``[M]`` float64."""
    offsets: np.ndarray
    """Shape ``[R + 1]``: row r's are ``offsets[r]:offsets[r + 1]``."""
    free: np.ndarray
    """Shape ``[tokens]`` bool: which of all response tokens they are."""

    def standard_error(self) -> float:
        """Of the mean score, as far as rows differ; of one row it is not known."""
        means = [float(self.scores[first:last].mean()) for first, last in pairwise(self.offsets) if last > first]
        return float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.inf

    def about(self) -> dict[str, float]:
        """For people."""
        return {"rows": len(self.offsets) - 1, "tokens": len(self.scores), "mean_score": float(self.scores.mean())}


def _chain(ours: _Tokens, given: Mapping[str, float]) -> tuple[Chain, dict[str, Any] | None]:
    """The chain with what was given and the rest fitted, and a report of the fit."""
    scores, offsets = ours.scores, ours.offsets
    start = Chain(**{**START._asdict(), **given})
    free = set(Chain._fields) - given.keys()
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
