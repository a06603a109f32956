"""Two real files of the program, against a UNet of the shape they were trained on, and made-up ones of other orders.

The expected layers are found as that program finds them: by walking a real diffusers UNet, module by module.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from foreign_unet import base_of, foreign_unet
from torch import Tensor, nn

from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.formats.draft import ImportBase
from hueshift.adapters.formats.importing import import_adapter
from hueshift.adapters.validate import FileLimits
from hueshift.engines.base_model import read_layout

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@cache
def sd15() -> nn.Module:
    """The UNet of Stable Diffusion 1.5 without its values."""
    with torch.device("meta"):
        unet: nn.Module = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
    return unet


def walk(unet: nn.Module, *, last: bool = False) -> Iterator[str]:
    """Linear layers inside attentions and gated feed-forwards, in the order of the old diffusers' modules."""
    for name, module in unet.named_modules():
        if type(module).__name__ == "BasicTransformerBlock":
            order = ["attn1", "attn2", "ff.net.0"] if last else ["attn1", "ff.net.0", "attn2"]
            for part in order:
                names = ["proj"] if part == "ff.net.0" else PROJECTIONS
                for inner in names:
                    assert isinstance(module.get_submodule(f"{part}.{inner}"), nn.Linear)
                    yield f"{name}.{part}.{inner}"


@pytest.mark.parametrize(("file", "rank", "words"), [("analog_svd_rank4", 4, ()), ("lora_disney", 1, ("<s1>", "<s2>"))])
def test_real_files_give_the_changes_they_define(
    shared_dir: Path, file: str, rank: int, words: tuple[str, ...]
) -> None:
    path = shared_dir / "data" / "loras" / f"{file}.safetensors"
    layout = read_layout(sd15(), "5d" * 32, 768)
    adapter, report = import_adapter(path, ImportBase(layout))
    stored = safetensors.torch.load_file(path)
    expected = dict(enumerate(walk(sd15())))
    assert len(expected) == 144
    assert set(adapter.lowrank) == set(expected.values())
    for number, layer in expected.items():
        part = adapter.lowrank[layer]
        assert (part.scale, part.rank) == (1.0, rank)
        assert torch.equal(part.b, stored[f"unet:{number}:up"])
        assert torch.equal(part.a, stored[f"unet:{number}:down"])
    assert tuple(adapter.tokens) == words
    for word in words:
        assert torch.equal(adapter.tokens[word], stored[word][None])
    assert report is not None
    assert (report.format, report.error, report.words) == ("cloneofsimo", 0.0, words)
    assert [(left.count, "text encoder" in left.reason) for left in report.left_out] == [(96, True)]
    again = read_adapter(write_adapter(adapter), layout, FileLimits())
    assert torch.equal(again.lowrank[expected[7]].a, adapter.lowrank[expected[7]].a)


BASE = base_of(foreign_unet())


def made_up(layers: list[str], classes: list[str], *, words: tuple[str, ...] = ()) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        weight = BASE.parameters[f"{layer}.weight"]
        tensors[f"unet:{number}:down"] = torch.randn(2, *weight.shape[1:], generator=draw)
        tensors[f"unet:{number}:up"] = torch.randn(len(weight), 2, *[1] * (weight.dim() - 2), generator=draw)
    tensors |= {word: torch.randn(24, generator=draw) for word in words}
    metadata = {"unet": json.dumps(classes), **dict.fromkeys(words, "<embed>")}
    return {"tensors": tensors, "metadata": metadata}


@pytest.mark.parametrize("last", [False, True])
def test_both_orders_of_a_block_are_told_apart_by_shapes(last: bool) -> None:
    layers = list(walk(foreign_unet(), last=last))
    file = made_up(layers, ["CrossAttention", "Attention", "GEGLU"], words=("dog", "<s1>"))
    adapter, _ = import_adapter(safetensors.torch.save(**file), BASE)
    for number, layer in enumerate(layers):
        assert torch.equal(adapter.lowrank[layer].a, file["tensors"][f"unet:{number}:down"])
    assert set(adapter.tokens) == {"dog", "<s1>"}
    assert adapter.identifier == ""


def test_convolutions_of_the_extended_form() -> None:
    layers = []
    for name, module in foreign_unet().named_modules():
        if type(module).__name__ == "BasicTransformerBlock":
            layers += [layer for layer in walk(foreign_unet()) if layer.startswith(f"{name}.")]
        elif type(module).__name__ == "ResnetBlock2D":
            inner = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
            layers += [f"{name}.{part}" for part in inner if getattr(module, part) is not None]
    file = made_up(layers, ["ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"])
    adapter, _ = import_adapter(safetensors.torch.save(**file), BASE)
    assert set(adapter.lowrank) == set(layers)
    conv = next(layer for layer in layers if layer.endswith("conv1"))
    assert adapter.lowrank[conv].a.shape == (2, BASE.parameters[f"{conv}.weight"][0].numel())


@pytest.mark.parametrize(
    ("classes", "reason", "named"),
    [
        ('["Transformer2DModel"]', Reason.ADAPTER_FILE_INVALID, "Transformer2DModel"),
        ("[1]", Reason.ADAPTER_FILE_INVALID, "class names"),
        ("{", Reason.ADAPTER_FILE_INVALID, "not valid JSON"),
        ('["GEGLU"]', Reason.ADAPTER_SHAPE_MISMATCH, "unet:0:up"),
    ],
)
def test_a_wrong_list_of_classes_is_refused(classes: str, reason: Reason, named: str) -> None:
    file = made_up(list(walk(foreign_unet())), [])
    file["metadata"] = {"unet": classes}
    with pytest.raises(HueshiftError) as caught:
        import_adapter(safetensors.torch.save(**file), BASE)
    assert (caught.value.reason, named in caught.value.message) == (reason, True)


def test_more_layers_than_the_base_has_are_named() -> None:
    file = made_up(list(walk(foreign_unet())), ["CrossAttention", "GEGLU"])
    file["tensors"] |= {"unet:900:down": torch.ones(1, 4), "unet:900:up": torch.ones(4, 1)}
    with pytest.raises(HueshiftError, match="unet:900:down") as caught:
        import_adapter(safetensors.torch.save(**file), BASE)
    assert caught.value.reason is Reason.ADAPTER_TENSOR_UNKNOWN
