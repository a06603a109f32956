"""`hueshift keys`: made, listed and revoked in the store's own database."""

import json
from pathlib import Path

import pytest

from hueshift.server.cli.main import main
from hueshift.server.clock import SystemClock
from hueshift.server.settings import load_settings
from hueshift.server.store.database import Database
from hueshift.server.store.keys import KeyStore


def test_a_key_from_its_making_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path), "--json"]
    assert main(["keys", "create", "acme", "--label", "laptop", *store]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["tenant"], made["label"]) == ("acme", "laptop")
    database = Database(load_settings(store={"path": tmp_path}).store.database, SystemClock())
    keys = KeyStore(database, SystemClock())
    assert keys.verify(made["secret"]) == "acme"

    assert main(["keys", "list", *store]) == 0
    shown = capsys.readouterr().out
    assert [(key["key_id"], key["revoked"]) for key in json.loads(shown)] == [(made["key_id"], None)]
    assert made["secret"] not in shown

    assert main(["keys", "revoke", made["key_id"], *store]) == 0
    assert keys.verify(made["secret"]) is None
    capsys.readouterr()
    assert main(["keys", "revoke", made["key_id"], *store]) == 1
    assert "no valid key" in capsys.readouterr().err
    database.close()


def test_people_are_shown_the_secret_once_and_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "acme", "--store", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert "hs_" in told.out
    assert "cannot be shown again" in told.err
    assert main(["keys", "list", "--store", str(tmp_path)]) == 0
    assert "hs_" not in capsys.readouterr().out


def test_a_wrong_tenant_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "Not A Tenant", "--store", str(tmp_path)]) == 1
    assert "allowed" in capsys.readouterr().err
