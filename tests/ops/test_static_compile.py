"""Every Triton kernel compiled for GPUs that are not there, by `python -m bench.static`.

Nothing may spill; what multiplies matrices must do so on tensor cores, what is bound by memory must
load 128 bits at a time (64 in AMD's waves of 64 threads); every offset must be proved to fit its
width, up to the registry's limits. A process of its own compiles: in this one Triton interprets.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import registry
from bench.static.compilation import compiler_cache
from bench.static.machine_code import read_amd, read_sass
from bench.static.processors import PROCESSORS, predict
from fastpost_kernels import _prefix_costs, _vocab_tiles, _vocab_workspace

ROOT = Path(__file__).parents[2]
KERNEL_FOLDER = ROOT / "kernels" / "torch-ext" / "fastpost_kernels"
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
OURS = [kernel for kernel in registry.KERNELS if kernel.package == "fastpost"]

Rows = list[dict[str, Any]]


def compile_all(folder: Path, *options: str) -> Rows:
    """Rows that bench.static writes."""
    output = folder / "static.json"
    command = [sys.executable, "-m", "bench.static", "--output", str(output), *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows: Rows = json.loads(output.read_text())["results"]
    return rows


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Every kernel of ours for sm_90, at one shape, without and with every option."""
    folder = tmp_path_factory.mktemp("static")
    return compile_all(folder, "--ours", "--quick", "--targets", "sm_90")


def assert_no_kernel_is_missing(rows: Rows, targets: set[str]) -> None:
    assert [row for row in rows if "failed" in row] == []
    expected = {(kernel.name, target) for kernel in OURS for target in targets}
    assert {(row["kernel"], row["target"]) for row in rows} == expected


def assert_compiled_well(rows: Rows) -> None:
    for row in rows:
        assert row["spilled_bytes"] == 0 and "spill" not in row["instructions"], row
        assert row["blocks_per_sm"] >= 1, row
        assert row["offsets"]["unproved"] == [] and row["offsets"]["wide"] > 0, row
        if row["is_gemm"]:
            # only the newest kind: no product fell back to an older one
            assert set(row["tensor_cores"]) == {TENSOR_CORES[row["target"]]}, row
        else:
            assert row["wide_load_share"] >= 0.5, row
            assert row["registers"] <= 128, row
            is_stored = "statistics only" not in row["shape"]
            assert row["has_wide_stores"] or not is_stored, row


def test_every_kernel_compiles_for_sm_90(compiled: Rows) -> None:
    assert_no_kernel_is_missing(compiled, {"sm_90"})


def test_no_spills_wgmma_and_wide_loads(compiled: Rows) -> None:
    assert_compiled_well(compiled)


def test_flops_are_those_of_the_op(compiled: Rows) -> None:
    """The forward's are the registered formula's; the backward's two kernels share two products."""
    flops = {row["kernel"]: row["flops"] for row in compiled if row["shape"] == "D 128"}
    segments = registry.attention_segments()
    tokens = int(segments[0, 2])
    heads = (registry.QUERY_HEADS, registry.KEY_HEADS, registry.KEY_HEADS)
    query, key, value = (torch.empty(n, tokens, 128, device="meta") for n in heads)
    forward = _prefix_costs.forward_flops(
        query, key, value, segments, None, 1.0, None, None, "triton"
    )
    assert flops["prefix_attention_fwd_kernel"] == forward
    backward = _prefix_costs.backward_flops(
        query, query, key, value, query, query[..., 0], segments, 1.0, None, None, "triton"
    )
    twice = forward  # q·k and dO·v, at equal sizes of head and value as much as the forward
    assert (
        flops["prefix_attention_bwd_query_kernel"] + flops["prefix_attention_bwd_key_kernel"]
        == backward + twice
    )


@pytest.mark.slow
def test_every_shape_on_sm_90_and_some_on_every_target(tmp_path: Path) -> None:
    """Every shape on every target is in the stored results, which are checked below."""
    others = [name for name in PROCESSORS if name != "sm_90"]
    parts = (["--targets", "sm_90"], ["--quick", "--targets", *others])
    with ThreadPoolExecutor() as pool:  # each waits for a process of its own
        found = list(pool.map(lambda part: compile_all(tmp_path / part[0], "--ours", *part), parts))
    assert_no_kernel_is_missing([row for part in found for row in part], set(PROCESSORS))
    for part in found:
        assert_compiled_well(part)
    for kernel in OURS:
        shapes = {row["shape"] for row in found[0] if row["kernel"] == kernel.name}
        assert all(any(s.startswith(case.shape) for s in shapes) for case in kernel.cases)


def jit_kernels() -> set[str]:
    """Names of jit functions that are launched, by their ending."""
    found = set()
    for path in KERNEL_FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                decorators = " ".join(ast.unparse(d) for d in node.decorator_list)
                if "triton.jit" in decorators:
                    found.add(f"fastpost_kernels.{path.stem}:{node.name}")
    return found


def test_the_registry_lists_every_kernel_of_ours() -> None:
    assert {kernel.source for kernel in OURS} == jit_kernels()
    assert len(OURS) >= 6


def test_peers_are_rows_of_the_registry() -> None:
    sources = {kernel.source for kernel in registry.KERNELS}
    assert len(sources) == len(registry.KERNELS)
    for kernel in OURS:
        assert set(kernel.peers) <= sources
        assert all(registry.find(peer).package != "fastpost" for peer in kernel.peers)


@pytest.mark.parametrize("vocab", registry.VOCABS)
@pytest.mark.parametrize("width", registry.WIDTHS)
def test_the_registered_tile_is_the_planned_one(width: int, vocab: int) -> None:
    budget = _vocab_tiles.default_budget("cuda")
    for with_acc in (False, True):
        plan = _vocab_workspace.fold_plan(
            registry.ROWS, vocab, width, torch.bfloat16, with_acc, budget
        )
        assert plan == (registry.TILE, registry.TILE)


def test_the_stored_results_hold_every_kernel() -> None:
    stored = json.loads((ROOT / "bench" / "results" / "static.json").read_text())
    ours = [row for row in stored["results"] if row["package"] == "fastpost"]
    assert_no_kernel_is_missing(ours, set(PROCESSORS))
    assert_compiled_well(ours)
    assert "never measured" in stored["prediction"]["model"]


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "blocks", "limit"),
    [
        ("sm_90", 4, 32, 0, 16, "warps"),
        ("sm_90", 8, 224, 98_304, 1, "registers"),
        ("sm_90", 4, 32, 100_000, 2, "shared memory"),
        ("sm_90", 4, 32, 227 * 1024 + 1, 0, "shared memory"),
        ("sm_80", 4, 33, 0, 12, "registers"),  # 40 registers after rounding: 48 warps
        ("gfx942", 4, 257, 0, 1, "registers"),
        ("gfx942", 8, 64, 32_768, 2, "shared memory"),
    ],
)
def test_occupancy(
    target: str, warps: int, registers: int, shared: int, blocks: int, limit: str
) -> None:
    processor = PROCESSORS[target]
    found = processor.occupancy(warps, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == blocks * warps / processor.warps


def test_tensor_memory_limits_occupancy() -> None:
    found = PROCESSORS["sm_100"].occupancy(4, 32, 0, tensor_memory=256)
    assert (found.blocks, found.limit) == (2, "tensor memory")


def test_the_prediction_is_the_slower_of_both_roofs() -> None:
    assert predict(flops=750_000_000, moved=3) == (pytest.approx(1.0), "tensor cores")
    assert predict(flops=0, moved=6_000_000) == (pytest.approx(2.0), "memory")


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
                                                            /* 0x000ff00000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0050*/                   LDGDEPBAR ;
        /*0060*/                   STL.64 [R1], R4 ;
        /*0070*/             @!UP1 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R4, R6, R8 ;
        /*0090*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
"""


def test_sass_is_read() -> None:
    found = read_sass("REG:42 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:560", SASS)
    assert (found.registers, found.spilled_bytes) == (42, 16)
    assert found.load_widths == {16: 2, 2: 1, 4: 1} and found.store_widths == {8: 1}
    assert found.wide_load_share == 32 / 38 and not found.has_wide_stores
    expected = {"spill": 1, "wgmma": 1, "mma.sync": 1, "tcgen05": 1, "barrier": 1, "other": 1}
    assert {k: found.instructions[k] for k in expected} == expected
    assert sum(found.instructions.values()) == 11


AMD = """
	buffer_load_dwordx4 v[6:9], v1, s[4:7], 0 offen
	global_load_ushort v5, v[2:3], off
	v_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
	scratch_store_dword off, v1, s33
    .private_segment_fixed_size: 24
    .vgpr_count:     300
"""


def test_amd_assembly_is_read() -> None:
    found = read_amd(AMD)
    assert (found.registers, found.spilled_bytes) == (300, 24)
    assert found.load_widths == {16: 1, 2: 1} and found.wide_load_share == 16 / 18
    eight = read_amd(AMD.replace("dwordx4", "dwordx2"))  # 64 threads make 512 bytes of it
    assert eight.load_widths == {8: 1, 2: 1} and eight.wide_load_share == 8 / 10
    assert found.instructions == {"global load": 2, "mfma": 1, "spill": 1}


def test_an_interpreting_process_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=re.escape("TRITON_INTERPRET=1")),
        compiler_cache(tmp_path),
    ):
        pass
