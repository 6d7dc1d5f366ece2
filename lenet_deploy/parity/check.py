"""The parity run: each variant opened once, on every input set at every batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lenet_deploy.devices import synchronise
from lenet_deploy.errors import DamagedFile, Unusable, first_line
from lenet_deploy.parity.inputs import InputSet
from lenet_deploy.parity.judge import Judgement, judge
from lenet_deploy.records import ParityResult
from lenet_deploy.runtimes import Session
from lenet_deploy.variants import Variant

BATCH_SIZES = (1, 2, 3, 64)


def run_batch(session: Session, images: torch.Tensor) -> torch.Tensor:
    """One launch: float32 (N, C, H, W) in host memory to scores (N, classes), copied to host memory."""
    session.bind(len(images)).copy_(images)
    output = session.launch()
    synchronise(session.device)
    return output.to("cpu", copy=True)


def check_variant(
    variant: Variant,
    data: bytes,
    inputs: Sequence[InputSet],
    batch_sizes: Sequence[int],
    device: str | None = None,
) -> tuple[ParityResult, ...]:
    """All results of one variant: judged, or one `skipped` result where this machine cannot run it.

    Args:
        data: the artifact's verified bytes.
        inputs: at least as many images each as the largest batch size.
        device: which CUDA device, for a variant on CUDA.

    An artifact whose bytes are the manifest's but that its runtime cannot parse or run is a `fail`, not an error.
    """
    shape = inputs[0].images.shape
    try:
        with variant.open_session(data, (shape[1], shape[2], shape[3]), device) as session:
            return tuple(_judged(variant, session, inputs, batch_sizes))
    except Unusable as error:
        return (ParityResult(variant.name, "skipped", str(error)),)
    except DamagedFile as error:
        return (ParityResult(variant.name, "fail", f"the artifact cannot be opened: {error}"),)


def _judged(variant: Variant, session: Session, inputs: Sequence[InputSet], batch_sizes: Sequence[int]) -> Iterator[ParityResult]:
    for each in inputs:
        for size in batch_sizes:
            verdict = _verdict(session, each, size, variant.precision)
            yield ParityResult(
                variant.name,
                "pass" if verdict.passed else "fail",
                verdict.reason,
                each.name,
                size,
                verdict.max_abs_error,
                verdict.rmse,
                verdict.budget_used,
                verdict.top1_agreement,
                node_providers=session.node_providers,
            )


def _verdict(session: Session, inputs: InputSet, size: int, precision: str) -> Judgement:
    try:
        output = run_batch(session, inputs.images[:size])
    except Exception as error:  # whatever a runtime raises for a graph that does not take this batch
        return Judgement(False, f"it does not run at batch {size}: {first_line(error)}")
    return judge(output, inputs.oracle[:size], precision)
