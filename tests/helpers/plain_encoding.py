"""The reference of data/encode.py: each text is rendered and encoded by itself with the tokenizer's own methods.

It is what the commands did before batches, one dialogue at a time; slow, and without anything remembered.
"""

from bisect import bisect_left
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from data.chat import turn_end
from utils.tokenizer import MOSS_ZH_TAGS

Turns = list[dict[str, str]]


@dataclass
class Plain:
    """Encodes one dialogue after another."""

    tokenizer: PreTrainedTokenizerBase
    template: str

    def __post_init__(self):
        self.end = turn_end(self.tokenizer, self.template)

    def prompts(self, dialogues: list[Turns], max_tokens: int) -> list:
        def fit(turns: Turns) -> list[int] | None:
            ids = self._prompt(turns)
            return ids if len(ids) <= max_tokens else None

        return [newest(turns, fit, max_tokens) for turns in dialogues]

    def dialogues(self, dialogues: list[Turns], max_tokens: int) -> list:
        return [self._dialogue(turns, max_tokens) for turns in dialogues]

    def answers(self, items: list[tuple[Turns, list[str]]], max_tokens: int) -> list:
        return [self._answers(history, answers, max_tokens) for history, answers in items]

    def _dialogue(self, dialogue: Turns, max_tokens: int) -> tuple:
        def fit(turns: Turns) -> int | None:
            prompt, _, trained = self._answered(turns)
            return len(prompt) + trained if len(prompt) + trained <= max_tokens else None

        turns, length = newest(dialogue, fit, max_tokens)
        if length is None:
            return turns, None, [], []
        prompt, answer, trained = self._answered(turns)
        mask, rewritten = self._earlier(turns[:-1], prompt)
        return turns, (prompt + answer)[:length], (mask + [True] * trained)[:length], rewritten

    def _answers(self, history: Turns, answers: list[str], max_tokens: int) -> tuple:
        def fit(turns: Turns) -> list | None:
            sides = [self._answered([*turns, {"role": "assistant", "content": text}]) for text in answers]
            return sides if max(len(prompt) + len(answer) for prompt, answer, _ in sides) <= max_tokens else None

        return newest(history, fit, max_tokens)

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)

    def _prompt(self, turns: Turns) -> list[int]:
        return self._chat(turns, True) if self.template == "chat" else self._moss(turns)[0]

    def _answered(self, turns: Turns) -> tuple[list[int], list[int], int]:
        prompt = self._prompt(turns[:-1])
        if self.template == "chat":
            answer = self._chat_answer(turns, prompt)
        else:
            answer = [*self._moss_answer(turns[-1]["content"]), *self.end.ids]
        return prompt, answer, len(answer) - len(self.end.ids) + self.end.num_generated

    def _earlier(self, turns: Turns, prompt: list[int]) -> tuple[list[bool], list[int]]:
        """The mask of the answers in a prompt, and the indices of those that the template rewrites."""
        if self.template != "chat":
            return self._moss(turns)[1], []
        mask, rewritten, place = [False] * len(prompt), [], 0
        system, text = turns[: turns[0]["role"] == "system"], "".join(map(chr, prompt))
        for k in (k for k, turn in enumerate(turns) if turn["role"] == "assistant"):
            windowed = len(turns) > 32 and k - 3 > len(system)
            before = system + turns[k - 3 : k] if windowed else turns[:k]
            start = self._chat(before, True)
            own, head = start + self._chat_answer([*before, turns[k]], start), 0
            if windowed:
                head = len(self._chat([*system, turns[k - 3]], True))
                found = text.find("".join(map(chr, own[head:])), place)
            else:
                found = 0 if prompt[: len(own)] == own else -1
            if found < 0:
                rewritten.append(k)
                continue
            place, stop = found - head + len(start), found - head + len(own)
            stop -= len(self.end.ids) - self.end.num_generated
            mask[place:stop] = [True] * (stop - place)
        return mask, rewritten

    def _chat(self, turns: Turns, open_answer: bool) -> list[int]:
        given = getattr(self.tokenizer, "chat_template_kwargs", {})
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_answer, **given)
        return self._encode(text, special=True)

    def _chat_answer(self, turns: Turns, prompt: list[int]) -> list[int]:
        end, text, whole = self.end, turns[-1]["content"], self._chat(turns, False)
        ids = whole[len(prompt) :]
        if end.stop in ids:
            ids = ids[: len(ids) - ids[::-1].index(end.stop) - end.num_generated]
        as_written = self.tokenizer.decode(ids).strip().endswith(text.strip())
        if whole[: len(prompt)] == prompt and as_written and end.stop not in ids:
            return [*ids, *end.ids]
        before = self.tokenizer.decode(prompt).rstrip()
        for tag in (token.content for token in self.tokenizer.added_tokens_decoder.values()):
            if tag and before.endswith(tag) and text.startswith(tag):
                text = text.removeprefix(tag).lstrip()
                break
        return [*self._encode(text), *end.ids]

    def _moss(self, turns: Turns) -> tuple[list[int], list[bool]]:
        """The ids of the turns with the opening of an answer, and the mask of the answers."""
        tokenizer, eos = self.tokenizer, [self.tokenizer.eos_token_id]
        tags = [[tokenizer.convert_tokens_to_ids(tag)] for tag in MOSS_ZH_TAGS]
        ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        mask = [False] * len(ids)
        opening = self._encode("Assistant:") if self.template == "moss_en" else tags[1]
        if turns[0]["role"] == "system":
            first = f"{turns[0]['content']}\n\n{turns[1]['content']}"
            turns = [{"role": "user", "content": first}, *turns[2:]]
        for turn in turns:
            text, answer = turn["content"], []
            if turn["role"] == "assistant":
                piece, answer = opening, self._moss_answer(text) + eos
            elif self.template == "moss_en":
                piece = self._encode(f"Human:{text}") + eos
            else:
                piece = tags[0] + self._encode(text) + eos
            ids = ids + piece + answer
            mask = mask + [False] * len(piece) + [True] * len(answer)
        return ids + opening, mask + [False] * len(opening)

    def _moss_answer(self, text: str) -> list[int]:
        for before in ("Assistant:", "\n", "Assistant") if self.template == "moss_en" else ():
            start, whole = self._encode(before), self._encode(before + text)
            if whole[: len(start)] == start:
                return whole[len(start) :]
        return self._encode(text)


def newest(turns: Turns, encode, max_turns: int) -> tuple:
    """The most of the newest exchanges that `encode` does not give None for, and what it gives; a bisection."""
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    spoken = turns[len(system) :]
    kept = [system + spoken[k:] for k in range(0, max(1, len(spoken)), 2)]
    kept = kept[: max(0, len(spoken) - 1) // 2 + 1]
    low = min(len(kept) - 1, max(0, len(spoken) - max_turns + 1) // 2)
    if encode(kept[low]) is None:
        low = bisect_left(range(len(kept)), True, low + 1, key=lambda k: encode(kept[k]) is not None)
    low = min(low, len(kept) - 1)
    return kept[low], encode(kept[low])
