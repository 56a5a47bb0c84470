"""The journal: whole lines, one run a folder, one process at a time, a full disk, a SIGKILL."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from fastpost.data.rows import DataError
from fastpost.loops.journal import Journal

ABOUT = {"loop": "one", "options": {"n": 4, "names": ("a", "b")}}


def test_what_is_written_is_read_again_and_made_once(tmp_path) -> None:
    made = []

    def make():
        made.append(1)
        return {"text": "a\nü\ud800", "none": None, "pair": (1, 2.5)}

    for _ in range(2):
        with Journal(tmp_path, ABOUT) as journal:
            value = journal.once("key", make)
            assert value == {"text": "a\nü\ud800", "none": None, "pair": [1, 2.5]}
            assert "key" in journal and "other" not in journal and journal.count("ke") == 1
    assert made == [1]


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_line_that_was_cut_off_is_made_again(tmp_path, cut) -> None:
    with Journal(tmp_path, ABOUT) as journal:
        journal.put("first", "kept")
        journal.put("second", "x" * 30)
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[:-cut])
    with Journal(tmp_path, ABOUT) as journal:
        assert journal["first"] == "kept" and "second" not in journal
        journal.put("second", "again")
    with Journal(tmp_path, ABOUT) as journal:
        assert journal["second"] == "again"


def test_a_damaged_line_in_the_middle_is_named(tmp_path) -> None:
    with Journal(tmp_path, ABOUT) as journal:
        journal.put("first", 1)
    with journal.path.open("a") as file:
        file.write("<html>not json</html>\n")
    with pytest.raises(DataError, match="line 3 is damaged"):
        Journal(tmp_path, ABOUT)


def test_another_run_is_refused_with_what_differs(tmp_path) -> None:
    Journal(tmp_path, ABOUT).close()
    with pytest.raises(DataError, match=r'options: \{"n": 4.* there, \{"n": 5'):
        Journal(tmp_path, ABOUT | {"options": {"n": 5}})


def test_two_processes_do_not_share_a_folder(tmp_path) -> None:
    with Journal(tmp_path, ABOUT), pytest.raises(DataError, match="another process is at work"):
        Journal(tmp_path, ABOUT)


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, monkeypatch) -> None:
    class FullDisk:
        """Takes ten bytes, then has no room."""

        def __init__(self, file) -> None:
            self.file, self.left = file, 10

        def write(self, data):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = self.file.write(data[: self.left])
            self.left -= taken
            return taken

        def __getattr__(self, name):
            return getattr(self.file, name)

    with Journal(tmp_path, ABOUT) as journal:
        journal.put("first", 1)
        before = journal.path.read_bytes()
        journal._file = FullDisk(journal._file)
        with pytest.raises(DataError, match="the disk is full"):
            journal.put("second", 2)
        assert journal.path.read_bytes() == before and "second" not in journal
    with Journal(tmp_path, ABOUT) as journal:
        journal.put("second", 2)
        assert journal["first"] == 1


def test_a_process_killed_outright_repeats_no_call(tmp_path) -> None:
    calls = tmp_path / "calls"

    def call(i: int) -> int:
        with calls.open("a") as file:
            file.write(f"{i} ")
        return i

    for stop in (3, 7, 99):
        child = os.fork()
        if child == 0:
            with Journal(tmp_path, ABOUT) as journal:
                for i in range(10):
                    if i == stop:
                        os.kill(os.getpid(), signal.SIGKILL)
                    journal.once(f"call/{i}", lambda i=i: call(i))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert (os.WIFSIGNALED(status), os.WIFEXITED(status)) == (stop != 99, stop == 99)
    assert calls.read_text().split() == [str(i) for i in range(10)]
