"""Checkpoints: which one is taken, which one is refused, and the signals that a run ends with one on."""

import csv
import os
import shutil
import signal
import socket
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from runs import Kill, artifacts, tiny_fit
from tiny import save_tiny_model

from toss_lightning.errors import Stopped, StoreError
from toss_lightning.loops import plan_loop
from toss_lightning.loops.checkpoints import is_whole, newest, set_aside
from toss_lightning.models import Lora, Optim, Schedule
from toss_lightning.selection import GlobalTopFraction

RUN: dict[str, Any] = {"loop": {"rounds": 1, "promote": 2}}
STEPS = 24
"""6 steps of utility, 4 of degraded, 6 of degraded-1, 8 of target."""


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*.ckpt"))


def cut_short(path: Path) -> None:
    """What a crash of the machine leaves of a file that was being written."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_sets, tmp_path_factory) -> Path:
    """An undisturbed run."""
    run_dir = tmp_path_factory.mktemp("finished")
    tiny_fit(tiny_model, tiny_sets, run_dir, **RUN)
    return run_dir


# --- what is there ----------------------------------------------------------------------------------------------------


def test_the_two_newest_stay_and_their_names_say_where_they_are(finished: Path) -> None:
    assert names(finished) == ["00000024-07-target.ckpt", "00000024-08-end.ckpt"]
    assert newest(finished / "checkpoints").name == "00000024-08-end.ckpt"
    assert not [path for path in (finished / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("step", "newest_name"), [(3, "00000003-00-utility"), (10, "00000010-04-degraded-1")])
def test_a_checkpoint_is_named_after_step_and_place(
    tiny_model, tiny_sets, tmp_path: Path, step: int, newest_name: str
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(step)], **RUN)
    assert newest(tmp_path / "checkpoints").stem == newest_name


def test_boundaries_have_a_checkpoint_however_rare_they_are_otherwise(tiny_model, tiny_sets, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(9)], **RUN, checkpoint_every=1000)
    assert names(tmp_path) == ["00000006-01-degraded.ckpt"]


def test_checkpoints_hold_adapters_and_never_the_base(finished: Path) -> None:
    checkpoint = torch.load(newest(finished / "checkpoints"), weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert checkpoint["optimizer_states"]


def test_a_run_without_checkpoints(tiny_model, tiny_sets, tmp_path: Path, finished: Path) -> None:
    tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, enable_checkpointing=False)
    assert not (tmp_path / "checkpoints").exists()
    assert artifacts(tmp_path) == artifacts(finished)


# --- where it is written ----------------------------------------------------------------------------------------------


def test_a_run_below_the_home_directory_lies_in_one_place(
    tiny_model, tiny_sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    tiny_fit(tiny_model, tiny_sets, Path("~/run"), plan=["target"])
    run_dir = tmp_path / "home" / "run"
    assert names(run_dir) == ["00000008-00-target.ckpt", "00000008-01-end.ckpt"]
    assert {"adapters", "metrics.csv", "summary.json", "tensorboard"} <= {path.name for path in run_dir.iterdir()}
    assert not list((tmp_path / "work").iterdir())
    tiny_fit(tiny_model, tiny_sets, Path("~/run"), plan=["target"], ckpt_path="~/run/checkpoints/00000008-01-end.ckpt")


def test_no_other_disk_needs_room(tiny_model, tiny_sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").write_text("no directory, so nothing can be written there")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    run_dir = tmp_path / "run"
    tiny_fit(tiny_model, tiny_sets, run_dir, plan=["target"], logger=False)
    assert is_whole(newest(run_dir / "checkpoints"))


class OwnIO(TorchCheckpointIO):
    """As a user may bring along."""

    written = 0

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.written += 1
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_way_of_writing_that_was_given_is_used(tiny_model, tiny_sets, tmp_path: Path) -> None:
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path / "run", plan=["target"], plugins=[own := OwnIO()])
    assert own.written > 8
    assert trainer.strategy.checkpoint_io is own
    plain = tiny_fit(tiny_model, tiny_sets, tmp_path / "plain", plan=["target"])
    assert type(plain.strategy.checkpoint_io) is TorchCheckpointIO, "which others may save with"


FULL_DISK = """
import os, resource, signal, sys
from pathlib import Path
from lightning.pytorch import Callback
sys.path.insert(0, {tests!r})
from runs import tiny_fit
from toss_lightning.errors import StoreError

class FillsUp(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 3:
            # from here on a file that may not grow past this size fails as on a full disk
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

try:
    tiny_fit({model!r}, {sets!r}, Path({path!r}), [FillsUp()], plan=["target"], logger=False)
except StoreError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_checkpoints_before_and_nothing_else(tiny_model, tiny_sets, tmp_path: Path) -> None:
    script = FULL_DISK.format(
        tests=str(Path(__file__).parent.parent), model=tiny_model, sets=tiny_sets, path=str(tmp_path)
    )
    result = programs.run(["-c", script])
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "checkpoints"
    assert result.stdout.splitlines()[-1] == (
        f"{directory}/00000004-00-target.ckpt: cannot be written (File too large): free some space or choose another"
        " --run_dir"
    )
    assert {path.name for path in directory.iterdir()} == {"00000002-00-target.ckpt", "00000003-00-target.ckpt"}


# --- the newest whole one ---------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_is_taken(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, capsys
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(13)], **RUN)
    damaged = newest(tmp_path / "checkpoints")
    cut_short(damaged)
    taken = newest(tmp_path / "checkpoints")
    assert f"{damaged} is damaged (cut short by a crash?): taking the one before it" in capsys.readouterr().out
    assert (damaged.name, taken.name) == ("00000013-04-degraded-1.ckpt", "00000012-04-degraded-1.ckpt")
    tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, ckpt_path=str(taken))
    assert artifacts(tmp_path) == artifacts(finished)


def test_damage_within_the_file_is_seen(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    shutil.copy(newest(finished / "checkpoints"), path)
    assert is_whole(path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    at = content.index(largest.filename.encode(), largest.header_offset)  # its data lies behind name and padding
    content[at + len(largest.filename) + 64 + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    assert not is_whole(path)
    path.write_bytes(b"")
    assert not is_whole(path)


def test_no_whole_checkpoint(tiny_model, tiny_sets, tmp_path: Path, finished: Path) -> None:
    directory = tmp_path / "checkpoints"
    with pytest.raises(StoreError, match="checkpoints has no checkpoint: leave --ckpt_path out to start from the"):
        newest(directory)
    shutil.copytree(finished / "checkpoints", directory)
    for path in directory.glob("*.ckpt"):
        cut_short(path)
    with pytest.raises(StoreError, match="none of the 2 checkpoints is whole: start from the beginning"):
        newest(directory)


# --- room for a new run -----------------------------------------------------------------------------------------------


def test_starting_afresh_moves_the_checkpoints_of_an_earlier_run_aside(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, capsys
) -> None:
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(2)], **RUN)
    assert (
        f"checkpoints of an earlier run (2) were moved to {tmp_path / 'checkpoints/earlier'}" in capsys.readouterr().out
    )
    assert names(tmp_path) == ["00000001-00-utility.ckpt", "00000002-00-utility.ckpt"]
    for path in (finished / "checkpoints").glob("*.ckpt"):
        assert (tmp_path / "checkpoints/earlier" / path.name).read_bytes() == path.read_bytes()
    tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, ckpt_path=str(newest(tmp_path / "checkpoints")))
    assert artifacts(tmp_path) == artifacts(finished)


def test_resuming_from_an_older_checkpoint_moves_the_newer_ones_aside(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, capsys
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(13)], **RUN)
    older = tmp_path / "checkpoints/00000012-04-degraded-1.ckpt"
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(12)], **RUN, ckpt_path=str(older))
    assert "checkpoints of an earlier run (1) were moved to" in capsys.readouterr().out
    assert names(tmp_path) == [older.name]
    assert (tmp_path / "checkpoints/earlier/00000013-04-degraded-1.ckpt").is_file()
    tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, ckpt_path=str(older))
    assert artifacts(tmp_path) == artifacts(finished)


def test_a_run_that_goes_on_from_a_copy_keeps_the_checkpoints_that_it_writes(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(13)], **RUN)
    copy = tmp_path / "checkpoints/mine.ckpt"
    shutil.copy(tmp_path / "checkpoints/00000012-04-degraded-1.ckpt", copy)
    for path in (finished / "checkpoints").glob("*.ckpt"):
        shutil.copy(path, tmp_path / "checkpoints")  # of the end of another run, which the copy is far from
    with pytest.raises(RuntimeError, match="killed"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Kill(14)], **RUN, ckpt_path=str(copy))
    assert newest(tmp_path / "checkpoints").name == "00000014-04-degraded-1.ckpt"


def test_only_checkpoints_are_moved(tmp_path: Path) -> None:
    for name in ("00000003-00-utility.ckpt", "00000012-01-degraded.ckpt", "123456789-02-target.ckpt", "mine.ckpt"):
        (tmp_path / name).touch()
    set_aside(tmp_path, tmp_path / "00000012-01-degraded.ckpt")
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [
        "00000003-00-utility.ckpt",
        "00000012-01-degraded.ckpt",
        "mine.ckpt",
    ]


def test_processes_that_found_different_checkpoints_do_not_go_on(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    # the first process has found a checkpoint of step 12, and this one another
    broadcast = SingleDeviceStrategy.broadcast
    monkeypatch.setattr(
        SingleDeviceStrategy,
        "broadcast",
        lambda self, value, src=0: (12, 4, None) if value == (24, 8, None) else broadcast(self, value, src),
    )
    with pytest.raises(StoreError, match=r"the processes resumed from different checkpoints \(this one at step 24\)"):
        tiny_fit(tiny_model, tiny_sets, tmp_path / "run", **RUN, ckpt_path="last")
    assert names(tmp_path / "run") == names(finished)


def test_processes_that_do_not_share_the_directory_do_not_begin(
    tiny_model, tiny_sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as where each of two nodes has a disk of its own
    monkeypatch.setattr(plan_loop, "share_directory", lambda trainer, path: False)
    with pytest.raises(StoreError, match=r"--run_dir: .* is not one directory that all processes see"):
        tiny_fit(tiny_model, tiny_sets, tmp_path / "run", **RUN)
    assert not (tmp_path / "run" / "adapters").exists()


class SavesInMidStep(Callback):
    """Writes a checkpoint behind the first micro-batch of a step, as a ModelCheckpoint by the clock may."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.stage_name == "target" and batch_idx == trainer.accumulate_grad_batches:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_from_the_middle_of_a_step_is_refused(tiny_model, tiny_sets, tmp_path: Path) -> None:
    saves = SavesInMidStep(tmp_path / "mine.ckpt")
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path / "run", [saves], plan=["target"])
    assert trainer.accumulate_grad_batches > 1
    with pytest.raises(StoreError, match="written in the middle of an optimizer step"):
        tiny_fit(tiny_model, tiny_sets, tmp_path / "run", plan=["target"], ckpt_path=str(saves.path))


# --- a checkpoint of another run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"plan": ("utility", "degraded", "target"), "loop": {}}, "loop.plan"),
        ({"loop": {"rounds": 2, "promote": 2}}, "loop.plan"),
        ({"loop": {"rounds": 1, "promote": 2, "reference_epochs": 3}}, "number of epochs"),
        ({"loop": {"rounds": 1, "promote": 2, "keep_epoch": "best"}}, "loop.keep_epoch"),
        ({"loop": {"rounds": 1, "promote": 3}}, "way of promoting rows"),
        ({"loop": {"rounds": 1, "promote": 2, "promotion": "row_mean"}}, "way of promoting rows"),
        ({"loop": {"rounds": 1, "promote": 2, "promote_again": True}}, "way of promoting rows"),
        ({"loop": {"rounds": 1, "promote": 2, "refit": "continue"}}, "way of promoting rows"),
        ({"loop": {"rounds": 1, "promote": 2, "stop_early": True}}, "way of promoting rows"),
        ({"loop": {"rounds": 1, "promote": 2, "selection": GlobalTopFraction(0.2)}}, "loop.selection"),
        ({"data": {"batch_size": 2}}, "data.batch_size"),
        ({"data": {"holdout": 0.3}}, "utility set"),
        ({"data": {"max_length": 15}}, "custom set"),
        ({"data": {"max_length": 500}}, "limits"),
        ({"module": {"normalize": "kept"}}, "model.normalize"),
        ({"module": {"optim": Optim(lr=1e-3)}}, "model.optim"),
        ({"module": {"schedule": Schedule("cosine")}}, "model.schedule"),
        ({"gradient_clip_val": 0.5}, "trainer.gradient_clip_val"),
        ({"module": {"lora": Lora(r=2, targets="all-linear")}}, "model.lora"),
        ({"module": {"lora": Lora(r=4, targets=["q_proj"])}}, "model.lora"),
        ({"seed": 2}, "seed_everything"),
    ],
)
def test_a_checkpoint_of_other_optimizer_steps_is_refused(
    tiny_model, tiny_sets, finished: Path, tmp_path: Path, change: dict, part: str
) -> None:
    checkpoint = str(newest(finished / "checkpoints"))
    with pytest.raises(StoreError, match=f"the checkpoint was made with another {part}") as error:
        tiny_fit(tiny_model, tiny_sets, tmp_path, **{**RUN, **change}, ckpt_path=checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [{"seed": 5}, {"hidden": 48}], ids=["other weights", "other width"])
def test_a_checkpoint_of_another_base_is_refused(tiny_sets, finished: Path, tmp_path: Path, shape: dict) -> None:
    other = save_tiny_model(tmp_path / "other", **shape)
    with pytest.raises(StoreError, match=r"the checkpoint was made with another model\.base"):
        tiny_fit(other, tiny_sets, tmp_path / "run", **RUN, ckpt_path=str(newest(finished / "checkpoints")))


def test_a_refused_checkpoint_leaves_the_run_directory_as_it_was(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(StoreError, match="another seed_everything"):
        tiny_fit(
            tiny_model, tiny_sets, tmp_path / "run", **RUN, seed=2, ckpt_path=str(newest(tmp_path / "run/checkpoints"))
        )
    assert artifacts(tmp_path / "run") == artifacts(finished)
    assert names(tmp_path / "run") == names(finished)


# --- signals ----------------------------------------------------------------------------------------------------------


class Signal(Callback):
    """Sends the process a signal: in the middle of an optimizer step, or while a batch is scored."""

    def __init__(self, step: int | None = None, scored: int | None = None) -> None:
        self.step, self.scored, self.batches = step, scored, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step and not batch_idx % trainer.accumulate_grad_batches:
            os.kill(os.getpid(), signal.SIGTERM)

    def setup(self, trainer, module, stage):
        score = module.predict_step

        def watched(*args):
            if self.batches == self.scored:
                os.kill(os.getpid(), signal.SIGTERM)
            self.batches += 1
            return score(*args)

        module.predict_step = watched


# the first and the last step of the run, the last of an epoch and of a stage, and one in the middle
@pytest.mark.parametrize("step", [0, 2, 9, 12, 17, 23])
def test_sigterm_ends_a_run_behind_the_step_with_a_checkpoint(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, step: int
) -> None:
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Signal(step)], **RUN, checkpoint_every=1000)
    assert names(tmp_path)[-1].startswith(f"{step + 1:08d}"), "the step that was under way is the last one"
    trainer = tiny_fit(tiny_model, tiny_sets, tmp_path, **RUN, ckpt_path=str(newest(tmp_path / "checkpoints")))
    assert trainer.global_step == STEPS
    assert artifacts(tmp_path) == artifacts(finished)
    assert logged(tmp_path) == logged(finished)


def logged(run_dir: Path) -> list[tuple[str, str, str]]:
    """What metrics.csv says of each optimizer step."""
    with (run_dir / "metrics.csv").open() as file:
        return sorted((row["step"], row["stage"], row["loss"]) for row in csv.DictReader(file) if row["loss"])


# 14 rows in batches of at most 40 tokens, two of which make a chunk; utility, degraded and degraded-1 in this order
@pytest.mark.parametrize("batch", [0, 5, 9, 14])
def test_sigterm_ends_a_run_behind_a_scored_chunk_and_nothing_is_scored_twice(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, batch: int
) -> None:
    options = {**RUN, "data": {"score_every": 2}}
    counter = Signal()
    tiny_fit(tiny_model, tiny_sets, tmp_path / "whole", [counter], **options)
    killed = Signal(scored=batch)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        tiny_fit(tiny_model, tiny_sets, tmp_path / "run", [killed], **options)
    rest = Signal()
    checkpoint = str(newest(tmp_path / "run/checkpoints"))
    tiny_fit(tiny_model, tiny_sets, tmp_path / "run", [rest], **options, ckpt_path=checkpoint)
    assert artifacts(tmp_path / "run") == artifacts(tmp_path / "whole")
    assert killed.batches + rest.batches == counter.batches


def test_the_signal_handlers_of_the_process_come_back(tiny_model, tiny_sets, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        tiny_fit(tiny_model, tiny_sets, tmp_path, [Signal(2)])
    assert signal.getsignal(signal.SIGTERM) == before


SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NODELIST": "localhost",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from runs import artifacts, tiny_fit
from toss_lightning.errors import Stopped

class Signal(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 7:
            for name in {signals!r}:
                os.kill(os.getpid(), getattr(signal, name))

try:
    options = {{"strategy": {strategy!r}, "checkpoint_every": 1000, **{run!r}}}
    tiny_fit({model!r}, {sets!r}, Path({run_dir!r}), [Signal()], **options)
except Stopped as end:
    print(end)
"""


@pytest.mark.parametrize(
    ("strategy", "array", "signals"),
    [
        ("auto", {}, ["SIGUSR1"]),
        ("ddp", {}, ["SIGUSR1"]),
        # at the time limit itself comes SIGTERM, which may find the announced end still waiting for its step
        ("auto", {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}, ["SIGUSR1", "SIGTERM"]),
    ],
    ids=["job", "ddp", "array"],
)
def test_a_slurm_job_that_nears_its_time_limit_is_requeued_with_a_checkpoint(
    tiny_model, tiny_sets, tmp_path: Path, finished: Path, strategy: str, array: dict, signals: list[str]
) -> None:
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "requeued"}\n')
    scontrol.chmod(0o755)
    program, run_dir = tmp_path / "program.py", tmp_path / "run"
    tests = str(Path(__file__).parent.parent)
    program.write_text(
        PROGRAM.format(
            tests=tests,
            model=tiny_model,
            sets=tiny_sets,
            run_dir=str(run_dir),
            strategy=strategy,
            signals=signals,
            run=RUN,
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, **SLURM, **array, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # Lightning gives a process of ddp all cores otherwise, and the sums of two threads may round as one thread does not
    environment["OMP_NUM_THREADS"] = "1"
    environment["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"
    done = programs.run([str(program)], environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    job = "77_3" if array else "4242"
    assert (tmp_path / "requeued").read_text() == f"requeue {job}\n"
    assert "stopped by SIGUSR1" in done.stdout
    assert f"SLURM job {job} is back in the queue" in done.stdout
    assert newest(run_dir / "checkpoints").name == "00000008-01-degraded.ckpt"
    assert not list(run_dir.glob("hpc_ckpt*")), "Lightning's own requeueing saves in the middle of a step"
    tiny_fit(tiny_model, tiny_sets, run_dir, **RUN, ckpt_path=str(newest(run_dir / "checkpoints")))
    assert artifacts(run_dir) == artifacts(finished)
