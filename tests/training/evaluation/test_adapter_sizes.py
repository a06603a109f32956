"""Sizes in docs/adapters.md are those of Stable Diffusion 1.5's layers."""

import pytest
from scripts import load_script

sizes = load_script("docs/adapter_sizes.py")


def test_the_page_has_the_sizes_of_the_layers() -> None:
    text = sizes.PAGE.read_text(encoding="utf-8")
    layout = sizes.sd15_layout()
    assert sizes.render(text, layout) == text, "run `python -P docs/adapter_sizes.py`"
    assert all(f"<!-- size: {name} -->" in text for name in sizes.BYTES)
    assert (len(layout.matrices), len(layout.norms)) == (282, 109)
    # 19.17 million values in Custom Diffusion's files, 1,239,040 in Personalized Residuals'.
    assert sizes.BYTES["kv"](layout) == 4 * 19_169_280
    assert sizes.BYTES["residuals"](layout) == 2 * 1_239_040


@pytest.mark.parametrize(
    ("count", "shown"), [(1536, "1.5 kB"), (49152, "49 kB"), (109_056, "0.11 MB"), (76_677_120, "77 MB")]
)
def test_sizes_have_two_digits(count: int, shown: str) -> None:
    assert sizes.show(count) == shown
