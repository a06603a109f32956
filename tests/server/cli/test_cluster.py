"""`hueshift cluster`, as far as it goes without a cluster."""

import json
import sys
from pathlib import Path

import pytest
from small_jobs import small_spec

from hueshift.server.cli.main import main
from hueshift.server.clock import SystemClock
from hueshift.server.settings import load_settings
from hueshift.server.store.job_records import NewJob
from hueshift.server.store.stores import open_stores


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HUESHIFT_STORE__PATH", str(tmp_path))
    monkeypatch.setenv("HUESHIFT_TRAINING__MAX_ATTEMPTS", "2")
    return tmp_path


def test_dead_letters_tell_what_ended_every_attempt(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = open_stores(load_settings(), SystemClock())
    stores.jobs.create(NewJob("ft-1", "alice", small_spec(), "fox", "Fox", {}), tenant_limit=1)
    for owner in ("one", "two"):
        assert stores.jobs.claim(owner, 60.0) is not None
        stores.jobs.expire_leases(owner, f"{owner} ended with status -9")
    stores.close()
    assert main(["cluster", "dead-letters", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["job"], row["attempt"], row["cause"]) for row in rows] == [
        ("ft-1", 1, "one ended with status -9"),
        ("ft-1", 2, "two ended with status -9"),
    ]
    assert main(["cluster", "dead-letters"]) == 0
    assert "two ended with status -9" in capsys.readouterr().out


def test_without_ray_it_is_said_in_one_line(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["cluster", "status"]) == 1
    said = capsys.readouterr().err
    assert "pip install 'hueshift[ray]'" in said
    assert "Traceback" not in said
