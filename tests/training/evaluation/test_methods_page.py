"""docs/methods.md is what the rows give, and the command says so where there is nothing to measure."""

import sys
from pathlib import Path

import pytest
from scripts import load_script

from hueshift.training.evaluation.rows import read_rows

PROJECT = Path(__file__).resolve().parents[3]
SCRIPT = "benchmarks/methods_cpu.py"
ROW = {
    "cell": "fox, lora, 9 steps, seed 0",
    "case": "fox",
    "kind": "live",
    "method": "lora",
    "budget": "9 steps",
    "seed": 0,
    "machine": "2-core CPU",
    "threads": 2,
    "torch": "2",
    "date": "2026-11-20",
    "measures": {"clip_i": 0.25},
}


def test_the_page_is_up_to_date() -> None:
    text = (PROJECT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = read_rows(PROJECT / "benchmarks" / "results" / "methods_cpu.jsonl")
    assert load_script(SCRIPT).render(text, rows) == text, f"run `python -P {SCRIPT} --report`"


def test_generated_parts_are_replaced_and_the_rest_stays() -> None:
    script = load_script(SCRIPT)
    text = (PROJECT / "docs" / "methods.md").read_text(encoding="utf-8")
    page = script.render(text, [ROW])
    assert "| lora | 0.250 |" in page
    assert "methods-fox-9-steps.png" in page
    assert "Not yet measured" not in page
    assert script.render(page, [ROW]) == page
    assert script.render(page, []) == script.render(text, [])
    with pytest.raises(ValueError, match="summary"):
        script.render(text.replace("<!-- end: summary -->", ""), [ROW])


def test_without_the_data_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["methods_cpu.py", "--data", str(tmp_path / "none")])
    assert load_script(SCRIPT).main() == 0
    assert capsys.readouterr().out.startswith("skipped: there is no data folder")
