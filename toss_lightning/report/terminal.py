"""A row token by token in a terminal; into a pipe or a file, a line for each token."""

from rich.console import Console
from rich.text import Text

from toss_lightning.report.shades import Shade
from toss_lightning.report.tokens import Row, facts_of, one_line, visible

SIGNS = "orange: riskier, blue: less; underlined: left out of the task loss; in italics: held to the base"


def print_row(row: Row, shade: Shade, console: Console) -> None:
    """Prints a row: coloured by score, what is masked underlined, what is held to the base in italics.

    Args:
        row: the row.
        shade: colours of its scores.
        console: where to; one that is no terminal gets a line for each response token, with tabs between row id,
            number of the token, label, text, weight, score, and losses and anchor by name; empty where there is none.
    """
    if not console.is_terminal:
        for token in row.tokens:
            if token.ordinal is not None:
                numbers = ["" if value is None else f"{value:.6g}" for value in (token.weight, token.score)]
                losses = [f"{name}={loss:.6g}" for name, loss in (token.losses or {}).items()]
                losses += [f"anchor={token.anchor:.6g}"] if token.anchor else []
                label = one_line(row.label or "")
                facts = [str(row.row_id), str(token.ordinal), label, repr(token.text), *numbers, *losses]
                print("\t".join(facts))
        return
    console.print(Text.assemble((f"row {row.row_id}", "bold"), f" · {' · '.join(facts_of(row))}"))
    said = Text()
    for token in row.tokens:
        if token.ordinal is None:
            said.append(visible(token.text), style="dim")
            continue
        colour = shade.colours.get(shade(token.score))
        styles = [f"black on {colour}" if colour else "", "bold underline" if token.masked else ""]
        said.append(visible(token.text), style=" ".join([*styles, "italic" if token.anchor else ""]).strip())
    console.print(said)
    console.print(f"{SIGNS}\n", style="dim")
