"""`lenet-deploy inspect`."""

from __future__ import annotations

import dataclasses

from .options import Json, Set, What, settings
from .output import emit


def inspect(what: What = "lenet5", set_: Set = None, json: Json = None) -> None:
    """Print the layer table: output shape by the formula, kernel, stride, padding, parameters, MACs, bytes."""
    from lenet_deploy import environment
    from lenet_deploy.models import MODELS, find_model
    from lenet_deploy.report.tables import layer_table
    from lenet_deploy.store import dump

    origin: tuple[str, ...] = ()
    if what in (model.name for model in MODELS):  # needs no torch
        name, config = what, find_model(what).configured(settings(set_))
        described = f"{what}: {find_model(what).summary}" if not set_ else f"{what} with {', '.join(set_)}"
    else:
        from lenet_deploy.sources import open_source

        source = open_source(what, settings=settings(set_))
        origin = source.origin()
        name, described = source.known.model, f"{source.described}: {source.known.model}"
        config = find_model(name).config_from(source.known.config)
    layers = config.layers()
    shape = (config.in_channels, config.image_size, config.image_size)
    body = {
        "model": name,
        "config": dataclasses.asdict(config),
        "layers": [
            {**dataclasses.asdict(layer), "parameter_bytes": layer.parameter_bytes, "output_bytes": layer.output_bytes} for layer in layers
        ],
        "origin": list(origin),
    }
    emit(layer_table(shape, layers), lambda: dump("inspect", 1, environment.capture(), body), json, None, described, *origin)
