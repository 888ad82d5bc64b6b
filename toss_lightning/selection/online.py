"""What online selections hand over to training."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from toss_lightning.errors import StoreError
from toss_lightning.scores.store import TokenScores
from toss_lightning.selection.base import token_weights
from toss_lightning.selection.weights import TokenWeights


def to_be_weighed(scores: TokenScores, columns: Sequence[str], **facts: Any) -> TokenWeights:
    """Weight 1 for every token, and the token losses that will weigh it during training.

    Args:
        scores: the store that was selected from.
        columns: names of per-token columns of the store.
        **facts: what else the report should say.

    Raises:
        StoreError: a value is not finite.
    """
    values = {name: scores.flat(name).astype(np.float32) for name in columns}
    for name, column in values.items():
        if not np.isfinite(column).all():
            wrong = int((~np.isfinite(column)).sum())
            raise StoreError(f"{scores.path}: {wrong} values of {name} are not finite: score the custom set again")
    return token_weights(scores, np.ones(int(scores.offsets[-1]), np.float32), columns=values, **facts)
