"""Settings as words and numbers, there and back."""

from typing import Any

import pytest

from hueshift.client.job_spec import make_spec, read_settings
from hueshift.v1 import finetune_pb2 as pb

SETTINGS: dict[str, Any] = {
    "steps": 40,
    "rate_schedule": "cosine",
    "precision": "bf16",
    "lora_init": "pissa",
    "targets": ("proj_out", "attn2.to_k"),
    "mirror": False,
    "learning_rate": 0.5,
}


def test_settings_come_back_as_they_went() -> None:
    spec = make_spec([b"picture"], {}, {"settings": SETTINGS})
    assert read_settings(spec.settings) == SETTINGS
    # Zero is a rank like others, and no sign of what was left out.
    whole = make_spec([], {}, {"settings": {"rank": 0}, "allow_unserved": True})
    assert (read_settings(whole.settings), whole.allow_unserved) == ({"rank": 0}, True)
    # One word is a list of one.
    assert list(make_spec([], {}, {"settings": {"targets": "proj_out"}}).settings.targets) == ["proj_out"]


def test_choices_newer_than_this_client_are_left_out() -> None:
    assert read_settings(pb.FineTuneSettings(steps=3, rate_schedule=99)) == {"steps": 3}  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["unspecified", "", 3, ["linear"]])
def test_what_is_no_choice_is_named_with_those_there_are(word: Any) -> None:
    with pytest.raises(ValueError, match="allowed are linear, constant, cosine"):
        make_spec([], {}, {"settings": {"rate_schedule": word}})
