"""From flags to everything the loop needs, checked before anything is written."""

from data.choose_template import first_prompt, settle
from data.prompts import load_prompts
from ppo.config import PPOConfig
from ppo.decoding.sampling import Sampling
from ppo.evaluate import BestRule
from ppo.models import load_models
from ppo.planning.plan import fit_to_memory
from ppo.pretrain import load_pretrain
from ppo.run import Run, RunState
from ppo.score import load_reward_fn
from utils.distributed import world_size
from utils.errors import UserError
from utils.models.load import model_folder
from utils.run.lifecycle import RunLifecycle
from utils.run.start import open_log, start_run


def build(config: PPOConfig) -> Run:
    """Checks everything that can be checked cheaply first, loads data and models, then makes the run's folder."""
    say, begin = start_run(config)
    model_folder(config.policy_model_path, "--policy_model_path")
    model_folder(config.critic_model_path, "--critic_model_path")
    for path in config.reward_model_path:
        model_folder(path, "--reward_model_path")
    reward_fn = load_reward_fn(config.reward_fn) if config.reward_fn else None
    policy, critic = ((f"--{name}", getattr(config, name)) for name in ("policy_model_path", "critic_model_path"))
    tokenizer, template = settle(config, config.tokenizer_name_or_path or policy[1], [policy], say, [critic])
    config.check_world(world_size(), len(tokenizer))
    room = config.maxlen_prompt - config.maxlen_res
    train, valid = load_prompts(config.data_path, tokenizer, template, room, config.num_eval_prompts, config.seed, say)
    if len(train) < config.num_rollouts:
        raise UserError(
            f"--num_rollouts {config.num_rollouts} asks for more prompts than the {len(train)} that "
            f"--data_path {config.data_path} has: lower it, or bring more prompts"
        )
    say(first_prompt(tokenizer, train[0].ids))
    pretrain = load_pretrain(config, tokenizer, template, say) if config.use_ppo_pretrain_loss else None
    models = load_models(config, tokenizer, say)
    fit_to_memory(config, models, say)
    state = RunState(BestRule(config.best_max_kl), pretrain=pretrain)
    lifecycle = RunLifecycle(config, models.engines(), config.total_steps)
    lifecycle.restore(begin, config.seed)
    if begin:
        state.load_state_dict(begin.state)
        if state.critic_center is not None:
            models.critic.module.score_center = state.critic_center
    logger = open_log(config, begin, config.total_steps)
    logger.say(str(state.best))
    if caveat := Sampling(config.temperature, config.topp, config.repetition_penalty).caveat:
        logger.say(caveat)
    return Run(config, tokenizer, train, valid[: config.num_eval_prompts], models, reward_fn, logger, state, lifecycle)
