"""Training steps on a device that is not there: everything lies on it, and no step waits for it.

Every case runs in one process of its own (tests/support/far_training.py), which says why.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hueshift.training.spec import Method

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "far_training.py"
ALONE = ["accumulated", "pissa", "layers", "words as they are", "text encoder", "sdxl", "sdxl text encoder"]
SHARED = {"svdiff": 6, "lora": 4, "layers": None, "all on": None, "sdxl": 3}
PRODUCTS = {"aten::addmm", "aten::convolution"}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What each case found."""
    run = subprocess.run([sys.executable, "-P", str(SCRIPT)], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    made: dict[str, dict[str, Any]] = json.loads(run.stdout.strip().splitlines()[-1])
    return made


def assert_sound(case: dict[str, Any]) -> None:
    """One device, no stop."""
    assert "error" not in case, case["error"]
    assert case["stops"] == []
    assert case["astray"] == []
    assert case["moved"]


def test_the_wrong_ways_would_be_seen(found: dict[str, dict[str, Any]]) -> None:
    assert found["wrong ways"]["stops"] == [
        "aten::_to_copy ['cpu', 'maia']",
        "aten::_to_copy ['maia', 'cpu']",
        "aten::copy_ ['maia', 'cpu', 'maia']",
    ]


@pytest.mark.parametrize("method", Method)
def test_a_step_of_every_method_in_bfloat16(found: dict[str, dict[str, Any]], method: Method) -> None:
    assert_sound(found[f"{method} bf16"])
    low = set(found[f"{method} bf16"]["low"])
    assert low >= PRODUCTS
    # Singular values scale activations in one pass each way (engines/scaled_rows.py).
    assert ("aten::mul.out" in low) == (method is Method.SVDIFF)


@pytest.mark.parametrize("method", Method)
def test_a_step_of_every_method_with_all_objectives_and_checkpointed(
    found: dict[str, dict[str, Any]], method: Method
) -> None:
    assert_sound(found[f"{method} all on"])


@pytest.mark.parametrize("name", ALONE)
def test_other_ways_to_step(found: dict[str, dict[str, Any]], name: str) -> None:
    assert_sound(found[name])


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_step_encodes_all_captions_in_one_pass(found: dict[str, dict[str, Any]], name: str) -> None:
    case = found[f"shared {name}"]
    assert_sound(case)
    assert len(case["passes"]) == 1
    if SHARED[name] is not None:
        assert case["passes"] == [SHARED[name]]


def test_factors_cross_over_once_for_all_jobs_of_a_worker(found: dict[str, dict[str, Any]]) -> None:
    case = found["held factors"]
    assert "error" not in case, case["error"]
    # Without them held every job has its own.
    size = case["plain"][0]
    assert size > 0
    assert case["plain"] == [size, size]
    assert (case["first"], case["later"], case["lora"]) == (size, 0, 0)
    # Of another precision, and then for a job beside it that is of another family.
    assert (case["lowered"], case["together"]) == (size, 0)
    assert (case["in use"], case["still there"]) == (False, 0)
    assert (case["given back"], case["nothing left"], case["anew"]) == (True, False, size)
