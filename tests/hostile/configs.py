"""Cases of config.json and generation_config.json."""

from dataclasses import replace
from functools import partial

from tests.hostile.case import Case, named, values_of
from tests.hostile.changes import (
    fifo,
    holding,
    in_place,
    nested,
)

HUGE, NAN, INF = 10**12, float("nan"), float("inf")
policy = partial(Case, "sft", "policy", flags={"hf_model_name_or_path": "{model}"})
judge = partial(Case, "score", "judge", flags={"model": "{model}"})
base = partial(Case, "merge", "raw", flags={"path_raw": "{model}"})
diff = partial(Case, "merge", "diff", flags={"path_diff": "{model}"})

VALUES = {
    "hidden_size": [-32, 0, 10**9, "32"], "num_hidden_layers": [-1, 0, 10**9, 2.5, 3], "num_attention_heads": [0, HUGE,
    5],
    "num_key_value_heads": [0, HUGE], "head_dim": [-16, 0, HUGE], "intermediate_size": [0, HUGE],
    "vocab_size": [-400, HUGE, 1], "max_position_embeddings": [-512, 0, 10**18, "512"], "rms_norm_eps": [NAN, INF,
    "1e-6"],
    "hidden_act": ["no_such", 3, "__import__('os').system('touch ran')"], "rope_scaling": ["x", {"type": "linear",
    "factor": NAN}],
    "rope_parameters": ["x", {"rope_type": "no_such"}, {"rope_theta": "x"}, {"rope_theta": 0, "rope_type": "default"}],
    "dtype": ["float99", 3, []], "torch_dtype": ["garbage", {}], "eos_token_id": [HUGE, "2", [2, "x"]],
    "bos_token_id": [HUGE],
    "pad_token_id": [-1, 400, "x"], "architectures": [3, [3], []], "model_type": [3, [], "../llama", "bert"],
    "auto_map": [3, "x", {"AutoModelForCausalLM": "../../x.Y"}], "attention_dropout": [NAN, 2, -1],
    "initializer_range": ["x"],
    "quantization_config": [3, {"quant_method": 3}, {"quant_method": "gptq", "bits": -1}],
    "tie_word_embeddings": [True],
    "layer_types": ["x", ["no_such", "no_such"]], "_attn_implementation": [3, "someone/kernel", []],
    "is_encoder_decoder": [True],
    "text_config": [3, {"hidden_size": -1}], "id2label": [3], "num_labels": [HUGE], "": [3, None, []],
}  # fmt: skip
MAY = {
    "max_position_embeddings = 1000000000000000000": "a window is a limit, and takes no memory",
    "pad_token_id = -1": "published LLaMA configs have it", "architectures = []": "it names no class",
    **{f"attention_dropout = {x}": "all dropout is switched off" for x in ("NaN", "2", "-1")},
    "torch_dtype = {}": "a dtype per part is a form of transformers",
    'auto_map = {"AutoModelForCausalLM": "../../x.Y"}': "code of a folder is never run, and transformers has the class",
}  # fmt: skip
GENERATION = {"eos_token_id": [HUGE, "x", [2, None], [[2]], {}, True], "temperature": [NAN], "": [3, [], None]}
SAMPLING = {"temperature = NaN": "sampling has flags of its own"}
TEXTS = {
    "deep": nested(100_000), "deep object": '{"a":' * 50_000 + "1" + "}" * 50_000, "digits": '{"a": ' + "9" * 100_000
    + "}",
    "empty": "", "not UTF-8": '{"model_type": "\udcff"}', "a BOM": "\ufeff{}", "cut": '{"model_type": "llama"',
    "two objects": "{}{}", "a lone surrogate": '{"model_type": "\\ud800"}',
    "an escape": '{"model_type": "\\u001b[2J\\u009b31m"}',
}  # fmt: skip
PLACES = {
    "a folder": lambda path: path.mkdir(), "a FIFO": fifo, "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
}  # fmt: skip


def again(case: Case, accepted: str = "") -> Case:
    """A case that is there already, for another name. accepted: why it may go on, if it does not say so itself."""
    return replace(case, accepted=case.accepted or accepted)


def files(name: str, make, **accepted: str) -> dict[str, Case]:
    """What may stand in the place of a JSON file. accepted: title, with _ for spaces -> why that may go on."""
    changes = {title: holding(name, text) for title, text in TEXTS.items()}
    changes |= {title: in_place(name, build) for title, build in PLACES.items()}
    reasons = {title.replace("_", " "): reason for title, reason in accepted.items()}
    return named(f"{name}: {{}}", changes, make, {"a BOM": "a mark of UTF-8"} | reasons)


FOREIGN = "keys that are not known are ignored"
OF_REWARD = {"score_center": [NAN, [1], 10**400], "id2label": [{"a": 1}]}
OF_DIFF = {
    "num_hidden_layers": [HUGE], "num_attention_heads": [0], "hidden_size": [0], "rope_theta": ["x", 0],
    "head_dim": [HUGE],
    "rope_parameters": [3],
}  # fmt: skip
CASES = (
    values_of("config.json", VALUES, policy, MAY)
    | values_of("generation_config.json", GENERATION, policy, SAMPLING)
    | files("config.json", policy)
    | files("generation_config.json", policy, an_escape=FOREIGN, a_lone_surrogate=FOREIGN)
    | named("{} (a reward model)", values_of("config.json", OF_REWARD, judge), again)
    | named("{} (a diff)", values_of("config.json", OF_DIFF, diff), again)
)
