"""A comparison in sentences: what is beyond noise, and how to read its numbers."""

from collections.abc import Sequence

from toss_lightning.compare.cells import Content, word
from toss_lightning.evaluation.cells import difference, p_value
from toss_lightning.evaluation.noise import NOISE


def statements(content: Content) -> list[str]:
    """For each pair, what of their differences is beyond noise; a line each."""
    pairs: dict[tuple[str, str], list[tuple[str, bool, Content]]] = {}
    for measure, title in zip(content["measures"], _short_titles(content["measures"]), strict=True):
        for one in measure["differences"]:
            pairs.setdefault((one["of"], one["against"]), []).append((title, measure["share"], one))
    lines = []
    for (ours, theirs), of in pairs.items():
        tested = [facts for facts in of if "p_holm" in facts[-1]]
        beyond = [
            f"{word(one)} in {title} ({difference(one, share)}, p {p_value(one['p_holm'])})"
            for title, share, one in tested
            if one["beyond_noise"]
        ]
        within = [title for title, _, one in tested if one["beyond_noise"] is False]
        parts = [*beyond, *([f"within noise: {', '.join(within)}"] if within else [])]
        alone = [
            f"{title} ({difference(one, share)}, p {p_value(one['p_holm'])})"
            for title, share, one in tested
            if one["beyond_noise"] is None
        ]
        parts += [f"one seed, so over the prompts alone: {', '.join(alone)}"] if alone else []
        left_out = max((one["undecided"] for *_, one in of), default=0)
        parts += [f"undecided prompts left out: {left_out}"] if left_out else []
        without = [title for title, _, one in of if one["without_number"]]
        parts += [f"not tested, for a run gave no number: {', '.join(without)}"] if without else []
        lines.append(f"{ours} against {theirs}: {'; '.join(parts) or 'no seeds and prompts in common'}.")
    return lines


def _short_titles(measures: Sequence[Content]) -> list[str]:
    """Names of measures, with the judge where several decide the same, and with what screens marked."""
    names = [one["name"] for one in measures]
    return [
        one["title"] if names.count(one["name"]) > 1 else f"{one['name']}{' (screening)' if one['screening'] else ''}"
        for one in measures
    ]


def notes(content: Content) -> list[str]:
    """How to read the numbers of this comparison, and what to beware of."""
    seeds = content["seeds"]
    most = max(len(of) for of in seeds.values())
    alone = any(len(of) == 1 for of in seeds.values())
    spread = (
        f"Means over {most} seeds with 95 % t-intervals over the seeds; over the prompts are the base model's, and"
        f" those of methods {'with one seed, or ' if alone else ''}whose seeds all give the same value."
        if most > 1
        else "One seed: 95 % intervals and tests are over the prompts, and say nothing of another training seed."
    )
    found = [spread, f"Beyond noise: p < {NOISE:g} after Holm's adjustment over all pairs of a measure."]
    tested = [one for measure in content["measures"] for one in measure["differences"] if "p_holm" in one]
    if any(one["beyond_noise"] is None for one in tested):
        found.append(
            "A pair with one seed in common is tested over the prompts alone, which says nothing of another seed, and"
            " is never called beyond noise."
        )
    found.append(
        "Time is that of training with all that a method needs, held-out losses included and the evaluation not, over"
        f" {content['baseline']}'s."
    )
    if content.get("given"):
        given = ", ".join(content["given"])
        found.append(f"Not in the time of {given}: making the references, scores or selection that they were given.")
    if content["oracle"] is not None:
        found += _notes_on_oracle(content)
    if any(measure["screening"] for measure in content["measures"]):
        found.append("A screening judge is no result by itself.")
    fewer = [f"{name} ({len(of)})" for name, of in seeds.items() if len(of) < most]
    found += [f"Fewer seeds than the others: {', '.join(fewer)}."] if fewer else []
    found += [f"Not there yet: {', '.join(content['missing'])}."] if content.get("missing") else []
    found += _notes_without_number(content)
    if content.get("unjudged"):
        found.append(f"Replies are still to be compared for the win rates of {', '.join(content['unjudged'])}.")
    found += [f"{name}: {'; '.join(reasons)}." for name, reasons in content["idle"].items()]
    found += [f"{name}: {'; '.join(reasons)}." for name, reasons in content["weak"].items()]
    found += [f"{name}: {'; '.join(reasons)}." for name, reasons in content["stopped"].items()]
    found += [f"{name}: {'; '.join(reasons)}." for name, reasons in content["failed_judges"].items()]
    found += [f"Methods differ in {line}." for line in content.get("differing", [])]
    found += [f"Runs differ in {line}." for line in content["unlike"]]
    return found


def _notes_without_number(content: Content) -> list[str]:
    found = []
    for measure in content["measures"]:
        for name in content["methods"]:
            one = measure["models"].get(name, {})
            if without := one.get("without_number"):
                found.append(
                    f"{name}: {without} of {one['seeds'] + without} runs gave no {measure['title']}: no mean, and no"
                    " test."
                )
            elif one and one["seeds"] < len(content["seeds"][name]):
                found.append(
                    f"{name}: {measure['title']} is known of {one['seeds']} of {len(content['seeds'][name])} seeds."
                )
    return found


def _notes_on_oracle(content: Content) -> list[str]:
    oracle, baseline = content["oracle"], content["baseline"]
    worse = [
        title
        for one, title in zip(content["measures"], _short_titles(content["measures"]), strict=True)
        if one["gap_closed"]["beyond_noise"] and not one["gap_closed"]["oracle_better"]
    ]
    return [
        f"Share of the gap closed: (method − {baseline}) / ({oracle} − {baseline}), with Fieller's 95 % interval over"
        f" the seeds; no gap: the difference of {oracle} and {baseline} is within noise.",
        *([f"{oracle} is worse than {baseline} in {', '.join(worse)}: to close that gap is no gain."] if worse else []),
    ]
