"""Joined rows: what is run, and variable-length attention against rows one by one in float64.

On a CPU a plain function stands for the kernel; tests marked `gpu` run the kernel itself.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoModel, GPT2Config, MistralConfig, Qwen2Config

import tests.helpers.varlen
import utils.models.padding_free
import utils.models.varlen
from ppo.loss import policy_ratio
from ppo.models import PolicyModel
from tests.helpers.tiny import SIZES, tiny_llama, tiny_llama_config
from tests.helpers.varlen import causal_rows
from utils.models.load import enable_checkpointing, training_mode
from utils.models.padding_free import has_varlen_kernel, joins_rows, states_of
from utils.models.varlen import attend, options_of, takes_varlen

LENGTHS = [37, 1, 130, 4, 64]
HEADS = [(4, 4), (4, 2), (4, 1)]  # of queries, of keys


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> torch.device:
    if request.param == "cpu":
        tests.helpers.varlen.on_cpu(monkeypatch)
    return torch.device(request.param)


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """`varlen_attn` of PyTorch 2.11."""
    return torch.ops.torch_attn._varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0), scale, list(window_size)
    )[0]


@pytest.fixture(params=["installed", "2.11"])
def version(request, monkeypatch) -> None:
    if request.param == "2.11":
        monkeypatch.setattr(utils.models.varlen, "varlen_attn", of_2_11)
        monkeypatch.setattr(utils.models.varlen, "OPTIONS", options_of(of_2_11))


def states(heads: tuple[int, int], size: int, device: torch.device) -> list[torch.Tensor]:
    """Queries, keys and values as a decoder makes them, bf16 [1, heads, tokens, size], and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    made = [torch.randn(1, tokens, n, size, generator=generator) for n in (heads[0], heads[1], heads[1], heads[0])]
    *inputs, gradient = (x.bfloat16().to(device) for x in made)
    return [*(x.transpose(1, 2).requires_grad_() for x in inputs), gradient]


def ends_of(device: torch.device) -> tuple[torch.Tensor, int]:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    return ends.int().to(device), max(LENGTHS)


@pytest.mark.parametrize(("heads", "size"), [((4, 4), 128), ((4, 2), 16), ((4, 1), 128)])
def test_output_and_gradients_are_those_of_rows_one_by_one(device, version, heads, size):
    *inputs, gradient = states(heads, size, device)
    output = attend(*inputs, *ends_of(device), scale=0.1)
    found = torch.autograd.grad(output, inputs, gradient)
    plain = [x.detach().double().requires_grad_() for x in inputs]
    true, _ = causal_rows(*(x[0].transpose(0, 1) for x in plain), LENGTHS, 0.1)
    expected = torch.autograd.grad(true, plain, gradient[0].double())
    assert output.dtype == torch.bfloat16 and output.shape == (1, sum(LENGTHS), heads[0], size)
    for one, other in zip([output[0].detach(), *found], [true.detach(), *expected], strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 0.02


def test_shapes_are_known_without_a_kernel(version):
    *inputs, gradient = (x.detach().to("meta").requires_grad_() for x in states((4, 2), 16, torch.device("cpu")))
    ends, longest = ends_of(torch.device("meta"))
    output = attend(*inputs, ends, longest, None)
    found = torch.autograd.grad(output, inputs, gradient)
    assert output.shape == gradient.shape and [x.shape for x in found] == [x.shape for x in inputs]


def test_what_the_kernel_does_not_take_is_padded(monkeypatch):
    gpu, cpu, bf16, capability = torch.device("cuda", 0), torch.device("cpu"), torch.bfloat16, [8, 0]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    assert takes_varlen(gpu, bf16, 128)
    for case in ((cpu, bf16, 128), (gpu, torch.float32, 128), (gpu, bf16, 20), (gpu, bf16, 256)):
        assert not takes_varlen(*case)
    capability[0] = 7
    assert not takes_varlen(gpu, bf16, 128)
    capability[0] = 9
    monkeypatch.setattr(utils.models.varlen, "OPTIONS", options_of(None))
    assert not takes_varlen(gpu, bf16, 128)


@pytest.mark.gpu
def test_which_decoders_have_it_on_a_gpu():
    decoder = decoder_of(2, torch.device("cuda"))
    assert has_varlen_kernel(decoder) and joins_rows(decoder)
    assert not joins_rows(decoder.float())
    assert not joins_rows(decoder_of(2, torch.device("cuda"), attn_implementation="eager"))
    assert not joins_rows(decoder_of(2, torch.device("cuda"), head_dim=20))


def decoder_of(keys: int, device: torch.device, attn_implementation: str = "sdpa", **changes):
    config = tiny_llama_config(hidden_size=128, num_key_value_heads=keys, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModel.from_config(config, attn_implementation=attn_implementation).to(device, torch.bfloat16).eval()


def rows(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and the positions that are read: the last third of each row."""
    ids = torch.randint(3, 400, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    lengths, places = torch.tensor(LENGTHS)[:, None], torch.arange(max(LENGTHS))
    return ids.to(device), ((places >= lengths * 2 // 3) & (places < lengths)).to(device)


def states_and_gradient(decoder, ids: torch.Tensor, read: torch.Tensor) -> list[torch.Tensor]:
    """Of a random sum of the states, on the CPU in float64."""
    found = states_of(decoder, ids, read)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(found)
    decoder.zero_grad()
    (found * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in decoder.parameters()])
    return [x.detach().double().cpu() for x in (found, gradient)]


def test_joined_rows_are_as_near_to_float64_as_padded_ones(device):
    decoder, (ids, read) = decoder_of(2, device), rows(device)
    plain = copy.deepcopy(decoder).double()
    plain.keeps_padding = True
    true = states_and_gradient(plain, ids, read)
    enable_checkpointing(decoder)
    training_mode(decoder)
    assert has_varlen_kernel(decoder)
    joined = states_and_gradient(decoder, ids, read)
    decoder.keeps_padding = True
    padded = states_and_gradient(decoder, ids, read)
    for ours, theirs, other in zip(joined, padded, true, strict=True):
        error, usual = (float((x - other).norm() / other.norm()) for x in (ours, theirs))
        assert error < 1.5 * usual < 0.05


def test_the_ratio_begins_at_1_whatever_shares_a_forward(device):
    """Scores of all rows at once, then the update's forwards of a few, with checkpointing."""
    policy = PolicyModel(tiny_llama(hidden_size=128).to(device, torch.bfloat16))
    ids, read = rows(device)
    read[:, 0] = False
    with torch.no_grad():
        old, _ = policy(ids, read)
    enable_checkpointing(policy.lm)
    training_mode(policy)
    again, _ = policy(ids, read)
    assert torch.equal(again, old)
    for part in ([0, 1], [2], [4, 3]):
        few, _ = policy(ids[part], read[part])
        ratio = policy_ratio(few.detach(), old[part], read[part])
        assert float((ratio - 1).abs().max()) < 0.03
        assert abs(float(ratio[read[part]].mean()) - 1) < 0.005


@pytest.mark.gpu
def test_the_gpu_is_waited_for_once_before_the_first_layer():
    decoder, (ids, read) = decoder_of(2, torch.device("cuda")), rows(torch.device("cuda"))
    states_of(decoder, ids, read).sum().backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            states_of(decoder, ids, read)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchronizing" in str(w.message)]) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("heads", HEADS)
def test_gradients_are_repeatable_where_deterministic_algorithms_are_asked_for(heads):
    """The kernel adds up query gradients in any order unless it is told; a warning alone would not tell it."""
    *inputs, gradient = states(heads, 128, torch.device("cuda"))
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            torch.autograd.grad(attend(*inputs, *ends_of(torch.device("cuda")), 0.1), inputs, gradient)
            for _ in range(5)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@pytest.fixture
def some_read() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and three positions that are read, in two of the rows."""
    ids, read = rows(torch.device("cpu"))
    read[:] = False
    read[0, 2] = read[2, 5] = read[2, 7] = True
    return ids, read


def plain_decoder(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModel.from_config(config).eval()


def test_only_what_is_read_and_what_comes_before_it_is_run(some_read):
    decoder, (ids, read), seen = plain_decoder(tiny_llama_config()), some_read, []
    expected = decoder(input_ids=ids).last_hidden_state[read]
    decoder.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    decoder.rotary_emb.register_forward_pre_hook(lambda module, args: seen.append(args[1].tolist()))
    torch.testing.assert_close(states_of(decoder, ids, read), expected, atol=1e-5, rtol=1e-5)
    # 3 and 8 tokens, and one of each row of which nothing is read.
    assert seen == [(1, 3 + 1 + 8 + 1 + 1), [[0, 1, 2, 0, *range(8), 0, 0]]]


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES | {"sliding_window": 6}),
        Qwen2Config(**SIZES | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        GPT2Config(vocab_size=400, n_positions=256, n_embd=32, n_layer=2, n_head=2),
    ],
    ids=["sliding window", "sliding window in some layers", "another architecture"],
)
def test_others_run_padded(config, some_read):
    decoder, (ids, read) = plain_decoder(config), some_read
    assert not joins_rows(decoder)
    torch.testing.assert_close(states_of(decoder, ids, read), decoder(ids).last_hidden_state[read])


def test_short_rows_of_bf16_are_attended_in_float32():
    """The output is rounded once, at the end."""
    generator = torch.Generator().manual_seed(0)
    lengths, heads, size = [40, 7], 2, 16
    states = torch.randn(3, 1, heads, sum(lengths), size, generator=generator).bfloat16()
    mask = torch.tensor(lengths).view(1, 1, 1, -1)
    attend = AttentionInterface()[utils.models.padding_free.SDPA_JOINED]
    found, _ = attend(nn.Module(), *states, mask, is_causal=True)
    assert found.dtype == torch.bfloat16
    for row, part in zip(found[0].split(lengths), states.double().split(lengths, dim=3), strict=True):
        query, key, value = part[:, 0]
        scores = (query @ key.mT / size**0.5).masked_fill(torch.ones(2 * [len(row)]).triu(1).bool(), -torch.inf)
        expected = (scores.softmax(-1) @ value).transpose(0, 1).bfloat16()
        assert float((row != expected).float().mean()) < 0.01
