"""What `qnext doctor` prints: the software, the device, and which facts hold on it."""

import contextlib
import json
import platform
import sys
from typing import Any

import torch

from qnext.errors import TargetError
from qnext.lowering.cpu import build
from qnext.lowering.npu import probe
from qnext.lowering.target import NPUS, TARGETS, of_device

# what the probes decide; without a device the defaults of each target are told instead
PROBED = (
    "attention_tnd_256",
    "chunk_delta_rule",
    "chunk_strong_decay",
    "state_float32",
    "chunk_state_float32",
    "custom_conv",
)


def examine() -> dict[str, Any]:
    """All that doctor tells, as JSON can hold it; what is absent is None, `missing` says the way.

    Never raises for a machine without NPU, CANN or torch_npu.
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": build.compiler_here(),
        "torch_npu": probe.installed_version(),
        "cann": None,
        "device": None,
        "target": None,
        "missing": None,
        "facts": [],
    }
    try:
        found["torch_npu"] = str(probe.require_torch_npu().__version__)  # else it says why not
        found["cann"] = probe.cann_version()
        found["device"] = probe.device_name()
        target = of_device(found["device"])
        if target is None:
            raise TargetError(
                f"no target knows {found['device']}: known are "
                + ", ".join(f"{name!r} ({_chip(name)})" for name in NPUS)
            )
        found["target"] = target.name
        rows = probe.device_facts().rows
        found["facts"] = [row._asdict() for row in rows]
    except TargetError as error:
        found["missing"] = str(error)
        found["facts"] = [_assumed(fact) for fact in PROBED]
    return found


def report(found: dict[str, Any]) -> str:
    """The findings as a table to read."""
    lines = [
        ("python", found["python"]),
        ("torch", found["torch"]),
        ("C++ compiler", found["compiler"] or "none: target 'cpu' runs on the reference"),
        ("torch_npu", found["torch_npu"] or "absent"),
        ("CANN", found["cann"] or "not found"),
        ("device", found["device"] or "none"),
        ("target", _matched(found["target"])),
    ]
    text = [f"{name:<20} {value}" for name, value in lines]
    if found["missing"]:
        text += ["", f"missing: {found['missing']}"]
    text += ["", f"{'fact':<20} holds  reason"]
    words = {True: "yes", False: "no", None: "?"}
    text += [
        f"{row['fact']:<20} {words[row['holds']]:<6} {row['reason']}" for row in found["facts"]
    ]
    return "\n".join(text)


def run(as_json: bool) -> None:
    """Print the findings; a machine without an NPU is no error."""
    with contextlib.redirect_stdout(sys.stderr):  # torch_npu prints warnings when it is imported
        found = examine()
    print(json.dumps(found, indent=2) if as_json else report(found))


def _chip(name: str) -> str:
    chip = TARGETS[name].chip
    return chip.name if chip else "no chip"


def _matched(name: str | None) -> str:
    return "reference, as no NPU target fits" if name is None else f"{name} ({_chip(name)})"


def _assumed(fact: str) -> dict[str, Any]:
    """A fact nobody could probe, with what lowering assumes for each target."""
    holds = [name for name in NPUS if getattr(TARGETS[name].facts, fact)]
    told = "no" if not holds else "yes" if len(holds) == len(NPUS) else f"yes on {', '.join(holds)}"
    return {"fact": fact, "holds": None, "reason": f"not probed; lowering assumes {told}"}
