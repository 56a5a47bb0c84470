"""Choices: defaults without a file, a file that is believed only if it is ours, and overrides."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpost.cache_folder import cache_root
from fastpost_kernels import (
    _choices,
    _vocab_workspace,
    linear_logprob,
    nf4_dequantize,
    nf4_quantize,
    prefix_attention,
)
from fastpost_kernels._choices import (
    CHOICES,
    attention_shape,
    choices_file,
    choose,
    forget,
    head_shape,
    layer_shape,
    override,
    read,
    save,
    weight_shape,
)

prefix_host = importlib.import_module("fastpost_kernels._prefix_triton")

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
DEVICE = "NVIDIA Test 9000"
SHAPE = head_shape(4096, 4096, 128_256, BF16)
TABLE = {"head_fold": {SHAPE: "fused"}}


@pytest.fixture(autouse=True)
def as_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU counts as a GPU of that name; the cache is empty."""
    monkeypatch.setenv("FASTPOST_CACHE", str(tmp_path))
    monkeypatch.setattr(_choices, "device_name", lambda _: DEVICE)
    forget()
    yield
    forget()


def test_shape_classes_are_the_nearest_powers_of_two() -> None:
    assert SHAPE == "M4096-H4096-V131072-bfloat16"
    assert head_shape(1, 5120, 151_936, FP32) == "M1-H4096-V131072-float32"
    assert head_shape(0, 6000, 49_152, FP32) == "M1-H8192-V65536-float32"
    assert weight_shape(4096, 128_256, BF16) == "H4096-V131072-bfloat16"
    assert attention_shape(96, BF16) == "D96-bfloat16"


def test_the_default_comes_first_and_needs_no_file() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [choose(name, CPU, SHAPE) for name in CHOICES] == [o[0] for o in CHOICES.values()]
    assert CHOICES["head_fold"][0] == "tiles"


def test_what_is_saved_is_chosen_at_its_shape_only() -> None:
    path = save(DEVICE, TABLE, [{"seconds": 1.0}])
    assert path == choices_file(DEVICE) and path.parent == cache_root() / "tune"
    assert choose("head_fold", CPU, SHAPE) == "fused"
    assert choose("head_fold", CPU, head_shape(512, 4096, 128_256, BF16)) == "tiles"
    assert choose("head_tile", CPU, SHAPE) == "4096x4096"
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(path.read_text())["measured"] == [{"seconds": 1.0}]


def test_a_cpu_takes_defaults_whatever_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    save(DEVICE, TABLE, [])
    monkeypatch.undo()
    assert _choices.device_name(CPU) is None
    assert choose("head_fold", CPU, SHAPE) == "tiles"


def rewritten(**changes: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_text(""), "cannot be read"),
    "half": (lambda path: path.write_text(path.read_text()[:50]), "cannot be read"),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "deep": (lambda path: path.write_text("[" * 100_000), "cannot be read"),
    "folder": (as_folder, "cannot be read"),
    "list": (lambda path: path.write_text("[1]"), "not a file of format"),
    "format": (rewritten(format=2), "not a file of format"),
    "device": (rewritten(device="another"), "was measured on 'another'"),
    "versions": (rewritten(versions={"torch": "1.0"}), "other versions"),
    "no-table": (rewritten(choices=None), "no table"),
    "choice": (rewritten(choices={"colour": {SHAPE: "red"}}), "unknown choice 'colour'"),
    "shapes": (rewritten(choices={"head_fold": ["fused"]}), "no options of 'head_fold'"),
    "option": (rewritten(choices={"head_fold": {SHAPE: "magic"}}), "no option 'magic'"),
    "unhashable": (rewritten(choices={"head_fold": {SHAPE: ["fused"]}}), "no option"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_bad_file_costs_one_warning_and_the_defaults(case: str) -> None:
    spoil, reason = SPOILED[case]
    spoil(save(DEVICE, TABLE, []))
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        assert choose("head_fold", CPU, SHAPE) == "tiles"
        assert choose("head_tile", CPU, SHAPE) == "4096x4096"
    assert len(caught) == 1 and "fastpost tune" in str(caught[0].message)
    found = read(DEVICE)
    assert found.table == {} and reason in str(found.problem)


def test_without_a_home_folder_there_are_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTPOST_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(RuntimeWarning, match="set FASTPOST_CACHE"):
        assert choose("head_fold", CPU, SHAPE) == "tiles"


def test_a_new_kernel_source_makes_the_file_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    save(DEVICE, TABLE, [])
    assert read(DEVICE).problem is None
    now = dict(_choices.versions())
    assert (
        set(now) == {"fastpost_kernels", "torch", "triton"} and len(now["fastpost_kernels"]) == 16
    )
    monkeypatch.setattr(_choices, "versions", lambda: now | {"fastpost_kernels": "0" * 16})
    assert "other versions" in str(read(DEVICE).problem)


def test_an_interrupted_save_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(DEVICE, TABLE, [])
    before = path.read_bytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_choices.json, "dump", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(DEVICE, {}, [])
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_only_known_options_can_be_saved_or_forced() -> None:
    with pytest.raises(ValueError, match="no option 'magic'; options: tiles, fused"):
        save(DEVICE, {"head_fold": {SHAPE: "magic"}}, [])
    for options in ({"head_fold": "magic"}, {"colour": "red"}):
        with pytest.raises(ValueError, match=r"'magic'|'colour'"), override(options):
            pass
    assert not choices_file(DEVICE).exists()


def test_an_override_is_for_its_block_and_beats_the_file() -> None:
    save(DEVICE, TABLE, [])
    with override({"head_fold": "tiles"}):
        assert choose("head_fold", CPU, SHAPE) == "tiles"
        options = {"head_fold": "fused", "head_tile": "8192x2048"}
        with pytest.raises(RuntimeError), override(options):
            assert choose("head_fold", CPU, "any") == "fused"
            raise RuntimeError
        assert choose("head_fold", CPU, SHAPE) == choose("head_fold", CPU, "any") == "tiles"
        assert choose("head_tile", CPU, "any") == "4096x4096"
    assert choose("head_fold", CPU, SHAPE) == "fused"


@pytest.mark.parametrize("option", CHOICES["head_tile"])
def test_the_tile_of_a_frozen_head_follows_its_choice(option: str) -> None:
    """Only there, within the budget, and never more than there is."""
    asked = (20_000, 128_256, 64, BF16)
    with override({"head_tile": option}):
        plan = _vocab_workspace.fold_plan(*asked, True, 1 << 30, CPU)
        assert plan == tuple(map(int, option.split("x")))
        default = (4096, 4096)
        assert _vocab_workspace.fold_plan(*asked, False, 1 << 30, CPU) == default
        assert _vocab_workspace.fold_plan(*asked, True, 1 << 30) == default
        rows, cols = _vocab_workspace.fold_plan(*asked, True, 1 << 20, CPU)
        assert rows * (2 * cols + 64 * 6) <= 1 << 20
        assert _vocab_workspace.fold_plan(9, 100, 64, BF16, True, 1 << 30, CPU) == (9, 128)


def frozen_head(rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(rows, 8, generator=generator).requires_grad_()
    weight = torch.randn(150, 8, generator=generator)
    targets = torch.randint(0, 150, (rows,), generator=generator)
    logprob = linear_logprob(hidden, weight, targets, backend="triton").logprob
    return (logprob.detach(), *torch.autograd.grad(logprob.sum(), hidden))


@pytest.mark.parametrize("option", ["2x64", "7x128"])
def test_a_tile_changes_nothing_but_rounding(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHOICES, "head_tile", (*CHOICES["head_tile"], option))
    expected = frozen_head(5)
    with override({"head_tile": option}):
        found = frozen_head(5)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["forward", "grad_query", "grad_key"])
def test_a_tile_of_prefix_attention_follows_its_choice(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of that name gets it, the others their own; results change by rounding only."""
    monkeypatch.setitem(CHOICES, f"prefix_{kernel}", ("default", "16x32x4x1"))
    segments = torch.tensor([[0, 9, 26], [9, 26, 26]])
    inputs = [torch.randn(26, 1, 16).transpose(0, 1).requires_grad_() for _ in range(3)]

    def results() -> list[torch.Tensor]:
        out = prefix_attention(*inputs, segments, backend="triton")
        return [out, *torch.autograd.grad(out.sum(), inputs)]

    expected, seen = results(), []
    original = prefix_host._options

    def spied(*args: Any) -> Any:
        seen.append(tuple(args[-1]))
        return original(*args)

    monkeypatch.setattr(prefix_host, "_options", spied)
    with override({f"prefix_{kernel}": "16x32x4x1"}):
        found = results()
    own = prefix_host.choose_tiles(16, 4, 0)
    names = ("forward", "grad_query", "grad_key")
    assert seen == [(16, 32, 4, 1) if name == kernel else own[name] for name in names]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_an_adapted_layer_follows_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GEMM in Triton instead of the library's two, but never in float64."""
    layer = importlib.import_module("fastpost_kernels.lora_linear")
    calls: list[torch.dtype] = []
    original = layer.extended_gemm

    def spied(x: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(x.dtype)
        return original(x, *args)

    monkeypatch.setattr(layer, "extended_gemm", spied)
    shapes = ((5, 16), (18, 16), (4, 16), (18, 4))

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(2)
        x, weight, a, b = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
        leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
        y = layer.lora_linear(x, weight, None, a, b, 0.5)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    expected = results(FP32)
    with override({"lora_linear": "triton"}):
        found = results(FP32)
        assert calls == [FP32, FP32]  # forward, and the gradient of x
        results(torch.float64)
        assert calls == [FP32, FP32]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("option", "fused"), [("64", [5, 64]), ("0", []), ("256", [5, 64, 65])])
def test_the_rows_of_a_4_bit_layer_follow_their_choice(
    option: str, fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the limit one GEMM unpacks as it goes; results are the same either way."""
    layer = importlib.import_module("fastpost_kernels.nf4_linear")
    calls: list[int] = []
    original = layer.multiply

    def spied(x: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(len(x))
        return original(x, *args)

    monkeypatch.setattr(layer, "multiply", spied)
    generator = torch.Generator().manual_seed(3)
    weight = nf4_quantize(torch.randn(18, 64, generator=generator))
    x = torch.randn(65, 64, generator=generator)
    with override({"nf4_rows": option}):
        found = [layer.nf4_linear(x[:rows], weight, backend="triton") for rows in (5, 64, 65)]
    assert calls == fused
    for y in found:
        expected = x[: len(y)] @ nf4_dequantize(weight, FP32).t()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_the_rows_of_a_4_bit_layer_are_chosen_by_its_shape() -> None:
    assert layer_shape((18, 64), FP32) == "K64-N16-float32"
    save(DEVICE, {"nf4_rows": {"K64-N16-float32": "128"}}, [])
    assert choose("nf4_rows", CPU, layer_shape((18, 64), FP32)) == "128"
    assert choose("nf4_rows", CPU, layer_shape((64, 18), FP32)) == CHOICES["nf4_rows"][0] == "64"
