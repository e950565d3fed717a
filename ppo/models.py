"""The models of a run: policy and critic in training engines, reference and reward models frozen."""

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
from ppo.shared_base import SharedBases
from reward.model import ScalarModel, head_weight, scalar_model, train_scalar_adapter
from reward.scoring.ensemble import Ensemble, Frozen
from reward.scoring.load import Reader, check_same_tokenizer, load_ensemble, load_scalar, reward_readers
from utils.engine.engine import DTYPES, InferenceEngine, TrainEngine, device
from utils.engine.memory import fits_whole
from utils.engine.split import shard_frozen, splitter
from utils.errors import Say
from utils.models.adapters import Adapted, train_adapter
from utils.models.chunked_logprobs import by_chunks, head_logits, logprobs_and_entropy
from utils.models.compile import compile_layers
from utils.models.export import check_names, saved_tensors
from utils.models.load import check_window, embedding_rows, enable_checkpointing, load_causal_lm
from utils.models.padding_free import decoder_of, joins_rows, states_of
from utils.models.routers import recorded_router_logits, router_coef, router_sums
from utils.models.split import Split, gathered, model_copy
from utils.tensors import at_tokens, before, places_of
from utils.tokenizer import template_of

CHUNK_ELEMENTS = 1 << 24  # logits held at once: 32 MB in bf16, for any batch and vocabulary


class PolicyModel(Adapted):
    """A causal LM that computes log-probabilities of given tokens in chunks, or next-token logits while decoding."""

    def __init__(self, lm: nn.Module, even_tokens: int = 0, router_coef: float = 0.0):
        """even_tokens: as in `sum_nll`. router_coef: weight of the load-balancing loss in the update; 0: none."""
        super().__init__()
        self.lm = lm
        self.even_tokens = even_tokens
        self.router_coef = router_coef
        self.decoding = DECODING[0]
        self.slots = AUTO_SLOTS  # for --rollout_batch_size auto

    def forward(
        self, sequences=None, token_mask=None, temperature: float = 1.0, with_entropy: bool = True, decode=None,
        routed=None,
    ):  # fmt: skip
        """Returns (logprobs, entropy or None) at token_mask, float32. All [batch, length], right-padded.

        decode: call `next_logits` with these arguments instead. routed: bool [batch, length], the tokens that router
        statistics count; adds a third result, their `router_sums`.
        """
        self.activate()
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

    def next_logits(self, llama_step: bool = False, **decode) -> torch.Tensor:
        """Logits after the last of the ids, [batch, vocabulary]. llama_step: by ppo/decoding/llama_step.py."""
        if not llama_step:
            # With router logits on, the LM's own forward would compute their loss and expect a mask without the cache.
            routers = getattr(self.lm.config, "output_router_logits", False)
            return self.lm(**decode, **({"output_router_logits": False} if routers else {})).logits[:, -1]
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
        return self.logits(new_token_states(self.decoder, *(decode[name] for name in names)))

    @property
    def decoder(self) -> nn.Module:
        """The LM without its head."""
        return decoder_of(self.lm)

    @property
    def joins_rows(self) -> bool:
        """Whether forwards leave the padding out, so that rows of any lengths share a forward."""
        return joins_rows(self.decoder)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Applies the LM's head as its own forward does. [n, hidden] -> [n, vocabulary]."""
        return head_logits(self.lm.get_output_embeddings(), self.lm.config.get_text_config(), rows)


@dataclass
class Models:
    """The models of a run. `critic` is None without one, `reward` None where only --reward_fn scores."""

    policy: TrainEngine | InferenceEngine
    critic: TrainEngine | None
    reference: Frozen
    reward: Ensemble | None

    def engines(self) -> dict[str, TrainEngine]:
        """The engines that train, by name: policy, and critic if there is one."""
        engines = {"policy": self.policy, "critic": self.critic}
        return {name: engine for name, engine in engines.items() if engine is not None}


def load_models(config: PPOConfig, tokenizer, say: Say = print) -> Models:
    """Loads each model once, in config.dtype, onto its device, and creates its engine.

    Policy and reference come from one read, as do critic and reward model if they are the same. An estimator without a
    critic loads none. Where weights are split over ranks, no rank holds a whole model. With --lora_rank all models with
    the same weights share them. Tokenizers are compared before any weights are read.
    """
    critic_path, critic_flag = config.critic_model_path, "--critic_model_path"
    if config.has_critic:
        check_same_tokenizer(critic_path, critic_flag, tokenizer, template_of(tokenizer))
    readers = reward_readers(config, tokenizer, say)
    dtype = DTYPES[config.dtype]
    split, split_frozen = splitter(config, dtype), splitter(config, dtype, frozen=True, offload=config.offload_frozen)
    bases = _bases(config, readers) if config.lora_rank else None
    model = _load_policy(config, tokenizer, say, split, bases)
    rows = embedding_rows(model.lm)
    freeze = partial(_freeze, config=config, split=bool(split_frozen), bases=bases)
    if bases:
        reference = Frozen(PolicyModel(model.lm), offload=False)  # the policy's frozen weights
        reference.model.share(model.decoder, *model.adapters)
    else:
        even_tokens = max(config.micro_batch_tokens, config.maxlen_prompt) if split_frozen else 0
        reference = freeze(PolicyModel(model_copy(model.lm, split_frozen), even_tokens))
    scalar = partial(_load_scalar, config, tokenizer=tokenizer, rows=rows, say=say, bases=bases)
    critic_model = scalar(critic_path, critic_flag, split=split, frozen=False) if config.has_critic else None
    held = (critic_path, critic_model) if critic_model and not bases else None
    load = partial(scalar, flag=config.reward_flag, split=split_frozen)
    reward = load_ensemble(config, readers, tokenizer, rows, freeze, say, held, split_frozen, load)
    frozen = [reference.model, *(member.model.model for member in (reward.members if reward else []))]
    if config.lora_rank:
        _add_adapters(model, critic_model, frozen, config)
    trained = {"policy": model} | ({"critic": critic_model} if critic_model else {})
    engines = {name: _train(part, config, name) for name, part in trained.items()}
    if config.compile:
        # Not models that are split over ranks: their layers gather and release weights within a forward.
        for part in (*trained.values(), *(() if split_frozen else frozen)):
            compile_layers(part)
    return Models(engines["policy"], engines.get("critic"), reference, reward)


def _train(model: PolicyModel | ScalarModel, config: PPOConfig, name: str) -> TrainEngine:
    if config.gradient_checkpoint is True:
        enable_checkpointing(model.lm if name == "policy" else model.backbone)
    return TrainEngine(model, config, name)


def _add_adapters(policy: PolicyModel, critic: ScalarModel | None, frozen: list[Adapted], config: PPOConfig) -> None:
    """Adds the adapters that are trained, after all others were read."""
    train_adapter(policy, policy.decoder, "policy", config)
    if critic:
        train_scalar_adapter(critic, "critic", config, config.critic_lora_rank)
    for model in (policy, *([critic] if critic else []), *frozen):
        model.share(model.decoder, *model.adapters)  # also layers that only other models have adapters in


def _bases(config: PPOConfig, readers: list[Reader]) -> SharedBases:
    """Returns the bases of a run with adapters; under --share_base never each model has its own."""
    models = [("--policy_model_path", config.policy_model_path)]
    models += [("--critic_model_path", config.critic_model_path)] if config.has_critic else []
    models += [(config.reward_flag, reader.path) for reader in readers if not reader.own]
    return SharedBases(models, share=config.share_base == "auto")


def _load_policy(
    config: PPOConfig, tokenizer, say: Say, split: Split | None, bases: SharedBases | None
) -> PolicyModel:  # fmt: skip
    path = config.policy_model_path
    lm = load_causal_lm(
        path, DTYPES[config.dtype], device(), config.attn_implementation, tokenizer, say, "--policy_model_path", split,
        merge=not bases,
    )  # fmt: skip
    check_window(lm, config.maxlen_prompt, "--maxlen_prompt")
    flag = f"--policy_model_path {path}"
    check_names(AutoModelForCausalLM, lm.config, saved_tensors(lm), flag)
    even_tokens = max(config.micro_batch_tokens, config.maxlen_prompt)
    coef = router_coef(lm, config.router_aux_loss_coef, flag, say)
    model = PolicyModel(lm, even_tokens if split else 0, coef)
    wanted = config.gather_for_generation
    layered = bool(split) and (wanted == "never" or (wanted == "auto" and not fits_whole(lm)))
    if config.rollout_engine != "vllm":
        with gathered(lm, by_layer=layered):
            choose_decoding(model, config, flag, say, layered)
    if bases:
        bases.hold(model, path, "--policy_model_path")
    return model


def _load_scalar(
    config: PPOConfig, path: str, flag: str, tokenizer, rows: int, say: Say, bases: SharedBases | None,
    split: Split | None, frozen: bool = True,
) -> ScalarModel:  # fmt: skip
    """Returns a critic, or a frozen reward model, with the policy's tokenizer, on a shared base if it has one."""
    if not bases or (frozen and not bases.shares(path)):
        return load_scalar(config, path, tokenizer, rows, say, flag, split)
    decoder = bases.held(path)
    if decoder is None:
        model = load_scalar(config, path, tokenizer, rows, say, flag, merge=False)
    else:
        weight = head_weight(path, flag, path in config.reward_paths)
        model = scalar_model(decoder, weight, None, path, flag, DTYPES[config.dtype], device(), config.seed, say)
    bases.hold(model, path, flag)
    model.head.requires_grad_(False)
    return model


def _freeze(model: nn.Module, config: PPOConfig, split: bool, bases: SharedBases | None) -> Frozen:
    if bases and bases.is_shared(model.decoder):  # others use its weights meanwhile
        return Frozen(model.eval(), offload=False)
    # The engine moves the parts of a model that is split.
    return Frozen(shard_frozen(model, config, config.offload_frozen), config.offload_frozen and not split)
