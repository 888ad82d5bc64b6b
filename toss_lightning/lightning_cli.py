"""The LightningCLI behind ``fit`` and ``validate``; importing it loads torch."""

import logging
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loops.fit_loop import _FitLoop

from toss_lightning import data, loops, models, selection
from toss_lightning.cli_errors import explain
from toss_lightning.errors import ConfigError
from toss_lightning.files import write_text
from toss_lightning.loops.trainer import DEFAULTS, make_trainer

set_parsing_settings(docstring_parse_attribute_docstrings=True)

CLASSES: dict[str, type] = {
    name: getattr(module, name)
    for module in (data, loops, models, selection)
    for name in module.__all__
    if isinstance(getattr(module, name), type)
}
"""Bare class name, as YAML may give it -> class."""


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run directory; ``fit --config`` of that file repeats the run."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning on the first rank."""
        name = "config.yaml" if stage == "fit" else f"config-{stage}.yaml"
        text = self.parser.dump(self.config, skip_none=False)
        write_text(Path(trainer.default_root_dir) / name, text)


class TossCLI(LightningCLI):
    """Module, datamodule and loop are given by class_path, and every selection inside the loop."""

    def __init__(self, args: Sequence[str]) -> None:
        options = {"allow_abbrev": False, "exit_on_error": False}
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            trainer_defaults=DEFAULTS,
            seed_everything_default=1,
            parser_kwargs={**options, **{name: dict(options) for name in self.subcommands()}},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs that need a Trainer."""
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run directory and the loop, and the classes to use where none is named."""
        parser.add_argument("--run_dir", type=str, default=None, help="Directory of this run; runs/<config>-<time>")
        parser.add_argument("--checkpoint_every", type=int, default=50, help="Optimizer steps between checkpoints")
        parser.add_argument(
            "--loop", type=Callable[[Trainer], _FitLoop], help="The plan: which adapters are trained, in which order"
        )
        parser.set_defaults(
            {
                "model": {"class_path": "toss_lightning.models.WeightedLoraModule"},
                "data": {"class_path": "toss_lightning.data.TossDataModule"},
                "loop": {"class_path": "toss_lightning.loops.TossProLoop"},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and says in one line what is wrong.

        Raises:
            ConfigError: a key, a value or a class path is wrong.
        """
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise ConfigError(explain(str(error), self._subcommand_parsers[args[0]], CLASSES)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the Trainer around the loop and the run directory."""
        settings = {**self._get(self.config_init, "trainer"), **kwargs}
        config = self.config[self.subcommand]
        save = self.save_config_callback(self._parser(self.subcommand), config, **self.save_config_kwargs)
        given = settings.pop("callbacks", None) or []
        settings.pop("default_root_dir", None)
        return make_trainer(
            self._get(self.config_init, "run_dir") or "runs/unnamed",
            self._get(self.config_init, "loop"),
            self._get(self.config_init, "checkpoint_every"),
            callbacks=[*(given if isinstance(given, list) else [given]), save],
            **settings,
        )


def quiet() -> None:
    """Leaves out what libraries say at every start and nobody can act on."""
    for name in ("lightning.pytorch", "lightning.fabric", "bitsandbytes", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*module.s. in eval mode at the start of training.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
        ".*GPU available but not used.*",
    ):
        warnings.filterwarnings("ignore", message)


def run(args: Sequence[str]) -> None:
    """Parses and runs ``fit`` or ``validate``."""
    quiet()
    TossCLI(args)
