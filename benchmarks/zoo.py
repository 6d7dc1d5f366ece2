"""Put a training run into the zoo: python benchmarks/zoo.py NAME RUN.

RUN is the folder that `lenet-deploy train` wrote, NAME an entry of `lenet_deploy.zoo.ZOO`. Writes the checkpoint and its card.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lenet_deploy import zoo
from lenet_deploy.checkpoint import from_bytes
from lenet_deploy.report.zoo import card

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("name", choices=zoo.names())
parser.add_argument("run", type=Path)
arguments = parser.parse_args()

entry = next(entry for entry in zoo.ZOO if entry.name == arguments.name)
data = (arguments.run / "checkpoint.safetensors").read_bytes()
checkpoint = from_bytes(data, str(arguments.run))
assert (checkpoint.model, checkpoint.dataset) == (entry.model, entry.dataset), "the run is of another model or other data"
folder = Path(zoo.__file__).parent
(folder / entry.file).write_bytes(data)
(folder / f"{entry.name}.md").write_text(card(entry.name, checkpoint))
