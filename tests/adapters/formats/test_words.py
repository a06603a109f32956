"""Learned words as diffusers and A1111 store them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from foreign_unet import WIDTH, base_of, foreign_unet
from text_side_adapters import multi_vector
from torch import Tensor

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.formats.draft import ImportBase, ImportOptions
from hueshift.adapters.formats.exporting import ExportForm, export_adapter
from hueshift.adapters.formats.folder import bundle
from hueshift.adapters.formats.importing import import_adapter
from hueshift.adapters.validate import FileLimits
from hueshift.engines.base_model import BaseModel

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
        ({"string_to_param.*": vectors(5)}, {"name": "style"}, "", "style"),
        ({"string_to_param.<cat>": vectors(2)}, {}, "", "<cat>"),
        ({"bundle_emb.cat.emb_params": vectors(2)}, {}, "", "cat"),
    ],
    ids=[
        *("diffusers", "many-vectors", "any-name", "a1111", "a1111-nameless", "renamed"),
        *("a1111-flat", "first-program", "bundled"),
    ],
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


@pytest.mark.parametrize("word", ["<cat>", "cat"])
@pytest.mark.parametrize("flat", [True, False])
def test_vectors_numbered_as_diffusers_numbers_its_tokens_are_one_word(word: str, flat: bool) -> None:
    rows = vectors(12)
    tensors = {word if n == 0 else f"{word}_{n}": row if flat else row[None] for n, row in enumerate(rows)}
    adapter, _ = import_adapter(safetensors.torch.save(tensors), BASE)
    assert list(adapter.tokens) == [word]
    assert torch.equal(adapter.tokens[word], rows)


def test_numbers_with_gaps_are_words_of_their_own() -> None:
    tensors = {"<a>": vectors(), "<a>_2": vectors()}
    adapter, _ = import_adapter(safetensors.torch.save(tensors), BASE)
    assert list(adapter.tokens) == ["<a>", "<a>_2"]
    with pytest.raises(HueshiftError, match="must be one vector"):
        import_adapter(safetensors.torch.save({"<a>": vectors(2), "<a>_1": vectors()}), BASE)
    with pytest.raises(HueshiftError, match="differ in width or dtype"):
        import_adapter(safetensors.torch.save({"<a>": vectors(), "<a>_1": vectors().half()}), BASE)


def test_a_word_and_its_negative_come_in_together(tmp_path: Path) -> None:
    good, bad = vectors(3), -vectors(6)
    adapter, report = import_adapter(safetensors.torch.save({"art": good, "art-neg": bad}), BASE)
    assert (adapter.identifier, adapter.words) == ("art", ("art", "art-neg"))
    assert report is not None
    assert report.words == ("art", "art-neg")
    renamed, _ = import_adapter(safetensors.torch.save({"art": good, "art-neg": bad}), BASE, ImportOptions(word="my"))
    assert (renamed.identifier, renamed.words) == ("my", ("my", "my-neg"))
    # As the web interface keeps them: two files of one nameless embedding each.
    safetensors.torch.save_file({"emb_params": good}, tmp_path / "art.safetensors")
    safetensors.torch.save_file({"emb_params": bad}, tmp_path / "art-neg.safetensors")
    both, _ = import_adapter(bundle(tmp_path).data, BASE)
    assert (both.identifier, set(both.words)) == ("art", {"art", "art-neg"})
    assert torch.equal(both.tokens["art"], good)
    assert torch.equal(both.tokens["art-neg"], bad)
    out = import_adapter(export_adapter(both, ExportForm.TEXTUAL_INVERSION, BASE).data, BASE)[0]
    assert torch.equal(out.tokens["art-neg"], bad)


def test_diffusers_loads_our_word_of_several_vectors(base_model: BaseModel, tmp_path: Path) -> None:
    loader: Any = TextualInversionLoaderMixin()
    loader.tokenizer, loader.text_encoder = copy.deepcopy((base_model.tokenizer, base_model.text_encoder))
    loader.components, loader.hf_device_map = {}, None
    adapter = multi_vector(base_model.layout, vectors=3)
    base = ImportBase(base_model.layout)
    (tmp_path / "art.safetensors").write_bytes(export_adapter(adapter, ExportForm.TEXTUAL_INVERSION, base).data)
    loader.load_textual_inversion(tmp_path, weight_name="art.safetensors")
    numbers = loader.tokenizer.convert_tokens_to_ids(["<art>", "<art>_1", "<art>_2"])
    stored = loader.text_encoder.get_input_embeddings().weight[numbers]
    assert torch.equal(stored, adapter.tokens["<art>"])
    # Saved token by token, as it holds them now, the three are one word again.
    again = {token: stored[n].clone() for n, token in enumerate(["<art>", "<art>_1", "<art>_2"])}
    assert torch.equal(import_adapter(safetensors.torch.save(again), base)[0].tokens["<art>"], stored)


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
