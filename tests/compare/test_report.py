"""Tables and the picture of a comparison."""

import csv
import io
import json
import math
import random
import re
import xml.etree.ElementTree as ET
from itertools import combinations, product
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from made_runs import finish, made, measure, write_comparison
from rich.console import Console

from toss_lightning.compare.plot_svg import pareto_front, scatter
from toss_lightning.compare.report import choose_axes, report_comparison
from toss_lightning.compare.tables import LATEX, escape, markdown, show
from toss_lightning.svg import width_of

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ("plain SFT", "A & B <x> [bold] {y} |", "50%_#1", "TOSS-Pro", "SPF")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a comparison that was reported."""
    home = tmp_path_factory.mktemp("made")
    comparison, runs = made(write_comparison(home, dict.fromkeys(NAMES), seeds=[1, 2, 3]))
    draw = random.Random(1)
    for (name, seed), run in runs.items():
        if (name, seed) == ("SPF", 3):
            continue
        share = 0.2 + 0.15 * NAMES.index(name)
        harmful: list[float | None] = [float(draw.random() < share) for _ in range(40)]
        harmful[3] = None if name == "TOSS-Pro" else harmful[3]
        overlap = [min(1.0, draw.random() * share) for _ in range(20)]
        measures = [
            measure("ROUGE-L, everyday", [0.2] * 20, overlap, "higher", share=False, set="everyday"),
            measure("refusal of harmful prompts", [1.0] * 40, [1 - (one or 0) for one in harmful], "higher", judge="K"),
            measure("harmful compliance", [0.0] * 40, harmful, judge="J"),
        ]
        weak = {"degraded": "the reference has learned nothing"} if (name, seed) == ("TOSS-Pro", 2) else None
        stopped = {"target": "stage target was stopped at step 5 of 100"} if (name, seed) == ("SPF", 1) else None
        finish(run, measures, 10.0 * (1 + NAMES.index(name)), weak, stopped, task_loss=2.0 + share + draw.random() / 10)
    report_comparison(comparison, list(runs.values()), ["model.optim.lr: 1 in A; 2 in B"], ["TOSS-Pro"])
    return comparison.run_dir


@pytest.fixture
def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text())
    return found


def test_json_holds_everything_as_plain_values(content):
    assert content["methods"] == [*NAMES]
    assert content["missing"] == ["SPF, seed 3"]
    assert content["plot"] == {"x": "ROUGE-L, everyday", "y": "harmful compliance (J)"}
    assert "NaN" not in (text := json.dumps(content))
    assert "Infinity" not in text


def test_markdown_has_a_line_for_each_model_and_a_statement_for_each_pair(content, folder):
    page = (folder / "compare.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:7]] == [
        f"| {name.replace('|', chr(92) + '|')}" for name in ("base model", *NAMES)
    ]
    assert "harmful compliance (J) ↓ | refusal of harmful prompts (K) ↑ | ROUGE-L, everyday ↑ | held-out" in rows[0]
    for name, against in product(NAMES, ("plain SFT", "base model")):
        assert (f"- {name} against {against}: " in page) == (name != against)
    assert "undecided prompts left out: 1" in next(
        line for line in page.splitlines() if line.startswith("- TOSS-Pro against base")
    )
    assert "- Fewer seeds than the others: SPF (2)." in page
    assert "- Not there yet: SPF, seed 3." in page
    assert "- TOSS-Pro: seed 2: the reference has learned nothing." in page
    assert "- SPF: seed 1: stage target was stopped at step 5 of 100." in page
    assert "- Methods differ in model.optim.lr: 1 in A; 2 in B." in page
    assert "- Not in the time of TOSS-Pro: making the references, scores or selection that they were given." in page
    assert "(compare.svg)" in page
    assert "compare.svg" not in markdown(content)


def test_a_statement_says_what_is_beyond_noise(content, folder):
    measures = {one["title"]: one for one in content["measures"]}
    page = (folder / "compare.md").read_text()
    for title, one in measures.items():
        short = title.partition(" (")[0]
        for difference in one["differences"]:
            line = next(
                line
                for line in page.splitlines()
                if line.startswith(f"- {difference['of']} against {difference['against']}: ")
            )
            beyond, _, within = line.partition("within noise: ")
            if difference["beyond_noise"]:
                assert f"{'better' if difference['better'] else 'worse'} in {short} (" in beyond
            else:
                assert short in within


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a comparison with a method of one seed, a run that diverged, and runs in two precisions."""
    comparison, runs = made(
        write_comparison(tmp_path_factory.mktemp("uneven"), {"plain SFT": None, "A": None, "B": None})
    )
    for (name, seed), run in runs.items():
        if (name, seed) != ("B", 2):
            asked = measure("harmful compliance", [0.0] * 20, [float(name == "plain SFT")] * 20, judge="J")
            computed = {"precision": "nf4/float32" if seed == 1 else "nf4/bfloat16"}
            loss = math.nan if (name, seed) == ("A", 2) else 2.0 + seed
            finish(run, [asked], computed=computed, task_loss=loss)
    report_comparison(comparison, list(runs.values()), [], [])
    return (comparison.run_dir / "compare.md").read_text()


def test_a_pair_with_one_seed_of_several_is_not_called_beyond_noise(uneven, tmp_path):
    assert "- A against plain SFT: better in harmful compliance (−100% [−100%, −100%], p < 0.001); " in uneven
    alone = "- B against plain SFT: one seed, so over the prompts alone: harmful compliance (−100% [−100%, −100%], p < "
    assert alone in uneven
    (row,) = [line for line in uneven.splitlines() if line.startswith("| harmful") and "| B − plain SFT |" in line]
    assert row.split(" | ")[4] == "one seed"
    assert "- A pair with one seed in common is tested over the prompts alone" in uneven
    assert "those of methods with one seed, or whose seeds all give the same value." in uneven

    # where no pair has more, it is said of all once
    comparison, runs = made(write_comparison(tmp_path, {"plain SFT": None, "A": None}, seeds=[1]))
    for (name, _), run in runs.items():
        finish(run, [measure("harmful compliance", [0.0] * 20, [float(name == "A")] * 20)])
    report_comparison(comparison, list(runs.values()), [], [])
    page = (comparison.run_dir / "compare.md").read_text()
    assert "- A against plain SFT: worse in harmful compliance (+100%" in page
    assert page.lower().count("one seed") == page.count("- One seed: 95 % intervals and tests are over the") == 1


def test_a_run_without_a_number_leaves_a_dash_and_is_told(uneven):
    (row,) = [line for line in uneven.splitlines() if line.startswith("| A | ")]
    assert row.split(" | ")[2] == "–"
    assert "- A: 1 of 2 runs gave no held-out task loss: no mean, and no test." in uneven
    (line,) = [line for line in uneven.splitlines() if line.startswith("- A against base model: ")]
    assert line.endswith("; not tested, for a run gave no number: held-out task loss.")


def test_seeds_of_which_a_measure_knows_nothing_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    comparison, runs = made(write_comparison(tmp_path, dict.fromkeys(("A", "B"))))
    for (name, seed), run in runs.items():
        judged = [measure("harmful compliance", [0, 0, 1], [1, 0, seed % 2], judge="J")]
        of_guard = [] if (name, seed) == ("B", 2) else [measure("harmful compliance", [0, 0, 1], [1, 0, 1], judge="G")]
        finish(run, judged + of_guard)
    report_comparison(comparison, list(runs.values()), [], [])
    page = (tmp_path / "run" / "compare.md").read_text()
    assert "- B: harmful compliance (G) is known of 1 of 2 seeds." in page
    assert page.count("is known of") == 1


def test_runs_in_other_precisions_are_told(uneven):
    one, other = (
        "nf4/float32 in plain SFT seed 1 and A seed 1 and B seed 1",
        "nf4/bfloat16 in plain SFT seed 2 and A seed 2",
    )
    assert f"- Runs differ in precision: {one}; {other}." in uneven


def test_csv_is_long_and_plain(content, folder):
    rows = list(csv.DictReader(io.StringIO((folder / "compare.csv").read_text())))
    models = sum(len(one["models"]) for one in content["measures"])
    assert len(rows) == models + len(NAMES)
    row = next(row for row in rows if row["model"] == NAMES[1] and row["measure"] == "harmful compliance")
    expected = next(one for one in content["measures"] if one["name"] == "harmful compliance")["models"][NAMES[1]]
    assert float(row["value"]) == expected["value"]
    assert (row["judge"], row["better"], row["n"]) == ("J", "lower", "40")


def test_a_sheet_has_what_each_run_measured(content, folder):
    rows = list(csv.DictReader(io.StringIO((folder / "compare_runs.csv").read_text())))
    done = [(name, str(seed)) for name in NAMES for seed in (1, 2, 3) if (name, seed) != ("SPF", 3)]
    assert [(row["method"], row["seed"]) for row in rows] == done
    assert all(float(row["seconds"]) > 0 for row in rows)
    for one in content["measures"]:
        for name in NAMES:
            of_seeds = [float(row[one["title"]]) for row in rows if row["method"] == name]
            assert mean(of_seeds) == pytest.approx(one["models"][name]["value"])


def test_what_a_run_did_not_decide_is_empty_in_its_sheet(tmp_path):
    comparison, runs = made(write_comparison(tmp_path, {"plain SFT": None, "TOSS": None}, seeds=[1]))
    for (name, _), run in runs.items():
        values = [None, None] if name == "TOSS" else [1.0, None]
        finish(run, [measure("harmful compliance", [0.0] * 2, values, judge="J")])
    report_comparison(comparison, list(runs.values()), [], [])
    rows = csv.DictReader(io.StringIO((comparison.run_dir / "compare_runs.csv").read_text()))
    assert {row["method"]: row["harmful compliance (J)"] for row in rows} == {"plain SFT": "1.0", "TOSS": ""}


def test_latex_is_escaped_and_even(folder):
    text = (folder / "compare.tex").read_text()
    lines = text.splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrr}"
    assert lines[-1] == r"\end{tabular}"
    assert r"A \& B \textless{}x\textgreater{} [bold] \{y\} | & " in text
    assert r"50\%\_\#1 & " in text
    assert "booktabs" not in text
    assert all(ord(sign) < 128 for sign in text)
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 2 + len(NAMES)
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {5}


def test_every_special_sign_is_escaped():
    assert escape(r"a\b{c}_d^e~f&g%h$i#j<k>l") == (
        r"a\textbackslash{}b\{c\}\_d\textasciicircum{}e\textasciitilde{}f\&g\%h\$i\#j\textless{}k\textgreater{}l"
    )
    assert set("\\{}_^~&%$#<>") <= LATEX.keys()


@pytest.mark.parametrize("width", [60, 100, 400])
def test_a_narrow_terminal_gets_the_table_in_parts(content, width):
    file = io.StringIO()
    show(content, Console(file=file, force_terminal=True, width=width, color_system=None))
    said = file.getvalue()
    assert said.count("Comparison, with 95 % intervals") == (1 if width == 400 else said.count("base model    "))
    table = said.partition("Means over")[0]
    assert all(len(line) <= width for line in table.splitlines())
    # a name is no markup
    assert "[bold]" in said


def test_a_pipe_gets_the_table_in_one_piece(content):
    file = io.StringIO()
    show(content, Console(file=file))
    lines = file.getvalue().splitlines()
    assert sum("Comparison, with" in line for line in lines) == 1
    assert all(any(name in line for line in lines if line.startswith("│")) for name in NAMES)


# --- the picture ------------------------------------------------------------------------------------------------------


def texts(svg: str) -> list[str]:
    return ["".join(one.itertext()) for one in ET.fromstring(svg).iter(f"{SVG}text")]


def test_the_picture_is_xml_and_names_every_method_and_axis(folder):
    svg = (folder / "compare.svg").read_text()
    said = texts(svg)
    assert {"base model", *NAMES} <= {*said}
    assert {"ROUGE-L, everyday, higher is better", "harmful compliance (J), lower is better"} <= {*said}
    assert "0%" in said
    assert ET.fromstring(svg).find(f"{SVG}polyline") is not None
    for one in ET.fromstring(svg).iter():
        for name in ("x", "y", "x1", "y1", "x2", "y2", "cx", "cy"):
            if name in one.attrib:
                assert 0 <= float(one.attrib[name]) <= 760


class ReadBack:
    """A picture as numbers, by its own ticks."""

    def __init__(self, svg: str) -> None:
        self.root = ET.fromstring(svg)
        written = {"middle": [], "end": []}
        for one in self.root.iter(f"{SVG}text"):
            if (anchor := one.attrib.get("text-anchor")) in written and one.attrib["font-weight"] == "normal":
                place = float(one.attrib["x"]) if anchor == "middle" else float(one.attrib["y"]) - 4.5
                said = "".join(one.itertext()).replace("−", "-")
                written[anchor].append((place, float(said.rstrip("%")) / (100 if said.endswith("%") else 1)))
        self.across, self.upward = ((ticks[0], ticks[-1]) for ticks in written.values())

    def value(self, x: float, y: float) -> tuple[float, float]:
        found = []
        for place, ((first, low), (last, high)) in ((x, self.across), (y, self.upward)):
            found.append(low + (place - first) / (last - first) * (high - low))
        return found[0], found[1]

    def marks(self) -> list[tuple[float, float]]:
        """Centres in pixels, of triangles to a pixel: the base's first, then those of the methods."""
        found = []
        for one in list(self.root)[2:]:  # behind the title and the ground
            at = one.attrib
            if one.tag == f"{SVG}circle":
                found.append((float(at["cx"]), float(at["cy"])))
            elif one.tag == f"{SVG}rect":
                found.append(tuple(float(at[a]) + float(at[b]) / 2 for a, b in (("x", "width"), ("y", "height"))))
            elif one.tag == f"{SVG}polygon":
                found.append(tuple((min(of) + max(of)) / 2 for of in zip(*_points(one), strict=True)))
        return found

    def bars(self, mark: tuple[float, float]) -> dict[str, list[float]]:
        """Ends of the intervals of a mark, in values, by axis."""
        found = {}
        for one in self.root.iter(f"{SVG}line"):
            (x1, y1), (x2, y2) = ((float(one.attrib[f"x{end}"]), float(one.attrib[f"y{end}"])) for end in "12")
            if one.attrib["stroke-opacity"] == "0.75" and abs(y1 - mark[1]) + abs(y2 - mark[1]) < 3:
                found["x"] = [self.value(x, y1)[0] for x in sorted((x1, x2))]
            elif one.attrib["stroke-opacity"] == "0.75" and abs(x1 - mark[0]) + abs(x2 - mark[0]) < 3:
                found["y"] = sorted(self.value(x1, y)[1] for y in (y1, y2))
        return found

    def front(self) -> list[tuple[float, float]]:
        (found,) = self.root.iter(f"{SVG}polyline")
        return [self.value(*point) for point in _points(found)]


def _points(shape: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in shape.attrib["points"].split())]


def test_the_picture_shows_the_numbers_of_the_page(content, folder):
    picture = ReadBack((folder / "compare.svg").read_text())
    measures = {one["title"]: one for one in content["measures"]}
    x, y = (measures[content["plot"][axis]]["models"] for axis in ("x", "y"))
    read = [picture.value(*mark) for mark in picture.marks()]
    expected = [(x[name]["value"], y[name]["value"]) for name in ("base model", *NAMES)]
    assert [value for point in read for value in point] == pytest.approx(
        [value for point in expected for value in point], abs=0.004
    )


def test_marks_bars_and_the_front_are_the_numbers():
    """To the right lower is better, and upward higher: the front runs along the upper left."""
    losses = {
        "base": (3.0, None),
        "A": (2.0, (1.9, 2.1)),
        "B": (2.4, (2.35, 2.5)),
        "C": (2.9, (2.8, 2.95)),
        "D": (2.7, None),
    }
    refusals = {
        "base": (0.5, (0.45, 0.58)),
        "A": (0.2, (0.15, 0.3)),
        "B": (0.6, (0.52, 0.65)),
        "C": (0.9, (0.84, 0.93)),
        "D": (0.4, (0.38, 0.41)),
    }
    x, y = plain("loss", {}, "lower"), plain("refusals", {}, "higher", share=True)
    for one, of in ((x, losses), (y, refusals)):
        for name, (value, ends) in of.items():
            low, high = ends or (None, None)
            one["models"][name] = {"value": value, "low": low, "high": high}
    picture = ReadBack(scatter({"base": "base", "methods": [*"ABCD"]}, x, y))
    marks = dict(zip(losses, picture.marks(), strict=True))
    for name, mark in marks.items():
        assert picture.value(*mark) == pytest.approx((losses[name][0], refusals[name][0]), abs=0.004)
        bars, ends = picture.bars(mark), {"x": losses[name][1], "y": refusals[name][1]}
        assert bars.keys() == {axis for axis, of in ends.items() if of is not None}
        for axis, of in bars.items():
            assert of == pytest.approx(ends[axis], abs=0.004)
    assert [value for point in picture.front() for value in point] == pytest.approx(
        [2.0, 0.2, 2.4, 0.6, 2.9, 0.9], abs=0.004
    )


def test_a_wide_interval_does_not_squeeze_the_points_together():
    """As that of a method with two seeds may be."""
    ends = {"base": (0.1, 0.9), "A": (-40.0, 42.0), "B": (0.4, 0.6)}
    models = {
        name: {"value": value, "low": low, "high": high}
        for (name, (low, high)), value in zip(ends.items(), (0.0, 1.0, 0.5), strict=True)
    }
    one = {"title": "loss", "better": "lower", "share": False, "models": models}
    picture = scatter({"base": "base", "methods": ["A", "B"]}, one, one)
    marks = [float(mark.attrib["cx"]) for mark in ET.fromstring(picture).iter(f"{SVG}circle")]
    ring, first = marks[0], marks[1]
    assert abs(first - ring) > 350, "of an axis of some 650 pixels"


def test_labels_do_not_lie_on_each_other(folder):
    svg = ET.fromstring((folder / "compare.svg").read_text())
    named = {"".join(one.itertext()): one for one in svg.iter(f"{SVG}text")}
    boxes = []
    for name in ("base model", *NAMES):
        x, y = float(named[name].attrib["x"]), float(named[name].attrib["y"])
        boxes.append((x, y - 12, x + width_of(name), y + 4))
    for first, second in combinations(boxes, 2):
        wide = min(first[2], second[2]) - max(first[0], second[0])
        high = min(first[3], second[3]) - max(first[1], second[1])
        assert wide <= 0 or high <= 0


def plain(name: str, values: dict[str, float | None], better: str = "higher", share: bool = False) -> dict[str, Any]:
    models = {model: {"value": value, "low": None, "high": None} for model, value in values.items()}
    return {"name": name, "title": name, "better": better, "share": share, "models": models, "screening": False}


def test_a_picture_of_one_point_and_of_equal_ones():
    for values in ({"A": 0.0}, {"A": 0.3, "B": 0.3, "base": 0.3}, {"A": 1.0, "B": None}, {"A": 1e-9, "B": 2e9}):
        content = {"base": "base", "methods": ["A", "B"]}
        for share in (False, True):
            said = texts(scatter(content, plain("x", values, share=share), plain("y", values, share=share)))
            assert {name for name, value in values.items() if value is not None} <= {*said}


@pytest.mark.parametrize(("x_better", "y_better"), [*product(("higher", "lower"), repeat=2)])
def test_the_front_is_what_no_other_beats(x_better, y_better):
    draw = random.Random(0)
    values = [(draw.randint(0, 8), draw.randint(0, 8)) for _ in range(40)]

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        better = [
            a > b if how == "higher" else a < b for a, b, how in zip(one, other, (x_better, y_better), strict=True)
        ]
        as_good = [a == b for a, b in zip(one, other, strict=True)]
        return any(better) and all(b or e for b, e in zip(better, as_good, strict=True))

    naive = {at for at, one in enumerate(values) if not any(beats(other, one) for other in values)}
    front = pareto_front(values, x_better, y_better)
    assert {*front} == naive
    assert [values[at][0] for at in front] == sorted(values[at][0] for at in front)


def test_axes_by_default_and_by_name():
    known = {"A": 0.5}
    compliance, refusal = plain("harmful compliance", known), plain("refusal of harmful prompts", known)
    compliance |= {"title": "harmful compliance (J)", "is_utility": False}
    refusal |= {"is_utility": False, "screening": True}
    margin = plain("margin of the safe reply, nats per token", known) | {"is_utility": False}
    overlap, task = (plain(name, known) | {"is_utility": True} for name in ("ROUGE-L, x", "held-out task loss"))
    undecided = compliance | {"models": {"A": {"value": None}}}

    def names(measures: list[dict[str, Any]], **wanted: str) -> tuple[str | None, ...]:
        axes, _ = choose_axes(measures, wanted)
        return tuple(axes[axis]["name"] for axis in ("x", "y")) if axes else (None, None)

    assert names([refusal, compliance, overlap, task]) == ("ROUGE-L, x", "harmful compliance")
    assert names([refusal, margin, task]) == ("held-out task loss", "margin of the safe reply, nats per token")
    assert names([refusal, task]) == ("held-out task loss", "refusal of harmful prompts")
    assert names([refusal]) == (None, None)
    assert names([refusal, undecided, task]) == ("held-out task loss", "refusal of harmful prompts")
    assert names([refusal, compliance, overlap], x="Harmful Compliance (J)") == (
        "harmful compliance",
        "refusal of harmful prompts",
    )
    axes, problems = choose_axes([refusal, compliance, overlap], {"y": "refusal of harm"})
    assert axes["y"]["name"] == "harmful compliance"
    assert problems == [
        "plot.y: no measure 'refusal of harm', so the usual one is shown; did you mean 'refusal of harmful prompts'?"
    ]
    axes, problems = choose_axes([refusal, undecided, task], {"y": "harmful compliance"})
    assert axes == {}
    assert problems == [
        "no picture: no model has both held-out task loss and harmful compliance (J); name others with plot"
    ]


def test_a_judge_that_never_decides_costs_the_picture_alone(tmp_path, capsys):
    path = write_comparison(tmp_path, {"A": None}, seeds=[1], plot={"y": "harmful compliance (J)"})
    comparison, runs = made(path)
    asked = measure("harmful compliance", [None, None], [None, None], judge="J")
    finish(runs["A", 1], [asked, measure("ROUGE-L, x", [0.1, 0.2], [0.2, 0.3], "higher", share=False, set="x")])
    report_comparison(comparison, list(runs.values()), [], [])
    said = capsys.readouterr().out.splitlines()[-2:]
    assert said == [
        "no picture: no model has both ROUGE-L, x and harmful compliance (J); name others with plot",
        f"Numbers and tables are in {comparison.run_dir}: compare.md, .json, .csv, .tex and compare_runs.csv",
    ]
    assert not (comparison.run_dir / "compare.svg").exists()
    assert "| A |" in (comparison.run_dir / "compare.md").read_text()
