"""Text-side files of other programs: each gives what the network or formula of its program gives.

Mappers agree with the program's own formulation within 3e-5 of the largest output: it takes sines of angles up to
about 120 in fp32 (measured: 2e-6, 2-core x86 CPU, 2026-11-20).
"""

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from foreign_unet import WIDTH, base_of, foreign_unet
from torch import Tensor, nn

from hueshift.adapters.adapter import Adapter, AdapterKind, TokenMapper
from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.formats.draft import ImportOptions
from hueshift.adapters.formats.importing import import_adapter
from hueshift.adapters.formats.report import ImportReport
from hueshift.adapters.validate import FileLimits

BASE = base_of(foreign_unet())
LAYERS = BASE.layout.cross_attentions
FEATURES = 16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def come_in(tensors: dict[str, Tensor], word: str = "", **metadata: str) -> tuple[Adapter, ImportReport]:
    """Import, and read what it became from a file of ours."""
    data = safetensors.torch.save(tensors, metadata or None)
    adapter, report = import_adapter(data, BASE, ImportOptions(word=word))
    assert report is not None
    return read_adapter(write_adapter(adapter), BASE.layout, FileLimits()), report


def refusal(tensors: dict[str, Tensor], word: str = "", **metadata: str) -> HueshiftError:
    with pytest.raises(HueshiftError) as caught:
        come_in(tensors, word, **metadata)
    return caught.value


def layer_words() -> dict[str, Tensor]:
    vectors = noise(len(LAYERS), WIDTH)
    return {f"<cat>-{number}": vectors[number] for number in range(len(LAYERS))}


def test_p_plus_by_layers() -> None:
    tensors = layer_words()
    adapter, report = come_in(tensors)
    assert (adapter.kind, adapter.identifier, report.format) == (AdapterKind.TOKENS, "<cat>", "p-plus")
    grid = adapter.token_grids["<cat>"]
    assert torch.equal(grid, torch.stack(list(tensors.values()))[None, :, None])
    assert not any("per block" in note for note in report.notes)
    assert list(come_in(tensors, word="mine")[0].token_grids) == ["mine"]


def test_p_plus_by_blocks_as_its_program_draws() -> None:
    # Six attentions in three blocks; past the third embedding all keep the value they began with.
    base = base_of(foreign_unet(layers_per_block=2))
    names = base.layout.cross_attentions
    blocks = [name.partition(".attentions")[0] for name in names]
    assert [blocks.count(block) for block in dict.fromkeys(blocks)] == [2, 1, 3]
    vectors = noise(len(names), WIDTH)
    vectors[3:] = 7.0
    data = safetensors.torch.save({f"<cat>-{n}": vectors[n] for n in range(len(names))})
    adapter, report = import_adapter(data, base)
    expected = vectors[[0, 0, 1, 2, 2, 2]]
    assert torch.equal(adapter.token_grids["<cat>"], expected[None, :, None])
    assert report is not None
    assert any("one embedding per block" in note for note in report.notes)


def test_wrong_layers_are_refused() -> None:
    tensors = layer_words()
    sixteen = {f"<cat>-{number}": noise(WIDTH) for number in range(16)}
    error = refusal(sixteen)
    assert (error.reason, "16 layers" in error.message) == (Reason.ADAPTER_BASE_MISMATCH, True)
    assert refusal({**tensors, "<cat>-3": noise(2, WIDTH)}).reason is Reason.ADAPTER_SHAPE_MISMATCH
    gap = {name: tensor for name, tensor in tensors.items() if name != "<cat>-1"}
    assert "no known format" in refusal(gap).message


def test_prospect_begins_at_high_noise() -> None:
    stages = noise(10, WIDTH)
    adapter, report = come_in({"prospect.*": stages}, word="<style>")
    assert report.format == "prospect"
    # Their first is for timesteps below 100, ours for the first tenth of sampling.
    assert torch.equal(adapter.token_grids["<style>"][:, 0, 0], stages.flip(0))
    assert refusal({"prospect.*": stages}).reason is Reason.INVALID_FIELD
    assert refusal({"prospect.<x>": noise(10, 7)}).reason is Reason.ADAPTER_SHAPE_MISMATCH


class TheirMapper(nn.Module):
    """The network as the paper's program computes it, in fp32."""

    def __init__(self, bypass: bool, norm: float | None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(9)
            self.frequencies = torch.randn(FEATURES, 2) * torch.tensor([0.03, 2.0])
            self.input_layer = nn.Linear(2 * FEATURES, 12)
            hidden: list[nn.Module] = []
            for inputs in (12, 10):
                hidden += [nn.Linear(inputs, 10), nn.LayerNorm(10), nn.LeakyReLU()]
            self.net = nn.Sequential(self.input_layer, *hidden)
            self.output_layer = nn.Sequential(nn.Linear(10, WIDTH * (2 if bypass else 1)))
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    nn.init.normal_(module.weight, 1.0, 0.2)
                    nn.init.normal_(module.bias, 0.0, 0.2)
        self.norm = norm

    def forward(self, timestep: int, layer: int) -> Tensor:
        angles = self.frequencies @ torch.tensor([float(timestep), float(layer)])
        features = torch.cat([torch.sin(angles), torch.cos(angles)])
        output: Tensor = self.output_layer(self.net(features / features.norm()))
        return output if self.norm is None else output / output.norm() * self.norm

    def file(self) -> dict[str, Tensor]:
        """The state dict with the frequencies beside it, without shared memory."""
        return {**{name: tensor.clone() for name, tensor in self.state_dict().items()}, "encoder.w": self.frequencies}


def our_output(mapper: TokenMapper, timestep: int, layer: int) -> Tensor:
    """TokenMapper as its description says, in fp64."""
    point = torch.tensor([timestep / 1000, layer / len(LAYERS)], dtype=torch.float64)
    angles = 2 * math.pi * (mapper.frequencies.double() @ point)
    state = torch.cat([torch.cos(angles), torch.sin(angles)])
    for part in mapper.layers:
        state = part.weight.double() @ state + part.bias.double()
        state = nn.functional.layer_norm(state, state.shape, part.norm_weight.double(), part.norm_bias.double())
        state = nn.functional.leaky_relu(state, 0.01)
    output = mapper.output_weight.double() @ state + mapper.output_bias.double()
    return output / output.norm() * mapper.norm if mapper.norm else output


@pytest.mark.parametrize(("bypass", "norm"), [(True, 0.4), (False, None), (True, None)])
def test_a_neti_mapper_gives_the_same_embeddings(bypass: bool, norm: float | None) -> None:
    theirs = TheirMapper(bypass, norm)
    adapter, report = come_in(theirs.file(), placeholder_token="<cat>", target_norm=str(norm))
    assert (adapter.kind, adapter.identifier, report.format) == (AdapterKind.TOKENS, "<cat>", "neti")
    mapper = adapter.mappers["<cat>"]
    assert (mapper.norm, mapper.bypass) == (norm or 0.0, 0.2 if bypass else 0.0)
    with torch.no_grad():
        for timestep in (0, 1, 499, 999):
            for layer in range(len(LAYERS)):
                expected = theirs(timestep, layer).double()
                difference = (our_output(mapper, timestep, layer) - expected).abs().max() / expected.abs().max()
                assert difference < 3e-5


def test_the_embedding_beside_a_mapper_only_names_the_word() -> None:
    tensors = {**TheirMapper(True, None).file(), "<dog>": noise(WIDTH)}
    adapter, report = come_in(tensors, target_norm="None")
    assert (list(adapter.mappers), adapter.tokens) == (["<dog>"], {})
    assert any("only reserves the word" in note for note in report.notes)


def test_wrong_mappers_are_refused() -> None:
    whole = TheirMapper(True, 0.4).file()

    def without(name: str) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in whole.items() if key != name}

    stated = {"placeholder_token": "<cat>", "target_norm": "0.4"}
    for tensors, metadata, told in (
        (whole, {"placeholder_token": "<cat>"}, "'target_norm' in its metadata"),
        (whole, {**stated, "target_norm": "much"}, "a finite number"),
        (whole, {**stated, "target_norm": "-1"}, "0 or above"),
        (whole, {"target_norm": "0.4"}, "give the word"),
        (without("encoder.w"), stated, "'encoder.w'"),
        (without("net.0.weight"), stated, "without positional encoding"),
        (without("net.2.bias"), stated, "'net.2.bias'"),
        ({**whole, "net.4.weight": noise(10, 9)}, stated, "[10, 9]; allowed: [10, 10]"),
        ({**whole, "output_layer.0.weight": noise(WIDTH + 1, 10)}, stated, "gives out 25 values"),
        ({**whole, "input_layer.bias": noise(12)}, stated, "one layer under two names"),
        ({**whole, "net.9.weight": noise(2, 2)}, stated, "'net.9.weight'"),
    ):
        assert told in refusal(tensors, **metadata).message


def perfusion_file() -> dict[str, Tensor]:
    root = noise(WIDTH, WIDTH, seed=3)
    file = {"target_input": noise(WIDTH, seed=1), "C_inv": root @ root.T + torch.eye(WIDTH), "<cat>": noise(WIDTH)}
    for number, layer in enumerate(BASE.layout.matrices):
        if ".attn2.to_k" in layer.name or ".attn2.to_v" in layer.name:
            file[f"{layer.name}.target_output"] = noise(layer.rows, seed=number)
    return file


def test_perfusion_gives_the_gate_and_outputs_of_its_port() -> None:
    file = perfusion_file()
    adapter, report = come_in(file, beta="0.6", tau="0.15")
    assert (adapter.kind, adapter.identifier, report.format) == (AdapterKind.KV, "<cat>", "perfusion")
    edit = adapter.gated["<cat>"]
    assert (edit.beta, edit.tau, len(edit.outputs)) == (0.6, 0.15, 2 * len(LAYERS))
    assert {part.form for part in report.layers} == {"gated"}
    # The port's formulation: sim = e C^-1 i*, energy = i* C^-1 i*.
    encoded, target, inverse = noise(5, WIDTH, seed=7).double(), file["target_input"].double(), file["C_inv"].double()
    share = (encoded @ inverse @ target) / (target @ inverse @ target)
    ours = (encoded @ edit.dual.double()) / (edit.dual.double() @ edit.target.double())
    assert torch.allclose(ours, share, rtol=1e-5, atol=1e-6)
    for key, output in file.items():
        if key.endswith(".target_output"):
            assert torch.equal(edit.outputs[key.removesuffix(".target_output")], output)
    assert torch.equal(adapter.tokens["<cat>"], file["<cat>"][None])


def test_perfusion_in_other_spellings() -> None:
    file = perfusion_file()
    first = next(key for key in file if "down_blocks.0" in key and "to_k" in key)
    file[f"input_blocks.1.1.{first.partition('.0.attentions.0.')[2]}"] = file.pop(first).expand(77, -1).contiguous()
    file["string_to_param.*"] = file.pop("<cat>")[None]
    file["dual"] = file.pop("C_inv") @ file["target_input"]
    adapter, report = come_in(file, word="<dog>")
    assert len(adapter.gated["<dog>"].outputs) == 2 * len(LAYERS)
    assert any("0.75 and 0.1" in note for note in report.notes)


def test_wrong_perfusion_files_are_refused() -> None:
    file = perfusion_file()
    key = next(key for key in file if key.endswith(".target_output"))
    width = file[key].shape[0]
    for changes, told in (
        ({key: noise(77, width)}, "different outputs for 77 places"),
        ({key: noise(width + 1)}, f"allowed: [{width}]"),
        ({"C_inv": torch.zeros(WIDTH, WIDTH)}, "divides by it"),
        ({"C_inv": noise(WIDTH)}, "'C_inv'"),
        ({"target_input": noise(7)}, "'C_inv'"),
        ({"target_input": noise(7, 1)}, "[width]"),
        ({"conv_in.target_output": noise(16)}, "no projection of keys or values"),
        ({"elsewhere.target_output": noise(16)}, "'elsewhere.target_output'"),
        ({"<dog>": noise(WIDTH)}, "2 words"),
    ):
        assert told in refusal({**file, **changes}).message, told
    assert "above 0" in refusal(file, beta="0.5", tau="0").message
    assert "a finite number" in refusal(file, beta="nan", tau="1").message
    wordless = {name: tensor for name, tensor in file.items() if name != "<cat>"}
    assert "0 words" in refusal(wordless).message


def test_pickles_of_these_programs_are_named(tmp_path: Path) -> None:
    torch.save({"target_input": torch.ones(3), "attention": "module"}, tmp_path / "x.ckpt")
    with pytest.raises(HueshiftError) as caught:
        import_adapter(tmp_path / "x.ckpt", BASE)
    assert (caught.value.reason, "pickle" in caught.value.message) == (Reason.ADAPTER_FILE_UNSAFE, True)
