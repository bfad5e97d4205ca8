"""Loading; logits of a few tokens, those of the plain implementation; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from cotrain import assets
from cotrain.benchmarks.parity import (
    FAMILIES,
    gap,
    generated,
    random_prompts,
    state_of,
    tiny_backbone,
)
from cotrain.config import TeacherConfig
from cotrain.data.interactions import InteractionData
from cotrain.errors import AssetError, TeacherError
from cotrain.teacher.backbone import Backbone, load_backbone
from cotrain.teacher.passes import Passes
from cotrain.teacher.prompts import PromptBuilder, make_prompts

CPU = torch.device("cpu")


def real_prompts(
    backbone: Backbone, data: InteractionData, count: int
) -> tuple[PromptBuilder, list[list[int]]]:
    """Prompts of mixed lengths."""
    builder = make_prompts(
        TeacherConfig(item_noun="movie", num_candidates=8), backbone.tokenizer, data.catalog.titles,
        data.catalog.categories, backbone.max_context_tokens,
    )  # fmt: skip
    prompts = []
    for user in range(count):
        history = data.train_history(user).tolist()
        shown = list(range(1 + 20 * user, 9 + 20 * user))
        prompts.append(builder.build(history[: 1 + 4 * user], shown))
    return builder, prompts


# ---- against the plain implementation -----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_few_tokens_or_all_are_those_of_every_family(family: str):
    backbone = tiny_backbone(family, seed=5)
    plain = [generated(backbone, prompt, 1) for prompt in random_prompts([4, 20, 11], seed=5)]
    states = torch.cat([state_of(one, 0) for one in plain])
    logits = torch.cat([one.logits[0] for one in plain])
    assert gap(backbone.logits(states), logits) < 1e-5
    few = torch.tensor([7, 90, 5, 7])
    ours = backbone.token_logits(states, few)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, logits[:, few], atol=1e-4, rtol=1e-4)


def test_one_pass_agrees_with_generate_on_the_real_model(
    real_backbone: Backbone, ml100k: InteractionData
):
    backbone = real_backbone
    builder, prompts = real_prompts(backbone, ml100k, 3)
    assert len({len(prompt) for prompt in prompts}) == 3
    plain = [generated(backbone, prompt, 1) for prompt in prompts]
    states = torch.cat([state_of(one, 0) for one in plain])
    identifiers = torch.tensor(builder.identifiers.first_tokens)
    logits = torch.cat([one.logits[0] for one in plain])[:, identifiers]
    for prefix in ([], builder.prefix):
        ours = Passes(backbone, prefix).last_states(prompts)
        assert gap(ours, states) < 1e-4
        assert gap(backbone.token_logits(ours, identifiers), logits) < 1e-4


# int8 quantises activations by row but picks outlier columns over the whole batch.
@pytest.mark.parametrize(
    ("quantization", "compute", "tolerance"),
    [
        ("nf4", "fp32", 1e-4),
        # Slow where the CPU has no matrix units.
        pytest.param("nf4", "bf16", 0.03, marks=pytest.mark.slow),
        ("int8", "auto", 0.1),
    ],
)
def test_a_quantised_teacher_agrees_with_itself_batched_and_single(
    smollm2: str, ml100k: InteractionData, quantization: str, compute: Any, tolerance: float
):
    backbone = load_backbone(smollm2, quantization, CPU, compute)
    builder, prompts = real_prompts(backbone, ml100k, 2)
    passes = Passes(backbone, builder.prefix)
    batched = passes.last_states(prompts)
    single = torch.cat([passes.last_states([prompt]) for prompt in prompts])
    assert gap(batched, single) < tolerance
    ids = torch.tensor(builder.identifiers.first_tokens)
    assert gap(backbone.token_logits(batched, ids), backbone.token_logits(single, ids)) < tolerance


# ---- what is refused ----------------------------------------------------------------------------


def test_logits_that_are_more_than_the_head_times_the_state_are_refused(
    tiny_teacher: str, monkeypatch: pytest.MonkeyPatch
):
    forward: Any = LlamaForCausalLM.forward

    def transformed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits + 0.5 * output.logits.roll(1, dims=-1)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", transformed)
    with pytest.raises(TeacherError, match="its logits are not its output head times"):
        load_backbone(tiny_teacher, "fp32", CPU)


def test_a_decoder_that_cannot_be_had_without_its_head_is_refused(
    tiny_teacher: str, monkeypatch: pytest.MonkeyPatch
):
    """Regression: Llama 4 gives itself as its decoder, which ended in an AttributeError."""
    monkeypatch.setattr(LlamaForCausalLM, "get_decoder", lambda self: self)
    with pytest.raises(TeacherError, match="has no decoder of its own"):
        load_backbone(tiny_teacher, "fp32", CPU)


def test_a_folder_without_weights_is_refused(tmp_path: Path, tiny_teacher: str):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(tiny_teacher) / name).read_bytes())
    with pytest.raises(AssetError, match="no weights"):
        load_backbone(str(tmp_path), "nf4", CPU)


def test_a_model_that_is_no_causal_lm_is_refused():
    encoder = str(assets.fetch("all-minilm-l6-v2"))
    with pytest.raises(TeacherError, match="causal language model"):
        load_backbone(encoder, "fp32", CPU)


# ---- what is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "compute"),
    [("nf4", "fp32"), ("nf4", "bf16"), ("int8", "auto"), ("bf16", "auto"), ("fp32", "auto"),
     ("fp32", "bf16")],
)  # fmt: skip
def test_nothing_in_the_teacher_wants_a_gradient(
    tiny_teacher: str, quantization: str, compute: Any
):
    backbone = load_backbone(tiny_teacher, quantization, CPU, compute)
    assert backbone.compute == {"auto": {"bf16": "bf16"}.get(quantization, "fp32")}.get(
        compute, compute
    )
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    states = Passes(backbone).last_states([[1, 2, 3]])
    assert not states.requires_grad
    assert not backbone.token_logits(states, torch.tensor([1, 2])).requires_grad
    assert backbone.hidden_size == states.shape[1] == 32
    assert backbone.max_context_tokens == 2048


def test_weights_of_a_loaded_teacher_are_counted_whole(tiny_teacher: str):
    backbones = [
        load_backbone(tiny_teacher, "fp32", CPU),
        load_backbone(tiny_teacher, "nf4", CPU, "fp32"),
        load_backbone(tiny_teacher, "nf4", CPU, "bf16"),
    ]
    assert len({backbone.num_parameters for backbone in backbones}) == 1


def test_tokens_that_end_an_answer_are_the_models_and_the_tokenizers(tiny_teacher: str):
    backbone = load_backbone(tiny_teacher, "fp32", CPU)
    end: Any = backbone.tokenizer.eos_token_id
    config: Any = backbone.model.generation_config
    for own, expected in ((None, {end}), (7, {7, end}), ([7, 9], {7, 9, end})):
        config.eos_token_id = own
        assert backbone.stop_ids == expected


def relative(ours: Tensor, plain: Tensor) -> float:
    return float((ours - plain).norm() / plain.norm())


def test_the_output_head_may_have_a_bias(tiny_teacher: str):
    backbone = load_backbone(tiny_teacher, "fp32", CPU)
    head: Any = backbone.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(head.out_features), requires_grad=False)
    ids = torch.tensor([[5, 6, 7]])
    plain = backbone.model(ids).logits[:, -1]
    state = Passes(backbone).last_states(ids.tolist())
    assert relative(backbone.logits(state), plain) < 1e-6
    few = torch.tensor([3, 4000])
    assert relative(backbone.token_logits(state, few), plain[:, few]) < 1e-5
