"""A checkpoint is whole, belongs to its job, or does not count."""

from pathlib import Path

import pytest
import torch
from tiny_training import make_pictures, make_spec

from hueshift.training import checkpoint as module
from hueshift.training.checkpoint import Checkpoint, fingerprint_job, read_checkpoint, write_checkpoint


def make(step: int) -> Checkpoint:
    tensors = {"x": torch.arange(4.0) / 3, "random": torch.Generator().manual_seed(step).get_state()}
    return Checkpoint(step, tensors, [0.1 * i for i in range(step)])


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "work" / "checkpoint"
    write_checkpoint(path, make(3), "job")
    write_checkpoint(path, make(5), "job")
    found = read_checkpoint(path, "job")
    assert found is not None
    assert found.step == 5
    assert found.losses == make(5).losses
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in make(5).tensors.items())
    assert list(path.parent.iterdir()) == [path]


def test_no_file_another_job_or_a_torn_file_start_from_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    assert read_checkpoint(path, "job") is None
    write_checkpoint(path, make(3), "job")
    assert read_checkpoint(path, "other job") is None
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert read_checkpoint(path, "job") is None


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    write_checkpoint(path, make(3), "job")

    def torn(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", torn)
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(path, make(4), "job")
    found = read_checkpoint(path, "job")
    assert found is not None
    assert found.step == 3
    assert list(tmp_path.iterdir()) == [path]


def test_the_fingerprint_tells_jobs_apart() -> None:
    spec, pictures = make_spec(), make_pictures()
    prints = {
        fingerprint_job(spec, pictures, "base"),
        fingerprint_job(make_spec(seed=8), pictures, "base"),
        fingerprint_job(spec, pictures[::-1], "base"),
        fingerprint_job(spec, pictures, "another base"),
    }
    assert len(prints) == 4
    assert fingerprint_job(spec, make_pictures(), "base") in prints
