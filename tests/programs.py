"""Python programs in processes that are forked from one that has imported all they need, for importing takes longest.

What depends on how an interpreter starts or ends is no matter for these: let ``subprocess`` start one.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch.utilities import rank_zero_only

FORKED = "forkserver"
"""What ``multiprocessing`` calls this way to start a process."""
_SERVER = multiprocessing.get_context(FORKED)
_SERVER.set_forkserver_preload(["toss_lightning.lightning_cli"])


def start(
    arguments: Sequence[str], out: Path, err: Path | None = None, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Starts a program in the working directory of now.

    Args:
        arguments: what would follow ``python``: a script, ``-m`` and a module, or ``-c`` and code; then its own.
        out: where what it prints goes.
        err: where its standard error goes; to ``out`` too by default.
        environment: all of its variables; those of this process by default.
    """
    variables = dict(os.environ if environment is None else environment)
    settings = ([str(argument) for argument in arguments], variables, os.getcwd(), str(out), str(err or out))
    process = _SERVER.Process(target=_become, args=settings, daemon=True)
    process.start()
    return process


def run(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end.

    Args:
        arguments: as for :func:`start`.
        environment: as for :func:`start`.
        timeout: seconds after which it is killed.
    """
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start(arguments, out, err, environment)
        process.join(timeout)
        if hangs := process.is_alive():
            process.kill()
            process.join()
        said = out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
    if hangs:
        raise subprocess.TimeoutExpired(list(arguments), timeout, *said)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(list(arguments), process.exitcode, *said)


def _become(arguments: list[str], environment: dict[str, str], directory: str, out: str, err: str) -> None:
    """Turns the process into the program."""
    for stream, path, number in ((sys.stdout, out, 1), (sys.stderr, err, 2)):
        stream.flush()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    # both are read from the environment where they are imported
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", "0"))
    first, *rest = arguments
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
