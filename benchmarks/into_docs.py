"""Puts the files of benchmarks/results/ between their marks in README.md and docs/.

python benchmarks/into_docs.py [--check]

A page asks for a file with `<!-- results: NAME -->` and `<!-- end of results -->` on lines of their own.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARKS = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every marked place holding its result, whose own title is left out."""

    def place(match: re.Match[str]) -> str:
        result = (ROOT / "benchmarks" / "results" / match[2]).read_text(encoding="utf-8")
        body = re.sub(r"\A# .*\n+", "", result).strip()
        # its chapters stand below a heading of the page
        body = re.sub(r"(?m)^(#+ )", r"#\1", body)
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return MARKS.sub(place, text)


def main() -> int:
    """Rewrites the pages, or with --check says which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            stale.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'out of date' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
