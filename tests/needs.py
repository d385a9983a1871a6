"""What some tests need beyond Python packages: a C++ compiler, a browser, the built site."""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

REQUIRED = "SLA_REF_REQUIRE_TOOLS"
SITE = Path(__file__).parents[1] / "site"


def need_program(purpose: str, *names: str) -> str:
    """Return the path of the first program of `names` that this machine has.

    Without any, skip the test and say why; where SLA_REF_REQUIRE_TOOLS=1 is set, as in .ci/run, fail instead.
    """
    for name in names:
        if path := shutil.which(name):
            return path
    _give_up(f"{purpose} needs {' or '.join(names)}, and this machine has none")


def need_site() -> Path:
    """Return the folder of the site that `make docs` built; without it, skip or fail as `need_program`."""
    if (SITE / "index.html").exists():
        return SITE
    _give_up("the site is not built: run `make docs` first")


def _give_up(reason: str) -> NoReturn:
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason} ({REQUIRED}=1 allows no skip)")
    pytest.skip(reason)
