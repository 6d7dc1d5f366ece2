"""ONNX Runtime's session options as a user gives them: text, by name.

A name without a dot is an attribute of onnxruntime.SessionOptions, as in `graph_optimization_level=ORT_ENABLE_BASIC`. A name with dots is a
session configuration entry, as in `session.intra_op.allow_spinning=0`; ONNX Runtime looks up those that it knows and does not say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lenet_deploy.errors import BadInput, UnknownName, first_line

# Those that decide how a graph is optimised and run. The others name files, logs and profiles, which are not a session's own business here.
ATTRIBUTES = (
    "enable_cpu_mem_arena",
    "enable_mem_pattern",
    "enable_mem_reuse",
    "execution_mode",
    "execution_order",
    "graph_optimization_level",
    "inter_op_num_threads",
    "intra_op_num_threads",
    "use_deterministic_compute",
)

# What a session is proved by: that no node runs elsewhere than asked.
RESERVED = ("session.disable_cpu_ep_fallback", "session.record_ep_graph_assignment_info")

SWITCH = {"0": False, "1": True, "false": False, "true": True}
MAX_NUMBER = 2**31 - 1  # a C int


def apply(settings: Any, ort: Mapping[str, str]) -> None:
    """Set each option of `ort` on `settings`, an onnxruntime.SessionOptions.

    Raises:
        BadInput: an attribute that there is not, a value that it does not take, or an entry that is not the caller's to set.
    """
    for name, value in ort.items():
        if name in RESERVED:
            raise BadInput(f"onnxruntime's {name} is set by lenet-deploy, which proves with it where nodes run; leave it out")
        if "." in name:
            _add_entry(settings, name, value)
        elif name in ATTRIBUTES and hasattr(settings, name):
            setattr(settings, name, _value(name, value, type(getattr(settings, name))))
        else:
            raise UnknownName("onnxruntime session option", name, ATTRIBUTES)


def _add_entry(settings: Any, name: str, value: str) -> None:
    try:
        settings.add_session_config_entry(name, value)
    except RuntimeError as error:
        raise BadInput(f"onnxruntime does not take {name[:80]}={value[:80]} ({first_line(error)}); change it or leave it out") from None


def _value(name: str, value: str, kind: Any) -> object:
    """The text as the attribute's own type: a switch, a number, or a member of one of onnxruntime's enumerations."""
    found: Any
    if kind is bool:
        found = SWITCH.get(value.lower())
        wanted = "0 or 1"
    elif kind is int:
        found = int(value) if value.isdecimal() and value.isascii() and int(value) <= MAX_NUMBER else None
        wanted = "a whole number, 0 for onnxruntime's own choice"
    else:
        found = kind.__members__.get(value)
        wanted = " or ".join(kind.__members__)
    if found is None:
        raise BadInput(f"onnxruntime's {name} is {value!r}; it must be {wanted}")
    return found
