"""sla_ref: sparse-linear attention (SLA, arXiv 2509.24006) as a readable specification with tested backends."""

from . import _interrupt as _interrupt  # isort: skip  (before torch)
from typing import TYPE_CHECKING

from . import reference, reference_sla2
from .attention import SLAOutput, sparse_linear_attention
from .backends import (
    get_backend,
    list_backends,
    register_backend,
    reset_backend,
    set_backend,
    use_backend,
    which_backend,
)
from .block_map import BlockMap, block_scores, classify_blocks
from .feature_maps import Hedgehog
from .module import SparseLinearAttention
from .router import LearnedScores, Router, cube_order, protect, sub_block_scores
from .sla2 import SLA2Attention

__version__ = "0.1.0"

__all__ = [
    "BlockMap",
    "Hedgehog",
    "LearnedScores",
    "Router",
    "SLA2Attention",
    "SLAOutput",
    "SparseLinearAttention",
    "block_scores",
    "classify_blocks",
    "cube_order",
    "get_backend",
    "list_backends",
    "protect",
    "reference",
    "reference_sla2",
    "register_backend",
    "reset_backend",
    "set_backend",
    "sparse_linear_attention",
    "sub_block_scores",
    "use_backend",
    "which_backend",
]

if TYPE_CHECKING:
    from . import testing as testing
else:

    def __getattr__(name: str):
        """Import `sla_ref.testing`, which is for authors of backends, when it is first used."""
        if name != "testing":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return import_module(".testing", __name__)

    def __dir__() -> list[str]:
        return sorted({*globals(), "testing"})
