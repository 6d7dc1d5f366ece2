"""The weights in an artifact beside the checkpoint's: read back without running anything, compared bit for bit.

A wrong weight behind a dead ReLU changes no score of any image at hand, and one that is slightly off hides below every tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lenet_deploy.errors import DamagedFile
from lenet_deploy.exporters.tensors import TensorFault, verify
from lenet_deploy.models import MODELS
from lenet_deploy.records import ParityResult
from lenet_deploy.variants import Variant

INPUTS = "weights read back"
SHOWN = 3  # faults that a reason spells out; one wrong export often touches every tensor

# Those of every model: an artifact can fold no other number into a weight and call it an export.
FACTORS = tuple(dict.fromkeys(factor for model in MODELS for factor in model.factors))


def check_weights(variant: Variant, data: bytes, details: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> ParityResult | None:
    """Whether an artifact holds the checkpoint's tensors, changed by nothing but what its export recorded.

    Args:
        data: the artifact's verified bytes.
        details: its entry in the manifest, whose `tensors` are the records.
        weights: the checkpoint's tensors.

    Returns:
        None where the format does not expose its tensors.
    """
    load = variant.artifact.reader
    if load is None:
        return None
    if "tensors" not in details:
        return _result(variant, "the manifest does not say what became of the weights, an older version wrote it; export the bundle again")
    try:
        tensors = load()(data)
    except DamagedFile as error:
        return _result(variant, f"its tensors cannot be read back: {error}")
    faults = verify(weights, tensors, details["tensors"], FACTORS, lossless=variant.precision == "fp32")
    layer = next((fault.layer for fault in faults if fault.layer), None)
    return _result(variant, _reason(faults) if faults else None, layer)


def _result(variant: Variant, reason: str | None, layer: str | None = None) -> ParityResult:
    status = "fail" if reason else "pass"
    return ParityResult(variant.name, status, reason, INPUTS, first_divergent_layer=layer, check="weights")


def _reason(faults: Sequence[TensorFault]) -> str:
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return f"{len(faults)} wrong in its tensors: {'; '.join(map(str, faults[:SHOWN]))}{more}"
