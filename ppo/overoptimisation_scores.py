"""Samples answers of a run's policies to the same prompts, one policy after the other, and scores them."""

import copy
import math

import torch

from ppo.decoding.sampling import Sampling
from ppo.decoding_check import choose_decoding
from ppo.finished_policies import load_prompts, prepare_policies
from ppo.kept_policies import kept_policies, load_kept
from ppo.models import Models
from ppo.overoptimisation_flags import CheckpointsConfig
from ppo.rollout import PolicySampler, response_texts
from ppo.score import score
from ppo.types import PromptBatch
from ppo.user_reward import NUM_CHECKED, load_reward_functions
from reward.scoring.ensemble import Ensemble, Frozen
from reward.scoring.load import load_ensemble, reward_readers
from utils.engine.engine import InferenceEngine, device
from utils.errors import UserError
from utils.models.load import embedding_rows, window_at


def score_policies(config: CheckpointsConfig, saved: dict) -> tuple[list, dict[str, torch.Tensor], dict]:
    """Returns (policies, {"kl", "length": [policies, prompts]}, judge -> scores, the run's own as "proxy").

    Answers are drawn at --temperature without top-p and penalty, and the KL to the first policy is that of the same
    answers, so that both are of one distribution. A prompt with an answer that a function does not score is left out.
    Memory: the first policy and one other, and all reward models. saved: the run's config.json.
    """
    start, flag = config.policy_model_path, "--policy_model_path"
    kept = kept_policies(config.checkpoints, start, saved)
    tokenizer, template = prepare_policies(config, [(flag, start)])
    config.fit_window(window_at(start, flag))
    batch = _prompts(config, saved, tokenizer, template)
    functions = {name: load_reward_functions(config, f"--{name}") for name in ("reward_fn", "heldout_reward_fn")}
    for function in filter(None, functions.values()):
        function.check_columns(batch.columns[:NUM_CHECKED], print)
    first = load_kept(kept[0], config, saved, tokenizer)
    judges = _reward_models(config, tokenizer, embedding_rows(first.lm))
    both = Ensemble([member for ensemble in judges if ensemble for member in ensemble.members])
    proxy, own = judges[0], len(judges[0].members) if judges[0] else 0
    reference, sampling = Frozen(first, offload=False), Sampling(config.temperature)

    def judge(place: int) -> dict[str, list[float]]:
        policy = first if place == 0 else load_kept(kept[place], config, saved, tokenizer)
        choose_decoding(policy, config, kept[place].name, print)
        engine = InferenceEngine(policy)
        rollout = PolicySampler(engine, tokenizer, config)(batch, sampling, config.seed)
        models = Models(engine, None, reference, both if both.members else None)
        scores = score(rollout, batch, models, None, tokenizer, config.temperature, config)
        answers, found = response_texts(rollout, tokenizer), {}
        total = proxy.combine(scores.member_scores[:, :own]) if proxy else torch.zeros(len(answers), device=device())
        if functions["reward_fn"]:
            said = functions["reward_fn"](batch.turns, answers, batch.columns, finite=True)
            total = total + torch.tensor(_numbers(said.scores, said.failed), device=total.device)
        found["proxy"] = total.tolist()
        for path, column in zip(config.heldout_reward_model_path, scores.member_scores[:, own:].T, strict=True):
            found[path] = column.tolist()
        if functions["heldout_reward_fn"]:
            said = functions["heldout_reward_fn"](batch.turns, answers, batch.columns, finite=True)
            columns = [said.parts[function.metric] for function in functions["heldout_reward_fn"].functions]
            found |= {
                spec: _numbers(column, [x is None for x in column])
                for spec, column in zip(config.heldout_reward_fn, columns, strict=True)
            }
        length = rollout.response_mask.sum(1).tolist()
        kl = (scores.old_logprobs - scores.ref_logprobs).sum(1).tolist()
        print(f"{kept[place].name}: score {_mean(found['proxy']):.3f}, KL {_mean(kl):.2f}, length {_mean(length):.1f}")
        return {"kl": kl, "length": length} | found

    rows = [judge(place) for place in range(len(kept))]
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    known = torch.stack([*columns.values()]).isfinite().all(0).all(0)
    count = int(known.sum())
    if count < 2:
        problem = f"{count} of {len(known)} prompts have a score for all answers, which takes two at least"
        raise UserError(f"--num_prompts {config.num_prompts}: {problem}; raise it, or pass other ones with --data_path")
    if count < len(known):
        print(f"{len(known) - count} of {len(known)} prompts are left out: not all of their answers have a score")
    columns = {name: x[:, known] for name, x in columns.items()}
    return kept, {name: columns.pop(name) for name in ("kl", "length")}, columns


def _prompts(config: CheckpointsConfig, saved: dict, tokenizer, template: str) -> PromptBatch:
    """Returns the prompts: those that the run has held out, with its seed, unless there is a *valid* file."""
    own = config.data_path == saved.get("data_path")
    count, seed = (saved.get(name) if own else 0 for name in ("num_eval_prompts", "seed"))
    if not all(isinstance(x, int) for x in (count, seed)):
        raise UserError(
            f"--checkpoints {config.checkpoints}: config.json has no num_eval_prompts or seed; copy it again"
        )
    batch = load_prompts(config, tokenizer, template, count, seed)
    if len(batch.turns) < 2:
        raise UserError(f"--data_path {' '.join(config.data_path)}: one prompt is too few for an interval; pass more")
    return batch


def _reward_models(config: CheckpointsConfig, tokenizer, rows: int) -> list[Ensemble | None]:
    """Returns the run's reward models, and the held-out ones."""
    heldout = copy.copy(config)
    heldout.reward_flag, heldout.reward_model_path = "--heldout_reward_model_path", config.heldout_reward_model_path
    heldout.reward_tokenizer_name_or_path, heldout.reward_template, heldout.reward_ensemble = [], [], "mean"

    def freeze(model) -> Frozen:
        return Frozen(model, config.offload_frozen)

    return [
        load_ensemble(one, reward_readers(one, tokenizer, print), tokenizer, rows, freeze, print)
        for one in (config, heldout)
    ]


def _numbers(scores: list, failed: list[bool]) -> list[float]:
    return [math.nan if missing else x for x, missing in zip(scores, failed, strict=True)]


def _mean(x: list[float]) -> float:
    known = [each for each in x if not math.isnan(each)]
    return sum(known) / max(1, len(known))
