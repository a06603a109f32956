"""Files of measured costs: those of former versions and settings do not pile up."""

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from hueshift.engines import cost_store
from hueshift.engines.cost_model import CostTable
from hueshift.engines.cost_store import Calibration, costs_file, read_costs, write_costs
from hueshift.engines.interface import Plan

TODAY = {"gpu": "an H200", "base": "sd15", "code": "today"}
MEASURED = Calibration(CostTable({(Plan.DENSE, 2, (8, 8)): 1.5}))


def write_aged(folder: Path, identity: dict[str, str], age: int) -> None:
    """Write a file that was used so many seconds ago."""
    write_costs(folder, identity, MEASURED)
    file = costs_file(folder, identity)
    moment = file.stat().st_mtime - age
    os.utime(file, (moment, moment))


def known(folder: Path, *codes: str) -> list[str]:
    """Those codes of the same base and GPU whose file is there."""
    return [code for code in codes if costs_file(folder, TODAY | {"code": code}).is_file()]


def test_the_former_measurements_that_were_used_last_stay(tmp_path: Path) -> None:
    codes = [f"former {number}" for number in range(6)]
    for number, code in enumerate(codes[:4]):
        write_aged(tmp_path, TODAY | {"code": code}, 100 * (number + 1))
    # The oldest is read once more.
    assert read_costs(tmp_path, TODAY | {"code": codes[3]}) is not None
    for number, code in enumerate(codes[4:], 4):
        write_aged(tmp_path, TODAY | {"code": code}, 10 * number)
    write_costs(tmp_path, TODAY, MEASURED)
    assert known(tmp_path, *codes, "today") == [codes[0], codes[3], codes[4], codes[5], "today"]
    # Nor do their locks.
    assert len(list((tmp_path / "costs").iterdir())) == 10


@pytest.mark.parametrize("other", [{"base": "sdxl"}, {"gpu": "an A100"}])
def test_other_bases_and_gpus_and_damaged_files_stay(tmp_path: Path, other: dict[str, str]) -> None:
    kept = [TODAY | other | {"code": f"former {number}"} for number in range(4)]
    for number, identity in enumerate(kept):
        write_aged(tmp_path, identity, 1000 + number)
    damaged = costs_file(tmp_path, {"some": "other"})
    damaged.write_text("{", encoding="utf-8")
    for number in range(7):
        write_aged(tmp_path, TODAY | {"code": f"former {number}"}, 100 - number)
    assert all(read_costs(tmp_path, identity) == MEASURED for identity in kept)
    assert damaged.is_file()
    assert len(known(tmp_path, *(f"former {number}" for number in range(7)))) == 5


def test_a_file_that_cannot_be_removed_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write_aged(tmp_path, TODAY | {"code": f"former {number}"}, 100 - number)

    def refuse(file: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    # `write_atomically` has removed its temporary file by then, or moved it.
    monkeypatch.setattr(cost_store, "write_atomically", lambda file, write: write(file))
    monkeypatch.setattr(Path, "unlink", refuse)
    with capture_logs() as logs:
        write_costs(tmp_path, TODAY, MEASURED)
    assert [log["event"] for log in logs] == ["costs_not_removed"]
    assert read_costs(tmp_path, TODAY) == MEASURED
