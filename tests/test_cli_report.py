"""toss report: the verb as one types it."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from reported import LABELS, Page, save_reported_model, write_labelled
from runs import tiny_fit
from tiny import WORDS, save_tiny_model

from toss_lightning.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, sets, a configuration for both, and a run of TOSS."""
    folder = tmp_path_factory.mktemp("home")
    model, sets = save_reported_model(folder / "model"), write_labelled(folder)
    with redirect_stdout(io.StringIO()) as said:
        tiny_fit(model, sets, folder / "run", loop={"epochs": 1})
    (folder / "said.txt").write_text(said.getvalue())
    config = {
        "model": {"base": {"path": model, "quantization": "none"}, "lora": {"r": 4}, "optim": {"lr": 1e-2}},
        "data": {**sets, "batch_size": 4, "max_tokens": 40},
        "loop": {"epochs": 1},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def failed(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    """The one line that says why it ended."""
    capsys.readouterr()
    assert main(["report", *args]) == code
    said = capsys.readouterr()
    (error,) = said.err.splitlines()
    assert said.out == ""
    return error.removeprefix("error: ")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_lies_in_the_run_and_its_path_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run"]) == 0
    assert capsys.readouterr() == ("run/report.html\n", "")
    page = Page(Path("run/report.html").read_text(encoding="utf-8"))
    assert page.texts("h1") == ["TOSS: run"]
    assert page.rows()


def test_the_page_can_lie_elsewhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "new" / "mine.html"
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    assert main(["report", "run", "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert Page(page.read_text(encoding="utf-8")).rows()
    assert before == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}, "the run is as it was"


def test_paths_below_the_home_directory(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell expands them in no option whose value stands behind an equals sign."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert main(["report", "~/run", "--out=~/pages/mine.html", "--scores=~/run/scores"]) == 0
    assert Page((home / "pages/mine.html").read_text(encoding="utf-8")).rows()
    assert not list(tmp_path.iterdir())


def test_how_many_rows_are_shown(tmp_path: Path) -> None:
    shown = []
    for count in (1, 2, 50):
        assert main(["report", "run", f"--rows={count}", "--out", str(tmp_path / "page.html")]) == 0
        shown.append(len(Page((tmp_path / "page.html").read_text(encoding="utf-8")).rows()))
    assert shown[0] < shown[1] < shown[2] == len(LABELS)


def test_a_page_never_takes_the_place_of_a_device(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "device")
    assert "not the name of a file" in failed(capsys, "run", "--out", str(tmp_path / "device"))
    (tmp_path / "page.html").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "page.html")
    assert main(["report", "run", "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert "<h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    error = failed(capsys, "run", "--out", "tiny.yaml/page.html", code=1)
    assert "tiny.yaml/page.html: cannot be written" in error
    assert "--run_dir" not in error, "there is no such option"


def test_a_run_that_was_selected_elsewhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Scores that toss select read with an option are nowhere written down."""
    select = ["select", "--config=tiny.yaml", f"--run_dir={tmp_path}", "--loop.scores_from=run/scores"]
    assert main([*select, "--loop.selection.discard=0.4"]) == 0
    os.environ.pop("TOSS_RUN_DIR", None)
    assert main(["report", str(tmp_path), "--scores", "run/scores"]) == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "What is masked" in page.texts("h2")


def test_scores_of_another_run_are_found_by_the_configuration() -> None:
    fit = ["fit", "--config=tiny.yaml", "--run_dir=again", "--loop.plan=[select, target]"]
    assert main([*fit, "--loop.scores_from=run/scores"]) == 0
    assert main(["report", "again"]) == 0
    page = Page(Path("again/report.html").read_text(encoding="utf-8"))
    assert {"Scores", "What is masked", "Token by token"} <= {*page.texts("h2")}


def test_a_run_says_at_its_end_how_to_look_at_it(home: Path) -> None:
    *_, last = Path("said.txt").read_text().splitlines()
    assert last == f"A page to look at: toss report {home / 'run'}"


# --- rows in the terminal ---------------------------------------------------------------------------------------------


def test_a_row_into_a_pipe_is_a_line_for_each_response_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run", "--row", "3"]) == 0
    said = capsys.readouterr()
    lines = [line.split("\t") for line in said.out.splitlines()]
    assert said.err == ""
    assert [line[:3] for line in lines] == [["3", str(at), "harmful"] for at in range(1, len(lines) + 1)]
    assert lines[-1][3] == "' <|im_end|>'"
    for _, _, _, text, weight, score, utility, degraded in lines:
        assert text[0] == text[-1] == "'"
        assert weight in ("0", "1")
        assert (utility.partition("=")[0], degraded.partition("=")[0]) == ("utility", "degraded")
        difference = float(utility.partition("=")[2]) - float(degraded.partition("=")[2])
        assert float(score) == pytest.approx(difference, abs=1e-4)


def test_rows_come_in_the_order_that_was_asked_for_and_leave_no_page(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run/report.html").unlink(missing_ok=True)
    assert main(["report", "run", "--row", "7", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert list(dict.fromkeys(line.partition("\t")[0] for line in lines)) == ["7", "0"]
    assert not Path("run/report.html").exists()


def test_rows_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["report", "run", "--row", "0"]) == 0
    said = capsys.readouterr().out
    assert "\x1b[" in said
    assert "\t" not in said


# --- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ([], "toss report: the following arguments are required: RUN_DIR; toss report --help says what there is"),
        (["run", "--rows", "0"], "toss report --rows 0: give at least 1"),
        (["run", "--rows", "-3"], "toss report --rows -3: give at least 1"),
        (["run", "--rows", "few"], "toss report: argument --rows: invalid int value: 'few'; "),
        (["run", "--row"], "toss report: argument --row: expected at least one argument; "),
        (["run", "--row", "first"], "toss report: argument --row: invalid int value: 'first'; "),
        (["run", "--row", "99"], "--row 99: no such row in run/scores, whose row ids go from 0 to 21"),
        (["run", "--row", "-1"], "--row -1: no such row in run/scores"),
        (["run", "--row", "1", "--out", "x.html"], "toss report: --row prints rows; --out and --rows are of the page"),
        (["run", "--row", "1", "--rows", "2"], "toss report: --row prints rows; --out and --rows are of the page"),
        (["run", "--out", "."], "toss report --out .: not the name of a file: give one, such as report.html"),
        (["run", "--out", "model"], "toss report --out model: not the name of a file"),
        (["run", "--wide"], "toss report: unrecognized arguments: --wide; "),
        (["run", "--config", "demo"], "toss report: unrecognized arguments: --config demo; "),
        (["run", "again", "more"], "toss report: unrecognized arguments: again more; "),
        (["rum"], "toss report rum: no such directory (is it run?): "),
        (["x" * 300], f"toss report {'x' * 300}: no such directory: "),
        (["run/summary.json"], "toss report run/summary.json: a file: name the directory of a run"),
        (["model"], "toss report model: nothing to show: it is not the directory of a run"),
        (["run", "--tokenizer", "nowhere/at/all"], "--tokenizer: nowhere/at/all: no such directory"),
        (["run", "--tokenizer", "other"], "--tokenizer: that of other is another one than the rows of run/scores"),
    ],
)
def test_a_command_that_cannot_work_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], args: list[str], error: str
) -> None:
    if not Path("other").exists():
        save_tiny_model(Path("other"), WORDS[::-1])
    capsys.readouterr()
    assert failed(capsys, *args).startswith(error)


def test_rows_of_several_of_which_one_is_not_there_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(capsys, "run", "--row", "0", "99").startswith("--row 99: no such row")


def test_a_run_that_is_damaged_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "scores").symlink_to(Path("run/scores").absolute())
    (tmp_path / "summary.json").write_text("{")
    assert "summary.json: damaged" in failed(capsys, str(tmp_path), code=1)


def test_help_of_the_verb_loads_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        "import sys; from toss_lightning.cli import main\n"
        "for args in ['--help'], ['run', '-h'], ['-h']: assert main(['report', *args]) == 0\n"
        "for args in [], ['run', '--rows=0'], ['run', '--what']: assert main(['report', *args]) == 2\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'numpy', 'jsonargparse'} & {*sys.modules}\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: toss report RUN_DIR")
    for option in ("--out", "--rows", "--row", "--scores", "--tokenizer"):
        assert option in done.stdout
    assert all(len(line) <= 120 for line in done.stdout.splitlines())
