"""Did it get slower? Two results of bench against each other, case by case, with a third answer: inconclusive."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from lenet_deploy.bench.statistics import MIN_VISITS, Visits, median_ratio_ci95, paired_ratios
from lenet_deploy.bench_records import BenchReport, Comparison, ComparisonReport, Measurement
from lenet_deploy.errors import BadInput
from lenet_deploy.order_statistics import median

# Ten times what processes of one bundle were measured to differ by at batch 1, and little enough for a change of 5 % to be found with three
# processes of eight visits.
THRESHOLD_PERCENT = 3.0

# Fields of an environment that decide a time. Of `os` only the first word does, since kernels are updated under a machine that stays the
# same; packages, Python and commits are what people compare, so that these are noted.
DECIDING = ("cpu", "cores", "threads", "gpu", "driver")
# Options that say how much was measured and not how fast it can be, and `threads`, of which the environment holds the number in effect.
# Any other option that differs is taken to decide times.
EXTENT = (
    "baseline",
    "batch_sizes",
    "cold_start",
    "device",
    "fixed",
    "limit_s",
    "processes",
    "profile",
    "rounds",
    "scopes",
    "seed",
    "slo_s",
    "threads",
    "visit_s",
    "warmup_s",
)

Case: TypeAlias = tuple[str, str, int, str]
Cases: TypeAlias = Mapping[Case, Measurement]


def compare(
    base: BenchReport, head: BenchReport, threshold_percent: float = THRESHOLD_PERCENT, across_machines: bool = False
) -> ComparisonReport:
    """The verdict on each variant, device, batch size and scope: did the median time change by more than the threshold?

    `slower` or `faster` where the 95 % interval of the ratio head to base lies wholly beyond +-`threshold_percent`, `same` where it lies
    wholly within, else `inconclusive`, as with fewer than MIN_VISITS visits on either side. What only one file has is listed, too.

    Args:
        base, head: as read by `store.read_bench`.
        threshold_percent: above 0, below 100.
        across_machines: compare the ratios to each file's own baseline, of visits paired within the file: the variant that both files were
            measured against, else the first that both measured on a device.

    Raises:
        BadInput: a threshold out of its range, no case in common, a case that a file holds twice, times that are none, or results from
            unlike machines or with unlike options without `across_machines`.
    """
    if not 0 < threshold_percent < 100:  # also refuses NaN
        raise BadInput(f"the threshold is {threshold_percent:g} %; it must be above 0 and below 100")
    bases, heads = _cases(base, "base"), _cases(head, "head")
    if not bases.keys() & heads.keys():
        raise BadInput("nothing to compare: no variant was measured on one device, at one batch size and in one scope in both files")
    unlike = tuple(_unlike(base, head))
    if unlike and not across_machines:
        raise BadInput(
            f"base and head are not from like machines and options: {'; '.join(unlike)}; "
            "measure both alike, or compare ratios to each file's own baseline with --across-machines"
        )
    baselines = _baselines(base, head, bases, heads) if across_machines else {}
    rows = []
    for case in (*bases, *(case for case in heads if case not in bases)):
        variant, device, batch_size, scope = case
        if case not in bases or case not in heads:
            rows.append(_alone(case, bases, heads, base, head))
        elif not across_machines:
            sides = bases[case], heads[case]
            rows.append(_judge(sides, (sides[0].by_visit, sides[1].by_visit), threshold_percent))
        elif variant != baselines[device]:
            rows.append(_judge_relative(case, (baselines[device], device, batch_size, scope), (bases, heads), threshold_percent))
    if not any(row.ratio is not None or row.verdict == "inconclusive" for row in rows):
        raise BadInput("nothing to compare: beside the baseline, the files have no case in common; measure more variants in both")
    return ComparisonReport(
        rows=tuple(rows),
        threshold_percent=threshold_percent,
        across_machines=across_machines,
        baselines=baselines,
        notes=tuple(_notes(base, head, baselines, unlike)),
        base_environment=base.environment,
        head_environment=head.environment,
    )


def _cases(report: BenchReport, side: str) -> Cases:
    """The measurements by what tells them apart; raises BadInput where that is not possible."""
    found: dict[Case, Measurement] = {}
    for each in report.measurements:
        case = (each.variant, each.device, each.batch_size, each.scope)
        if case in found:
            raise BadInput(f"{side} holds {_named(case)} twice; which one is meant? Measure it again")
        if not all(isinstance(time, (int, float)) and 0 < time < math.inf for time in each.times_s):
            raise BadInput(f"{side} holds times of {_named(case)} that are not numbers above 0; it was altered, get a fresh copy")
        found[case] = each
    return found


def _named(case: Case) -> str:
    return f"{case[0]} at batch {case[2]}, scope {case[3]}, on {case[1]},"


def _alone(case: Case, bases: Cases, heads: Cases, base: BenchReport, head: BenchReport) -> Comparison:
    """A case that one file has, with the reason of the other for leaving it out, where there is one."""
    only, other = ("base", head) if case in bases else ("head", base)
    reason = next((failure.reason for failure in other.skipped if failure.name == case[0]), None)
    left, right = bases.get(case), heads.get(case)
    return Comparison(
        *case,
        verdict=f"only in {only}",
        base_median_s=_median_s(left),
        head_median_s=_median_s(right),
        base_visits=len(left.by_visit) if left else 0,
        head_visits=len(right.by_visit) if right else 0,
        reason=reason and f"the other file skipped it: {reason}",
    )


def _judge(measured: tuple[Measurement, Measurement], visits: tuple[Visits, Visits], threshold: float) -> Comparison:
    """The verdict on one case, from each side's visits with the times, or the ratios, that are compared."""
    left, right = measured
    counts = len(visits[0]), len(visits[1])
    ratio = _pooled(visits[1]) / _pooled(visits[0]) if all(counts) else None
    ci95 = median_ratio_ci95(*visits)
    verdict, reason = _verdict(ci95, threshold) if ci95 else ("inconclusive", _too_few(measured, counts))
    return Comparison(
        variant=left.variant,
        device=left.device,
        batch_size=left.batch_size,
        scope=left.scope,
        verdict=verdict,
        ratio=ratio,
        ci95=ci95,
        base_median_s=_median_s(left),
        head_median_s=_median_s(right),
        base_visits=counts[0],
        head_visits=counts[1],
        reason=reason,
        warnings=_warnings(measured),
    )


def _judge_relative(case: Case, baseline: Case, sides: tuple[Cases, Cases], threshold: float) -> Comparison:
    """The verdict on one case relative to the baseline under the same workload, in each file."""
    left, right = sides
    if baseline not in left or baseline not in right:
        reason = f"{baseline[0]}, the baseline, was not measured at this batch size and scope in both files"
        measured = (left[case], right[case])
        medians = [_median_s(each) for each in measured]
        return Comparison(
            *case,
            verdict="inconclusive",
            base_median_s=medians[0],
            head_median_s=medians[1],
            reason=reason,
            warnings=_warnings(measured),
        )
    visits = (paired_ratios(left[case], left[baseline]), paired_ratios(right[case], right[baseline]))
    return _judge((left[case], right[case]), visits, threshold)


def _verdict(ci95: tuple[float, float], threshold: float) -> tuple[str, str | None]:
    low, high = ci95
    least, most = 1 - threshold / 100, 1 + threshold / 100
    if low > most:
        return "slower", None
    if high < least:
        return "faster", None
    if least < low and high < most:
        return "same", None
    return "inconclusive", f"the interval reaches over {most if high >= most else least:g}"


def _too_few(measured: Sequence[Measurement], counts: Sequence[int]) -> str:
    reasons = []
    for side, each, count in zip(("base", "head"), measured, counts, strict=True):
        if each.flagged and not each.kept_s:
            reasons.append(f"all {each.flagged} samples of {side} were flagged")
        elif count < MIN_VISITS:
            reasons.append(f"{side} has {count} {'visit' if count == 1 else 'visits'}, {MIN_VISITS} are needed")
    return "; ".join(reasons)


def _warnings(measured: Sequence[Measurement]) -> tuple[str, ...]:
    return tuple(f"{side}: {warning}" for side, each in zip(("base", "head"), measured, strict=True) for warning in each.warnings)


def _pooled(visits: Visits) -> float:
    return median([value for _, values in visits for value in values])


def _median_s(measured: Measurement | None) -> float | None:
    return measured.median_s if measured and measured.kept_s else None


def _unlike(base: BenchReport, head: BenchReport) -> Iterator[str]:
    """What decides times and differs, in words. What one file does not say is not known to differ; `_notes` has it."""
    for name in DECIDING:
        yield from _difference(name, getattr(base.environment, name), getattr(head.environment, name))
    yield from _difference("os", base.environment.os.partition("-")[0], head.environment.os.partition("-")[0])
    for name in sorted(base.options.keys() & head.options.keys() - set(EXTENT)):
        yield from _difference(name, base.options[name], head.options[name])


def _difference(name: str, left: Any, right: Any) -> Iterator[str]:
    if left != right:
        yield f"{name} is {_said(left)} in base, {_said(right)} in head"


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _baselines(base: BenchReport, head: BenchReport, bases: Cases, heads: Cases) -> dict[str, str]:
    """The baseline of each device of the cases in common."""
    named = base.options.get("baseline")
    found = {}
    for device in dict.fromkeys(device for _, device, _, _ in bases):
        common = [variant for variant, place, *workload in bases if place == device and (variant, place, *workload) in heads]
        if common:
            found[device] = named if named in common and named == head.options.get("baseline") else common[0]
    return found


def _notes(base: BenchReport, head: BenchReport, baselines: Mapping[str, str], unlike: Sequence[str]) -> Iterator[str]:
    for device, baseline in baselines.items():
        yield f"on {device}, times are relative to {baseline} in the same file"
    yield from unlike
    left, right = base.environment, head.environment
    for name in ("os", "python", "commit"):
        if name != "os" or left.os.partition("-")[0] == right.os.partition("-")[0]:  # else `unlike` has said it
            yield from _difference(name, getattr(left, name), getattr(right, name))
    for name in sorted(left.versions.keys() | right.versions.keys()):
        yield from _difference(name, left.versions.get(name), right.versions.get(name))
    for name in sorted((base.options.keys() ^ head.options.keys()) - set(EXTENT)):
        yield f"option {name} is not in {'base' if name in head.options else 'head'}, so that it may have been another"
    yield from _difference("profile", base.options.get("profile"), head.options.get("profile"))
    for side, report in (("base", base), ("head", head)):
        if report.partial:
            yield f"{side} is partial: {report.partial}"
        yield from dict.fromkeys(
            f"{side} was measured on a noisy machine: {remark}" for state in report.machine for remark in state.remarks
        )
        if len({visit.process for each in report.measurements for visit in each.visits}) == 1:
            yield f"{side} is from one process, so that its intervals do not hold how processes differ; bench --profile full runs several"
