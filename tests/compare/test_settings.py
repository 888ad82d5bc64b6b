"""What a run is made from, read without the parser that needs torch."""

import pytest
from made_runs import made, write_comparison

from toss_lightning import files
from toss_lightning.compare.settings import (
    DEFAULT_PLAN,
    differing,
    find_plan,
    fingerprint,
    flatten,
    given,
    say_differing,
)
from toss_lightning.config_files import configs_directory, read_config
from toss_lightning.errors import ConfigError
from toss_lightning.loops.plan import TOSS_PLAN


def test_both_ways_to_write_a_setting_are_one():
    short = {"loop": {"epochs": 1, "selection": {"class_path": "X", "init_args": {"discard": 0.1}}}}
    long = {"loop": {"init_args": {"epochs": 1, "selection": {"class_path": "X", "init_args": {"discard": 0.1}}}}}
    assert flatten(short) == flatten(long)
    assert flatten(short) == {"loop.epochs": 1, "loop.selection.class_path": "X", "loop.selection.discard": 0.1}
    assert flatten({"loop.epochs": 1}) == {"loop.epochs": 1}


def test_the_plan_is_the_last_one_named_without_the_control():
    assert DEFAULT_PLAN == TOSS_PLAN
    assert find_plan([{}], "a") == [*TOSS_PLAN, "test"]
    demo = flatten(read_config(configs_directory() / "demo.yaml"))
    assert find_plan([demo], "a") == [*TOSS_PLAN, "test"]
    assert find_plan([demo, {"loop.plan": ["seal", "score", "select", "target", "test"]}], "a")[-2:] == [
        "target",
        "test",
    ]
    mine = {"loop.class_path": "mine.Loop"}
    assert find_plan([mine, {"loop.plan": ["target"]}], "a") == ["target", "test"]
    with pytest.raises(ConfigError, match=r"methods.a: mine.Loop has a plan that no file names: add loop.plan"):
        find_plan([mine], "a")
    with pytest.raises(ConfigError, match="no step target"):
        find_plan([{"loop.plan": "target"}], "a")


def test_a_loop_of_ones_own_is_not_ours_for_the_end_of_its_name():
    for ours in ("TossLoop", "toss_lightning.loops.TossProLoop"):
        assert find_plan([{"loop.class_path": ours}], "a") == [*TOSS_PLAN, "test"]
    for mine in ("my.MyTossLoop", "MyTossProLoop"):
        with pytest.raises(ConfigError, match=rf"methods.a: {mine} has a plan that no file names"):
            find_plan([{"loop.class_path": mine}], "a")


def test_every_shipped_method_has_a_plan():
    for path in [*configs_directory().glob("methods/*.yaml"), *configs_directory().glob("toss*.yaml")]:
        plan = find_plan([flatten(read_config(path))], path.stem)
        assert plan[-2:] == ["target", "test"]


def test_a_fingerprint_tells_training_from_evaluation(tmp_path):
    rows, asked = tmp_path / "rows.jsonl", tmp_path / "asked.jsonl"
    rows.write_text("1")
    asked.write_text("1")
    overlays = [{"data.custom": [{"path": str(rows)}], "run_dir": "a"}, {"loop.evaluation.prompts.a": str(asked)}]
    plan = ["target", "test"]
    first = fingerprint(overlays, plan, 1)
    assert fingerprint([{**overlays[0], "run_dir": "b"}, overlays[1]], plan, 1) == first
    changed = [
        ([{**overlays[0], "loop.epochs": 1}, overlays[1]], plan, 1),
        (overlays, ["utility", *plan], 1),
        (overlays, plan, 2),
    ]
    for one in changed:
        assert fingerprint(*one)["training"] != first["training"]
        assert fingerprint(*one)["evaluation"] == first["evaluation"]
    asked_more = fingerprint([*overlays, {"loop.evaluation.batch_size": 2}], plan, 1)
    assert asked_more["evaluation"] != first["evaluation"]
    assert asked_more["training"] == first["training"]


def test_a_file_counts_with_its_content(tmp_path):
    rows, asked = tmp_path / "rows.jsonl", tmp_path / "asked.jsonl"
    overlays = [{"data.custom": [{"path": str(rows)}]}, {"loop.evaluation.pairs": str(asked)}]
    found = []
    for contents in (("1", "1"), ("2", "1"), ("2", "2")):
        rows.write_text(contents[0])
        asked.write_text(contents[1])
        files._digest_of_version.cache_clear()  # within one command a file is read once
        found.append(fingerprint(overlays, ["target", "test"], 1))
    first, second, third = found
    assert first["training"] != second["training"] == third["training"]
    assert first["evaluation"] == second["evaluation"] != third["evaluation"]


def test_a_file_that_cannot_be_read_is_named_with_its_key(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("1")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(rows))

    monkeypatch.setattr(files, "_digest_of_version", refuse)
    with pytest.raises(
        ConfigError, match=r"data.custom: .*rows.jsonl: cannot be read \(Permission denied\): give a file"
    ):
        fingerprint([{"data.custom": [{"path": str(rows)}]}], ["target", "test"], 1)


@pytest.mark.parametrize("name", ["mine.Judge", "own.judges.Judge", "own.Judge"])
def test_a_class_of_ones_own_counts_with_the_file_it_stands_in(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    files = {"mine.Judge": "mine.py", "own.judges.Judge": "own/judges.py", "own.Judge": "own/__init__.py"}
    for file in files.values():
        (tmp_path / file).write_text("raise RuntimeError('imported')")
    overlays = [{"loop.selection.class_path": name}, {"loop.evaluation.judges": [{"class_path": name}]}]
    first = fingerprint(overlays, ["target", "test"], 1)
    assert fingerprint(overlays, ["target", "test"], 1) == first
    (tmp_path / files[name]).write_text("raise RuntimeError('imported again')")
    second = fingerprint(overlays, ["target", "test"], 1)
    assert second["training"] != first["training"]
    assert second["evaluation"] != first["evaluation"]


def test_methods_that_are_given_what_others_make_are_known():
    methods = {
        "a": [{"loop.plan": ["target"]}],
        "b": [{"loop.scores_from": None}, {"loop.scores_from": "scores"}],
        "c": [{"model.references.utility": "there"}],
        "d": [{"loop.scores_from": "scores"}, {"loop.scores_from": None}],
    }
    assert given(methods) == ["b", "c"]


def test_differing_settings_leave_out_what_makes_a_method():
    methods = {
        "a": [{"loop.plan": ["target"], "model.optim.lr": 1, "x": [1]}],
        "b": [{"model.optim.lr": 1}, {"model.optim.lr": 2, "loop.selection.discard": 0.1, "x": [1]}],
        "c": [{"model.optim.lr": 1, "model.correction.class_path": "SPF", "loop.rounds": 2, "x": [1]}],
        "d": [{"model.normalize": "kept", "model.optim.lr": 1, "x": [1]}],
    }
    found = differing(methods)
    assert found.keys() == {"model.optim.lr", "model.normalize"}
    assert say_differing(found) == [
        "model.normalize: default in a, b, c; kept in d",
        "model.optim.lr: 1 in a, c, d; 2 in b",
    ]


def test_a_setting_may_name_the_seed_of_its_run(tmp_path):
    for seed in (1, 2):
        (tmp_path / f"rows-{seed}.jsonl").write_text("a")
    path = write_comparison(
        tmp_path,
        {"A": {"set": {"loop.scores_from": "scores/seed-{seed}"}}},
        set={"data.harmful": [{"path": f"{tmp_path}/rows-{{seed}}.jsonl"}]},
    )
    runs = made(path)[1]
    for seed in (1, 2):
        arguments = runs["A", seed].arguments
        assert f"--loop.scores_from=scores/seed-{seed}" in arguments
        assert f'--data.harmful=[{{"path": "{tmp_path}/rows-{seed}.jsonl"}}]' in arguments

    (tmp_path / "rows-2.jsonl").write_text("b")
    files._digest_of_version.cache_clear()
    again = made(path)[1]
    assert again["A", 1].made_from == runs["A", 1].made_from
    assert again["A", 2].made_from != runs["A", 2].made_from
