"""A talk with a model: reads messages and commands, answers, and says what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paceline.cli.conversation import saved
from paceline.cli.conversation.commands import (
    SETTINGS,
    Command,
    help_text,
    parse_line,
    parse_settings,
)
from paceline.cli.conversation.screen import screen_for
from paceline.cli.conversation.transcript import Transcript
from paceline.cli.decode_options import summary
from paceline.cli.output import ReaderGoneError, say
from paceline.errors import PacelineError, RequestError

if TYPE_CHECKING:
    from paceline.cli.conversation.reader import Reader
    from paceline.core import Output, Request
    from paceline.lm import LM, RequestOptions


@dataclass(frozen=True)
class Answer:
    """An answer and what it was the answer to."""

    said: str
    request: Request
    output: Output


@dataclass
class Talk:
    """A talk.

    Attributes:
        lm: the model.
        transcript: what was said.
        requested: options of every request.
        reader: where messages come from.
        markdown: whether answers are rendered on a terminal.
        quiet: answers are not printed.
        answers: those that stand, the oldest first.
        asked: how many answers were begun; each has a seed of its own.
    """

    lm: LM
    transcript: Transcript
    requested: RequestOptions
    reader: Reader
    markdown: bool = True
    quiet: bool = False
    answers: list[Answer] = field(default_factory=list)
    asked: int = 0
    _changed: dict[str, Any] = field(default_factory=dict)
    _tokens: list[int] = field(default_factory=lambda: [0, 0])  # written, and passes for them
    _seconds: float = 0.0

    def check(self) -> None:
        """Refuse what no request of this talk could have.

        Raises:
            PacelineError: an option, the template or the system prompt cannot be.
        """
        self._try(self.transcript.system, self._changed)

    def run(self) -> None:
        """Read and answer until the input or the user ends the talk.

        Raises:
            PacelineError: a message cannot be answered, and nobody is there to send another.
        """
        while True:
            try:
                line = self.reader.read()
                if line is None or (line.strip() and not self.take(line)):
                    return
            except KeyboardInterrupt:
                if not self.reader.interactive:
                    raise
                say("(Ctrl-D or /exit ends the talk)")
            except RequestError as error:
                if not self.reader.interactive:
                    raise
                say(str(error))

    def take(self, line: str) -> bool:
        """Answer a message or obey a command; return False at the end of the talk.

        Raises:
            RequestError: there is no such command, or it or the message cannot be.
        """
        try:
            found = parse_line(line)
        except RequestError as error:
            say(str(error))
            return True
        if isinstance(found, str):
            self.answer(found)
            return True
        if found.name == "exit":
            return False
        try:
            self._obey(found)
        except ReaderGoneError:
            raise
        except PacelineError as error:
            say(str(error))
        return True

    def answer(self, said: str) -> bool:
        """Answer a message and keep both; return False if nothing came before Ctrl-C.

        Raises:
            RequestError: it cannot be answered; the talk is as before.
        """
        options: RequestOptions = {**self.requested, **self._changed}  # type: ignore[typeddict-item]
        options["seed"] = (options.get("seed") or 0) + self.asked
        room = options.get("max_new_tokens") or 256
        prompt, dropped = self.transcript.fit(self.lm, said, room)
        if dropped == 1:
            say("the oldest turn was dropped to fit the context")
        elif dropped:
            say(f"the {dropped} oldest turns were dropped to fit the context")
        request = self.lm.request(prompt, **options)
        self.asked += 1
        output = self._shown(request)
        say(self._dim(summary(output)))
        if output.finish == "interrupted" and not output.text.strip():
            return False
        if not output.text.strip():
            say("the model ended its answer at once; /retry asks again, with another seed")
        self.transcript.turns.append((said, output.text.strip()))
        self.answers.append(Answer(said, request, output))
        self._tokens[0] += len(output.tokens)
        self._tokens[1] += output.passes
        self._seconds += output.seconds.decode
        return True

    def _shown(self, request: Request) -> Output:
        """Decode, showing the text as it comes; Ctrl-C ends the answer, not the talk."""
        generation = self.lm.stream(request)
        screen = screen_for(self.markdown)
        try:
            for piece in generation:
                if not self.quiet:
                    screen.add(piece)
        except KeyboardInterrupt:
            generation.output.finish = "interrupted"
        if not self.quiet:
            screen.finish()
        return generation.output

    def _dim(self, line: str) -> str:
        from paceline.cli.conversation.screen import dim

        return dim(line) if self.reader.interactive else line

    def _obey(self, command: Command) -> None:
        getattr(self, f"_{command.name}")(command.argument)

    def _help(self, argument: str) -> None:
        say(help_text())

    def _system(self, argument: str) -> None:
        if argument:
            system = None if argument.lower() == "off" else argument
            self._try(system, self._changed)
            self.transcript.system = system
        shown = self.transcript.system
        say(f"system prompt: {shown}" if shown else "there is no system prompt")

    def _settings(self, argument: str) -> None:
        if argument:
            changed = {**self._changed, **parse_settings(argument)}
            changed = {name: value for name, value in changed.items() if value is not None}
            self._try(self.transcript.system, changed)
            self._changed = changed
        options: dict[str, Any] = {**self.requested, **self._changed}
        values = {name: options.get(name) for name in SETTINGS}
        defaults = {"temperature": self._trial(self.transcript.system, self._changed).temperature}
        shown = [
            f"{name}={defaults.get(name, 'default') if value is None else value}"
            for name, value in values.items()
        ]
        say(" ".join(shown))

    def _clear(self, argument: str) -> None:
        self.transcript.turns.clear()
        self.answers.clear()
        say("the talk begins anew")

    def _retry(self, argument: str) -> None:
        if not self.transcript.turns:
            raise RequestError("there is nothing to answer again")
        last = self.transcript.turns.pop()
        kept = self.answers.pop() if self.answers else None
        answered = False
        try:
            answered = self.answer(last[0])
        finally:
            if not answered:
                self.transcript.turns.append(last)
                self.answers += [kept] if kept is not None else []
        if answered and self.answers[-1].request.temperature == 0:
            say("at temperature 0 the answer is always the same; try /settings temperature=0.7")

    def _save(self, argument: str) -> None:
        path = saved.path_of(argument)
        saved.save_talk(path, self.transcript, self.lm.model.name)
        say(f"saved {_turns(self.transcript)} to {path}")

    def _load(self, argument: str) -> None:
        path = saved.path_of(argument)
        found, model = saved.read_talk(path)
        self._try(found.system, self._changed)
        self.transcript.system, self.transcript.turns = found.system, found.turns
        self.answers.clear()
        own = self.lm.model.name
        other = f", held with {model[:80]!r} and continued with {own}" if model != own else ""
        say(f"loaded {_turns(found)} from {path}{other}")

    def _stats(self, argument: str) -> None:
        tokens, passes = self._tokens
        speed = tokens / self._seconds if self._seconds else 0.0
        per_pass = tokens / passes if passes else 0.0
        size, context = 0, self.lm.engine.config.context
        if self.transcript.turns or self.transcript.system:
            size = len(self.lm.request(self.transcript.prompt("")).prompt)
        say(
            f"{_turns(self.transcript)}, about {size} of {context} tokens of the context; "
            f"{tokens} tokens written, {speed:.1f} tokens/s, {per_pass:.2f} tokens per pass"
        )

    def _try(self, system: str | None, changed: dict[str, Any]) -> None:
        """Refuse a system prompt or settings that cannot be.

        Raises:
            PacelineError: what is wrong.
        """
        self.lm.stream(self._trial(system, changed))

    def _trial(self, system: str | None, changed: dict[str, Any]) -> Request:
        options: RequestOptions = {**self.requested, **changed}  # type: ignore[typeddict-item]
        prompt = Transcript(self.transcript.pattern, system).prompt("Hello")
        return self.lm.request(prompt, **options)


def _turns(transcript: Transcript) -> str:
    count = len(transcript.turns)
    return f"{count} turn{'' if count == 1 else 's'}"
