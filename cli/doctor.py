"""`lenet-deploy doctor`."""

from __future__ import annotations

from .options import Json
from .output import check_outputs, emit


def doctor(json: Json = None) -> None:
    """Say what this machine can run, what it cannot, why, and the exact fix."""
    check_outputs(json)
    from lenet_deploy import api, environment
    from lenet_deploy.report.tables import doctor_table, environment_line
    from lenet_deploy.store import doctor_json

    statuses = api.doctor()
    captured = environment.capture()
    emit(doctor_table(statuses), lambda: doctor_json(statuses, captured), json, None, environment_line(captured))
