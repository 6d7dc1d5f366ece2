"""What a bench run is asked to do, as plain values that travel to its worker processes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from lenet_deploy.errors import UnknownName

SCOPES = ("device", "e2e")


@dataclass(frozen=True)
class Profile:
    """How much time a bench may take.

    Attributes:
        batch_sizes: what `--batch` defaults to.
        processes: fresh worker processes.
        rounds: visits of every case in each process, at least.
        visit_s: seconds of timed launches in one visit.
        warmup_s: longest warm-up of a case in one process.
        limit_s: seconds of all processes together, from which on no further round begins.
        core_only: leave out variants that are not core.
        cold_start: measure each variant's first answer in a process of its own.
    """

    name: str
    batch_sizes: tuple[int, ...]
    processes: int
    rounds: int
    visit_s: float
    warmup_s: float
    limit_s: float
    core_only: bool
    cold_start: bool


# Six rounds are the fewest that have a 95 % interval of their own. Launches back to back, from which throughput comes, last at least
# 0.5 s altogether in each process (nvbench's least): 6 x 0.084 s in `quick`, 6 x 0.2 s in `full`.
PROFILES: tuple[Profile, ...] = (
    Profile("quick", (1, 8, 64), 1, rounds=6, visit_s=0.084, warmup_s=0.2, limit_s=20.5, core_only=True, cold_start=False),
    Profile("full", (1, 8, 64, 512), 3, rounds=6, visit_s=0.2, warmup_s=1.0, limit_s=240.0, core_only=False, cold_start=True),
)


@dataclass(frozen=True)
class Plan:
    """One bench run.

    Attributes:
        what: path of a bundle's folder or of a file.
        variants: names, in order.
        batch_sizes: by variant; empty where a sweep is to find them.
        fixed: exactly `rounds` rounds, whatever the stop rule and the limit say.
        blocks: launches per block of (variant, batch size, scope), as an earlier process of the run found them.
        input_shape: (C, H, W) of a file that does not say; None where it does.
        digest: of all bytes that are to be measured, so that every process measures the same.
        threads: intra-op threads; torch's own number where None.
        ort: session options for ONNX Runtime.
    """

    what: str
    device: str
    variants: tuple[str, ...]
    batch_sizes: Mapping[str, tuple[int, ...]]
    scopes: tuple[str, ...]
    processes: int
    rounds: int
    fixed: bool
    visit_s: float
    warmup_s: float
    limit_s: float
    seed: int
    threads: int | None = None
    allow_tf32: bool = False
    ort: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[tuple[str, int, str, int], ...] = ()
    input_shape: tuple[int, int, int] | None = None
    digest: str | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))


def plan_from_json(text: str) -> Plan:
    """The plan that `Plan.to_json` wrote."""
    values = json.loads(text)
    sizes = {name: tuple(each) for name, each in values["batch_sizes"].items()}
    blocks = tuple(tuple(each) for each in values["blocks"])
    variants, scopes = tuple(values["variants"]), tuple(values["scopes"])
    shape = values["input_shape"] and tuple(values["input_shape"])
    given = {"batch_sizes": sizes, "variants": variants, "scopes": scopes, "blocks": blocks, "input_shape": shape}
    return Plan(**{**values, **given})


def find_profile(name: str) -> Profile:
    """The profile of that name; raises UnknownName."""
    for profile in PROFILES:
        if profile.name == name:
            return profile
    raise UnknownName("profile", name, (profile.name for profile in PROFILES))
