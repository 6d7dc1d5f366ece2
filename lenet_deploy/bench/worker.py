"""A fresh process that measures: `python -m lenet_deploy.bench.worker`, a request on standard input, events on standard output.

Each event is one line of JSON. What libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lenet_deploy import environment
from lenet_deploy.bench import nvml
from lenet_deploy.bench.coordinator import KINDS
from lenet_deploy.errors import DamagedFile, LenetDeployError, Unusable

if TYPE_CHECKING:
    import torch

    from lenet_deploy.bench.engine import Send
    from lenet_deploy.bench.plan import Plan

COLD_LIMIT_S = 2.0  # for a cold variant to become steady


def measure(plan: Plan, process: int, send: Send) -> None:
    """Open the plan's variants, visit every case, and send what there is to know."""
    import torch

    from lenet_deploy.bench.engine import Bench, Case
    from lenet_deploy.bench.machine import Watch
    from lenet_deploy.bench.roofline import measure_limit
    from lenet_deploy.bench.run import digest_of
    from lenet_deploy.bench.scopes import bench_images, stream_of
    from lenet_deploy.bench.timing import timer_overhead_s
    from lenet_deploy.sources import computing, device_of, open_path, open_session
    from lenet_deploy.variants import select_variants

    source = open_path(plan.what, plan.input_shape)
    variants = select_variants(plan.variants, source.variants)
    if plan.digest not in (None, digest_of(source, variants)):
        raise DamagedFile(f"{plan.what}: it was replaced while it was measured; run the bench again")
    images = {}

    def batch(size: int) -> torch.Tensor:
        if size not in images:
            images[size] = bench_images(size, source.input)
        return images[size]

    with contextlib.ExitStack() as stack:
        stack.enter_context(computing(plan.device, plan.allow_tf32, plan.threads))
        # Before anything of ours loads the device.
        watch = stack.enter_context(Watch.over({torch.device(device_of(variant, plan.device) or variant.device) for variant in variants}))
        sessions = {}
        for variant in variants:
            try:
                sessions[variant.name] = stack.enter_context(open_session(source, variant, plan.device, plan.ort))
            except Unusable as error:
                send({"event": "skipped", "variant": variant.name, "reason": str(error)})
                continue
            nodes = [[node.node, node.provider] for node in sessions[variant.name].node_providers]
            send({"event": "opened", "variant": variant.name, "device": str(sessions[variant.name].device), "nodes": nodes})
        send({"event": "environment", **dataclasses.asdict(environment.capture())})
        if not sessions:
            return
        bench = Bench(plan, send, watch, timer_overhead_s())

        def case(name: str, size: int, scope: str) -> Case:
            session = sessions[name]
            return Case(name, session, batch(size), scope, source.input, stream_of(session.device))

        # In each process, since a disturbance makes a limit less: the best of all counts.
        for device in dict.fromkeys(session.device for session in sessions.values()):
            limit = measure_limit(device, ("fp32", "tf32") if plan.allow_tf32 else ("fp32",))
            send({"event": "limit", **dataclasses.asdict(limit)})
        if process == 0:
            for name, session in sessions.items():
                if session.device.type == "cpu":  # on CUDA it is the time to enqueue, which every visit measures
                    with contextlib.suppress(Exception):  # the visits of a variant that fails say why
                        send({"event": "overhead", "variant": name, "seconds": bench.overhead(case(name, 1, "device"))})
        sizes = {name: plan.batch_sizes.get(name) for name in sessions}
        for name, found in sizes.items():
            if found is None:
                try:
                    sizes[name] = bench.sweep(lambda size, name=name: case(name, size, "device"))  # type: ignore[misc]
                except Exception as error:
                    bench.fail(case(name, 1, "device"), error)
                    sizes[name] = ()
                send({"event": "sizes", "variant": name, "sizes": sizes[name]})
        cases = [case(name, size, scope) for name in sessions for size in sizes[name] or () for scope in plan.scopes]
        send({"event": "cases", "count": len(cases)})
        bench.fitted(cases).run(cases, process)
        send({"event": "machine", **dataclasses.asdict(watch.state(process))})


def start_cold(plan: Plan, name: str, spawned_s: float, began_s: float, send: Send) -> None:
    """How long one variant takes to its first answer in this fresh process, and the memory that it needs.

    Args:
        spawned_s, began_s: when the parent started this process and when its own code began, by the clock that all processes share.
    """
    import torch

    from lenet_deploy.bench.scopes import bench_images, bind, stream_of
    from lenet_deploy.bench.timing import calibrate, timer_overhead_s
    from lenet_deploy.sources import computing, device_of, open_path, open_session
    from lenet_deploy.variants import select_variants

    source = open_path(plan.what, plan.input_shape)
    variant = select_variants((name,), source.variants)[0]
    source.read(variant)  # into the system's cache, for every variant alike
    variant.runtime.load()
    device = device_of(variant, plan.device) or variant.device
    imported_s = time.monotonic()
    # A variant on the CPU does not pay for a GPU's context.
    with nvml.opened({torch.device(device)}) as gpu, computing(device, plan.allow_tf32, plan.threads):
        used_before = nvml.memory_used_bytes(gpu)
        with open_session(source, variant, plan.device, plan.ort) as session:
            loaded_s = time.monotonic()
            stream = stream_of(session.device)
            work = bind(session, bench_images(source.batch_size or 1, source.input), "device", source.input, stream)
            bound_s = time.monotonic()
            work.launch()
            first_s = time.monotonic()
            steady = calibrate(work.launch, COLD_LIMIT_S, timer_overhead_s()).steady
            steady_s = time.monotonic()
            size = max(itertools.chain((source.batch_size or 1,), *plan.batch_sizes.values()))
            bind(session, bench_images(size, source.input), "device", source.input, stream).launch()
            send(
                {
                    "event": "cold",
                    "variant": name,
                    "import_s": imported_s - began_s,
                    "load_s": loaded_s - imported_s,
                    "first_s": first_s - bound_s,
                    "steady_s": steady_s - first_s if steady else None,
                    "total_s": first_s - (bound_s - loaded_s) - spawned_s,
                    "batch_size": size,
                    "peak_memory_bytes": peak_memory_bytes(session.device, gpu, used_before),
                }
            )


def peak_memory_bytes(device: torch.device, gpu: nvml.Device | None, before: int | None) -> int | None:
    """Most memory that this process held: of the machine, or what of the GPU is used now and was not before; None where NVML is silent."""
    if device.type == "cuda":
        now = nvml.memory_used_bytes(gpu)
        return None if now is None or before is None else now - before
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


@contextlib.contextmanager
def events() -> Iterator[Send]:
    """Send to the standard output that this process was given; from now on what is printed goes to standard error."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def send(event: dict[str, Any]) -> None:
            out.write(json.dumps(event) + "\n")
            out.flush()

        yield send


def main() -> None:
    """Answer the request on standard input; an error of ours becomes an event."""
    from lenet_deploy.bench.plan import plan_from_json

    began_s = time.monotonic()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what becomes of this process
    request = json.loads(sys.stdin.read())
    plan = plan_from_json(request["plan"])
    with events() as send:
        try:
            if "cold" in request:
                start_cold(plan, request["cold"], request["spawned_s"], began_s, send)
            else:
                measure(plan, request["process"], send)
        except LenetDeployError as error:
            kind = next(kind for kind in KINDS if isinstance(error, kind))
            send({"event": "error", "kind": KINDS.index(kind), "message": str(error)})
        else:
            send({"event": "done"})


if __name__ == "__main__":
    main()
