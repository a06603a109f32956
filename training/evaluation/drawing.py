"""Pictures with adapters, by the engine that serves; with merged weights by torch where that has no branch for them."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.blocks import Weight, layer_weight
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.build import AdapterEngine, EngineOptions, build_engine
from hueshift.engines.conditioning import Conditioner, make_conditioner
from hueshift.engines.denoise import Sample, advance, start_sample
from hueshift.engines.fused_update import UpdateForm
from hueshift.engines.interface import BASE_SLOT, dense_slots
from hueshift.engines.rows import RowLayout
from hueshift.engines.samplers import SamplerKind, make_table
from hueshift.engines.text_side import TextSide, compose_text_side
from hueshift.engines.torch_engine import TorchEngine
from hueshift.engines.vae import VaeStage
from hueshift.engines.whole_rows import divide
from hueshift.training.samples import SAMPLE_GUIDANCE, SAMPLE_STEPS

# What the methods of training/methods put branches on, at twice LoRA's default rank: PiSSA's changes need that.
BRANCHES = ("to_q", "to_k", "to_v", "to_out.0", "proj_out")
BRANCH_RANK = 16
_DECODED_TOGETHER = 8

Mix = Sequence[tuple[Adapter, Weight]]
Report = Callable[[int, int], None]
"""report(done, total) of pictures."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture to be drawn: the same prompt and seed give the same noise, whatever adapter is used."""

    prompt: str
    seed: int


Draw = Callable[[Sequence[Drawing]], list[Image.Image]]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedMix:
    """A mix in a slot of the engine, and what it teaches the text side."""

    slot: int
    text: TextSide
    needs_factored: bool


class Painter:
    """Draws pictures at the base's native size, many in a batch. Not for several threads at once."""

    def __init__(
        self,
        base: BaseModel,
        engine: AdapterEngine,
        *,
        steps: int = SAMPLE_STEPS,
        guidance: float = SAMPLE_GUIDANCE,
        sampler: SamplerKind = SamplerKind.DPMPP_2M,
    ) -> None:
        self.base, self.engine = base, engine
        self.steps, self.guidance = steps, guidance
        self.table = make_table(base.schedule, sampler, steps)
        self.conditioner: Conditioner = make_conditioner(base, engine.factors)
        self.vae = VaeStage(base)
        self._form = UpdateForm()

    def draw(self, drawings: Sequence[Drawing], mix: Mix = (), report: Report | None = None) -> list[Image.Image]:
        """Draw with a mix of adapters, none of them being the base model itself.

        Raises what RowLayout.compose and the engine raise, unless the mix is one adapter that the engine does not
        serve: low-rank changes of layers without a branch, whole changes where it has no weights for them. Such a one,
        for example DreamBooth's convolutions, is merged into a copy of the weights, which torch runs.
        """
        if len(mix) == 1 and not self.serves(mix[0][0]):
            return _Merged(self, *mix[0]).draw(drawings, report)
        # The last slot, so that mixes which a caller has loaded into the first ones stay.
        loaded = self.load(mix, self.engine.slots - 1)
        return self.finish([self.start(drawing, loaded) for drawing in drawings], report)

    def serves(self, adapter: Adapter) -> bool:
        """True if the engine has branches of enough rank for every low-rank layer of the adapter, and weights for whole
        changes if it has any.
        """
        served = self.engine.rows.served_ranks
        fits = all(parts.rank <= served.get(name, 0) for name, parts in adapter.lowrank.items())
        return fits and (not adapter.dense or dense_slots(self.engine) > 0)

    def load(self, mix: Mix, slot: int = 1) -> LoadedMix:
        """Put a mix into a slot; the empty one is the base model's and needs none."""
        if not mix:
            return LoadedMix(BASE_SLOT, TextSide(), False)
        row = self.engine.rows.compose(mix, self.engine.factors, self.engine.norms)
        self.engine.load_row(slot, row)
        return LoadedMix(slot, compose_text_side(mix, self.engine.factors), row.needs_factored)

    def start(self, drawing: Drawing, loaded: LoadedMix, **more: Any) -> Sample:
        """Make the sample of a drawing; `more` are options of engines.denoise.start_sample."""
        prompts = ("", drawing.prompt) if self.guidance > 1 else (drawing.prompt,)
        conditioning = self.conditioner.condition(prompts, loaded.text, self.table.timesteps.tolist())
        shape = (self.base.latent_channels, self.base.sample_size, self.base.sample_size)
        options: dict[str, Any] = {
            "cross": conditioning.cross,
            "guidance": self.guidance,
            "table": self.table,
            "slot": loaded.slot,
            "needs_factored": loaded.needs_factored,
        }
        return start_sample(drawing.seed, shape, **{**options, **more})

    def finish(self, samples: Sequence[Sample], report: Report | None = None) -> list[Image.Image]:
        """Denoise the samples in as large batches as the engine takes, and decode them."""
        self.run(samples, report)
        return self.decode(samples)

    def run(self, samples: Sequence[Sample], report: Report | None = None) -> None:
        """Take all steps of the samples. A sample and the reference that it shares must fit one batch."""
        done = 0
        for batch in _batches(samples, self.engine.max_batch):
            while running := [sample for sample in batch if not sample.done]:
                for call in divide(self.engine, [sample.slot for sample in running]):
                    advance(self.engine, [running[number] for number in call], form=self._form)
            done += len(batch)
            if report is not None:
                report(done, len(samples))

    def decode(self, samples: Sequence[Sample]) -> list[Image.Image]:
        """Decode finished samples."""
        pictures: list[Image.Image] = []
        for begin in range(0, len(samples), _DECODED_TOGETHER):
            latents = torch.stack([sample.latents for sample in samples[begin : begin + _DECODED_TOGETHER]])
            pictures += [Image.fromarray(pixels, "RGB") for pixels in self.vae.decode(latents)]
        return pictures


class _Merged:
    """Draws with an adapter whose low-rank and whole changes are merged into a copy of the UNet; its other parts go the
    usual way.
    """

    def __init__(self, painter: Painter, adapter: Adapter, weight: Weight) -> None:
        base, engine = painter.base, painter.engine
        merged = replace(base, unet=merge_matrices(base, adapter, weight))
        rows = RowLayout(base.layout, (), 1, text_side=False)
        device = next(merged.unet.parameters()).device
        torch_engine = TorchEngine(
            merged, engine.factors, rows, engine.norms, slots=2, max_batch=engine.max_batch, device=device
        )
        self._painter = Painter(
            merged, torch_engine, steps=painter.steps, guidance=painter.guidance, sampler=painter.table.kind
        )
        self._rest: Mix = [(replace(adapter, lowrank={}, dense={}), weight)]

    def draw(self, drawings: Sequence[Drawing], report: Report | None = None) -> list[Image.Image]:
        """Draw as Painter does. Raises InvalidArgument if what is left needs the factored plan, whose factors are the
        base's."""
        loaded = self._painter.load(self._rest)
        if loaded.needs_factored:
            # The factors are those of the unmerged weights, so the plan would undo the merge.
            raise InvalidArgument(
                Reason.ADAPTER_TARGET_UNSUPPORTED,
                "the adapter has parts that this engine does not serve and shifts of norms or singular values beside "
                "them; leave the shifts out, or compress it to layers of the engine (setting engine.lowrank_targets)",
            )
        return self._painter.finish([self._painter.start(drawing, loaded) for drawing in drawings], report)


def merge_matrices(base: BaseModel, adapter: Adapter, weight: Weight = 1.0) -> torch.nn.Module:
    """A copy of the base's UNet with W + weight scale B A, or W + weight delta, in the layers that the adapter changes
    so.
    """
    unet = copy.deepcopy(base.unet)

    def add(name: str, change: Tensor) -> None:
        parameter = unet.get_parameter(f"{name}.weight")
        parameter.data += change.to(parameter).view(parameter.shape)

    for name, parts in adapter.lowrank.items():
        add(name, layer_weight(weight, name) * parts.scale * (parts.b.double() @ parts.a.double()))
    for name, delta in adapter.dense.items():
        add(name, layer_weight(weight, name) * delta.double())
    return unet


def make_painter(base: BaseModel, cache: Path, **options: Any) -> Painter:
    """A painter with an engine of its own: ONNX Runtime's on a CPU if it is installed, else torch's.

    `options` are those of Painter.
    """
    engine = build_engine(
        base, EngineOptions(cache_dir=cache, slots=8, lowrank_targets=BRANCHES, lowrank_rank=BRANCH_RANK)
    )
    return Painter(base, engine, **options)


def _batches(samples: Sequence[Sample], rows: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        if batch and sum(other.rows for other in batch) + sample.rows > rows:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch
