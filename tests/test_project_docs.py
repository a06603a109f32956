"""README's tables are what the code says, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
from scripts import load_script

from hueshift.adapters.errors import Reason

PROJECT = Path(__file__).resolve().parent.parent
PAGES = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"), PROJECT / "models" / "README.md"])


def test_readme_tables_are_up_to_date() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert load_script("docs/tables.py").render(text) == text, "run `python -P docs/tables.py`"


def test_every_reason_has_a_meaning() -> None:
    assert set(load_script("docs/tables.py").MEANINGS) == set(Reason)


def test_every_reason_that_a_call_can_end_with_has_a_code() -> None:
    rows = [row.split(" | ") for row in load_script("docs/tables.py").errors_table().splitlines()[2:]]
    without = {reason for reason, code, *_, meaning in rows if not code and "in a job's error" not in meaning}
    assert not without


def test_every_alert_is_told_and_every_metric_of_the_pages_exists() -> None:
    rules = (PROJECT / "deploy" / "prometheus" / "alerts.yaml").read_text(encoding="utf-8")
    told = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert [name for name in re.findall(r"alert: (\w+)", rules) if not re.search(rf"\b{name}\b", told)] == []
    rows = re.findall(r"^\| `(hueshift_\w+)` \|", load_script("docs/tables.py").metrics_table(), re.MULTILINE)
    known = {*rows, *(name + suffix for name in rows for suffix in ("_bucket", "_sum", "_count"))}
    shown = {
        name for page in PAGES for name in re.findall(r"\bhueshift_\w*[a-z]\b(?!_)", page.read_text(encoding="utf-8"))
    }
    assert shown - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
