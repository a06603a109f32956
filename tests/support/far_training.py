"""Training steps of all kinds on a device that is not there; prints what each found, as JSON by name.

    python -P tests/support/far_training.py

A process of its own (see far_device.py), started by tests/training/test_cuda_fake.py.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

sys.path.insert(0, str(Path(__file__).parent))
from far_device import DEVICE, far_away, open_device, send_module
from tiny_sdxl import save_tiny_sdxl
from tiny_training import make_pair_spec, make_spec, make_task, make_tiny_base

from hueshift.engines.base_model import BaseModel, load_base_model
from hueshift.engines.svd_cache import SpectralFactors, decompose
from hueshift.engines.text import TextStage
from hueshift.training import loop
from hueshift.training.held_factors import HeldFactors
from hueshift.training.loop import TrainingTask, train_step
from hueshift.training.methods.encoder_shifts import make_encoder_shifts
from hueshift.training.methods.make import make_learnable
from hueshift.training.objectives.prior import ClassPictures, PriorPreservation
from hueshift.training.sharing.shared_training import SharedTraining
from hueshift.training.sharing.together import Share, SharedStep
from hueshift.training.spec import Method, TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.unet import make_unet
from hueshift.training.words import Captions

Job = tuple[TrainingTask, TrainingState]
Near = tuple[BaseModel, SpectralFactors]
MODEL = Path(__file__).resolve().parents[2] / "models" / "emoji-128"
PLAIN: dict[str, Any] = {"precision": "fp32", "caption_dropout": 0.0, "anchor_below": 0}
LOW: dict[str, Any] = {"precision": "bf16", "caption_dropout": 0.0, "anchor_below": 0}
ALL_ON: dict[str, Any] = {
    **PLAIN,
    "gradient_checkpointing": True,
    "cut_mix_probability": 0.9,
    "unmix_weight": 50.0,
    "min_snr_gamma": 5.0,
    "offset_noise": 0.1,
    "anchor_below": 900,
    "prior_weight": 0.5,
}
SINGLE: dict[str, TrainingSpec] = {
    **{f"{method} bf16": make_spec(method, **LOW) for method in Method},
    **{f"{method} all on": make_pair_spec(method, **ALL_ON) for method in Method},
    "accumulated": make_spec(**PLAIN, gradient_accumulation=2, ema_decay=0.0),
    "pissa": make_spec(Method.LORA, **PLAIN, rank=2, alpha=1.0, lora_init="pissa"),
    "layers": make_spec(Method.TEXTUAL_INVERSION, **PLAIN, per_layer=True, token_vectors=2),
    "words as they are": make_spec(**PLAIN, learn_identifier=False, identifier_init=("flat",)),
    "text encoder": make_spec(**PLAIN, train_text_encoder=True),
}
SHARED: dict[str, Sequence[TrainingSpec]] = {
    "svdiff": [make_spec(**LOW, batch_size=n) for n in (1, 3, 2)],
    "lora": [make_spec(Method.LORA, **PLAIN, rank=2, alpha=alpha) for alpha in (1.0, 4.0)],
    "layers": [make_spec(Method.TEXTUAL_INVERSION, **PLAIN, per_layer=True)] * 2,
    "all on": [make_pair_spec(**ALL_ON), make_spec(**PLAIN, gradient_checkpointing=True)],
}


XL: dict[str, TrainingSpec] = {
    "sdxl": make_spec(**{**LOW, "anchor_below": 900, "prior_weight": 0.5}),
    "sdxl text encoder": make_spec(**PLAIN, train_text_encoder=True),
}
XL_SHARED = [make_spec(Method.LORA, **PLAIN, rank=2, batch_size=n) for n in (1, 2)]


class _Sent:
    """A loss that never arrives."""

    def here(self) -> bool:
        return False

    def value(self) -> float:
        raise RuntimeError("a step waits for no loss")


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the host does: with real numbers."""

    def call(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return call


class Far:
    """A tiny base model, near and on the device."""

    def __init__(self, near: Near) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.near = near
        base = near[0]
        unet, encoder = send_module(self.mode, base.unet), send_module(self.mode, base.text_encoder)
        xl = base.xl and replace(base.xl, text_encoder=send_module(self.mode, base.xl.text_encoder))
        self.base = replace(base, unet=unet, text_encoder=encoder, xl=xl)
        with self.mode:
            sizes = [(layer.name, layer.rows, layer.rank, layer.cols) for layer in base.layout.encoder_matrices]
            encoders = SpectralFactors(
                {name: torch.empty(rows, rank, device=DEVICE) for name, rows, rank, _ in sizes},
                {name: torch.empty(rank, device=DEVICE) for name, _, rank, _ in sizes},
                {name: torch.empty(rank, cols, device=DEVICE) for name, _, rank, cols in sizes},
            )
        self.factors = replace(self.near[1], encoder=lambda: encoders)

    def job(self, spec: TrainingSpec) -> Job:
        """A job on the device, before its first step; its pictures and what draws them are real."""
        task, near = make_task(*self.near, spec)
        factors = self.factors
        if spec.prior_weight:
            prior = PriorPreservation([ClassPictures(torch.ones(5, 4, 8, 8), "a animal", "animal")], 0.5, 1000, 900)
            # Behind the others: class pictures are not cut here.
            task = replace(task, objectives=(*task.objectives, prior))
        learnable = make_learnable(spec, self.base, factors)
        with self.mode:
            text = TextStage(self.base)
            encoder = make_encoder_shifts(self.base, factors, spec)
            captions = Captions(self.base, text, spec, encoder)
            unet = make_unet(self.base, factors, learnable, spec)
            values = {**near.values, **({} if encoder is None else encoder.initial())}
            rates = dict.fromkeys(values, 0.01)
            state = TrainingState(values, rates, near.draws.generator, spec, DEVICE, lambda parts: _Sent())
        return replace(task, unet=unet, learnable=learnable, captions=captions, device=DEVICE), state


def gone_astray(state: TrainingState) -> list[str]:
    """Values that are not where they belong."""
    tensors: dict[str, Tensor] = {**state.values, **{f"average {n}": v for n, v in state.average.items()}}
    for name, moments in state._moments.items():
        tensors |= {f"first {name}": moments.first, f"second {name}": moments.second}
    return [f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor.device != DEVICE]


def take_alone(far: Far, spec: TrainingSpec) -> dict[str, Any]:
    """One step of one job."""
    task, state = far.job(spec)
    with far_away(far.mode) as stops:
        train_step(task, state, lambda _: None)
    moved = len(state._moments) == len(state.values)
    return {"stops": stops.found, "astray": gone_astray(state), "moved": moved, "low": sorted(stops.low)}


def take_wrong_ways(far: Far) -> dict[str, Any]:
    """What a step must not do is seen."""
    with far_away(far.mode) as stops:
        there = torch.zeros(3).to(DEVICE)
        there.cpu()
        there.copy_(torch.ones(3))
        torch.zeros(3).to(DEVICE, non_blocking=True)
    return {"stops": stops.found}


def take_together(far: Far, specs: Sequence[TrainingSpec]) -> dict[str, Any]:
    """One shared step."""
    jobs = [far.job(spec) for spec in specs]
    with far.mode:
        text = TextStage(far.base)
    calls: list[int] = []
    encode = text.encode_pooled

    def counted(rows: Any, learned: Any, weights: Any = ()) -> tuple[Tensor, Tensor | None]:
        calls.append(len(rows))
        return encode(rows, learned, weights)

    text.encode_pooled = counted  # type: ignore[method-assign]  # counts the passes of one instance
    step = SharedStep(jobs[0][0].unet, text)
    with far_away(far.mode) as stops:
        shares = [Share(loop.make_work(t, s.values, loop.draw_batch(t, s)), s) for t, s in jobs]
        results = step(shares)
        for (_, state), loss in zip(jobs, results, strict=True):
            if isinstance(loss, Exception):
                raise loss
            state.count([loss])
    astray = [line for _, state in jobs for line in gone_astray(state)]
    return {"stops": stops.found, "astray": astray, "passes": calls, "moved": True, "low": sorted(stops.low)}


def take_held(far: Far) -> dict[str, Any]:
    """Bytes that cross over for the UNets of some jobs, one after another and together, and what is given back."""
    base, factors = far.base, far.factors
    held = HeldFactors(base, factors)
    with far.mode:
        sharing = SharedTraining(base, factors, held=held)

    def crossed(make: Callable[[], object]) -> tuple[int, object]:
        with far_away(far.mode) as stops:
            made = make()
        return stops.crossed, made

    def unet(hold: bool, **given: Any) -> tuple[int, object]:
        spec = make_spec(**given)
        learnable = make_learnable(spec, base, factors)
        return crossed(lambda: make_unet(base, factors, learnable, spec, held if hold else None))

    def joined() -> tuple[int, object]:
        spec = make_spec(**LOW, gradient_checkpointing=True)
        learnable = make_learnable(spec, base, factors)
        return crossed(lambda: sharing.join(spec, learnable)[0])

    plain = unet(False, **PLAIN)[0]
    found = {
        "plain": [plain, unet(False, **PLAIN)[0]],
        "first": unet(True, **PLAIN)[0],
        "later": unet(True, **PLAIN)[0],
    }
    first, other = unet(True, **LOW), joined()
    found |= {"lowered": first[0], "together": other[0], "lora": unet(True, **LOW, method=Method.LORA)[0]}
    found["in use"] = sharing.release()
    found["still there"] = unet(True, **LOW)[0]
    del first, other
    found["given back"], found["nothing left"] = sharing.release(), sharing.release()
    found["anew"] = unet(True, **LOW)[0]
    return found


def main() -> None:
    """Run all, whatever some of them raise."""
    open_device()
    loop.draw_batch, loop.make_work = on_host(loop.draw_batch), on_host(loop.make_work)
    far = Far(make_tiny_base(load_base_model(MODEL)))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = load_base_model(save_tiny_sdxl(Path(folder) / "tiny-sdxl"))
    far_xl = Far((base, decompose(base)))
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "wrong ways": lambda: take_wrong_ways(far),
        **{name: partial(take_alone, far, spec) for name, spec in SINGLE.items()},
        **{f"shared {name}": partial(take_together, far, specs) for name, specs in SHARED.items()},
        **{name: partial(take_alone, far_xl, spec) for name, spec in XL.items()},
        "held factors": lambda: take_held(far),
        "shared sdxl": lambda: take_together(far_xl, XL_SHARED),
    }
    for name, case in cases.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        try:
            found[name] = case()
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            if len(sys.argv) > 1:
                raise
    print(json.dumps(found))


if __name__ == "__main__":
    main()
