"""Samples answers of policies to held-out prompts and scores them."""

from collections.abc import Callable

from ppo.compare_flags import CompareConfig
from ppo.decoding.sampling import EVALUATION, Sampling
from ppo.decoding_check import choose_decoding
from ppo.finished_policies import load_policy, load_prompts, prepare_policies
from ppo.models import Models, PolicyModel
from ppo.rollout import PolicySampler, Sampler, response_texts
from ppo.sampler_gap import sampler_problem
from ppo.score import score
from ppo.types import Rollout, Scores
from ppo.user_reward import NUM_CHECKED, UserScores, load_reward_functions
from ppo.vllm_sampler import VLLMSampler, check_rollout_engine, start_vllm
from reward.scoring.ensemble import Ensemble, Frozen
from reward.scoring.load import load_ensemble, reward_readers
from utils.engine.engine import InferenceEngine, init_distributed
from utils.engine.memory import device_memory, device_room
from utils.errors import UserError
from utils.models.config import UNUSED
from utils.models.load import window_at


def sample_policies(config: CompareConfig) -> list[dict]:
    """Returns for each policy {"rows": texts, "columns": {name: one number per prompt}, "turns": of each prompt}.

    All but the first also have "kl": of each plain sample to the first policy. Columns: scores of reward models and
    function, length, 1 where the response ended with an end token, its negative log-likelihood under its own policy and
    under the first. Memory: two policies at a time and the reward models.
    """
    check_rollout_engine(config)
    tokenizer, template = prepare_policies(config, [("--policies", path) for path in config.policies])
    for path in config.policies:
        config.fit_window(window_at(path, "--policies"))
    batch = load_prompts(config, tokenizer, template)
    if reward_fn := load_reward_functions(config):
        reward_fn.check_columns(batch.columns[:NUM_CHECKED], print)
    readers = reward_readers(config, tokenizer, print)
    first, second = (load_policy(path, "--policies", config, tokenizer) for path in config.policies[:2])
    rows = first.lm.get_input_embeddings().weight.shape[0]
    reward = load_ensemble(config, readers, tokenizer, rows, lambda model: Frozen(model, config.offload_frozen), print)
    make_sampler = _sampler_maker(config, tokenizer, first)

    def answer(sampler: Sampler, sampling: Sampling) -> dict:
        """Samples one answer per prompt and returns its texts and scores, as above."""
        models = Models(sampler.policy, None, Frozen(first, False), reward)
        rollout = sampler(batch, sampling, config.seed)
        scores = score(rollout, batch, models, None, tokenizer, 1.0, config)
        if sampling == Sampling() and (problem := sampler_problem(rollout, scores, sampler, config, 1.0)):
            raise UserError(problem)
        answers = response_texts(rollout, tokenizer)
        said = reward_fn and reward_fn(batch.turns, answers, batch.columns, finite=True)
        rows = [{"prompt": p[-1]["content"], "answer": a} for p, a in zip(batch.turns, answers, strict=True)]
        return {"rows": rows, "columns": _columns(rollout, scores, reward, said), "turns": batch.turns}

    sampler = make_sampler(second, config.policies[1])
    found = [answer(make_sampler(first, config.policies[0]), EVALUATION)]
    for path in config.policies[1:]:
        if len(found) > 1:
            sampler = second = None  # its memory is for the next one
            sampler = make_sampler(load_policy(path, "--policies", config, tokenizer), path)
        plain = answer(sampler, Sampling())["columns"]
        kl = [b - a for a, b in zip(plain["nll"], plain["nll under before"], strict=True)]
        found.append(answer(sampler, EVALUATION) | {"kl": kl})
    return found


def _columns(rollout: Rollout, scores: Scores, reward: Ensemble | None, said: UserScores | None) -> dict[str, list]:
    """Returns the columns of `sample_policies` for one policy."""
    columns = {}
    if said:
        columns["reward_fn score"] = [None if f else x for x, f in zip(said.scores, said.failed, strict=True)]
        columns |= said.parts if len(said.parts) > 1 else {}
    if reward:
        columns["reward model score"] = scores.scores.tolist()
        if len(reward.members) > 1:
            members = enumerate(scores.member_scores.T.tolist(), start=1)
            columns |= {f"reward model {i} score": column for i, column in members}
    columns["length"] = rollout.response_mask.sum(1).tolist()
    columns["ended by itself"] = rollout.ended.float().tolist()
    columns["nll"] = (-scores.old_logprobs.sum(1)).tolist()
    columns["nll under before"] = (-scores.ref_logprobs.sum(1)).tolist()
    return columns


def _sampler_maker(config: CompareConfig, tokenizer, first: PolicyModel) -> Callable[[PolicyModel, str], Sampler]:
    """Returns a function that makes a sampler of a policy. With vLLM they share it; weights are copied at each call."""
    if config.rollout_engine == "own":

        def make(policy: PolicyModel, path: str) -> Sampler:
            choose_decoding(policy, config, f"--policies {path}", print)
            return PolicySampler(InferenceEngine(policy), tokenizer, config)

        return make
    init_distributed()
    share = config.vllm_gpu_memory_utilization
    if share == "auto":  # what the models leave; on a CPU it has no effect
        share = (device_room() or device_memory()) / device_memory()
    vllm = start_vllm(config, config.policies[0], "--policies", tokenizer, share, config.num_prompts)
    before = _numerics(first)

    def make_of_vllm(policy: PolicyModel, path: str) -> Sampler:
        after = _numerics(policy)
        if different := sorted(name for name, _ in before.items() ^ after.items()):
            name = different[0]
            raise UserError(
                f"--rollout_engine vllm: {config.policies[0]} has {name} {before.get(name)} and {path} has "
                f"{after.get(name)}, but all --policies share one model in vLLM; pass --rollout_engine own"
            )
        return VLLMSampler(InferenceEngine(policy), tokenizer, config, vllm)

    return make_of_vllm


def _numerics(policy: PolicyModel) -> dict[str, str]:
    """Returns the settings of a model that change what it computes, as text."""
    settings = policy.lm.config.get_text_config().to_dict()
    return {name: str(value) for name, value in settings.items() if not UNUSED.fullmatch(name)}
