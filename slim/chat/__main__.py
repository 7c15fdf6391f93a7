"""``python -m slim.chat FOLDER [FOLDER ...]``: talk to one model, or to several that answer the
same questions (docs/chat.md).

Exit codes: 0 done, 2 a mistake in the command, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slim.core.command import INTERRUPTED, run_command
from slim.core.console import show_labelled
from slim.serve.options import add_model_options, load_models, positive

HOST = "127.0.0.1"
MOST_TOKENS = 4096  # of an answer on the page
DESCRIPTION = "Talk to models in the terminal, or on a page in the browser: docs/chat.md"


def parser() -> argparse.ArgumentParser:
    """Return the command line of the chat."""
    command = argparse.ArgumentParser(prog="python -m slim.chat", description=DESCRIPTION)
    add_model_options(command)
    command.add_argument("--system", help="what the system says first")
    command.add_argument("--max-tokens", type=positive, default=512, help="of an answer (512)")
    for name, text in {
        "temperature": "0 takes the most likely token (what the model recommends, else 0)",
        "top-p": "draw from the likely tokens that together have this probability",
        "min-p": "leave out tokens less likely than this share of the likeliest",
        "repetition-penalty": "above 1 lowers what occurred",
    }.items():
        command.add_argument(f"--{name}", type=float, help=text)
    command.add_argument("--top-k", type=int, help="draw from that many of the likely tokens")
    command.add_argument("--seed", type=int, help="the same one gives the same answers")
    command.add_argument(
        "--preferences",
        default="preferences.jsonl",
        metavar="FILE",
        help="where preferred answers are kept (preferences.jsonl)",
    )
    command.add_argument(
        "--web", action="store_true", help="a page in the browser, for this machine only"
    )
    command.add_argument(
        "--port", type=int, default=8000, help="of the page; 0: any that is free (8000)"
    )
    return command


def sampling_of(options: argparse.Namespace) -> dict:
    """Return the settings of answers that were given, name -> value."""
    names = (
        "max_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "top_k", "seed",
    )  # fmt: skip
    settings = {name: getattr(options, name) for name in names}
    return {name: value for name, value in settings.items() if value is not None}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""

    def run(options: argparse.Namespace) -> None:
        if options.web:
            serve_page(options)
        else:
            talk(options)

    # after the ^C that the terminal shows
    return run_command(parser(), run, arguments, interrupted=f"\n{INTERRUPTED}")


def talk(options: argparse.Namespace) -> None:
    """Load the models and talk in the terminal.

    Args:
        options: of :func:`parser`.
    """
    sampling = checked_sampling(options)
    models = load_models(options)
    from slim.chat.preferences import Preferences  # local: for --help nothing is loaded
    from slim.chat.terminal import Terminal

    preferences = Preferences(Path(options.preferences).expanduser())
    Terminal(models, sampling, options.system, preferences).run()


def serve_page(options: argparse.Namespace) -> None:
    """Load the models and serve the page until a signal comes.

    Args:
        options: of :func:`parser`.
    """
    from slim.serve.server import listen, open_socket, serve

    sampling = checked_sampling(options)
    # before minutes of loading, after which the port would be taken
    with open_socket(HOST, options.port) as endpoint:
        models = load_models(options)
        from slim.chat.preferences import Preferences
        from slim.chat.web import page_routes
        from slim.serve.app import make_app
        from slim.serve.service import Limits, Service

        preferences = Preferences(Path(options.preferences).expanduser())
        routes = page_routes(preferences, {"system": options.system, **sampling})
        for model in models:
            model.defaults = model.defaults.changed(sampling)
        # one answer at a time: side by side they would slow one another down
        service = Service(models, Limits(max_tokens=MOST_TOKENS))
        show_labelled("open", f"{listen(endpoint)}/")
        serve(make_app(service, routes=routes), service, endpoint)


def checked_sampling(options: argparse.Namespace) -> dict:
    """Return the settings that were given; a wrong one is an error before anything is loaded."""
    from slim.serve.sampling import Sampling

    sampling = sampling_of(options)
    Sampling().changed(sampling)
    return sampling


if __name__ == "__main__":
    sys.exit(main())
