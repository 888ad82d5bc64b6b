from pathlib import Path

import pytest
from runs import tiny_fit


@pytest.fixture(scope="session")
def pro(tiny_model, tiny_sets, tmp_path_factory) -> Path:
    """A run whose store has two rounds that mask other tokens."""
    run_dir = tmp_path_factory.mktemp("pro")
    tiny_fit(tiny_model, tiny_sets, run_dir, loop={"rounds": 1, "promote": 4})
    return run_dir
