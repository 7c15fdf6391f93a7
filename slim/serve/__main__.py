"""``python -m slim.serve FOLDER [FOLDER ...]``: models behind OpenAI's interface (docs/chat.md).

Exit codes: 0 ended as it was asked to (Ctrl-C, SIGTERM), 2 a mistake in the command, 130
interrupted while loading.
"""

from __future__ import annotations

import argparse
import os
import sys

from slim.core.command import run_command
from slim.core.console import show_labelled
from slim.core.errors import SlimError
from slim.serve.options import add_model_options, load_models, positive

DESCRIPTION = "Serve models by OpenAI's interface: docs/chat.md"
KEY_VARIABLE = "SLIM_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")


def parser() -> argparse.ArgumentParser:
    """Return the command line of the server."""
    command = argparse.ArgumentParser(prog="python -m slim.serve", description=DESCRIPTION)
    add_model_options(command)
    add_server_options(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than localhost need a key"
    )
    command.add_argument(
        "--key-variable",
        default=KEY_VARIABLE,
        metavar="NAME",
        help=f"environment variable with the key that requests must send ({KEY_VARIABLE})",
    )
    command.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a page elsewhere that may ask, such as http://localhost:3000; may be repeated",
    )
    return command


def add_server_options(command: argparse.ArgumentParser) -> None:
    """Add the options that a page has, too."""
    command.add_argument("--port", type=int, default=8000, help="0: any that is free (8000)")
    command.add_argument(
        "--max-tokens", type=positive, default=1024, help="most of an answer (1024)"
    )
    command.add_argument(
        "--concurrency", type=positive, default=1, help="answers at the same time (1)"
    )
    command.add_argument(
        "--queue", type=positive, default=64, help="requests that may wait for their turn (64)"
    )
    command.add_argument(
        "--grace",
        type=positive,
        default=30,
        help="seconds that answers have to end when the server is stopped (30)",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(parser(), run, arguments)


def run(options: argparse.Namespace) -> None:
    """Load the models and serve them until a signal comes.

    Args:
        options: of :func:`parser`.
    """
    key = os.environ.get(options.key_variable) or None
    local = options.host in LOCAL
    if key is None and not local:
        raise SlimError(
            f"--host {options.host}: others than this machine may ask, so a key is needed.\n"
            f"Put one into the environment variable {options.key_variable}, or leave --host out."
        )
    from slim.serve.server import open_socket  # local: --help does without

    # before minutes of loading, after which the port would be taken
    with open_socket(options.host, options.port) as endpoint:
        models = load_models(options)
        from slim.serve.app import make_app
        from slim.serve.server import listen, serve
        from slim.serve.service import Limits, Service

        limits = Limits(options.concurrency, options.queue, options.max_tokens, options.grace)
        service = Service(models, limits)
        app = make_app(service, key, local, options.allow_origin)
        for model in models:
            show_labelled("model", model.name)
        show_labelled("base URL", f"{listen(endpoint)}/v1")
        serve(app, service, endpoint)


if __name__ == "__main__":
    sys.exit(main())
