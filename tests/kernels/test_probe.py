"""A process that can launch no kernel says what it lacks."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hueshift.kernels.errors import KernelUnavailableError
from hueshift.kernels.launch import Launch
from hueshift.kernels.probe import check_launches, compiler, missing_tools

CPU = torch.device("cpu")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without a compiler and without Python's headers, and a folder on its PATH."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})

    def refuse(launch: Launch) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable\nand more")

    monkeypatch.setattr(Launch, "run", refuse)
    return tmp_path


def test_what_is_missing_is_named_with_its_packages(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelUnavailableError) as caught:
        check_launches(CPU)
    told = str(caught.value)
    for words in ("Failed to find C compiler", "gcc or clang on the PATH", "gcc libc6-dev python3-dev", "Python.h"):
        assert words in told
    assert "\n" not in told
    (bare / "clang").write_text("#!/bin/sh\n")
    (bare / "clang").chmod(0o755)
    assert compiler() == str(bare / "clang")
    assert len(missing_tools()) == 1
    monkeypatch.setenv("CC", "my-cc")
    assert "'my-cc', which CC names" in missing_tools()[0]


def test_another_cause_is_told_where_nothing_is_missing(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "gcc").write_text("#!/bin/sh\n")
    (bare / "gcc").chmod(0o755)
    (bare / "include").mkdir()
    (bare / "include" / "Python.h").touch()
    assert missing_tools() == []
    with pytest.raises(KernelUnavailableError, match=r"compiler is there .*gcc"):
        check_launches(CPU)


@pytest.mark.usefixtures("bare")
def test_a_launch_that_works_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, cross_compile: Callable[..., Any]
) -> None:
    ran: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda launch: ran.append(launch))
    check_launches(CPU)
    assert [launch.grid for launch in ran] == [(1,)]
    assert "st.global" in cross_compile(ran[0], "sm_90").ptx


@pytest.mark.gpu
def test_a_gpu_launches_it(gpu: torch.device) -> None:
    check_launches(gpu)
