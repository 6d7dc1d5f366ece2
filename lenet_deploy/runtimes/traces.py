"""What a session's intermediate tensors look like to the drill-down, whatever the runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

# The operators that begin a layer; everything else belongs to the layer before it.
CONV, POOL, LINEAR, DIFFERENCE, OTHER = "conv", "pool", "linear", "difference", "other"


@dataclass(frozen=True, eq=False)
class Tap:
    """One intermediate tensor.

    Attributes:
        name: what the variant calls it.
        op: CONV, POOL, LINEAR, DIFFERENCE or OTHER.
        source: name of the tensor it was made from (the first that depends on the images).
        value: (N, ...), on the CPU.
        padded: it may have more channels than the layer, because its layout is blocked.
    """

    name: str
    op: str
    source: str
    value: torch.Tensor
    padded: bool = False


# Images float32 (N, C, H, W) in host memory to every tensor that depends on them, in the order of computation; the first is the
# images themselves, the last the scores.
Trace: TypeAlias = "Callable[[torch.Tensor], tuple[Tap, ...]]"
