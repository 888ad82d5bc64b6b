"""The LightningCLI behind the verbs; importing it loads torch."""

import inspect
import logging
import sys
import typing
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from toss_lightning.cli_args import config_paths
from toss_lightning.cli_errors import explain, one_line, read_options
from toss_lightning.config_files import read_config
from toss_lightning.data import TossDataModule
from toss_lightning.errors import ConfigError
from toss_lightning.files import user_path, write_text
from toss_lightning.loops import TossProLoop
from toss_lightning.loops.checkpoints import find_checkpoint
from toss_lightning.loops.trainer import DEFAULTS, LoopFactory, PlanTrainer, make_trainer
from toss_lightning.models import WeightedLoraModule
from toss_lightning.selection import GlobalTopFraction

set_parsing_settings(docstring_parse_attribute_docstrings=True)

CLASSES = {
    "model": WeightedLoraModule,
    "data": TossDataModule,
    "loop": TossProLoop,
    "loop.selection": GlobalTopFraction,
}
"""Key -> the class that is configured there where nobody names one."""


SELECT_ON = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}
"""What a selection runs on, whatever the configuration trains on."""


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run directory; ``fit --config`` of that file repeats the run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes it for a validation; a run writes it where a checkpoint that does not fit was refused already."""
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_plan_start(self, trainer: Trainer) -> None:
        """Writes it for a run."""
        if trainer.is_global_zero:
            loop: Any = trainer.fit_loop
            self.save_config(trainer, trainer.lightning_module, "test" if loop.steps == ["test"] else "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning on the first rank."""
        name = {"fit": "config.yaml", "test": "config-test.yaml"}.get(str(stage), "config-validate.yaml")
        # without the checkpoint: the file is to repeat the run, with any verb, not to resume it
        config = self.config.clone()
        for key in ("ckpt_path", "weights_only"):
            config.pop(key, None)
        write_text(Path(trainer.default_root_dir) / name, self.parser.dump(config, skip_none=False))


class TossParser(LightningArgumentParser):
    """A parser for which the path of a set is a path.

    jsonargparse 4 would open a .json or .csv file that stands where a list may stand, as if it were configuration, and
    has no public switch for classes that are given by class_path. tests/test_cli.py fails when this changes.
    """

    def add_subclass_arguments(self, *args: Any, **kwargs: Any) -> Any:
        """Adds the arguments of a plug-in's class."""
        added = super().add_subclass_arguments(*args, **kwargs)
        actions: list[Any] = self._actions
        for action in actions:
            if getattr(action, "_enable_path", False):
                action.sub_add_kwargs["sub_configs"] = False
        return added


def verbs() -> dict[str, set[str]]:
    """The verbs that need a Trainer, and which arguments of its methods are no options."""
    theirs = LightningCLI.subcommands()
    own = {"model", "datamodule"}
    return {"fit": theirs["fit"], "score": own, "select": set(), "test": own, "validate": theirs["validate"]}


class TossCLI(LightningCLI):
    """Module, datamodule and loop are given by class_path, and every selection inside the loop."""

    def __init__(self, args: Sequence[str]) -> None:
        self.args = list(args)
        options: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            trainer_class=PlanTrainer,
            trainer_defaults=DEFAULTS,
            seed_everything_default=1,
            parser_kwargs={**options, "prog": "toss", **{name: dict(options) for name in self.subcommands()}},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=TossParser,
            load_from_checkpoint_support=False,
            args=self.args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb that is asked for alone, since to make a parser takes longer than to use it."""
        return {self.args[0]: verbs()[self.args[0]]}

    def select(self, **parts: Any) -> None:
        """Selects without the model and the datamodule, which Lightning hands to every verb."""
        self.trainer.select()  # type: ignore[attr-defined]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run directory and the loop, and the classes to use where none is named."""
        parser.add_argument("--run_dir", type=str, default=None, help="Directory of this run; runs/<config>-<time>")
        parser.add_argument("--checkpoint_every", type=int, default=50, help="Optimizer steps between checkpoints")
        parser.add_argument("--loop", type=LoopFactory, help="The plan: which adapters are trained, in which order")
        paths: dict[str, dict[str, Any]] = {
            key: {"class_path": f"{kind.__module__.rpartition('.')[0]}.{kind.__name__}"}
            for key, kind in CLASSES.items()
        }
        paths["loop"]["init_args"] = {"selection": paths.pop("loop.selection")}
        parser.set_defaults(paths)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and says in one line what is wrong.

        Raises:
            ConfigError: a key, a value or a class path is wrong.
        """
        try:
            self.config = parser.parse_args(args)
        except (ArgumentError, ValueError) as error:
            raise ConfigError(_explain(args) or one_line(str(error))) from error
        config = self.config[args[0]]
        if "weights_only" in config and config.weights_only is None:
            config.weights_only = True
        if (wanted := config.get("ckpt_path")) and "://" not in str(wanted):
            found = find_checkpoint(str(wanted), user_path(config.run_dir or "."))
            config.ckpt_path = None if found is None else str(found)

    def instantiate_classes(self) -> None:
        """Builds everything; what a constructor raises comes out as it is.

        Raises:
            ConfigError: a single value stands where keys and values belong, which the parser lets pass.
        """
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            # where a union is expected, jsonargparse tells of each type that did not fit
            cause: BaseException = error
            while str(cause).startswith("Does not validate") and cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, TypeError) and (reason := _explain(self.args)):
                raise ConfigError(reason) from cause
            raise cause from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the Trainer around the loop and the run directory."""
        settings = {**self._get(self.config_init, "trainer"), **kwargs}
        config = self.config[self.subcommand]
        save = SaveConfig(self._parser(self.subcommand), config, **self.save_config_kwargs)
        given = settings.pop("callbacks", None) or []
        if settings.pop("default_root_dir", None) not in (None, config.run_dir):
            raise ConfigError("trainer.default_root_dir: set run_dir, in which all of a run lies")
        if self.subcommand == "select":
            settings |= SELECT_ON
        if self.subcommand == "test":
            settings |= {"logger": False, "enable_checkpointing": False}
        try:
            return make_trainer(
                self._get(self.config_init, "run_dir") or "runs/unnamed",
                self._get(self.config_init, "loop"),
                self._get(self.config_init, "checkpoint_every"),
                callbacks=[*(given if isinstance(given, list) else [given]), save],
                **settings,
            )
        except (MisconfigurationException, ValueError) as error:
            if isinstance(error, ValueError) and not str(error).startswith("You selected an invalid"):
                raise
            raise ConfigError(f"trainer: {one_line(str(error))}") from error


def _explain(args: Sequence[str]) -> str:
    """What is wrong in the files and options of a command that the parser refused."""
    verb = inspect.signature(getattr(PlanTrainer, args[0]))
    hints = typing.get_type_hints(getattr(PlanTrainer, args[0]))
    skipped = verbs()[args[0]]
    kinds = {
        "model": LightningModule,
        "data": LightningDataModule,
        "trainer": Trainer,
        "loop": LoopFactory,
        "run_dir": str | None,
        "checkpoint_every": int,
        "seed_everything": bool | int,
        **{name: hints[name] for name in verb.parameters if name not in {"self", *skipped}},
    }
    try:
        options = read_options(args[1:])
    except ValueError as error:
        return str(error)
    files = [(str(path), read_config(path)) for path in config_paths(args)]
    return explain([*files, ("--", options)], kinds, CLASSES)


def quiet() -> None:
    """Leaves out what libraries say at every start and nobody can act on."""
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # our own error names the line
    for message in (
        ".*does not have many workers.*",
        ".*module.s. in eval mode at the start of training.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The dirpath has changed from .*",
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
        ".*GPU available but not used.*",
        ".*`is_gradient_checkpointing` is deprecated.*",
        ".*It is recommended to use .self.log.*sync_dist=True.*",
        ".*Total length of `list` across ranks is zero.*",
    ):
        warnings.filterwarnings("ignore", message)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def run(args: Sequence[str]) -> None:
    """Parses and runs a verb."""
    quiet()
    TossCLI(args)
