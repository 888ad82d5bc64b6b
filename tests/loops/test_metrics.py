"""metrics.csv on disks that fill up and machines that go down."""

from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from toss_lightning.errors import StoreError
from toss_lightning.loops.metrics import MetricsCsv


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,stage,loss\n151,target,2\n15")
    logger = MetricsCsv(str(tmp_path))
    logger.log_metrics({"target/loss": 9.0}, 152)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,stage,loss", "151,target,2", "152,target,9"]


def test_all_lines_end_alike(tmp_path: Path) -> None:
    """Those that are appended, and those that are written again because there is a new column."""
    logger = MetricsCsv(str(tmp_path))
    for step, (name, value) in enumerate([("loss", 2.0), ("loss", 1.0), ("lr", 0.1), ("lr", 0.2)]):
        logger.log_metrics({f"target/{name}": value}, step)
    assert (tmp_path / "metrics.csv").read_bytes() == (
        b"step,stage,loss,lr\n0,target,2,\n1,target,1,\n2,target,,0.1\n3,target,,0.2\n"
    )


def test_other_ranks_leave_alone_what_the_first_is_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = "step,stage,loss\n151,target,2\n15"
    (tmp_path / "metrics.csv").write_text(half)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert MetricsCsv(str(tmp_path)).lines == 0
    assert (tmp_path / "metrics.csv").read_text() == half
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert MetricsCsv(str(tmp_path)).lines == 1


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    logger = MetricsCsv(str(tmp_path))
    logger.log_metrics({"target/loss": 2.0}, 0)
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(
        StoreError, match=r"metrics.csv: cannot be written \(No space left on device\): free some space"
    ):
        logger.log_metrics({"target/loss": 1.0}, 1)
