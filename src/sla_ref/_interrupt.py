"""Ctrl-C while the command line is still loading torch, which takes seconds: one line, not a traceback.

The package imports this first, because nothing of it is imported before the package itself.
"""

import os
import sys
from itertools import pairwise
from pathlib import Path
from types import TracebackType


def _hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("sla-ref: interrupted\n")
        os._exit(130)
    sys.__excepthook__(kind, error, traceback)


if ("-m", "sla_ref") in pairwise(sys.orig_argv) or "sla-ref" in [Path(each).stem for each in sys.orig_argv[:2]]:
    sys.excepthook = _hook
