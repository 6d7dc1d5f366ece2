"""The tolerance rule: one pure function. Its derivation is docs/decisions/0004-tolerance-rule.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# |variant - oracle| <= FACTOR * EPSILON * (the image's largest |oracle score|). Healthy float32 LeNets were measured
# at up to 5.5 epsilon of that score; a fixed rtol and atol fail healthy ones or pass broken ones.
EPSILON = {"fp32": 2.0**-23}
FACTOR = {"fp32": 16.0}


@dataclass(frozen=True)
class Judgement:
    """How far a batch of outputs is from the oracle.

    Attributes:
        passed: every image within its budget and finite.
        reason: what went wrong; None when passed.
        max_abs_error, rmse: over the batch; None where the output has the wrong shape or is not finite.
        budget_used: largest share of its budget that an image used; None as above.
        top1_agreement: share of images whose top class is the oracle's; None as above.
    """

    passed: bool
    reason: str | None = None
    max_abs_error: float | None = None
    rmse: float | None = None
    budget_used: float | None = None
    top1_agreement: float | None = None


def judge(output: torch.Tensor, oracle: torch.Tensor, precision: str) -> Judgement:
    """Judge a variant's scores against the oracle's.

    Args:
        output: (N, classes), any floating dtype, on the CPU.
        oracle: float64 (N, classes), finite.
        precision: key of EPSILON.
    """
    if output.shape != oracle.shape:
        return Judgement(False, f"output has shape {tuple(output.shape)}, the oracle {tuple(oracle.shape)}")
    bad = int((~output.isfinite()).sum())
    if bad:
        return Judgement(False, f"{bad} of {output.numel()} outputs are NaN or infinite where the oracle is finite")
    error = (output.double() - oracle).abs()
    budget = FACTOR[precision] * EPSILON[precision] * oracle.abs().amax(dim=1)
    used = error.amax(dim=1) / budget.clamp_min(2.0**-1074)  # an all-zero oracle leaves no budget, and division stays defined
    worst = float(used.max())
    agreement = float((output.argmax(dim=1) == oracle.argmax(dim=1)).double().mean())
    image = int(used.argmax())
    largest = float(error.max())
    rmse = (
        min(largest * float((error / largest).square().mean().sqrt()), _MAX) if largest else 0.0
    )  # scaled, so that squares do not overflow
    reason = None
    if not worst <= 1.0:
        reason = (
            f"image {image}: error {float(error[image].max()):.3g} is {worst:.3g} times the budget "
            f"({FACTOR[precision]:g} {precision} epsilon of its largest score {float(oracle[image].abs().max()):.3g})"
        )
    return Judgement(reason is None, reason, min(largest, _MAX), rmse, min(worst, _MAX), agreement)


_MAX = 1e300  # JSON has no infinity
