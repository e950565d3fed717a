"""Breaks product code on purpose, one line at a time, and reports whether the tests notice.

    python -m tests.mutants [WORDS ...] [--list]

Each mutant is one line of product code with a mistake, and the tests that must fail because of it. The mistake is made
in a temporary copy of the files that git tracks. A test counts only if it passes there without the mistake. Exit code
1: a mutant was not caught; 2: a mutant does not fit the code, or its tests fail without it. Results: tests/MUTANTS.md.
"""

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# Read when the packages below are imported. A mutant may have the size and the time of the original: no .pyc files.
os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1"}
sys.dont_write_bytecode = True

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("ppo/", "reward/", "sft/", "data/", "utils/", "train_ppo.py", "merge_")
PACKAGES = ("pytest", "safetensors.torch", "transformers.models.llama.modeling_llama")
PACKAGES += ("deepspeed.runtime.zero.muon.muon_optimizer",)  # takes seconds, as in tests/faults/scenarios.py
LIMIT = 1800  # seconds that one call of pytest may take: the first one runs all tests that mutants name


class Mutant(NamedTuple):
    """A mistake. `old` occurs once in the product's code, and `new` takes its place.

    name: what is broken; tests: files, or single tests, below tests/ that fail then, separated by spaces.
    """

    name: str
    old: str
    new: str
    tests: str


# fmt: off
MUTANTS = [Mutant(*mutant) for mutant in (
    # Rollout: masks, ends, positions, random streams
    ("mask from ids instead of lengths", "attention_mask = places < lengths[:, None]",
     "attention_mask = sequences != pad_id", "unit/test_traps.py"),
    ("only the first stop id ends a response", "(token[:, None] == self.stops).any(1)", "(token == self.stops[0])",
     "unit/test_decoding.py"),
    ("end token not part of the response", "return [row[:length] for row, length in zip(values, self.lengths",
     "return [row[: length - 1] for row, length in zip(values, self.lengths", "unit/test_decoding.py"),
    ("positions count padding", "self._logits(ids, mask, position_ids(mask))",
     "self._logits(ids, mask, torch.arange(ids.shape[1]).expand_as(ids))", "unit/test_decoding.py"),
    ("position_ids not clamped", "(attention_mask.long().cumsum(-1) - 1).clamp(min=0)",
     "attention_mask.long().cumsum(-1) - 1", "unit/test_masked.py"),
    ("random stream by batch instead of place", "uniforms(self.seed, self.places[prompt][:, None], positions)",
     "uniforms(self.seed, prompt[:, None], positions)", "unit/test_decoding.py"),
    ("random number repeats at every position",
     "key = _mix(key ^ _mix((torch.zeros_like(places) + position + 1) * GOLDEN_GAMMA))",
     "key = _mix(key).expand(torch.broadcast_shapes(places.shape, torch.as_tensor(position).shape))",
     "unit/test_sampling.py"),
    ("penalty divides negative logits", "torch.where(logits > 0, logits / penalty, logits * penalty)",
     "logits / penalty", "unit/test_sampling.py"),
    ("penalty on the last response of the slot", 'slots["seen"][new] = False', "pass", "unit/test_decoding.py"),
    ("nucleus without the token that reaches top-p", "ordered.cumsum(-1) - ordered >= topp",
     "ordered.cumsum(-1) >= topp", "unit/test_sampling.py"),
    ("cache: a moved slot keeps old keys", "x[target, ..., columns, :] = x[source, ..., columns, :]", "pass",
     "unit/test_decoding.py"),
    ("cache: the mask of an old slot stays", "self.mask[self.rows, : self.end - width] = False", "pass",
     "unit/test_decoding.py"),
    ("cache: the device does not hear of new prompts", "self.lengths += lengths\n        self.first_is_old = True",
     "self.lengths += lengths", "unit/test_step_graphs.py"),
    ("heads of a new token are not normed", 'if hasattr(attention, "q_norm"):', "if False:", "unit/test_decoding.py"),
    ("ragged kernel reads from column 0", "start = tl.minimum(tl.load(first + slot), stop - 1)", "start = stop - stop",
     "unit/test_ragged_attention.py"),
    # Scores
    ("log-probs at temperature 1", "return torch.log_softmax(logits.float() / temperature, -1)",
     "return torch.log_softmax(logits.float(), -1)", "unit/test_fast_paths.py"),
    ("log-prob gradient without temperature", "gradient[rows] = slope.div_(ctx.temperature)", "gradient[rows] = slope",
     "unit/test_fast_paths.py"),
    ("log-probs in bf16", "return torch.log_softmax(logits, -1, dtype=torch.float32)",
     "return torch.log_softmax(logits, -1).float()", "unit/test_traps.py"),
    ("entropy without its mean in the gradient", "by_entropy[rows, None] * (every + entropy[rows, None])",
     "by_entropy[rows, None] * every", "unit/test_fast_paths.py"),
    # Advantage estimators
    ("RLOO: a response is in its own baseline", "* sizes / (sizes - 1).clamp(min=1)", "", "unit/test_estimators.py"),
    ("GRPO: population deviation", "(squares / (sizes - 1).clamp(min=1))", "(squares / sizes)",
     "unit/test_estimators.py"),
    ("decoupled GAE: the critic learns with the policy's lambda",
     "gae(rewards, values, response_mask, gamma, critic_lam)[1]", "gae(rewards, values, response_mask, gamma, lam)[1]",
     "unit/test_estimators.py"),
    ("length-adaptive lambda below 0", "1 / (length_alpha * lengths)).clamp(min=0)", "1 / (length_alpha * lengths))",
     "unit/test_estimators.py"),
    ("OPO: lengths do not weigh", "sum_by_group(lengths * totals, groups) / weights", "_group_mean(totals, groups)",
     "unit/test_estimators.py"),
    ("discounted sums: the decay is not squared", "reach, decay = 2 * reach, decay**2",
     "reach, decay = 2 * reach, decay", "unit/test_estimators.py"),
    ("values not shifted", "lambda part: (shift_to_next(critic(part.sequences, before(part.response_mask))),),",
     "lambda part: (critic(part.sequences, part.response_mask),),", "unit/test_score.py"),
    ("fewer scoring forwards on a rank with less", "return batches + [[shortest]] * (most - len(batches))",
     "return batches", "unit/test_reward_models.py"),
    ("reference not asked", "moved = _differ(policy.module, reference)", "moved = False",
     "unit/test_score.py"),
    ("reward_fn may return too few numbers", "if len(numbers) != count:", "if False:",
     "unit/test_user_reward.py"),
    ("reward_fn changes our dialogues", "(copy.deepcopy(prompts), list(answers), **copy.deepcopy(columns))",
     "(prompts, answers, **columns)", "unit/test_user_reward.py"),
    ("reward_fn gets columns that it does not take", "if name in self.optional or (self.takes_all and",
     "if True or (self.takes_all and", "unit/test_user_reward.py"),
    ("weights of reward_fn left out", "None if x is None else function.weight * x", "None if x is None else x",
     "unit/test_user_reward.py"),
    ("reward model reads an open turn",
     "closed.append([*ids[: None if window is None else window - len(end.ids)], *end.ids])",
     "closed.append(ids[:window])", "unit/test_reward_models.py"),
    ("ensemble rule adds the deviation", "return mean - self.std_coef * scores.std(1, correction=0)",
     "return mean + self.std_coef * scores.std(1, correction=0)", "unit/test_ensemble.py"),
    ("models of two meanings share an ensemble", "if meaning != meanings[0]:", "if False:", "unit/test_ensemble.py"),
    # Experience
    ("KL with the wrong sign", "rewards = (-kl_coef * kl)", "rewards = (kl_coef * kl)", "unit/test_numerics.py"),
    ("score on the first token", "last = last_index(response_mask)", "last = response_mask.int().argmax(1)",
     "unit/test_numerics.py"),
    ("KL clipped with the score", "mask, kl_coef if config.kl_in == \"reward\" else 0.0)",
     "mask, kl_coef if config.kl_in == \"reward\" else 0.0).clamp(-config.reward_clip, config.reward_clip)",
     "unit/test_experience.py"),
    ("answers without a score are trained on", "return rollout.rows(~scores.failed), scores.rows(~scores.failed)",
     "return rollout, scores", "unit/test_failed_scores.py"),
    ("a small minibatch is left over", "generator=generator).tensor_split(num_batches)",
     "generator=generator).split(config.batch_size)", "unit/test_failed_scores.py"),
    ("statistics without this batch", "moments.update(raw)", "pass", "unit/test_experience.py"),
    ("k3 without its linear term", "return torch.expm1(difference) - difference", "return torch.expm1(difference)",
     "unit/test_numerics.py"),
    ("GAE without gamma in lambda's decay", "_discounted_sums(deltas, gamma * lam)", "_discounted_sums(deltas, lam)",
     "unit/test_numerics.py"),
    ("GAE reads padding", "(torch.where(inside, x.double().gather(1, order), 0.0) for x in",
     "(x.double().gather(1, order) for x in", "unit/test_numerics.py"),
    ("whitening leaves padding", "centred = (x - total / count).masked_fill(~mask, 0.0)", "centred = x - total / count",
     "unit/test_masked.py"),
    ("whitening by this rank's variance", "variance = sum_ranks(centred.square().sum()) / count",
     "variance = centred.square().sum() / count", "unit/test_masked.py"),
    ("running moments of this rank", "float(sum_ranks((x - batch_mean).square().sum()))",
     "float((x - batch_mean).square().sum())", "unit/test_masked.py"),
    ("running deviation of the population", "(self._squares / (self.count - 1)) ** 0.5",
     "(self._squares / self.count) ** 0.5", "unit/test_masked.py"),
    ("perplexity as a mean of means", "torch.exp(-masked_mean(scores.old_logprobs, mask))",
     "torch.exp(-(scores.old_logprobs.sum(1) / mask.sum(1).clamp(min=1)).mean())", "unit/test_experience.py"),
    ("truncated responses gain the penalty", "torch.where(rollout.ended, 0.0, -config.missing_eos_penalty)",
     "torch.where(rollout.ended, 0.0, config.missing_eos_penalty)", "unit/test_experience.py"),
    ("a NaN score passes", "wrong = (~(scores.abs() <= limit)).nonzero()", "wrong = (scores.abs() > limit).nonzero()",
     "unit/test_experience.py"),
    ("a gap that is not finite passes", "if kl <= limit:", "if not kl > limit:", "unit/test_sampler_gap.py"),
    ("importance weights upside down", "log_ratio = (old_logprobs - sampler_logprobs)",
     "log_ratio = (sampler_logprobs - old_logprobs)", "unit/test_sampler_gap.py"),
    ("importance weights reach no loss", "else part.weights * part.advantages", "else part.advantages",
     "unit/test_sampler_gap.py"),
    # Update
    ("value clip around zero", "return old_values + (values - old_values).clamp(-clip, clip)",
     "return values.clamp(-clip, clip)", "unit/test_numerics.py"),
    ("value clip takes the smaller loss", "squares = torch.maximum(squares,", "squares = torch.minimum(squares,",
     "unit/test_numerics.py"),
    ("surrogate takes the larger term", "surrogate = torch.minimum(surrogate,", "surrogate = torch.maximum(surrogate,",
     "unit/test_numerics.py"),
    ("overlong responses gain the penalty", "penalties = penalties + overlong_penalty(",
     "penalties = penalties - overlong_penalty(", "unit/test_penalties.py"),
    ("statistics of whole scores, rewards of scores per token", "moments.update(raw)", "moments.update(scores.scores)",
     "unit/test_penalties.py"),
    ("weight of the KL changes while only the critic trains", "if self.policy_steps > 0:",
     "if True:", "end_to_end/test_loss_flags.py::test_the_weight_of_the_kl_adapts_and_survives_a_resume"),
    ("weight of the KL is not restored", '= state.get("kl_coef"), None', "= None, None",
     "end_to_end/test_loss_flags.py::test_the_weight_of_the_kl_adapts_and_survives_a_resume"),
    ("dual clip of positive advantages",
     "torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)",
     "torch.maximum(surrogate, dual_clip * advantages)", "unit/test_losses.py"),
    ("ratio of a sequence is not a mean",
     "means = logs.sum(1, keepdim=True) / response_mask.sum(1, keepdim=True).clamp(min=1)",
     "means = logs.sum(1, keepdim=True)",
     "unit/test_losses.py"),
    ("empty responses count in the average", "lengths.sum(), (lengths > 0).float()",
     "lengths.sum(), torch.ones_like(lengths)", "unit/test_losses.py"),
    ("average of the surrogate alone", "masked_sum(kl if rows is None else rows * kl, mask)", "masked_sum(kl, mask)",
     "unit/test_losses.py"),
    ("average over this micro-batch", "None if part.row_weights is None else part.row_weights[:, None]",
     "None if part.row_weights is None else row_weights(part.response_mask, part.groups, "
     "config.loss_average, config.maxlen_res)[:, None]",
     "unit/test_losses.py"),
    ("policy loss by its own token count", "return masked_sum(-surrogate, response_mask) / num_tokens",
     "return masked_sum(-surrogate, response_mask) / response_mask.sum()", "unit/test_update.py"),
    ("entropy clip from below", "entropy.clamp(max=clip)", "entropy.clamp(min=clip)", "unit/test_numerics.py"),
    ("entropy clip above ln(vocabulary) allowed", "self.entropy_clip > math.log(vocab_size)",
     "self.entropy_clip > vocab_size", "bad_inputs/test_corpus.py"),
    ("dropout on in the update", 'module.training = getattr(module, "gradient_checkpointing", False)',
     "module.training = True",
     "unit/test_probe.py::test_a_router_that_draws_its_experts_in_training_does_not_in_the_update"),
    ("dropout of the model's config stays",
     "config = without_dropout(AutoConfig.from_pretrained(folder, trust_remote_code=False))",
     "config = AutoConfig.from_pretrained(folder, trust_remote_code=False)", "unit/test_traps.py"),
    ("dummy samples count", "masks = {name: getattr(part, name) & bool(weight) for",
     "masks = {name: getattr(part, name) for", "unit/test_update.py"),
    ("layers are computed again with other adapters",
     "            if isinstance(self.module, Adapted):\n                self.module.activate()\n", "",
     "unit/test_adapters.py"),
    ("scalars with other adapters", "        self.activate()\n        read = attention_mask.bool()",
     "        read = attention_mask.bool()", "unit/test_adapters.py"),
    ("adapters merged in the dtype of the weights", "base.weight.data = held.float()", "base.weight.data = held",
     "unit/test_adapters.py"),
    ("adapters are added without their scale", "alpha=self.scaling[name]", "alpha=1.0", "unit/test_adapters.py"),
    ("weights with a merged adapter are not trained", "    decoder.requires_grad_(True)  # peft has frozen them\n", "",
     "unit/test_adapters.py"),
    ("merged weights stay", "        layer.merged_adapters.clear()\n        base.weight.data = held",
     "        layer.merged_adapters.clear()", "unit/test_adapters.py"),
    ("a model trains the adapters of others", 'for name, x in trained.items() if "lora_" not in name or',
     "for name, x in trained.items() if True or", "unit/test_adapters.py"),
    ("adapters are joined without their scale", "layer.lora_B[name].weight * layer.scaling[name]",
     "layer.lora_B[name].weight", "unit/test_adapters.py"),
    ("a trained adapter counts as new", "own in x.lora_variant or bool(x.lora_B[own].weight.any())", "False",
     "unit/test_adapters.py"),
    ("gradients of adapters are not watched", "if adapted or len(whole_shape(parameter)) == 1:",
     "if len(whole_shape(parameter)) == 1:", "unit/test_adapters.py"),
    ("--share_base never shares", "return self.decoders.get(self.content[path]) if self.share else None",
     "return self.decoders.get(self.content[path])",
     "end_to_end/test_lora.py::test_four_models_share_one_base"),
    ("the plan counts shared weights again", "known = bool(config.lora_rank) and", "known = False and",
     "end_to_end/test_lora.py::test_the_plan_counts_shared_weights_once"),
    ("adapters on an adapter are written without it", "tokenizer, say, split=split, merge=not config.lora_rank",
     "tokenizer, say, split=split, merge=True", "end_to_end/test_lora.py::test_adapters_trained_on_an_adapter"),
    ("settings of a base are not compared", "return (repr(sorted(settings.items())), *known_sha256(files))",
     "return (*known_sha256(files),)", "end_to_end/test_lora.py::test_other_settings_are_another_base"),
    ("an adapted critic is not pre-trained", 'bool(settings.get("value_pretrained"))', "False",
     "end_to_end/test_lora.py::test_a_critic_trained_before_ppo"),
    ("the reference has the policy's new adapter", "reference.model.share(model.decoder, *model.adapters)",
     "reference.model.share(model.decoder, *model.adapters, \"policy\")",
     "end_to_end/test_lora.py::test_four_models_share_one_base"),
    ("another base resumes", " | {name: folder / name for name in ([file.name, *shards] if file else ())}", "",
     "end_to_end/test_lora.py::test_another_base_is_refused"),
    ("ptx loss without its weight", "policy.backward(weight * nll / num_tokens)", "policy.backward(nll / num_tokens)",
     "unit/test_update.py"),
    ("policy steps without the critic's consent", "        if problem is None:\n",
     "        if problem is None or learner.engine.name not in problem:\n", "unit/test_engine.py"),
    ("a NaN loss passes", "if not abs(total) <= limit:", "if abs(total) > limit:", "unit/test_engine.py"),
    ("gradients are not clipped", '"gradient_clipping": config.gradient_clip if', '"gradient_clipping": 0.0 if',
     "unit/test_engine.py"),
    ("critic's learning rate warms up like the policy's", "min(1.0, (step + 1) / max(1, alone // 10))",
     "min(1.0, (step + 1) / max(1, config.warmup_steps))", "unit/test_critic_pretraining.py"),
    ("value clip while the critic trains alone", "if config.use_critic_loss_clip and clipped else 0.0",
     "if config.use_critic_loss_clip else 0.0", "unit/test_critic_pretraining.py"),
    ("best policy whatever its KL", 'metrics["kl_ref"] <= max_kl and', "True and", "unit/test_traps.py"),
    ("cosine ends at zero", "return FLOOR + (1 - FLOOR) * 0.5", "return 0.5", "unit/test_run.py"),
    # Critic: passes, unit of its head, diagnosis
    ("critic: passes of its own are the policy's", "(CRITIC,) * (epoch < critic_epochs)",
     "(CRITIC,) * (epoch < policy_epochs)", "unit/test_critic_updates.py"),
    ("PopArt: the head's weight moves the wrong way", "unit.scale / new[1])", "new[1] / unit.scale)",
     "unit/test_value_norm.py"),
    ("value loss in units of the return", "(x / critic.module.score_scale for x in", "(x for x in",
     "unit/test_value_norm.py"),
    ("the unit of values is lost on resume", "state.value_moments.std if state.value_moments else 1.0", "1.0",
     "unit/test_value_norm.py"),
    ("noise of returns is biased by small groups", "within * (1.0 - counts.reciprocal().mean())", "within",
     "unit/test_critic_metrics.py"),
    # Reward model and SFT
    ("margin added", "difference = chosen_scores.float() - rejected_scores.float() - margin",
     "difference = chosen_scores.float() - rejected_scores.float() + margin", "unit/test_reward_metrics.py"),
    ("label smoothing on the same side", "- label_smoothing * F.logsigmoid(-difference)",
     "- label_smoothing * F.logsigmoid(difference)", "unit/test_reward_metrics.py"),
    ("ranking loss with the wrong sign", "-(1 - label_smoothing) * F.logsigmoid(difference)",
     "-(1 - label_smoothing) * F.logsigmoid(-difference)", "unit/test_reward_metrics.py"),
    ("a tie counts as a hit", "return 0.5 * (torch.sign(chosen_scores.float() - rejected_scores.float()) + 1)",
     "return (chosen_scores >= rejected_scores).float()", "unit/test_reward_metrics.py"),
    ("every pair of a ranked list weighs one", "weights += [1 / len(item.pairs)] * len(item.pairs)",
     "weights += [1.0] * len(item.pairs)", "unit/test_reward_encode.py"),
    ("flipped pairs keep their sides", "return Pair(pair.worse, pair.better, -pair.strength, margin)",
     "return Pair(pair.better, pair.worse, -pair.strength, margin)", "unit/test_preferences.py"),
    ("a preference for the first is one for the second", "return _two(value, read, first, second, number > 0, abs",
     "return _two(value, read, first, second, number < 0, abs", "unit/test_preference_forms.py"),
    ("the worst rank is the best", "quality = scores or [-rank for rank in ranks or range(len(answers))]",
     "quality = scores or [rank for rank in ranks or range(len(answers))]", "unit/test_preference_forms.py"),
    ("a system turn of a prompt is dropped",
     "return check_turns([prompt[0], *turns]) if missing else turns", "return turns",
     "unit/test_preference_forms.py"),
    ("score read at the first token", "return values.gather(1, last_index(attention_mask).unsqueeze(1)).squeeze(1)",
     "return values[:, 0]", "unit/test_reward_model.py"),
    ("packed dialogues see each other", 'packed = {} if positions is None else {"position_ids": positions}',
     "packed = {}", "unit/test_sft_rows.py"),
    ("joined rows see each other", 'options["attention_mask"] = lengths.view(1, 1, 1, -1)',
     'options["attention_mask"] = lengths.sum().view(1, 1, 1, 1)', "unit/test_fast_paths.py"),
    ("a shared head is called by need", "count = max(1, -(-(even_tokens or len(targets)) // chunk))",
     "count = max(1, -(-len(targets) // chunk))", "unit/test_sft_rows.py"),
    ("dummy items count", "+ [(idle, 0.0)] * missing", "+ [(idle, 1.0)] * missing", "unit/test_batching.py"),
    ("micro-batches of a supervised step not weighted", "engine.backward(weight * sum(w * sums[name]",
     "engine.backward(sum(w * sums[name]", "unit/test_supervised_step.py"),
    # Text and data
    ("no end token behind a question", "human + texts.plain(_stretch(turn, template)) + eos, []",
     "human + texts.plain(_stretch(turn, template)), []", "unit/test_template.py"),
    ("special tokens in a text become tokens", "self._encode(self._plain, texts, True)",
     "self._encode(self._plain, texts, False)", "unit/test_template.py"),
    ("rendered texts are cut behind special tokens", "cuts = [found.start() for found in",
     "cuts = [found.end() for found in", "unit/test_encode.py"),
    ("texts are cut before tags that take in spaces", "any(token.lstrip or token.single_word for token in tokens)",
     "any(token.single_word for token in tokens)", "unit/test_encode.py"),
    ("unknown characters are no added tokens", 'texts = [text if unknown in ids else "" for',
     'texts = ["" for', "unit/test_encode.py"),
    ("pad left as the end token", "tokenizer.pad_token not in (tokenizer.eos_token, tokenizer.bos_token)", "True",
     "unit/test_tokenizer.py"),
    ("template's end of a turn ends no answer", "reasons[turn_end(tokenizer, template).stop].append", "[].append",
     "unit/test_choose_template.py"),
    ("truncation drops the system turn", "return system + spoken[2 * min(low, last) :],",
     "return spoken[2 * min(low, last) :],", "unit/test_data.py"),
    ("truncated prompts are not counted", 'tally.add("truncated (oldest turns dropped)", record.source)', "pass",
     "unit/test_data.py"),
    ("rows that are held out are trained on", "index + bisect_right(self._shift, index)", "index",
     "unit/test_encoded.py"),
    ("encoded data of another tokenizer is used", 'given["tokenizer"] = _tokenizer_digest(given["tokenizer"])',
     'given["tokenizer"] = ""', "unit/test_encoded.py"),
    ("spaces that an added token takes do not count", "(i, token.__getstate__()) for i, token in",
     "(i, str(token)) for i, token in", "unit/test_encoded.py"),
    ("a cut file of encoded data is used", 'whole = about["bytes"] == os.path.getsize(os.path.join(folder, ROWS))',
     "whole = True", "unit/test_encoded.py"),
    ("each chunk of records begins at 0", 'pyarrow.compute.add(batch.column("record"), usable)',
     'batch.column("record")', "unit/test_encoded.py"),
    ("bad records are not counted", 'tally.add(f"dropped: {error}", record.source)', "pass", "unit/test_data.py"),
    ("half a surrogate pair passes", "return not text.isascii() and _SURROGATES.search(text) is not None",
     "return False", "unit/test_data.py"),
    ("a deep JSON file ends in a traceback", "except (OSError, ValueError, RecursionError) as error:",
     "except (OSError, ValueError) as error:", "unit/test_weight_bad_input.py"),
    ("the same order in every epoch", "_permutation(seed, k // num_items, num_items)",
     "_permutation(seed, 0, num_items)", "unit/test_batching.py"),
    ("the system column is dropped", 'return [{"role": "system", "content": record[key]}, *turns]', "return turns",
     "unit/test_dialogue_forms.py"),
    ("earlier turns are dropped", "turns = _history_of(value, options, note) + turns",
     "_history_of(value, options, note)", "unit/test_dialogue_forms.py"),
    ("renamed columns are not preferred", "found.sort(key=lambda one: one[1] not in mapped)", "pass",
     "unit/test_dialogue_forms.py"),
    ("columns beside a prompt are lost", "for key, item in columns if key not in used",
     "for key, item in columns if False", "unit/test_dialogue_forms.py"),
    ("data.show: held-out records that cannot be used overlap", "np.isin(valid, train) & (valid != 0)",
     "np.isin(valid, train)", "unit/test_show.py"),
    ("data.show: tags in the data are tags of the page", "html.escape(p.text)", "p.text", "unit/test_show.py"),
    ("data.show: prompts of pairs are learnt", "[False] * len(prompt) + [True] * trained",
     "[True] * (len(prompt) + trained)", "unit/test_show.py"),
    # Runs: resume, checkpoints, signals
    ("resume forgets the place in the prompts", '"step": self.step, "next_place": self.next_place,',
     '"step": self.step, "next_place": 0,', "unit/test_run.py"),
    ("resume forgets Python's random state", "random.setstate((version, tuple(numbers), gauss))", "pass",
     "unit/test_run.py"),
    ("resume restarts Adam's step count", "float(state.step), device", "0.0, device", "end_to_end/test_resume.py"),
    ("a supervised run resumes with the first batches", "for _ in range(done):", "for _ in range(0):",
     "end_to_end/test_resume.py::test_supervised_stages_resume_too"),
    ("resume with other flags", "if not config.resume_with_changes:\n            old", "if False:\n            old",
     "end_to_end/test_resume.py::test_what_may_not_go_on_is_refused_by_name"),
    ("a checkpoint is written in place", 'return f"{self.target}.partial"', "return self.target",
     "unit/test_checkpoint.py"),
    ("files and folders get their names before they are whole", "    sync(partial)\n", "    pass\n",
     "unit/test_checkpoint.py"),
    ("checkpoint hashes are not compared", 'and sha256(file) != entry["sha256"]:', "and False:",
     "unit/test_checkpoint.py"),
    ("files are not waited for", "os.fsync(file.fileno())", "pass", "unit/test_checkpoint.py"),
    ("weights change while a checkpoint is read", "self.read.wait()", "pass", "unit/test_checkpoint_content.py"),
    ("signals are not heard", "self.code, self._since = 128 + number, time.monotonic()",
     "self._since = time.monotonic()", "unit/test_run.py"),
    ("the watchdog sleeps", "idle += tick", "pass", "unit/test_watchdog.py"),
    ("a run is overwritten", "if holds_run(path) and not config.overwrite and not _can_resume(config):", "if False:",
     "end_to_end/test_bad_input.py::test_an_existing_run_is_kept"),
    ("two runs share a folder", "raise _in_use(path, content) from None", "pass",
     "unit/test_run_folder.py::test_a_second_process_is_refused_until_the_first_is_dead"),
    ("a folder is removed before the new one has its name", "os.rename(path, path + ASIDE)", "remove(path)",
     "unit/test_run_folder.py"),
    ("the user's files go with a checkpoint", "    foreign = foreign_files(path, names)\n", "    foreign = []\n",
     "unit/test_checkpoint.py::test_what_the_run_did_not_write_is_kept"),
    ("moved checkpoints cost the history", "bool(read_index(path).last_checkpoint) and", "False and",
     "end_to_end/test_foreign_files.py"),
    # Weight diffs and hostile files
    ("hashes of tensors are not compared", "self._expected.get(name) != self.found[name]:", "False:",
     "unit/test_weight_diff.py"),
    ("the sum is made in the output's dtype", "buffer = torch.empty(CHUNK)",
     "buffer = torch.empty(CHUNK, dtype=dtype)", "unit/test_weight_diff.py"),
    ("pickles may run code", "weights_only=True, mmap=isinstance", "weights_only=False, mmap=isinstance",
     "security/test_code.py::test_nothing_else_in_the_sources_could_run_code"),
    ("an index names files elsewhere", 'Field(pattern="^[!-.0-~]{1,200}$")', "Field(min_length=1)",
     "unit/test_weight_bad_input.py"),
    ("code beside a tokenizer runs", "AutoTokenizer.from_pretrained(path, trust_remote_code=False)",
     "AutoTokenizer.from_pretrained(path, trust_remote_code=True)", "unit/test_imports.py"),
    # Model cards and uploads
    ("card: an address in a flag is told", 'if "://" in text:', "if False:", "unit/test_card.py"),
    ("card: a name is not escaped", 'return markdown(" ".join(text.split()))', 'return " ".join(text.split())',
     "unit/test_card.py"),
    ("upload: an adapter names a folder of this machine", "        if not is_hub_id(base):\n            why",
     "        if False:\n            why", "end_to_end/test_share.py"),
    ("upload: into a public model unasked", "if private and is_public:", "if False:", "end_to_end/test_share.py"),
    ("upload: what a user put into the folder goes, too",
     "names = set(files_in(folder)) - set(foreign_files(folder, FILES))", "names = set(files_in(folder))",
     "end_to_end/test_share.py"),
    # Plans and flags
    ("plan without Adam's second moment", "else 12 * sum(-(-n // gpus) for n in numels)",
     "else 8 * sum(-(-n // gpus) for n in numels)", "unit/test_plan.py"),
    ("auto slots ignore memory", "fitting = max(1, free // slot)", "fitting = prompts",
     "unit/test_plan.py::test_slots_of_7b_are_those_worked_out_by_hand"),
    ("bf16 without ZeRO", 'if self.zero_stage == 0 and self.dtype == "bf16":', "if False:",
     "bad_inputs/test_corpus.py"),
    ("lists of words only", '"nargs": "+", "type": get_args(kind)[0]', '"nargs": "+", "type": str',
     "unit/test_args.py"),
    ("abbreviated flags", "FlagParser(allow_abbrev=False, add_help=False,", "FlagParser(add_help=False,",
     "unit/test_args.py"),
    ("a preset wins over a flag", "config.__init__(**values | given)", "config.__init__(**given | values)",
     "unit/test_args.py"),
    ("what was in host memory does not come back", "            tensor.copy_(copy)\n", "            pass\n",
     "unit/test_offload.py"),
    ("states leave while a checkpoint reads them", "self.before_change()\n        with emptied(", "with emptied(",
     "unit/test_offload.py"),
    ("vLLM's cache takes what training holds", "- sum(row[0] for row in rows.values()) - sum(fixed.values())",
     "- sum(fixed.values())", "unit/test_plan_vllm.py"),
    ("vLLM of another version passes", "if not version.startswith(VERSION):", "if False:", "unit/test_vllm_start.py"),
    ("vLLM's cache lacks its own block", "return (slots * row + BLOCK) * token", "return slots * row * token",
     "unit/test_vllm_start.py"),
    # Reports
    ("a long line loses its peaks", "for f in (min, max)}", "for f in (min,)}", "unit/test_report_page.py"),
    ("samples are not escaped", "<pre>{html.escape(text[:MAX_TEXT])}", "<pre>{text[:MAX_TEXT]}",
     "unit/test_report_page.py"),
    ("a report shows control characters", "printable(html_page(title, body, style, script if",
     "str(html_page(title, body, style, script if", "unit/test_report_page.py"),
    ("the report's best step has an alarm", 'if row["step"] not in alarmed and', "if", "unit/test_report_page.py"),
    ("a comparison of an earlier model is shown", "if file.stat().st_mtime >= written:", "if True:",
     "unit/test_report_page.py"),
    ("a report finds the wrong lines of samples", "            offset += len(line)\n", "            offset += 1\n",
     "unit/test_report_page.py"),
    ("a critic that reached its target is not finished", "if run.trains_critic_only and run.has_final:", "if False:",
     "unit/test_report_page.py"),
    ("a report that fails stops the run", "except Exception as error:  # noqa: BLE001 -- also",
     "except KeyError as error:  #",
     "end_to_end/test_report.py::test_a_report_that_cannot_be_written_does_not_stop_a_run"),
    # Two ranks
    ("gradients averaged over ranks", "self.engine.backward(loss * world_size())", "self.engine.backward(loss)",
     "distributed/test_engine_ranks.py::test_two_ranks_add_gradients_up_in_float32"),
    ("ranks' samples out of order", "gather_rows(rows)[order]", "gather_rows(rows)",
     "distributed/test_two_ranks.py::test_several_reward_models_score_as_on_one_process"),
    ("one rank stops alone", "(code := max_ranks(Stop.current.code, device()))", "(code := Stop.current.code)",
     "faults/test_signals.py::test_a_signal_to_one_rank_stops_both"),
    ("a stop does not go back in random streams", "set_random_state(streams)\n        self.", "self.",
     "faults/test_signals.py::test_a_signal_interrupts_reward_functions_on_all_ranks_and_random_streams_go_back"),
    ("decoding does not hear a signal", "state = 2 if requested() else int(self.busy)", "state = int(self.busy)",
     "unit/test_decoding.py::test_decoding_ends_soon_after_a_signal"),
    # Over-optimisation of a run, benchmarks
    ("Gao's fit without the cross term", "(c * x - b * y) / determinant", "x / a", "unit/test_overoptimisation.py"),
    ("scores part within their noise", "if rise[1] > 0 > fall[2]:", "if rise[0] > 0 > fall[0]:",
     "unit/test_overoptimisation.py"),
    ("scores part by chance, one pair at a time", "(simultaneous(x[i] - x[since], pairs)", "(interval(x[i] - x[since])",
     "unit/test_overoptimisation.py::test_flat_held_out_scores_part_in_few_runs"),
    ("weights of the run's reward functions are forgotten", "    return flag\n\n\n", "    return []\n\n\n",
     "unit/test_overoptimisation.py::test_weights_of_the_runs_functions"),
    ("a reward model is compared as a policy", 'if "Classification" in kinds:', "if False:",
     "end_to_end/test_compare.py::test_a_reward_model_is_no_policy"),
    ("a checkpoint's weights are not read", "weights.read(\"weight\", name, 0, flat)",
     "flat = parameter.float().flatten()",
     "end_to_end/test_checkpoints_compared.py::test_weights_of_a_checkpoint_equal_those_that_were_exported"),
    ("RewardBench: math-prm by its number of pairs", "\"math-prm\": 984", "\"math-prm\": 447",
     "unit/test_evaluation_groups.py::test_sections_are_weighted_as_the_benchmark_does"),
    ("benchmark: items are not paired", "differences = [b - a for a, b in zip(before, after, strict=True)]",
     "differences = [b - a for a, b in zip(sorted(before), sorted(after), strict=True)]",
     "end_to_end/test_benchmark.py::test_paired_difference_by_hand"),
    # Weights in vLLM; these tests need it
    ("vLLM: a packed head is not compared", "    if is_packed:", "    if is_packed and not held.numel():",
     "vllm/test_faults.py"),
    ("vLLM: weights are compared to a tolerance", "    if torch.equal(x, y):",
     "    if torch.allclose(x, y, atol=1e-5):", "vllm/test_faults.py"),
    ("vLLM: buffers are not compared", "        for name, x in self.buffers.items():", "        for name, x in ():",
     "vllm/test_faults.py"),
    ("vLLM: a tensor that only vLLM has is not noticed", "    for name in missing:", "    for name in ():",
     "vllm/test_faults.py"),
    ("vLLM: weights count as compared after sleep", "                self.version = None\n", "",
     "vllm/test_faults.py"),
    ("vLLM: it is awake when optimizer states come back", "                self.engine.sleep()\n", "",
     "vllm/test_faults.py"),
    # Ranks that share a model in vLLM; these tests need it
    ("vLLM: a copied head of keys is not compared", "copied = module.tp_rank // module.num_kv_head_replicas",
     "copied = module.tp_rank", "vllm/test_ranks.py"),
    ("vLLM: a rank that finds a fault leaves the others in a gather", "        collections.deque(weights, maxlen=0)",
     "        ()", "vllm/test_ranks.py"),
    # Chat
    ("a streamed response goes on after its end token", 'if self.slots["ended"][0]:', "if False:",
     "end_to_end/test_chat.py::test_the_stream_of_a_response_is_that_of_a_batch"),
    ("half a character is shown", '.rstrip("\\ufffd").rstrip()', "",
     "end_to_end/test_chat.py::test_texts_grow_by_whole_characters"),
    ("/retry draws the same answer", "self.num_questions, self.num_questions + 1", "0, self.num_questions + 1",
     "end_to_end/test_chat.py::test_commands"),
    ("chat leaves no room for the answer", "room = self.config.maxlen_prompt - self.config.maxlen_res",
     "room = self.config.maxlen_prompt",
     "end_to_end/test_chat.py::test_a_dialogue_longer_than_the_window_loses_its_oldest_turns"),
    # A judge of answers
    ("an answer can fake its delimiter", "hashlib.sha256(json.dumps([prompt, first, second]).encode())",
     "hashlib.sha256(prompt.encode())", "unit/test_judge.py::test_an_answer_cannot_end_its_delimiters"),
    ("the second order of two answers is not turned", "(1 - verdicts[:, 0] + verdicts[:, 1]) / 2",
     "(verdicts[:, 0] + verdicts[:, 1]) / 2", "unit/test_judge_statistics.py"),
    ("length control without lengths", "numpy.tanh(difference / spread) if spread", "0 * outcome if spread",
     "unit/test_judge_statistics.py"),
    ("a judge's replies reach the file late", 'row) + "\\n")\n                file.flush()\n',
     'row) + "\\n")\n',
     "end_to_end/test_compare_judge.py::test_a_run_that_is_killed_has_lost_nothing"),
    ("a text that is refused ends the judge's run", "REFUSED = (400, 413, 422)", "REFUSED = ()",
     "unit/test_judge.py::test_a_prompt_that_the_server_refuses_has_no_verdict"),
    ("a request that fails cancels the others", "                errors.append(error)\n\n        with self._open()",
     "                raise\n\n        with self._open()",
     "unit/test_judge.py::test_requests_under_way_end_when_another_one_fails"),
    ("equal lengths where all differ by the same", "if not spread and difference.any()", "if False",
     "unit/test_judge_statistics.py::test_length_control_without_a_difference_or_a_loss"),
    # What a run prints and sends
    ("notices: the command line in config.json shows the URL", "sys.argv[:] = [word.replace(url, HIDDEN)",
     "_ = [word.replace(url, HIDDEN)", "unit/test_notices.py"),
    ("text of others goes on a bar's line", "if SafeStream._after_bar and not start:", "if False:",
     "unit/test_display.py"),
    ("samples: KL of the reference to the policy", "(scores.old_logprobs - scores.ref_logprobs).sum(1),",
     "(scores.ref_logprobs - scores.old_logprobs).sum(1),", "end_to_end/test_train_ppo.py"),
    ("metrics of the critic have no group", '"4_critic": r"value_|return_|', '"4_critic": r"',
     "unit/test_metric_groups.py"),
)]
# fmt: on


def tracked_files() -> list[str]:
    """The files that git tracks and that are still there, relative to the root."""
    command = ["git", "ls-files", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def find(mutant: Mutant, texts: dict[str, str]) -> str | None:
    """Returns the file whose text holds `old`. None, with a line of error, unless it occurs once in all of them."""
    places = [name for name, text in texts.items() for _ in range(text.count(mutant.old))]
    if len(places) == 1:
        return places[0]
    where = f"occurs {len(places)} times ({', '.join(places)})" if places else "is not in the product code"
    print(f"error: {mutant.name}: {mutant.old!r} {where}; update tests/mutants.py", file=sys.stderr)
    return None


def import_packages() -> None:
    """Imports what tests and product code import, but none of our own modules."""
    for name in PACKAGES:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)  # a process that has threads must not be forked


def run_tests(folder: Path, tests: str) -> tuple[int | None, str]:
    """Runs tests in a copy until one fails. Returns pytest's exit code, None after LIMIT seconds, and its output.

    They run in a fork of this process, which has imported all packages: imports take longer than most of the tests.
    """
    words = ["-x", "-q", "--tb=line", "-rfE", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests.split())]
    log, deadline = folder / "mutants.log", time.monotonic() + LIMIT
    child = os.fork()
    if not child:
        code = 3
        try:
            os.setsid()
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.chdir(folder)
            sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
            del sys.modules["tests"]  # of the original
            code = int(sys.modules["pytest"].main(words))
            sys.stdout.flush()
        finally:  # whatever happens, this process must not go on as the parent
            os._exit(code)
    try:
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                return None, f"no result after {LIMIT} s"
            time.sleep(0.05)
    finally:  # after Ctrl-C, too; with the ranks that tests start
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(done[1]), log.read_text("utf-8", "replace")


def verdict(code: int | None, output: str) -> str:
    """What caught the mutant, or why nothing did."""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    failed = [line.split()[1].removeprefix("tests/") for line in lines]
    if code == 1 and failed:
        return failed[0].replace("::", " ").split("[")[0]
    return "NOT caught" + ("" if code == 0 else f" (pytest: {code}; {output.strip().splitlines()[-1]})")


def main() -> int:
    """Runs the mutants whose names contain one of the words, or all of them. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="run the mutants whose names contain one of these; default: all")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    flags = parser.parse_args()
    chosen = [m for m in MUTANTS if not flags.words or any(word in m.name for word in flags.words)]
    files = tracked_files()
    product = [name for name in files if name.startswith(PRODUCT) and name.endswith(".py")]
    texts = {name: (ROOT / name).read_text("utf-8") for name in product}
    places = [find(mutant, texts) for mutant in chosen]
    if None in places:
        return 2
    if flags.list or not chosen:
        for mutant, place in zip(chosen, places, strict=True):
            print(f"{mutant.name}\n    {place}: {mutant.old}\n    -> {mutant.new}\n    {mutant.tests}")
        return 0
    import_packages()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file, follow_symlinks=False)
        tests = " ".join(dict.fromkeys(test for mutant in chosen for test in mutant.tests.split()))
        code, output = run_tests(folder, tests)
        if code != 0:
            print(f"{output}\nerror: these tests fail without any mutant", file=sys.stderr)
            return 2
        rows = []
        for mutant, place in zip(chosen, places, strict=True):
            began = time.monotonic()
            (folder / place).write_text(texts[place].replace(mutant.old, mutant.new), "utf-8")
            rows.append((mutant.name, verdict(*run_tests(folder, mutant.tests)), time.monotonic() - began))
            (folder / place).write_text(texts[place], "utf-8")
            print("| {} | {} | {:.0f} |".format(*rows[-1]), flush=True)
    missed = [name for name, caught, _ in rows if caught.startswith("NOT")]
    print(f"{len(rows)} mutants, {len(missed)} not caught" + "".join(f"\n  {name}" for name in missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
