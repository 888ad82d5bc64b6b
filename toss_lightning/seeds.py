"""The seed of a run."""

import os


def global_seed() -> int:
    """What ``seed_everything`` was given, which Lightning keeps in the environment; 0 where it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
