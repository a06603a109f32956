"""Prompts beside the steps: encoded on a lane of their own, handed over finished, the empty prompt only once."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_gpu import GPU, FakeGpu, FakeLane, fake_gpu
from recording_lane import RecordingLane
from residency_log import ResidencyLog
from text_side_adapters import kv_deltas
from tiny_unet import TinyParts
from torch import Tensor

from hueshift.adapters.adapter import LowRankFactors
from hueshift.engines import conditioning, vae
from hueshift.engines.base_model import BaseModel
from hueshift.engines.conditioning import Conditioner
from hueshift.engines.cross_attention import CrossEdits, CrossStage
from hueshift.engines.cuda_lane import HostLane, lane_of
from hueshift.engines.mixes import make_mix
from hueshift.engines.residency_host import HostCache, RowCache
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage, TokenizedPrompt, Vectors
from hueshift.engines.text_side import TextSide, compose_text_side
from hueshift.engines.vae import VaeStage

pytestmark = pytest.mark.usefixtures("one_thread")
NO_FACTORS = SpectralFactors({}, {}, {})


class CountingText(TextStage):
    """Remembers the prompts' lengths of each encoding."""

    def __init__(self, base: BaseModel) -> None:
        self.encoded: list[list[int]] = []
        super().__init__(base)

    def encode_pooled(
        self, rows: Sequence[TokenizedPrompt], learned: Sequence[Vectors], *weights: object
    ) -> tuple[Tensor, Tensor | None]:
        """Count, and encode."""
        self.encoded.append([row.length for row in rows])
        return super().encode_pooled(rows, learned)


@pytest.fixture(scope="module")
def text(base_model: BaseModel) -> CountingText:
    """The embedded model's encoder."""
    return CountingText(base_model)


@pytest.fixture(scope="module")
def cross(base_model: BaseModel) -> CrossStage:
    """And its projection."""
    return CrossStage(base_model, NO_FACTORS)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    """A GPU without memory."""
    with fake_gpu() as made:
        yield made


def test_the_empty_prompt_is_encoded_once_and_gives_the_same_bits(
    base_model: BaseModel, text: CountingText, cross: CrossStage
) -> None:
    conditioner = Conditioner(base_model, text, cross)
    text.encoded.clear()
    for prompts in (["", "a fox"], ["", "an emoji of a red apple"], ["", ""], [" ", "a fox"]):
        found = conditioner.condition(prompts, TextSide(), [1.0]).cross.at(0)
        contexts = TextStage(base_model).encode(prompts, {}).context
        assert torch.equal(found, cross.project(contexts, contexts, CrossEdits()))
    assert [len(lengths) for lengths in text.encoded] == [1, 1, 1]
    text.encoded.clear()
    conditioner.condition(["blurry", "a fox"], TextSide(), [1.0])
    assert [len(lengths) for lengths in text.encoded] == [2]


def test_a_word_learned_for_the_negative_prompt_is_encoded(
    base_model: BaseModel, text: CountingText, cross: CrossStage
) -> None:
    conditioner = Conditioner(base_model, text, cross)
    word = torch.randn(1, 1, 1, base_model.layout.token_width, generator=torch.Generator().manual_seed(0))
    side = TextSide({"<bad>": word})
    with_word, without = (
        conditioner.condition([negative, "a fox"], side, [1.0]).cross.at(0) for negative in ("<bad>", "")
    )
    assert not torch.allclose(with_word[0], without[0])
    assert torch.equal(with_word[1], without[1])


def test_a_prompt_is_handed_over_finished_and_may_be_read_as_long_as_it_is_held(
    base_model: BaseModel, text: CountingText, cross: CrossStage
) -> None:
    lane = RecordingLane(passing=False)
    conditioner = Conditioner(base_model, text, cross, lane=lane)
    # Entered once with a wait, for the weights; a request never waits for the steps, nor they for it.
    assert lane.log == ["enter"]
    lane.log.clear()
    conditioner.condition(["", "a fox"], TextSide(), [1.0])
    assert lane.log == ["apart", "lent 1", "left"]
    assert [mark.waits for mark in lane.marks] == [1]


def test_a_picture_is_encoded_beside_the_steps(base_model: BaseModel) -> None:
    lane = RecordingLane(passing=False)
    pixels = torch.zeros(1, 3, 32, 32)
    mean, deviation = VaeStage(base_model, lane=lane).moments(pixels)
    assert lane.log == ["apart", "lent 2", "left"]
    assert [mark.waits for mark in lane.marks] == [1]
    plain = VaeStage(base_model).moments(pixels)
    assert torch.equal(mean, plain[0])
    assert torch.equal(deviation, plain[1])


def test_a_lane_fits_its_device() -> None:
    assert isinstance(lane_of(torch.device("cpu")), HostLane)


def test_prompts_do_not_wait_for_the_kernels_of_a_step(
    base_model: BaseModel, text: CountingText, cross: CrossStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def lane(device: torch.device, *, urgent: bool = False) -> HostLane:
        asked.append(urgent)
        return HostLane()

    monkeypatch.setattr(conditioning, "lane_of", lane)
    Conditioner(base_model, text, cross)
    assert asked == [True]
    priorities: list[int] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: priorities.append(priority))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    for urgent in (True, False):
        lane_of(torch.device("cuda", 1), urgent=urgent)
    assert priorities == [-1, 0]


def test_prompts_stay_on_the_device_in_the_engines_dtype(base_model: BaseModel, gpu: FakeGpu) -> None:
    base = replace(
        base_model,
        text_encoder=copy.deepcopy(base_model.text_encoder).to(GPU),
        unet=copy.deepcopy(base_model.unet).to(GPU),
    )
    lane = FakeLane(gpu)
    text = TextStage(base)
    conditioner = Conditioner(base, text, CrossStage(base, NO_FACTORS), dtype=torch.float16, lane=lane)
    gpu.waits.clear()
    word = torch.zeros(1, 1, 2, base.layout.token_width)
    for side in (TextSide(), TextSide({"fox": word})):
        made = conditioner.condition(["", "a fox"], side, [1.0]).cross
        assert (made.device, made.at(0).dtype, len(made.at(0))) == (GPU, torch.float16, 2)
        assert lane.lent[-1] is made.at(0)
    # Token ids go in; nothing is read back.
    assert all(wait.endswith("from the host") for wait in gpu.waits), gpu.waits


def test_singular_vectors_are_copied_to_the_device_once(any_architecture: TinyParts, gpu: FakeGpu) -> None:
    parts = any_architecture
    base = replace(parts.base, unet=copy.deepcopy(parts.base.unet).to(GPU))
    stage = CrossStage(base, parts.factors)
    context = torch.zeros(2, 5, base.layout.token_width, device=GPU)
    waits = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        text_side = [layer for layer in base.layout.matrices if layer.name in stage.layout.spans]
        branches = {
            layer.name: LowRankFactors(
                torch.randn(2, layer.cols, generator=generator), torch.randn(layer.rows, 2, generator=generator)
            )
            for layer in text_side
        }
        adapter = replace(parts.random_adapter(seed), lowrank=branches)
        edits = compose_text_side([(adapter, 1.0)], parts.factors).edits
        assert set(edits.shifts) >= set(edits.branches) == set(stage.layout.spans)
        gpu.waits.clear()
        assert stage.project(context, context, edits).device == GPU
        waits.append(len(gpu.waits))
    layers = len(stage.layout.spans)
    # U and V^T of each layer; what is the adapter's own nobody waits for.
    assert waits == [2 * layers, 0, 0]


def test_whole_changes_of_keys_and_values_are_copied_beside_the_steps(
    any_architecture: TinyParts, gpu: FakeGpu
) -> None:
    parts, log = any_architecture, ResidencyLog()
    base = replace(parts.base, unet=copy.deepcopy(parts.base.unet).to(GPU))
    host = HostCache(lambda key: kv_deltas(base.layout, seed=int(key)), 1 << 30, log)
    found = {}
    for pinned in (False, True):
        cache = RowCache(host, parts.rows, parts.factors, parts.norms, 1 << 30, log, pinned=pinned)
        found[pinned] = cache.get(make_mix([("1", 0.5)]))
        assert cache.nbytes == found[pinned].nbytes
    plain, made = found[False].text.edits, found[True].text.edits
    assert {name: delta.tolist() for name, delta in made.deltas.items()} == {
        name: delta.tolist() for name, delta in plain.deltas.items()
    }
    # One block, which is counted with what rounding it up to a power of two takes.
    assert len({delta.untyped_storage().data_ptr() for delta in made.deltas.values()}) == 1
    assert all(gpu._is_pinned(delta) for delta in made.deltas.values())
    taken = 1 << (plain.nbytes - 1).bit_length()
    assert plain.nbytes < taken == found[True].nbytes
    gpu.waits.clear()
    context = torch.zeros(2, 5, base.layout.token_width, device=GPU)
    assert CrossStage(base, parts.factors).project(context, context, made).device == GPU
    assert gpu.waits == []


@pytest.mark.parametrize("tile_above", [0, 64])
def test_decoding_stays_on_the_device_until_the_pixels(
    base_model: BaseModel, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tile_above: int
) -> None:
    found: list[Tensor] = []

    def to_bytes(pixels: Tensor) -> vae.Pixels:
        found.append(pixels)
        return np.zeros((len(pixels), 1), np.uint8)

    monkeypatch.setattr(vae, "_to_bytes", to_bytes)
    base = replace(base_model, vae=copy.deepcopy(base_model.vae).to(GPU, torch.float16))
    stage = VaeStage(base, tile_above=tile_above)
    gpu.waits.clear()
    side = base.sample_size
    stage.decode(torch.zeros(2, base.latent_channels, side, side, device=GPU))
    assert {(pixels.device, pixels.dtype) for pixels in found} == {(GPU, torch.float32)}
    assert sum(len(pixels) for pixels in found) == 2
    assert all(wait.endswith("from the host") for wait in gpu.waits), gpu.waits
