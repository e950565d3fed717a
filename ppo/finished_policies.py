"""What commands about finished policies share: their tokenizer, how a policy is loaded, and the prompts."""

from data.choose_template import first_prompt, prepare_tokenizer
from data.encoded import form_options, load_encoded
from data.prompts import PromptEncoder
from ppo.models import PolicyModel
from ppo.ranks import batch_of
from ppo.types import PromptBatch
from utils.engine.engine import DTYPES, device
from utils.errors import Say, UserError
from utils.files import read_json
from utils.models.load import check_window, load_causal_lm, settings_folder
from utils.run.start import choose_dtype


def prepare_policies(config, named: list[tuple[str, str]], say: Say = print):
    """Returns (tokenizer, template) of policies, and chooses --dtype. named: (flag, path) of each; none is loaded yet.

    Raises UserError for a reward model or critic.
    """
    choose_dtype(config)
    tokenizer, template = prepare_tokenizer(config, config.tokenizer_name_or_path or named[0][1], named, say)
    for flag, path in named:
        _check_generates(path, flag)
    return tokenizer, template


def load_policy(path: str, flag: str, config, tokenizer, say: Say = print, merge: bool = True) -> PolicyModel:
    """Returns the policy at the `path` of `flag`, frozen, in --dtype. merge: False leaves adapters out."""
    _check_generates(path, flag)
    kernel = config.attn_implementation
    lm = load_causal_lm(path, DTYPES[config.dtype], device(), kernel, tokenizer, say, flag, merge=merge)
    check_window(lm, getattr(config, "maxlen_prompt", 0), "--maxlen_prompt")  # no flag of ppo.benchmark
    return PolicyModel(lm).requires_grad_(False)


def load_prompts(config, tokenizer, template: str, num_held_out: int = 0, seed: int = 0) -> PromptBatch:
    """Returns the first --num_prompts held-out prompts: of a *valid* file, or `num_held_out` that `seed` chooses.

    Without both, the first of all prompts.
    """
    encoder = PromptEncoder(tokenizer, template, config.maxlen_prompt - config.maxlen_res, form_options(config))
    train, valid = load_encoded(config.data_path, encoder, config, num_held_out, seed, print, lower=True)
    if valid:
        print("compared on the held-out data")
    else:
        print("compared on all prompts, since there is no *valid* file: make sure that none was trained on")
    prompts = valid[: config.num_prompts] or train.first(config.num_prompts)
    print(first_prompt(tokenizer, prompts[0].ids))
    return batch_of(prompts, list(range(len(prompts))))


def _check_generates(path: str, flag: str) -> None:
    """Raises UserError for a reward model or critic: with tied embeddings it would load, and generate nonsense."""
    kinds = str(read_json(settings_folder(path, flag) / "config.json", flag).get("architectures"))
    if "Classification" in kinds:
        raise UserError(f"{flag} {path} is a reward model or critic ({kinds}), which generates no text; pass a policy")
