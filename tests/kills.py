"""Processes that are killed at every touch of the disk."""

from pathlib import Path

import programs

PROGRAM = """
import os, sys
from itertools import count
from pathlib import Path

root, before, body = Path(sys.argv[1]), *sys.argv[2:]
TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
exec(body, {"path": root / "warm-up"})  # whatever is imported is imported once

for number in count(1):
    path = root / f"killed-at-{number:03d}"
    path.mkdir()
    exec(before, {"path": path})
    child = os.fork()
    if child == 0:
        touched = 0
        def hook(event, args):
            global touched
            # a tree is removed file by file, named below an open directory
            below = event in ("os.remove", "os.rmdir") and args[1] != -1
            if event in TOUCHES and (below or str(path) in str(args[0])):
                touched += 1
                if touched == number:
                    os._exit(9)
        sys.addaudithook(hook)
        try:
            exec(body, {"path": path})
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 9:
        sys.exit(code)
"""


def killed_everywhere(root: Path, body: str, before: str = "") -> list[Path]:
    """Runs ``body`` again and again, each time in a new directory ``path``, and kills it at each touch of the disk.

    Args:
        root: where the directories are made.
        body: Python that is killed before the first open, rename, removal or mkdir, then before the second, ...
        before: Python that makes ready what is there when ``body`` begins.

    Returns:
        The directories: one for each kill, and last that of a run that came to its end.
    """
    root.mkdir()
    done = programs.run(["-c", PROGRAM, str(root), before, body])
    assert done.returncode == 0, done.stdout + done.stderr
    found = sorted(root.glob("killed-at-*"))
    assert len(found) > 1, "nothing was touched"
    return found


def tree(path: Path) -> dict[str, bytes]:
    """Every file below ``path``."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
