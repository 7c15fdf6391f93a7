"""``python -m slim.chat FOLDER [FOLDER ...]``: talk to one model, or to several that answer the
same questions (docs/chat.md).

Exit codes: 0 done, 2 a mistake in the command, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slim.core.console import never_fail_on_a_character, output_may_be_cut
from slim.core.errors import SlimError
from slim.serve.options import add_model_options, load_models, positive

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
    never_fail_on_a_character()
    options = parser().parse_args(arguments)
    try:
        with output_may_be_cut():
            talk(options)
    except SlimError as error:
        print(f"slim: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nslim: Interrupted.", file=sys.stderr)
        return 130
    return 0


def talk(options: argparse.Namespace) -> None:
    """Load the models and talk in the terminal.

    Args:
        options: of :func:`parser`.
    """
    from slim.serve.sampling import Sampling  # local: for --help nothing is loaded

    sampling = sampling_of(options)
    Sampling().changed(sampling)  # a wrong value is answered before anything is loaded
    models = load_models(options)
    from slim.chat.preferences import Preferences
    from slim.chat.terminal import Terminal

    preferences = Preferences(Path(options.preferences).expanduser())
    Terminal(models, sampling, options.system, preferences).run()


if __name__ == "__main__":
    sys.exit(main())
