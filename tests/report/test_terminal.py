"""A row in a terminal, and in a pipe."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scores_on_disk import make_scores
from tiny import word_tokenizer

from toss_lightning.report.shades import Shade
from toss_lightning.report.terminal import print_row
from toss_lightning.report.tokens import Row, Rows, Token, risk_score
from toss_lightning.selection.base import token_weights

CODES = re.compile(r"\x1b\[([\d;]*)m")


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Rows, Shade]:
    """Ids of tokens count from 0, and the first two are the prompt's."""
    scores = make_scores(tmp_path, [[1.0, 4.0, 0.0], [2.0, 0.5]], [[1.0, 0.0, 4.0], [2.0, 0.5]], ["harmful", "benign"])
    weights = token_weights(scores, np.array([1.0, 0.0, 0.5, 1.0, 1.0]))
    score = risk_score(scores)
    return Rows(scores, weights, word_tokenizer(), score), Shade(score)


def on_terminal(row: Row, shade: Shade) -> str:
    screen = io.StringIO()
    print_row(row, shade, Console(file=screen, force_terminal=True, color_system="truecolor", width=200))
    return screen.getvalue()


def test_a_pipe_gets_a_line_for_each_response_token(rows: tuple[Rows, Shade], capsys) -> None:
    print_row(rows[0][0], rows[1], Console(file=io.StringIO()))
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["0", "1", "harmful", "' <|im_start|>'", "1", "0", "utility=1", "degraded=1"],
        ["0", "2", "harmful", "' <|im_end|>'", "0", "4", "utility=4", "degraded=0"],
        ["0", "3", "harmful", "' system'", "0.5", "-4", "utility=0", "degraded=4"],
    ]


def test_what_is_not_known_is_empty_in_a_pipe(rows: tuple[Rows, Shade], capsys) -> None:
    bare = Row(7, None, None, [Token("w1"), Token("two\t\nlines", 1, {"base": 0.5})], None, False)
    print_row(bare, Shade(None), Console(file=io.StringIO()))
    assert capsys.readouterr().out == "7\t1\t\t'two\\t\\nlines'\t\t\tbase=0.5\n"


def test_a_terminal_gets_the_text_and_what_is_known_of_the_row(rows: tuple[Rows, Shade]) -> None:
    said = CODES.sub("", on_terminal(rows[0][0], rows[1]))
    assert said.splitlines()[0] == "row 0 · harmful · made · 1 of 3 response tokens masked · mean score +0.00"
    assert "<pad> <unk> <|im_start|> <|im_end|> system" in said


def test_on_a_terminal_what_is_masked_is_underlined_and_what_is_risky_coloured(rows: tuple[Rows, Shade]) -> None:
    # the styles, and not the codes: rich writes those as for the first console that showed a style
    console = Console(file=io.StringIO(), force_terminal=True, width=200, record=True)
    print_row(rows[0][0], rows[1], console)
    shown = console.export_html(inline_styles=True)
    styles = {text.strip(): style for style, text in re.findall(r'<span style="([^"]*)">([^<]*)</span>', shown)}
    colour = rows[1].colours[rows[1](4.0)]
    assert f"background-color: {colour}" in styles["&lt;|im_end|&gt;"]
    assert "text-decoration: underline" in styles["&lt;|im_end|&gt;"]
    assert "background-color" in styles["system"], "liked by the other side, and so coloured too"
    assert "underline" not in styles["system"]
    assert "&lt;|im_start|&gt;" not in styles, "a score about 0 has no colour"


def test_texts_cannot_steer_the_terminal(rows: tuple[Rows, Shade]) -> None:
    row = Row(0, "harmful", None, [Token("w1 \x1b[2J"), Token("\x1b]0;mine\x07 w2", 1)], None, False)
    said = on_terminal(row, rows[1])
    assert "\x1b[2J" not in said
    assert "\x1b]0;" not in said


def test_brackets_in_texts_and_labels_are_no_markup(rows: tuple[Rows, Shade]) -> None:
    row = Row(0, "[bold]mine[/bold]", None, [Token("[red]x[/red]", 1), Token("[/]", 2)], None, False)
    said = CODES.sub("", on_terminal(row, rows[1]))
    assert "[bold]mine[/bold]" in said
    assert "[red]x[/red][/]" in said
