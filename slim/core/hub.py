"""Whether the hub of models and data sets answers, found once, so that a machine without a network
does not wait for every file anew."""

from __future__ import annotations

import os
import sys
from functools import cache
from urllib.parse import urlsplit

from slim.core.console import say

SECONDS = 10  # how long the hub may take to answer


@cache
def hub_problem() -> str | None:
    """Say why the hub cannot be reached, in a few words; None if it answers.

    Where it does not answer, the hub's libraries are told so for the rest of this process. They
    then use the local cache at once, where each file would cost them half a minute of retries.
    """
    from huggingface_hub import constants  # local: not needed for --help
    from huggingface_hub.utils import get_session

    host = urlsplit(constants.ENDPOINT).netloc or constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return "the hub cannot be reached (HF_HUB_OFFLINE is set)"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # two libraries with a dozen kinds each
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # it has read the setting already
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        problem = f"the hub cannot be reached ({host}: {reason.split('] ')[-1]})"
        say(f"{problem[0].upper()}{problem[1:]}: only what is in the local cache can be used.")
        return problem
    return None
