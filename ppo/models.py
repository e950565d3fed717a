"""The four models: policy and critic under engines, reference and reward model (or several) frozen."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ppo.config import PPOConfig
from ppo.decoding.kv_cache import AUTO_SLOTS
from ppo.decoding.llama_step import new_token_states
from ppo.decoding_check import choose_decoding
from ppo.rollout import DECODING
from reward.scoring.ensemble import Ensemble, Frozen
from reward.scoring.load import check_same_tokenizer, load_ensemble, load_scalar, reward_readers
from utils.distributed import world_size
from utils.engine.engine import DTYPES, InferenceEngine, TrainEngine, device, shard_frozen, splits_frozen
from utils.models.chunked_logprobs import by_chunks, head_logits, logprobs_and_entropy
from utils.models.compile import compile_layers
from utils.models.export import check_names, saved_tensors
from utils.models.load import check_window, enable_checkpointing, load_causal_lm
from utils.models.padding_free import decoder_of, joins_rows, states_of
from utils.models.routers import recorded_router_logits, router_coef, router_sums
from utils.tensors import at_tokens, before, places_of
from utils.tokenizer import template_of

CHUNK_ELEMENTS = 1 << 24  # logits held at once: 32 MB in bf16, whatever batch and vocabulary


class PolicyModel(nn.Module):
    """A causal LM that gives log-probabilities of chosen tokens, or next-token logits while decoding.

    Logits are made at the asked tokens only, in chunks, in the weights' dtype; what is taken from them is float32. With
    several chunks they are made again in the backward pass, so that [tokens, vocabulary] is never held.
    """

    def __init__(self, lm: nn.Module, even_tokens: int = 0, router_coef: float = 0.0):
        """even_tokens: where the head's weights are split over ranks (ZeRO-3) every rank has to call it equally often,

        however many tokens it has; then the most tokens of any forward. 0: as few calls as the tokens need.
        router_coef: weight of the load-balancing loss, which the update adds. 0: none.
        """
        super().__init__()
        self.lm = lm
        self.even_tokens = even_tokens
        self.router_coef = router_coef
        self.decoding = DECODING[0]
        self.slots = AUTO_SLOTS  # slots under --rollout_batch_size auto

    def forward(
        self, sequences=None, token_mask=None, temperature: float = 1.0, with_entropy: bool = True, decode=None,
        routed=None,
    ):  # fmt: skip
        """sequences, token_mask: [batch, length], right-padded -> (logprobs, entropy or None), same shape, float32.

        decode: arguments of `next_logits` instead -> what that returns. routed: bool [batch, length], the tokens that
        router statistics count; then a third result, `router_sums` of them.
        """
        if decode is not None:
            return self.next_logits(**decode)

        def measure(rows, targets, logits):
            return logprobs_and_entropy(logits(rows), targets, temperature, with_entropy)

        config = self.lm.config.get_text_config()
        with recorded_router_logits(self.decoder, routed is not None) as layers:
            rows = states_of(self.decoder, sequences, before(token_mask))
        targets = sequences.flatten()[places_of(token_mask, len(rows))]
        size = max(1, CHUNK_ELEMENTS // config.vocab_size)
        parts = by_chunks(measure, rows, targets, self.logits, size, self.even_tokens)
        logprobs, entropy = zip(*parts, strict=True)
        entropy = at_tokens(torch.cat(entropy), token_mask) if with_entropy else None
        result = at_tokens(torch.cat(logprobs), token_mask), entropy
        return result if routed is None else (*result, router_sums(layers, routed, config.num_experts_per_tok))

    def next_logits(self, straight: bool = False, **decode) -> torch.Tensor:
        """Logits behind the last of the ids: [batch, vocabulary]. decode: arguments of the LM's own forward.

        straight: they are one new token a slot, which may go through the layers alone (ppo/decoding/llama_step.py).
        """
        if not straight:
            # Where config.json asks for router logits, the LM's own loss of them expects a mask without the cache.
            return self.lm(**decode, **self._without_routers).logits[:, -1]
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
        return self.logits(new_token_states(self.decoder, *(decode[name] for name in names)))

    @property
    def decoder(self) -> nn.Module:
        """The LM without its head."""
        return decoder_of(self.lm)

    @property
    def _without_routers(self) -> dict[str, bool]:
        return {"output_router_logits": False} if getattr(self.lm.config, "output_router_logits", False) else {}

    @property
    def joins_rows(self) -> bool:
        """Whether padding is left out, so that any sequences may share a forward."""
        return joins_rows(self.decoder)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """What the LM's own forward does after its decoder. [n, hidden] -> [n, vocabulary]."""
        return head_logits(self.lm.get_output_embeddings(), self.lm.config.get_text_config(), rows)


@dataclass
class Models:
    """What the loop works with. `reward` is None when --reward_fn alone scores, `critic` where no values are needed."""

    policy: TrainEngine | InferenceEngine
    critic: TrainEngine | None
    reference: Frozen
    reward: Ensemble | None

    def engines(self) -> dict[str, TrainEngine]:
        """What learns, by name."""
        return {"policy": self.policy, "critic": self.critic}


def load_models(config: PPOConfig, tokenizer, say: Callable[[str], None] = print) -> Models:
    """Loads each model once, in config.dtype, straight onto its device, and puts it under its engine.

    Host memory holds at most one model's weights a rank at a time (none, with GPUs: files are mapped). Reference and
    policy come from one read, and so do critic and reward model when they are the same. The tokenizers of all are
    compared before the first weights are read.
    """
    critic_path, critic_flag = config.critic_model_path, "--critic_model_path"
    check_same_tokenizer(critic_path, critic_flag, tokenizer, template_of(tokenizer))
    readers = reward_readers(config, tokenizer, say)
    dtype, place = DTYPES[config.dtype], device()
    lm = load_causal_lm(
        config.policy_model_path, dtype, place, config.attn_implementation, tokenizer, say, flag="--policy_model_path"
    )
    check_window(lm, config.maxlen_prompt, "--maxlen_prompt")
    flag = f"--policy_model_path {config.policy_model_path}"
    check_names(AutoModelForCausalLM, lm.config, saved_tensors(lm), flag)
    split = splits_frozen(config.zero_stage, world_size())
    even_tokens = max(config.micro_batch_tokens, config.maxlen_prompt)
    coef = router_coef(lm, config.router_aux_loss_coef, flag, say)
    model = PolicyModel(lm, even_tokens if config.zero_stage == 3 else 0, coef)
    choose_decoding(model, config, flag, say)
    reference = _freeze(PolicyModel(copy.deepcopy(lm), even_tokens if split else 0), config)
    if config.gradient_checkpoint is True:
        enable_checkpointing(lm)
    rows = lm.get_input_embeddings().weight.shape[0]
    policy = TrainEngine(model, config, "policy")

    critic_model = load_scalar(config, critic_path, tokenizer, rows, say, critic_flag)
    freeze = partial(_freeze, config=config)
    reward = load_ensemble(config, readers, tokenizer, rows, freeze, say, critic=(critic_path, critic_model))
    if config.gradient_checkpoint is True:
        enable_checkpointing(critic_model.backbone)
    critic = TrainEngine(critic_model, config, "critic")
    if config.compile:
        judges = [member.model.model for member in reward.members] if reward else []
        # Not split models: their layers gather and release weights within a forward.
        for model in (lm, critic_model, *(() if split else (reference.model, *judges))):
            compile_layers(model)
    return Models(policy, critic, reference, reward)


def _freeze(model: nn.Module, config: PPOConfig) -> Frozen:
    whole = not splits_frozen(config.zero_stage, world_size())  # else the engine moves its shards
    return Frozen(shard_frozen(model, config, config.offload_frozen), config.offload_frozen and whole)
