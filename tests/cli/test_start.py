"""`hueshift generate` from a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_service import FakeServer

from hueshift.v1 import finetune_pb2
from hueshift.v1 import generation_pb2 as pb

Run = Callable[..., Any]


def test_options_reach_the_server(fake: FakeServer, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "apple.png"
    file.write_bytes(b"png")
    words = ["generate", "fox", "--out", tmp_path, "--picture", file]
    assert run(*words).code == 0
    assert run(*words, "--strength", 0.5).code == 0
    assert run(*words, "--invert").code == 0
    assert run(*words, "--inversion-steps", 9, "--noise-share", 0.25, "--report-inversion-error").code == 0
    plain, changed, edit, full = (request.picture for request in fake.service.seen["Generate"])
    assert plain == pb.StartPicture(data=b"png")
    assert changed == pb.StartPicture(data=b"png", strength=0.5)
    assert edit == pb.StartPicture(data=b"png", inversion=pb.Inversion())
    assert full.inversion == pb.Inversion(steps=9, noise_share=0.25, report_error=True)


@pytest.mark.parametrize("words", [["--strength", 0.5], ["--invert"], ["--noise-share", 0.5]])
def test_options_without_a_picture_are_refused(fake: FakeServer, run: Run, tmp_path: Path, words: list[Any]) -> None:
    ran = run("generate", "fox", "--out", tmp_path, *words)
    assert ran.code == 2
    assert "Generate" not in fake.service.seen


@pytest.mark.usefixtures("fake")
def test_a_missing_file_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("generate", "fox", "--out", tmp_path, "--picture", tmp_path / "none.png").code == 2


def test_one_picture_is_learned_to_be_edited(fake: FakeServer, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "apple.png"
    file.write_bytes(b"png")
    assert run("finetune", file, "--edit", "a red apple").code == 0
    spec = fake.service.seen["CreateFineTune"][0][0].spec
    assert (spec.subject, spec.pictures[0].caption) == (finetune_pb2.FINE_TUNE_SUBJECT_EDIT, "a red apple")
    assert run("finetune", file, "--edit", "a red apple", "--style").code == 2
    assert run("finetune", file, "--edit", "a red apple", "--caption", "an apple").code == 2
