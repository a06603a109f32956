"""Cache files: whole or absent, whatever happens while they are written."""

import threading
import time
from pathlib import Path

import pytest

from hueshift.engines.cache_files import exclusive, publish_folder, write_atomically


class _PowerCutError(Exception):
    pass


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    file = tmp_path / "entry"
    file.write_text("old")

    def write(path: Path) -> None:
        path.write_text("half")
        raise _PowerCutError

    with pytest.raises(_PowerCutError):
        write_atomically(file, write)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    write_atomically(file, lambda path: (path.write_text("new"), None)[1])
    assert file.read_text() == "new"


def test_a_failed_folder_leaves_the_old_one_and_no_debris(tmp_path: Path) -> None:
    folder = tmp_path / "entry"

    def fill(path: Path) -> None:
        (path / "a").write_text("one")

    publish_folder(folder, fill)

    def fail(path: Path) -> None:
        (path / "a").write_text("half")
        raise _PowerCutError

    with pytest.raises(_PowerCutError):
        publish_folder(folder, fail)
    assert (folder / "a").read_text() == "one"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_new_folder_replaces_the_whole_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    publish_folder(folder, lambda path: ((path / "old").write_text("1"), None)[1])
    publish_folder(folder, lambda path: ((path / "new").write_text("2"), None)[1])
    assert [file.name for file in folder.iterdir()] == ["new"]


def test_only_one_holds_an_entry(tmp_path: Path) -> None:
    inside: list[int] = []
    most = 0

    def work(number: int) -> None:
        nonlocal most
        with exclusive(tmp_path / "entry"):
            inside.append(number)
            most = max(most, len(inside))
            time.sleep(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
