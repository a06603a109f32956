"""What the gallery teaches: a fox by every kind of adapter, and OpenMoji's style, from the pictures of the examples."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hueshift.training.defaults import complete_spec
from hueshift.training.spec import Method, SubjectKind, TrainingSpec

PICTURES = Path(__file__).resolve().parent / "pictures"
FOX_WORD, FOX_NOUN = "sks", "animal"
# Another word than the fox's, so that both adapters can be used in one picture.
STYLE_WORD, STYLE_NOUN = "idk", "emoji"
STYLE_WORDS = ("noto", "twemoji", "fluent", "flat", "modern", "3d")


@dataclass(frozen=True, slots=True)
class GalleryLesson:
    """An adapter of the gallery, its title, how it is learned, and from which folder of pictures."""

    key: str
    title: str
    method: Method
    steps: int
    folder: str = "fox"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, steps: int | None = None) -> TrainingSpec:
        """The job; `steps` in the place of the lesson's own."""
        style = self.folder == "openmoji"
        captions = [entry["caption"] for entry in _entries(self.folder)]
        if style:
            captions = [caption.replace(FOX_WORD, STYLE_WORD) for caption in captions]
        return complete_spec(
            method=self.method,
            subject_kind=SubjectKind.STYLE if style else SubjectKind.SUBJECT,
            captions=captions,
            identifier=STYLE_WORD if style else FOX_WORD,
            class_noun=STYLE_NOUN if style else FOX_NOUN,
            identifier_init=STYLE_WORDS if style else (),
            **{**self.settings, "steps": steps or self.steps},
        )

    def pictures(self) -> list[Image.Image]:
        """The pictures to learn from, as the captions of the spec."""
        return [Image.open(PICTURES / self.folder / entry["file"]).convert("RGB") for entry in _entries(self.folder)]


# Steps as few as show the thing: about six minutes of training in all on two idle cores.
LESSONS = (
    GalleryLesson("svdiff", "SVDiff", Method.SVDIFF, 120),
    GalleryLesson("residuals", "Personalized Residuals", Method.RESIDUALS, 100),
    GalleryLesson("lora", "LoRA, rank 8", Method.LORA, 100),
    GalleryLesson("words", "Textual Inversion, 4 vectors", Method.TEXTUAL_INVERSION, 100),
    GalleryLesson("layers", "P+: 4 vectors a layer", Method.TEXTUAL_INVERSION, 80, settings={"per_layer": True}),
    GalleryLesson("kv", "Custom Diffusion: K and V", Method.CUSTOM_DIFFUSION, 100),
    GalleryLesson("style", "SVDiff, OpenMoji", Method.SVDIFF, 120, folder="openmoji"),
)


def _entries(folder: str) -> list[dict[str, str]]:
    entries = json.loads((PICTURES / folder / "captions.json").read_text(encoding="utf-8"))
    return [entry for entry in entries if entry["file"].startswith("train")]
