"""`hueshift health`: is the server ready? For container health checks and shell scripts; needs no key."""

from typing import Annotated

import typer

from hueshift.server.cli.session import Session, connected


@connected
def health(
    session: Session,
    wait: Annotated[float, typer.Option(min=0.1, help="Seconds to wait until it is ready.")] = 1.0,
) -> None:
    """Exit with 0 if the server answers SERVING, with 1 and the reason if not."""
    session.client.wait_until_ready(wait)
    session.output.result({"ready": True}, "ready")
