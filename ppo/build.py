"""From flags to everything the loop needs, checked before anything is written."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from data.order import order
from data.prompts import Prompt, load_prompts
from data.template import decode_answer, template_for
from ppo.config import PPOConfig
from ppo.evaluate import BestRule, evaluate, own_share
from ppo.models import Models, load_models
from ppo.pretrain import PretrainBatch, load_pretrain
from ppo.rollout import response_ids
from ppo.sampling import EVALUATION, Sampling
from ppo.score import RewardFunction, load_reward_fn
from ppo.types import PromptBatch, Rollout, Scores
from utils.checkpoint import prepare_run_folder
from utils.distributed import barrier, is_main, world_size
from utils.engine import init_distributed
from utils.errors import UserError
from utils.export import save_causal_lm
from utils.logger import RunLogger, check_outputs
from utils.models import model_folder
from utils.moments import RunningMoments
from utils.schedule import lr_factor
from utils.tokenizer import load_tokenizer


@dataclass
class RunState:
    """What changes during a run, besides the engines: what a checkpoint would have to keep.

    (The place in the ptx stream is a function of the policy steps made, so it is not repeated here.)
    """

    best: BestRule
    step: int = 0
    next_place: int = 0  # place of the next prompt in the run: order and random streams follow from it
    moments: RunningMoments = field(default_factory=RunningMoments)


@dataclass
class Run:
    """What a run is made of; after `build` only `state`, the engines and the ptx stream's place change."""

    config: PPOConfig
    tokenizer: object
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    models: Models
    reward_fn: RewardFunction | None
    pretrain: Iterator[PretrainBatch] | None
    logger: RunLogger
    state: RunState

    def next_prompts(self) -> PromptBatch:
        """This rank's share of the next num_rollouts prompts, each with its place in the run."""
        config, start = self.config, self.state.next_place
        self.state.next_place += config.num_rollouts
        chosen = [self.prompts[i] for i in order(start, config.num_rollouts, len(self.prompts), config.seed)]
        return own_share(chosen, list(range(start, self.state.next_place)))

    def learning_rates(self, step: int) -> tuple[float, float]:
        """(policy's, critic's) at a step counted from 0. The policy's is 0 as long as only the critic trains."""
        config = self.config

        def factor(at: int, total: int) -> float:
            return lr_factor(at, config.warmup_steps, total, config.lr_schedule)

        start = config.critic_pretrain_steps
        lr = 0.0 if step < start else config.lr * factor(step - start, config.train_steps)
        return lr, config.critic_lr * factor(step, config.total_steps)

    def export(self, name: str) -> None:
        """Writes the policy to the run's folder `name`. Collective; rank 0 writes, the others wait."""
        state = self.models.policy.full_state_dict()
        if is_main():
            config = self.config
            save_causal_lm(
                self.models.policy.module.lm.config,
                {key.removeprefix("lm."): value for key, value in state.items()},
                f"{config.model_save_path}/{name}",
                self.tokenizer,
                do_sample=True, temperature=EVALUATION.temperature, top_p=EVALUATION.topp,
                repetition_penalty=EVALUATION.repetition_penalty, max_new_tokens=config.maxlen_res,
            )  # fmt: skip
        barrier()

    def after_step(self, rollout: Rollout, scores: Scores, prompts: PromptBatch, metrics: dict[str, float]) -> None:
        """Writes the step's metrics and some texts; evaluates and keeps the best where that is due. Collective."""
        config, step = self.config, self.state.step
        if self.eval_prompts and (step % config.save_per_step == 0 or step == config.total_steps):
            metrics = metrics | self.evaluate()
        self.logger.metrics(step, metrics)
        self.logger.samples(step, self._texts(rollout, scores, prompts))
        self.logger.advance()

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out prompts, keys `eval_...`; exports best/ when the rule says so. Collective."""
        metrics, rows = evaluate(
            self.eval_prompts, self.models, self.reward_fn, self.tokenizer, self.config, EVALUATION
        )
        better = self.state.best.improves(metrics)
        self.logger.say(
            f"step {self.state.step}: held-out score {metrics['score_mean']:.3f}, KL {metrics['kl_ref']:.2f}, "
            f"length {metrics['response_length']:.1f}" + (" (best so far)" if better else "")
        )
        self.logger.samples(self.state.step, [{"held_out": True, **row} for row in rows[: self.config.num_samples]])
        if better:
            self.export("best")
        return {f"eval_{key}": value for key, value in metrics.items()}

    def _texts(self, rollout: Rollout, scores: Scores, prompts: PromptBatch) -> list[dict]:
        """The first samples of this rank (rank 0 writes them, and its rows come first in the gathered rollout)."""
        count = min(self.config.num_samples, len(prompts.ids))
        answers = [decode_answer(self.tokenizer, ids) for ids in response_ids(rollout.rows(slice(count)))]
        return [
            {"prompt": turns[-1]["content"], "answer": answer, "score": float(value)}
            for turns, answer, value in zip(prompts.turns, answers, scores.scores.tolist(), strict=False)
        ]


def build(config: PPOConfig) -> Run:
    """Checks everything that can be checked cheaply first, loads data and models, then makes the run's folder."""
    init_distributed()
    say = print if is_main() else _silent
    check_outputs(config)
    model_folder(config.policy_model_path, "--policy_model_path")
    model_folder(config.critic_model_path, "--critic_model_path")
    for path in config.reward_model_path:
        model_folder(path, "--reward_model_path")
    template = template_for(config.lang, config.template)
    reward_fn = load_reward_fn(config.reward_fn) if config.reward_fn else None
    tokenizer = load_tokenizer(config.tokenizer_name_or_path or config.policy_model_path, template)
    config.check_world(world_size(), len(tokenizer))
    room = config.maxlen_prompt - config.maxlen_res
    train, valid = load_prompts(config.data_path, tokenizer, template, room, config.num_eval_prompts, config.seed, say)
    if len(train) < config.num_rollouts:
        raise UserError(
            f"--num_rollouts {config.num_rollouts} asks for more prompts than the {len(train)} that "
            f"--data_path {config.data_path} has: lower it, or bring more prompts"
        )
    pretrain = load_pretrain(config, tokenizer, template, say) if config.use_ppo_pretrain_loss else None
    models = load_models(config, tokenizer, say)
    prepare_run_folder(config.model_save_path, config.overwrite, config)
    logger = RunLogger(config.model_save_path, config.logdir, config.report_to, asdict(config), config.total_steps)
    state = RunState(BestRule(config.best_max_kl))
    logger.say(str(state.best))
    if caveat := Sampling(config.temperature, config.topp, config.repetition_penalty).caveat:
        logger.say(caveat)
    return Run(config, tokenizer, train, valid[: config.num_eval_prompts], models, reward_fn, pretrain, logger, state)


def _silent(text: str) -> None:
    """Other ranks than the first say nothing."""
