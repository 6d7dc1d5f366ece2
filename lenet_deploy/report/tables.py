"""One function a record: what a person wants to see of it first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lenet_deploy.models.layers import Layer
from lenet_deploy.records import AccuracyRow, Artifact, Environment, LayerError, ParityReport, ParityResult, Prediction, RuntimeStatus
from lenet_deploy.report.table import Table


def layer_table(input_shape: tuple[int, int, int], layers: Sequence[Layer]) -> Table:
    """Layer, window, output, parameters, MACs, bytes; input first, total last."""
    rows: list[tuple[str, ...]] = [("input", "", "", "", "", _shape(input_shape), "", "", "", "")]
    for layer in layers:
        window = [_dash(value) for value in (layer.kernel, layer.stride, layer.padding)]
        counts = [f"{value:,}" for value in (layer.parameters, layer.macs, layer.parameter_bytes, layer.output_bytes)]
        rows.append((layer.name, layer.kind, *window, _shape(layer.output), *counts))
    sums = (sum(column) for column in zip(*((x.parameters, x.macs, x.parameter_bytes, x.output_bytes) for x in layers), strict=True))
    rows.append(("total", "", "", "", "", "", *(f"{value:,}" for value in sums)))
    columns = ("layer", "kind", "kernel", "stride", "padding", "output", "parameters", "MACs", "weight bytes", "output bytes")
    return Table(columns, tuple(rows))


def artifact_table(artifacts: Iterable[Artifact]) -> Table:
    """What a bundle holds."""
    rows = tuple((a.name, a.path, f"{a.size_bytes:,}", a.sha256[:12], a.status) for a in artifacts)
    return Table(("artifact", "file", "bytes", "sha256", "status"), rows)


def parity_table(report: ParityReport) -> Table:
    """One row a variant, at its worst; the JSON holds every input set and batch size."""
    by_variant: dict[str, list[ParityResult]] = {}
    for result in report.results:
        by_variant.setdefault(result.variant, []).append(result)
    return Table(
        ("variant", "status", "checks", "max abs error", "budget used", "top-1", "diverges at", "reason"),
        tuple(_parity_row(variant, results) for variant, results in by_variant.items()),
    )


def layer_error_table(errors: Iterable[LayerError]) -> Table:
    """One row a layer of each form of a variant's graph."""
    return Table(
        ("graph", "layer", "tensor", "max abs error", "budget used", "status"),
        tuple(
            (
                e.graph,
                e.layer,
                e.tensor,
                "-" if e.max_abs_error is None else f"{e.max_abs_error:.2e}",
                "-" if e.budget_used is None else f"{e.budget_used:.3g}",
                "pass" if e.passed else "fail",
            )
            for e in errors
        ),
    )


def layer_error_tables(report: ParityReport) -> tuple[tuple[str, Table], ...]:
    """The first traced result of each variant: a title and its layers."""
    first: dict[str, ParityResult] = {}
    for result in report.results:
        if result.layers:
            first.setdefault(result.variant, result)
    return tuple((f"{name}, {result.inputs}", layer_error_table(result.layers)) for name, result in first.items())


def doctor_table(statuses: Iterable[RuntimeStatus]) -> Table:
    """What runs here, why not, and the fix."""
    return Table(
        ("runtime", "usable", "reason", "fix"),
        tuple((s.name, "yes" if s.usable else "no", s.reason, s.fix or "") for s in statuses),
    )


def accuracy_table(rows: Iterable[AccuracyRow]) -> Table:
    """Accuracy with its interval."""
    return Table(
        ("variant", "accuracy %", "95 % interval", "images"),
        tuple((r.variant, f"{r.accuracy:.2f}", f"{r.ci95[0]:.2f} - {r.ci95[1]:.2f}", f"{r.images:,}") for r in rows),
    )


def class_table(rows: Sequence[AccuracyRow]) -> Table:
    """Precision and recall of each class, of the first variant."""
    return Table(
        ("class", "images", "precision %", "recall %"),
        tuple((each.label, f"{each.images:,}", _percent(each.precision), _percent(each.recall)) for each in rows[0].classes),
    )


def class_title(rows: Sequence[AccuracyRow]) -> str:
    """Whose the class table is: everybody's, or that of the first variant and who answers otherwise."""
    others = [row.variant for row in rows if row.confusion != rows[0].confusion]
    if others:
        return f"Classes, by {rows[0].variant}; {', '.join(others)} answered otherwise, see --json"
    return "Classes, the same by every variant" if len(rows) > 1 else "Classes"


def prediction_table(predictions: Iterable[Prediction]) -> Table:
    """One row a label of an image, best first."""
    return Table(
        ("image", "rank", "label", "probability"),
        tuple((p.image, str(rank), label, f"{share:.4f}") for p in predictions for rank, (label, share) in enumerate(p.top, 1)),
    )


def environment_line(environment: Environment) -> str:
    """Machine and versions in one line."""
    names = ("torch", "onnxruntime-gpu", "onnxruntime")
    versions = ", ".join(f"{name} {environment.versions[name]}" for name in names if name in environment.versions)
    threads = f", {environment.threads} threads" if environment.threads else ""
    return f"{environment.cpu}, {environment.cores} cores{threads}; {environment.gpu or 'no GPU'}; Python {environment.python}; {versions}"


def _parity_row(variant: str, results: Sequence[ParityResult]) -> tuple[str, ...]:
    whole = next((result for result in results if result.status == "skipped" and result.inputs is None), None)
    bad = next((result for result in results if result.status == "fail"), None)
    if whole and not bad:
        return (variant, "skipped", "-", "-", "-", "-", "-", whole.reason or "")
    batch = f", batch {bad.batch_size}" if bad and bad.batch_size else ""
    judged = [result for result in results if result.status != "skipped"]
    against_oracle = [result for result in judged if result.check in ("outputs", "decisions")]
    return (
        variant,
        "fail" if bad else "pass",
        f"{sum(result.status == 'pass' for result in judged)}/{len(judged)}",
        _worst((r.max_abs_error for r in against_oracle if r.inputs == against_oracle[0].inputs), max, "{:.2e}"),
        _worst((r.budget_used for r in judged), max, "{:.3g}"),
        _worst((r.top1_agreement for r in against_oracle), min, "{:.2%}"),
        (bad.first_divergent_layer if bad else None) or "-",
        f"{bad.inputs}{batch}: {bad.reason}" if bad and bad.inputs else (bad.reason or "" if bad else ""),
    )


def _worst(values: Iterable[float | None], pick: Callable[[list[float]], float], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(pick(known)) if known else "-"


def _dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
