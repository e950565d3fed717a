"""Builds a `Run` from the flags; every check is done before anything is written."""

from transformers import PreTrainedTokenizerBase

from data.choose_template import first_prompt, prepare_tokenizer
from data.encoded import Mixture, form_options, load_encoded
from data.prompts import Prompt, PromptEncoder
from ppo.config import PPOConfig
from ppo.decoding.sampling import Sampling
from ppo.fit_critic import restore_unit
from ppo.models import load_models
from ppo.planning.plan import fit_to_memory, vllm_room
from ppo.pretrain import PretrainStream, load_pretrain
from ppo.reference import move_reference, new_averages
from ppo.rollout import PolicySampler
from ppo.run import Run
from ppo.state import PPOState, RunState
from ppo.user_reward import NUM_CHECKED, load_reward_functions
from ppo.vllm_sampler import VLLMSampler, check_rollout_engine, start_vllm
from utils.distributed import world_size
from utils.errors import Say
from utils.flags.checks import is_default
from utils.models.load import model_folder, window_at
from utils.run.lifecycle import RunLifecycle
from utils.run.restore import Checkpoint
from utils.run.start import open_log, start_run
from utils.run.together import together


def load_data(
    config: PPOConfig, say: Say
) -> tuple[PreTrainedTokenizerBase, Mixture[Prompt], list[Prompt], PretrainStream | None]:
    """Returns (tokenizer, training prompts, held-out prompts, batches of --ppo_pretrain_data_path). Collective."""
    policy, critic = ((f"--{name}", getattr(config, name)) for name in ("policy_model_path", "critic_model_path"))
    critics = [critic] if config.reads_critic else []
    tokenizer, template = prepare_tokenizer(config, config.tokenizer_name_or_path or policy[1], [policy], say, critics)
    config.check_world(world_size(), len(tokenizer))
    for flag, path in (policy, *critics):
        config.fit_window(window_at(path, flag))
    encoder = PromptEncoder(tokenizer, template, config.maxlen_prompt - config.maxlen_res, form_options(config))
    count, lower = config.num_eval_prompts, is_default(config, "num_eval_prompts")
    train, valid = load_encoded(config.data_path, encoder, config, count, config.seed, say, lower=lower)
    config.fit_prompts(len(train), world_size())
    pretrain = load_pretrain(config, tokenizer, template, say) if config.use_ppo_pretrain_loss else None
    return tokenizer, train, valid, pretrain


def build(config: PPOConfig) -> Run:
    """Does the quick checks first, loads data and models, then creates the run's folder. Collective."""
    return _build(config, *start_run(config, PPOState))


@together()
def _build(config: PPOConfig, say: Say, begin: Checkpoint | None) -> Run:
    check_rollout_engine(config)
    model_folder(config.policy_model_path, "--policy_model_path")
    if config.reads_critic:
        model_folder(config.critic_model_path, "--critic_model_path")
    for path in config.reward_model_path:
        model_folder(path, "--reward_model_path")
    reward_fn = load_reward_functions(config)
    tokenizer, train, valid, pretrain = load_data(config, say)
    say(first_prompt(tokenizer, train.first(1)[0].ids))
    if reward_fn:
        reward_fn.check_columns([prompt.columns for prompt in train.take(0, min(NUM_CHECKED, len(train)))], say)
    vllm = None
    if config.rollout_engine == "vllm":  # on GPUs that are still empty, whose memory it measures
        prompts = -(-max(config.num_rollouts, config.num_eval_prompts) // world_size())
        share, offload = vllm_room(config, world_size())
        vllm = start_vllm(config, config.policy_model_path, "--policy_model_path", tokenizer, share, prompts)
    models = load_models(config, tokenizer, say)
    fit_to_memory(config, models, say)
    state = RunState(pretrain=pretrain)
    averages = new_averages(config, models)
    lifecycle = RunLifecycle(config, models.engines() | averages, config.total_steps)
    lifecycle.restore(begin, config.seed)
    if begin:
        move_reference(averages, models)
        state.load_state_dict(begin.state)
        restore_unit(models.critic, state)
    if vllm:
        offloaded = tuple(models.engines().values()) if offload else ()
        sampler = VLLMSampler(models.policy, tokenizer, config, vllm, offloaded)
    else:
        sampler = PolicySampler(models.policy, tokenizer, config, measure=config.reuse_sampler_logprobs)
    logger = open_log(config, begin, config.total_steps)
    logger.say(f"best/ = highest eval_score_mean with eval_kl_ref up to {config.best_max_kl:g} nats (--best_max_kl)")
    sampling = Sampling(config.temperature, config.topp, config.repetition_penalty)
    if not sampling.from_model:
        logger.say("warning: with --topp or --repetition_penalty, ratio and KL are those of the model without them")
    return Run(
        config, tokenizer, train, valid[: config.num_eval_prompts], models, sampler, sampling, reward_fn, logger, state,
        lifecycle, averages,
    )  # fmt: skip
