"""Tiny configs of every family in transformers' mapping of causal LMs.

A config keeps its family's defaults; sizes are replaced by the names of their attributes (`SIZES`), and per-layer lists
are cut to the fewest layers that show every kind. `EXCEPTIONS` holds what the rules do not give a buildable model for.
"""

import dataclasses
import re
from collections.abc import Iterator

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.helpers.tiny import VOCAB

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# What people use most, one of each kind.
SHORT = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3", "gpt_oss",
    "deepseek_v3", "gpt2",
)  # fmt: skip
WINDOW = 6  # tokens; the sequences of the checks are longer
HIDDEN = 64
MOST_LAYERS = 6

# What a size becomes, by the first pattern that its whole name matches. Doge's keep_window_size stays: which of two
# equal tokens its top-k keeps is left open, and so is its own forward.
SIZES = [
    (r"(decoder_)?vocab_size(_per_layer_input)?", VOCAB),
    (r".*_vocab_size|.*_hash_byte_group_vocab", 16),
    (r"hidden_size(_global)?|d_model|n_embd|emb_dim|embedding_(dim|size)|word_embed_proj_dim|lru_width", HIDDEN),
    (r"hidden_size_per_layer_input|laurel_rank|.*_rank|.*lowrank", 16),
    (r"num_attention_heads|n_heads?|num_heads|attention_heads|.*coder_attention_heads|swa_num_attention_heads", 4),
    (r"num_(global_)?key_value_heads|num_kv_heads|swa_num_key_value_heads|num_query_groups", 2),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", 8),
    (r"(.*_)?head_dim|dim_head|kv_channels|d_head|attention_head_size|query_pre_attn_scalar", HIDDEN // 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group|.*shared_experts", 1),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|zero_expert_num", 4),
    (r"(moe|shared_expert|shared|dense|expert)_.*(intermediate|ffn_hidden)_size|shared_intermediate_size", 48),
    (r".*intermediate_size(_mlp)?|(.*_)?ffn_dim|ffn_hidden_size|dim_ff|dff|d_inner|feed_forward_size", 96),
    (r"sliding_window(_size)?|window_size|attention_window_size|local_attention", WINDOW),
    (r"attention_chunk_size", 8),
    (r"linear_num_key_heads|linear_num_value_heads", 2),
    (r"index_n_heads", 16),  # with few heads of ReLU many scores are 0, and which of them are chosen is left open
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"(mamba_)?chunk_size|block_size", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length", 512),
]
LAYER_COUNTS = r"num_hidden_layers|n_layers?|num_layers|.*coder_layers|num_.*coder_layers|num_blocks|depth"
# Scalings that are 1 unless a checkpoint says otherwise, and caps that would hardly bend logits of this spread.
FLOATS = [
    (r"final_logit_softcapping|logits_soft_cap|output_logit_soft_cap", 12.0),
    (r"attn_logit_softcapping", 2.0),
    (r".*_multipliers?|logits_scaling", 0.7),
]

# family -> changes of its text config, where the rules do not give a model that can be built.
HEADS_OF_16 = {"head_dim": 16}
TWO_OF_FOUR = {"num_experts_per_tok": 2}
TWO_KINDS = ["linear_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SPARSE_ATTENTION = {"index_topk": 4}  # tokens; of sequences that are longer
EXCEPTIONS: dict[str, dict] = {
    "axk2": SPARSE_ATTENTION,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE | {"mrope_section": [3, 3, 2]}}},
    "deepseek_v2": TWO_OF_FOUR | {"first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "deepseek_v32": SPARSE_ATTENTION,
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": TWO_OF_FOUR | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [96] * 4}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0]},
    "glm4_moe": {"first_k_dense_replace": 1},
    "glm_moe_dsa": SPARSE_ATTENTION,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": TWO_KINDS, "mamba_n_heads": 8},
    "hrm_text": {"num_hidden_layers": 1},
    "hunyuan_v1_dense": HEADS_OF_16,
    "hunyuan_v1_moe": HEADS_OF_16,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": HEADS_OF_16,
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4}
    | {"indexer_compress_ratio": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8}
    | {"num_hidden_layers": 2, "attn_layers": ["local", "lsh"], "num_buckets": 4, "hash_seed": 0},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 2 * HIDDEN, "embedding_dim": 2 * HIDDEN},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
EXCEPTIONS["qwen4_exp"] = EXCEPTIONS["qwen4_exp_text"]

# What people's checkpoints set that the defaults of their family leave out: name -> (family, changes).
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 48}
LLAMA_3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PHI_3 = {"sliding_window": None, "rope_parameters": LONG_ROPE}
VARIANTS: dict[str, tuple[str, dict]] = {
    "bert-encoder": ("bert", {"is_decoder": False}),
    "deepseek_v3-whole-query": ("deepseek_v3", {"q_lora_rank": None}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-new-decoder": ("falcon", {"new_decoder_architecture": True}),
    "gemma4-experts": ("gemma4_text", {"enable_moe_block": True, "top_k_experts": 2} | EXPERTS),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-dynamic": ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-linear": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA_3 | {"original_max_position_embeddings": 16}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral-whole": ("mistral", {"sliding_window": None}),
    "phi3-longrope": ("phi3", PHI_3 | {"original_max_position_embeddings": 64}),
    "phi3-longrope-beyond": ("phi3", PHI_3 | {"original_max_position_embeddings": 32}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}),
    "qwen3_moe-dense-layers": ("qwen3_moe", {"mlp_only_layers": [0], "norm_topk_prob": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}  # fmt: skip


def tiny_config(name: str) -> PretrainedConfig:
    """The shrunk config of a family or variant. Raises whatever transformers has against it."""
    family, changes = VARIANTS.get(name, (name, {}))
    config = shrink(CONFIG_MAPPING[family](), EXCEPTIONS.get(family, {}) | changes)
    text = config.get_text_config()
    text.bos_token_id, text.eos_token_id, text.pad_token_id = 1, 2, 0
    return config


def shrink(config: PretrainedConfig, changes: dict | None = None) -> PretrainedConfig:
    """A config of the same class with tiny sizes, its parts' included. changes: of the text config."""
    parts = {name: part for name, part in vars(config).items() if isinstance(part, PretrainedConfig)}
    text = config.get_text_config()
    options = dict(_tiny(config)) | {
        name: shrink(part, changes if part is text else None) for name, part in parts.items()
    }
    return type(config)(**options | (changes or {} if text is config else {}))


def _tiny(config: PretrainedConfig) -> Iterator[tuple[str, object]]:
    """The attributes that change, and their new values. Those that are derived from others are not among them."""
    layers, count = kept_layers(config), getattr(config, "num_hidden_layers", None)
    fields = {config.attribute_map.get(field.name, field.name) for field in dataclasses.fields(config)}
    latent = {"num_key_value_heads": 4, "head_dim": 8} if hasattr(config, "kv_lora_rank") else {}
    for name in fields & vars(config).keys():
        value = vars(config)[name]
        if re.fullmatch(LAYER_COUNTS, name):
            yield name, len(layers)
        elif isinstance(value, list | tuple) and len(value) == count:
            yield name, type(value)(value[i] for i in layers)
        elif (new := latent.get(name, _tiny_value(name, value))) is not None:
            yield name, new


def _tiny_value(name: str, value: object) -> object | None:
    """What an attribute becomes, None where it stays. 0 and None switch a part off, and stay."""
    if name == "initializer_range":
        return HIDDEN**-0.5
    if isinstance(value, bool):
        return True if name == "is_decoder" else None
    table = SIZES if isinstance(value, int) else FLOATS
    number = value[0] if isinstance(value, list) and value else value
    if not number or not isinstance(number, int | float):
        return None
    new = next((new for pattern, new in table if re.fullmatch(pattern, name)), None)
    return [new] * len(value) if new and isinstance(value, list) else new


def kept_layers(config: PretrainedConfig) -> list[int]:
    """The fewest layers (at least 2) in which every kind of layer of the per-layer lists occurs."""
    count = getattr(config, "num_hidden_layers", None) or 2
    lists = [v for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == count]
    kinds = [str([values[i] for values in lists]) for i in range(count)]
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    return sorted({*first[:MOST_LAYERS], *range(count - 1, -1, -1)[: max(0, 2 - len(first))]})
