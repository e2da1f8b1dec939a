"""What a number was measured on: hardware, versions, and the state of the source."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import micronet

# The instruction sets that decide how fast small networks run, on x86 and on Arm, as Linux names them.
# Dot products of 8-bit numbers that are summed in 32 bits; without them, x86 sums pairs in 16, which can be too few.
# Source: Linux, arch/x86/include/asm/cpufeatures.h and Documentation/arch/arm64/elf_hwcaps.rst; onnxruntime's
# documentation, "Quantize ONNX Models", on saturation with AVX2 and AVX512.
_INT8_DOT = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "i8mm", "sve", *_INT8_DOT)
_CPUINFO = Path("/proc/cpuinfo")


def hardware(device: str) -> dict[str, Any]:
    """Describe the machine: processor, cores, threads in use, instruction sets, and the GPU where one is used.

    Args:
        device: where the network runs.
    """
    fields, flags = _processor()
    machine: dict[str, Any] = {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "device": device,
    }
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def int8_dot() -> bool:
    """Whether the processor has dot products of 8-bit numbers that do not saturate at 16 bits; False if unknown."""
    return not _processor()[1].isdisjoint(_INT8_DOT)


def _processor() -> tuple[dict[str, str], set[str]]:
    """What Linux tells of the first processor: its fields, and its instruction sets; nothing elsewhere."""
    info = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    lines = (line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines}
    return fields, set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())


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
