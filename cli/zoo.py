"""`lenet-deploy zoo`."""

from __future__ import annotations

from typing import Annotated

import typer

from lenet_deploy.zoo import names

from .options import Json
from .output import check_outputs, emit, show


def zoo(
    name: Annotated[str | None, typer.Argument(help=f"Print its card: {', '.join(names())}.", show_default=False)] = None,
    json: Json = None,
) -> None:
    """List the trained weights that come with the package, or print the card of one."""
    check_outputs(json)
    from lenet_deploy import environment
    from lenet_deploy.report.zoo import card, zoo_table, zoo_values
    from lenet_deploy.store import zoo_json
    from lenet_deploy.zoo import load

    entries = tuple((each, load(each)) for each in ((name,) if name else names()))
    if name and json is None:
        show(card(name, entries[0][1]).rstrip())
        return
    emit(zoo_table(entries), lambda: zoo_json([zoo_values(*entry) for entry in entries], environment.capture()), json)
