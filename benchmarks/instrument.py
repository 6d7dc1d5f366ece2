"""Does the instrument measure right? python benchmarks/instrument.py BUNDLE [JSON] [--seconds N].

1. Sessions of known cost, which time their own launches: the engine's median beside theirs.
2. The same launches by the engine and by peers, turn by turn: torch.utils.benchmark on the eager and the TorchScript model, pyperf's
   `timeit` on the eager one in processes of its own, OpenVINO's `benchmark_app` and ONNX Runtime's own profile on the bundle's ONNX file.

Peers that are not installed are left out and named: `pip install pyperf openvino`. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lenet_deploy import environment
from lenet_deploy.bench.engine import Bench, Case
from lenet_deploy.bench.machine import Watch
from lenet_deploy.bench.plan import Plan
from lenet_deploy.bench.scopes import bench_images, bind
from lenet_deploy.bench.timing import timer_overhead_s
from lenet_deploy.bench_records import Measurement, Visit
from lenet_deploy.bundle import open_bundle
from lenet_deploy.order_statistics import median
from lenet_deploy.records import NodePlacement, Preprocessing
from lenet_deploy.report.bench import seconds
from lenet_deploy.report.table import Table, to_markdown
from lenet_deploy.report.tables import environment_line
from lenet_deploy.sources import artifact_of, bundle_source, bundle_variants, computing, open_session

GREY = Preprocessing(1, 4, 0, (0.0,), (1.0,))
LARGE = 64  # a batch at which the 10 us of a call from Python, which peers that time inside their library leave out, are below 1 %
TURNS, SLOW_TURNS = 9, 5  # of the engine and of a peer, one after the other; where the peer is a process of its own


class Known:
    """A session whose launches take what `cost` says and that times each by itself."""

    device = torch.device("cpu")
    node_providers: tuple[NodePlacement, ...] = ()
    settle_s = 0.0

    def __init__(self, cost: Callable[[int], None]) -> None:
        self.cost = cost
        self.durations: list[float] = []
        self.scores = torch.zeros(1)

    def bind(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, 1, 4, 4)

    def launch(self) -> torch.Tensor:
        start = time.perf_counter()
        self.cost(len(self.durations))
        self.durations.append(time.perf_counter() - start)
        return self.scores


class Nothing(Known):
    """Launches that do nothing and are not timed: what is measured is the engine."""

    def launch(self) -> torch.Tensor:
        return self.scores


def spin(duration_s: float) -> None:
    """Keep the core busy."""
    end = time.perf_counter() + duration_s
    while time.perf_counter() < end:
        pass


def costs() -> dict[str, Callable[[int], None]]:
    """What a launch may be like; the argument is the number of the launch."""
    draw = random.Random(0)
    return {
        "spin, 200 us": lambda number: spin(200e-6),
        "sleep, 1 ms": lambda number: time.sleep(1e-3),
        "heavy tail, from 100 us": lambda number: spin(100e-6 * draw.paretovariate(3)),
        "two modes, 150 and 220 us": lambda number: spin(150e-6 if draw.random() < 0.6 else 220e-6),
        "drift, from 150 us upwards": lambda number: spin(150e-6 * (1 + number / 8000)),
        "slow first 30 launches, from 3 ms down to 150 us": lambda number: spin(max(150e-6, 3e-3 * (1 - number / 30))),
    }


def plan(visit_s: float, rounds: int) -> Plan:
    """A case visited a fixed number of times."""
    return Plan("", "cpu", (), {}, ("device",), 1, rounds, True, visit_s, 2.0, 1e9, 0)


def engine(visit_s: float, rounds: int, send: Callable[[dict[str, Any]], None]) -> Bench:
    """The engine as a worker sets it up."""
    return Bench(plan(visit_s, rounds), send, Watch(torch.get_num_threads()), timer_overhead_s())


def known(cost: Callable[[int], None], visit_s: float) -> tuple[Measurement, list[float], int]:
    """What the engine says of a known session, what the session recorded of the same launches, and the warm-up."""
    session = Known(cost)
    recorded: list[float] = []
    sent: list[dict[str, Any]] = []

    def send(event: dict[str, Any]) -> None:
        sent.append(event)
        if event["event"] == "visit":  # on the CPU a visit's last launches are those that were timed
            recorded.extend(session.durations[-len(event["times_s"]) :])

    case = Case("known", session, torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "device", GREY, None)
    engine(visit_s, 10, send).run([case], 0)
    warmup = next(event["warmup_launches"] for event in sent if event["event"] == "case")
    return measurement(sent), recorded, warmup


def measurement(sent: Sequence[dict[str, Any]]) -> Measurement:
    """The visits of one case as a measurement."""
    seen = [event for event in sent if event["event"] == "visit"]
    told = next(event for event in sent if event["event"] == "case")
    visits = tuple(
        Visit(0, event["round"], len(event["times_s"]), len(event["single_times_s"]), event["window_images"], event["window_s"])
        for event in seen
    )
    times = tuple(itself for event in seen for itself in event["times_s"])
    singles = tuple(itself for event in seen for itself in event["single_times_s"])
    return Measurement(
        *("known", "cpu", 1, "device", times, told["launches_per_block"], visits, told["warmup_launches"], "rounds", 0, None),
        single_times_s=singles,
    )


def known_table(visit_s: float) -> tuple[Table, list[dict[str, Any]]]:
    """Part 1."""
    rows, stored = [], []
    for name, cost in costs().items():
        found, recorded, warmup = known(cost, visit_s)
        own = median(recorded)
        difference = found.median_s / own - 1
        stored.append({"session": name, "recorded_s": own, "reported_s": found.median_s, "warnings": found.warnings, "warmup": warmup})
        rows.append((name, seconds(own), seconds(found.median_s), f"{difference:+.2%}", str(warmup), "; ".join(found.warnings)))
    return Table(("session", "its own median", "reported", "difference", "warm-up launches", "warnings"), tuple(rows)), stored


def overhead_ns() -> float:
    """Nanoseconds that the engine itself adds to a launch."""
    sent: list[dict[str, Any]] = []
    case = Case("nothing", Nothing(lambda number: None), torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "device", GREY, None)
    engine(0.1, 6, sent.append).run([case], 0)
    return measurement(sent).median_s * 1e9


def turns(ours: Callable[[], float], theirs: Callable[[], float], count: int) -> tuple[list[float], list[float]]:
    """One after the other, so that both share what the machine does; the order changes from turn to turn."""
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(count):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            found[which].append((ours, theirs)[which]())
    return found


def by_engine(launch: Callable[[], object], visit_s: float, launches: int = 1, block_s: float = 0.0) -> float:
    """Median seconds of a visit, warmed up, by the engine's own calibration and blocks.

    Args:
        launches, block_s: of the peer's blocks: the median of their means is above that of single launches, whose distribution has a tail.
    """
    from lenet_deploy.bench.timing import calibrate, time_blocks

    found = calibrate(launch, 1.0, timer_overhead_s())
    return median(time_blocks(launch, max(found.launches_per_block, launches, round(block_s / found.launch_s)), visit_s))


def beside_torch(launch: Callable[[], object], visit_s: float) -> tuple[list[float], list[float]]:
    """The engine and torch.utils.benchmark on one launch, with its blocks."""
    from torch.utils.benchmark import Timer

    timer = Timer("launch()", globals={"launch": launch}, num_threads=torch.get_num_threads())
    block = timer.blocked_autorange(min_run_time=visit_s).number_per_run
    return turns(lambda: by_engine(launch, visit_s, block), lambda: timer.blocked_autorange(min_run_time=visit_s).median, TURNS)


PYPERF_SETUP = """
import torch
from lenet_deploy.bench.scopes import bench_images, bind
from lenet_deploy.bundle import open_bundle
from lenet_deploy.sources import bundle_source, bundle_variants, computing, open_session
from pathlib import Path
bundle = open_bundle(Path({path!r}))
state = computing("cpu", threads={threads})
state.__enter__()
held = open_session(bundle_source(bundle), bundle_variants(bundle, ({variant!r},))[0], "cpu")
spec = bundle.metadata.preprocessing
launch = bind(held.__enter__(), bench_images(1, spec), "device", spec, None).launch
"""


def by_pyperf(path: Path, variant: str, threads: int) -> float:
    """The same by `pyperf timeit`, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pyperf.json"
        setup = PYPERF_SETUP.format(path=str(path), variant=variant, threads=threads)
        command = [sys.executable, "-m", "pyperf", "timeit", "-q", "--processes", "3", "--inherit-environ", "PYTHONPATH,OMP_NUM_THREADS"]
        subprocess.run([*command, "-o", str(out), "-s", setup, "launch()"], check=True, capture_output=True, text=True)
        import pyperf

        return float(pyperf.Benchmark.load(str(out)).median())


class OpenVino:
    """The ONNX file in OpenVINO, as a session."""

    device = torch.device("cpu")
    node_providers: tuple[NodePlacement, ...] = ()
    settle_s = 0.0

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        model.reshape([LARGE, *shape])
        self.request = core.compile_model(model, "CPU", {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}).create_infer_request()
        self.shape = shape

    def bind(self, batch_size: int) -> torch.Tensor:
        import openvino

        self.images = torch.zeros(batch_size, *self.shape)
        self.request.set_input_tensor(openvino.Tensor(self.images.numpy(), shared_memory=True))
        return self.images

    def launch(self) -> torch.Tensor:
        self.request.infer()
        return self.images


def by_benchmark_app(path: Path, shape: tuple[int, int, int], visit_s: float) -> float:
    """The median latency that OpenVINO's own benchmark_app prints, one request after the other."""
    sizes = ",".join(map(str, (LARGE, *shape)))
    options = f"-d CPU -api sync -hint none -nstreams 1 -nthreads 1 -shape [{sizes}] -t {math.ceil(visit_s)}".split()
    command = [sys.executable, "-c", "from openvino.tools.benchmark.main import main; main()", "-m", str(path), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    value, unit = re.findall(r"Median:\s+([\d.]+) (us|ms)", done.stdout)[-1]
    return float(value) * {"us": 1e-6, "ms": 1e-3}[unit]


def by_ort_profile(data: bytes, shape: tuple[int, int, int], launches: int) -> tuple[float, float]:
    """Median `model_run` in ONNX Runtime's own profile, and the engine's of the very same launches."""
    from lenet_deploy.runtimes.onnxruntime import open_profiled

    with open_profiled(data, shape, "cpu") as (session, collect):
        images = bench_images(LARGE, Preprocessing(shape[0], shape[1], 0, (0.0,), (1.0,)))
        work = bind(session, images, "device", Preprocessing(shape[0], shape[1], 0, (0.0,), (1.0,)), None)
        from lenet_deploy.bench.timing import time_blocks

        for _ in range(50):
            work.launch()
        times: list[float] = []
        while len(times) < launches:
            times += time_blocks(work.launch, 1, 0.0)
        runs = [event["dur"] / 1e6 for event in collect() if event.get("name") == "model_run"]
    return median(runs[-launches:]), median(times)


@contextlib.contextmanager
def launched(bundle: Any, variant: str) -> Iterator[Callable[[], object]]:
    """A complete launch of a variant at batch 1."""
    spec = bundle.metadata.preprocessing
    with open_session(bundle_source(bundle), bundle_variants(bundle, (variant,))[0], "cpu") as session:
        yield bind(session, bench_images(1, spec), "device", spec, None).launch


def peer_table(path: Path, visit_s: float) -> tuple[Table, list[dict[str, Any]], list[str]]:
    """Part 2, inside `computing`."""
    bundle = open_bundle(path)
    shape = bundle.metadata.preprocessing.input_shape
    onnx = bundle_variants(bundle, ("onnx/ort-cpu/fp32",))[0]
    pairs: list[tuple[str, str, list[float], list[float]]] = []
    absent: list[str] = []
    for variant in ("eager/torch-cpu/fp32", "torchscript/torch-cpu/fp32/trace"):
        with launched(bundle, variant) as launch:
            pairs.append((variant, "torch.utils.benchmark", *beside_torch(launch, visit_s)))
    if importlib.util.find_spec("pyperf"):
        with launched(bundle, "eager/torch-cpu/fp32") as launch:
            threads = torch.get_num_threads()
            both = turns(
                lambda: by_engine(launch, 2 * visit_s, block_s=0.1), lambda: by_pyperf(path, "eager/torch-cpu/fp32", threads), SLOW_TURNS
            )
            pairs.append(("eager/torch-cpu/fp32", "pyperf timeit", *both))
    else:
        absent.append("pyperf")
    if importlib.util.find_spec("openvino"):
        file = path / artifact_of(bundle, onnx).path
        spec = bundle.metadata.preprocessing
        launch = bind(OpenVino(file, shape), bench_images(LARGE, spec), "device", spec, None).launch
        both = turns(lambda: by_engine(launch, visit_s), lambda: by_benchmark_app(file, shape, visit_s), SLOW_TURNS)
        pairs.append((f"model.onnx in OpenVINO, batch {LARGE}", "benchmark_app", *both))
    else:
        absent.append("openvino")
    data = bundle.read(artifact_of(bundle, onnx))
    profiled = [by_ort_profile(data, shape, 300) for _ in range(TURNS)]
    pairs.append(
        (f"onnx/ort-cpu/fp32, batch {LARGE}", "ONNX Runtime's profile", [ours for _, ours in profiled], [theirs for theirs, _ in profiled])
    )
    rows, stored = [], []
    for what, peer, ours, theirs in pairs:
        own, other = statistics.median(ours), statistics.median(theirs)
        stored.append({"what": what, "peer": peer, "engine_s": ours, "peer_s": theirs})
        rows.append((what, peer, seconds(own), seconds(other), f"{own / other - 1:+.1%}", str(len(ours))))
    return Table(("what", "peer", "engine", "peer's median", "difference", "turns"), tuple(rows)), stored, absent


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("json", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one, since these launches gain nothing from more")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # for pyperf's processes
    with computing("cpu", threads=given.threads):
        table, sessions = known_table(given.seconds / 5)
        cost = overhead_ns()
        print(f"{to_markdown(table)}\n\nThe engine itself adds {cost:.0f} ns to a launch.\n")
        table, peers, absent = peer_table(given.bundle.resolve(), given.seconds)
        print(to_markdown(table))
        captured = environment.capture()
    for name in absent:
        print(f"\nnot installed, so not compared: {name}")
    print(f"\n{environment_line(captured)}")
    if given.json:
        body = {"sessions": sessions, "overhead_ns": cost, "peers": peers, "environment": dataclasses.asdict(captured)}
        given.json.write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
