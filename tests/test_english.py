"""The English of docs, comments and messages keeps to the rules of CONTRIBUTING.md, as far as these can be counted."""

from __future__ import annotations

from collections import Counter

import pytest

from tools import english


@pytest.fixture(scope="module")
def counted() -> Counter[str]:
    return Counter(use.pattern for use in english.uses(english.files()))


@pytest.mark.parametrize("name", english.PATTERNS)
def test_a_pattern_is_rare(counted, name):
    assert counted[name] <= english.PATTERNS[name].most, f"python tools/english.py --places lists every {name!r}"


MARKDOWN = """\
It is
no fault, and `it is no` fault; there is no fault.

## How we write English

Not "beside".

## Next

```python
alone = "alone"
```
The gradient of the loss by $Q$ stands beside it.
<!-- report: x -->
| alone |
<!-- end of report -->
"""
PYTHON = '''\
"""All of it,
so that it stands."""
alone = {"beside": 1}  # never alone
message = f"a feature map is no {alone} of ours"
'''


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("page.md", MARKDOWN, [("is no", 1), ("beside", 13), ("stands", 13), ("gradient by", 13)]),
        ("module.py", PYTHON, [("is no", 4), ("alone", 3), ("so that", 2), ("stands", 2)]),
    ],
)
def test_words_are_counted_in_prose_and_nowhere_else(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert [(use.pattern, use.line) for use in english.uses([tmp_path / name])] == expected


def test_every_text_is_read():
    names = {path.relative_to(english.ROOT).as_posix() for path in english.files()}
    assert {"README.md", "docs/index.md", "docs/api/layer.md", "experiments/run.py", "tools/draw.py"} <= names
    assert {"src/sla_ref/lab/train.py", "tests/conftest.py", "tutorials/lesson.py"} <= names
    assert not any(name.startswith(english.NOT_COUNTED) for name in names)
