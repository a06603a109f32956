"""Write benchmarks/shapes/{sd15,sdxl}.json: every weight of a UNet with the input it sees, without weights or pictures.

    python -P benchmarks/make_shapes.py

The UNets are built on torch's meta device from their published configurations and run once, so the list is exact and
takes seconds. Needs diffusers; the benchmarks read only the JSON.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent / "shapes"
TEXT_TOKENS = 77
# Stable Diffusion 1.5 at 512x512 and SDXL base at 1024x1024: what differs from diffusers' defaults.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def list_weights(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return name, weight shape, input shape without batch and channels, stride and padding of every matrix weight."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    seen: dict[str, tuple[int, ...]] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shape = tuple(inputs[0].shape)
            seen[name] = shape[2:] if isinstance(module, nn.Conv2d) else shape[1:-1] or (1,)

        return hook

    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(remember(name))
    size = config["sample_size"]
    extra: dict[str, Any] = {}
    if config.get("addition_embed_type") == "text_time":
        extra["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, 1280, device="meta"),
            "time_ids": torch.empty(1, 6, device="meta"),
        }
    unet(
        torch.empty(1, 4, size, size, device="meta"),
        torch.empty(1, device="meta"),
        torch.empty(1, TEXT_TOKENS, config["cross_attention_dim"], device="meta"),
        **extra,
    )
    found = []
    for name, layer in layers.items():
        record: dict[str, Any] = {"name": name, "shape": list(layer.weight.shape), "input": list(seen[name])}
        if isinstance(layer, nn.Conv2d):
            record |= {"stride": layer.stride[0], "padding": int(layer.padding[0])}
        found.append(record)
    return found


def main() -> None:
    """Write both files, one weight a line."""
    FOLDER.mkdir(exist_ok=True)
    for model, config in CONFIGS.items():
        weights = list_weights(config)
        lines = ",\n".join(f"  {json.dumps(weight)}" for weight in weights)
        (FOLDER / f"{model}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(f"{model}: {len(weights)} weights")


if __name__ == "__main__":
    main()
