"""Learned words as diffusers and A1111 store them."""

import pytest
import safetensors.torch
import torch
from foreign_unet import WIDTH, base_of, foreign_unet
from torch import Tensor

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.formats.draft import ImportOptions
from hueshift.adapters.formats.exporting import ExportForm, export_adapter
from hueshift.adapters.formats.importing import import_adapter
from hueshift.adapters.validate import FileLimits

BASE = base_of(foreign_unet())


def vectors(count: int | None = 1) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(*([WIDTH] if count is None else [count, WIDTH]), generator=draw)


@pytest.mark.parametrize(
    ("tensors", "metadata", "word", "expected"),
    [
        ({"<cat-toy>": vectors(None)}, {}, "", "<cat-toy>"),
        ({"<cat-toy>": vectors(8)}, {}, "", "<cat-toy>"),
        ({"anything": vectors(1)}, {}, "", "anything"),
        ({"emb_params": vectors(4)}, {"name": "style"}, "", "style"),
        ({"emb_params": vectors(4)}, {}, "mine", "mine"),
        ({"<old>": vectors(None).half()}, {}, "new", "new"),
    ],
    ids=["diffusers", "many-vectors", "any-name", "a1111", "a1111-nameless", "renamed"],
)
def test_a_word_comes_in(tensors: dict[str, Tensor], metadata: dict[str, str], word: str, expected: str) -> None:
    data = safetensors.torch.save(tensors, metadata)
    adapter, report = import_adapter(data, BASE, ImportOptions(word=word))
    stored = next(iter(tensors.values()))
    assert (adapter.kind, adapter.identifier, list(adapter.tokens)) == (AdapterKind.TOKENS, expected, [expected])
    assert adapter.tokens[expected].dtype is stored.dtype
    assert torch.equal(adapter.tokens[expected], stored.reshape(-1, WIDTH))
    assert report is not None
    assert (report.format, report.words) == ("textual-inversion", (expected,))
    again = read_adapter(write_adapter(adapter), BASE.layout, FileLimits())
    assert torch.equal(again.tokens[expected], adapter.tokens[expected])


def test_several_words_come_in_and_go_out() -> None:
    tensors = {"<s1>": vectors(2), "<s2>": vectors(1).half()}
    adapter, _ = import_adapter(safetensors.torch.save(tensors), BASE)
    assert adapter.identifier == ""
    out = export_adapter(adapter, ExportForm.TEXTUAL_INVERSION, BASE)
    stored = safetensors.torch.load(out.data)
    assert {name: (t.dtype, t.tolist()) for name, t in stored.items()} == {
        name: (t.dtype, t.tolist()) for name, t in tensors.items()
    }


@pytest.mark.parametrize(
    ("tensors", "word", "reason", "named"),
    [
        ({"emb_params": vectors()}, "", Reason.INVALID_FIELD, "word"),
        ({"<s>": torch.ones(1, 768)}, "", Reason.ADAPTER_SHAPE_MISMATCH, "'<s>'"),
        ({"<s>": torch.ones(76, WIDTH)}, "", Reason.ADAPTER_SHAPE_MISMATCH, "1 to 75 vectors"),
        ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "", Reason.ADAPTER_BASE_MISMATCH, "SDXL"),
        ({"<a b>": vectors()}, "", Reason.ADAPTER_FILE_INVALID, "space"),
        ({f"<{n}>": vectors() for n in range(17)}, "", Reason.ADAPTER_FILE_INVALID, "17 words"),
        ({"<s>": torch.full((1, WIDTH), float("inf"))}, "", Reason.ADAPTER_NOT_FINITE, "inf"),
        ({"<s>": torch.ones(WIDTH, dtype=torch.int64)}, "", Reason.ADAPTER_DTYPE_UNSUPPORTED, "I64"),
        ({"a": vectors(), "b": vectors()}, "", Reason.ADAPTER_FILE_INVALID, "no known format"),
    ],
)
def test_wrong_words_are_refused(tensors: dict[str, Tensor], word: str, reason: Reason, named: str) -> None:
    with pytest.raises(HueshiftError) as caught:
        import_adapter(safetensors.torch.save(tensors), BASE, ImportOptions(word=word))
    assert (caught.value.reason, named in caught.value.message) == (reason, True)
