"""Where the embedded default base model and its CLIP lie on disk."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

EMBEDDED_MODEL = _HERE / "emoji-128"
EMBEDDED_CLIP = _HERE / "emoji-clip"
