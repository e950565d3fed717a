"""Generate answers to some held-out prompts, for samples.jsonl and TensorBoard."""

from contextlib import nullcontext

import torch
from transformers import GenerationConfig

from data.batching.collate import pad
from data.dialogues import EncodedDialogue
from data.template import decode_answer, last_answer
from utils.engine.engine import TrainEngine, device
from utils.models.compile import eager
from utils.models.load import quiet_transformers
from utils.tokenizer import stop_ids


@torch.no_grad()
def sample_answers(
    engine: TrainEngine, dialogues: list[EncodedDialogue], tokenizer, window: int, maxlen_res: int
) -> list[dict]:
    """Returns rows with a dialogue's last prompt with special tokens, the model's greedy answer, and the reference.

    All ranks generate the same answers, as ZeRO-3 needs all ranks. Answers have at most `maxlen_res` tokens, fewer if
    the longest prompt and its answer reach the `window`. Collective.
    """
    prompts = [dialogue.ids[: prompt_length(dialogue)] for dialogue in dialogues]
    ids, mask = pad(prompts, tokenizer.pad_token_id, side="left")
    together = not engine.fits_gathered()
    options = {"synced_gpus": True} if together else {}
    engine.module.eval()
    with nullcontext(engine.module) if together else engine.gathered() as module, quiet_transformers():
        module.lm.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=min(maxlen_res, window - ids.shape[1]), bos_token_id=tokenizer.bos_token_id,
            eos_token_id=list(stop_ids(tokenizer)), pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        with eager(module):
            sequences = module.lm.generate(ids.to(device()), attention_mask=mask.to(device()), **options)
    answers = sequences[:, ids.shape[1] :].tolist()
    return [
        {
            "held_out": True,  # first, as in PPO's rows
            "prompt": tokenizer.decode(prompt),
            "answer": decode_answer(tokenizer, answer),
            "reference": decode_answer(tokenizer, dialogue.ids[len(prompt) :]),
        }
        for dialogue, prompt, answer in zip(dialogues, prompts, answers, strict=True)
    ]


def prompt_length(dialogue: EncodedDialogue) -> int:
    """Returns the number of tokens before the last answer."""
    return last_answer(dialogue.answer_mask).start
