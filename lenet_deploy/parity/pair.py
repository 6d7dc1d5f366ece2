"""One artifact against another where no weights are at hand: the same images through both, and what may differ between them.

See docs/decisions/0012-foreign-artifacts.md for what equal means here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from lenet_deploy.errors import DamagedFile, Unusable, first_line
from lenet_deploy.parity.check import run_batch
from lenet_deploy.parity.inputs import SEED
from lenet_deploy.parity.judge import Judgement, differ, within_range
from lenet_deploy.records import ParityResult
from lenet_deploy.runtimes import Session
from lenet_deploy.variants import Variant

STEP = 2.0**-17  # relative change of a pixel: far above float32's rounding, and small enough that scores follow in proportion
DRAWS = 4

Run: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """Images and what the reference makes of them.

    Attributes:
        name: as results show it.
        images: float32 (N, C, H, W).
        scores: float32 (N, scores).
        condition: float64 (N,), at least 1: how far an image's scores move, in shares of the largest, per relative change of its pixels.
    """

    name: str
    images: torch.Tensor
    scores: torch.Tensor
    condition: torch.Tensor

    @property
    def unfit(self) -> str | None:
        """Why nothing can be judged on it, or None."""
        finite = self.scores.isfinite().all(dim=1)
        if not finite.any():
            return "the reference itself gives NaN or infinite scores"
        return within_range("fp32", float(self.scores[finite].abs().max()), torch.inf, float(self.condition[finite].max()))


def reference_set(name: str, images: torch.Tensor, run: Run) -> ReferenceSet:
    """Run the reference on images, and on images moved a little, which shows how much each magnifies what rounding does.

    The weights cannot be moved, as the oracle's are: a graph that somebody else wrote has no known ones.
    """
    scores, generator = run(images), torch.Generator().manual_seed(SEED)
    largest = scores.double().abs().amax(dim=1).clamp_min(2.0**-1000)

    def drawn() -> torch.Tensor:
        moved = images * (1 + STEP * (2.0 * torch.randint(0, 2, images.shape, generator=generator) - 1))
        return (run(moved).double() - scores.double()).abs().amax(dim=1) / (STEP * largest)

    spread = torch.stack([drawn() for _ in range(DRAWS)]).square().mean(dim=0).sqrt()
    return ReferenceSet(name, images, scores, spread.nan_to_num(1.0, 1.0).clamp_min(1.0))


def in_batches(session: Session, images: torch.Tensor, size: int) -> torch.Tensor:
    """Scores (N, scores) on the CPU, in batches of `size` alone: the first images fill the last batch.

    Raises:
        DamagedFile: the artifact does not run on such a batch, or does not give scores for each image.
    """
    chosen = torch.arange(-(-len(images) // size) * size) % len(images)
    try:
        batches = [run_batch(session, images[part]) for part in chosen.split(size)]
    except Exception as error:  # whatever a runtime raises for a graph that does not take this batch
        raise DamagedFile(f"it does not run at batch {size}: {first_line(error)}") from None
    if batches[0].ndim < 2 or len(batches[0]) != size:
        raise DamagedFile(f"it gives {tuple(batches[0].shape)} for a batch of {size}, and not scores for each image")
    return torch.cat(batches)[: len(images)].flatten(1)


def check_against(
    sets: Sequence[ReferenceSet], variant: Variant, data: bytes, sizes: Sequence[int], tolerance: float, device: str | None = None
) -> tuple[ParityResult, ...]:
    """All results of one variant of the artifact that is judged, or one `skipped` result where this machine cannot run it.

    Args:
        data: the artifact's bytes.
        sizes: the whole of each set runs at the largest batch size, its first images at the others.
        tolerance: as in `judge.differ`.
        device: which CUDA device, for a variant on CUDA.
    """
    _, channels, height, width = sets[0].images.shape
    try:
        with variant.open_session(data, (channels, height, width), device) as session:
            return tuple(_results(sets, variant.name, session, sizes, tolerance))
    except Unusable as error:
        return (ParityResult(variant.name, "skipped", str(error)),)


def _results(
    sets: Sequence[ReferenceSet], variant: str, session: Session, sizes: Sequence[int], tolerance: float
) -> Iterator[ParityResult]:
    for inputs in sets:
        if inputs.unfit:
            yield ParityResult(variant, "skipped", inputs.unfit, inputs.name)
            continue
        for size in sizes:
            count = len(inputs.images) if size == max(sizes) else min(size, len(inputs.images))
            try:
                scores = in_batches(session, inputs.images[:count], size)
                judged = differ(scores, inputs.scores[:count], tolerance, inputs.condition[:count])
            except DamagedFile as error:
                judged = Judgement(False, str(error))
            yield ParityResult(
                variant,
                "pass" if judged.passed else "fail",
                judged.reason,
                inputs.name,
                size,
                judged.max_abs_error,
                judged.rmse,
                judged.budget_used,
                judged.top1_agreement,
                node_providers=session.node_providers,
                mean_abs_error=judged.mean_abs_error,
                max_rel_error=judged.max_rel_error,
                mean_rel_error=judged.mean_rel_error,
                cosine=judged.cosine,
                ulp_quantiles=judged.ulp_quantiles,
            )
