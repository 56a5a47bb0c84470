"""Registers, spills and instructions of a compiled kernel, read from its machine code.

NVIDIA: the cubin, through the disassembler in Triton's wheel. AMD: the assembly that Triton keeps.
Counts are static: an instruction in a loop counts once, an unrolled one as often as it is unrolled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import triton

__all__ = ["MachineCode", "assembler_versions", "read_amd", "read_machine_code", "read_sass"]

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SASS_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
AMD_LINE = re.compile(r"^\s+((?:v|s|ds|global|buffer|scratch|flat)_\w+)", re.MULTILINE)
# Instruction names to what they do; the first that matches counts. HMMA is mma.sync, HGMMA wgmma,
# UTC?MMA tcgen05.mma; UTMA* and UBLKCP are the tensor memory accelerator.
SASS_GROUPS = {
    "mma.sync": r"[HIBQD]MMA\.",
    "wgmma": r"[HIBQ]GMMA\.",
    "tcgen05": r"UTC\w*MMA",
    "tma": r"UTMA|UBLKCP",
    "spill": r"(LDL|STL)\b",
    "global load": r"LDG(STS)?\b(?!DEPBAR)",
    "global store": r"STG\b",
    "atomic": r"ATOMG?\b|RED\b",
    "shared memory": r"LDS|STS|ATOMS|LDTM|STTM",
    "barrier": r"BAR\b|SYNCS|WARPGROUP|FENCE|DEPBAR|LDGDEPBAR|UTCBAR",
    "special function": r"MUFU",
    "fp32": r"F(ADD|MUL|FMA|SETP|SEL|MNMX|SWZADD)",
}
AMD_GROUPS = {
    "mfma": r"v_mfma",
    "spill": r"scratch_",
    "global load": r"(global|buffer|flat)_load",
    "global store": r"(global|buffer|flat)_store",
    "atomic": r"(global|buffer|flat)_atomic",
    "shared memory": r"ds_",
    "barrier": r"s_barrier|s_waitcnt",
    "special function": r"v_(exp|log|rcp|rsq|sqrt)_",
    "fp32": r"v_(pk_)?(add|mul|fma|mac|fmac|sub|max|min|cmp_\w+|cndmask)_.?(f|b)?32",
}
AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "byte": 1, "short": 2, "ushort": 2}


class MachineCode(NamedTuple):
    """Of one compiled kernel; registers and bytes are one thread's."""

    registers: int
    spilled_bytes: int  # of local memory: spills, or arrays that do not fit
    instructions: dict[str, int]  # by group, and "other"
    load_widths: dict[int, int]  # bytes of a global load, or of a copy to shared memory: how many
    store_widths: dict[int, int]
    wide: int = 16  # bytes of a thread's wide load: 512 of a warp, or of a wave of 64 threads

    @property
    def wide_load_share(self) -> float:
        """Of the bytes that a thread loads, those in wide loads; 1 if a TMA loads."""
        if self.instructions.get("tma"):
            return 1.0
        loaded = {width: width * count for width, count in self.load_widths.items()}
        wide = sum(size for width, size in loaded.items() if width >= self.wide)
        return wide / sum(loaded.values()) if loaded else 0.0

    @property
    def has_wide_stores(self) -> bool:
        return any(width >= self.wide for width in self.store_widths)


def read_machine_code(compiled: Any) -> MachineCode:
    """Of what Triton compiled, for NVIDIA or for AMD."""
    if "amdgcn" in compiled.asm:
        return read_amd(compiled.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        return read_sass(usage, _run(TOOLS / "cuobjdump", "-sass", file.name))


def read_sass(usage: str, sass: str) -> MachineCode:
    """Of what cuobjdump says about one kernel: its resource usage, and its instructions."""
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    local = max(used["STACK"], used["LOCAL"])
    return _summarise(SASS_LINE.findall(sass), SASS_GROUPS, _sass_width, used["REG"], local)


def read_amd(assembly: str) -> MachineCode:
    """Of the assembly that LLVM wrote for one kernel, metadata included."""

    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    registers = number("vgpr_count")  # of both kinds together since gfx90a
    local = number("private_segment_fixed_size")
    code = _summarise(AMD_LINE.findall(assembly), AMD_GROUPS, _amd_width, registers, local)
    return code._replace(wide=8)


def assembler_versions() -> dict[str, str]:
    """The assemblers in Triton's wheel; sm_90 and later take the second."""
    versions = {}
    for name in ("ptxas", "ptxas-blackwell"):
        said = _run(TOOLS / name, "--version")
        versions[name] = said.rpartition(" V")[2].split()[0]
    return versions


def _sass_width(name: str) -> int:
    """Bytes a thread moves: LDG.E.128 sixteen, LDG.E.U16 two, LDG.E four."""
    for part in name.split("."):
        if part in ("64", "128"):
            return int(part) // 8
        if re.fullmatch(r"[US](8|16)", part):
            return int(part[1:]) // 8
    return 4


def _amd_width(name: str) -> int:
    """global_load_dwordx4 sixteen, global_load_ushort two."""
    kind = name.rpartition("_load_")[2].rpartition("_store_")[2]
    if found := re.match(r"dwordx(\d)", kind):
        return 4 * int(found[1])
    return AMD_WIDTHS.get(kind.split("_")[0], 4)


def _summarise(
    names: list[str],
    groups: dict[str, str],
    width: Callable[[str], int],
    registers: int,
    spilled: int,
) -> MachineCode:
    instructions: Counter[str] = Counter()
    widths: dict[str, Counter[int]] = {"global load": Counter(), "global store": Counter()}
    for name, count in Counter(names).items():
        group = next((g for g, pattern in groups.items() if re.match(pattern, name)), "other")
        instructions[group] += count
        if group in widths:
            widths[group][width(name)] += count
    return MachineCode(
        registers,
        spilled,
        dict(instructions),
        dict(widths["global load"]),
        dict(widths["global store"]),
    )


def _run(tool: Path, *arguments: str) -> str:
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
