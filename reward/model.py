"""A decoder with a scalar at every token: the reward model (its last scalar) and the critic (all of them).

Reads three layouts: a sequence-classification folder with one label, the published MOSS one (causal-LM keys plus
`reward_head.weight`), and a plain causal LM, which gets a new head. Writes the first, so that other tools read it.

`score_center` in a folder's config is the score that counts as 0. LLaMA's classifier has no bias to hold it, so other
tools give scores that are larger by it: differences, and so preferences, are the same.
"""

import copy
import math
from collections.abc import Callable
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

from utils.errors import UserError
from utils.models.check import check_forward
from utils.models.chunked_logprobs import head_logits, sum_nll
from utils.models.export import check_names, saved_tensors, set_ids, write_model
from utils.models.load import FLAG, fit_vocabulary, from_folder, model_folder
from utils.models.padding_free import has_varlen_kernel, joins_rows, states_of
from utils.models.weight_files import read_tensor, tensor_files
from utils.tensors import at_tokens, before, last_index
from utils.tokenizer import stop_ids

HEAD_NAMES = ("score.weight", "reward_head.weight")  # sequence classification, MOSS


class ScalarHead(nn.Linear):
    """hidden -> 1 without bias, in float32 whatever the weight's dtype: bf16 scores would differ by steps of 1 %."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float())


class ScalarModel(nn.Module):
    """`backbone` (decoder without LM head) and `head`; `lm_head` only where a language-model loss is asked for."""

    def __init__(self, backbone: PreTrainedModel, head: ScalarHead, lm_head: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.lm_head = lm_head
        self.even_tokens = 0  # of `sum_nll`; set under ZeRO-3
        self.score_center = float(getattr(self.config, "score_center", 0.0))

    @property
    def config(self):
        return self.backbone.config

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        nll_mask: torch.Tensor | None = None,
        with_states: bool = False,
    ):
        """Scalars float32 [batch, length] at every position, 0 where attention_mask is False. Inputs [batch, length],

        right-padded. No attention mask goes in: behind right padding causality alone hides it, and attention kernels
        are fastest so. Thus the mask may also leave out real tokens, whose scalars nobody reads.
        With nll_mask (bool, False where attention_mask is and at first positions; needs lm_head): (scalars, summed NLL
        of those tokens). with_states: the float32 states [batch, hidden] of each row's last real token follow.
        """
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
        scalars = self._scalars(states, read)
        return (scalars, *extras) if extras else scalars

    def _scalars(self, states: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        return at_tokens(self.head(states).squeeze(-1) - self.score_center, read)

    @property
    def joins_rows(self) -> bool:
        """Whether padding is left out where scalars alone are asked for, so that any sequences may share a forward."""
        return joins_rows(self.backbone)

    @property
    def trains_joined(self) -> bool:
        """Whether padding is left out with a language-model loss, too."""
        return has_varlen_kernel(self.backbone)


def last_scores(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The scalar at each row's last real token. values, attention_mask: [batch, length] -> [batch]."""
    return values.gather(1, last_index(attention_mask).unsqueeze(1)).squeeze(1)


def load_scalar_model(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None = None,
    tokenizer=None,
    with_lm_head: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = print,
    flag: str = FLAG,
    trained: bool = False,
) -> ScalarModel:
    """The scalar model of a folder or hub id in any of the three layouts, in `dtype` on `device`, in eval mode.

    A new head is drawn from N(0, 1/sqrt(hidden + 1)) with `seed`, and said; with `trained`, a folder without a head is
    refused. With a tokenizer its vocabulary is checked. `flag` is what error messages call the path. Raises UserError
    for more than one label, and as `utils.models.load.load_causal_lm` does.
    """
    folder = model_folder(path, flag)
    files = tensor_files(folder, flag)
    name = next((name for name in HEAD_NAMES if name in files), None)
    weight = None if name is None else read_tensor(files[name], name, flag)
    if weight is None and trained:
        raise UserError(
            f"{flag}: {path} has no reward head ({' or '.join(HEAD_NAMES)}): it is no reward model; train it with "
            "python -m reward.train first"
        )
    if weight is not None and weight.shape[0] != 1:
        raise UserError(f"{flag}: {path} has {weight.shape[0]} labels, and a reward model has one; give another folder")
    if with_lm_head and name == HEAD_NAMES[0]:
        raise UserError(f"{flag}: {path} is a classifier without an LM head; give --reward_lm_loss_factor 0 with it")
    auto_class = AutoModelForCausalLM if with_lm_head else AutoModel
    model = from_folder(auto_class, folder, dtype, device, attn_implementation, flag, say)
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer, f"{flag} {path}", say)
    backbone, lm_head = (model.base_model, model.get_output_embeddings()) if with_lm_head else (model, None)
    check_forward(model.to(device), f"{flag} {path}", say, with_lm_head)
    if type(model.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"{flag}: {path} is a {model.config.model_type} model, for which transformers has no sequence "
            "classification, the form in which scalar models are saved; give another architecture"
        )
    hidden_size = backbone.config.get_text_config().hidden_size
    if weight is None:
        weight = new_head_weight(hidden_size, seed)
        say(f"{path}: no reward head in it; a new one is drawn from N(0, 1/sqrt({hidden_size} + 1)), seed {seed}")
    elif weight.shape[1] != hidden_size:
        raise UserError(
            f"{flag}: the reward head in {path} is for hidden size {weight.shape[1]}, not {hidden_size}; copy it again"
        )
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"{flag}: the reward head in {path} is not finite; give an earlier checkpoint")
    center = getattr(model.config, "score_center", 0.0)
    if not isinstance(center, int | float) or not math.isfinite(center):
        raise UserError(
            f"{flag}: score_center {center!r} in {path}/config.json is not a number; mend it or take it out"
        )
    head = ScalarHead(hidden_size, 1, bias=False, dtype=dtype, device=device)
    head.weight.data.copy_(weight)
    return ScalarModel(backbone, head, lm_head).eval()


def with_own_pad(tokenizer):
    """The tokenizer, or where its pad ends answers a copy that pads with another special token, if it has one."""
    ends = (*stop_ids(tokenizer), tokenizer.eos_token_id)
    if tokenizer.pad_token_id not in ends:
        return tokenizer
    candidates = [tokenizer.unk_token_id, *tokenizer.all_special_ids]
    other = next((i for i in candidates if i is not None and i not in ends), tokenizer.eos_token_id)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)
    return tokenizer


def new_head_weight(hidden_size: int, seed: int) -> torch.Tensor:
    """float32 [1, hidden_size] from N(0, 1/sqrt(hidden_size + 1)): scores of unit states start at about +-1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1) ** 0.5


def set_dropout(model: ScalarModel, share: float) -> None:
    """Drops this share in training mode wherever the architecture has dropout (LLaMA: attention weights alone).

    Raises UserError when it has none.
    """
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
        raise UserError(
            f"--simcse_coef: a {kind} model has no dropout to make two views of an answer with; leave it out"
        )


def save_scalar_model(
    model: ScalarModel,
    folder: str,
    state_dict: dict[str, torch.Tensor] | None = None,
    tokenizer=None,
    center: float = 0.0,
) -> None:
    """Writes `folder`, whole or not at all, as a sequence-classification model with one label, and its tokenizer.

    state_dict: the model's `saved_tensors`, whole; default: as they are. center: of the model's scores, what is to be
    0 in the saved one. The pad id is one that no answer ends in, since other tools take the score at the last token
    that is not padding.
    """
    state = _classifier_tensors(model, saved_tensors(model) if state_dict is None else state_dict)
    config = _classifier_config(model)
    if model.score_center or center:
        config.score_center = model.score_center + center
    if tokenizer is not None:
        tokenizer = with_own_pad(tokenizer)
    else:
        text = config.get_text_config()
        if text.pad_token_id is None or text.pad_token_id == text.eos_token_id:
            set_ids(config, pad_token_id=0)
    write_model(AutoModelForSequenceClassification, config, state, folder, tokenizer)


def check_scalar_export(model: ScalarModel, what: str) -> None:
    """Raises UserError where `save_scalar_model` would not write the tensors that such a folder is loaded from."""
    names = _classifier_tensors(model, saved_tensors(model))
    check_names(AutoModelForSequenceClassification, _classifier_config(model), names, what)


def _classifier_config(model: ScalarModel) -> PretrainedConfig:
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    return config


def _classifier_tensors(model: ScalarModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state by the names of transformers' classifier, the head first; without an LM head."""
    prefix = model.backbone.base_model_prefix
    renamed = {"score.weight": state["head.weight"].detach()}
    for name, tensor in state.items():
        if name.startswith("backbone."):
            renamed[f"{prefix}.{name.removeprefix('backbone.')}"] = tensor.detach()
    return renamed
