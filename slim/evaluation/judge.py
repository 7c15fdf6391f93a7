"""A language model as judge of two answers, with a reference, in both orders (after MT-bench: Zheng
et al., arXiv:2306.05685).

Judges favour what they read first, so each pair is shown in both orders, the first one drawn by
lot; a model wins a question if it wins in both orders, or in one with a tie in the other, and
everything else is a tie. Verdicts are kept in a file as they come, by a hash of judge, question and
answers: what was asked once is not asked again, and an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slim.checkpoints.checkpoint import checksums
from slim.checkpoints.store import digest
from slim.core.console import track
from slim.core.endpoint import Endpoint, require_address
from slim.core.errors import SlimError
from slim.core.replies import Replies
from slim.core.settings import require_flag, require_number
from slim.evaluation.chat import LocalModel

RULES = """\
You compare two answers to a question with a reference answer. Judge how correct and how helpful \
each is; length, style and the order in which they are shown do not count. First give your reason \
in one or two sentences. Then write the verdict on a line of its own, exactly one of:
Verdict: A
Verdict: B
Verdict: tie"""
CASE = (
    "[Question]\n{question}\n\n[Reference]\n{reference}\n\n"
    "[Answer A]\n{first}\n\n[Answer B]\n{second}"
)
# as the rules ask for it, or as models write it in spite of them: "**Verdict:** Answer B"
VERDICT = re.compile(r"verdict\W{0,6}(?:answer\s+)?(A|B|C|tie)\b", re.IGNORECASE)
# MT-bench's form, which judges trained for it keep to
BRACKETS = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
# what a judge writes, in lower case -> the verdict; MT-bench's rules call a tie C
MEANINGS = {"a": "A", "b": "B", "c": "tie", "tie": "tie"}
HOPELESS = 3  # questions in a row without a readable verdict, after which a judge is given up


@dataclass
class Judge:
    """Who judges, and how much may be asked.

    Attributes:
        model: name of the model at ``endpoint``, or a checkpoint folder where there is no endpoint.
        endpoint: address of a server that speaks OpenAI's chat completions, such as
            ``http://127.0.0.1:8000/v1``; None: ``model`` is a folder.
        key_variable: environment variable with the server's key; the key itself is never written
            anywhere.
        limit: questions judged for each pair of models, from the start.
        both_orders: ask twice, with the answers swapped.
        new_tokens: most tokens of reason and verdict.
        retries: further tries after the first, where a server does not answer or a verdict cannot
            be read.
        timeout: seconds for one answer of a server.
        wait: seconds before the second try, doubled each time.
        seed: of the order shown first.
    """

    cache_name: ClassVar[str] = "Judge"

    model: str
    endpoint: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    limit: int = 40
    both_orders: bool = True
    new_tokens: int = 256
    retries: int = 3
    timeout: float = 120.0
    wait: float = 1.0
    seed: int = 0

    version: ClassVar[int] = 1  # of the rules above: raised when they change

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise SlimError(
                "eval.judge.model is missing. Give the name of the endpoint's model, or a "
                "checkpoint folder."
            )
        require_flag("eval.judge.both_orders", self.both_orders)
        for name, low in (("limit", 1), ("new_tokens", 8), ("retries", 0), ("seed", 0)):
            require_number(f"eval.judge.{name}", getattr(self, name), low, integer=True)
        for name in ("timeout", "wait"):
            require_number(f"eval.judge.{name}", getattr(self, name), 0)
        require_address("eval.judge.endpoint", self.endpoint)
        if self.endpoint is None and not Path(self.model).expanduser().is_dir():
            raise SlimError(
                f"eval.judge.model={self.model} is no checkpoint folder. Give one, or the server "
                "that has the model with "
                "eval.judge.endpoint=http://HOST:PORT/v1."
            )

    def cache_key(self) -> dict:
        """Return what determines a verdict besides the case, as plain JSON values."""
        key = {
            "version": self.version,
            "model": self.model,
            "files": None,
            "new_tokens": self.new_tokens,
        }
        # a folder is known by what it holds, wherever it lies
        if not self.endpoint:
            key["model"] = None
            key["files"] = checksums(Path(self.model).expanduser())
        return key

    def client(self, device: str) -> Endpoint | LocalModel:
        """Return what answers the questions: the server, or the folder's model on ``device``."""
        if self.endpoint is None:
            return LocalModel(self.model, device)
        return Endpoint(
            self.endpoint, self.model, self.key_variable, self.timeout, self.retries, self.wait
        )

    def compare(self, one: list[dict], other: list[dict], verdicts: Replies, client) -> list[dict]:
        """Judge the answers of two checkpoints to the same questions.

        Args:
            one: records of the first checkpoint's answers: ``question``, ``reference``, ``answer``.
            other: those of the other checkpoint, in the same order.
            verdicts: the judge's file, which known verdicts are taken from and new ones added to.
            client: what :meth:`client` returned.

        Returns:
            A row per question: ``question``, ``reference``, ``answers`` (of both), ``winner``
            (``"one"``, ``"other"``, ``"tie"``, or None where no verdict could be read) and
            ``opinions`` (``shown_first``, ``verdict``, ``reason``).

        Raises:
            SlimError: when the judge is given up; its verdicts until then are in ``verdicts``.
        """
        rows = []
        silent = 0
        lots = random.Random(self.seed)
        pairs = list(zip(one, other, strict=True))[: self.limit]
        for mine, theirs in track(pairs, "judge"):
            # drawn for every pair, so that a pair's order does not depend on what is known already
            swapped = lots.random() < 0.5
            row = self._judged(mine, theirs, swapped, verdicts, client)
            rows.append(row)
            if row["winner"] is not None:
                silent = 0
                continue
            silent += 1
            if silent >= HOPELESS:
                raise SlimError(
                    f"The judge {self.model} gave no verdict that can be read on {silent} "
                    "questions in a row; the last answer: "
                    f"{row['opinions'][-1]['reason'][:120]!r}. {verdicts.kept()} Try another "
                    "eval.judge.model."
                )
        return rows

    def _judged(self, mine: dict, theirs: dict, swapped: bool, verdicts: Replies, client) -> dict:
        answers = {"one": mine["answer"], "other": theirs["answer"]}
        row = {"question": mine["question"], "reference": mine["reference"], "answers": answers}
        # nothing to decide, and a judge would only be asked for money
        if answers["one"] == answers["other"]:
            return {**row, "winner": "tie", "opinions": []}
        order = ["one", "other"]
        if swapped:
            order.reverse()
        opinions = [self._opinion(row, order, verdicts, client)]
        if self.both_orders:
            opinions.append(self._opinion(row, order[::-1], verdicts, client))
        winner = settle([opinion["verdict"] for opinion in opinions])
        return {**row, "winner": winner, "opinions": opinions}

    def _opinion(self, row: dict, order: list[str], verdicts: Replies, client) -> dict:
        """Ask about a question with its answers shown in this order of their names."""
        first, second = order
        case = CASE.format(
            question=row["question"],
            reference=row["reference"],
            first=row["answers"][first],
            second=row["answers"][second],
        )
        reply = self._ask(case, verdicts, client)
        verdict = reply["verdict"]
        # a tie and an unreadable verdict name no answer
        winner = {"A": first, "B": second}.get(verdict, verdict)
        return {"shown_first": first, "verdict": winner, "reason": reply["reason"]}

    def _ask(self, case: str, verdicts: Replies, client) -> dict:
        """Return ``verdict`` (A, B, tie or None) and ``reason``, from the file where it is known.

        A verdict that cannot be read is not kept: the next run asks again."""
        key = digest([self.cache_key(), RULES, case])
        known = verdicts.find(key)
        if known is not None:
            return known
        messages = [{"role": "system", "content": RULES}, {"role": "user", "content": case}]
        for _ in range(self.retries + 1):
            try:
                text = client.ask(messages, self.new_tokens)
            except SlimError as error:
                raise SlimError(
                    f"{error} {verdicts.kept()} The same command resumes from them."
                ) from error
            verdict = read_verdict(text)
            if verdict is not None:
                return verdicts.add(key, {"verdict": verdict, "reason": text.strip()})
            if isinstance(client, LocalModel):  # greedy: the same again
                break
        return {"verdict": None, "reason": text.strip()}


def read_verdict(text: str) -> str | None:
    """Return ``"A"``, ``"B"`` or ``"tie"``, the last one written, also as ``[[A]]``; None if there
    is none."""
    matches = VERDICT.findall(text) or BRACKETS.findall(text)
    if not matches:
        return None
    # a model that thinks aloud may name a verdict that it then takes back
    return MEANINGS[matches[-1].lower()]


def settle(verdicts: list[str | None]) -> str | None:
    """Return the winner over both orders: one that no verdict contradicts; None if a verdict is
    missing."""
    if None in verdicts:
        return None
    sides = set(verdicts) - {"tie"}
    return sides.pop() if len(sides) == 1 else "tie"
