"""Whatever the bytes say: an adapter that fits, or an error that names the cause. Never anything else."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import safetensors.torch
import torch
from foreign_unet import BASE_HASH, WIDTH, base_of, foreign_unet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.formats.detect import Format
from hueshift.adapters.formats.difference import compare
from hueshift.adapters.formats.draft import ImportBase, ImportOptions
from hueshift.adapters.formats.importing import READERS, import_adapter
from hueshift.adapters.formats.inspect import inspect
from hueshift.adapters.validate import FileLimits
from hueshift.engines.base_model import read_layout

BASE = base_of(foreign_unet())
BARE = ImportBase(read_layout(foreign_unet(), BASE_HASH, WIDTH))
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
FLAT = f"lora_unet_{Q.replace('.', '_')}"
NORM = "lora_unet_conv_norm_out"


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


FILES: dict[Format, dict[str, Tensor]] = {
    Format.KOHYA: {
        f"{FLAT}.lora_down.weight": ones(2, 16),
        f"{FLAT}.lora_up.weight": ones(16, 2),
        f"{FLAT}.alpha": torch.tensor(1.0),
        f"{FLAT}.dora_scale": ones(16, 1),
        f"{NORM}.w_norm": ones(16),
        f"{NORM}.b_norm": ones(16),
        "lora_unet_conv_in.lokr_w1": ones(2, 2),
        "lora_unet_conv_in.lokr_w2_a": ones(8, 1),
        "lora_unet_conv_in.lokr_w2_b": ones(1, 18),
        "lora_unet_conv_out.hada_w1_a": ones(4, 1),
        "lora_unet_conv_out.hada_w1_b": ones(1, 144),
        "lora_unet_conv_out.hada_w2_a": ones(4, 1),
        "lora_unet_conv_out.hada_w2_b": ones(1, 144),
        "lora_te_x.lora_down.weight": ones(1, 2),
    },
    Format.PEFT: {
        f"unet.{Q}.lora_A.weight": ones(2, 16),
        f"unet.{Q}.lora_B.weight": ones(16, 2),
        f"unet.{Q}.lora_magnitude_vector": ones(16),
    },
    Format.CLONEOFSIMO: {"unet:0:down": ones(1, 16), "unet:0:up": ones(16, 1), "<s1>": ones(WIDTH)},
    Format.CUSTOM_DIFFUSION: {
        f"{Q.removesuffix('.to_q')}.processor.to_k_custom_diffusion.weight": ones(16, WIDTH),
        "<new1>": ones(WIDTH),
    },
    Format.MKSHING: {"conv_in.delta": ones(16), "conv_norm_out.delta": ones(1)},
    Format.DENSE: {"conv_in.weight": ones(16, 4, 3, 3), "conv_norm_out.weight": ones(16)},
    Format.TEXTUAL_INVERSION: {"<cat>": ones(3, WIDTH)},
    Format.P_PLUS: {f"<cat>-{n}": n * ones(WIDTH) for n in range(4)},
    Format.PROSPECT: {"prospect.<cat>": ones(10, WIDTH)},
    Format.NETI: {
        "encoder.w": ones(3, 2),
        "net.0.weight": ones(4, 6),
        "net.0.bias": ones(4),
        **{f"net.{n}.weight": ones(5, 4 if n == 1 else 5) for n in (1, 4)},
        **{f"net.{n}.bias": ones(5) for n in (1, 2, 4, 5)},
        **{f"net.{n}.weight": ones(5) for n in (2, 5)},
        "output_layer.0.weight": ones(2 * WIDTH, 5),
        "output_layer.0.bias": ones(2 * WIDTH),
    },
    Format.PERFUSION: {
        "target_input": ones(WIDTH),
        "C_inv": ones(WIDTH, WIDTH),
        f"{Q.removesuffix('.to_q')}.to_k.target_output": ones(16),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_v.target_output": ones(1, 16),
        "<cat>": ones(WIDTH),
    },
}
METADATA = {
    Format.PEFT: {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 1, "alpha_pattern": {"to_q": 2}})},
    Format.CLONEOFSIMO: {"unet": '["CrossAttention", "GEGLU"]', "<s1>": "<embed>"},
    Format.NETI: {"placeholder_token": "<cat>", "target_norm": "0.4"},
}


def file_of(found: Format) -> bytes:
    return safetensors.torch.save(FILES[found], METADATA.get(found))


def read_or_refuse(data: bytes, base: ImportBase = BASE, **options: Any) -> HueshiftError | None:
    """Import; what comes out must be a valid adapter file."""
    try:
        adapter, _ = import_adapter(data, base, ImportOptions(**options))
    except HueshiftError as error:
        return error
    read_adapter(write_adapter(adapter), base.layout, FileLimits())
    return None


def others_or_refuse(data: bytes) -> None:
    for look in (inspect, lambda data: compare(data, data)):
        with suppress(HueshiftError):
            look(data)


@pytest.mark.parametrize("found", READERS)
def test_the_files_of_this_test_are_read(found: Format) -> None:
    assert read_or_refuse(file_of(found)) is None
    assert inspect(file_of(found)).format == found.value
    assert compare(file_of(found), file_of(found)).equal


def edits(data: bytes, seed: int) -> Iterator[bytes]:
    """The file with bytes flipped, cut off, inserted, and with numbers of its header changed."""
    draw = random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(draw.choice((8, 8 + length, len(data))))] = draw.randrange(256)
        yield bytes(broken)
    for _ in range(15):
        yield data[: draw.randrange(len(data))]
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(60):
        changed = json.loads(json.dumps(header))
        _edit(changed, names, draw)
        text = json.dumps(changed).encode()
        yield len(text).to_bytes(8, "little") + text + data[8 + length :]


def _edit(header: dict[str, Any], names: list[str], draw: random.Random) -> None:
    entry = header[draw.choice(names)]
    choices: list[Callable[[], object]] = [
        lambda: entry["shape"].append(draw.choice([0, 1, -1, 2**40])),
        lambda: entry["shape"].reverse(),
        lambda: entry.update(shape=[len(entry["shape"])]),
        lambda: entry.update(shape=[1, *entry["shape"]]),
        lambda: entry.update(dtype=draw.choice(["F16", "I64", "F8_E4M3", "BOOL", "F64", 3])),
        lambda: (
            header.update({draw.choice(names).upper(): header.pop(draw.choice(names))}) if len(header) > 2 else None
        ),
        lambda: header.update(
            __metadata__={
                "unet": draw.choice(["[]", "{}", "[[", '["GEGLU"]']),
                "target_norm": draw.choice(["none", "1", "nan", "x"]),
                "beta": draw.choice(["1", "inf", ""]),
                "lora_adapter_metadata": draw.choice(["1", "{}", '{"r": -1}', '{"r": 1e400}', '{"unet.r": 2}']),
            }
        ),
    ]
    draw.choice(choices)()


@pytest.mark.parametrize("found", READERS)
def test_broken_files_are_read_or_refused(found: Format) -> None:
    refused = 0
    for number, data in enumerate(edits(file_of(found), seed=len(found))):
        refused += read_or_refuse(data, BASE if number % 3 else BARE, rank=number % 5) is not None
        others_or_refuse(data)
    # Most damage is found; some bytes of values are as good as others.
    assert refused > 60


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    assert read_or_refuse(data) is not None
    others_or_refuse(data)


_NAMES = st.sampled_from(
    [name for tensors in FILES.values() for name in tensors]
    + [f"{FLAT}.{end}" for end in ("lora_mid.weight", "hada_t1", "lokr_t2", "lokr_w1", "diff", "diff_b", "oft_blocks")]
    + [f"unet.{Q}.lora_B.bias", "emb_params", "clip_l", "bundle_emb.x.string_to_param.*", "unet:1:up", "x"]
    + ["string_to_param.*", "x_1", "x-neg", "prospect.*", "dual", "input_layer.weight", "x.attn2.processor", "x-0"]
)
_SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 16, 24, 32]), max_size=4)


@settings(max_examples=250, deadline=None)
@given(st.dictionaries(_NAMES, _SHAPES, min_size=1, max_size=6), st.sampled_from([0, 1, 5]), st.floats(width=32))
def test_any_mix_of_known_names_and_shapes_is_read_or_refused(
    shapes: dict[str, list[int]], rank: int, value: float
) -> None:
    tensors = {name: torch.full(shape, value) for name, shape in shapes.items()}
    data = safetensors.torch.save(tensors)
    read_or_refuse(data, rank=rank)
    others_or_refuse(data)


@pytest.mark.parametrize("found", READERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(found: Format, value: float) -> None:
    for name in FILES[found]:
        if name.startswith("lora_te"):
            continue
        tensors = {**FILES[found], name: torch.full_like(FILES[found][name], value)}
        error = read_or_refuse(safetensors.torch.save(tensors, METADATA.get(found)))
        assert error is not None
        assert (error.reason, name in error.message) == (Reason.ADAPTER_NOT_FINITE, True), error.message


@pytest.mark.parametrize(
    "tensors",
    [
        {
            f"{FLAT}.hada_w{n}_{side}": torch.full((16, 1) if side == "a" else (1, 16), 1e30)
            for n in (1, 2)
            for side in "ab"
        },
        {
            f"{FLAT}.lora_down.weight": ones(1, 16),
            f"{FLAT}.lora_up.weight": ones(16, 1) * 3e38,
            f"{FLAT}.alpha": ones(1) * 3e38,
        },
        {f"{FLAT}.lora_down.weight": ones(2, 16).double() * 1e300, f"{FLAT}.lora_up.weight": ones(16, 2)},
    ],
    ids=["product", "scale", "double"],
)
def test_changes_beyond_fp32_are_refused(tensors: dict[str, Tensor]) -> None:
    error = read_or_refuse(safetensors.torch.save(tensors))
    assert error is None or error.reason is Reason.ADAPTER_NOT_FINITE


def test_pickles_and_other_formats_are_named(tmp_path: Any) -> None:
    torch.save(FILES[Format.KOHYA], tmp_path / "x.safetensors")
    error = read_or_refuse((tmp_path / "x.safetensors").read_bytes())
    assert error is not None
    assert (error.reason, "pickle" in error.message) == (Reason.ADAPTER_FILE_UNSAFE, True)
    large = read_or_refuse(safetensors.torch.save({"nothing.known": ones(2, 2)}))
    assert large is not None
    assert "kohya and LyCORIS" in large.message
