"""The tolerance rule: pure functions. Its derivation is docs/decisions/0007-tolerance-rule.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lenet_deploy.records import Decisions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tolerance:
    """What rounding in one number format may do to a healthy variant.

    Attributes:
        epsilon: distance from 1 to the next number of the format.
        factor: an image's scores may be off by `factor * epsilon` of its largest score.
        ratio: their root mean square may be `ratio` times that of eager in the same format.
        largest: finite number of the format.
        smallest: positive number of the format, subnormals included.
    """

    epsilon: float
    factor: float
    ratio: float
    largest: float
    smallest: float


# Healthy variants needed a factor of 4.9 and a ratio of 6.5 in float32, a factor of 1.2 in the others (ADR 0007, benchmarks/tolerance.py).
TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(2.0**-23, 8.0, 10.0, 3.4028234663852886e38, 2.0**-149),
    "tf32": Tolerance(2.0**-10, 4.0, 10.0, 3.4028234663852886e38, 2.0**-149),
    "fp16": Tolerance(2.0**-10, 4.0, 10.0, 65504.0, 2.0**-24),
    "bf16": Tolerance(2.0**-7, 4.0, 10.0, 3.3895313892515355e38, 2.0**-133),
}

# Where one epsilon's change moves the oracle's scores this many times as far, and by more than this share of the largest, rounding has
# left the range in which errors are in proportion to it, and a set says nothing of a variant. Healthy variants needed a factor of 23 there.
ILL_CONDITIONED = 8.0
LINEAR = 2.0**-10

# Of two artifacts that nobody vouches for (ADR 0012): each may be `factor` epsilon off, so together 16, and four times that for weights
# whose condition cannot be measured and for graphs deeper than a LeNet. Below VANISHING float32 has lost its digits.
PAIR_TOLERANCE = 4 * 2 * 8.0 * 2.0**-23
VANISHING = 2.0**-110

# int8 has no rounding rule, since a step is as large as its calibration made it: its weights are compared within half a step and
# its accuracy with the oracle's. A healthy static int8 LeNet was measured to err by up to 2.0 in a logit.
MAX_ACCURACY_DROP = 0.5  # percentage points

_MAX = 1e300  # JSON has no infinity


@dataclass(frozen=True)
class Judgement:
    """How far a batch of outputs is from the oracle; the numbers are None where the output has the wrong shape or is not finite.

    Attributes:
        passed: every image within its budget and finite.
        reason: what went wrong; None when passed.
        worst: index of the image that used most of its budget, or that is not finite.

    The others are those of `ParityResult`.
    """

    passed: bool
    reason: str | None = None
    worst: int = 0
    max_abs_error: float | None = None
    rmse: float | None = None
    budget_used: float | None = None
    top1_agreement: float | None = None
    mean_abs_error: float | None = None
    max_rel_error: float | None = None
    mean_rel_error: float | None = None
    cosine: float | None = None
    ulp_quantiles: Mapping[str, float] | None = None


def judge(
    output: torch.Tensor,
    oracle: torch.Tensor,
    precision: str,
    eager_rmse: torch.Tensor | None = None,
    condition: torch.Tensor | float = 1.0,
) -> Judgement:
    """Judge a variant's scores against the oracle's.

    An image passes when each score is within `factor * epsilon * max|oracle|` of the oracle's, and the root mean square of its
    errors within `ratio` times eager's plus `epsilon` times the root mean square of the oracle's scores. Where an image is
    ill-conditioned, its scores count as that much larger.

    Args:
        output: (N, classes), any floating dtype, on the CPU.
        oracle: float64 (N, classes), finite.
        precision: key of TOLERANCES, or one that starts with `int8`, for which scores have to be finite only.
        eager_rmse: float64 (N,): that of eager in the same precision, per image; None leaves that half of the rule out.
        condition: at least 1; (N,), per image.
    """
    if output.shape != oracle.shape:
        return Judgement(False, f"output has shape {tuple(output.shape)}, the oracle {tuple(oracle.shape)}")
    finite = output.isfinite()
    if not finite.all():
        image = int(finite.all(dim=1).double().argmin())
        bad = int((~finite).sum())
        return Judgement(False, f"{bad} of {output.numel()} outputs are NaN or infinite where the oracle is finite", image)
    error = (output.double() - oracle).abs()
    tolerance = TOLERANCES.get(precision)
    if tolerance is None:
        return Judgement(True, **_metrics(output, oracle, error, TOLERANCES["fp32"]))
    peak = condition * oracle.abs().amax(dim=1)
    used = error.amax(dim=1) / _positive(tolerance.factor * tolerance.epsilon * peak)
    spread = used
    if eager_rmse is not None:
        allowed = tolerance.ratio * eager_rmse + tolerance.epsilon * condition * _rms(oracle)
        spread = _rms(error) / _positive(allowed)
    share = used.maximum(spread)
    worst, image = float(share.max()), int(share.argmax())
    reason = None
    if not worst <= 1.0:
        largest = float(error[image].max())
        if used[image] >= spread[image]:
            limit = f"({tolerance.factor:g} {precision} epsilon of its largest score {float(peak[image]):.3g})"
            reason = f"image {image}: error {largest:.3g} is {worst:.3g} times the budget {limit}"
        else:
            limit = f"({tolerance.ratio:g} times eager's own {float(eager_rmse[image]) if eager_rmse is not None else 0.0:.3g})"
            reason = f"image {image}: root mean square error {float(_rms(error)[image]):.3g} is {worst:.3g} times the budget {limit}"
    return Judgement(reason is None, reason, image, budget_used=min(worst, _MAX), **_metrics(output, oracle, error, tolerance))


def agree(
    output: torch.Tensor, alone: torch.Tensor, oracle: torch.Tensor, precision: str, condition: torch.Tensor | float = 1.0
) -> Judgement:
    """Whether the same images gave the same scores twice, within the budget; numbers are relative to `alone`.

    Args:
        output, alone: (N, classes), of the same images.
        oracle: float64 (N, classes), whose largest scores set the budget.
        precision, condition: as in `judge`; int8 has float32's budget, since its steps do not depend on the batch.
    """
    if output.shape != oracle.shape or alone.shape != oracle.shape:
        return Judgement(False, f"outputs have shapes {tuple(output.shape)} and {tuple(alone.shape)}, the oracle {tuple(oracle.shape)}")
    if not (output.isfinite().all() and alone.isfinite().all()):
        return Judgement(False, "outputs are NaN or infinite where the oracle is finite")
    tolerance = TOLERANCES.get(precision, TOLERANCES["fp32"])
    error = (output.double() - alone.double()).abs()
    used = error.amax(dim=1) / _positive(tolerance.factor * tolerance.epsilon * condition * oracle.abs().amax(dim=1))
    worst, image = float(used.max()), int(used.argmax())
    reason = None if worst <= 1.0 else f"image {image}: its scores differ by {float(error[image].max()):.3g}, {worst:.3g} times the budget"
    numbers = _metrics(output, alone.double(), error, tolerance)
    return Judgement(reason is None, reason, image, budget_used=min(worst, _MAX), **numbers)


def differ(output: torch.Tensor, reference: torch.Tensor, tolerance: float, condition: torch.Tensor | float = 1.0) -> Judgement:
    """Whether two artifacts gave the same images the same scores, of which neither is known to be right.

    Args:
        output, reference: (N, scores), of the same images.
        tolerance: share of an image's largest score that a score may differ by, times its condition.
        condition: as in `judge`.

    What is NaN or infinite has to be that on both sides. The numbers are those of the images that are finite; None where none is.
    """
    if output.shape != reference.shape:
        return Judgement(False, f"output has shape {tuple(output.shape)}, the reference {tuple(reference.shape)}")
    odd = ~((output.isfinite() & reference.isfinite()) | (output == reference) | (output.isnan() & reference.isnan()))
    if odd.any():
        image = int(odd.any(dim=1).double().argmax())
        return Judgement(False, f"image {image}: {int(odd.sum())} of {odd.numel()} scores are NaN or infinite on one side alone", image)
    finite = reference.isfinite().all(dim=1).nonzero()[:, 0]
    if not len(finite):
        return Judgement(True)
    ours, theirs = output[finite].double(), reference[finite].double()
    share = condition[finite] if not isinstance(condition, float) else condition
    error = (ours - theirs).abs()
    used = error.amax(dim=1) / (tolerance * share * theirs.abs().amax(dim=1)).clamp_min(VANISHING)
    worst, row = float(used.max()), int(used.argmax())
    image, largest = int(finite[row]), float(error[row].max())
    reason = f"image {image}: its scores differ by {largest:.3g}, {worst:.3g} times what is allowed" if not worst <= 1.0 else None
    return Judgement(reason is None, reason, image, budget_used=min(worst, _MAX), **_metrics(ours, theirs, error, TOLERANCES["fp32"]))


def decide(output: torch.Tensor, oracle: torch.Tensor, labels: torch.Tensor, precision: str) -> Decisions:
    """Compare top classes; a disagreement is a near-tie where the oracle's margin is within what rounding may do to two scores.

    Args:
        output, oracle: (N, classes), finite.
        labels: int64 (N,).
    """
    tolerance = TOLERANCES.get(precision, TOLERANCES["fp32"])
    ours, theirs = output.argmax(dim=1), oracle.argmax(dim=1)
    margin = (oracle.gather(1, theirs[:, None]) - oracle.gather(1, ours[:, None]))[:, 0]
    bound = 2.0 * tolerance.factor * tolerance.epsilon * oracle.abs().amax(dim=1)  # each of the two scores may be off
    apart, near = ours != theirs, margin <= bound
    right, oracle_right = ours == labels, theirs == labels
    return Decisions(
        len(labels),
        int((apart & near).sum()),
        int((apart & ~near).sum()),
        int(oracle_right.sum()),
        int(right.sum()),
        int((oracle_right & ~right).sum()),
        int((right & ~oracle_right).sum()),
    )


def weigh(decisions: Decisions, precision: str) -> Judgement:
    """Whether decisions may differ as they do: by near-ties only, or, in int8, by an accuracy at most MAX_ACCURACY_DROP lower."""
    agreement = 1.0 - (decisions.near_ties + decisions.true_flips) / decisions.images
    if precision not in TOLERANCES:
        drop = 100.0 * (decisions.oracle_correct - decisions.variant_correct) / decisions.images  # exact at the limit; accuracies are not
        reason = f"accuracy drops by {drop:.2f} points, from {decisions.oracle_accuracy:.2f} %; {MAX_ACCURACY_DROP:g} are allowed"
        passed = drop <= MAX_ACCURACY_DROP
        return Judgement(passed, None if passed else reason, budget_used=max(drop, 0.0) / MAX_ACCURACY_DROP, top1_agreement=agreement)
    reason = f"{decisions.true_flips} of {decisions.images} images get another class although the oracle's margin is beyond any rounding"
    return Judgement(not decisions.true_flips, reason if decisions.true_flips else None, top1_agreement=agreement)


def within_range(precision: str, peak: float, smallest_input: float, condition: float) -> str | None:
    """Why an input set cannot be judged in a precision, or None.

    Args:
        peak: largest magnitude of any intermediate value of the oracle, inputs and scores included.
        smallest_input: smallest magnitude of an input that is not zero.
        condition: the largest of the set's images in this precision (see `InputSet`).
    """
    tolerance = TOLERANCES.get(precision)
    if tolerance is None:
        return None
    if peak > tolerance.largest:
        return f"the oracle's intermediate values reach {peak:.3g}, beyond {precision}'s largest number {tolerance.largest:.6g}"
    if smallest_input < tolerance.smallest:
        return f"{precision} cannot hold inputs of {smallest_input:.3g}: its smallest number is {tolerance.smallest:.3g}"
    if condition > ILL_CONDITIONED and condition * tolerance.epsilon > LINEAR:
        moved = condition * tolerance.epsilon
        return f"ill-conditioned in {precision}: one epsilon's change of weights and pixels moves the oracle's scores by {moved:.2%}"
    return None


def _metrics(output: torch.Tensor, oracle: torch.Tensor, error: torch.Tensor, tolerance: Tolerance) -> dict[str, Any]:
    import torch

    size = oracle.abs()
    relative = (error / size)[size > 0]
    largest = float(error.max())
    scaled = float((error / largest).square().mean().sqrt()) if largest else 0.0  # scaled, so that squares do not overflow
    normal = size.clamp_min(tolerance.smallest / tolerance.epsilon)  # below the smallest normal number the last place stays as it is
    ulps = (error / torch.ldexp(torch.full_like(normal, tolerance.epsilon), torch.frexp(normal).exponent - 1)).clamp_max(_MAX)
    p50, p99, most = torch.quantile(ulps.flatten(), torch.tensor([0.5, 0.99, 1.0], dtype=torch.float64)).tolist()
    cosine = torch.nn.functional.cosine_similarity(_unit(output.double()), _unit(oracle), dim=1)
    same = output.argmax(dim=1) == oracle.argmax(dim=1)
    return {
        "max_abs_error": min(largest, _MAX),
        "rmse": min(largest * scaled, _MAX),
        "top1_agreement": float(same.double().mean()),
        "mean_abs_error": min(float(error.mean()), _MAX),
        "max_rel_error": min(float(relative.max()), _MAX) if len(relative) else None,
        "mean_rel_error": min(float(relative.mean()), _MAX) if len(relative) else None,
        "cosine": float(cosine.min()),
        "ulp_quantiles": {"p50": p50, "p99": p99, "max": most},
    }


def _unit(scores: torch.Tensor) -> torch.Tensor:
    """Each image's scores divided by the largest, so that squares neither overflow nor vanish."""
    return scores / _positive(scores.abs().amax(dim=1, keepdim=True))


def _rms(values: torch.Tensor) -> torch.Tensor:
    """Root mean square over the classes, (N,)."""
    peak = _positive(values.abs().amax(dim=1, keepdim=True))
    return peak[:, 0] * (values / peak).square().mean(dim=1).sqrt()


def _positive(values: torch.Tensor) -> torch.Tensor:
    """Never zero: an all-zero oracle leaves no budget, and division stays defined."""
    return values.clamp_min(2.0**-1000)
