"""The programs in benchmarks/, as far as they go without the data and the hours that they need."""

import json
import subprocess
import sys
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from tiny import write_rows

ROOT = Path(__file__).parent.parent
OF_THE_TABLE = [ROOT / "benchmarks" / "results_table" / name for name in ("__main__.py", "agreement.py")]
PROGRAMS = [*sorted((ROOT / "benchmarks").glob("*.py")), *OF_THE_TABLE]
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


@pytest.fixture
def rows() -> ModuleType:
    spec = spec_from_file_location("rows_of_the_table", ROOT / "benchmarks" / "results_table" / "rows.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("other", ["test", "custom_risky"])
def test_no_prompt_is_used_for_two_things(rows: ModuleType, tmp_path: Path, other: str) -> None:
    write_rows(tmp_path / "custom_0.2.jsonl", [("another", "reply"), ("Where  is it?", "reply")])
    write_rows(tmp_path / "custom_0.4.jsonl", [("where is it?", "of a set of the same purpose")])
    rows.check_apart(tmp_path)
    write_rows(tmp_path / f"{other}.jsonl", [(" where is IT?", "reply")])
    with pytest.raises(SystemExit, match=rf"^custom_0\.2\.jsonl:2 and {other}\.jsonl:1 ask the same: one row for two"):
        rows.check_apart(tmp_path)


def test_data_that_the_pages_were_not_made_from_is_named(
    rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"same": b"then", "changed": b"then", "missing": b"then"}
    digests = tmp_path / "data.sha256"
    digests.write_text("".join(f"{sha256(content).hexdigest()}  {name}\n" for name, content in known.items()))
    monkeypatch.setattr(rows, "DIGESTS", digests)
    (tmp_path / "same").write_bytes(b"then")
    (tmp_path / "changed").write_bytes(b"now")
    assert rows.differing(tmp_path) == ["changed"]


def test_the_short_table_says_what_the_whole_one_says() -> None:
    def table(name: str) -> dict[str, dict[str, str]]:
        text = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8")
        # the first table of the page
        lines = [line.strip("|").split("|") for line in text[text.index("|") :].split("\n\n")[0].splitlines()]
        header, _, *rows = [[cell.strip() for cell in line] for line in lines]
        return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}

    short, whole = table("results_table_short.md"), table("results_table.md")
    assert "TOSS" in short
    for method, cells in short.items():
        assert cells == {column: whole[method][column] for column in cells}


def test_two_pages_agree_as_far_as_intervals_and_order_say(tmp_path: Path) -> None:
    column = "refuses harmful prompts ↑"
    cells = {
        "first": {"base model": "9% [8%, 10%]", "A": "10% [5%, 15%]", "B": "20% [15%, 25%]", "C": "30% [−1%, 31%]"},
        "second": {"base model": "1%", "C": "30%", "B": "26%", "A": "15%", "D": "1%"},
    }
    for name, rows in cells.items():
        lines = [f"|  | {column} |", "|---|---|", *(f"| {method} | {cell} |" for method, cell in rows.items())]
        (tmp_path / name).write_text("\n".join(["# Page", "", *lines, "", "| another |", ""]), encoding="utf-8")
    code = "import sys; from pathlib import Path; import agreement; print(agreement.page(*map(Path, sys.argv[1:])))"
    command = [sys.executable, "-c", code, str(tmp_path / "first"), str(tmp_path / "second")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=OF_THE_TABLE[0].parent)
    assert "Of 3 methods that both have" in done.stdout
    # B lies outside; 10, 20, 30 and 15, 26, 30 stand in one order
    assert done.stdout.splitlines()[-2] == f"| {column} | 2 of 3 | 1.000 | B |"
