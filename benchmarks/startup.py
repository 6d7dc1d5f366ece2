"""How long `lenet-deploy COMMAND --help` takes, beside Python alone, in turn in one run: python benchmarks/startup.py [RUNS].

Prints a Markdown table: median and worst wall seconds of whole processes, and the ratio to `python -c pass`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from lenet_deploy.cli import COMMANDS

RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 11
CLI = [sys.executable, "-m", "lenet_deploy.cli"]
CASES = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "lenet-deploy --help": [*CLI, "--help"],
    **{f"lenet-deploy {command} --help": [*CLI, command, "--help"] for command in COMMANDS},
}


def wall_s(command: list[str]) -> float:
    """Seconds of one process, start to end."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


times: dict[str, list[float]] = {name: [] for name in CASES}
for run in range(RUNS + 1):
    for name, command in CASES.items():
        seconds = wall_s(command)
        if run:  # the first round fills the file cache
            times[name].append(seconds)

base = statistics.median(times["python -c pass"])
print(f"| command | median of {RUNS} | worst | ratio |\n| --- | ---: | ---: | ---: |")
for name, values in times.items():
    print(f"| `{name}` | {statistics.median(values):.3f} s | {max(values):.3f} s | {statistics.median(values) / base:.1f} |")
