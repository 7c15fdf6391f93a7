"""The chat in the terminal: questions, answers while they come, commands that begin with ``/``.

Answers go to standard output; what is said about them goes to standard error, so that
``python -m slim.chat FOLDER < questions.txt > answers.txt`` holds the answers alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from slim.chat.preferences import Preferences
from slim.chat.session import Session
from slim.chat.wrap import Wrapper
from slim.core.console import results_console, say
from slim.core.errors import SlimError, did_you_mean
from slim.core.text import counted
from slim.serve.model import Answer, ChatModel
from slim.serve.sampling import setting_names

PROMPT = "> "
HELP = """\
/set NAME VALUE  change a setting of the answers (/set lists them)
/system TEXT     what the system says first; without a text: nothing
/reset           forget the conversation
/undo            forget the last question and its answer
/again           answer the last question again
/prefer NUMBER   keep that model's answer in the file of --preferences
/help            this list
/quit            leave (Ctrl-D as well)
Ctrl-C ends an answer. A line that ends with \\ continues on the next one."""


class Leave(Exception):
    """The user has asked to leave."""


class Terminal:
    """A conversation in the terminal, with one model or several that answer in turn.

    Args:
        models: that answer.
        sampling: changes to each model's own settings, name -> value.
        system: what the system says first; None: nothing.
        preferences: where preferred answers are kept.

    Attributes:
        sessions: one for each model.
    """

    def __init__(
        self,
        models: list[ChatModel],
        sampling: dict,
        system: str | None,
        preferences: Preferences,
    ):
        self.sessions = []
        for model in models:
            session = Session(model, model.defaults.changed(sampling))
            session.say_first(system)
            self.sessions.append(session)
        self.preferences = preferences
        self.last: tuple[list[dict], dict[str, str]] | None = None  # question and answers
        self.out = results_console()
        self.asks = sys.stdin.isatty()  # else questions come from a file or a pipe

    def run(self) -> None:
        """Ask and answer until the user leaves."""
        if self.asks:
            with contextlib.suppress(ImportError):  # not on Windows
                import readline  # noqa: F401 - input() then has history and editing
            self._introduce()
        while True:
            try:
                line = self._read_line()
            except EOFError:
                if self.asks:
                    print(file=sys.stderr)
                return
            try:
                self._handle(line)
            except Leave:
                return
            except SlimError as error:
                self._complain(error)

    def _introduce(self) -> None:
        for session in self.sessions:
            model = session.model
            facts = [shown_memory(model.weights), model.dtype, f"context {model.context:,}"]
            say(f"({', '.join(facts)}) {model.chain}".rstrip(), head=model.name)
            if not model.chats:
                say("It has no chat template: it continues each text by itself.", dim=True)
        say("/help lists the commands, /quit or Ctrl-D leaves.", dim=True)

    def _complain(self, error: SlimError) -> None:
        """Show a mistake; without anyone at the keyboard it ends the chat."""
        if not self.asks:
            raise error
        say(str(error))

    def _read_line(self) -> str:
        """Return what the user types, lines that end with a backslash joined."""
        lines = []
        while True:
            line = input(PROMPT if self.asks else "")
            if not line.endswith("\\"):
                return "\n".join([*lines, line]).strip()
            lines.append(line[:-1])

    def _handle(self, line: str) -> None:
        """Do what a line asks for."""
        if not line:
            return
        if not line.startswith("/"):
            self.ask(line)
            return
        word, _, rest = line.partition(" ")
        command = self._commands().get(word)
        if command is None:
            hint = did_you_mean(word, self._commands()) or " /help lists the commands."
            raise SlimError(f"There is no command {word}.{hint}")
        command(rest.strip())

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/set": self._set,
            "/system": self._say_first,
            "/reset": self._reset,
            "/undo": self._undo,
            "/again": self._again,
            "/prefer": self._prefer,
            "/help": self._help,
            "/quit": self._quit,
        }

    def ask(self, question: str) -> None:
        """Let every model answer a question, one after the other.

        Args:
            question: what the user says.
        """
        before = self._messages(question)
        answers = {}
        for session in self.sessions:
            text = self._answer(session, question)
            if text is None:  # broken off: the others need not answer either
                break
            answers[session.model.name] = text
        if answers:
            self.last = before, answers

    def _messages(self, question: str) -> list[dict]:
        """Return the conversation up to a question, as the first model knows it."""
        session = self.sessions[0]
        first = []
        if session.system:
            first.append({"role": "system", "content": session.system})
        return [*first, *session.turns, {"role": "user", "content": question}]

    def _answer(self, session: Session, question: str) -> str | None:
        """Show a model's answer while it comes; return it, or None where it was broken off."""
        if len(self.sessions) > 1:
            number = self.sessions.index(session) + 1
            self.out.print(f"{number} {session.model.name}", style="bold", markup=False)
        answer = Answer(prompt_tokens=0)
        wrapper = Wrapper(self.out.width)
        pieces = []
        try:
            for piece in session.ask(question, answer):
                pieces.append(piece)
                self._write(wrapper.add(piece))
            self._write(wrapper.finish() + "\n")
        except KeyboardInterrupt:
            self._write(wrapper.finish() + "\n")
            if not self.asks:
                raise
            say("Interrupted; what is there stays in the conversation.", dim=True)
            return None
        if session.left_out:
            left_out = counted(session.left_out, "message")
            say(f"The oldest {left_out} had no room in the context.", dim=True)
        say(summary(session.model, answer), dim=True)
        return "".join(pieces)

    def _write(self, text: str) -> None:
        if text:
            self.out.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    def _set(self, rest: str) -> None:
        if not rest:
            for name in setting_names():
                values = [str(getattr(session.sampling, name)) for session in self.sessions]
                say(f"{name:20}{'  '.join(values)}")
            return
        name, _, value = rest.partition(" ")
        settings = {name: read_value(name, value.strip())}
        # all or none: a value that is wrong is wrong for each of them
        changed = [session.sampling.changed(settings) for session in self.sessions]
        for session, sampling in zip(self.sessions, changed, strict=True):
            session.sampling = sampling

    def _say_first(self, rest: str) -> None:
        for session in self.sessions:
            session.say_first(rest or None)

    def _reset(self, rest: str) -> None:
        for session in self.sessions:
            session.turns.clear()
        self.last = None

    def _undo(self, rest: str) -> str:
        question = None
        for session in self.sessions:
            question = session.undo() or question
        if question is None:
            raise SlimError("There is no question yet.")
        return question

    def _again(self, rest: str) -> None:
        self.ask(self._undo(rest))

    def _prefer(self, rest: str) -> None:
        if self.last is None:
            raise SlimError("There is no answer yet.")
        messages, answers = self.last
        names = list(answers)
        if not rest.isdecimal() or not 1 <= int(rest) <= len(names):
            raise SlimError(f"/prefer {rest}: must be a number from 1 to {len(names)}.")
        self.preferences.add(messages, answers, names[int(rest) - 1])
        say(f"Kept in {self.preferences.path}.", dim=True)

    def _help(self, rest: str) -> None:
        say(HELP)

    def _quit(self, rest: str) -> None:
        raise Leave


def read_value(name: str, text: str):
    """Return the value of a setting as it was typed: a number, a text to stop at, or None.

    Args:
        name: of the setting.
        text: what was typed.

    Raises:
        SlimError: it is no number where one is needed.
    """
    if name == "stop":
        return (text,) if text else ()
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise SlimError(f"/set {name} {text}: must be a number.") from None


def shown_memory(count: int) -> str:
    """Show bytes so that small models differ: ``4.0 MB``, ``269 MB``, ``1.25 GB``."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    if count >= 1e8:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e6:.1f} MB"


def summary(model: ChatModel, answer: Answer) -> str:
    """Return what an answer took, in one line of up to 80 columns.

    Args:
        model: that answered.
        answer: when it is complete.
    """
    parts = [f"read {counted(answer.prompt_tokens, 'token')} in {answer.reading:.2f} s"]
    parts.append(f"wrote {answer.tokens}")
    if answer.writing_rate:
        parts[-1] += f" at {answer.writing_rate:,.0f} tok/s"
    parts.append(shown_memory(model.weights + answer.cache_bytes))
    if answer.finish_reason == "length":
        parts.append("cut: no more tokens")
    return ", ".join(parts)
