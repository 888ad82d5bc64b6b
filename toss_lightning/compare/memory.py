"""Whether a further run fits beside those that go on, by what finished ones took at their peak; loads no torch."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
from tqdm import tqdm

CONTEXT = 512
"""MiB of a GPU that a process holds besides what its summary counts: the driver's, and its kernels."""
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits")
LINE = re.compile(r"\s*(\d+)\s*,\s*(\S+)\s*,\s*(\d+)\s*")
PATIENCE = 20
"""Seconds for nvidia-smi to answer."""


class Memory:
    """What finished runs took at most, and whether as much is free once more.

    Args:
        summaries: of the runs that are finished; those that are not there, or do not say, are left out.
    """

    def __init__(self, summaries: Iterable[Path]) -> None:
        # MiB of the largest finished run, on the host and on each of its GPUs; 0 where none is known to have used any
        self.host = self.gpu = 0
        self._free: dict[str, int] = {}
        self._uuids: dict[str, str] = {}
        self._without: dict[str, int] = {}  # GPU -> MiB that were free when none of our runs was there
        self._problem = ""
        self._said: set[object] = set()
        for summary in summaries:
            self.learn(summary)

    def learn(self, summary: Path) -> None:
        """Notes what a finished run took.

        Args:
            summary: its summary.json; where it is not there or does not say, nothing is learnt.
        """
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(summary.read_text(encoding="utf-8"))
            # both peaks are those of rank 0's process: ranks share the host, and have a GPU each
            self.host = max(self.host, int(found["peak_memory_mib"]) * int(found["world_size"]))
            self.gpu = max(self.gpu, int(found["peak_gpu_memory_mib"]) + CONTEXT)  # None where it used none

    def place(self, running: Mapping[int, str | None], places: Mapping[int, str | None], try_one: bool) -> int | None:
        """Finds where a further run may begin, and says once why it has to wait.

        Args:
            running: process id of each run that goes on -> what it sees of the GPUs, as CUDA_VISIBLE_DEVICES has it.
            places: each place that is free -> the same; there is at least one.
            try_one: where nothing is known yet, one run goes alone, and not as many as there are places.

        Returns:
            The first place with enough memory, or where nothing runs, any; None where the run is to wait until another
            ends.
        """
        # also before the first run, of which nothing tells whether it uses a GPU: what is free there without ours
        if not self._problem and (self.gpu or not (self.host or running)):
            self._look(running)
        first = next(iter(places))
        if not self.host and running and try_one:
            self._say("alone", "jobs: auto: the first run goes alone, for its peak tells how many fit at once")
            return None
        if not self.host:
            return first
        free = _available() - sum(max(0, self.host - _resident(pid)) for pid in running)
        lack = _lack(self.host, free, "memory")
        lacks = {slot: lack or self._lack_of_gpus(running, visible) for slot, visible in places.items()}
        if self.gpu and self._problem:
            text = f"WARNING: {self._problem}: what is free on the GPUs is not known, only the host's memory counts"
            self._say("nvidia-smi", text, is_warning=True)
        for slot, lack in lacks.items():
            if not lack:
                return slot
        if not running:  # what is lacking now may be enough, and nobody would make more of it
            return first
        self._say(len(running), f"waiting until one of {len(running)} runs at once ends: {lacks[first]}")
        return None

    def _lack_of_gpus(self, running: Mapping[int, str | None], visible: str | None) -> str:
        for gpu in self._seen(visible):
            # inside containers nvidia-smi does not tell what a process holds, so ours count as if at their peak
            ours = sum(gpu in self._seen(other) for other in running.values())
            free = min(self._free[gpu], self._without.get(gpu, self._free[gpu]) - ours * self.gpu)
            if lack := _lack(self.gpu, free, f"GPU {gpu}"):
                return lack
        return ""

    def _look(self, running: Mapping[int, str | None]) -> None:
        """Reads what is free on the GPUs."""
        try:
            # in a group of its own, for Ctrl-C is this process's to act on
            done = subprocess.run(
                QUERY, capture_output=True, text=True, errors="replace", timeout=PATIENCE, process_group=0
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            self._problem = f"nvidia-smi gives no answer ({error})"
            return
        lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()] or ["nothing"]
        found = [match.groups() for line in lines if (match := LINE.fullmatch(line))]
        if done.returncode or len(found) < len(lines):
            odd = next((line for line in lines if not LINE.fullmatch(line)), f"exit code {done.returncode}")
            self._problem = f"nvidia-smi says what cannot be read ({odd.strip()})"
            return
        self._free = {gpu: int(free) for gpu, _, free in found}
        self._uuids = {gpu: uuid for gpu, uuid, _ in found}
        ours = {gpu for visible in running.values() for gpu in self._seen(visible)}
        self._without |= {gpu: free for gpu, free in self._free.items() if gpu not in ours}

    def _seen(self, visible: str | None) -> list[str]:
        """The GPUs that a run sees; none where nothing is known of one."""
        if self._problem:
            return []
        if visible is None:
            return list(self._free)
        seen: list[str] = []
        for name in map(str.strip, visible.split(",")):
            if name in ("", "-1"):  # from there on CUDA sees none
                break
            by_uuid = [gpu for gpu, uuid in self._uuids.items() if name.startswith("GPU-") and uuid.startswith(name)]
            if name not in self._free and not by_uuid:
                self._problem = f"nvidia-smi tells nothing of GPU {name}"
                return []
            seen += by_uuid or [name]
        return seen

    def _say(self, once: object, text: str, is_warning: bool = False) -> None:
        if once not in self._said:
            self._said.add(once)
            tqdm.write(text, file=sys.stderr if is_warning else sys.stdout)
            sys.stdout.flush()


def _lack(needed: int, free: int, what: str) -> str:
    """Says what is missing, if anything is."""
    if free >= needed:
        return ""
    left = f"{max(0, free):,} MiB are free beside what those under way may yet take"
    return f"a run took up to {needed:,} MiB of {what}, and {left}"


def _available() -> int:
    """MiB of the host's memory that programs may still take."""
    return int(psutil.virtual_memory().available) >> 20


def _resident(pid: int) -> int:
    """MiB that a process and those that it started hold now."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return total >> 20
