"""Counts turns of phrase that make English read as translated: `python tools/english.py [--places] [folders or files]`.

CONTRIBUTING.md ("How we write English") says what to write instead. Most of these words are right now and then. So all
texts together may use each of them a certain number of times, and `tests/test_english.py` fails if there are more.
"""

from __future__ import annotations

import argparse
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TEXTS = ("README.md", "CONTRIBUTING.md", "docs", "experiments", "benchmarks", "tools", "src", "tutorials", "tests")
RULES = "## How we write English"  # the section of CONTRIBUTING.md that names these words
# Pages built from tutorials/, the patterns, and the texts that test them.
NOT_COUNTED = ("docs/tutorials/", "tools/english.py", "tests/test_english.py")


class Pattern(NamedTuple):
    expression: re.Pattern[str]
    most: int


def _pattern(words: str, most: int) -> Pattern:
    return Pattern(re.compile(rf"\b(?:{words})\b".replace(" ", r"\s+"), re.IGNORECASE), most)


# The first five are at a tenth of what the texts once had.
PATTERNS = {
    "is no": _pattern(r"(?<!there\s)(?:is|are) no", 5),
    "alone": _pattern("alone", 10),
    "beside": _pattern("beside", 3),
    "so that": _pattern("so that", 4),
    "stands": _pattern("stands?|stood", 2),
    "anew": _pattern("anew|as ever|just so|to this end|of the one kind", 0),
    "gradient by": _pattern(r"gradients? (?:of (?:the )?\S+ )?by (?:the|both|all|(?-i:\$?[A-Z]))", 0),
    "taken": _pattern("not taken|takes? (?:any|all|only|every)", 0),
    "held against": _pattern("(?:hold|holds|held) against", 0),
    "every figure": _pattern("every figure|has the figures", 0),
}


class Use(NamedTuple):
    pattern: str
    path: Path
    line: int
    text: str


def prose(path: Path) -> str:
    """The words of a file, each in its line: Markdown without code and measured tables, or comments and strings."""
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else _words_of_python(path)
    if path.suffix == ".md":
        for left_out in (rf"^{RULES}.*?(?=^## )", r"^( *)```.*?^\1```$", r"<!-- report.*?end of report -->"):
            text = re.sub(left_out, _blank, text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def _words_of_python(path: Path) -> str:
    """Its comments, and its strings of more than one word: docstrings and messages."""
    lines: list[str] = []
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            kind = tokenize.tok_name[token.type]
            if kind == "COMMENT" or (kind in ("STRING", "FSTRING_MIDDLE") and " " in token.string):
                lines += [""] * (token.start[0] - len(lines))
                first, *rest = re.sub(r"\{[^{}\n]*\}", "", token.string).split("\n")  # without fields of a message
                lines[-1] += f" {first.lstrip('# %')}"
                lines += rest
    return "\n".join(lines)


def files(texts: Iterable[str] = TEXTS) -> Iterator[Path]:
    """The files of these folders and files that hold prose, CHANGELOG.md left out."""
    for text in texts:
        found = sorted((ROOT / text).rglob("*")) if (ROOT / text).is_dir() else [ROOT / text]
        for path in found:
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in (".md", ".py") and not name.startswith(NOT_COUNTED):
                yield path


def uses(paths: Iterable[Path]) -> Iterator[Use]:
    """Every place where a pattern occurs."""
    for path in paths:
        text = prose(path)
        lines = text.split("\n")
        for name, pattern in PATTERNS.items():
            for found in pattern.expression.finditer(text):
                number = text.count("\n", 0, found.start())
                yield Use(name, path, number + 1, lines[number].strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("texts", nargs="*", default=TEXTS)
    parser.add_argument("--places", action="store_true", help="print every use")
    arguments = parser.parse_args()
    found = list(uses(files(arguments.texts)))
    for name, pattern in PATTERNS.items():
        of_pattern = [use for use in found if use.pattern == name]
        print(f"{name:12} {len(of_pattern):4} (at most {pattern.most})")
        if arguments.places:
            for use in of_pattern:
                print(f"    {use.path.relative_to(ROOT)}:{use.line}: {use.text}")


if __name__ == "__main__":
    main()
