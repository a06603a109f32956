"""Settings that are absent, and variables that name nothing."""

from pathlib import Path

import pytest

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.settings import load_settings


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ("model", "clip_path"),
        ("server", "tls_certificate"),
        ("cluster", "replica_ca"),
        ("engine", "slot_weights_bytes"),
    ],
)
def test_an_empty_value_is_none_where_a_setting_may_be_absent(
    section: str, setting: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "hueshift.toml"
    file.write_text(f'[{section}]\n{setting} = ""\n', encoding="utf-8")
    assert getattr(getattr(load_settings(file), section), setting) is None
    monkeypatch.setenv(f"HUESHIFT_{section}__{setting}".upper(), "")
    assert getattr(getattr(load_settings(), section), setting) is None


def test_an_empty_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUESHIFT_SERVER__PORT", "")
    with pytest.raises(InvalidArgument, match=r"server\.port"):
        load_settings()


def test_a_variable_of_no_section_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the command line reads, and what Kubernetes sets for a service of our name, are no settings.
    monkeypatch.setenv("HUESHIFT_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("HUESHIFT_SERVICE_HOST", "10.0.0.1")
    load_settings()
    monkeypatch.setenv("HUESHIFT_ENGIN__DEVICE", "cuda:1")
    with pytest.raises(InvalidArgument, match=r"HUESHIFT_ENGIN__DEVICE: .*HUESHIFT_ENGINE__") as refused:
        load_settings()
    assert refused.value.reason is Reason.SETTINGS_INVALID
