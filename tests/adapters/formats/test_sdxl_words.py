"""Learned words of SDXL: two tensors in other programs' files, one embedding here."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from foreign_unet import BASE_HASH, WIDTH, foreign_unet
from torch import Tensor

from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.adapters.formats.draft import ImportBase, ImportOptions
from hueshift.adapters.formats.exporting import ExportForm, export_adapter
from hueshift.adapters.formats.importing import import_adapter
from hueshift.engines.base_model import read_layout

WIDTHS = (WIDTH // 2, WIDTH - WIDTH // 2)
BASE = ImportBase(replace(read_layout(foreign_unet(), BASE_HASH, WIDTH), token_parts=WIDTHS))
NAMED = ImportOptions(word="<art>")


def halves(vectors: int = 2, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    names = zip(("clip_l", "clip_g"), WIDTHS, strict=True)
    return {name: torch.randn(vectors, width, generator=draw).to(dtype) for name, width in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_encoders_vectors_lie_side_by_side_and_come_back(dtype: torch.dtype) -> None:
    stored = halves(dtype=dtype)
    adapter, _ = import_adapter(safetensors.torch.save(stored), BASE, NAMED)
    assert list(adapter.tokens) == ["<art>"]
    assert torch.equal(adapter.tokens["<art>"], torch.cat([stored["clip_l"], stored["clip_g"]], 1))
    out = export_adapter(adapter, ExportForm.TEXTUAL_INVERSION, BASE)
    back = safetensors.torch.load(out.data)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)
    again, _ = import_adapter(out.data, BASE)
    assert list(again.tokens) == ["<art>"], "the file's metadata keeps the word"


def test_one_vector_may_have_one_dimension() -> None:
    stored = {name: tensor[0] for name, tensor in halves(1).items()}
    adapter, _ = import_adapter(safetensors.torch.save(stored), BASE, NAMED)
    assert adapter.tokens["<art>"].shape == (1, WIDTH)


@pytest.mark.parametrize(
    "stored",
    [
        {"clip_l": halves()["clip_l"]},
        {"clip_l": halves(2)["clip_l"], "clip_g": halves(3)["clip_g"]},
        {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)},
    ],
    ids=["one half", "other counts", "other widths"],
)
def test_halves_that_do_not_fit_are_refused(stored: dict[str, Tensor]) -> None:
    with pytest.raises(HueshiftError, match="clip_l") as caught:
        import_adapter(safetensors.torch.save(stored), BASE, NAMED)
    assert caught.value.reason is Reason.ADAPTER_SHAPE_MISMATCH


def test_a_word_without_a_name_is_asked_for() -> None:
    with pytest.raises(HueshiftError, match="word"):
        import_adapter(safetensors.torch.save(halves()), BASE)
