"""LeNet-5 from training to deployment: export it, prove every export equal, measure each so that the numbers hold.

Importing this package imports no torch, onnx, onnxruntime or numpy; the functions import what they need.
"""

from lenet_deploy.api import ExportReport, ParityFailed, benchmark, check_pair, check_parity, export, probe
from lenet_deploy.bench_records import BenchReport, Measurement
from lenet_deploy.errors import BadInput, CannotWrite, GateFailed, Inconclusive, LenetDeployError, Unusable
from lenet_deploy.records import Environment, Failure, ParityReport, ParityResult
from lenet_deploy.sources import load

__version__ = "0.1.0"

__all__ = [
    "BadInput",
    "BenchReport",
    "CannotWrite",
    "Environment",
    "ExportReport",
    "Failure",
    "GateFailed",
    "Inconclusive",
    "LenetDeployError",
    "Measurement",
    "ParityFailed",
    "ParityReport",
    "ParityResult",
    "Unusable",
    "__version__",
    "benchmark",
    "check_pair",
    "check_parity",
    "export",
    "load",
    "probe",
]
