"""``toss methods``: what there is to choose from, and what is known of one of them; loads no torch."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from toss_lightning.config_files import configs_directory
from toss_lightning.errors import ConfigError
from toss_lightning.methods import METHODS, Listed

WIDTH = 100
"""Columns of the table where the terminal has as many."""


def show_methods(names: Sequence[str]) -> None:
    """Prints all methods, or those that are named.

    Raises:
        ConfigError: there is no such method.
    """
    for method in [find_method(name) for name in names]:
        show_method(method, configs_directory() / f"{method.config}.yaml")
    if not names:
        list_methods()


def list_methods() -> None:
    """Prints all methods: a table for eyes; into a pipe or a file a line each, their facts between tabs."""
    console = Console(highlight=False)
    if not console.is_terminal:
        for one in METHODS:
            facts = (one.config, one.title, one.acts_on, one.needs, one.cost, one.source, one.fidelity, one.page)
            print("\t".join(facts))
        return
    table = Table(box=None, padding=(0, 2, 1, 0), header_style="bold", width=min(WIDTH, console.width))
    table.add_column("configs/", no_wrap=True, min_width=max(len(one.config) for one in METHODS))
    table.add_column("acts on", width=len("gradient"))
    for heading, ratio in (("needs", 17), ("costs besides", 22), ("source", 24)):
        table.add_column(heading, ratio=ratio, overflow="fold")
    for one in METHODS:
        name = Text.assemble((one.config, "bold"), f"\n{one.title}")
        page = f" (page of {one.described_with})" if one.described_with else ""
        table.add_row(name, one.acts_on, one.needs, one.cost, f"{one.source}: {one.fidelity}{page}")
    console.print(table)
    console.print(
        "A training is that of a reference adapter, a pass a forward pass of the custom set.\n"
        "docs/methods/NAME.md says what a method does; toss methods NAME shows its settings."
    )


def show_method(method: Listed, config: Path) -> None:
    """Prints what is known of a method, and its configuration.

    Args:
        method: the method.
        config: its file.
    """
    page = Path(__file__).parent.parent / method.page
    model = "models/llama32_1b"
    laid_over = ["toss", model, method.config] if "/" in method.config else [method.config, model]
    facts = {
        "acts on": method.acts_on,
        "needs": method.needs,
        "costs": f"{method.cost}, beside one fine-tuning",
        "source": method.source,
        "fidelity": method.fidelity,
        "page": str(page) if page.is_file() else f"{method.page}, among the project's sources",
        "run": " --config ".join(["toss fit", *laid_over, "my_data.yaml"]),
        "try": f"toss fit --config demo --config {method.config}",
    }
    print(f"{method.title}, configs/{method.config}.yaml\n")
    for name, fact in facts.items():
        print(f"  {name:10}{fact}")
    print(f"\n{config.read_text(encoding='utf-8')}")


def find_method(wanted: str) -> Listed:
    """A method by its configuration or its title, in upper or lower case.

    Raises:
        ConfigError: there is none of that name.
    """
    known = {name.lower(): one for one in METHODS for name in (one.title, one.config, one.name)}
    name = wanted.lower().removeprefix("configs/").removesuffix(".yaml")
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {known[near[0]].name}?" if near else f"there is {', '.join(one.name for one in METHODS)}"
    raise ConfigError(f"toss methods {wanted}: no such method; {hint}")
