"""What a file says of its making: everything that acted on the picture, and no word of a prompt."""

from dataclasses import replace
from typing import Any

import pytest
from generation_bench import Bench

from hueshift.server.generation import InversionRequest, LagRequest, StartRequest
from hueshift.server.provenance import provenance

BASE = "ab" * 32
FILE = "cd" * 32


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, {}),
        ({"lag": LagRequest()}, {"lag": "adapters"}),
        ({"lag": LagRequest(("secret",))}, {"lag": "words"}),
        ({"shared_attention": True}, {"shared_attention": "seed=3"}),
        ({"start": StartRequest(b"png", 0.8, None, FILE)}, {"start": f"{FILE} strength=0.8"}),
        (
            {"start": StartRequest(b"png", 1.0, InversionRequest(50, 0.3), FILE)},
            {"start": f"{FILE} strength=1 inversion=50 noise_share=0.3"},
        ),
    ],
)
def test_a_file_names_what_acted_on_its_picture(given: dict[str, Any], told: dict[str, str]) -> None:
    bench = Bench()
    request = bench.request(adapters={"low-0.5": 0.25}, seeds=(3, 4), prompt="a secret fox")
    found = provenance(replace(request, **given), 1, BASE)
    assert found == {"seed": "4", "base": BASE, "adapters": "low-0.5*0.25", **told}
    assert "secret" not in " ".join(found.values())
    bench.scheduler.close()
