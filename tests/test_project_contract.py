"""The checked-in stubs are what the .proto files give, and every part of the contract is importable and typed."""

import os
import sys
from pathlib import Path

import pytest
from scripts import load_script

PROTO = Path(__file__).resolve().parent.parent / "proto"


def test_stubs_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # protoc finds the mypy plugins beside the interpreter, whether or not the environment is activated.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    load_script("proto/generate.py").generate_stubs(tmp_path)
    fresh = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))
    kept = sorted(path.relative_to(PROTO) for path in (PROTO / "hueshift").rglob("*_pb2*.py*") if path.suffix != ".pyc")
    assert fresh == kept
    stale = [str(name) for name in fresh if (tmp_path / name).read_bytes() != (PROTO / name).read_bytes()]
    assert not stale, f"run `make proto`: {stale} differ from what the .proto files give"
