"""Every mistake in a configuration is one line on stderr, exit code 2, and names the key and the nearest valid name."""

import shlex
from pathlib import Path

import pytest

from toss_lightning.cli import main
from toss_lightning.cli_errors import read_options

pytestmark = pytest.mark.usefixtures("somewhere")

MINE = """
from toss_lightning.data import TossDataModule
from toss_lightning.errors import ConfigError
from toss_lightning.loops import TossProLoop
from toss_lightning.models import WeightedLoraModule
from toss_lightning.selection import GlobalTopFraction

class Choosy(GlobalTopFraction):
    def __init__(self, discard: float = 0.1, mood: str = "good") -> None:
        super().__init__(discard)
        if mood == "bad":
            raise ValueError("Choosy is in a bad mood")
        if mood == "strict":
            raise ConfigError("loop.selection.mood: strict is not a mood")

class Module(WeightedLoraModule):
    def __init__(self, size: int = 1, **kwargs) -> None:
        super().__init__(**kwargs)
        raise ValueError("the module says no")

class Data(TossDataModule):
    def __init__(self, size: int = 1, **kwargs) -> None:
        super().__init__(**kwargs)
        raise RuntimeError("the datamodule says no")

class Loop(TossProLoop):
    def __init__(self, trainer, **kwargs) -> None:
        super().__init__(trainer, **kwargs)
"""


def refused(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    """The one line that a command is refused with."""
    assert main(args) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not any(word in error for word in ("Parser key", "Union subtypes", "Namespace(", "jsonargparse"))
    return error.removeprefix("error: ").strip()


KEYS = [
    ("lop: {epochs: 1}", "lop", "loop"),
    ("checkpoint_evry: 1", "checkpoint_evry", "checkpoint_every"),
    ("batch_size: 8", "batch_size", "data.batch_size"),
    ("trainer: {max_stepz: 1}", "trainer.max_stepz", "trainer.max_steps"),
    ("data: {custm: x}", "data.custm", "data.custom"),
    ("data: {class_path: TossDataModule, init_args: {custm: x}}", "data.custm", "data.custom"),
    ("data: {custom: {path: x, row: 3}}", "data.custom.row", "data.custom.rows"),
    ("data: {custom: [y, {pth: x}]}", "data.custom.pth", "data.custom.path"),
    ("model: {lra: {r: 1}}", "model.lra", "model.lora"),
    ("model: {lr: 1.0e-4}", "model.lr", "model.optim.lr"),
    ("model: {lora: {rank: 1}}", "model.lora.rank", "model.lora.r"),
    ("model.lora.rank: 1", "model.lora.rank", "model.lora.r"),
    ("model: {class_path: WeightedLoraModule, init_args: {lora: {rank: 1}}}", "model.lora.rank", "model.lora.r"),
    ("loop: {epoch: 1}", "loop.epoch", "loop.epochs"),
    ("loop: {round: 2}", "loop.round", "loop.rounds"),
    ("loop: {promotions: random}", "loop.promotions", "loop.promotion"),
    ("rounds: 2", "rounds", "loop.rounds"),
    ("data: {score_evry: 2}", "data.score_evry", "data.score_every"),
    ("loop: {selection: {discrd: 0.1}}", "loop.selection.discrd", "loop.selection.discard"),
    ("data: {safty: x}", "data.safty", "data.safety"),
    ("correction: SPF", "correction", "model.correction"),
    ("mixture: SafeInstr", "mixture", "data.mixture"),
    (
        "data: {mixture: {class_path: SafeInstr, init_args: {row: 3}}}",
        "data.mixture.row",
        "data.mixture.rows",
    ),
    (
        "model: {correction: {class_path: DualSelect, init_args: {warm: 3}}}",
        "model.correction.warm",
        "model.correction.warmup",
    ),
    (
        "loop: {selection: {class_path: Sot, init_args: {epsilom: 0.1}}}",
        "loop.selection.epsilom",
        "loop.selection.epsilon",
    ),
    (
        "loop: {selection: {class_path: Anchored, init_args: {selection: {class_path: Dsir, init_args: {sed: 1}}}}}",
        "loop.selection.selection.sed",
        "loop.selection.selection.seed",
    ),
    (
        "loop: {selection: {class_path: Anchored, init_args: {selection: GlobalTopFraction, discard: 0.1}}}",
        "loop.selection.discard",
        "loop.selection.selection.discard",
    ),
    (
        "loop: {selection: {class_path: PerRowTopFraction, init_args: {discrd: 0.1}}}",
        "loop.selection.discrd",
        "loop.selection.discard",
    ),
]


@pytest.mark.parametrize(("text", "key", "near"), KEYS)
def test_misspelt_key_in_a_file(capsys, text, key, near):
    Path("my.yaml").write_text(text)
    assert refused(capsys, "fit", "--config", "my.yaml") == f"my.yaml: {key}: no such key; did you mean {near}?"


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("--lop", "loop"),
        ("--run-dir", "run_dir"),
        ("--trainer.max_stepz", "trainer.max_steps"),
        ("--trainer.max-steps", "trainer.max_steps"),
        ("--trainer.max_step", "trainer.max_steps"),  # argparse would take an abbreviation
        ("--data.custm", "data.custom"),
        ("--data.custom.row", "data.custom.rows"),
        ("--model.lora.rank", "model.lora.r"),
        ("--loop.epoch", "loop.epochs"),
        ("--loop.round", "loop.rounds"),
        ("--loop.promot", "loop.promote"),
        ("--loop.scores_form", "loop.scores_from"),
        ("--loop.selection_form", "loop.selection_from"),
        ("--loop.stop_earlier", "loop.stop_early"),
        ("--loop.selection.discrd", "loop.selection.discard"),
    ],
)
def test_misspelt_option(capsys, option, near):
    assert refused(capsys, "fit", f"{option}=1") == f"{option}: no such key; did you mean {near}?"


def test_a_key_like_no_other_lists_what_there_is(capsys):
    error = refused(capsys, "fit", "--optimizer", "Adam")
    assert error.startswith("--optimizer: no such key; there is model, data, trainer, loop, run_dir")


CLASSES = {
    "model": ("WeightedLoraModul", "WeightedLoraModule", "toss_lightning.models"),
    "data": ("TosDataModule", "TossDataModule", "toss_lightning.data"),
    "loop": ("TosProLoop", "TossProLoop", "toss_lightning.loops"),
    "loop.selection": ("GlobalTopFrac", "GlobalTopFraction", "toss_lightning.selection"),
    "model.correction": ("SafeGrd", "SafeGrad", "toss_lightning.gradients"),
    "data.mixture": ("SafeInstruct", "SafeInstr", "toss_lightning.data.mixtures"),
}


@pytest.mark.parametrize("key", CLASSES)
@pytest.mark.parametrize("where", ["option", "file"])
def test_wrong_class(capsys, key, where):
    wrong, right, module = CLASSES[key]

    def error_of(path: str) -> str:
        if where == "option":
            return refused(capsys, "fit", f"--{key}", path).removeprefix("--")
        Path("my.yaml").write_text(f"{key}: {{class_path: {path}}}")
        return refused(capsys, "fit", "--config=my.yaml").removeprefix("my.yaml: ")

    assert error_of(wrong) == f"{key}: no class {wrong}; did you mean {right}?"
    assert error_of(f"{module}.{wrong}") == f"{key}: no {wrong} in {module}; did you mean {right}?"
    assert error_of("no_such_module.Foo") == f"{key}: cannot import no_such_module (No module named 'no_such_module')"
    assert error_of("toss_lightning.errors.TossError").startswith(f"{key}: TossError is not a ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model.lora.r abc", "--model.lora.r: expected a whole number, got 'abc'"),
        ("--loop.epochs x", "--loop.epochs: expected a whole number, got 'x'"),
        ("--loop.plan target", "--loop.plan: expected a list, each text, got 'target'"),
        ("--loop.selection.discard x", "--loop.selection.discard: expected a number, got 'x'"),
        ("--model.optim.betas [0.9]", "--model.optim.betas: expected a list of 2: a number, a number, got [0.9]"),
        ("--trainer.max_steps x", "--trainer.max_steps: expected a whole number, got 'x'"),
        ("--checkpoint_every x", "--checkpoint_every: expected a whole number, got 'x'"),
        ("--data.custom '{path: x, rows: many}'", "--data.custom.rows: expected a whole number or null, got 'many'"),
        (
            "--model.base.quantization nf5",
            "--model.base.quantization: nf5 is not one of nf4, int8, none; did you mean nf4?",
        ),
        ("--data.overlong drp", "--data.overlong: drp is not one of drop, truncate, error; did you mean drop?"),
        (
            "--trainer.callbacks+=EarlyStoping",
            "--trainer.callbacks: no class EarlyStoping; did you mean EarlyStopping?",
        ),
        (
            "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr=x",
            "--trainer.callbacks.monitr: no such key; did you mean trainer.callbacks.monitor?",
        ),
        ("--loop.plan=[target", "--loop.plan: [target is not a list or mapping (is a bracket missing?)"),
        ("--model.lora 3", "--model.lora: expected keys and values, got '3'"),
        ("--trainer 3", "--trainer: expected keys and values, got '3'"),
        ("--ckpt_path", "--ckpt_path: needs a value"),
        ("--config", "--config: needs the path of a YAML file"),
        ("--config --loop.epochs 2", "--config: needs the path of a YAML file"),
        ("extra", "unexpected argument 'extra': an option looks like --loop.epochs 2"),
    ],
)
def test_wrong_value(capsys, options, said):
    assert refused(capsys, "fit", *shlex.split(options)) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {lora: {r: abc}}", "model.lora.r: expected a whole number, got 'abc'"),
        ("model: 3", "model: expected a class_path, got 3"),
        ("trainer: 3", "trainer: expected keys and values, got 3"),
        ("model: {lora: 3}", "model.lora: expected keys and values, got 3"),
        ("data: {custom: [{path: x, format: chatml}]}", "data.custom.format: chatml is not one of auto, messages, "),
    ],
)
def test_wrong_value_in_a_file(capsys, text, said):
    Path("my.yaml").write_text(text)
    assert refused(capsys, "fit", "--config", "my.yaml").startswith(f"my.yaml: {said}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--loop.selection MaskFirst --loop.selection.discard 0.1", "--loop.selection.discard: no such key; there is"),
        (
            "--model.correction SafeGrad --model.correction.k 2",
            "--model.correction.k: no such key; there is rho, examp",
        ),
        ("--loop.selection Everything --loop.selection.share 1", "--loop.selection.share: no such key; there is none"),
    ],
)
def test_an_argument_of_another_class_lists_what_this_one_takes(capsys, options, said):
    assert refused(capsys, "fit", *options.split()).startswith(said)


@pytest.mark.parametrize(
    ("text", "key", "name"),
    [
        ("model: {correction: {rho: 1}}", "model.correction", "SafeGrad"),
        ("data: {mixture: {rows: 3}}", "data.mixture", "SafeInstr"),
        (
            "loop: {selection: {class_path: Anchored, init_args: {selection: {discard: 0.1}}}}",
            "loop.selection.selection",
            "GlobalTopFraction",
        ),
    ],
)
def test_arguments_of_a_class_that_nobody_named(capsys, text, key, name):
    Path("my.yaml").write_text(text)
    error = refused(capsys, "fit", "--config=my.yaml")
    assert error.startswith(f"my.yaml: {key}: say which class: class_path is one of ")
    assert name in error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("utility: rouge-l", "utility: no class rouge-l; did you mean rouge_l?"),
        ("utility: chrf", "utility: no class chrf; did you mean CHRFScore?"),
        ("utility: KeywordJudge", "utility: no class KeywordJudge; there is answer, rouge_l, "),
        (
            "utility: {class_path: torchmetrics.text.Bleu}",
            "utility: no Bleu in torchmetrics.text; did you mean BLEUScore?",
        ),
        (
            "utility: {class_path: torchmetrics.text.CHRFScore, init_args: {n_chars: 3}}",
            "utility.n_chars: no such key; did you mean loop.evaluation.prompts.mine.utility.n_char_order?",
        ),
        (
            "utility: {class_path: torchmetrics.text.CHRFScore, init_args: {n_char_order: many}}",
            "utility.n_char_order: expected a whole number, got 'many'",
        ),
        (
            "utility: {class_path: torchmetrics.text.CHRFScore, init_args: {sync_on_compute: no, n_char_order: x}}",
            "utility.n_char_order: expected a whole number, got 'x'",
        ),
        ("lable: harmful", "lable: no such key; did you mean loop.evaluation.prompts.mine.label?"),
        ("rows: many", "rows: expected a whole number or null, got 'many'"),
    ],
)
def test_a_wrong_option_of_a_named_set(capsys, given, said):
    Path("my.yaml").write_text(f"loop: {{evaluation: {{prompts: {{mine: {{path: a.jsonl, {given}}}}}}}}}")
    assert refused(capsys, "fit", "--config=my.yaml").startswith(f"my.yaml: loop.evaluation.prompts.mine.{said}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{utility: answer}", ".mine.path: not there: give it"),
        ("null", ": expected keys and values, got {'mine': None}"),
        ("{path: a, utility: torchmetrics.functional.text.bleu_scor}", ".mine.utility: no bleu_scor in torchmetrics"),
    ],
)
def test_a_named_set_that_is_none(capsys, given, said):
    Path("my.yaml").write_text(f"loop: {{evaluation: {{prompts: {{mine: {given}}}}}}}")
    assert refused(capsys, "fit", "--config=my.yaml").startswith(f"my.yaml: loop.evaluation.prompts{said}")


def test_the_class_inside_an_anchor(capsys):
    wrong = "loop: {selection: {class_path: Anchored, init_args: {selection: {class_path: PerRow}}}}"
    Path("my.yaml").write_text(wrong)
    assert refused(capsys, "fit", "--config=my.yaml") == (
        "my.yaml: loop.selection.selection: no class PerRow; did you mean PerRowTopFraction?"
    )


def test_the_file_that_is_wrong_is_named(capsys):
    Path("right.yaml").write_text("model: {lora: {r: 8}}")
    Path("wrong.yaml").write_text("model: {lora: {rank: 8}}")
    error = refused(capsys, "fit", "--config", "right.yaml", "--config", "wrong.yaml", "--config", "right.yaml")
    assert error.startswith("wrong.yaml: model.lora.rank")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--trainer.max_epochs", "set loop.epochs"),
        ("--trainer.accumulate_grad_batches", "data.batch_size counts the rows of an optimizer step"),
        ("--trainer.num_sanity_val_steps", "the base is evaluated before the first stage"),
        ("--trainer.reload_dataloaders_every_n_epochs", "the batches of all epochs of a stage are planned already"),
    ],
)
def test_trainer_arguments_that_the_loop_needs_for_itself(capsys, option, said):
    error = refused(capsys, "fit", option, "3")
    assert error.startswith(f"{option[2:]}: leave it at ")
    assert said in error


def test_where_a_run_lies_is_said_in_one_place(capsys):
    error = refused(capsys, "fit", "--trainer.default_root_dir", "elsewhere")
    assert error == "trainer.default_root_dir: set run_dir, in which all of a run lies"


def test_validation_after_more_batches_than_a_stage_may_have(capsys):
    error = refused(capsys, "fit", "--trainer.val_check_interval", "50")
    assert error.startswith("trainer.val_check_interval: 50 micro-batches may be more than a stage has: give a share")


@pytest.mark.parametrize(
    "options",
    ["--trainer.accelerator gpx", "--trainer.devices 0", "--trainer.strategy ddpp", "--trainer.precision 3-bit"],
)
def test_trainer_arguments_that_lightning_refuses(capsys, options):
    assert "trainer" in refused(capsys, "fit", *options.split())


def test_the_verb(capsys):
    assert refused(capsys, "fitt") == "unknown verb 'fitt'; did you mean 'fit'?"
    assert (
        refused(capsys, "upload")
        == "unknown verb 'upload'; there is fit, score, select, test, validate, compare, report, methods"
    )
    assert refused(capsys, "--config", "toss", "fit") == (
        "--config stands before the verb: write toss fit --config ..."
    )
    assert refused(capsys, "--seed_everything=1", "validate").endswith("write toss validate --seed_everything=1 ...")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("configs/tos.yaml", "did you mean configs/toss.yaml?"),
        ("configs/models/llama32.yaml", "did you mean configs/models/llama32_1b.yaml?"),
        ("qwen3_4b.yaml", "did you mean configs/models/qwen3_4b.yaml?"),
        ("my_own_settings.yaml", "give the path of a YAML file"),
    ],
)
def test_missing_config_file(capsys, name, hint):
    assert refused(capsys, "fit", f"--config={name}") == f"--config {name}: no such file; {hint}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "loop: {epochs: 2}\ndata:\n  custom: a: b\n",
            "my.yaml:3: not valid YAML (mapping values are not allowed here)",
        ),
        ("loop: [1", "my.yaml:1: not valid YAML"),
        ("loop:\n\tepochs: 1", "my.yaml:2: not valid YAML"),
        ("- loop", "my.yaml: no keys in it"),
        ("# nothing yet", "my.yaml: no keys in it"),
        ("\x00", "my.yaml: cannot be read"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--run_dir", "here"]])
def test_invalid_yaml(capsys, text, said, more):
    Path("my.yaml").write_text(text)
    assert refused(capsys, "fit", "--config", "my.yaml", *more).startswith(said)


def test_yaml_that_is_not_text(capsys):
    Path("my.yaml").write_bytes(b"\xff\xfe\x00x")
    assert refused(capsys, "fit", "--config", "my.yaml").startswith("my.yaml: cannot be read")


@pytest.mark.usefixtures("mine")
def test_the_keys_of_a_users_class(capsys):
    args = ["fit", "--loop.selection", "mine.Choosy"]
    assert refused(capsys, *args, "--loop.selection.moood", "x").endswith("did you mean loop.selection.mood?")
    # what the base class takes through **kwargs is known as well
    args = ["fit", "--model=mine.Module"]
    assert refused(capsys, *args, "--model.lora.rank", "4").endswith("did you mean model.lora.r?")
    assert refused(capsys, *args, "--model.sizes", "4").endswith("did you mean model.size?")


@pytest.mark.usefixtures("mine")
def test_a_users_constructor_that_raises_is_not_hidden(capsys):
    with pytest.raises(ValueError, match=r"^Choosy is in a bad mood$"):
        main(["fit", "--loop.selection", "mine.Choosy", "--loop.selection.mood", "bad"])
    with pytest.raises(ValueError, match=r"^the module says no$"):
        main(["fit", "--model", "mine.Module"])
    with pytest.raises(RuntimeError, match=r"^the datamodule says no$"):
        main(["fit", "--data", "mine.Data"])
    capsys.readouterr()
    error = refused(capsys, "fit", "--loop.selection", "mine.Choosy", "--loop.selection.mood", "strict")
    assert error == "loop.selection.mood: strict is not a mood"


@pytest.mark.usefixtures("mine")
def test_a_loop_whose_trainer_has_no_type(capsys):
    assert "Parameter 'trainer' from 'mine.Loop.__init__' does not specify a type" in refused(
        capsys, "fit", "--loop", "mine.Loop"
    )


def test_a_module_of_the_user_that_cannot_be_imported(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine_half.py").write_text("import no_such_thing\n")
    (tmp_path / "mine_torn.py").write_text("def x(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    error = refused(capsys, "fit", "--model", "mine_half.Module")
    assert error == "--model: cannot import mine_half (No module named 'no_such_thing')"
    assert refused(capsys, "fit", "--model", "mine_torn.Module").startswith(
        "--model: cannot import mine_torn (SyntaxError: "
    )


def test_options_are_read_as_they_nest():
    args = "--a.b 1 --a.c=[1,x] --m Some.Class --m.x -1 --l+=A --l+=B --l.y 2 --l+ C --config x --print_config"
    assert read_options(args.replace(" --config x", "").split()) == {
        "a": {"b": "1", "c": [1, "x"]},
        "m": {"class_path": "Some.Class", "x": "-1"},
        "l": ["A", {"class_path": "B", "y": "2"}, "C"],
    }
