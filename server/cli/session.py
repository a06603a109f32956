"""What every command that calls a server shares: where it is, the key, how to print, how errors read."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hueshift.server.cli.options import gather, present
from hueshift.server.cli.output import Output

if TYPE_CHECKING:
    from hueshift.client.errors import HueshiftClientError
    from hueshift.client.sync import Client

_PANEL = "Connection and output"

# What to do, by the server's reason. Everything else says it in its message.
_ADVICE = {
    "CREDENTIAL_MISSING": "Give a key with --api-key or HUESHIFT_API_KEY; `hueshift keys create` makes one.",
    "CREDENTIAL_INVALID": "Give a valid key with --api-key or HUESHIFT_API_KEY; `hueshift keys create` makes one.",
    "ADAPTER_NOT_FOUND": "`hueshift adapters list` shows your adapters.",
    "ADAPTER_REVISION_NOT_FOUND": "`hueshift adapters show` tells the newest revision.",
    "FINE_TUNE_NOT_FOUND": "`hueshift jobs list` shows your jobs.",
    "MODEL_NOT_FOUND": "`hueshift model` shows the default one.",
    "WARMING_UP": "The server is starting; try again in a moment.",
    "DRAINING": "The server is stopping; try again when it is back.",
}


@dataclass(frozen=True, slots=True)
class Session:
    """A command's connection and output."""

    client: "Client"
    output: Output


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the connection options and, as `session`, a Session; make its errors readable."""

    def run(connection: dict[str, Any], **arguments: Any) -> None:
        from hueshift.client.errors import HueshiftClientError
        from hueshift.client.jobs import FineTuneFailed

        output = Output(connection.pop("as_json"))
        with _open(**connection) as client:
            try:
                command(session=Session(client, output), **arguments)
            except HueshiftClientError as error:
                show_error(output, error, connection["address"])
                raise typer.Exit(1) from error
            except FineTuneFailed as error:
                output.error(str(error))
                raise typer.Exit(1) from error
            except OSError as error:
                output.error(f"{error.filename or 'a file'}: {error.strerror or error}")
                raise typer.Exit(1) from error
            except ValueError as error:
                # What the client cannot send: a number that its field does not hold, a choice that is none.
                raise typer.BadParameter(str(error)) from error

    own = [p for p in inspect.signature(command).parameters.values() if p.name != "session"]
    present(run, command, [*own, inspect.signature(run).parameters["connection"]])
    return gather(_options, into="connection")(run)


def show_error(output: Output, error: "HueshiftClientError", address: str) -> None:
    """Say what a failed call means and what to do about it."""
    advice = _ADVICE.get(error.reason, "")
    message = error.message or error.code.name
    if not error.reason and error.code.name == "UNAVAILABLE":
        # gRPC's sentence ends with the cause: "...: Connection refused".
        message = f"cannot reach a server at {address} ({message.rsplit(': ', 1)[-1]})"
        advice = "Start one with `hueshift serve`, or name another with --address or HUESHIFT_ADDRESS."
    elif error.code.name == "DEADLINE_EXCEEDED":
        advice = "Ask for fewer steps or pictures, or give it longer with --timeout."
    elif error.incident_id:
        advice = f"Report it with the incident id {error.incident_id}, which is in the server's log."
    elif error.retry_after is not None and not advice:
        advice = f"Try again in {max(error.retry_after, 0.1):.1f} s."
    output.error(
        message,
        code=error.reason or error.code.name,
        fields=[(v.field, v.description) for v in error.violations],
        advice=advice,
        grpc_code=error.code.name,
        retry_after=error.retry_after,
        incident_id=error.incident_id,
    )


def _options(
    address: Annotated[
        str,
        typer.Option(envvar="HUESHIFT_ADDRESS", help="Server, as host:port.", rich_help_panel=_PANEL),
    ] = "127.0.0.1:50051",
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="HUESHIFT_API_KEY",
            help="API key; better in the environment than in the shell's history.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Speak TLS.", rich_help_panel=_PANEL)] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="PEM file of the authority to trust; implies --tls.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    allow_plaintext: Annotated[
        bool,
        typer.Option(
            "--allow-plaintext",
            help="Send the key unencrypted to another machine, on a network that encrypts by itself.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Write JSON to stdout; progress stays on stderr.", rich_help_panel=_PANEL),
    ] = False,
) -> None:
    """Declare the options every connected command has."""


def _open(address: str, api_key: str | None, tls: bool, tls_ca: Path | None, allow_plaintext: bool) -> "Client":
    from hueshift.client.connection import Tls
    from hueshift.client.sync import Client

    security = Tls(ca=tls_ca.read_bytes() if tls_ca else None) if tls or tls_ca else None
    try:
        return Client(address, api_key, tls=security, allow_plaintext=allow_plaintext)
    except ValueError as error:
        raise typer.BadParameter(
            f"an API key would travel unencrypted to {address}: use --tls, or --allow-plaintext if the network encrypts"
        ) from error
