"""What an evaluation leaves behind: responses with their verdicts, every number, and tables to read."""

from collections.abc import Mapping

from rich.console import Console

from toss_lightning.evaluation.benchmark_measures import benchmark_facts, benchmark_measures, digest_questions
from toss_lightning.evaluation.divergence_svg import draw_divergence, has_moved
from toss_lightning.evaluation.evaluation import Evaluator, Findings
from toss_lightning.evaluation.responses import write_responses
from toss_lightning.evaluation.results import measures, report
from toss_lightning.evaluation.tables import console_table, markdown
from toss_lightning.files import write_json, write_text

PICTURE = "divergence.svg"


def report_evaluation(findings: Findings, evaluator: Evaluator, names: Mapping[str, str]) -> None:
    """Writes responses.jsonl, evaluation.json, .md and divergence.svg, and prints the main table.

    Args:
        findings: what was found.
        evaluator: who found it.
        names: adapter -> what people call it.

    Raises:
        StoreError: the disk refuses.
    """
    directory = evaluator.directory
    found, answered = measures(findings, evaluator.judges, evaluator.utility), findings.benchmarks
    if answered is not None:
        found += benchmark_measures(answered)
    content = report(found, findings, evaluator.evaluation.positions)
    content["lm_eval"] = benchmark_facts(answered) if answered is not None else None
    content["asked"] |= digest_questions(answered) if answered is not None else {}
    write_responses(findings, directory / "responses.jsonl", evaluator.utility)
    write_json(directory / "evaluation.json", {**content, "names": dict(names)})
    if moved := has_moved(content["divergence"]):
        write_text(directory / PICTURE, draw_divergence(content["divergence"], names))
    write_text(directory / "evaluation.md", markdown(content, names, PICTURE if moved else None))
    console = Console(markup=False)  # names of sets and paths may hold brackets
    console.print(console_table(content, names))
    console.print(f"Responses, numbers and differences are in {directory}", soft_wrap=True)
