"""Which GPU does what: devices that train never serve, and a worker sees its own device alone."""

import re
from collections.abc import Mapping, Sequence

from hueshift.adapters.errors import InvalidArgument, Reason

_CUDA = re.compile(r"cuda:(\d+)")
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def check_devices(training: Sequence[str], serving: str) -> None:
    """Check `training.devices` against the serving device. Raises ValueError naming what is wrong and what to do."""
    for device in training:
        if not _CUDA.fullmatch(device):
            raise ValueError(f"training.devices: {device!r} given; allowed: cuda:0, cuda:1 and so on")
    if len(set(training)) < len(training):
        raise ValueError(f"training.devices: {', '.join(training)} names a device twice; each gets one worker")
    if serving in training:
        raise ValueError(
            f"training.devices: {serving} serves already, or may with engine.device auto; a device trains or serves, "
            "never both. Set engine.device to another device or to cpu, or take it out of training.devices"
        )


def worker_environment(device: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker that trains on `device` (cuda:N), or on the CPU when it is None.

    CUDA reads it when it starts, so it is set before the worker's process begins; a worker on the CPU sees no GPU at
    all. N counts within what this process may see itself. Raises ValueError when that holds no such device.
    """
    found = dict(environment)
    if device is None:
        return found | {_VISIBLE: ""}
    number = int(device.removeprefix("cuda:"))
    given = environment.get(_VISIBLE)
    if given is None:
        return found | {_VISIBLE: str(number)}
    visible = [name.strip() for name in given.split(",") if name.strip()]
    if number >= len(visible):
        raise InvalidArgument.for_field(
            "training.devices",
            f"{device} given, and {_VISIBLE} shows {len(visible)} devices: {given!r}",
            Reason.SETTINGS_INVALID,
        )
    return found | {_VISIBLE: visible[number]}
