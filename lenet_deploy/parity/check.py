"""The parity run: each variant opened once, on every input set at every batch size."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lenet_deploy.checkpoint import Checkpoint
from lenet_deploy.devices import synchronise
from lenet_deploy.errors import DamagedFile, Misplaced, Unusable, first_line
from lenet_deploy.parity.drill import Healthy, first_divergent, trace_errors
from lenet_deploy.parity.inputs import EAGER, SEED, InputSet
from lenet_deploy.parity.judge import Judgement, agree, decide, judge, weigh, within_range
from lenet_deploy.records import Decisions, LayerError, ParityResult
from lenet_deploy.runtimes import Session
from lenet_deploy.runtimes.eager import trace_module
from lenet_deploy.variants import Variant

BATCH_SIZES = (1, 2, 3, 7, 64, 1024)
ALONE = 16  # images that are also run one by one
TRACED = 64  # images that are traced layer by layer: the worst and its neighbours
SPECIALS = (("NaN", torch.nan), ("infinity", torch.inf))


@dataclass(frozen=True, eq=False)
class Trial:
    """What all variants of one run are put through.

    Attributes:
        inputs: the first is the labelled test split.
        batch_sizes: the whole of each input set runs at the largest, its first images at the others.
        checkpoint: whose function it is.
        drill: trace each variant, whether it fails or not.
        allow_tf32: judge float32 on CUDA by TF32's tolerance.
        foreign: the artifacts may be of another architecture, so that a trace of their layers may fail in any way.
    """

    inputs: tuple[InputSet, ...]
    batch_sizes: tuple[int, ...]
    checkpoint: Checkpoint
    drill: bool = False
    allow_tf32: bool = False
    foreign: bool = False

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an input."""
        _, channels, height, width = self.inputs[0].images.shape
        return (channels, height, width)

    def healthy(self, images: torch.Tensor, precision: str, condition: torch.Tensor) -> Healthy:
        """What the layers of a variant in that precision should be on `images`."""
        oracle = trace_module(self.checkpoint.module().double(), images.double())
        eager = trace_module(EAGER[precision](self.checkpoint.module()), images) if precision in EAGER else None
        return Healthy(oracle, eager, self.checkpoint.config.layers(), precision, condition)

    def precision(self, variant: Variant) -> str:
        """The tolerance that a variant is judged by: a key of TOLERANCES, or int8."""
        return "tf32" if self.allow_tf32 and variant.device == "cuda" and variant.precision == "fp32" else variant.precision


def run_batch(session: Session, images: torch.Tensor) -> torch.Tensor:
    """One launch: float32 (N, C, H, W) in host memory to scores (N, classes), copied to host memory."""
    session.bind(len(images)).copy_(images)
    output = session.launch()
    synchronise(session.device)
    return output.to("cpu", copy=True)


@dataclass(frozen=True, eq=False)
class _Finding:
    """A result, and the image of an input set that shows it best; no input set where there is nothing to trace."""

    result: ParityResult
    inputs: InputSet | None = None
    worst: int = 0


def check_variant(variant: Variant, data: bytes, trial: Trial, device: str | None = None) -> tuple[ParityResult, ...]:
    """All results of one variant: judged, or one `skipped` result where this machine cannot run it.

    Args:
        data: the artifact's verified bytes.
        device: which CUDA device, for a variant on CUDA.

    An artifact whose bytes are the manifest's but that its runtime cannot parse or run is a `fail`, not an error. So is a node
    elsewhere than asked.
    """
    try:
        with variant.open_session(data, trial.input_shape, device) as session:
            findings = tuple(_Run(variant, session, trial).findings())
    except Misplaced as error:
        return (ParityResult(variant.name, "fail", str(error), "placement", check="placement", node_providers=error.placement),)
    except Unusable as error:
        return (ParityResult(variant.name, "skipped", str(error)),)
    except DamagedFile as error:
        return (ParityResult(variant.name, "fail", f"the artifact cannot be opened: {error}"),)
    return _traced(findings, variant, data, trial, device)


class _Run:
    """Every check of one variant on one session."""

    def __init__(self, variant: Variant, session: Session, trial: Trial) -> None:
        self._variant = variant
        self._session = session
        self._trial = trial
        self._precision = trial.precision(variant)
        self._dynamic = self._precision == "int8-dynamic"
        self._several = tuple(size for size in trial.batch_sizes if size > 1)

    def findings(self) -> Iterator[_Finding]:
        if self._session.node_providers:  # a session that opened runs where it was asked to, or it would have raised Misplaced
            yield self._finding("placement", "placement", None, Judgement(True))
        for inputs in self._trial.inputs:
            reason = within_range(self._precision, inputs.peak, inputs.smallest, float(inputs.condition(self._precision).max()))
            if reason:
                yield self._skipped("outputs", inputs.name, reason)
            else:
                yield from self._on(inputs)
        yield from self._permuted(self._trial.inputs[0])
        yield from self._isolated(self._trial.inputs[0])

    def _on(self, inputs: InputSet) -> Iterator[_Finding]:
        count, largest = len(inputs.images), max(self._trial.batch_sizes)
        alone = self._launch(inputs.images[torch.arange(ALONE) % count], 1) if self._several and not self._dynamic else ""
        for size in self._trial.batch_sizes:
            # The whole set at the largest size, so that every image is judged; its first images fill the last batch.
            chosen = torch.arange(-(-count // size) * size if size == largest else size) % count
            scores = self._launch(inputs.images[chosen], size)
            yield self._finding("outputs", inputs.name, size, self._judged(scores, inputs, chosen), inputs)
            if inputs.labels is not None and size == largest:
                yield from self._decided(scores, inputs, size)
            if size > 1 and isinstance(alone, torch.Tensor) and isinstance(scores, torch.Tensor):
                first = min(len(chosen), ALONE)
                agreed = self._agreed(scores[:first], alone[:first], inputs, chosen[:first])
                yield self._finding("consistency", inputs.name, size, agreed, inputs)
        if self._dynamic and self._several:
            yield self._skipped("consistency", inputs.name, "dynamic int8 scales by the whole batch, so an image's scores depend on it")

    def _decided(self, scores: torch.Tensor | str, inputs: InputSet, size: int) -> Iterator[_Finding]:
        labels = inputs.labels
        if labels is None or isinstance(scores, str) or scores[: len(labels)].shape != inputs.oracle.shape or not scores.isfinite().all():
            return  # its outputs have failed already
        decisions = decide(scores[: len(labels)], inputs.oracle, labels, self._precision)
        yield self._finding("decisions", inputs.name, size, weigh(decisions, self._precision), inputs, decisions)

    def _permuted(self, inputs: InputSet) -> Iterator[_Finding]:
        for size in self._several:
            chosen = torch.arange(size) % len(inputs.images)
            order = torch.randperm(size, generator=torch.Generator().manual_seed(SEED))
            straight, permuted = self._launch(inputs.images[chosen], size), self._launch(inputs.images[chosen[order]], size)
            if isinstance(straight, torch.Tensor) and len(straight) == size:  # where not, its outputs have failed already
                agreed = self._agreed(permuted, straight[order], inputs, chosen[order])
                yield self._finding("permutation", "permuted batch", size, agreed, inputs)

    def _isolated(self, inputs: InputSet) -> Iterator[_Finding]:
        for name, value in SPECIALS:
            what = f"{name} in one image"
            if self._dynamic:
                yield self._skipped("isolation", what, "dynamic int8 scales by the whole batch, so one image reaches the others")
                continue
            for size in self._several:
                chosen, poisoned = torch.arange(size) % len(inputs.images), size // 2
                images = inputs.images[chosen]
                images[poisoned] = value
                scores, others = self._launch(images, size), torch.arange(size) != poisoned
                if isinstance(scores, torch.Tensor) and len(scores) == size:
                    scores = scores[others]
                yield self._finding("isolation", what, size, self._judged(scores, inputs, chosen[others]))

    def _launch(self, images: torch.Tensor, size: int) -> torch.Tensor | str:
        """Scores of `images` in batches of `size`; what the runtime said where it refused."""
        try:
            return torch.cat([run_batch(self._session, batch) for batch in images.split(size)])
        except Exception as error:  # whatever a runtime raises for a graph that does not take this batch
            return f"it does not run at batch {size}: {first_line(error)}"

    def _judged(self, scores: torch.Tensor | str, inputs: InputSet, chosen: torch.Tensor) -> Judgement:
        if isinstance(scores, str):
            return Judgement(False, scores)
        eager = inputs.eager_rmse(self._precision)
        judged = judge(
            scores,
            inputs.oracle[chosen],
            self._precision,
            None if eager is None else eager[chosen],
            inputs.condition(self._precision)[chosen],
        )
        return dataclasses.replace(judged, worst=int(chosen[judged.worst]))

    def _agreed(self, scores: torch.Tensor | str, others: torch.Tensor, inputs: InputSet, chosen: torch.Tensor) -> Judgement:
        if isinstance(scores, str):
            return Judgement(False, scores)
        judged = agree(scores, others, inputs.oracle[chosen], self._precision, inputs.condition(self._precision)[chosen])
        return dataclasses.replace(judged, worst=int(chosen[judged.worst]))

    def _skipped(self, check: str, inputs: str, reason: str) -> _Finding:
        return _Finding(ParityResult(self._variant.name, "skipped", reason, inputs, check=check))

    def _finding(
        self,
        check: str,
        name: str,
        size: int | None,
        judged: Judgement,
        inputs: InputSet | None = None,
        decisions: Decisions | None = None,
    ) -> _Finding:
        result = ParityResult(
            self._variant.name,
            "pass" if judged.passed else "fail",
            judged.reason,
            name,
            size,
            judged.max_abs_error,
            judged.rmse,
            judged.budget_used,
            judged.top1_agreement,
            node_providers=self._session.node_providers,
            check=check,
            mean_abs_error=judged.mean_abs_error,
            max_rel_error=judged.max_rel_error,
            mean_rel_error=judged.mean_rel_error,
            cosine=judged.cosine,
            ulp_quantiles=judged.ulp_quantiles,
            decisions=decisions,
        )
        return _Finding(result, inputs, judged.worst)


def _traced(findings: Sequence[_Finding], variant: Variant, data: bytes, trial: Trial, device: str | None) -> tuple[ParityResult, ...]:
    """The results, those that failed with the layer where it begins; one of each input set with all its layers."""
    wanted: dict[str, tuple[InputSet, int]] = {}
    failed: set[str] = set()
    for finding in findings:
        if finding.inputs is not None and (finding.result.status == "fail" or (trial.drill and finding.inputs is trial.inputs[0])):
            if finding.inputs.name not in failed:
                wanted[finding.inputs.name] = (finding.inputs, finding.worst)
            if finding.result.status == "fail":
                failed.add(finding.inputs.name)
    traces = _layer_errors(wanted, variant, data, trial, device) if wanted else {}
    results, shown = [], set()
    for finding in findings:
        result, errors = finding.result, traces.get(finding.inputs.name, ()) if finding.inputs else ()
        if errors and finding.inputs and finding.inputs.name not in shown and (result.status == "fail" or trial.drill):
            shown.add(finding.inputs.name)
            result = dataclasses.replace(result, layers=errors)
        divergent = first_divergent(errors) if result.status == "fail" else None
        if divergent:
            layer, sentence = divergent
            result = dataclasses.replace(result, first_divergent_layer=layer, reason=f"{result.reason}; {sentence}")
        results.append(result)
    return tuple(results)


def _layer_errors(
    wanted: Mapping[str, tuple[InputSet, int]], variant: Variant, data: bytes, trial: Trial, device: str | None
) -> dict[str, tuple[LayerError, ...]]:
    """The layers of a variant on some images of each input set, the worst among them; none where they cannot be seen."""
    found: dict[str, tuple[LayerError, ...]] = {}
    precision = trial.precision(variant)
    expected = (Exception,) if trial.foreign else (Unusable, DamagedFile)
    with contextlib.suppress(*expected), variant.open_traces(data, trial.input_shape, device) as traces:
        for name, (inputs, worst) in wanted.items():
            block = slice(worst // TRACED * TRACED, worst // TRACED * TRACED + TRACED)
            images = inputs.images[block]
            taps = {}
            for graph, trace in traces.items():
                with contextlib.suppress(Exception):  # a graph that does not take this batch; its result says so
                    taps[graph] = trace(images)
            found[name] = trace_errors(taps, trial.healthy(images, precision, inputs.condition(precision)[block]))
    return found
