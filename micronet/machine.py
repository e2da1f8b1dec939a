"""What a number was measured on: hardware, versions, and the state of the source."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import micronet
from callbacks.processor import CPUINFO, INT8_DOT, int8_note, processor

# The instruction sets that decide how fast small networks run, on x86 and on Arm, as Linux names them.
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "i8mm", "sve", *INT8_DOT)
_CPUINFO = CPUINFO


def hardware(device: str) -> dict[str, Any]:
    """Describe the machine: processor, cores, threads in use, instruction sets, and the GPU where one is used.

    Args:
        device: where the network runs.
    """
    cpu = cpu_told()
    machine: dict[str, Any] = {
        "cpu": cpu["cpu"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": cpu["instruction_sets"],
        "device": device,
    }
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def cpu_told() -> dict[str, Any]:
    """The processor's model, and which of the instruction sets it has that decide numbers and times."""
    fields, flags = processor(_CPUINFO)
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
    }


def int8_told(option: str, *, reduced: bool = False) -> str:
    """What to know of int8 on this processor, as `int8_note` has it; empty where there is nothing.

    Args:
        option: what gives weights 7 bits, for the line; empty where nothing does.
        reduced: whether the weights have 7 bits.
    """
    return int8_note(processor(_CPUINFO)[1], option, reduced=reduced)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    packages = ("torch", "torchvision", "fastai", "numpy")
    own = {"python": platform.python_version(), "micronet": micronet.__version__}
    return own | {name: importlib.metadata.version(name) for name in packages}


def git_state(folder: str | Path) -> str | None:
    """Commit of the repository that holds a folder, with `-dirty` for uncommitted changes; None outside of one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def busy() -> str | None:
    """Say that others compute on this machine, which makes every time too long; None where they do not."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores:
        return None
    return f"other work was running (load {load:.1f} on {cores} cores), so that all times are too long: try again later"
