"""Values of options that are more than one word: `name@revision:weight:block=weight`, `WxH`, `key=value`, captions."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import typer

_USE = re.compile(r"(?P<name>[^@:]+)(@(?P<revision>\d+))?(:(?P<weight>[-+.\deE]+))?(:(?P<blocks>[^:=,]+=[^:]+))?")


def parse_use(text: str, hint: str = "--adapter") -> tuple[str, float, int, dict[str, float]]:
    """Return (name, weight, revision, weights by block) of `name[@revision][:weight][:block=weight,...]`."""
    match = _USE.fullmatch(text)
    try:
        if match is None:
            raise ValueError(text)
        pairs = [pair.rpartition("=") for pair in (match["blocks"] or "").split(",") if pair]
        blocks = {block: float(weight) for block, _, weight in pairs}
        return match["name"], float(match["weight"] or 1.0), int(match["revision"] or 0), blocks
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not an adapter; write NAME, NAME:WEIGHT, NAME@REVISION:WEIGHT or NAME:BLOCK=WEIGHT,...",
            param_hint=hint,
        ) from error


def parse_size(text: str | None) -> tuple[int, int]:
    """Return (width, height) of `WxH` or `N` for a square; (0, 0), the model's own size, for None."""
    if text is None:
        return 0, 0
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write 128x128 or 128", param_hint="--size")
    return int(match[1]), int(match[2] or match[1])


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """Return the labels of `key=value` words."""
    labels = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise typer.BadParameter(f"{text!r} is not a label; write key=value", param_hint="--label")
        labels[key] = value
    return labels


def read_captions(path: Path, pictures: Sequence[Path]) -> list[str]:
    """Return one caption per picture from a JSON file.

    The file is an object of file names and captions, or a list of objects with `file` and `caption`. A picture is found
    by its path as written in the file, relative to the file, or by its bare name.
    """
    hint = "--captions-file"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} is not readable JSON: {error}", param_hint=hint) from error
    if isinstance(found, list) and all(isinstance(entry, dict) and "file" in entry for entry in found):
        found = {entry["file"]: entry.get("caption", "") for entry in found}
    if not isinstance(found, dict) or not all(isinstance(caption, str) for caption in found.values()):
        raise typer.BadParameter(
            f'{path} holds neither {{"file": "caption"}} nor [{{"file": ..., "caption": ...}}]', param_hint=hint
        )
    by_path = {(path.parent / name).resolve(): caption for name, caption in found.items()}
    by_name = {Path(name).name: caption for name, caption in found.items()}
    captions = [by_path.get(picture.resolve(), by_name.get(picture.name)) for picture in pictures]
    missing = [picture.name for picture, caption in zip(pictures, captions, strict=True) if caption is None]
    if missing:
        raise typer.BadParameter(f"{path} has no caption for {', '.join(missing)}", param_hint=hint)
    return [caption for caption in captions if caption is not None]
