"""The reduced version of benchmarks/parity_power.py: every kind of fault once, and healthy variants beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def power(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("power") / "power.json"
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "parity_power.py"), "--quick", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=out.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_every_kind_of_fault_is_caught_wherever_it_was_injected(power: dict[str, Any]) -> None:
    injections = power["injections"]
    assert len({each["kind"] for each in injections}) >= 30
    assert {each["artifact"] for each in injections} >= {"onnx-fp32", "onnx-ts-fp32", "torchscript-trace-fp32", "torchscript-script-fp32"}
    assert [each for each in injections if not each["caught"]] == []


def test_faults_are_named_at_the_right_layer(power: dict[str, Any]) -> None:
    placed = [each for each in power["injections"] if each["layers"]]
    located = sum(each["located"] for each in placed)
    assert len(placed) >= 60
    assert located / len(placed) >= 0.95


def test_healthy_variants_raise_no_alarm(power: dict[str, Any]) -> None:
    clean = power["clean"]
    assert len(clean) >= 30
    assert [each for each in clean if each["failed"]] == []


def test_the_usual_tolerances_miss_faults_that_parity_catches(power: dict[str, Any]) -> None:
    real = [each for each in power["injections"] if each["above_rounding"]]
    assert any(each["caught"] and not each["allclose"] and not each["assert_close"] for each in real)
