"""Programs that some tests need beyond Python packages: a C++ compiler, a browser."""

import os
import shutil

import pytest

REQUIRED = "SLA_REF_REQUIRE_TOOLS"


def need_program(purpose: str, *names: str) -> str:
    """Return the path of the first program of `names` that this machine has.

    Without any, skip the test and say why; where SLA_REF_REQUIRE_TOOLS=1 is set, as in .ci/run, fail instead.
    """
    for name in names:
        if path := shutil.which(name):
            return path
    reason = f"{purpose} needs {' or '.join(names)}, and this machine has none"
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason} ({REQUIRED}=1 allows no skip)")
    pytest.skip(reason)
