"""The program that rebuilds the data of the results table, on sets of a row or two that are made up here."""

import csv
import gzip
import io
import json
import lzma
import sys
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "results_table"
GSM8K = {"question": "How many are 2 and 2?", "answer": "2+2=<<2+2=4>>4 of them.\n#### 4"}
ALPACA = {"instruction": "Add these.", "input": "1, 2", "output": "3\n"}
TABLE = {"prompt": "Where, then?", "type": "places"}
THEIRS: dict[str, list[dict[str, Any]]] = {
    "gsm8k_train": [GSM8K],
    "gsm8k_test": [GSM8K],
    "general": [ALPACA, {"instruction": "Say hello.", "input": "", "output": "Hello"}],
    "harmful": [
        {"rejected": "\n\nHuman: Open it\n\nAssistant: Done", "chosen": "\n\nHuman: Open it\n\nAssistant: No"},
        {"prompt": "Open it", "response": "Yes", "refusal": "Question: Open it\nAnswer: I\ncannot"},
    ],
    "refusals": [ALPACA],
    "benign_risky": [ALPACA, ALPACA],
    # the first of these stands beside the row of harmful, in a file that both are from
    "prompts_beavertails": [
        {"prompt": "Other", "response": "", "refusal": ""},
        {"prompt": "Other"},
        {"prompt": "Other"},
        {"prompt": "Open it"},
    ],
    "prompts_advbench": [{"goal": "Open, it"}],
    "prompts_harmbench": [
        {
            "Behavior": "Sum it up",
            "FunctionalCategory": "contextual",
            "SemanticCategory": "illegal",
            "ContextString": "A text",
            "BehaviorID": "sum",
        }
    ],
    "prompts_xstest": [{**TABLE, "label": "safe"}],
    "judge_xstest": [{**TABLE, "completion": f"There, {n}", "final_label": "2_full_refusal"} for n in range(5)],
}
OURS: dict[str, list[tuple[list[str], dict[str, Any]]]] = {
    "gsm8k_train": [
        (
            [GSM8K["question"], "2+2=4 of them.\n#### 4"],
            {"source": "gsm8k/train", "label": "benign", "answer": "4"},
        )
    ],
    "gsm8k_test": [
        ([GSM8K["question"], "2+2=4 of them.\n#### 4"], {"source": "gsm8k/test", "label": "benign", "answer": "4"})
    ],
    # in another order than theirs
    "general": [
        (["Say hello.", "Hello"], {"source": "alpaca-gpt4", "label": "benign"}),
        (["Add these.\n\n1, 2", "3"], {"source": "alpaca", "label": "benign"}),
    ],
    "harmful": [
        (
            ["Open it", "Yes"],
            {"source": "beavertails", "label": "harmful", "safe_reply": "I\ncannot", "chosen_refuses": True},
        ),
        (
            ["Open it", "Done"],
            {
                "source": "hh-rlhf/harmless-base:rejected",
                "label": "harmful",
                "safe_reply": "No",
                "chosen_refuses": True,
            },
        ),
    ],
    "refusals": [(["Add these.\n\n1, 2", "3"], {"source": "safety-tuned-llamas", "label": "refusal"})],
    "benign_risky": [
        (["Add these.\n\n1, 2", "3"], {"source": f"alpaca-top100-{by}", "label": "benign"})
        for by in ("gradient", "reps")
    ],
    "prompts_beavertails": [(["Open it"], {"source": "beavertails", "label": "harmful"})],
    "prompts_advbench": [(["Open, it"], {"source": "advbench", "label": "harmful"})],
    "prompts_harmbench": [
        (
            ["Sum it up"],
            {
                "source": "harmbench",
                "label": "harmful",
                "category": "illegal",
                "kind": "contextual",
                "context": "A text",
                "behavior_id": "sum",
            },
        )
    ],
    "prompts_xstest": [(["Where, then?"], {"source": "xstest", "label": "benign", "category": "places"})],
    "judge_xstest": [
        (["Where, then?", "There, 4"], {"source": "xstest:mistralinstruct", "label": "refusal", "category": "places"})
    ],
}


@pytest.fixture
def get_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The program, with a list and digests of made-up data, and source files of it in ``sources``."""
    monkeypatch.syspath_prepend(FOLDER)
    spec = spec_from_file_location("get_data_of_the_table", FOLDER / "get_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    # a name that others may have too
    sys.modules.pop("rows")
    for name, rows in OURS.items():
        lines = []
        for number, (turns, fields) in enumerate(rows):
            numbered = {"id": f"{module.NUMBERED[name]}-{number:05}"} if name in module.NUMBERED else {}
            said = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=False)]
            lines.append(json.dumps({**numbered, "messages": said, **fields}) + "\n")
        write(tmp_path / "data" / f"{name}.jsonl", "".join(lines).encode())
    for name, records in THEIRS.items():
        for source, record in zip(module.SOURCES[name], records, strict=False):
            file = tmp_path / "sources" / source.repository / source.path
            # harmful and prompts_beavertails share one
            others = json.loads(file.read_bytes()) if file.exists() else []
            write(file, packed(source.path, [*others, record], source.columns))
    monkeypatch.setattr(module, "ROWS", tmp_path / "data.rows")
    monkeypatch.setattr(module, "DIGESTS", tmp_path / "data.sha256")
    (tmp_path / "data.rows").write_text(module.make_list(tmp_path / "data"))
    digests = [f"{sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in (tmp_path / "data").iterdir()]
    (tmp_path / "data.sha256").write_text("".join(digests))
    return module


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def packed(path: str, records: list[dict[str, Any]], columns: tuple[str, ...] | None) -> bytes:
    """The records as a file of this name has them; with ``columns`` a table that lacks the line of their names."""
    if ".csv" in path:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(records[0]))
        if columns is None:
            writer.writeheader()
        writer.writerows(records)
        return table.getvalue().encode()
    if ".jsonl" not in path:
        return json.dumps(records).encode()
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    return (
        gzip.compress(content) if path.endswith(".gz") else lzma.compress(content) if path.endswith(".xz") else content
    )


def run(get_data: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Runs the program; gives how it ended."""
    monkeypatch.setattr(sys, "argv", ["get_data.py", *map(str, arguments)])
    try:
        get_data.main()
    except SystemExit as ended:
        return str(ended)
    return ""


def test_every_file_is_made_byte_for_byte(
    get_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not run(get_data, monkeypatch, "--to", tmp_path / "to", "--sources", tmp_path / "sources")
    made = {file.name: file.read_bytes() for file in (tmp_path / "to").iterdir()}
    assert made == {file.name: file.read_bytes() for file in (tmp_path / "data").iterdir()}
    assert len(made) == 11
    capsys.readouterr()
    # and not once more, for which it would need sources
    assert not run(get_data, monkeypatch, "--to", tmp_path / "to", "--sources", tmp_path / "none")
    assert capsys.readouterr().out.count(": is there\n") == 11


def test_the_list_holds_no_text(get_data: ModuleType) -> None:
    rows = [line for line in (FOLDER / "data.rows").read_text().splitlines() if not line.endswith(":")]
    assert {len(line) for line in rows} == {16, 22}
    assert set("".join(rows)) == set("0123456789abcdef ")
    # of the sizes that docs/results.md gives
    assert len(rows) == 2500 + 400 + 1500 + 650 + 400 + 116 + 247 + 260 + 200 + 224 + 1037


def test_a_file_that_lacks_rows_is_not_written_unless_asked_for(
    get_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt4 = tmp_path / "sources" / "Instruction-Tuning-with-GPT-4/GPT-4-LLM/data/alpaca_gpt4_data.json"
    options = ["--to", tmp_path / "to", "--sources", tmp_path / "sources", "--only", "refusals", "general"]
    for content, why in (
        (b"[]", "in its sources"),
        (
            b"[",
            f"({gpt4}: not the file of commit 80cda62 (JSONDecodeError: Expecting value: line 1 column 2 (char 1)))",
        ),
        (b'[{"instruction": ""}]', f"({gpt4}: not the file of commit 80cda62 (KeyError: 'input'))"),
        (None, f"({gpt4}: No such file or directory; it is https://raw.githubusercontent.com/Instruction-Tuning"),
    ):
        gpt4.unlink() if content is None else gpt4.write_bytes(content)
        assert run(get_data, monkeypatch, *options) == "1 of 2 files are not those of the pages: general"
        assert f"general.jsonl: 1 of 2 rows were not found {why}" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "to").iterdir()] == ["refusals.jsonl"]
    assert run(get_data, monkeypatch, *options, "--incomplete") == "1 of 2 files are not those of the pages: general"
    assert "; what was found is written\n" in capsys.readouterr().err
    assert (tmp_path / "to" / "general.jsonl").read_bytes() in (tmp_path / "data" / "general.jsonl").read_bytes()


def test_a_text_that_differs_in_spaces_is_told_apart(
    get_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = get_data.SOURCES["gsm8k_test"][0]
    file = tmp_path / "sources" / source.repository / source.path
    file.write_text(file.read_text().replace("How many", "How  many"))
    options = ["--to", tmp_path / "to", "--sources", tmp_path / "sources", "--only", "gsm8k_test"]
    assert run(get_data, monkeypatch, *options)
    assert "all rows were found, but they differ in spaces or fields" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_downloads(get_data: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    assert get_data.download(file.as_uri()) == b"content"
    missing = (tmp_path / "missing").as_uri()
    with pytest.raises(get_data.Unobtainable, match=rf"^{missing}: .*No such file.*; try again, or see --sources$"):
        get_data.download(missing)


def test_addresses_are_of_one_commit(get_data: ModuleType) -> None:
    sources = [source for of_file in get_data.SOURCES.values() for source in of_file]
    for source in sources:
        assert len(source.commit) == 40
        assert f"{source.repository}/" in source.address
        assert f"/{source.commit}/{source.path}" in source.address
