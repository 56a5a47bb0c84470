"""Hostile programs, one for each thing the sandbox promises; each is seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastpost.rewards import jail_process
from fastpost.rewards import sandbox as sandbox_module
from fastpost.rewards.sandbox import Sandbox, SandboxLimits, SandboxUnavailable

_LIMITS = SandboxLimits(
    wall_seconds=6.0, cpu_seconds=3, memory_bytes=200 << 20, box_bytes=8 << 20, file_bytes=4 << 20
)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(_LIMITS)


@pytest.fixture(scope="module")
def hasty() -> Sandbox:
    return Sandbox(SandboxLimits(wall_seconds=1.0))


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file anybody may write, in a folder anybody may write, which must stay as it is."""
    file = tmp_path / "victim"
    file.write_text("secret")
    for path in (tmp_path, file):
        path.chmod(0o777)
    yield file
    assert os.listdir(tmp_path) == ["victim"]
    assert file.read_text() == "secret" and file.stat().st_mode & 0o777 == 0o777


# Names this process so that it can be found from outside, where the test knows the mark.
_MARK_SELF = "import ctypes; ctypes.CDLL(None).prctl(15, {mark!r}, 0, 0, 0)\n"


def _named_processes(name: str) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path("/proc", pid, "comm").read_text().strip() == name:
                found.append(pid)
        except OSError:
            continue
    return found


def test_a_harmless_program_runs(sandbox: Sandbox) -> None:
    program = "open('own', 'w').write('x'); print(int(input()) * 2)"
    result = sandbox.run(program, stdin="21\n")
    assert (result.stdout, result.exit_code, result.killed_for) == ("42\n", 0, None)


def test_every_protection_is_reported_to_hold(sandbox: Sandbox) -> None:
    assert len(sandbox.protections) == 8 and all(sandbox.protections.values())


@pytest.mark.parametrize(
    "attack",
    [
        "import socket; socket.socket(socket.AF_INET)",
        "import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
        "import urllib.request; urllib.request.urlopen('http://1.1.1.1', timeout=1)",
    ],
)
def test_no_network(sandbox: Sandbox, attack: str) -> None:
    result = sandbox.run(attack)
    assert result.exit_code == 1 and "Operation not permitted" in result.stderr


@pytest.mark.parametrize(
    "attack",
    [
        "open(V, 'w')",
        "open(V, 'a')",
        "os.unlink(V)",
        "os.rename(V, V + '2')",
        "os.chmod(V, 0)",
        "os.truncate(V, 0)",
        "os.utime(V)",
        "os.symlink('/', V + '2')",
        "os.link(V, '/box/x')",
        "os.mkdir(V + '2')",
        "os.symlink(V, '/box/x'); open('/box/x', 'w')",
        "os.symlink(D, '/box/d'); open('/box/d/new', 'w')",
        "open('/proc/1/root' + V, 'w')",
        "open('../../../..' + V, 'w')",
        "import shutil; shutil.rmtree(D)",
    ],
)
def test_no_change_outside_the_folder(sandbox: Sandbox, victim: Path, attack: str) -> None:
    names = f"import os; V = {str(victim)!r}; D = {str(victim.parent)!r}\n"
    result = sandbox.run(names + attack)
    assert result.exit_code == 1 and "Error" in result.stderr


@pytest.mark.parametrize(
    "attack",
    [
        "os.chmod(os.__file__, 0o777)",
        "os.utime(os.__file__)",
        "open(os.__file__, 'a')",
        "os.unlink(os.__file__)",
        "os.symlink(os.__file__, 'x'); os.chmod('x', 0)",
        "open('/usr/lib/planted', 'w')",
    ],
)
def test_visible_libraries_are_read_only(sandbox: Sandbox, attack: str) -> None:
    before = os.stat(os.__file__)
    assert sandbox.run("import os\n" + attack).exit_code == 1
    assert os.stat(os.__file__) == before or os.stat(os.__file__).st_mtime == before.st_mtime
    assert os.stat(os.__file__).st_mode == before.st_mode


def test_remounting_and_new_namespaces_are_refused(sandbox: Sandbox) -> None:
    attack = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.unshare(0x10000000), libc.mount(None, b"/", None, ctypes.c_ulong(32 | 4096), None),
      libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0), libc.prctl(1, 0, 0, 0, 0), os.getuid() == 0)
"""
    assert sandbox.run(attack).stdout == "-1 -1 -1 -1 False\n"


def test_secrets_are_not_readable(
    sandbox: Sandbox, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKEN", "hush-hush")
    attack = f"""
import os, glob
print(dict(os.environ))
for path in [{str(victim)!r}, '/etc/passwd', *glob.glob('/proc/*/environ')]:
    try: print(open(path).read())
    except OSError: pass
for descriptor in range(3, 256):
    try: print('descriptor', os.fstat(descriptor))
    except OSError: pass
"""
    result = sandbox.run(attack)
    assert result.exit_code == 0 and "HOME" in result.stdout
    for leak in ("hush", "secret", "root:", "descriptor"):
        assert leak not in result.stdout


def test_the_parent_cannot_be_signalled(sandbox: Sandbox) -> None:
    attack = f"""
import os, signal
print(os.getppid())
for pid in ({os.getpid()}, {os.getppid()}):
    try: os.kill(pid, 0); print('reached')
    except OSError: pass
os.kill(-1, signal.SIGKILL)
"""
    assert sandbox.run(attack).stdout in ("0\n", "")


def test_fork_bomb_ends_and_leaves_nothing(hasty: Sandbox) -> None:
    mark = b"fpforkbomb"
    attack = (
        _MARK_SELF.format(mark=mark)
        + """
import os
while True:
    try: os.fork()
    except OSError: pass
"""
    )
    start = time.monotonic()
    assert hasty.run(attack).killed_for == "time"
    assert time.monotonic() - start < 4
    assert _named_processes(mark.decode()) == []


def test_memory_bomb_is_refused(sandbox: Sandbox) -> None:
    result = sandbox.run("x = []\nwhile True: x.append(bytearray(10 << 20))")
    assert result.exit_code == 1 and "MemoryError" in result.stderr


@pytest.mark.parametrize(
    "attack",
    [
        "while True: pass",
        "import time; time.sleep(1e6)",
        "import signal\nfor s in (15, 2, 1): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_endless_programs_are_killed(hasty: Sandbox, attack: str) -> None:
    result = hasty.run(attack)
    assert result.killed_for == "time" and result.exit_code == 137


def test_cpu_time_is_limited() -> None:
    result = Sandbox(SandboxLimits(cpu_seconds=1, wall_seconds=20)).run("while True: pass")
    assert result.exit_code == 137 and result.killed_for is None


@pytest.mark.parametrize("ending", ["os._exit(0)", "time.sleep(60)"])
def test_daemons_die_with_the_run(hasty: Sandbox, ending: str) -> None:
    mark = b"fpdaemon"
    attack = f"""
import os, time, signal, ctypes
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(15, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(15, {mark!r}, 0, 0, 0)
        os.closerange(0, 3)
        time.sleep(60)
    os._exit(0)
time.sleep(0.2)
os.setsid()
{ending}
"""
    hasty.run(attack)
    assert _named_processes(mark.decode()) == []


def test_output_flood_is_cut(sandbox: Sandbox) -> None:
    result = sandbox.run("while True: print('x' * 100000)")
    assert result.killed_for == "output"
    assert len(result.stdout) <= _LIMITS.output_bytes + (1 << 16)


def test_disk_is_limited_by_file_and_in_all(sandbox: Sandbox) -> None:
    attack = """
import os
written = 0
for number in range(10):
    with open(f'f{number}', 'wb', buffering=0) as file:
        try:
            while n := file.write(bytes(1 << 16)): written += n
        except OSError as error: print(number, error.errno, file.tell() >> 20)
print(written >> 20)
"""
    lines = sandbox.run(attack).stdout.split("\n")
    assert lines[0] == "0 27 4"  # EFBIG at 4 MiB
    assert lines[2].split()[:2] == ["2", "28"]  # ENOSPC once the folder is full
    assert lines[-2] == "8"


def test_the_engine_s_death_ends_the_run(tmp_path: Path) -> None:
    """An engine killed with SIGKILL cannot tidy up; the jail must end all the same."""
    mark = "fporphan"
    program = _MARK_SELF.format(mark=mark.encode()) + "import time; time.sleep(60)"
    engine = (
        "from fastpost.rewards.sandbox import Sandbox, SandboxLimits\n"
        f"Sandbox(SandboxLimits(wall_seconds=50)).run({program!r})"
    )
    root = Path(sandbox_module.__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", engine], cwd=root) as process:
        deadline = time.monotonic() + 20
        while not _named_processes(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _named_processes(mark)
        process.kill()
    deadline = time.monotonic() + 5
    while _named_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _named_processes(mark) == []


def test_no_descriptor_or_process_leaks(sandbox: Sandbox) -> None:
    sandbox.run("pass")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        sandbox.run("pass")
        sandbox.check("x = 1", ["assert x == 1"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_ordinary_user_has_the_same_protections() -> None:
    """Started by root, runs the engine again as nobody."""
    root = Path(sandbox_module.__file__).parents[2]
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import os; from fastpost.rewards.sandbox import Sandbox\n"
        "assert os.getuid() != 0\n"
        "box = Sandbox()\n"
        "assert all(box.protections.values()), box.protections\n"
        "verdict = box.check('def f(x): return x', ['assert f(1) == 1', 'assert f(1) == 2'])\n"
        "assert verdict.passed == [True, False], verdict\n"
        "from fastpost.rewards.sandbox import SandboxLimits\n"
        "box = Sandbox(SandboxLimits(wall_seconds=1, box_bytes=1 << 20))\n"
        "bomb = 'import os\\nwhile True:\\n  try: os.fork()\\n  except OSError: pass'\n"
        "assert box.run(bomb).killed_for == 'time'\n"
        "assert 'MemoryError' in box.run('x = bytearray(1 << 30)').stderr\n"
        "assert 'Errno 28' in box.run('open(\"f\", \"wb\").write(bytes(2 << 20))').stderr\n"
        "assert 'Errno 30' in box.run('import os; os.chmod(os.__file__, 0)').stderr\n"
        "print('held')\n"
    )
    is_root = os.getuid() == 0
    # Root's interpreter may stand in a folder closed to others; the system's does not.
    result = subprocess.run(
        ["/usr/bin/python3" if is_root else sys.executable, "-c", program, str(root)],
        user=65534 if is_root else None,
        group=65534 if is_root else None,
        extra_groups=[] if is_root else None,
        cwd="/",
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "held\n", result.stderr


@pytest.mark.parametrize("protection", ["network isolated", "writes confined"])
def test_refuses_to_exist_where_a_protection_fails(
    monkeypatch: pytest.MonkeyPatch, protection: str
) -> None:
    monkeypatch.setattr(Sandbox, "_probe", lambda self: {protection: False, "rest": True})
    with pytest.raises(SandboxUnavailable, match=f"{protection}.*sysctl"):
        Sandbox()


@pytest.mark.parametrize(
    ("sabotage", "complaint"),
    [
        ("lockdown._enter_namespaces = refuse", "unshare refused"),
        ("lockdown.seccomp.install_filter = nothing", "network isolated"),
        ("lockdown._set_read_only = nothing", "writes confined"),
        ("lockdown._build_root = nothing; lockdown.BOX = '/tmp'", "probe failed|host files"),
        ("lockdown._drop_privileges = no_new_privs", "privileges dropped"),
    ],
)
def test_the_probe_notices_a_missing_layer(
    monkeypatch: pytest.MonkeyPatch, sabotage: str, complaint: str
) -> None:
    """Takes one layer out of a real jail; the machine must then be refused."""
    start = f"""
import sys; sys.path.append(sys.argv[1])
from jail import lockdown
def refuse(*a, **k): raise OSError(1, "unshare refused")
def nothing(*a, **k): return True
def no_new_privs(uid): lockdown._libc.prctl(38, 1, 0, 0, 0)
{sabotage}
lockdown.main()
"""
    monkeypatch.setattr(jail_process, "_START", start)
    with pytest.raises(SandboxUnavailable, match=f"(?s)({complaint}).*sysctl"):
        Sandbox(_LIMITS)


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="max_processes is 0"):
        SandboxLimits(max_processes=0)
    with pytest.raises(ValueError, match="64 MiB"):
        SandboxLimits(memory_bytes=1 << 20)
