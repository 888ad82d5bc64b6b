"""What an evaluation leaves behind: responses with their verdicts, every number, and tables to read."""

from collections.abc import Mapping

from rich.console import Console

from toss_lightning.evaluation.evaluation import Evaluator, Findings, write_responses
from toss_lightning.evaluation.results import measures, report
from toss_lightning.evaluation.tables import console_table, markdown
from toss_lightning.files import write_json, write_text


def report_evaluation(findings: Findings, evaluator: Evaluator, names: Mapping[str, str]) -> None:
    """Writes responses.jsonl, evaluation.json and evaluation.md, and prints the main table.

    Args:
        findings: what was found.
        evaluator: who found it.
        names: adapter -> what people call it.

    Raises:
        StoreError: the disk refuses.
    """
    directory = evaluator.directory
    content = report(measures(findings, evaluator.judges, evaluator.utility), findings, evaluator.evaluation.positions)
    write_responses(findings, directory / "responses.jsonl")
    write_json(directory / "evaluation.json", {**content, "names": dict(names)})
    write_text(directory / "evaluation.md", markdown(content, names))
    console = Console()
    console.print(console_table(content, names))
    console.print(f"Responses, numbers and differences are in {directory}", soft_wrap=True)
