"""Twenty seeded steps of train_ppo.py against the same run made of plain parts, slow and short enough to be seen right.

Plain: every forward is transformers' own, over one sequence, with logits of all its positions; sampling asks for the
whole sequence again for each token; the reference is always asked; the optimizer's step is DeepSpeed's own.
"""

import pytest
import torch

import ppo.build
import ppo.score
import utils.engine.engine
from ppo.decoding.sampling import uniforms
from ppo.models import PolicyModel
from ppo.rollout import PolicySampler, assemble
from reward.model import ScalarModel
from tests.helpers.tiny_run import read_lines, read_metrics, run_flags
from train_ppo import main

FLAGS = {
    "train_steps": 20, "critic_pretrain_steps": 2, "warmup_steps": 5, "lr": 1e-4, "critic_lr": 3e-4, "num_rollouts": 8,
    "batch_size": 4, "ppo_epochs": 2, "save_per_step": 1000, "num_eval_prompts": 0, "checkpoint_per_step": 0,
    "gradient_clip": 0.5, "use_entropy_loss": True, "entropy_loss_weight": 0.01, "temperature": 0.9,
    "explosion_limit": 1e9,
}  # fmt: skip


def plain_policy(self, sequences=None, token_mask=None, temperature=1.0, with_entropy=True, decode=None):
    """log p(token t | tokens before it) and the entropy there, at the masked tokens."""
    if decode is not None:
        return self.lm(**decode).logits[:, -1]
    every = torch.log_softmax(self.lm(input_ids=sequences, use_cache=False).logits / temperature, -1)[:, :-1]
    logprobs = every.gather(-1, sequences[:, 1:, None]).squeeze(-1)
    entropy = -(every.exp() * every).sum(-1)
    at_tokens = [torch.nn.functional.pad(x, (1, 0)) * token_mask for x in (logprobs, entropy)]
    return at_tokens[0], at_tokens[1] if with_entropy else None


def plain_scalars(self, input_ids, attention_mask):
    """The head's number at every position."""
    hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
    return (self.head(hidden).squeeze(-1) - self.score_center) * attention_mask


class PlainSampler(PolicySampler):
    """Token by token, the whole sequence each time."""

    @torch.no_grad()
    def __call__(self, prompts, sampling, seed):
        policy, tokenizer, responses = self.policy.module.eval(), self.tokenizer, []
        for ids, place in zip(prompts.ids, prompts.places, strict=True):
            response = []
            while len(response) < self.config.maxlen_res and response[-1:] != [tokenizer.eos_token_id]:
                logits = policy.lm(input_ids=torch.tensor([ids + response])).logits[0, -1]
                ends = torch.softmax(logits.double() / sampling.temperature, -1).cumsum(0)
                uniform = uniforms(seed, torch.tensor([place]), len(response))
                response.append(int(torch.searchsorted(ends, uniform * ends[-1], right=True)))
            responses.append(torch.tensor(response))
        return assemble(prompts.ids, responses, tokenizer.eos_token_id, tokenizer.pad_token_id)


def plain_step(optimizer) -> None:
    """DeepSpeed's own, whose norm says enough."""
    optimizer.check_overflow = lambda **_: None


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Metrics of (the fast run, the plain one), and what both sampled."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for name in ("fast", "plain"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "plain":
                patch.setattr(PolicyModel, "forward", plain_policy)
                patch.setattr(ScalarModel, "forward", plain_scalars)
                patch.setattr(ppo.build, "PolicySampler", PlainSampler)
                patch.setattr(ppo.score, "same_weights", lambda *_: False)
                patch.setattr(utils.engine.engine, "use_chunked_step", plain_step)
            tokens = {"fast": 200, "plain": 1}[name]
            flags = FLAGS | {"zero_stage": 2, "num_samples": 8, "micro_batch_tokens": tokens}
            main(run_flags(inputs, folder / name, **flags))
        answers = [row["answer"] for row in read_lines(folder / name / "samples.jsonl")]
        found.append((read_metrics(folder / name), answers))
    return found


def test_both_sample_the_same(runs):
    (_, fast), (_, plain) = runs
    assert fast == plain and len(set(fast)) > 30


def test_metrics_are_the_same(runs):
    """float32: losses to 1e-6 (advantages have deviation 1, values are about 1), the rest to 1e-5 of its size.

    Explained variances of quarters to 3e-5: their returns lie so near to each other that differences cancel.
    """
    (fast, _), (plain, _) = runs
    assert len(fast) == len(plain) == 22
    for name in fast[-1]:
        rows = [(a[name], b[name]) for a, b in zip(fast, plain, strict=True) if name in a]
        worst, size = max(abs(a - b) for a, b in rows), max(abs(a) for a, _ in rows)
        share = 3e-5 if name.startswith("explained_variance_") else 1e-5
        bound = 1e-6 if name.endswith("_loss") else share * max(1.0, size)
        assert worst <= bound, f"{name}: {worst:.2g} apart at a size of {size:.2g}"
