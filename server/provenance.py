"""What a picture's file says about its making."""

from collections.abc import Sequence

from hueshift.adapters.blocks import BlockWeights
from hueshift.server.generation import AppliedAdapter, GenerationRequest, StartRequest


def provenance(request: GenerationRequest, index: int, base_hash: str) -> dict[str, str]:
    """Return what picture `index` of a request is to say: seed, base model, what acted on it. Never words of a prompt.

    `adapters` have their weights; `regions` the adapters of each region, `-` for one without, and a bar between
    regions. `lag` is there where the adapters' branches were confined (LAG sampling), `shared_attention` has the seed
    of the picture whose self-attention was shared (StyleAligned), which of that picture is its own. `start` is the
    SHA-256 of the file that was started from, with its strength and how it was inverted.
    """
    fields = {"seed": str(request.seeds[index]), "base": base_hash}
    adapters = _adapters_text(request.adapters)
    if adapters:
        fields["adapters"] = adapters
    if request.regions:
        fields["regions"] = " | ".join(_adapters_text(region.adapters) or "-" for region in request.regions)
    if request.lag is not None:
        # Which words decided is part of the prompt.
        fields["lag"] = "words" if request.lag.words else "adapters"
    if request.shared_attention:
        fields["shared_attention"] = f"seed={request.seeds[0]}"
    if request.start is not None:
        fields["start"] = _start_text(request.start)
    return fields


def _start_text(start: StartRequest) -> str:
    parts = [start.content_hash, f"strength={start.strength:g}"]
    if start.inversion is not None:
        parts.append(f"inversion={start.inversion.steps}")
        if start.inversion.noise_share:
            parts.append(f"noise_share={start.inversion.noise_share:g}")
    return " ".join(parts)


def _adapters_text(adapters: Sequence[AppliedAdapter]) -> str:
    return " ".join(f"{a.content_hash}*{a.weight:g}{_blocks_text(a.blocks)}" for a in adapters if a.weight != 0)


def _blocks_text(blocks: BlockWeights | None) -> str:
    return "" if blocks is None else f"[{','.join(f'{name}={weight:g}' for name, weight in blocks.entries)}]"
