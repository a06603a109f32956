"""Files named by content: whole or absent, healed by writing again, gone when deleted."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from hueshift.adapters.errors import InvalidArgument, Reason, ResourceExhausted
from hueshift.server.store.blobs import BlobStore

DATA = b"adapter" * 1000
HASH = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def temporaries(blobs: BlobStore) -> list[Path]:
    return list((blobs.path(HASH).parent.parent / "tmp").iterdir())


def test_bytes_are_found_by_their_hash(blobs: BlobStore) -> None:
    assert blobs.put(DATA) == HASH
    assert blobs.path(HASH).read_bytes() == DATA
    assert blobs.put(DATA) == HASH
    entries = list(blobs.entries())
    assert [(entry.content_hash, entry.size_bytes) for entry in entries] == [(HASH, len(DATA))]
    assert 0 <= entries[0].age < 60
    assert temporaries(blobs) == []


def test_deleting_frees_the_bytes_once(blobs: BlobStore) -> None:
    blobs.put(DATA)
    assert blobs.delete(HASH) == len(DATA)
    assert blobs.delete(HASH) == 0
    assert not blobs.path(HASH).exists()
    assert list(blobs.entries()) == []


def test_a_staged_file_has_no_name_until_it_is_committed(blobs: BlobStore) -> None:
    staged = blobs.stage(DATA)
    assert (staged.content_hash, staged.size_bytes) == (HASH, len(DATA))
    assert list(blobs.entries()) == []
    blobs.commit(staged)
    blobs.discard(staged)
    assert blobs.path(HASH).read_bytes() == DATA
    other = blobs.stage(b"other")
    blobs.discard(other)
    assert temporaries(blobs) == []


def test_pieces_become_the_same_file(blobs: BlobStore) -> None:
    writer = blobs.writer()
    for begin in range(0, len(DATA), 999):
        writer.write(DATA[begin : begin + 999])
    assert writer.size_bytes == len(DATA)
    staged = writer.finish()
    assert staged.content_hash == HASH
    blobs.commit(staged)
    writer.discard()
    assert blobs.path(HASH).read_bytes() == DATA
    abandoned = blobs.writer()
    abandoned.write(DATA)
    abandoned.discard()
    assert temporaries(blobs) == []


def test_writing_again_heals_a_damaged_file(blobs: BlobStore) -> None:
    blobs.put(DATA)
    blobs.path(HASH).write_bytes(b"damaged")
    blobs.put(DATA)
    assert blobs.path(HASH).read_bytes() == DATA


@pytest.mark.parametrize("text", ["", "../../etc/passwd", HASH.upper(), HASH[:-1], HASH + "0", f"{HASH}\n"])
def test_only_hashes_become_paths(blobs: BlobStore, text: str) -> None:
    with pytest.raises(InvalidArgument, match="SHA-256"):
        blobs.path(text)


def test_the_sweep_spares_what_is_young(blobs: BlobStore) -> None:
    old, young = blobs.stage(DATA), blobs.stage(b"young")
    hour_ago = old.file.stat().st_mtime - 3600
    os.utime(old.file, (hour_ago, hour_ago))
    assert blobs.sweep_temporaries(1800) == len(DATA)
    assert temporaries(blobs) == [young.file]
    assert blobs.sweep_temporaries(0) == len(b"young")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(number, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceExhausted) as caught:
        blobs.put(DATA)
    assert caught.value.reason is Reason.STORE_FULL
    assert temporaries(blobs) == []
    assert list(blobs.entries()) == []


def test_files_and_folders_are_synced_in_the_order_that_survives_a_power_cut(
    blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.replace

    def spy_sync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        sync(descriptor)

    def spy_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(Path, "replace", spy_rename)
    blobs.put(DATA)
    # The first folder is the store's, in which the shard was made.
    assert events == ["file", "folder", "rename", "folder"]
    events.clear()
    blobs.delete(HASH)
    assert events == ["folder"]
