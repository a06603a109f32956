"""Fine-tune a subject and a style with the default settings, and score them against pictures never trained on.

    python -P benchmarks/finetune_cpu.py --out out/finetune

Learns a fox from four pictures, and the OpenMoji style from eight (examples/pictures), then compares pictures of the
fox in a fifth drawing style, and of eleven other things in the OpenMoji style, with the true ones by CLIP-I. Writes
rows.jsonl (one row a case) and a grid of each case: training pictures, truth, base, personalised.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hueshift.adapters.adapter import Adapter
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel, load_base_model
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors, load_factors
from hueshift.engines.text import TextStage
from hueshift.engines.vae import VaeStage
from hueshift.models.embedded import EMBEDDED_CLIP, EMBEDDED_MODEL
from hueshift.training.defaults import complete_spec
from hueshift.training.methods.learnable import Rows
from hueshift.training.run import run_training
from hueshift.training.samples import Sampler
from hueshift.training.scores import ClipScorer
from hueshift.training.spec import Method, SubjectKind, TrainingSpec
from hueshift.training.unet import TrainingUNet

PICTURES = Path(__file__).resolve().parent.parent / "examples" / "pictures"
STYLE_WORDS = ("noto", "twemoji", "fluent", "flat", "modern", "3d")
DOG = "a fluent 3d emoji of a dog face"


@dataclass(frozen=True)
class Case:
    """What is trained, what is drawn, and what it should look like. `base_prompts` ask the base for the same."""

    folder: Path
    kind: SubjectKind
    class_noun: str
    identifier_init: tuple[str, ...]
    prompts: list[str]
    base_prompts: list[str]
    truth: list[Image.Image]


def read_case(name: str) -> Case:
    """Read a case's pictures; the subject is drawn eight times, each thing of the style once."""
    if name == "subject":
        folder, fox = PICTURES / "fox", "a fluent 3d emoji of a fox"
        truth = read_pictures(folder, "eval")[0] * 8
        return Case(folder, SubjectKind.SUBJECT, "animal", (), [fox.replace("fox", "sks animal")] * 8, [fox] * 8, truth)
    folder = PICTURES / "openmoji"
    truth, entries = read_pictures(folder, "eval")
    prompts = [entry["caption"] for entry in entries]
    base_prompts = [f"an emoji of a {entry['name']}" for entry in entries]
    return Case(folder, SubjectKind.STYLE, "emoji", STYLE_WORDS, prompts, base_prompts, truth)


def read_pictures(folder: Path, part: str) -> tuple[list[Image.Image], list[dict[str, str]]]:
    """Read the pictures of `train` or `eval` and their entries of captions.json."""
    entries = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    chosen = [entry for entry in entries if entry["file"].startswith(part)]
    return [Image.open(folder / entry["file"]).convert("RGB") for entry in chosen], chosen


class Report:
    """Training hooks that print, and remember what steps cost in wall and processor seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.losses: list[float] = []

    def on_step(self, step: int, loss: float, seconds: float) -> None:
        """Count and print now and then."""
        self.seconds += seconds
        self.losses.append(loss)
        if step % 10 == 0:
            print(f"  step {step:4d}  loss {np.mean(self.losses[-10:]):.4f}  {self.seconds / step:.2f} s a step")

    def on_sample(self, step: int, prompt: str, png: bytes) -> None:
        """Ignore it: the grid shows more."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Ignore it."""

    def should_stop(self) -> bool:
        """Never."""
        return False

    def at(self, name: str) -> None:
        """Pass."""


class Bench:
    """The base model and all that draws and scores."""

    def __init__(self, cache: Path, guidance: float) -> None:
        self.base: BaseModel = load_base_model(EMBEDDED_MODEL)
        self.factors: SpectralFactors = load_factors(self.base, cache)
        self.clip = ClipScorer(EMBEDDED_CLIP)
        self.text = TextStage(self.base)
        self.guidance = guidance

    def draw(self, prompts: Sequence[str], adapter: Adapter | None) -> list[Image.Image]:
        """Draw one picture a prompt with the seeds 0, 1, ..., as a server would."""
        layout = self.base.layout
        norms = read_norms(layout, lambda name: self.base.unet.get_parameter(f"{name}.weight"))
        rows = RowLayout(layout, ("proj_out",), 16)
        row = rows.compose([(adapter, 1.0)] if adapter else [], self.factors, norms)
        plan = Plan.FACTORED if row.needs_factored else Plan.DENSE
        adapted = AdaptedUNet(self.base, self.factors, rows, plan)
        unet = TrainingUNet(adapted, layout.cross_attentions, layout.token_width)
        sampler = Sampler(self.base, unet, VaeStage(self.base), self.text.empty, lambda: None, guidance=self.guidance)
        contexts = self.text.encode(prompts, adapter.tokens if adapter else {}).context
        spectral, lowrank = (None if part is None else part[None] for part in (row.spectral, row.lowrank))
        return sampler.pictures(contexts, range(len(prompts)), Rows(spectral, lowrank))

    def run(self, name: str, method: Method, given: dict[str, Any], out: Path) -> dict[str, Any]:
        """Train and score one case; return its row and write its grid."""
        case = read_case(name)
        pictures, entries = read_pictures(case.folder, "train")
        spec = complete_spec(
            method=method,
            subject_kind=case.kind,
            captions=[entry["caption"] for entry in entries],
            identifier="sks",
            class_noun=case.class_noun,
            identifier_init=case.identifier_init,
            **given,
        )
        report = Report()
        wall, cpu = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as workdir:
            adapter = run_training(
                spec,
                pictures,
                base=self.base,
                factors=self.factors,
                clip=None,
                workdir=Path(workdir),
                hooks=report,
            ).adapter
        spent = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - cpu}
        base, made = self.draw(case.base_prompts, None), self.draw(case.prompts, adapter)
        dogs, base_dogs = self.draw([DOG] * 4, adapter), self.draw([DOG] * 4, None)
        save_grid([pictures, case.truth, base, made, [*dogs, *base_dogs]], out / f"{name}-{method}.png")
        pairs = self.clip.clip_i_pairs(made, case.truth)
        return {
            "case": name,
            **spent,
            "clip_i_base": float(np.mean(self.clip.clip_i_pairs(base, case.truth))),
            "clip_i": float(np.mean(pairs)),
            "clip_i_each": [round(pair, 3) for pair in pairs],
            "dog_drift": float(np.mean(self.clip.clip_i_pairs(dogs, base_dogs))),
            "step_seconds": report.seconds / spec.steps,
            "last_loss": float(np.mean(report.losses[-20:])),
            "adapter_bytes": adapter.nbytes,
            "guidance": self.guidance,
            "settings": settings_of(spec),
            "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "arch": platform.machine()},
        }


def settings_of(spec: TrainingSpec) -> dict[str, Any]:
    """Return the numbers and choices of a spec."""
    texts = ("captions", "sample_prompts", "identifier", "class_noun")
    return {name: value for name, value in spec.to_json().items() if name not in texts}


def save_grid(rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
    """Paste rows of 128x128 pictures into one."""
    grid = Image.new("RGB", (132 * max(len(row) for row in rows), 132 * len(rows)), "white")
    for j, row in enumerate(rows):
        for i, picture in enumerate(row):
            grid.paste(picture.resize((128, 128)), (132 * i, 132 * j))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


def main() -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/finetune"))
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/hueshift").expanduser())
    parser.add_argument("--case", choices=("subject", "style"), action="append")
    parser.add_argument("--method", type=Method, choices=list(Method), default=Method.SVDIFF)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER", help="change one setting")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    given = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.set)}
    bench = Bench(options.cache, options.guidance)
    for name in options.case or ("subject", "style"):
        print(f"{name}: {options.method}")
        row = bench.run(name, options.method, given, options.out)
        with (options.out / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  CLIP-I {row['clip_i']:.3f} (base {row['clip_i_base']:.3f}), {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
