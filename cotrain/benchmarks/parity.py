"""`scripts/benchmark.py parity`: whether the teacher's engine says what `generate` says.

For every family of language models a tiny random one, in float32, and prompts of mixed lengths,
longer than the window where a family has one. The tests hold the engine to the same models.
"""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cotrain.benchmarks.settings import ParitySettings
from cotrain.config import TeacherConfig
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.identifiers import Identifiers, Node
from cotrain.teacher.memory import TokenBudget
from cotrain.teacher.passes import Passes
from cotrain.teacher.reading import Reader
from cotrain.teacher.writing import write

VOCABULARY = 100
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
    # Wide enough that what one token says of the next differs, and that a mistake is seen.
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_HEADS_OF_16 = {"head_dim": 16}
_SCALED_ATTENTION = {**_HEADS_OF_16, "query_pre_attn_scalar": 16}
# By name: what transformers calls it, and what sets it apart from the others.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen3": ("qwen3", _HEADS_OF_16),
    "gemma": ("gemma", _HEADS_OF_16),
    "gemma2": ("gemma2", {
        **_SCALED_ATTENTION, **_WINDOWED, "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
    }),
    "gemma3": ("gemma3_text", {**_SCALED_ATTENTION, **_WINDOWED}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": 8}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {**_WINDOWED, "logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "gpt_neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _WINDOWED),
}  # fmt: skip


def tiny_backbone(family: str, seed: int = 0) -> Backbone:
    """A random model of a family, 2 layers of 32, in float32 on the CPU, without a tokenizer."""
    kind, changes = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**_SIZES, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            # Biases begin at zero and norms at one or zero, where leaving them out changes nothing.
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.requires_grad_(False)
    return Backbone(model, transformers.PreTrainedTokenizerBase(), family, "fp32")


def random_prompts(
    lengths: Sequence[int], prefix: Sequence[int] = (), seed: int = 0
) -> list[list[int]]:
    """Prompts of tokens that mean nothing, each after the prefix."""
    draw = torch.Generator().manual_seed(seed)
    return [
        [*prefix, *torch.randint(2, VOCABULARY, (length,), generator=draw).tolist()]
        for length in lengths
    ]


def generated(backbone: Backbone, prompt: list[int], max_new_tokens: int) -> Any:
    """What the plain implementation says of one prompt: tokens, states and logits by step."""
    ids = torch.tensor([prompt])
    model: Any = backbone.model
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
        do_sample=False, output_hidden_states=True, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip


def state_of(output: Any, step: int) -> Tensor:
    """(1, H) the last state of one step of `generated`."""
    return output.hidden_states[step][-1][:, -1]


def gap(ours: Tensor, plain: Tensor) -> float:
    """Largest relative distance over rows."""
    return float(((ours - plain).norm(dim=1) / plain.norm(dim=1)).max())


def reader_of(passes: Passes, tokens: Sequence[int], settings: TeacherConfig) -> Reader:
    """A reader whose identifiers are these tokens, one each."""
    identifiers = Identifiers(
        texts=tuple(map(str, tokens)),
        nodes=(Node((), tuple(tokens)),),
        paths=tuple(((0, place),) for place in range(len(tokens))),
        emitted=tuple((token,) for token in tokens),
    )
    prompts: Any = SimpleNamespace(identifiers=identifiers, num_shown=len(tokens))
    return Reader(passes, prompts, settings, TokenBudget(8192))


@torch.no_grad()
def measure(family: str, seed: int = 0, max_new_tokens: int = 16) -> dict[str, Any]:
    """Distances between engine and `generate`, relative, the largest over prompts.

    Returns:
        `direct_state`, `direct_logits`: of one padded pass; `prefix_state`, `prefix_logits`: of one
        whose prompts share a prefix that is computed once; `emit_state`: at the first token that is
        written; `greedy`: share of prompts continued by the same tokens to the same end.
    """
    backbone = tiny_backbone(family, seed)
    prefix, tokens = random_prompts([9], seed=seed + 1)[0], list(range(2, VOCABULARY))
    prompts = random_prompts([3, 17, 9, 17, 1], prefix, seed)
    plain = [generated(backbone, prompt, max_new_tokens) for prompt in prompts]
    states, first = (torch.cat([state_of(one, step) for one in plain]) for step in (0, 1))
    logits = torch.cat([one.logits[0] for one in plain])
    found: dict[str, Any] = {"family": family}
    for name, shared in (("direct", []), ("prefix", prefix)):
        reader = reader_of(Passes(backbone, shared), tokens, TeacherConfig())
        looks = reader.read_prompts(prompts)
        found[f"{name}_state"] = gap(_stacked(looks, "state"), states)
        found[f"{name}_logits"] = gap(_stacked(looks, "logits"), logits[:, tokens])
    # All tokens are identifiers, so the likeliest of them is the one that is written, if none of
    # the two that are left out is.
    reader = reader_of(Passes(backbone, prefix), range(VOCABULARY), TeacherConfig(
        decision_position="emit"
    ))  # fmt: skip
    found["emit_state"] = gap(_stacked(reader.read_prompts(prompts), "state"), first)
    found["greedy"] = _same_answers(backbone, prefix, prompts, plain, max_new_tokens)
    return found


def _same_answers(
    backbone: Backbone, prefix: list[int], prompts: list[list[int]], plain: list[Any], limit: int
) -> float:
    """With a token that ends some of the answers early."""
    model: Any = backbone.model
    model.generation_config.eos_token_id = int(plain[0].sequences[0, len(prompts[0]) + 5])
    answers, _ = write(Passes(backbone, prefix), prompts, limit)
    same = []
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = generated(backbone, prompt, limit).sequences[0, len(prompt) :].tolist()
        ended = whole[-1] == model.generation_config.eos_token_id
        same.append((answer.tokens, answer.ended) == (whole[: len(whole) - ended], ended))
    model.generation_config.eos_token_id = None
    return sum(same) / len(same)


def _stacked(looks: Sequence[Any], name: str) -> Tensor:
    return torch.stack([getattr(look, name) for look in looks])


def run(settings: ParitySettings) -> dict[str, Any]:
    """Measure every family, print a line each.

    Returns:
        Settings, versions and every line.
    """
    print(
        f"Tiny random models in float32, transformers {transformers.__version__}, torch "
        f"{torch.__version__}: relative distance to generate(),\nthe largest over 5 prompts "
        f"of 10 to 26 tokens and {settings.seeds} seed(s)\n"
    )
    print(
        f"{'family':<18}{'state':>10}{'logits':>10}{'… prefix':>10}{'… logits':>10}{'emit':>10}"
        f"{'greedy':>10}"
    )
    lines = []
    for family in FAMILIES:
        of_seeds = [measure(family, seed) for seed in range(settings.seeds)]
        worst: dict[str, Any] = {"family": family}
        for key in of_seeds[0].keys() - {"family"}:
            values = [found[key] for found in of_seeds]
            worst[key] = sum(values) / len(values) if key == "greedy" else max(values)
        lines.append(worst)
        gaps = ("direct_state", "direct_logits", "prefix_state", "prefix_logits", "emit_state")
        print(
            f"{family:<18}"
            + "".join(f"{worst[key]:>10.0e}" for key in gaps)
            + f"{worst['greedy']:>10.0%}",
            flush=True,
        )
    return {
        "benchmark": "parity",
        "settings": dataclasses.asdict(settings),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "families": lines,
    }
