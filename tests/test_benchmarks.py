"""The programs in benchmarks/, as far as they go without the data and the hours that they need."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAMS = [*sorted((ROOT / "benchmarks").glob("*.py")), ROOT / "benchmarks" / "results_table" / "__main__.py"]
IMPORT = """
import json, pathlib, runpy, sys, traceback
failed = {}
for program in sys.argv[1:]:
    sys.path.insert(0, str(pathlib.Path(program).parent))
    try:
        runpy.run_path(program, run_name="imported")
    except Exception:
        failed[program] = traceback.format_exc()
print(json.dumps(failed))
"""


def test_every_program_can_be_imported() -> None:
    # in a process of their own, for what they find beside themselves has names that others may have too
    command = [sys.executable, "-c", IMPORT, *map(str, PROGRAMS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout.splitlines()[-1]) == {}
