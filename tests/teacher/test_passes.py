"""Batched, padded, shared or continued: the states of one prompt alone."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cotrain.benchmarks.parity import FAMILIES, gap, random_prompts, tiny_backbone
from cotrain.errors import TeacherError
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.passes import Passes, Steps

PREFIX = random_prompts([9], seed=1)[0]
LENGTHS = [3, 17, 9, 17, 1]
WINDOWED = [family for family in FAMILIES if "window" in str(FAMILIES[family])]


def plain_states(backbone: Backbone, prompts: list[list[int]]) -> Tensor:
    """Last states of prompts one by one, from a forward pass as anybody writes it."""
    model: Any = backbone.model
    with torch.no_grad():
        outputs = [model(torch.tensor([prompt]), output_hidden_states=True) for prompt in prompts]
    return torch.cat([output.hidden_states[-1][:, -1] for output in outputs])


@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["whole", "behind a prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_last_states_of_a_padded_batch_are_those_of_each_prompt(family: str, prefix: list[int]):
    backbone = tiny_backbone(family)
    prompts = random_prompts(LENGTHS, PREFIX)
    passes = Passes(backbone, prefix)
    assert gap(passes.last_states(prompts), plain_states(backbone, prompts)) < 1e-5
    rest = max(LENGTHS) * len(LENGTHS)
    if prefix:  # which went through the decoder once, before the rows
        assert passes.computed_tokens == rest + len(PREFIX)
        passes.last_states(prompts)
        assert passes.computed_tokens == 2 * rest + len(PREFIX)
    else:
        assert passes.computed_tokens == rest + len(PREFIX) * len(LENGTHS)


@pytest.mark.parametrize("family", ["mistral", "phi3, window"])
def test_where_every_layer_has_a_window_the_beginning_of_a_prompt_is_forgotten(family: str):
    """So the models here do have the windows that the other tests are to respect."""
    assert family in WINDOWED
    backbone = tiny_backbone(family)
    long = random_prompts([30])[0]
    states = plain_states(backbone, [long, [long[0] + 1, *long[1:]], [*long[:20], 5, *long[21:]]])
    assert gap(states[1:2], states[:1]) < 1e-6
    assert gap(states[2:], states[:1]) > 1e-3


def test_a_prompt_that_does_not_begin_with_the_prefix_is_read_whole():
    backbone = tiny_backbone("llama")
    prompts = [*random_prompts([3, 17], PREFIX), random_prompts([12], seed=3)[0]]
    passes = Passes(backbone, PREFIX)
    assert passes.shared(prompts) is None
    assert passes.shared([PREFIX]) is None
    assert gap(passes.last_states(prompts), plain_states(backbone, prompts)) < 1e-5
    assert passes.shared(prompts[:2]) is not None


def test_mean_states_are_those_of_each_text():
    backbone = tiny_backbone("gemma3")
    texts = random_prompts([3, 17, 9])
    model: Any = backbone.model
    with torch.no_grad():
        plain = torch.cat(
            [
                model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1].mean(1)
                for text in texts
            ]
        )
    assert gap(Passes(backbone, PREFIX).mean_states(texts), plain) < 1e-5


# ---- step by step -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["whole", "behind a prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_end_where_whole_prompts_do(family: str, prefix: list[int]):
    backbone = tiny_backbone(family)
    prompts = random_prompts(LENGTHS, PREFIX)
    more = torch.tensor(random_prompts([8] * len(LENGTHS), seed=2))  # (5, 8)

    def plain(count: int, rows: list[int], *further: int) -> Tensor:
        return plain_states(
            backbone, [[*prompts[row], *more[row, :count].tolist(), *further] for row in rows]
        )

    every = list(range(len(prompts)))
    steps = Steps(Passes(backbone, prefix), prompts, further=16)
    assert gap(steps.state, plain(0, every)) < 1e-5
    # One token, then several at once; a look ahead in between that leaves no trace.
    assert gap(steps.advance(more[:, :1]), plain(1, every)) < 1e-5
    before = steps.state
    assert gap(steps.peek(torch.tensor([[5, 6, 7]] * 5)), plain(1, every, 5, 6, 7)) < 1e-5
    assert steps.state is before
    assert gap(steps.advance(more[:, 1:4]), plain(4, every)) < 1e-5
    # Fewer rows, in another order.
    rows = [4, 0, 1]
    steps.keep(torch.tensor(rows))
    assert gap(steps.state, plain(4, rows)) < 1e-5
    assert gap(steps.advance(more[rows, 4:6]), plain(6, rows)) < 1e-5
    assert gap(steps.peek(torch.tensor([[9], [8], [9]])), plain(6, rows[:1], 9)[[0, 0, 0]]) > 1e-2
    assert gap(steps.advance(more[rows, 6:8]), plain(8, rows)) < 1e-5


@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["whole", "behind a prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_suffixes_of_several_lengths_are_read_as_whole_prompts(family: str, prefix: list[int]):
    backbone = tiny_backbone(family)
    prompts = random_prompts(LENGTHS, PREFIX)
    suffixes = random_prompts([4, 1, 6, 2, 6], seed=4)
    passes = Passes(backbone, prefix)
    steps = Steps(passes, prompts, further=9)

    def whole(rows: list[int], *before: int) -> Tensor:
        return plain_states(backbone, [[*prompts[row], *before, *suffixes[row]] for row in rows])

    every = list(range(len(prompts)))
    before = steps.state
    assert gap(steps.read(suffixes), whole(every)) < 1e-5
    # They are taken back again, also where rows go on, twice each and in another order.
    assert steps.state is before
    assert gap(steps.read(suffixes), whole(every)) < 1e-5
    steps.advance(torch.tensor([[5, 6]] * 5))
    after = [[*prompt, 5, 6] for prompt in prompts]
    assert gap(steps.state, plain_states(backbone, after)) < 1e-5
    rows = [4, 0, 0, 2]
    steps.keep(torch.tensor(rows))
    assert gap(steps.read([suffixes[row] for row in rows]), whole(rows, 5, 6)) < 1e-5
    assert gap(steps.advance(torch.tensor([[7]] * 4)), plain_states(
        backbone, [[*after[row], 7] for row in rows]
    )) < 1e-5  # fmt: skip


@pytest.mark.parametrize("family", WINDOWED)
def test_padding_behind_a_prefix_never_pushes_it_out_of_the_window(family: str):
    """What lies before the padding would look farther away than it is; a window has to be wide
    enough for all, or nothing is shared."""
    backbone = tiny_backbone(family)
    for window in (8, 29, 30, 64):
        backbone.model.config.sliding_window = window  # pyright: ignore
        for module in backbone.model.modules():
            if getattr(module, "sliding_window", None):
                module.sliding_window = window  # pyright: ignore
        prompts = random_prompts([1, 17], PREFIX)
        passes = Passes(backbone, PREFIX)
        steps = Steps(passes, prompts, further=4)
        longest = len(PREFIX) + 17
        shares = bool(steps.mask[:, : len(PREFIX)].all())
        assert shares == (longest + 4 <= window)
        tokens = torch.tensor([[5, 6, 7, 8]] * 2)
        whole = [[*prompt, 5, 6, 7, 8] for prompt in prompts]
        assert gap(steps.advance(tokens), plain_states(backbone, whole)) < 1e-5


def test_rows_share_nothing_that_one_of_them_writes():
    backbone = tiny_backbone("llama")
    passes = Passes(backbone, PREFIX)
    prompts = random_prompts([4, 4], PREFIX)
    first = Steps(passes, prompts, 4)
    second = Steps(passes, prompts, 4)
    first.advance(torch.tensor([[5], [6]]))
    after = second.advance(torch.tensor([[7], [7]]))
    assert gap(after, plain_states(backbone, [[*prompt, 7] for prompt in prompts])) < 1e-5
    assert gap(passes.last_states(prompts), plain_states(backbone, prompts)) < 1e-5


# ---- models that keep something else ------------------------------------------------------------


@pytest.fixture(scope="module")
def recurrent() -> Backbone:
    config = AutoConfig.for_model(
        "qwen3_5_text", vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=128,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
        initializer_range=0.3, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
    return Backbone(model, transformers.PreTrainedTokenizerBase(), "recurrent", "fp32")


def test_a_recurrent_model_is_read_whole_and_not_continued(recurrent: Backbone):
    """Regression: its states were looked up in a cache of keys and values, an IndexError."""
    prompts = random_prompts(LENGTHS, PREFIX)
    passes = Passes(recurrent, PREFIX)
    assert gap(passes.last_states(prompts), plain_states(recurrent, prompts)) < 1e-5
    with pytest.raises(TeacherError, match=r"keeps something else .* Set teacher\.mode direct"):
        Steps(passes, prompts, 4)
