"""A decoder with a scalar per token: the reward model (the last scalar) and the critic (all scalars).

Loads sequence classification with one label, the published MOSS layout (causal-LM keys plus `reward_head.weight`), and
a causal LM, which gets a new head. Saves the first, which other tools can load. `score_center` in config.json is
subtracted from all scores, which other tools do not do; differences of scores are the same.
"""

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from utils.errors import Say, UserError
from utils.files import atomic_folder
from utils.flags.lora import LoraFlags
from utils.models.adapter_folder import read_head, write_adapter
from utils.models.adapters import Adapted, place_of, train_adapter
from utils.models.check import check_forward
from utils.models.chunked_logprobs import head_logits, sum_nll
from utils.models.config import read_config
from utils.models.export import check_names, saved_tensors, set_ids, without_adapters, write_model
from utils.models.load import (
    FLAG,
    adapter_folders,
    fit_vocabulary,
    from_folder,
    model_folder,
    resize_embeddings,
    settings_folder,
    whole_model,
)
from utils.models.padding_free import has_varlen_kernel, joins_rows, states_of
from utils.models.split import Split, gathered, split_rest
from utils.models.weight_files import read_tensor, tensor_files
from utils.tensors import at_tokens, before, last_index
from utils.tokenizer import save_tokenizer, stop_ids

HEAD_NAMES = ("score.weight", "reward_head.weight")  # sequence classification, MOSS


class ScalarHead(nn.Linear):
    """Linear layer hidden -> 1 without bias, computed in float32: bf16 would round scores to steps of about 1 %."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float())


class ScalarModel(Adapted):
    """A decoder without LM head (`backbone`) and a scalar `head`; `lm_head` only for a language-model loss."""

    def __init__(self, backbone: PreTrainedModel, head: ScalarHead, lm_head: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.lm_head = lm_head
        self.even_tokens = 0  # argument of `sum_nll`; set under ZeRO-3
        self.score_center = float(getattr(self.config, "score_center", 0.0))
        self.value_pretrained = False  # whether its scalars are values, of `python -m ppo.critic`
        self.score_scale = 1.0  # factor of the head's output; a saved model has it in the head's weight

    @property
    def config(self):
        return self.backbone.config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, nll_mask: torch.Tensor | None = None,
        with_states: bool = False,
    ):  # fmt: skip
        """Returns scalars float32 [batch, length], 0 where attention_mask is False. Inputs are right-padded.

        nll_mask (bool, False at first positions; needs lm_head): return also the summed NLL of these tokens.
        with_states: return also the float32 states [batch, hidden] of each row's last real token. attention_mask can
        exclude tokens whose scalars are not needed: causal attention needs no mask.
        """
        self.activate()
        read = attention_mask.bool()
        answers = None if nll_mask is None else before(nll_mask)[read].nonzero().squeeze(1)
        if with_states or (nll_mask is not None and not self.trains_joined):
            hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
            states = hidden[read]
        else:
            states = states_of(self.backbone, input_ids, read)
        extras = ()
        if nll_mask is not None:
            logits = partial(head_logits, self.lm_head, self.config.get_text_config())
            extras += (sum_nll(states[answers], input_ids, nll_mask, logits, even_tokens=self.even_tokens),)
        if with_states:
            rows = torch.arange(len(hidden), device=hidden.device)
            extras += (hidden[rows, last_index(attention_mask)].float(),)
        scalars = at_tokens(self.score_scale * self.head(states).squeeze(-1) - self.score_center, read)
        return (scalars, *extras) if extras else scalars

    @property
    def decoder(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    @property
    def joins_rows(self) -> bool:
        """Whether forward passes for scalars alone run without padding."""
        return joins_rows(self.backbone)

    @property
    def trains_joined(self) -> bool:
        """Whether forward passes with a language-model loss run without padding."""
        return has_varlen_kernel(self.backbone)


def train_scalar_adapter(model: ScalarModel, name: str, config: LoraFlags, rank: int = 0) -> None:
    """Freezes a model and adds an adapter to its backbone (`add_adapter`); the head is trained as well, in float32."""
    train_adapter(model, model.backbone, name, config, rank)
    model.head.float().requires_grad_(True)


def last_scores(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Returns the scalar at each row's last real token. values, attention_mask: [batch, length] -> [batch]."""
    return values.gather(1, last_index(attention_mask).unsqueeze(1)).squeeze(1)


def load_scalar_model(
    path: str, dtype: torch.dtype, device: torch.device, attn_implementation: str | None = None, tokenizer=None,
    with_lm_head: bool = False, seed: int = 0, say: Say = print, flag: str = FLAG,
    trained: bool = False, rows: int = 0, split: Split | None = None, merge: bool = True,
) -> ScalarModel:  # fmt: skip
    """Returns the scalar model of a folder or hub id in any of the three layouts, in eval mode.

    A missing head is initialised with `seed`; with `trained` it is an error. tokenizer: resize or check the vocabulary.
    rows: least number of embeddings. flag: the flag that gave the path. split, merge: as in `load_causal_lm`. Raises
    UserError for several labels or a head that does not match.
    """
    weight = head_weight(path, flag, trained, with_lm_head)
    auto_class = AutoModelForCausalLM if with_lm_head else AutoModel
    model = from_folder(auto_class, path, dtype, device, attn_implementation, flag, say, split, merge)
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer, f"{flag} {path}", say, grows=merge)
    backbone, lm_head = (model.base_model, model.get_output_embeddings()) if with_lm_head else (model, None)
    resize_embeddings(model, rows)
    split_rest(model, split, device)
    with gathered(model):
        check_forward(model, f"{flag} {path}", say, with_lm_head)
    if type(model.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        kind = f"a {model.config.model_type} model, which transformers has no sequence classification for"
        raise UserError(f"{flag}: {path} is {kind}: it cannot be saved; use another architecture")
    return scalar_model(backbone, weight, lm_head, path, flag, dtype, device, seed, say)


def head_weight(path: str, flag: str, trained: bool, with_lm_head: bool = False) -> torch.Tensor | None:
    """Returns the weight of the head in a folder [1, hidden], of its adapter if it has one; None if there is no head.

    trained: then that is an error.
    """
    folder, *adapters = model_folder(path, flag), *adapter_folders(path, flag)
    files = tensor_files(folder, flag)
    name = next((name for name in HEAD_NAMES if name in files), None)
    weight = None if name is None else read_tensor(files[name], name, flag)
    for adapter in adapters:
        own = read_head(adapter, flag)
        weight = weight if own is None else own
    if weight is None and trained:
        raise UserError(f"{flag}: {path} has no reward head; train a reward model with python -m reward.train")
    if weight is not None and weight.shape[0] != 1:
        raise UserError(f"{flag}: {path} has {weight.shape[0]} labels; use a reward model, which has one")
    if with_lm_head and name == HEAD_NAMES[0]:
        raise UserError(f"{flag}: {path} is a classifier without an LM head; use it with --reward_lm_loss_factor 0")
    return weight


def scalar_model(
    backbone: PreTrainedModel, weight: torch.Tensor | None, lm_head: nn.Module | None, path: str, flag: str,
    dtype: torch.dtype, device: torch.device, seed: int, say: Say,
) -> ScalarModel:  # fmt: skip
    """Returns the scalar model with a backbone and a head of this weight, or a new head. path: of the model."""
    hidden_size = backbone.config.get_text_config().hidden_size
    if weight is None:
        weight = new_head_weight(hidden_size, seed)
        say(f"{path}: no reward head; a new one is initialised from N(0, 1/sqrt({hidden_size} + 1)), seed {seed}")
    elif weight.shape[1] != hidden_size:
        wrong = f"is for hidden size {weight.shape[1]}, not {hidden_size}"
        raise UserError(f"{flag}: the reward head in {path} {wrong}; copy it again")
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"{flag}: the reward head in {path} is not finite; use an earlier checkpoint")
    folder = settings_folder(path, flag)
    settings = read_config(folder, flag)
    center = settings.get("score_center", 0.0)
    if not isinstance(center, int | float) or not math.isfinite(center):
        raise UserError(f"{flag}: score_center {center!r} in {folder}/config.json is not a number; fix or remove it")
    head = ScalarHead(hidden_size, 1, bias=False, dtype=dtype, device=device)
    head.weight.data.copy_(weight)
    model = ScalarModel(backbone, head, lm_head)
    model.score_center = float(center)
    model.value_pretrained = bool(settings.get("value_pretrained"))
    return model.eval()


def with_distinct_pad(tokenizer):
    """Returns the tokenizer, or if its pad token also ends answers, a copy with another special token as pad token."""
    ends = (*stop_ids(tokenizer), tokenizer.eos_token_id)
    if tokenizer.pad_token_id not in ends:
        return tokenizer
    candidates = [tokenizer.unk_token_id, *tokenizer.all_special_ids]
    other = next((i for i in candidates if i is not None and i not in ends), tokenizer.eos_token_id)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)
    return tokenizer


def new_head_weight(hidden_size: int, seed: int) -> torch.Tensor:
    """Returns float32 [1, hidden_size] from N(0, 1/sqrt(hidden_size + 1)): initial scores have about unit size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1) ** 0.5


def set_dropout(model: ScalarModel, share: float) -> None:
    """Sets the dropout probability of all dropout layers (LLaMA: of attention weights). Raises UserError if none."""
    places = 0
    for module in model.backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        elif isinstance(getattr(module, "attention_dropout", None), int | float):
            module.attention_dropout = share
        else:
            continue
        places += 1
    if not places:
        kind = model.config.model_type
        raise UserError(f"--simcse_coef: a {kind} model has no dropout to make two views with; use --simcse_coef 0")


def save_scalar_model(
    model: ScalarModel, folder: str, state_dict: dict[str, torch.Tensor] | None = None, tokenizer=None,
    center: float = 0.0, value_pretrained: bool = False,
) -> None:  # fmt: skip
    """Saves a sequence-classification model with one label, and its tokenizer; `folder` appears when all is written.

    state_dict: the gathered `saved_tensors`; default: the model's own. center: score that becomes 0. value_pretrained:
    config.json says that this is a critic, whose scalars are values. The saved pad token does not end answers, because
    other tools read the score at the last token that is not padding.
    """
    state = _classifier_tensors(model, saved_tensors(model) if state_dict is None else state_dict)
    config = _classifier_config(model)
    if model.score_center or center:
        config.score_center = model.score_center + center
    if value_pretrained or hasattr(config, "value_pretrained"):
        config.value_pretrained = value_pretrained
    if tokenizer is not None:
        tokenizer = with_distinct_pad(tokenizer)
    else:
        text = config.get_text_config()
        if text.pad_token_id is None or text.pad_token_id == text.eos_token_id:
            set_ids(config, pad_token_id=0)
    write_model(AutoModelForSequenceClassification, config, state, folder, tokenizer)


def save_scalar_adapter(
    model: ScalarModel, path: str, folder: str, tokenizer, center: float = 0.0, value_pretrained: bool = False
) -> None:  # fmt: skip
    """Writes the adapters and the head of a scalar model that was read from `path`; other options as above."""
    config = _classifier_config(model)
    config.score_center, config.value_pretrained = model.score_center + center, value_pretrained
    with atomic_folder(folder) as partial:
        write_adapter(model, model.backbone, whole_model(path), partial, model.score_scale * model.head.weight)
        config.save_pretrained(partial)
        save_tokenizer(with_distinct_pad(tokenizer), partial)


def check_scalar_export(model: ScalarModel, what: str) -> None:
    """Raises UserError if the tensors that `save_scalar_model` writes are not those that transformers loads."""
    names = _classifier_tensors(model, without_adapters(saved_tensors(model)))
    check_names(AutoModelForSequenceClassification, _classifier_config(model), names, what)


def _classifier_config(model: ScalarModel) -> PretrainedConfig:
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    return config


def _classifier_tensors(model: ScalarModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the state with the names of transformers' classifier, without an LM head."""
    prefix = place_of(model.backbone)
    renamed = {"score.weight": model.score_scale * state["head.weight"].detach()}
    for name, tensor in state.items():
        if name.startswith("backbone."):
            renamed[f"{prefix}{name.removeprefix('backbone.')}"] = tensor.detach()
    return renamed
