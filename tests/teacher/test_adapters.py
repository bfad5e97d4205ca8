"""LoRA adapters: on quantised weights as on plain ones, switched, told apart, refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cotrain.benchmarks.parity import gap, random_prompts
from cotrain.errors import TeacherError
from cotrain.teacher.backbone import Backbone, load_backbone
from cotrain.teacher.passes import Passes

CPU = torch.device("cpu")
PREFIX = random_prompts([9], seed=1)[0]
PROMPTS = random_prompts([3, 17, 9], PREFIX)
LAYERS = ["q_proj", "v_proj", "down_proj"]


def make_adapter(teacher: str, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A LoRA adapter that matters, as peft saves one; trained a few steps if `seed` is 0."""
    model: Any = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, **{"target_modules": LAYERS, **settings})
        )
        if seed:
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.1)
        else:
            train(adapted)
    adapted.save_pretrained(folder)
    return folder


def train(adapted: Any) -> None:
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    ids = torch.tensor(random_prompts([12, 12], seed=9))
    for _ in range(5):
        loss = adapted(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def adapters(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One that was trained and one that is random."""
    folder = tmp_path_factory.mktemp("adapters")
    return make_adapter(tiny_teacher, folder / "one"), make_adapter(tiny_teacher, folder / "two", 2)


def states(backbone: Backbone) -> Tensor:
    return Passes(backbone).last_states(PROMPTS)


def by_peft(model: Any, folder: Path) -> Tensor:
    """States of the adapter on a model, one prompt at a time, by peft itself."""
    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        outputs = [
            adapted(input_ids=torch.tensor([prompt]), output_hidden_states=True)
            for prompt in PROMPTS
        ]
    return torch.cat([output.hidden_states[-1][:, -1] for output in outputs])


@pytest.mark.parametrize(
    ("quantization", "compute", "tolerance"),
    [("fp32", "fp32", 1e-5), ("nf4", "fp32", 1e-5), ("nf4", "bf16", 0.03), ("bf16", "auto", 0.03),
     ("int8", "auto", 0.05)],
)  # fmt: skip
def test_an_adapter_does_to_every_quantisation_what_it_does_by_peft(
    tiny_teacher: str, adapters: tuple[Path, Path], quantization: str, compute: Any,
    tolerance: float,
):  # fmt: skip
    base = states(load_backbone(tiny_teacher, quantization, CPU, compute))
    backbone = load_backbone(tiny_teacher, quantization, CPU, compute, str(adapters[0]))
    assert backbone.adapter == "default"
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training
    ours = states(backbone)
    assert gap(ours, base) > 0.1
    # On the same weights, quantised alike, with products in fp32.
    plain = load_backbone(tiny_teacher, quantization, CPU, "fp32" if compute == "bf16" else compute)
    assert gap(ours, by_peft(plain.model, adapters[0])) < tolerance


def test_an_adapter_is_the_model_that_it_is_merged_into(
    tiny_teacher: str, adapters: tuple[Path, Path], tmp_path: Path
):
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    merged: Any = PeftModel.from_pretrained(plain, str(adapters[1])).merge_and_unload()
    shutil.copytree(tiny_teacher, tmp_path / "merged")
    merged.save_pretrained(tmp_path / "merged")
    ours = load_backbone(tiny_teacher, "fp32", CPU, adapter=str(adapters[1]))
    assert gap(states(ours), states(load_backbone(str(tmp_path / "merged"), "fp32", CPU))) < 1e-5


@pytest.mark.parametrize(("quantization", "compute"), [("nf4", "fp32"), ("nf4", "bf16")])
def test_adapters_are_switched_and_leave_the_base_as_it_was(
    tiny_teacher: str, adapters: tuple[Path, Path], quantization: str, compute: Any
):
    backbone = load_backbone(tiny_teacher, quantization, CPU, compute)
    assert backbone.adapter_version == "base"
    found: dict[str | None, Tensor] = {None: states(backbone)}
    versions: dict[str | None, str] = {None: "base"}
    # "m" is a part of nearly every name in a Llama.
    for name, folder in zip(("one", "m"), adapters, strict=True):
        backbone.load_adapter(str(folder), name)
        found[name], versions[name] = states(backbone), backbone.adapter_version
    assert len(set(versions.values())) == 3
    assert min(gap(found["one"], found["m"]), gap(found["m"], found[None])) > 0.05
    for name in ("one", None, "m", "one", None):
        backbone.use_adapter(name)
        assert states(backbone).equal(found[name])
        assert backbone.adapter_version == versions[name]
        assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    with pytest.raises(TeacherError, match=r"No adapter 'two' was loaded, but 'm', 'one'\."):
        backbone.use_adapter("two")


def test_the_shared_prefix_is_that_of_the_adapter_in_use(
    tiny_teacher: str, adapters: tuple[Path, Path]
):
    backbone = load_backbone(tiny_teacher, "fp32", CPU, adapter=str(adapters[0]))
    passes = Passes(backbone, PREFIX)
    for name in ("default", None, "default"):
        backbone.use_adapter(name)
        assert passes.shared(PROMPTS) is not None
        assert gap(passes.last_states(PROMPTS), states(backbone)) < 1e-5


def test_versions_tell_contents_apart_and_last(
    tiny_teacher: str, adapters: tuple[Path, Path], tmp_path: Path
):
    def version(folder: Path) -> str:
        return load_backbone(tiny_teacher, "fp32", CPU, adapter=str(folder)).adapter_version

    own = version(adapters[0])
    shutil.copytree(adapters[0], tmp_path / "copy")
    assert version(tmp_path / "copy") == own
    assert version(adapters[1]) != own
    # Regression: the same weights that are scaled otherwise were taken for the same adapter.
    settings = tmp_path / "copy" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 16}))
    assert version(tmp_path / "copy") != own


def test_an_adapter_takes_the_place_of_another_of_its_name(
    tiny_teacher: str, adapters: tuple[Path, Path]
):
    backbone = load_backbone(tiny_teacher, "nf4", CPU, "fp32", str(adapters[0]))
    backbone.load_adapter(str(adapters[1]))
    other = load_backbone(tiny_teacher, "nf4", CPU, "fp32", str(adapters[1]))
    assert states(backbone).equal(states(other))
    assert backbone.adapters == other.adapters


# ---- what is refused ----------------------------------------------------------------------------


def of_another_model(tiny_teacher: str, folder: Path, **size: int) -> Path:
    tokenizer_free = LlamaForCausalLM(
        LlamaConfig(**{
            **AutoModelForCausalLM.from_pretrained(tiny_teacher).config.to_dict(), **size,
        })
    )  # fmt: skip
    tokenizer_free.save_pretrained(folder / "model")
    return make_adapter(str(folder / "model"), folder / "adapter", 3)


def prompt_tuning(tiny_teacher: str, folder: Path) -> Path:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    get_peft_model(model, settings).save_pretrained(str(folder))
    return folder


def empty_folder(tiny_teacher: str, folder: Path) -> Path:
    folder.mkdir()
    return folder


def without_weights(tiny_teacher: str, folder: Path) -> Path:
    made = make_adapter(tiny_teacher, folder, 3)
    (made / "adapter_model.safetensors").unlink()
    return made


REFUSED: dict[str, tuple[Callable[[str, Path], Path], str]] = {
    "empty": (empty_folder, r"cannot be put onto .*Can't find 'adapter_config.json'"),
    "no weights": (without_weights, "cannot be put onto"),
    "wider": (
        lambda teacher, folder: of_another_model(teacher, folder, intermediate_size=48),
        r"does not fit .*no place of its shape for '.*down_proj\.lora_A",
    ),
    "deeper": (
        lambda teacher, folder: of_another_model(teacher, folder, num_hidden_layers=3),
        r"does not fit .*layers.2.*\(6 in all\)",
    ),
    "output head": (
        lambda teacher, folder: make_adapter(teacher, folder, 3, target_modules=["lm_head"]),
        r"changes the output head 'lm_head'.*merge_and_unload",
    ),
    "whole layers": (
        lambda teacher, folder: make_adapter(teacher, folder, 3, modules_to_save=["lm_head"]),
        "replaces whole layers, 'lm_head'",
    ),
    "no LoRA": (prompt_tuning, "is of kind .*PROMPT_TUNING.*, not LORA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_leaves_things_as_they_were(
    tiny_teacher: str, adapters: tuple[Path, Path], tmp_path: Path, case: str
):
    make, message = REFUSED[case]
    folder = make(tiny_teacher, tmp_path / "bad")
    backbone = load_backbone(tiny_teacher, "fp32", CPU)
    base = states(backbone)
    with pytest.raises(TeacherError, match=f"(?s){message}"):
        backbone.load_adapter(str(folder))
    assert states(backbone).equal(base)
    assert backbone.adapter_version == "base"
    # Regression: what was loaded in part kept the name taken.
    backbone.load_adapter(str(adapters[0]))
    adapted = states(backbone)
    with pytest.raises(TeacherError, match=f"(?s){message}"):
        backbone.load_adapter(str(folder), "other")
    assert states(backbone).equal(adapted)
    assert list(backbone.adapters) == ["default"]
    backbone.use_adapter(None)
    assert states(backbone).equal(base)


def test_no_such_folder_is_refused(tiny_teacher: str, tmp_path: Path):
    with pytest.raises(TeacherError, match="cannot be put onto"):
        load_backbone(tiny_teacher, "fp32", CPU, adapter=str(tmp_path / "nowhere"))
