"""`python -m bench.static [--targets sm_90 ...] [--ours] [--quick] [--output FILE]`

Compiles every Triton kernel of the registry for every target, without a GPU: a table, and, if that
is complete, bench/results/static.json. Times are predictions for an H100 by the roofline, never
measurements.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from bench.environment import RESULTS, describe
from bench.registry import KERNELS, Case, Kernel
from bench.static.compilation import Launch, compile_launches, compiler_cache
from bench.static.index_width import prove_offsets
from bench.static.machine_code import assembler_versions, read_machine_code
from bench.static.processors import (
    H100_BANDWIDTH,
    H100_FLOPS,
    PROCESSORS,
    Processor,
    predict,
)

TENSOR_GROUPS = ("mma.sync", "wgmma", "tcgen05", "mfma")
MIX = ("fp32", "special function", "global load", "shared memory")
COLUMNS = (
    "kernel                                     case                                        regs "
    "spill  shared warps blocks/SM occupancy, limit  tensor cores      TMA wide loads    GFLOP"
    "      MB predicted  % fp32/exp/load/shared"
)


def measure(kernel: Kernel, case: Case, processor: Processor) -> list[dict[str, Any]]:
    """One row per launch of the case; a single row with `failed` if it does not compile."""
    row = {
        "op": kernel.op,
        "package": kernel.package,
        "kernel": kernel.name,
        "shape": case.shape,
        "target": processor.name,
    }
    try:
        function = kernel.load()
        launches = compile_launches(
            lambda: case.launch(processor.capability), function, processor.target()
        )
    except ImportError as error:
        return [row | {"failed": f"not installed: {error}"}]
    except Exception as error:  # a compiler's, whatever it is: the table says so
        reason = str(error).strip().splitlines() or [""]
        return [row | {"failed": f"{type(error).__name__}: {reason[0][:200]}"}]
    rows = []
    for number, launch in enumerate(launches, start=1):
        part = f", launch {number}/{len(launches)}" if len(launches) > 1 else ""
        rows.append(row | {"shape": case.shape + part} | describe_launch(kernel, launch, processor))
    return rows


def describe_launch(kernel: Kernel, launch: Launch, processor: Processor) -> dict[str, Any]:
    """What one compiled launch takes of a multiprocessor, its instructions and its cost."""
    code, metadata = read_machine_code(launch.compiled), launch.compiled.metadata
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    fits = processor.occupancy(metadata.num_warps, code.registers, metadata.shared, tensor_memory)
    cost = kernel.cost(launch.arguments)
    row = {
        "is_gemm": kernel.is_gemm,
        "registers": code.registers,
        "spilled_bytes": code.spilled_bytes,
        "shared_bytes": metadata.shared,
        "tensor_memory": tensor_memory,
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "grid": list(launch.grid),
        "blocks_per_sm": fits.blocks,
        "occupancy": round(fits.share, 4),
        "occupancy_limit": fits.limit,
        "tensor_cores": {g: n for g, n in code.instructions.items() if g in TENSOR_GROUPS},
        "wide_load_share": round(code.wide_load_share, 3),
        "load_widths": code.load_widths,
        "store_widths": code.store_widths,
        "has_wide_stores": code.has_wide_stores,
        "instructions": code.instructions,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "items": cost.items,
    }
    if kernel.package == "fastpost":
        offsets = prove_offsets(launch.compiled.asm["ttir"], kernel.limits)
        row["offsets"] = offsets._asdict() | {"limits": dict(kernel.limits)}
    if processor.name == "sm_90":
        microseconds, bound = predict(cost.flops, cost.bytes)
        row["h100_prediction"] = {"microseconds": round(microseconds, 1), "bound": bound}
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['package'] + ' ' + row['kernel'].strip('_'):<43.43}{row['shape']:<44.44}"
    if "failed" in row:
        return f"{head}{row['failed'][:110]}"
    counts = row["instructions"]
    tensor = " ".join(f"{n} {group}" for group, n in row["tensor_cores"].items()) or "-"
    limit = f"{row['occupancy']:.0%} {row['occupancy_limit']}"
    predicted = row.get("h100_prediction")
    time = f"{predicted['microseconds']:.1f} us" if predicted else ""
    mix = "/".join(f"{counts.get(g, 0) / sum(counts.values()):.0%}".rstrip("%") for g in MIX)
    return (
        f"{head}{row['registers']:>4}{row['spilled_bytes']:>6}{row['shared_bytes']:>8}"
        f"{row['warps']:>6}{row['blocks_per_sm']:>10} {limit:<18}{tensor:<16}"
        f"{counts.get('tma', 0):>5}{row['wide_load_share']:>11.0%}{row['flops'] / 1e9:>9.4g}"
        f"{row['bytes'] / 1e6:>8.4g}{time:>10}  {mix}"
    )


def measure_all(kernels: list[Kernel], targets: list[str], quick: bool) -> list[dict[str, Any]]:
    """Prints the table as it is made."""
    rows = []
    for name in targets:
        print(f"\n{name}\n{COLUMNS}")
        for kernel in kernels:
            for case in kernel.cases[:2] if quick else kernel.cases:
                found = measure(kernel, case, PROCESSORS[name])
                rows += found
                print("\n".join(line(row) for row in found), flush=True)
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON with one row a line."""
    head = describe("bench.static") | {
        "assemblers": assembler_versions(),
        "prediction": {
            "model": "max(flops / tensor cores, bytes / memory) of an H100, never measured",
            "tensor_cores_flops": H100_FLOPS,
            "memory_bytes_per_second": H100_BANDWIDTH,
        },
    }
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{text},\n "results": [\n{lines}\n ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=PROCESSORS, default=list(PROCESSORS))
    parser.add_argument("--ours", action="store_true", help="leave the peers out")
    parser.add_argument("--quick", action="store_true", help="the first two cases of each kernel")
    parser.add_argument("--output", type=Path, help="of a complete run bench/results/static.json")
    options = parser.parse_args()
    kernels = [k for k in KERNELS if k.package == "fastpost" or not options.ours]
    with tempfile.TemporaryDirectory() as folder, compiler_cache(Path(folder)):
        rows = measure_all(kernels, options.targets, options.quick)
    is_complete = len(kernels) == len(KERNELS) and set(options.targets) == set(PROCESSORS)
    output = options.output
    if output is None and is_complete and not options.quick:
        output = RESULTS / "static.json"
    if output is None:
        print("\nnot written: a part of the table, and no --output")
    else:
        write(output, rows)


if __name__ == "__main__":
    main()
