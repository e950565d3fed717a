"""The models of a chat: they answer token by token, as rollouts are sampled, and score as rollouts are scored."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from data.encode import encode_prompts
from data.template import Turns, decode_answer
from ppo.chat_flags import ChatConfig
from ppo.decoding.sampling import EVALUATION, Sampling
from ppo.decoding_check import choose_decoding
from ppo.finished_policies import load_policy, prepare_policies
from ppo.models import PolicyModel
from ppo.rollout import PolicySampler
from ppo.score import GREEDY_TOPP
from ppo.types import PromptBatch
from reward.scoring.ensemble import Encoding, Frozen, score_dialogues
from reward.scoring.load import load_ensemble, reward_readers
from utils.engine.engine import InferenceEngine
from utils.errors import Say, UserError
from utils.models.load import embedding_rows, window_at
from utils.tokenizer import stop_ids


@dataclass
class Answer:
    """An answer. turns, prompt: what its model reads; num_dropped: earlier turns that do not fit; ids: so far.

    When it has ended, or was stopped: text; ended: by itself. seconds: that its model took.
    """

    turns: Turns
    prompt: list[int]
    num_dropped: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    seconds: float = 0.0

    @property
    def dialogue(self) -> Turns:
        """The turns with the answer."""
        return [*self.turns, {"role": "assistant", "content": self.text}]


class ChatModels:
    """One or two policies with one tokenizer, and the reward models."""

    def __init__(self, config: ChatConfig, say: Say):
        self.tokenizer, self.template = prepare_policies(config, config.policies, say)
        for flag, path in config.policies:
            config.fit_window(window_at(path, flag))
        self.config, self.sampling = config, chosen_sampling(config)
        readers = reward_readers(config, self.tokenizer, say)
        policies = [self._load_policy(path, flag, say) for flag, path in config.policies]
        self.samplers = [PolicySampler(InferenceEngine(policy), self.tokenizer, config) for policy in policies]
        rows = embedding_rows(policies[0].lm)
        self.reward = load_ensemble(
            config, readers, self.tokenizer, rows, lambda model: Frozen(model, config.offload_frozen), say
        )

    def _load_policy(self, path: str, flag: str, say: Say) -> PolicyModel:
        policy = load_policy(path, flag, self.config, self.tokenizer, say)
        choose_decoding(policy, self.config, f"{flag} {path}", say)
        return policy

    def begin(self, turns: Turns) -> Answer:
        """Returns an empty answer to a dialogue that ends in a question, encoded and truncated as in training."""
        room = self.config.maxlen_prompt - self.config.maxlen_res
        ((kept, ids),) = encode_prompts(self.tokenizer, [turns], self.template, room)
        if ids is None:
            what = "question with the system turn" if turns[0]["role"] == "system" else "question"
            raise UserError(f"the {what} is longer than --maxlen_prompt - --maxlen_res = {room} tokens; shorten it")
        return Answer(kept, ids, len(turns) - len(kept))

    def grow(self, k: int, answer: Answer, place: int) -> Iterator[str]:
        """Yields the text of model k's answer after each token. place: of the answer's random stream."""
        prompt = PromptBatch([answer.prompt], [answer.turns], [place])

        def tokens() -> Iterator[int]:
            start = time.monotonic()
            for token in self.samplers[k].stream(prompt, self.sampling, self.config.seed):
                answer.ids.append(token)
                answer.seconds += time.monotonic() - start
                yield token
                start = time.monotonic()  # another model may have answered meanwhile

        try:
            yield from growing_texts(self.tokenizer, tokens())
        finally:  # Ctrl-C, too
            answer.ended = not set(answer.ids[-1:]).isdisjoint(stop_ids(self.tokenizer))
            answer.text = decode_answer(self.tokenizer, answer.ids)

    def score(self, turns: Turns) -> tuple[float, list[float]]:
        """Returns (score of a dialogue that ends in an answer, score of each reward model)."""
        scores = []
        for member in self.reward.members:
            encoding = member.encoding or Encoding(self.tokenizer, self.template, member.window)
            with member.model.resident() as model:
                scores += score_dialogues(model, encoding, [turns], self.config.micro_batch_tokens)[0]
        return self.reward.combine(torch.tensor([scores])).item(), scores


def growing_texts(tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of an answer after each token, without a last character that still lacks bytes; last, all of it.

    Each text begins with the one before. The last may not, with a tokenizer that changes the text before a token.
    """
    ids, text = [], ""
    for token in tokens:
        ids.append(token)
        new = decode_answer(tokenizer, ids).rstrip("\ufffd").rstrip()
        text = new if new.startswith(text) else text
        yield text
    yield decode_answer(tokenizer, ids)


def chosen_sampling(config: ChatConfig) -> Sampling:
    """Returns the sampling of evaluations, with what the flags change."""
    names = ("temperature", "topp", "repetition_penalty")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if given.get("temperature") == 0:
        given |= {"temperature": 1.0, "topp": GREEDY_TOPP}
    return replace(EVALUATION, **given)
