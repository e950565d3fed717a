"""Parts of a PPO run in memory: flags, hand-made rollouts and scores, a tiny policy behind a light engine."""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from ppo.config import PPOConfig
from ppo.experience import make_experience
from ppo.models import Models, PolicyModel
from ppo.rollout import assemble
from ppo.score import score
from ppo.types import Experience, PromptBatch, Rollout, Scores
from reward.model import ScalarHead, ScalarModel, new_head_weight
from reward.scoring.ensemble import Ensemble, Frozen, Member
from tests.helpers.tiny import tiny_llama
from utils.engine.engine import InferenceEngine
from utils.moments import RunningMoments

EOS, PAD = 2, 0
VOCAB_SIZE = 24

PROMPTS = [[1, 7, 8], [1, 9], [1, 3, 4, 5, 6, 7, 8, 9], [1, 0, 2, 0, 5]]
RESPONSES = [[5, 6, EOS], [EOS], [], [9, 9, 9, 9, 9, 9, 9, 9]]  # the last one was cut off


def ppo_config(**changes) -> PPOConfig:
    """Flags of a small float32 run; the checks of a real command line included."""
    sizes = {"num_rollouts": 4, "batch_size": 4, "rollout_batch_size": 4, "maxlen_prompt": 32, "maxlen_res": 8}
    paths = {"policy_model_path": "P", "critic_model_path": "C", "data_path": "D"}
    return PPOConfig(**paths | sizes | {"dtype": "fp32", "zero_stage": 0, "warmup_steps": 1} | changes)


def token_ids(eos: int = EOS, pad: int = PAD) -> SimpleNamespace:
    """What sampling and scoring ask of a tokenizer."""
    return SimpleNamespace(eos_token_id=eos, pad_token_id=pad, chat_template=None)


def rollout_of(mask: list[list[int]], ended: list[bool] | None = None) -> Rollout:
    """A rollout with this response mask; the sequences do not matter. Everything before the response is prompt."""
    response_mask = torch.tensor(mask).bool()
    attention_mask = response_mask.flip(1).cumsum(1).flip(1) > 0
    sequences = torch.full(response_mask.shape, 5)
    return Rollout(sequences, attention_mask, response_mask, torch.tensor(ended or [True] * len(mask)))


def scores_of(rollout: Rollout, scores: list[float], logprobs=-1.0, ref_logprobs=-1.0, values=0.0) -> Scores:
    """Scores with these numbers at every response token (numbers or [batch, length] lists), 0 elsewhere."""
    mask = rollout.response_mask
    columns = (torch.where(mask, torch.as_tensor(x).float(), 0.0) for x in (logprobs, ref_logprobs, 2.0, values))
    scores = torch.tensor(scores)
    return Scores(*columns, scores, member_scores=scores[:, None], truncated=scores.new_zeros(len(scores), 0).bool())


class GradientEngine(InferenceEngine):
    """A model whose gradients are kept for the test to read; a step is plain gradient descent."""

    explosion_limit = 1e9

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float, provided: Callable[[], bool] = lambda: True) -> float:
        norm = float(sum(p.grad.square().sum() for p in self.module.parameters() if p.grad is not None) ** 0.5)
        assert provided()
        with torch.no_grad():
            for p in self.module.parameters():
                if p.grad is not None:
                    p -= lr * p.grad
        self.module.zero_grad()
        return norm

    def drop_gradients(self) -> None:
        self.module.zero_grad()

    def bad_gradient(self) -> bool:
        return False  # a step of this engine that is not finite has no test

    def gradients(self) -> torch.Tensor:
        """All gradients in one vector; taken, so that the next backward starts from 0."""
        flat = torch.cat([p.grad.flatten() for p in self.module.parameters() if p.grad is not None])
        self.module.zero_grad()
        return flat


def tiny_policy(vocab: int = VOCAB_SIZE, seed: int = 0, **changes) -> PolicyModel:
    """A random LLaMA with a spread-out next-token distribution, so that no token is out of reach."""
    return PolicyModel(tiny_llama(vocab, seed, hidden_size=32, intermediate_size=48, **changes))


def tiny_scalar_model(vocab: int = VOCAB_SIZE, seed: int = 1) -> ScalarModel:
    """A random critic or reward model."""
    backbone = tiny_llama(vocab, seed, hidden_size=32, intermediate_size=48).model
    head = ScalarHead(32, 1, bias=False)
    head.weight.data.copy_(new_head_weight(32, seed))
    return ScalarModel(backbone, head).eval()


def tiny_models() -> Models:
    """All four; reference and policy differ."""
    reference, reward = (
        Frozen(model.requires_grad_(False), offload=False) for model in (tiny_policy(seed=5), tiny_scalar_model())
    )
    critic = GradientEngine(tiny_scalar_model(seed=2))
    return Models(GradientEngine(tiny_policy()), critic, reference, Ensemble([Member(reward, window=None)]))


def prompts_of(*ids: list[int], first_place: int = 0) -> PromptBatch:
    """Prompts without texts, in consecutive places of the run."""
    return PromptBatch(list(ids), [[] for _ in ids], list(range(first_place, first_place + len(ids))))


def rollout_by_hand(eos: int = EOS, pad: int = PAD) -> Rollout:
    responses = [torch.tensor(ids, dtype=torch.int64) for ids in RESPONSES]
    return assemble(PROMPTS, responses, eos, pad)


def scored(rollout: Rollout, models: Models, **flags) -> tuple[Experience, PPOConfig]:
    """(experience, flags) of a rollout scored by these models."""
    config = ppo_config(**flags)
    prompts = prompts_of(*PROMPTS)
    scores = score(rollout, prompts, models, None, token_ids(), config.temperature, config)
    return make_experience(rollout, scores, RunningMoments(), config), config
