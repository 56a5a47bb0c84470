"""A jail for model-written Python: construct once, run many programs, from any thread.

What holds for a program inside, each proven by a hostile program in tests/rewards/test_sandbox.py:
no network, no file of the host written, renamed or chmodded, no file read but the system's
libraries and Python's, no environment, no inherited descriptor, no signal to a process outside, and
limits on memory, CPU time, wall-clock time, processes, file size, folder size and output. When the
run ends, everything it started is dead.

How: Linux namespaces, a root of its own, rlimits, no_new_privs, seccomp and, where the kernel has
it, Landlock (see jail/lockdown.py). There is no weaker mode. Construction runs a hostile probe and
raises SandboxUnavailable if any protection does not hold on this machine.

Memory is limited per process, so the bound on the whole is `memory_bytes * max_processes +
box_bytes`; a bound on the sum alone would need a cgroup, which an unprivileged process lacks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .jail_process import Jail, collect

_FIX = (
    "The sandbox needs Linux 5.12+ on x86_64 or aarch64, as root with CAP_SYS_ADMIN or as a user "
    "who may create user namespaces. On Ubuntu 24.04: `sysctl -w "
    "kernel.apparmor_restrict_unprivileged_userns=0`. In Docker: `--security-opt "
    "seccomp=unconfined --security-opt apparmor=unconfined --cap-add SYS_ADMIN`. There is no "
    "unprotected mode: score code on a machine that allows it."
)


class SandboxUnavailable(RuntimeError):
    """This machine cannot enforce what the sandbox promises; the message says what and how to."""


@dataclass(frozen=True)
class SandboxLimits:
    """Limits on one program. Seconds and bytes."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 512 << 20  # address space of each process
    max_processes: int = 8  # threads count
    file_bytes: int = 16 << 20
    box_bytes: int = 64 << 20  # all files together
    output_bytes: int = 64 << 10  # standard output and error, each; the run is killed beyond

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; give a number above 0")
        if self.memory_bytes < 64 << 20:
            raise ValueError(f"memory_bytes is {self.memory_bytes}; Python itself needs 64 MiB")

    def rlimits(self) -> dict[str, int]:
        return {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NPROC": self.max_processes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
        }


@dataclass(frozen=True)
class RunResult:
    """How a program ended: `exit_code` is 128 + signal after a kill; `killed_for` says by us."""

    stdout: str
    stderr: str
    exit_code: int
    killed_for: str | None  # "time", "output" or None
    landlock: bool


@dataclass(frozen=True)
class TestVerdict:
    """One entry a test: True, False, or None where the test itself cannot be run."""

    __test__ = False  # the name is not pytest's

    passed: list[bool | None]
    reasons: list[str]


class Sandbox:
    """Runs Python programs that may be hostile.

    Args:
        limits: what one program may use.
        python: the interpreter to run them with; default the running one.

    Raises:
        SandboxUnavailable: a protection does not hold on this machine, with the way to fix it.
    """

    def __init__(self, limits: SandboxLimits | None = None, *, python: str | None = None) -> None:
        if sys.platform != "linux":
            raise SandboxUnavailable(f"the code sandbox needs Linux, not {sys.platform}. {_FIX}")
        self.limits = limits or SandboxLimits()
        self._python = python or sys.executable
        question = "import sys; print(sys.base_prefix, sys.base_exec_prefix, sep='\\n')"
        prefixes = subprocess.run(
            [self._python, "-I", "-S", "-c", question], capture_output=True, text=True, check=True
        ).stdout.split("\n")[:2]
        libraries = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"]
        self._readable = libraries + [prefix for prefix in prefixes if prefix != "/usr"]
        self.protections = self._probe()
        missing = [name for name, holds in self.protections.items() if not holds]
        if missing:
            raise SandboxUnavailable(f"not enforced on this machine: {', '.join(missing)}. {_FIX}")

    def run(self, source: str, stdin: str = "") -> RunResult:
        """Runs `source` as a script."""
        jail = self._start({"role": "program", "source": source}, stdin=stdin)
        received, killed_for = self._watch(jail, [], jail.streams, set(jail.streams))
        code = jail.process.returncode
        return RunResult(
            stdout=received["stdout"].decode("utf-8", "replace"),
            stderr=received["stderr"].decode("utf-8", "replace"),
            exit_code=code if code >= 0 else 128 - code,
            killed_for=killed_for,
            landlock=received["ready"] == b"landlock",
        )

    def check(
        self, source: str, tests: Sequence[str], entry_point: str | None = None
    ) -> TestVerdict:
        """Runs each of `tests` (Python that raises on failure) against the program `source`.

        The tests run in a second jail and reach the program's globals through a pipe; see
        jail/driver.py for why a program cannot forge the verdict and for what tests can say.

        Args:
            entry_point: the tests define `check(candidate)`, to be called with this global.
        """
        requests_out, requests_in = os.pipe()
        replies_out, replies_in = os.pipe()
        verdict_out, verdict_in = os.pipe()
        solution = self._start({"role": "solution", "source": source}, [requests_out, replies_in])
        try:
            driver = self._start(
                {"role": "driver", "tests": list(tests), "entry_point": entry_point},
                [requests_in, replies_out, verdict_in],
            )
        except OSError:
            solution.kill()
            os.close(verdict_out)
            raise
        streams = {"verdict": verdict_out, **driver.streams}
        streams |= {f"solution {name}": fd for name, fd in solution.streams.items()}
        try:
            received, killed_for = self._watch(
                driver, [solution], streams, {"verdict", "ready", "solution ready"}
            )
        finally:
            os.close(verdict_out)
        try:
            verdict = json.loads(received["verdict"])
        except ValueError:
            reason = f"killed for {killed_for}" if killed_for else "the test process died"
            return TestVerdict([False] * len(tests), [reason] * len(tests))
        return TestVerdict(verdict["passed"], verdict["reasons"])

    def _start(self, config: dict[str, Any], pipes: Sequence[int] = (), stdin: str = "") -> Jail:
        config |= {
            "readable": self._readable,
            "box_bytes": self.limits.box_bytes,
            "rlimits": self.limits.rlimits(),
        }
        return Jail(self._python, config, pipes, stdin)

    def _watch(
        self, jail: Jail, others: list[Jail], streams: dict[str, int], until_closed: set[str]
    ) -> tuple[dict[str, bytes], str | None]:
        """Collects, then kills every jail; raises if one could not be locked."""
        deadline = time.monotonic() + self.limits.wall_seconds
        try:
            received, killed_for = collect(
                streams, until_closed, deadline, self.limits.output_bytes
            )
            if killed_for is None:
                try:
                    jail.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    killed_for = "time"
        finally:
            for each in (jail, *others):
                each.kill()
        for name, message in received.items():
            if name.endswith("ready") and message.startswith(b"failed"):
                raise SandboxUnavailable(f"{message.decode('utf-8', 'replace')}. {_FIX}")
        return received, killed_for

    def _probe(self) -> dict[str, bool]:
        """Attacks this machine from inside and looks from outside at what came of it."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "target")
            target.write_text("untouched")
            os.chmod(folder, 0o777)
            target.chmod(0o666)
            program = Path(__file__).parent.joinpath("jail", "probe.py").read_text()
            result = self.run(program, stdin=json.dumps([str(target), os.getpid()]))
            untouched = os.listdir(folder) == ["target"] and target.read_text() == "untouched"
            untouched = untouched and target.stat().st_mode & 0o777 == 0o666
        try:
            report = json.loads(result.stdout)
        except ValueError:
            raise SandboxUnavailable(f"the probe failed: {result.stderr[-2000:]}. {_FIX}") from None
        self.has_landlock = result.landlock
        return {**report, "writes outside confined": report["writes confined"] and untouched}
