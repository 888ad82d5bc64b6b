"""Work that one of two processes does for both."""

import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import programs
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from toss_lightning import ranks
from toss_lightning.errors import DataError
from toss_lightning.ranks import on_first_rank, share_directory


def _refuse() -> None:
    raise DataError("rows.jsonl:3: no reply: fill it in")


def _one(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ranks.NOTICED = 1.0
    dist.barrier()  # from here on they go side by side
    impatient = dist.new_group(backend="gloo", timeout=timedelta(seconds=3))

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=impatient)
        return box[0]

    trainer: Any = SimpleNamespace(is_global_zero=rank == 0, strategy=SimpleNamespace(broadcast=broadcast))

    def work() -> str:
        time.sleep(5)  # longer than the other one waits in a collective of the strategy
        return f"done by {rank}"

    def both(decision: bool, all: bool) -> bool:
        count = torch.tensor(int(decision))
        dist.all_reduce(count)
        return int(count) == 2

    told = [str(on_first_rank(trainer, work))]
    try:
        on_first_rank(trainer, _refuse)
    except DataError as error:
        told.append(str(error))
    trainer.world_size, trainer.strategy.barrier = 2, lambda name: dist.barrier()
    trainer.strategy.reduce_boolean_decision = both
    told += [str(share_directory(trainer, Path(folder) / name)) for name in ("shared", ("mine", "yours")[rank])]
    (Path(folder) / str(rank)).write_text("\n".join(told))
    dist.destroy_process_group()


def test_both_have_what_the_first_has_found_hear_what_it_refuses_and_know_what_they_share(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("shared", "mine", "yours"):
        (tmp_path / name).mkdir()
    mp.start_processes(_one, (port, str(tmp_path)), nprocs=2, start_method=programs.FORKED)
    for rank in range(2):
        told = (tmp_path / str(rank)).read_text().splitlines()
        assert told == ["done by 0", "rows.jsonl:3: no reply: fill it in", "True", "False"]
    assert [*(tmp_path / "shared").iterdir()] == []
