"""The Triton kernels compiled for sm_80, sm_90 and sm_100, without a GPU.

Memory-bound kernels must load 128 bits at a time and keep everything in registers. A process of its
own compiles: in this one Triton interprets. Resources are read from the machine code by Triton's
bundled cuobjdump.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPILE = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastpost_kernels import _vocab_passes_triton as passes

TYPES = {"tile_ptr": "*bf16", "targets_ptr": "*i64", "first_col": "i32", "n_cols": "i32",
         "logit_scale": "fp32", "softcap": "fp32", "inv_temperature": "fp32",
         "stride_tile": "i32", "stride_state": "i32", "stride_coefs": "i32"}
ALL = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "HAS_MOMENTS": True, "HAS_TOP1": True,
       "STORE_EXP": True, "MAX_LAG": 30.0}
KERNELS = [
    (passes._linear_logprob_fold_kernel, ALL | {"BLOCK_V": passes.MAX_FOLD_COLS}, 8),
    (passes._linear_logprob_gradient_kernel, ALL | {"BLOCK_V": passes.GRADIENT_BLOCK}, 4),
    (passes._linear_logprob_rescale_kernel, {"BLOCK_N": passes.RESCALE_BLOCK}, 4),
]
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
found = []
for kernel, constants, warps in KERNELS:
    names = kernel.arg_names
    constants = {k: v for k, v in constants.items() if k in names}
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "*fp32") for n in names}
    aligned = [n for n in names if n.endswith("_ptr") or n.startswith("stride") or n == "n_cols"]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    for capability in (80, 90, 100):
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            dump = lambda flag: subprocess.run(
                [TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            usage, sass = dump("--dump-resource-usage"), dump("-sass")
        number = lambda name: int(re.search(name + r":(\d+)", usage).group(1))
        found.append({
            "kernel": kernel.__name__, "capability": capability, "registers": number("REG"),
            "stack": number("STACK"), "local": number("LOCAL"),
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
            "wide_loads": len(re.findall(r"\bLDG\.E[.A-Z]*\.128", sass)),
            "wide_stores": len(re.findall(r"\bSTG\.E[.A-Z]*\.128", sass)),
            "wide_addresses": "i64" in compiled.asm["ttir"] and "extsi" in compiled.asm["ttir"],
        })
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every kernel on every target, compiled in a process without the interpreter."""
    folder = tmp_path_factory.mktemp("static")
    script: Path = folder / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache")}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_compiles_for_three_generations(compiled: list[dict[str, Any]]) -> None:
    assert {(x["kernel"], x["capability"]) for x in compiled} == {
        (f"_linear_logprob_{name}_kernel", capability)
        for name in ("fold", "gradient", "rescale")
        for capability in (80, 90, 100)
    }


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["stack"] == kernel["local"] == kernel["spills"] == 0, kernel
        assert kernel["registers"] <= 128, kernel


def test_loads_and_stores_are_128_bits_wide(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["wide_loads"] > 0 and kernel["wide_stores"] > 0, kernel


def test_row_offsets_are_64_bits_wide(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["wide_addresses"], kernel
