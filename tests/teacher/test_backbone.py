"""The decision state and the identifier logits are the ones of the plain implementation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cotrain import assets
from cotrain.data.interactions import InteractionData
from cotrain.errors import AssetError, TeacherError
from cotrain.teacher.backbone import Backbone, load_backbone
from cotrain.teacher.prompts import PromptBuilder

CPU = torch.device("cpu")


def relative(ours: Tensor, plain: Tensor) -> float:
    return float((ours - plain).norm(dim=1).div(plain.norm(dim=1)).max())


def real_prompts(backbone: Backbone, data: InteractionData, count: int) -> tuple[list, list]:
    """Prompts of mixed lengths, and the identifier tokens."""
    builder = PromptBuilder(
        backbone.tokenizer, data.catalog.titles, data.catalog.categories, num_candidates=20,
        item_noun="movie", history_length=10, max_title_tokens=32,
        max_context_tokens=backbone.max_context_tokens,
    )  # fmt: skip
    prompts = []
    for user in range(count):
        history = data.train_history(user).tolist()
        shown = list(range(1 + 20 * user, 21 + 20 * user))
        prompts.append(builder.build(history[: 1 + 2 * user], shown))
    return prompts, builder.identifier_ids


def generated(model: Any, prompt: list[int]) -> tuple[Tensor, Tensor]:
    """Decision state and logits over the vocabulary, the plain way, for one prompt."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False,
        output_hidden_states=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return output.hidden_states[0][-1][:, -1], output.logits[0]


def test_one_pass_agrees_with_generate_on_the_real_model(smollm2: str, ml100k: InteractionData):
    backbone = load_backbone(smollm2, "fp32", CPU)
    prompts, identifiers = real_prompts(backbone, ml100k, 6)
    assert len({len(prompt) for prompt in prompts}) > 3
    states = backbone.decision_states(prompts)
    logits = backbone.token_logits(states, torch.tensor(identifiers))
    plain = [generated(backbone.model, prompt) for prompt in prompts]
    assert relative(states, torch.cat([state for state, _ in plain])) < 1e-4
    assert relative(logits, torch.cat([scores[:, identifiers] for _, scores in plain])) < 1e-4


@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 1e-4), ("int8", 0.1)])
def test_a_quantised_teacher_agrees_with_itself_batched_and_single(
    smollm2: str, ml100k: InteractionData, quantization: str, tolerance: float
):
    # int8 quantises activations by row but picks outlier columns over the whole batch.
    backbone = load_backbone(smollm2, quantization, CPU)
    prompts, identifiers = real_prompts(backbone, ml100k, 4)
    batched = backbone.decision_states(prompts)
    single = torch.cat([backbone.decision_states([prompt]) for prompt in prompts])
    assert relative(batched, single) < tolerance
    ids = torch.tensor(identifiers)
    gap = relative(backbone.token_logits(batched, ids), backbone.token_logits(single, ids))
    assert gap < tolerance


FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 8},
    "phi": {},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_what_generate_gives(family: str):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config).eval()
    backbone = Backbone(model, transformers.PreTrainedTokenizerBase(), family, "fp32")
    lengths = [3, 17, 9, 17]
    prompts = [torch.randint(2, 100, (length,)).tolist() for length in lengths]
    states = backbone.decision_states(prompts)
    tokens = torch.tensor([5, 90, 7])
    plain = [generated(model, prompt) for prompt in prompts]
    assert relative(states, torch.cat([state for state, _ in plain])) < 1e-5
    logits = backbone.token_logits(states, tokens)
    assert relative(logits, torch.cat([scores[:, tokens] for _, scores in plain])) < 1e-5


def test_nothing_in_the_teacher_wants_a_gradient(tiny_teacher: str):
    backbone = load_backbone(tiny_teacher, "nf4", CPU)
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.decision_states([[1, 2, 3]]).requires_grad


def test_nf4_is_four_bit_and_computes_in_fp32_on_cpu(smollm2: str):
    backbone = load_backbone(smollm2, "nf4", CPU)
    layer: Any = backbone.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.numel() * 2 == layer.in_features * layer.out_features
    backbone.decision_states([[1, 2, 3]])
    # Regression: bitsandbytes repacks for a bf16 kernel at the first product where it can.
    assert layer.weight.quant_state.dtype == torch.float32


def test_a_folder_without_weights_is_refused(tmp_path: Path, tiny_teacher: str):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(tiny_teacher) / name).read_bytes())
    with pytest.raises(AssetError, match="no weights"):
        load_backbone(str(tmp_path), "nf4", CPU)


def test_a_model_that_is_no_causal_lm_is_refused():
    encoder = str(assets.fetch("all-minilm-l6-v2"))
    with pytest.raises(TeacherError, match="causal language model"):
        load_backbone(encoder, "fp32", CPU)
