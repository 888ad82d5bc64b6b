"""Gets the files of the data out of the public sets that they were chosen from.

    python benchmarks/results_table/get_data.py --to DIR [--only NAME ...] [--sources SOURCES] [--incomplete]

Downloads the files of those sets, each of a commit that is named here, makes a row of each of theirs, and takes the
rows that data.rows lists, in its order. That list holds digests and no text, for much of the text is offensive. A file
is written if it is, byte for byte, that of the committed pages (data.sha256); otherwise a line says what is missing,
and with --incomplete the rows that were found are written. What is written already is not fetched again. SOURCES holds
source files as OWNER/NAME/path, which are then taken instead of downloads.

It has been checked that gsm8k_train, gsm8k_test, refusals, benign_risky, prompts_advbench, prompts_harmbench,
prompts_xstest and judge_xstest come out byte for byte of the files of these commits, taken as SOURCES; the downloads
themselves, and the others of our files, have not been checked:

- general: rows of Stanford Alpaca came out as far as parts of that set were at hand; those of alpaca_gpt4_data.json
  were not looked for;
- harmful: its rows of hh-rlhf came out. That the safe replies of the others are the refusals of
  beavertails_with_refusals_train.json is an assumption: they look as if cut at as many tokens as its authors cut at;
- prompts_beavertails: which file each prompt is from is not known.

The repositories of AdvBench and HarmBench could not be had either; other projects' copies of their files, of which the
rows did come out, stand for them.
"""

import argparse
import csv
import gzip
import io
import json
import lzma
import re
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

from rows import DIGESTS, Row
from tqdm import tqdm

ROWS = Path(__file__).parent / "data.rows"
"""For each file a line with its name, then one for each of its rows: its digest, and its number where it has one."""
MARKS = re.compile(r"<<.*?>>")
"""What tells a calculator of gsm8k what to compute."""
TURN = re.compile(r"\n\n(?:Human|Assistant):")
UNPACK: Mapping[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": lzma.decompress}
CHUNK = 1 << 20
"""Bytes of a download between two looks at the bar."""
PATIENCE = 60.0
"""Seconds without an answer after which a download is given up."""


class Unobtainable(Exception):
    """A file of the data that cannot be made, and why, in one line."""


@dataclass(frozen=True)
class Source:
    """A file of a public set."""

    repository: str
    commit: str
    path: str
    row: Callable[[Mapping[str, Any]], Row]
    """Makes a row of ours of one of theirs, but for its number."""
    columns: tuple[str, ...] | None = None
    """Of a table that does not name them itself."""
    host: str = "https://raw.githubusercontent.com/{repository}/{commit}/{path}"

    @property
    def address(self) -> str:
        """Where it is downloaded from."""
        return self.host.format(repository=self.repository, commit=self.commit, path=self.path)

    def rows(self, sources: Path | None) -> Iterator[Row]:
        """All of its rows, as rows of ours.

        Args:
            sources: where the file lies; None downloads it.

        Raises:
            Unobtainable: it cannot be had, or is not what it is taken for.
        """
        file = sources / self.repository / self.path if sources else None
        content = read(file, self.address) if file else download(self.address)
        try:
            for record in self._records(content):
                yield self.row(record)
        # a decompressor raises the first four, of which BadGzipFile is an OSError; JSON and UTF-8 a ValueError
        except (OSError, EOFError, lzma.LZMAError, ValueError, LookupError, TypeError, csv.Error) as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise Unobtainable(f"{file or self.address}: not the file of commit {self.commit[:7]} ({what})") from error

    def _records(self, content: bytes) -> Iterator[Mapping[str, Any]]:
        path = PurePosixPath(self.path)
        if unpack := UNPACK.get(path.suffix):
            content, path = unpack(content), path.with_suffix("")
        text = content.decode("utf-8")
        if path.suffix == ".csv":
            yield from csv.DictReader(io.StringIO(text, newline=""), self.columns)
        elif path.suffix == ".jsonl":
            yield from (json.loads(line) for line in io.StringIO(text) if line.strip())
        else:
            yield from json.loads(text)


def row(source: str, label: str, *turns: str, **more: Any) -> Row:
    """A row in the order in which the files of the data have its fields; ``turns`` are a prompt and perhaps a reply."""
    messages = [
        {"role": role, "content": text.strip()} for role, text in zip(("user", "assistant"), turns, strict=False)
    ]
    return {"messages": messages, "source": source, "label": label, **more}


def of_gsm8k(split: str) -> Callable[[Mapping[str, Any]], Row]:
    """Problems without calculator marks; the number after the last sign is the answer."""

    def make(theirs: Mapping[str, Any]) -> Row:
        reply = MARKS.sub("", theirs["answer"])
        answer = reply.rpartition("####")[2].strip()
        return row(f"gsm8k/{split}", "benign", theirs["question"], reply, answer=answer)

    return make


def of_instructions(source: str, label: str = "benign") -> Callable[[Mapping[str, Any]], Row]:
    """Instructions as Alpaca has them: what one is about stands below it."""

    def make(theirs: Mapping[str, Any]) -> Row:
        prompt = "\n\n".join(part for part in (theirs["instruction"], theirs["input"]) if part)
        return row(source, label, prompt, theirs["output"])

    return make


def of_refused(theirs: Mapping[str, Any]) -> Row:
    """A harmful request of BeaverTails with a reply of that set, and the refusal that another model wrote."""
    safe = theirs["refusal"].partition("\nAnswer:")[2].strip()
    return row("beavertails", "harmful", theirs["prompt"], theirs["response"], safe_reply=safe, chosen_refuses=True)


def of_hh(theirs: Mapping[str, Any]) -> Row:
    """The first turns of a dialogue: the reply that people rejected, and as the safe one that which they chose."""
    (_, prompt, reply), safe = TURN.split(theirs["rejected"])[:3], TURN.split(theirs["chosen"])[2].strip()
    return row("hh-rlhf/harmless-base:rejected", "harmful", prompt, reply, safe_reply=safe, chosen_refuses=True)


def of_prompts(source: str, column: str) -> Callable[[Mapping[str, Any]], Row]:
    """Harmful prompts, which stand in a column of this name."""
    return lambda theirs: row(source, "harmful", theirs[column])


def of_harmbench(theirs: Mapping[str, Any]) -> Row:
    """What HarmBench asks for; the text that it may ask about stays apart."""
    category, kind = theirs["SemanticCategory"], theirs["FunctionalCategory"]
    more = {"category": category, "kind": kind, "context": theirs["ContextString"], "behavior_id": theirs["BehaviorID"]}
    return row("harmbench", "harmful", theirs["Behavior"], **more)


def of_xstest(theirs: Mapping[str, Any]) -> Row:
    """Prompts that only sound dangerous, and ones that are."""
    label = {"safe": "benign", "unsafe": "harmful"}[theirs["label"]]
    return row("xstest", label, theirs["prompt"], category=theirs["type"])


def of_judged(model: str) -> Callable[[Mapping[str, Any]], Row]:
    """Replies of a chat model with people's labels; those that were found to refuse in part are in no file of ours."""
    labels = {"1_full_compliance": "compliance", "2_full_refusal": "refusal"}

    def make(theirs: Mapping[str, Any]) -> Row:
        label = labels.get(theirs["final_label"], theirs["final_label"])
        return row(f"xstest:{model}", label, theirs["prompt"], theirs["completion"], category=theirs["type"])

    return make


GSM8K = "openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c"
RISKY = "princeton-nlp/benign-data-breaks-safety", "d44d665c42808ee9dd7ab53a6eb7019bec2780a8"
XSTEST = "paul-rottger/exaggerated-safety", "d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d"
REFUSED = (
    "domenicrosati/representation-noising",
    "03689ff9702780e83b0c81f508771998aad0398c",
    "data/beavertails_with_refusals_train.json",
)
BEAVERTAILS = "PKU-Alignment/BeaverTails", "8401fe609d288129cc684a9b3be6a93e41cfe678"
HUB = "https://huggingface.co/datasets/{repository}/resolve/{commit}/{path}"
MODELS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
SOURCES: Mapping[str, Sequence[Source]] = {
    "gsm8k_train": [Source(*GSM8K, "grade_school_math/data/train.jsonl", of_gsm8k("train"))],
    "gsm8k_test": [Source(*GSM8K, "grade_school_math/data/test.jsonl", of_gsm8k("test"))],
    "general": [
        Source(
            "tatsu-lab/stanford_alpaca",
            "761dc5bfbdeeffa89b8bff5d038781a4055f796a",
            "alpaca_data.json",
            of_instructions("alpaca"),
        ),
        Source(
            "Instruction-Tuning-with-GPT-4/GPT-4-LLM",
            "80cda626ea305004be42426671c66efebbf22144",
            "data/alpaca_gpt4_data.json",
            of_instructions("alpaca-gpt4"),
        ),
    ],
    "harmful": [
        Source(
            "anthropics/hh-rlhf",
            "354e5c3cb8960630860dd5774a6ac2a58313bf4d",
            "harmless-base/test.jsonl.gz",
            of_hh,
        ),
        Source(*REFUSED, of_refused),
    ],
    "refusals": [
        Source(
            "vinid/safety-tuned-llamas",
            "36a4b8d5c2177ed165bf61f59b590161394f7f12",
            "data/training/safety_only_data_Instructions.json",
            of_instructions("safety-tuned-llamas", "refusal"),
        ),
    ],
    "benign_risky": [
        Source(*RISKY, f"ft_datasets/alpaca_dataset/{folder}/alpaca_top100.json", of_instructions(source))
        for folder, source in (
            ("reps", "alpaca-top100-reps"),
            ("gradient-illegal-activities-anchor", "alpaca-top100-gradient"),
        )
    ],
    "prompts_beavertails": [
        Source(*REFUSED, of_prompts("beavertails", "prompt")),
        *(
            Source(*BEAVERTAILS, f"round0/{path}", of_prompts("beavertails", "prompt"), host=HUB)
            for path in ("30k/test.jsonl.gz", "30k/train.jsonl.gz", "330k/test.jsonl.xz", "330k/train.jsonl.xz")
        ),
    ],
    "prompts_advbench": [
        Source(*RISKY, "safety_evaluation/data/harmful_behaviors.csv", of_prompts("advbench", "goal"), ("goal",)),
    ],
    "prompts_harmbench": [
        Source(
            "busycalibrating/AdversariaLLM",
            "f970939273ea17b491fadf6001fddc36ed3ae3ff",
            "data/behavior_datasets/harmbench_behaviors_text_all.csv",
            of_harmbench,
        ),
    ],
    "prompts_xstest": [Source(*XSTEST, "xstest_prompts.csv", of_xstest)],
    "judge_xstest": [
        Source(*XSTEST, f"model_completions/xstest_v2_completions_{model}.csv", of_judged(model)) for model in MODELS
    ],
}
"""For each file of the data what it was chosen from. The next source is asked for rows that those before lack."""
NUMBERED = {
    "general": "utility_pool",
    "harmful": "harmful_pool",
    "refusals": "safety_demos",
    "benign_risky": "benign_risky",
    "prompts_beavertails": "eval_beavertails",
    "prompts_advbench": "eval_advbench",
    "prompts_harmbench": "eval_harmbench",
    "prompts_xstest": "eval_xstest",
    "judge_xstest": "judge_xstest",
}
"""What stands before the number in the id of a row; rows of other files have none."""


def digest(one: Row) -> str:
    """Tells a row from the others, whatever spaces its texts have."""
    said = (message["content"] for message in one["messages"])
    texts = [one["source"], *said, one.get("safe_reply", ""), one.get("context", "")]
    return sha256("\n".join(" ".join(text.split()) for text in texts).encode()).hexdigest()[:16]


def listed(name: str) -> list[tuple[str, str]]:
    """Digest and number of each row of a file, in order.

    Raises:
        Unobtainable: the list has nothing of this file.
    """
    found: list[tuple[str, str]] = []
    of_this = False
    for line in ROWS.read_text(encoding="utf-8").splitlines():
        if line.endswith(":"):
            of_this = line == f"{name}:"
        elif of_this:
            key, _, number = line.partition(" ")
            found.append((key, number))
    if not found:
        raise Unobtainable(f"{ROWS}: no rows of this file")
    return found


def chosen(name: str, sources: Path | None) -> tuple[list[Row | None], list[str]]:
    """The rows of a file of the data in its order, None for each that was not found; and which sources failed, and why.

    Raises:
        Unobtainable: no rows of this file are listed.
    """
    wanted = listed(name)
    missing = {key for key, _ in wanted}
    found: dict[str, Row] = {}
    failed: list[str] = []
    for source in SOURCES[name]:
        if not missing:
            break
        try:
            for one in source.rows(sources):
                if (key := digest(one)) in missing:
                    missing.discard(key)
                    found[key] = one
        except Unobtainable as error:
            failed.append(str(error))
    ids = [{"id": f"{NUMBERED[name]}-{number}"} if number else {} for _, number in wanted]
    rows = [{**given, **found[key]} if key in found else None for given, (key, _) in zip(ids, wanted, strict=True)]
    return rows, failed


def make(name: str, to: Path, sources: Path | None, incomplete: bool) -> str:
    """Writes a file of the data, unless it is there.

    Args:
        name: of the file, without its ending.
        to: the folder.
        sources: see :meth:`Source.rows`.
        incomplete: whether a file that is not the known one is written too.

    Returns:
        What to tell a person.

    Raises:
        Unobtainable: it was not written, or is not the known one.
    """
    file = to / f"{name}.jsonl"
    known = {line.split()[1]: line.split()[0] for line in DIGESTS.read_text(encoding="utf-8").splitlines()}[file.name]
    if file.exists() and sha256(file.read_bytes()).hexdigest() == known:
        return f"{file}: is there"
    rows, failed = chosen(name, sources)
    content = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows if one).encode()
    if sha256(content).hexdigest() == known:
        write(file, content)
        return f"{file}: {len(rows)} rows, as data.sha256 has it"
    if lacking := sum(one is None for one in rows):
        why = f"{lacking} of {len(rows)} rows were not found" + (f" ({failed[0]})" if failed else " in its sources")
    else:
        why = "all rows were found, but they differ in spaces or fields from what data.sha256 was made of"
    if not (incomplete and content):
        raise Unobtainable(f"{why}; not written, see --incomplete")
    write(file, content)
    raise Unobtainable(f"{why}; what was found is written")


def write(file: Path, content: bytes) -> None:
    """Writes a file in one step.

    Raises:
        SystemExit: the system refuses.
    """
    temporary = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError as error:
        raise SystemExit(f"{file}: cannot be written: {error.strerror}; choose another folder") from error


def read(file: Path, address: str) -> bytes:
    """The content of a source file that is there.

    Raises:
        Unobtainable: it is not, with where it can be had.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise Unobtainable(f"{file}: {error.strerror}; it is {address}") from error


@cache
def download(address: str) -> bytes:
    """The content of a source file.

    Raises:
        Unobtainable: it cannot be had, or not all of it.
    """
    parts: list[bytes] = []
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as response:
            total = int(response.headers.get("Content-Length", 0))
            with tqdm(desc=address.rsplit("/", 1)[-1], total=total or None, unit="B", unit_scale=True) as bar:
                while part := response.read(CHUNK):
                    parts.append(part)
                    bar.update(len(part))
    except (OSError, HTTPException) as error:
        raise Unobtainable(f"{address}: {error}; try again, or see --sources") from error
    if total and sum(map(len, parts)) != total:
        raise Unobtainable(f"{address}: the download broke off; try again, or see --sources")
    return b"".join(parts)


def make_list(data: Path) -> str:
    """What stands in :data:`ROWS`, of the files of the data in a folder.

    Raises:
        SystemExit: one is not there.
    """
    lines: list[str] = []
    for name in SOURCES:
        file = data / f"{name}.jsonl"
        if not file.is_file():
            raise SystemExit(f"{file}: not there; the list is of all {len(SOURCES)} files")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        lines += [f"{name}:", *(f"{digest(one)} {one.get('id', '').rpartition('-')[2]}".rstrip() for one in rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Makes what is missing, or with --list the list of the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, help="where the files go")
    parser.add_argument("--only", nargs="+", default=list(SOURCES), choices=SOURCES, metavar="NAME")
    parser.add_argument("--sources", type=Path, help="source files, instead of downloads")
    parser.add_argument("--incomplete", action="store_true", help="write also what is not all of a file")
    parser.add_argument("--list", type=Path, metavar="DATA", help="write data.rows from the files in DATA, no more")
    args = parser.parse_args()
    if args.list:
        write(ROWS, make_list(args.list).encode())
        return
    if args.to is None:
        parser.error("--to says where the files go")
    failed = []
    for name in args.only:
        try:
            print(make(name, args.to, args.sources, args.incomplete), flush=True)
        except Unobtainable as error:
            failed.append(name)
            print(f"{name}.jsonl: {error}", file=sys.stderr)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(args.only)} files are not those of the pages: {', '.join(failed)}")


if __name__ == "__main__":
    main()
