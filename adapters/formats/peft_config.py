"""PEFT's configuration of an adapter, as far as it tells the scales of layers."""

import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hueshift.adapters.container import invalid, show

if TYPE_CHECKING:
    from hueshift.adapters.formats.source import ForeignFile

FOLDER_KEY = "adapter_config"
"""Metadata under which the adapter_config.json of a folder travels with its tensors."""

_KINDS = ("LORA", "LOHA", "LOKR")
_MAX_PATTERN = 256
# What a pattern may be made of: names, an anchor, and `.*`. PEFT takes any regular expression, but one of a stranger's
# file could run for years.
_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\.\*)+\$?")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """scale = alpha / rank, or alpha / sqrt(rank) with rslora (Kalajdzievski 2023); patterns change alpha by layer."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    rslora: bool

    def scale(self, layer: str, rank: int | None) -> float:
        """Scale of a layer, by its name without prefixes; `rank` is that of its tensors, None where they have none."""
        alpha = _by_pattern(self.alpha_pattern, layer, self.alpha)
        known = rank or _by_pattern(self.rank_pattern, layer, float(self.rank))
        return alpha / (math.sqrt(known) if self.rslora else known)


def find_config(source: "ForeignFile", metadata_key: str, network: str = "unet") -> PeftConfig | None:
    """Return the configuration that the file carries; None if it carries none.

    diffusers puts `unet.`, `text_encoder.` or the like before each field when a file may hold several networks, and
    the `network`'s are those that count then. Raises InvalidArgument
    (ADAPTER_FILE_INVALID) naming a field that is wrong or unknown in its meaning.
    """
    fields = source.json(FOLDER_KEY)
    if fields is None:
        fields = source.json(metadata_key)
        if fields is not None and not any(key in fields for key in ("r", "lora_alpha")):
            prefix = f"{network}."
            fields = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    if not fields:
        return None
    kind = fields.get("peft_type", "LORA")
    if kind not in _KINDS:
        raise invalid(f"PEFT adapter of type {show(kind)}; allowed: {', '.join(_KINDS)}")
    rank = _number(fields, "r", 8.0)
    if rank < 1 or rank != int(rank):
        raise invalid(f"the configuration's r is {rank}; allowed: whole numbers from 1")
    return PeftConfig(
        rank=int(rank),
        alpha=_number(fields, "lora_alpha" if "lora_alpha" in fields else "alpha", 8.0),
        rank_pattern=_patterns(fields, "rank_pattern"),
        alpha_pattern=_patterns(fields, "alpha_pattern"),
        rslora=bool(fields.get("use_rslora", False)),
    )


def _number(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise invalid(f"the configuration's {name} is {show(value)}; allowed: a number")
    return float(value)


def _patterns(fields: Mapping[str, Any], name: str) -> dict[str, float]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise invalid(f"the configuration's {name} must map layers to numbers")
    for pattern in value:
        if len(pattern) > _MAX_PATTERN or not _PATTERN.fullmatch(pattern):
            raise invalid(
                f"the configuration's {name} has the pattern {pattern[:80]!r}; allowed: layer names, '^', '$' and '.*'"
            )
    found = {pattern: _number(value, pattern, 0.0) for pattern in value}
    if name == "rank_pattern" and any(rank < 1 for rank in found.values()):
        raise invalid("the configuration's rank_pattern has a rank below 1")
    return found


def _by_pattern(patterns: Mapping[str, float], layer: str, otherwise: float) -> float:
    return next((value for pattern, value in patterns.items() if _matches(pattern, layer)), otherwise)


def _matches(pattern: str, layer: str) -> bool:
    # PEFT: re.match(rf"(.*\.)?({pattern})$", layer). As a glob, which cannot run away.
    glob = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".").replace(".*", "*")
    if fnmatch.fnmatchcase(layer, glob):
        return True
    return not pattern.startswith("^") and fnmatch.fnmatchcase(layer, f"*.{glob}")
