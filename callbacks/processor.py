"""What the processor can do that decides how an int8 graph answers, and how fast, as far as the system tells.

onnxruntime multiplies unsigned codes with signed ones. With dot products of 8-bit numbers it sums in 32 bits. On x86
without them it sums two products at a time in 16 bits, which saturate: 2 x 255 x 127 is 64,770, and 32,767 the most.
Weights of 7 bits, up to 64, make 32,640 at most. Arm sums in 32 bits either way.
Source: Linux, arch/x86/include/asm/cpufeatures.h and Documentation/arch/arm64/elf_hwcaps.rst; onnxruntime's
documentation, "Quantize ONNX Models", on saturation with AVX2 and AVX512.
"""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
INT8_DOT = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")  # as Linux names them, on x86 and on Arm
_X86 = ("x86_64", "amd64", "i386", "i686")
_NAMES = "dot products of 8-bit numbers (AVX512-VNNI, AVX-VNNI, AMX)"


def processor(place: Path = CPUINFO) -> tuple[dict[str, str], set[str]]:
    """What Linux tells of the first processor: its fields, and its instruction sets; nothing elsewhere.

    Args:
        place: the file that Linux tells it in.
    """
    info = place.read_text() if place.exists() else ""
    lines = (line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines}
    return fields, set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())


def int8_note(instruction_sets: set[str], option: str, *, reduced: bool = False) -> str:
    """What to know of int8 on a processor without dot products of 8-bit numbers, in one line; empty on one with them.

    Args:
        instruction_sets: as `processor` gives them; none where the system does not tell.
        option: what gives weights 7 bits, for the line; empty where nothing does.
        reduced: whether the weights have 7 bits.
    """
    if not instruction_sets.isdisjoint(INT8_DOT):
        return ""
    if platform.machine().lower() not in _X86:
        slow = "this CPU has no dot products of 8-bit numbers (asimddp): int8 may be no faster than float"
        return slow if instruction_sets else ""
    has_none = (
        f"this CPU has no {_NAMES}" if instruction_sets else f"whether this CPU has {_NAMES} is not known; if not"
    )
    if reduced:
        return f"{has_none}: int8 may be no faster than float; its 16-bit sums hold weights of 7 bits"
    way_out = f"; {option} avoids that" if option else ""
    return (
        f"{has_none}: onnxruntime's 16-bit sums saturate, another CPU can answer otherwise than this one{way_out}; and "
        "int8 may be no faster than float"
    )
