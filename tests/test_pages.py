"""The Python on these pages of the documentation is one script each, and it runs."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["wan.md", "lora.md", "own-model.md", "thu-ml.md"])
def test_the_script_of_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="needs the extra diffusers")
    if page == "lora.md":
        pytest.importorskip("peft", reason="needs the extra lora")
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    script = "\n".join(blocks)
    assert len(blocks) >= 4 and "assert" in script
    monkeypatch.chdir(tmp_path)
    exec(compile(script, page, "exec"), {"__name__": page})
