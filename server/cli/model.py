"""`hueshift model`: the base model, its defaults and limits."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group

from hueshift.server.cli.output import facts_table, rows_table, size_text
from hueshift.server.cli.session import Session, connected

if TYPE_CHECKING:
    from hueshift.client.job_spec import Setting
    from hueshift.client.model import EngineCapacity


@connected
def show_model(
    session: Session, name: Annotated[str, typer.Argument(help="Model; default: the server's.")] = ""
) -> None:
    """Show the base model, its defaults and limits."""
    model = session.client.model(name)
    facts = facts_table(
        {
            "model": model.name,
            "architecture": model.architecture,
            "base hash": model.base_hash,
            "engine": f"{model.engine} ({', '.join(model.plans)})",
            "size": f"{model.width}x{model.height}, multiples of {model.size_multiple} up to {model.max_size}",
            "sampler": f"{model.default_sampler or 'newer than this client'} (of {', '.join(model.samplers)})",
            "steps": f"{model.default_steps}, at most {model.max_steps}",
            "guidance": f"{model.default_guidance_scale:g}",
            "pictures": f"at most {model.max_count} a request, {model.batch_capacity} in the running batch",
            **_capacity_facts(model.capacity),
            "LAG sampling": "yes" if model.lag else "no",
            "shared attention": "yes" if model.shared_attention else "no",
            "regions": f"at most {model.max_regions} a picture",
            "from a picture": f"of at most {size_text(model.max_start_bytes)}, strength {model.default_strength:.2g}; "
            f"inversion in {model.default_inversion_steps} steps, guidance {model.default_inversion_guidance_scale:g}",
            "prompt": f"{model.max_tokens} tokens",
            "identifier": model.default_identifier,
            "adapter files": f"at most {size_text(model.max_adapter_bytes)}",
            "training": f"at most {model.max_pictures} pictures of {size_text(model.max_picture_bytes)}",
        }
    )
    rows = [
        (info.method.value, kind, _settings_text(defaults))
        for info in model.methods
        for kind, defaults in (
            ("subject", info.subject_defaults),
            ("style", info.style_defaults),
            ("edit", info.edit_defaults),
        )
        if defaults
    ]
    session.output.result(model, Group(facts, "", rows_table(("method", "for", "defaults"), rows)))


def _capacity_facts(capacity: "EngineCapacity | None") -> dict[str, str | None]:
    if capacity is None:
        return {}
    merged = f", {capacity.merged_slots} merged into weights" if capacity.merged_slots else ""
    merged += f", {capacity.dense_slots} with dense deltas" if capacity.dense_slots else ""
    filled = f", filled up to {', '.join(map(str, capacity.buckets))}" if capacity.buckets else ""
    sizes = (f"{size.rows} at {size.width}x{size.height}" for size in capacity.sizes)
    return {
        "UNet rows": f"at most {capacity.max_rows} a call{filled}",
        "rows that fit": ", ".join(sizes) or None,
        "adapter slots": f"{capacity.adapter_slots} mixes{merged}",
    }


def _settings_text(settings: Mapping[str, "Setting"]) -> str:
    """What is on: a setting of zero or false is off, or does nothing."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, str):
            words.append(f"{name}={value}")
        elif isinstance(value, int | float):
            words += [f"{name}={value:g}"] if value else []
        elif value:
            words.append(f"{name}={','.join(value)}")
    return "  ".join(words)
