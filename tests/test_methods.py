"""The list of methods says what there is and what is so; ``toss methods`` shows it."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from toss_lightning import gradients, selection
from toss_lightning.cli import main
from toss_lightning.config_files import configs_directory
from toss_lightning.data import mixtures
from toss_lightning.data.mixtures import Mixture
from toss_lightning.gradients import Correction
from toss_lightning.loops.method import Method
from toss_lightning.loops.plan import TRAINS_ON
from toss_lightning.methods import METHODS, TITLES, Listed
from toss_lightning.selection import Anchored, Seal, Selection

ROOT = Path(__file__).parent.parent
ALL = pytest.mark.parametrize("listed", METHODS, ids=lambda listed: listed.name)


def config_of(listed: Listed) -> dict[str, dict[str, Any]]:
    """What the method's file says of loop, model and data, over what toss.yaml says of the loop."""
    files = [yaml.safe_load((configs_directory() / f"{name}.yaml").read_text()) for name in ("toss", listed.config)]
    loop = {"rounds": 0, **files[0]["loop"], **files[1].get("loop", {})}
    return {"loop": loop, "model": files[1].get("model", {}), "data": files[1].get("data", {})}


def built(kind: type, given: dict[str, Any] | None) -> Any:
    """The plug-in that a configuration names."""
    if given is None:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    return parser.instantiate_classes(parser.parse_object({"it": given})).it


def method_of(listed: Listed) -> Method:
    config = config_of(listed)
    return Method(
        built(Selection, config["loop"]["selection"]),
        built(Correction, config["model"].get("correction")),
        built(Mixture, config["data"].get("mixture")),
    )


# --- what is listed -------------------------------------------------------------------------------------------------


def test_every_configuration_of_a_method_is_listed_and_the_other_way_round():
    files = [f"methods/{path.stem}" for path in configs_directory().glob("methods/*.yaml")]
    assert sorted(one.config for one in METHODS) == sorted([*files, "toss", "toss_pro"])


def test_every_method_has_its_page_and_every_page_its_method():
    pages = {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/methods/*.md")}
    assert {one.page for one in METHODS} == pages - {"docs/methods/README.md"}


def test_the_index_of_the_pages_lists_every_method():
    rows = [line for line in (ROOT / "docs/methods/README.md").read_text().splitlines() if line.startswith("| [")]
    found = [re.match(r"\| \[(.+)\]\((.+)\) \| `(.+?)` \| (.+?) \| (.+?) \|", row).groups() for row in rows]
    expected = [
        (one.title, Path(one.page).name, f"configs/{one.config}.yaml", one.acts_on, one.needs) for one in METHODS
    ]
    assert sorted(found) == sorted(expected)


def test_every_plug_in_has_a_title():
    exported = [
        one
        for room, kind in ((selection, Selection), (gradients, Correction), (mixtures, Mixture))
        for one in vars(room).values()
        if inspect.isclass(one) and issubclass(one, kind) and not inspect.isabstract(one)
    ]
    assert {one.__name__ for one in exported} == TITLES.keys()


@ALL
def test_it_needs_what_its_configuration_reads(listed):
    method, plan = method_of(listed), config_of(listed)["loop"]["plan"]
    trained_on = {TRAINS_ON[step] for step in plan if step in TRAINS_ON}
    read = {name for names in method.selection.features.values() for name in names} if "score" in plan else set()
    drawn_on = {"safety"} if method.correction or method.companion_rows else set()
    drawn_on |= {*method.mixture.sets} if method.mixture else set()
    drawn_on |= {method.selection.safe} if "seal" in plan and isinstance(method.selection, Seal) else set()
    assert {*listed.sets} == (trained_on | read | drawn_on) - {"custom"}
    assert {*listed.references} == {"utility", "degraded"} & {*plan}


@ALL
def test_it_acts_where_its_plug_ins_act(listed):
    method, weighted = method_of(listed), "select" in config_of(listed)["loop"]["plan"]
    acts_on = listed.acts_on.split(", ")
    assert ("gradient" in acts_on) == (method.correction is not None)
    assert ("mixture" in acts_on) == (method.mixture is not None)
    assert ("nothing" in acts_on) == (method.plug_ins(weighted) == 0)
    if weighted and isinstance(method.selection, Anchored):
        assert "tokens" in acts_on


@ALL
def test_it_has_the_title_that_a_run_prints(listed):
    loop = config_of(listed)["loop"]
    title = method_of(listed).title("select" in loop["plan"], loop["rounds"])
    assert listed.title == (title if listed.acts_on != "nothing" else "plain SFT")


def classes_in(part: Any) -> list[dict[str, Any]]:
    """Every class that a configuration chooses, those inside others too."""
    if not isinstance(part, dict):
        return []
    return [*([part] if "class_path" in part else []), *(one for value in part.values() for one in classes_in(value))]


@ALL
def test_its_configuration_names_every_argument_so_that_none_of_a_file_beneath_stays(listed):
    chosen = classes_in(yaml.safe_load((configs_directory() / f"{listed.config}.yaml").read_text()))
    assert bool(chosen) == (listed.name != "sft")
    for one in chosen:
        name = one["class_path"]
        found = next(vars(room)[name] for room in (selection, gradients, mixtures) if name in vars(room))
        assert {*one.get("init_args", {})} == {*inspect.signature(found).parameters}, name


# --- toss methods ---------------------------------------------------------------------------------------------------


def test_into_a_pipe_it_is_a_line_for_each_and_loads_no_torch():
    program = (
        "import sys; from toss_lightning.cli import main\n"
        "for args in ['methods'], ['methods', 'spf'], ['methods', '--help'], ['methods', 'sfp']: main(args)\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'numpy', 'jsonargparse'} & {*sys.modules}\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()[: len(METHODS)]]
    assert [line[0] for line in lines] == [one.config for one in METHODS]
    assert {len(line) for line in lines} == {8}
    assert all(all(line) for line in lines)


@pytest.mark.parametrize("columns", [100, 80])
def test_on_a_terminal_it_is_a_table_that_fits(capsys, monkeypatch, columns):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["methods"]) == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert max(len(line) for line in lines) <= columns
    assert not any("…" in line for line in lines)
    for one in METHODS:
        at = next(index for index, line in enumerate(lines) if line.startswith(f"{one.config} "))
        assert lines[at + 1].startswith(f"{one.title} ")


@pytest.mark.parametrize("name", ["spf", "SPF", "methods/spf", "configs/methods/spf.yaml"])
def test_one_is_shown_with_all_its_facts_and_its_configuration(capsys, name):
    assert main(["methods", name]) == 0
    said = capsys.readouterr().out
    listed = next(one for one in METHODS if one.config == "methods/spf")
    for fact in (listed.title, listed.acts_on, listed.needs, listed.cost, listed.source, listed.fidelity):
        assert fact in said
    assert str(ROOT / "docs/methods/spf.md") in said
    assert (configs_directory() / "methods/spf.yaml").read_text() in said
    assert "toss fit --config toss --config models/llama32_1b --config methods/spf --config my_data.yaml" in said


def test_a_method_that_stands_alone_is_laid_over_nothing(capsys):
    assert main(["methods", "TOSS-Pro"]) == 0
    assert "toss fit --config toss_pro --config models/llama32_1b --config my_data.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "hint"),
    [("safgrad", "did you mean safegrad?"), ("DRSFT", "did you mean dr_sft?"), ("xyz", "there is sft, ")],
)
def test_an_unknown_one_is_one_line_with_the_nearest(capsys, name, hint):
    assert main(["methods", name]) == 2
    assert capsys.readouterr().err.startswith(f"error: toss methods {name}: no such method; {hint}")
