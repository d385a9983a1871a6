"""Counts turns of phrase that make English read as translated: `python tools/english.py [--places] [folders or files]`.

CONTRIBUTING.md ("How we write English") says what to write instead. Most of these words are right now and then, so each
has a number of uses that all texts together may have, and `tests/test_english.py` holds the repository to it.
"""

from __future__ import annotations

import argparse
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TEXTS = ("README.md", "CONTRIBUTING.md", "docs", "experiments", "benchmarks", "tools")
LATER = ("src", "tutorials", "tests")  # not swept yet; move them to TEXTS when they are
NOT_OURS_TO_COUNT = ("docs/tutorials/",)  # built from tutorials/


class Pattern(NamedTuple):
    expression: re.Pattern[str]
    most: int


def _pattern(words: str, most: int) -> Pattern:
    return Pattern(re.compile(rf"\b(?:{words})\b".replace(" ", r"\s+"), re.IGNORECASE), most)


PATTERNS = {
    "is no": _pattern("is no|are no|was no|were no", 5),
    "alone": _pattern("alone", 10),
    "beside": _pattern("beside", 3),
    "so that": _pattern("so that", 4),
    "stands": _pattern("stands?|stood", 2),
    "anew": _pattern("anew|as ever|just so|by itself|at once|of the one|to this end|ever since", 0),
    "gradient by": _pattern(r"gradients? (?:of \S+ )?(?:by|to) (?:the|both|all|its|[A-Z])", 0),
    "taken": _pattern("(?:is|are|was|were|be|not) taken|takes? (?:any|all|only|whatever|every)", 0),
    "held against": _pattern("(?:hold|holds|held) (?:\w+ )?(?:against|to it)", 0),
    "figure": _pattern("(?:has|have|had|every|all|its|the|their) figures?", 0),
    "nor": _pattern("nor", 0),
    "what": _pattern("what (?:is|was|are|it|they|the \w+) \w+", 0),
    "behind": _pattern("behind", 0),
}


class Use(NamedTuple):
    pattern: str
    path: Path
    line: int
    text: str


def prose(path: Path) -> str:
    """A file with everything but its prose left out, line by line: code of Markdown, code of Python but not its words."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = re.sub(r"^( *)(```|~~~).*?^\1\2$", _blank, text, flags=re.DOTALL | re.MULTILINE)
    else:
        text = _words_of_python(path)
    return re.sub(r"(`+)[^`]+\1", _blank, text)


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
                first, *rest = token.string.split("\n")
                lines[-1] += f" {first.lstrip('# %')}"
                lines += rest
    return "\n".join(lines)


def files(texts: Iterable[str] = TEXTS) -> Iterator[Path]:
    """The files of these folders and files that hold prose, CHANGELOG.md left out."""
    for text in texts:
        found = sorted((ROOT / text).rglob("*")) if (ROOT / text).is_dir() else [ROOT / text]
        for path in found:
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in (".md", ".py") and not name.startswith(NOT_OURS_TO_COUNT):
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
