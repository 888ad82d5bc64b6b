"""Work that one of two processes does for both."""

import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from toss_lightning.errors import DataError
from toss_lightning.ranks import on_first_rank


def _refuse() -> None:
    raise DataError("rows.jsonl:3: no reply: fill it in")


def _one(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
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

    told = [str(on_first_rank(trainer, work))]
    try:
        on_first_rank(trainer, _refuse)
    except DataError as error:
        told.append(str(error))
    (Path(folder) / str(rank)).write_text("\n".join(told))
    dist.destroy_process_group()


def test_both_have_what_the_first_has_found_and_hear_what_it_refuses(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == "done by 0\nrows.jsonl:3: no reply: fill it in"
