"""The kernels folder as a Kernel Hub project: staged as its builder does, loaded by `kernels`."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping
from torch import nn

import fastpost_kernels

ROOT = Path(__file__).parents[2] / "kernels"
PACKAGE = ROOT / "torch-ext" / "fastpost_kernels"


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """build/torch-cpu with the Python and JSON files only, and the builder's metadata."""
    folder = tmp_path_factory.mktemp("hub")
    variant = folder / "build" / "torch-cpu"
    keep = shutil.ignore_patterns("*.so", "__pycache__", "py.typed")
    shutil.copytree(PACKAGE, variant, ignore=keep)
    metadata = {
        "id": "_fastpost_kernels_cpu_0123456",
        "name": "fastpost-kernels",
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture(scope="module")
def hub(staged: Path) -> ModuleType:
    return get_local_kernel(staged)


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(6, 8), torch.randn(300, 8), torch.randint(0, 300, (6,))


@pytest.mark.filterwarnings("ignore:the compiled CPU passes")
def test_installed_and_hub_copy_work_in_one_process(hub: ModuleType) -> None:
    """Two namespaces, the same numbers, alternating calls."""
    assert hub.__name__ != fastpost_kernels.__name__
    hidden, weight, targets = problem()
    for _ in range(2):
        results = []
        for copy in (fastpost_kernels, hub):
            leaf = hidden.clone().requires_grad_()
            logprob = copy.linear_logprob(leaf, weight, targets, backend="torch").logprob
            logprob.sum().backward()
            results.append((logprob.detach(), leaf.grad))
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore:the compiled CPU passes")
def test_kernelize_replaces_a_head(staged: Path, hub: ModuleType) -> None:
    """A stateless layer takes over the forward of a module that owns `weight`, backward too."""
    from kernels import use_kernel_forward_from_hub

    @use_kernel_forward_from_hub("LinearLogprobHead")
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(300, 8))

        def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = hidden @ self.weight.T
            return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    head, (hidden, _, targets) = Head(), problem()
    expected = head(hidden, targets)
    (expected_grad,) = torch.autograd.grad(expected.sum(), head.weight)
    repository = LocalLayerRepository(repo_path=staged, layer_name="LinearLogprobHead")
    with use_kernel_mapping({"LinearLogprobHead": {"cpu": repository}}, inherit_mapping=False):
        head = kernelize(head, mode=Mode.TRAINING, device="cpu")
    got = head(hidden, targets)
    assert "linear_logprob" in str(got.grad_fn), "the kernel did not take over"
    (grad,) = torch.autograd.grad(got.sum(), head.weight)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_layout_follows_the_hub() -> None:
    """No Python package named `kernels`, nothing that the builder generates itself."""
    for name in ("__init__.py", "pyproject.toml", "setup.py"):
        assert not (ROOT / name).exists()
    assert not (PACKAGE / "_ops.py").exists()


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_imports_are_relative_torch_or_triton(path: Path) -> None:
    """What a Hub kernel may import: the standard library, torch, triton and itself, relatively."""
    import sys

    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] in allowed
