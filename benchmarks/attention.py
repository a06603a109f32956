"""Attention of a UNet by backend and head size, to choose `engine.attention` by. Run through benchmarks/run_gpu.py.

A case is all attentions of one kind and head size in one pass of the UNet: `self` over a picture's own positions,
`cross` over a prompt's 77 tokens. Baseline: torch's own choice (sdpa). Backends that are not installed are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.engines.cuda_attention import Attend, AttentionKind, attend_with
from hueshift.kernels.bench import Case, Weight, floor_ms
from hueshift.kernels.compare import relative_error

KERNEL = "attention"
DTYPE = torch.float16
BATCH = 16
KEYS = 77
HEADS = {"sd15": 8}
# SDXL's heads are 64 wide; SD1.5 has eight, whatever the width.
HEAD_WIDTH = 64

Call = tuple[Tensor, Tensor, Tensor]


def calls_by_size(model: str, weights: Sequence[Weight], device: torch.device) -> dict[tuple[str, int], list[Call]]:
    """Queries, keys and values of every attention by (kind, head size); those of one shape are shared."""
    made: dict[tuple[int, ...], Call] = {}
    found: dict[tuple[str, int], list[Call]] = {}
    for weight in weights:
        for layer, kind in (("attn1.to_q", "self"), ("attn2.to_q", "cross")):
            if not weight.name.endswith(layer):
                continue
            heads = HEADS.get(model, weight.rows // HEAD_WIDTH)
            positions, width = weight.input[0], weight.rows // heads
            keys = positions if kind == "self" else KEYS
            shape = (positions, keys, heads, width)
            if shape not in made:
                # As linear layers leave them: heads side by side.
                parts = [torch.randn(BATCH, count, heads, width, device=device) for count in (positions, keys, keys)]
                query, key, value = (part.to(DTYPE).transpose(1, 2) for part in parts)
                made[shape] = (query, key, value)
            found.setdefault((kind, width), []).append(made[shape])
    return found


def run(attend: Attend, calls: Sequence[Call]) -> None:
    """Run all attentions of a case."""
    for call in calls:
        attend(*call)


def check(attend: Attend, calls: Sequence[Call]) -> float:
    """Return the largest error against float64 on one sample of the smallest call."""
    query, key, value = (part[:1] for part in min(calls, key=lambda call: call[0].numel()))
    want = functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    return relative_error(attend(query, key, value), want)


def cases(models: Mapping[str, Sequence[Weight]], device: torch.device, sweep: bool) -> Iterator[Case]:
    """Yield one case a model, kind, head size and backend. There is nothing to sweep beyond these."""
    kinds = [kind for kind in AttentionKind if kind is not AttentionKind.XFORMERS or find_spec("xformers")]
    for model, weights in models.items():
        for (where, width), calls in sorted(calls_by_size(model, weights, device).items()):
            flops = sum(4.0 * query.numel() * key.shape[2] for query, key, _ in calls)
            moved = sum(2.0 * (2 * query.numel() + 2 * key.numel()) for query, key, _ in calls)
            for kind in kinds:
                attend = attend_with(kind)
                yield Case(
                    case=f"{model}-{where}-heads-of-{width}-{kind}",
                    works=[partial(run, attend, calls)],
                    baseline="sdpa",
                    baselines=[partial(run, attend_with(AttentionKind.SDPA), calls)],
                    flops=flops,
                    bytes=moved,
                    floor_ms=floor_ms(flops, moved),
                    check=partial(check, attend, calls),
                    # fp16 probabilities, rounded again in the product with the values.
                    tolerance=5e-3,
                    details={"batch": BATCH, "head_size": width, "backend": kind.value, "calls": len(calls)},
                )
