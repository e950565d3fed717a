"""A chat: the dialogues of its models, questions and commands."""

import contextlib
import os

from data.formats.json_lines import json_line
from ppo.chat_models import Answer, ChatModels
from ppo.chat_screen import Screen
from utils.errors import UserError
from utils.files import atomic_file

HELP = """/reset        start a new dialogue
/system TEXT  start a new dialogue with this system turn; without TEXT, without one
/retry        answer the last question again, with other random numbers
/undo         take back the last question
/save FILE    write all dialogues so far as JSON lines, which the trainers read
/help         show this
/quit         end, as Ctrl-D does
Ctrl-C stops an answer. A question that begins with / is sent with a space before it."""


class Session:
    """The state of a chat. dialogues: of each model, without system turn; records: of dialogues that are over."""

    def __init__(self, models: ChatModels, screen: Screen):
        self.models, self.screen = models, screen
        self.paths = [path for _, path in models.config.policies]
        self.system = models.config.system.strip()
        self.records: list[dict] = []
        self.saved: set[str] = set()
        self.num_questions = 0
        self.is_over = False
        self._start()
        if screen.is_terminal:
            screen.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")

    def handle(self, where: str, line: str) -> None:
        """Answers a question, or obeys a command. Errors are shown in a terminal, and raised with `where` in a pipe."""
        try:
            if line.startswith("/"):
                self._obey(line)
            elif line.strip():
                self._ask(line.strip())
        except UserError as error:
            if not self.screen.is_terminal:
                raise UserError(f"{where}{error}") from error
            self.screen.note(f"error: {error}")
        except KeyboardInterrupt:  # while it encodes or scores
            if not self.screen.is_terminal:
                raise
            self.screen.note("stopped")

    def _start(self) -> None:
        self.dialogues: list[list[dict]] = [[] for _ in self.paths]
        self.questions: list[tuple[str, list[int]]] = []  # with the number of turns of each dialogue before it

    def _obey(self, line: str) -> None:
        name, rest = [*line[1:].split(None, 1), "", ""][:2]
        command = {
            "reset": self._reset, "system": self._set_system, "retry": self._retry, "undo": self._undo,
            "save": self._save, "help": lambda _: self.screen.note(HELP), "quit": self._quit,
        }.get(name)  # fmt: skip
        if command is None:
            raise UserError(f"there is no command /{name}; /help lists them, and a space before / sends a question")
        command(rest.strip())

    def _reset(self, _: str) -> None:
        self.records += self._records()
        self._start()
        self.screen.note("a new dialogue")

    def _set_system(self, text: str) -> None:
        self._reset(text)
        self.system = text

    def _retry(self, _: str) -> None:
        self._ask(self._take_back())

    def _undo(self, _: str) -> None:
        self.screen.note(f"taken back: {self._take_back()}")

    def _take_back(self) -> str:
        if not self.questions:
            raise UserError("there is no question before this in the dialogue")
        question, lengths = self.questions.pop()
        self.dialogues = [turns[:length] for turns, length in zip(self.dialogues, lengths, strict=True)]
        return question

    def _quit(self, _: str) -> None:
        self.is_over = True

    def _save(self, name: str) -> None:
        records = self.records + self._records()
        path = os.path.abspath(os.path.expanduser(name))
        if not name or not records:
            raise UserError("/save needs the name of a file" if records else "/save: there is no answer yet")
        if os.path.exists(path) and path not in self.saved:
            raise UserError(f"/save: {name} exists; choose another name")
        with atomic_file(path, "/save") as file:
            file.writelines(map(json_line, records))
        self.saved.add(path)
        self.screen.note(f"written: {name} ({len(records)} dialogue{'s' * (len(records) > 1)})")

    def _records(self) -> list[dict]:
        """Returns the dialogues as records, in the form `messages` of data/formats/dialogue_forms.py."""
        pairs = zip(self.paths, self.dialogues, strict=True)
        return [{"messages": self._with_system(turns), "model": path} for path, turns in pairs if turns]

    def _with_system(self, turns: list[dict]) -> list[dict]:
        return [{"role": "system", "content": self.system}] * bool(self.system) + turns

    def _ask(self, question: str) -> None:
        """Shows the answers of all models and adds them to their dialogues."""
        turn, terminal = {"role": "user", "content": question}, self.screen.is_terminal
        answers = [self.models.begin([*self._with_system(turns), turn]) for turns in self.dialogues]
        self.questions.append((question, list(map(len, self.dialogues))))
        if self.num_questions and not terminal:
            self.screen.line("")
        place, self.num_questions = self.num_questions, self.num_questions + 1
        together = len(answers) > 1 and self.screen.has_columns
        for group in [[*enumerate(answers)]] if together else [[pair] for pair in enumerate(answers)]:
            stopped = self._show(group, len(answers) > 1, place)
            for k, answer in group:
                if answer.text:  # records have no empty turns
                    self.dialogues[k] += [turn, answer.dialogue[-1]]
            self.screen.rows([" · ".join(self._remarks(answer, stopped)) for _, answer in group])
            if stopped:
                return

    def _show(self, group: list[tuple[int, Answer]], labelled: bool, place: int) -> bool:
        """Shows answers while they grow. Returns whether Ctrl-C in a terminal stopped them; what is there is kept."""
        labels = [self.paths[k] for k, _ in group]
        with contextlib.ExitStack() as stack:
            texts = [self.models.grow(k, answer, place) for k, answer in group]
            for growing in texts:
                stack.enter_context(contextlib.closing(growing))
            try:
                if len(group) > 1:
                    self.screen.two(labels, texts)
                    return False
                if labelled:
                    self.screen.line(f"{labels[0]}:", bold=True)
                self.screen.one(texts[0])
            except KeyboardInterrupt:
                if not self.screen.is_terminal:
                    raise
                self.screen.line("")
                return True
        self.screen.line("")
        return False

    def _remarks(self, answer: Answer, stopped: bool) -> list[str]:
        """Returns what is said below an answer; in a pipe, only the score is on standard output."""
        found = []
        if self.models.reward and answer.ids:
            score, scores = self.models.score(answer.dialogue)
            several = f" ({', '.join(f'{x:.3f}' for x in scores)})" if len(scores) > 1 else ""
            found.append(f"score {score:.3f}{several}")
        count = len(answer.ids)
        speed = f", {count / answer.seconds:.1f}/s" if count else ""
        others = [f"{count} token{'s' * (count != 1)}{speed}"] * self.screen.is_terminal
        if stopped:
            others.append("stopped")
        elif not answer.ended:
            others.append(f"cut at --maxlen_res {self.models.config.maxlen_res}")
        if answer.num_dropped:
            others.append(f"without the oldest {answer.num_dropped} turns, which no longer fit")
        if not answer.text:
            others.append("an empty answer, which the dialogue does not keep")
        if self.screen.is_terminal:
            return found + others
        for text in others:
            self.screen.note(text)
        return found
