"""The shipped configurations: each runs, overlaid, on a tiny model; toss.yaml holds the paper's numbers."""

import json
import re
import tomllib
from itertools import chain, zip_longest
from pathlib import Path

import datasets
import pytest
import yaml
from tiny import some_pairs, write_rows

from toss_lightning.cli import main
from toss_lightning.config_files import configs_directory
from toss_lightning.evaluation.judges.guards import GUARDS
from toss_lightning.evaluation.prompts import PromptSet, load_prompts
from toss_lightning.loops.plan import TOSS_PLAN

pytestmark = pytest.mark.usefixtures("somewhere")

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    str(path.relative_to(ROOT / "configs"))
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name != "compare"  # of another verb: tests/compare
)
EVALUATIONS = [name for name in CONFIGS if name.startswith("evaluation")]
ROOMS = {room: [name for name in CONFIGS if name.startswith(room)] for room in ("models", "data", "trainer", "methods")}
PAPER = ["toss.yaml", "toss_pro.yaml"]
# Each room's files in turn, so that every file is in at least one recipe.
RECIPES = [
    [name or names[0] for name, names in zip(recipe, ROOMS.values(), strict=True)]
    for recipe in zip_longest(*ROOMS.values())
]
ON_A_LAPTOP = (
    *("--model.base.quantization", "none", "--model.optim.paged_8bit", "false", "--model.lora.r=2"),
    *("--trainer.accelerator", "cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.num_nodes=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--loop.epochs=1", "--loop.reference_epochs=1"),
)


def write_data() -> None:
    """Tiny files where configs/data looks for them."""
    Path("data/redorca").mkdir(parents=True)
    sizes = {"custom": 14, "utility": 10, "harmful": 8, "safety": 6}
    for start, (name, count) in enumerate(sizes.items()):
        write_rows(Path(f"data/{name}.jsonl"), some_pairs(count, start))
        rows = [{"question": prompt, "response": reply} for prompt, reply in some_pairs(count, start)]
        rows.append({"question": "w1 w2", "response": ""})  # redorca.yaml drops rows like this one
        file = "train" if name == "custom" else f"{name}_ref"
        Path(f"data/redorca/{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def resolved(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *args, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_every_file_is_in_a_recipe():
    assert set(chain.from_iterable(RECIPES)) | {"demo.yaml", *PAPER, *EVALUATIONS} == set(CONFIGS)


def test_yaml_in_the_docs_is_yaml():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    blocks = [block for page in pages for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert len(blocks) > 10
    for block in blocks:
        assert isinstance(yaml.safe_load(block), dict), block


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_are_laid_over_a_run(name, capsys):
    evaluation = resolved(capsys, "--config=demo", f"--config={name}")["loop"]["init_args"]["evaluation"]
    text = (ROOT / "configs" / name).read_text()
    assert text.startswith("# ")
    written = yaml.safe_load(text)["loop"]["evaluation"]
    assert evaluation["sampling"].items() >= written["sampling"].items()
    assert evaluation["prompts"].keys() >= written.get("prompts", {}).keys()
    for prompts, said in written.get("prompts", {}).items():
        assert evaluation["prompts"][prompts].items() >= said.items()
    judges = [judge["class_path"].rpartition(".")[2] for judge in written.get("judges", [])]
    assert [judge["class_path"].rpartition(".")[2] for judge in evaluation["judges"] or []] == judges


def test_sets_from_the_hub(capsys, monkeypatch):
    """What hub.yaml asks, and hh.yaml, whose mild prompts would count as refusals that are missing among the others."""
    sets = {}
    for name in ("hub", "hh"):
        evaluation = resolved(capsys, "--config=demo", f"--config=evaluation/{name}")["loop"]["init_args"]["evaluation"]
        sets |= {key: spec for key, spec in evaluation["prompts"].items() if spec["path"].count("/") == 1}
    harmful = {"advbench", "harmbench", "strongreject", "jailbreakbench", "hh"}
    assert {name for name, spec in sets.items() if spec["label"] == "harmful"} == harmful
    assert sets.keys() - harmful == {"jailbreakbench_benign", "xstest", "or_bench_hard", "gsm8k"}
    assert {name for name, spec in sets.items() if spec["revision"] is not None} == set()
    (judge,) = evaluation["judges"]
    assert GUARDS[judge["init_args"]["template"]].decides == ("harmful",)
    asked = []

    def load_dataset(path, subset, **options):
        asked.append((path, subset, options))
        return datasets.Dataset.from_list([{"chosen": "\n\nHuman: Who?\n\nAssistant: Me.", "rejected": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (prompt,) = load_prompts("hh", PromptSet(**sets["hh"]))
    assert (prompt.text, prompt.label, prompt.reference) == ("Who?", "harmful", "Me.")
    options = {"split": "test", "revision": None, "data_dir": "harmless-base"}
    assert asked == [("Anthropic/hh-rlhf", None, options)]


def test_a_set_that_is_commented_out_is_one(capsys):
    text = (ROOT / "configs/evaluation/hub.yaml").read_text().replace("# hex_phi:", "hex_phi:")
    Path("mine.yaml").write_text(text)
    prompts = resolved(capsys, "--config=demo", "--config=mine.yaml")["loop"]["init_args"]["evaluation"]["prompts"]
    assert (prompts["hex_phi"]["path"], prompts["hex_phi"]["label"]) == ("hex_phi.jsonl", "harmful")


def test_the_sets_in_the_docs_are_those_of_the_files():
    listed = (ROOT / "docs/evaluation.md").read_text().partition("### Sets from the hub")[2].partition("`--config")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", listed, re.M) for name in re.findall(r"`(\w+)`", row)}
    files = [(ROOT / f"configs/evaluation/{name}.yaml").read_text() for name in ("hub", "hh")]
    sets = [yaml.safe_load(text.replace("# hex_phi:", "hex_phi:"))["loop"]["evaluation"]["prompts"] for text in files]
    assert names == {*chain.from_iterable(sets)}


def test_the_demo_evaluation_runs(tiny_model, capsys):
    write_data()
    options = ["--model.base.path", tiny_model, *ON_A_LAPTOP, "--run_dir", "run", "--loop.plan=[target, test]"]
    sets = [f"--data.{name}=data/{name}.jsonl" for name in ("custom", "utility", "harmful", "safety")]
    held_out = [f"--data.{name}=null" for name in ("utility_val", "harmful_val", "refusal_val")]
    assert main(["fit", "--config=demo", "--config=evaluation/demo", *options, *sets, *held_out]) == 0
    report = json.loads(Path("run/evaluation/evaluation.json").read_text())
    assert report["adapters"] == ["base", "target"]
    assert {one["name"] for one in report["measures"]} >= {"refusal of harmful prompts", "ROUGE-L, everyday"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: "+".join(Path(name).stem for name in recipe))
def test_recipes_run(recipe, tiny_model, capsys):
    write_data()
    configs = [f"--config=configs/{name}" for name in ["toss.yaml", *recipe]]
    options = ["--model.base.path", tiny_model, *ON_A_LAPTOP, "--data.safety=data/safety.jsonl", "--run_dir", "run"]
    assert main(["fit", *configs, *options]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    trained = [name for name in ("utility", "degraded", "seal", "target") if name in summary["stages"]]
    method = yaml.safe_load((ROOT / "configs" / recipe[-1]).read_text()).get("loop", {})
    assert set(trained) == set(method.get("plan", TOSS_PLAN)) - {"score", "select"}
    for name in trained:
        adapter = json.loads(Path(f"run/adapters/{name}/adapter_config.json").read_text())
        expected = 7 if "models/smollm2_135m.yaml" in recipe else 2  # all-linear, or q_proj and v_proj
        assert len({layer.rpartition(".")[2] for layer in adapter["target_modules"]}) == expected
    counts = {one["set"]: one for one in summary["data"]}
    assert counts["custom"]["rows"] == 14
    assert counts["custom"]["dropped_bad"] == ("data/redorca.yaml" in recipe)
    if "data/redorca.yaml" in recipe and "methods/toss_per_row.yaml" in recipe:
        assert summary["selection"]["masked_share_per_source"].keys() == {"redorca"}


@pytest.mark.filterwarnings("ignore:.*rows stand in both")  # the tiny model reads every word as <unk>
def test_the_demo_runs(tiny_model):
    options = ["--model.base.path", tiny_model, *ON_A_LAPTOP, "--run_dir=run", "--data.max_length=100000"]
    assert main(["fit", "--config=configs/demo.yaml", *options, "--trainer.max_steps=2"]) == 0
    assert Path("run/config.yaml").is_file()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in EVALUATIONS])
def test_every_file_says_what_it_is_for_and_means_what_it_says(name, capsys):
    text = (ROOT / "configs" / name).read_text()
    assert text.startswith("# ")
    # every value that stands in the file is there in the resolved configuration
    configs = ["--config=toss.yaml"] if name not in ("demo.yaml", *PAPER) else []
    said, meant = yaml.safe_load(text), resolved(capsys, *configs, f"--config={name}")

    def inside(part: object, whole: object) -> bool:
        if not isinstance(part, dict):
            return part == whole
        whole = whole.get("init_args", whole)
        part = part.get("init_args", {key: value for key, value in part.items() if key != "class_path"})
        return all(inside(value, whole[key]) for key, value in part.items())

    assert inside(said, meant)


def test_toss_pro_runs(tiny_model):
    write_data()
    configs = ["--config=configs/toss_pro.yaml", "--config=configs/data/jsonl.yaml"]
    assert main(["fit", *configs, "--model.base.path", tiny_model, *ON_A_LAPTOP, "--run_dir", "run"]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    rounds = ["promote-1", "degraded-1", "score-1", "promote-2", "degraded-2", "score-2"]
    assert list(summary["stages"]) == ["utility", "degraded", "score", *rounds, "select", "target"]
    # half as many rows as the harmful set has, which holds out one of its eight
    assert [one.get("promoted") for one in summary["rounds"]] == [None, 3, 3]


@pytest.mark.parametrize("method", ["toss_per_row", "sft"])
def test_methods_overlay_toss_pro_too(method, tiny_model):
    write_data()
    configs = ["toss_pro", "data/jsonl", f"methods/{method}"]
    options = ["--model.base.path", tiny_model, *ON_A_LAPTOP, "--loop.rounds=1", "--run_dir", "run"]
    if method == "sft":
        options.remove("--loop.rounds=1")
    assert main(["fit", *(f"--config={name}" for name in configs), *options]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert ("degraded-1" in summary["stages"]) == (method != "sft")


def test_toss_pro_is_toss_with_rounds(capsys):
    toss, pro = (resolved(capsys, f"--config={name}") for name in PAPER)
    settings = pro["loop"]["init_args"]
    assert {"rounds": 2, "promotion": "top_tokens", "promote_again": False, "refit": "from_scratch"}.items() <= (
        settings.items()
    )
    assert toss["loop"]["init_args"]["rounds"] == 0
    for config in (toss, pro):
        for name in ("rounds", "promote", "promotion", "promote_again", "refit", "stop_early"):
            del config["loop"]["init_args"][name]
    assert pro == toss


def test_toss_holds_the_numbers_of_the_paper(capsys):
    config = resolved(capsys, "--config=configs/toss.yaml")
    model, data, loop = (config[key]["init_args"] for key in ("model", "data", "loop"))
    assert {"r": 16, "alpha": 16, "targets": ["q_proj", "v_proj"], "dropout": 0.0}.items() <= model["lora"].items()
    assert (model["lora"]["dora"], model["lora"]["rslora"]) == (False, False)
    assert model["optim"] == {"lr": 1e-5, "betas": [0.9, 0.95], "weight_decay": 0.0, "paged_8bit": False}
    assert model["schedule"] == {"shape": "constant", "warmup": 0.03}
    assert model["normalize"] == "all"
    assert data["batch_size"] == 64
    assert loop["plan"] == ["utility", "degraded", "score", "select", "target"]
    assert loop["epochs"] == 2
    assert loop["reference_epochs"] in (None, 2)  # None: as epochs
    assert loop["selection"]["class_path"] == "toss_lightning.selection.GlobalTopFraction"
    weights = {"discard": 0.1, "utility_weight": 1.0, "degraded_weight": 1.0}
    assert weights.items() <= loop["selection"]["init_args"].items()


def test_a_method_keeps_everything_else(capsys):
    toss = resolved(capsys, "--config=toss")
    per_row = resolved(capsys, "--config=toss", "--config=methods/toss_per_row")
    assert per_row["loop"]["init_args"]["selection"]["class_path"] == "toss_lightning.selection.PerRowTopFraction"
    assert per_row["loop"]["init_args"]["selection"]["init_args"] == toss["loop"]["init_args"]["selection"]["init_args"]
    sft = resolved(capsys, "--config=toss", "--config=methods/sft")
    assert sft["loop"]["init_args"].pop("plan") == ["target"]
    for config in (toss, per_row):
        del config["loop"]["init_args"]["plan"]
    assert sft == toss
    del per_row["loop"], toss["loop"]
    assert per_row == toss


def test_an_installed_package_has_its_configs():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    package = configs_directory().parent / "toss_lightning"
    assert build["wheel"]["force-include"] == {"configs": f"{package.name}/configs"}
    assert "configs" in build["sdist"]["include"]
    assert configs_directory().samefile(ROOT / "configs")
