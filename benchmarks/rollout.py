"""Compare our sampling with `model.generate` in tokens per second:   python benchmarks/rollout.py [--model FOLDER]

Both sides decode the same prompts (32 to 96 random tokens, sorted by length) in bf16 (--dtype) at temperature 1,
without top-p and penalty, `batch` sequences at a time. Response lengths are fixed in advance (seed 0): "equal" is 64
tokens, "ragged" is log-uniform from 8 to 256. There is no EOS: both sides compare with the lengths on the device in
each step, `generate` in a StoppingCriteria. The sides alternate. Prints medians over the repeats, counting wanted
tokens only. The default model is a random 58M LLaMA (random_inputs.py).
"""

import argparse
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks.environment import add_dtype
from benchmarks.random_inputs import SIZES, random_ids, random_lm
from benchmarks.timing import timed
from data.batching.collate import pad
from ppo.decoding.attention import grouped
from ppo.decoding.sampling import Sampling
from ppo.decoding.scheduler import Decoder
from ppo.models import PolicyModel
from ppo.rollout import decoding_options
from utils.engine.engine import DTYPES, device

NO_EOS = SimpleNamespace(eos_token_id=-1, pad_token_id=0)


class AtLength(StoppingCriteria):
    """Stops rows that have reached their length."""

    def __init__(self, width: int, limits: torch.Tensor):
        self.ends = width + limits

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def load(folder: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model of a folder, or the random one."""
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device()).eval()
    return random_lm(SIZES, dtype, device()).eval()


def work(kind: str, count: int, vocabulary: int) -> tuple[list[list[int]], list[int]]:
    """Returns (prompts, longest first; response length per prompt)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(32, 97, (count,), generator=generator).sort(descending=True).values.tolist()
    prompts = random_ids(lengths, generator, vocabulary)
    spread = torch.rand(count, generator=generator)
    limits = (8 * 32**spread).round().int().tolist() if kind == "ragged" else [64] * count
    return prompts, limits


def ours(lm, prompts: list[list[int]], limits: list[int], batch: int, seed: int) -> int:
    """Returns the number of tokens that our sampling generates."""
    config = SimpleNamespace(rollout_batch_size=batch, micro_batch_tokens=8192, rollout_cache_tokens=0)
    places, model = list(range(len(prompts))), PolicyModel(lm)
    options = decoding_options(config, model)
    with grouped(lm.config):
        rows = Decoder(model, prompts, places, limits, Sampling(), seed, NO_EOS, options, device()).run()
    return sum(map(len, rows))


def theirs(lm, prompts: list[list[int]], limits: list[int], batch: int, seed: int) -> int:
    """Returns the number of wanted tokens that `generate` returns."""
    torch.manual_seed(seed)
    made = 0
    for start in range(0, len(prompts), batch):
        ids, mask = (x.to(device()) for x in pad(prompts[start : start + batch], 0, side="left"))
        wanted = torch.tensor(limits[start : start + batch], device=device())
        rows = lm.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, eos_token_id=None,
            pad_token_id=0, max_new_tokens=int(wanted.max()),
            stopping_criteria=StoppingCriteriaList([AtLength(ids.shape[1], wanted)]),
        )  # fmt: skip
        made += int(wanted.clamp(max=rows.shape[1] - ids.shape[1]).sum())
    return made


def main() -> None:
    """Prints one line per batch size and kind of lengths."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a causal LM; default: the random 58M LLaMA")
    add_dtype(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--lengths", nargs="+", choices=["equal", "ragged"], default=["equal", "ragged"])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    lm = load(options.model, DTYPES[options.dtype])
    print(f"{options.prompts} prompts, {options.dtype}, {torch.get_num_threads()} threads, {device()}", flush=True)
    for batch in options.batch:
        for kind in options.lengths:
            prompts, limits = work(kind, options.prompts, lm.config.vocab_size)
            rates = {ours: [], theirs: []}
            for side in rates:
                side(lm, prompts[:batch], [4] * batch, batch, 0)  # warm-up
            for repeat in range(options.repeats):
                for side, found in rates.items():
                    made, seconds = timed(side, lm, prompts, limits, batch, repeat)
                    assert made == sum(limits), (side, made)
                    found.append(made / seconds)
            us, them = (statistics.median(found) for found in rates.values())
            print(f"batch {batch:2} {kind:6} {us:7.0f} vs {them:7.0f} tokens/s: {us / them:.2f} x", flush=True)


if __name__ == "__main__":
    main()
