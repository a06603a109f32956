"""The lines of docs/adapters.md that turn other programs' pickles into files we read, run as they stand there."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign_unet import WIDTH, base_of, foreign_unet
from torch import Tensor, nn

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.formats.draft import ImportBase
from hueshift.adapters.formats.importing import import_adapter

BASE = base_of(foreign_unet())
LAYERS = BASE.layout.cross_attentions
PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def run_lines(pickle_name: str, content: object, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save a pickle, run the page's lines for it, and return the one file that they wrote."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (lines,) = (block for block in blocks if f'"{pickle_name}"' in block)
    torch.save(content, folder / pickle_name)
    monkeypatch.chdir(folder)
    exec(compile(lines, pickle_name, "exec"), {})
    (file,) = folder.glob("*.safetensors")
    return file


def read(file: Path, base: ImportBase = BASE) -> Adapter:
    return import_adapter(file, base)[0]


def test_textual_inversion_and_p_plus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"<cat>": nn.Parameter(noise(2, WIDTH))}
    adapter = read(run_lines("learned_embeds.bin", words, tmp_path, monkeypatch))
    assert torch.equal(adapter.tokens["<cat>"], words["<cat>"])
    layered = {f"<cat>-{number}": row for number, row in enumerate(noise(len(LAYERS), WIDTH))}
    adapter = read(run_lines("learned_embeds.bin", layered, tmp_path, monkeypatch))
    assert torch.equal(adapter.token_grids["<cat>"][0, :, 0], noise(len(LAYERS), WIDTH))


def test_a1111(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": noise(4, WIDTH)}, "name": "style", "step": 9}
    adapter = read(run_lines("style.pt", content, tmp_path, monkeypatch))
    assert torch.equal(adapter.tokens["style"], noise(4, WIDTH))


def test_neti(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = nn.Linear(8, 6)
    net = nn.Sequential(first, nn.Linear(6, 5), nn.LayerNorm(5), nn.LeakyReLU())
    network = nn.ModuleDict({"input_layer": first, "net": net, "output_layer": nn.Sequential(nn.Linear(5, WIDTH))})
    config: dict[str, Any] = {"data": {"placeholder_token": "<cat>"}, "model": {"target_norm": 0.38}}
    content = {"state_dict": network.state_dict(), "encoder": SimpleNamespace(w=noise(4, 2)), "cfg": config}
    mapper = read(run_lines("mapper-steps-1000.pt", content, tmp_path, monkeypatch)).mappers["<cat>"]
    assert (mapper.norm, len(mapper.layers), mapper.frequencies.shape) == (0.38, 1, (4, 2))


def test_prospect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Any network of two inputs; theirs gives ten times the width.
    attention = nn.TransformerDecoderLayer(768, 1, 4, batch_first=True)
    content = {"attention": attention, "initial_embeddings": noise(1, 768)}
    base = ImportBase(replace(BASE.layout, token_width=768))
    adapter = read(run_lines("embeddings.pt", content, tmp_path, monkeypatch), base)
    start = noise(1, 1, 768)
    with torch.no_grad():
        expected = attention.eval()(start, start)[0]
    assert torch.allclose(adapter.token_grids["<style>"][:, 0, 0], expected, atol=1e-5)


def test_perfusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [f"input_blocks.1.1.transformer_blocks.0.attn2.{side}" for side in ("to_k", "to_v")]
    content = {
        "C_inv": torch.eye(WIDTH),
        "target_input": noise(WIDTH),
        "embedding": {"string_to_token": {"*": 265}, "string_to_param": nn.ParameterDict({"*": noise(1, WIDTH)})},
        "target_output": {f"{layer}.target_output": noise(77, 16) for layer in layers},
    }
    adapter = read(run_lines("perfusion.ckpt", content, tmp_path, monkeypatch))
    edit = adapter.gated["<cat>"]
    assert (edit.beta, edit.tau, len(edit.outputs)) == (0.75, 0.1, 2)
    assert all(torch.equal(output, noise(77, 16)[5]) for output in edit.outputs.values())
