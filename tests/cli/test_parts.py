"""The small parts of the command line."""

from pathlib import Path

import pytest
import typer
from fake_service import png

from hueshift.server.cli.blocks import picture_text
from hueshift.server.cli.files import free_path, picture_name, save
from hueshift.server.cli.output import size_text
from hueshift.server.cli.parse import parse_size, parse_use, read_captions


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("fox", ("fox", 1.0, 0, {})),
        ("fox:0.5", ("fox", 0.5, 0, {})),
        ("fox:-1e-1", ("fox", -0.1, 0, {})),
        ("tenants/a/adapters/fox@12:2", ("tenants/a/adapters/fox", 2.0, 12, {})),
        ("fox:structure=1", ("fox", 1.0, 0, {"structure": 1.0})),
        ("fox@3:0.5:mid_block=-1,up_blocks.1=2", ("fox", 0.5, 3, {"mid_block": -1.0, "up_blocks.1": 2.0})),
    ],
)
def test_adapter_uses(text: str, use: tuple[str, float, int, dict[str, float]]) -> None:
    assert parse_use(text) == use


@pytest.mark.parametrize("text", ["", ":1", "fox:", "fox@x", "fox:1:2", "fox:--", "fox:a=", "fox:a=1:1", "fox:a=1,b"])
def test_wrong_adapter_uses(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_use(text)


def test_sizes() -> None:
    assert parse_size("64x96") == (64, 96)
    assert parse_size("64") == (64, 64)
    assert parse_size(None) == (0, 0)
    with pytest.raises(typer.BadParameter):
        parse_size("64x")


def test_file_names() -> None:
    assert picture_name("  A Fox/../etc? ", 3, "image/webp") == "a-fox-etc-3.webp"
    assert picture_name("\u2744", 3, "image/png") == "picture-3.png"
    assert len(picture_name("x" * 500, 3, "image/jpeg")) < 64


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save(path, b"new")
    assert path.read_bytes() == b"old"
    assert free_path(path) == tmp_path / "a-2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_captions_are_found_by_path_before_name(tmp_path: Path) -> None:
    for folder in ("train", "eval"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "fox.png").write_bytes(b"")
    file = tmp_path / "captions.json"
    file.write_text('{"train/fox.png": "trained", "eval/fox.png": "kept"}')
    assert read_captions(file, [tmp_path / "eval/fox.png", tmp_path / "train/fox.png"]) == ["kept", "trained"]


def test_pictures_in_a_terminal() -> None:
    text = picture_text(png(red=200), 4)
    assert text.plain == "\u2580\u2580\u2580\u2580\n" * 2
    assert str(text.spans[0].style) == "rgb(200,40,40) on rgb(200,40,40)"


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (0, 999, 1500, 172_000, 94_000_000)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "172 kB",
        "94.0 MB",
    ]
