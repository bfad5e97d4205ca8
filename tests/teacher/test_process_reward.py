"""A process reward model: what is saved is what scores, under its own adapter, and the teacher is
left as it was."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from cotrain.benchmarks.parity import random_prompts
from cotrain.errors import CheckpointError, TeacherError
from cotrain.teacher import backbone as backbones
from cotrain.teacher.backbone import Backbone, load_backbone
from cotrain.teacher.memory import TokenBudget
from cotrain.teacher.passes import Passes
from cotrain.teacher.process_reward import Head, ProcessReward, save_head, trainable, using

PREFIX = random_prompts([6], seed=1)[0]
PROMPTS = random_prompts([3, 17, 9, 17, 1], PREFIX)


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """It takes longer to read than the tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load_tokenizer", functools.cache(backbones.load_tokenizer))
        yield


@pytest.fixture
def backbone(tiny_teacher: str) -> Backbone:
    return load_backbone(tiny_teacher, "fp32", torch.device("cpu"))


def random_head(size: int = 32, seed: int = 0) -> Head:
    draw = torch.Generator().manual_seed(seed)
    return Head(
        torch.randn(size, generator=draw), torch.tensor(0.3), torch.randn(size, generator=draw),
        torch.rand(size, generator=draw) + 0.5,
    )  # fmt: skip


def add_adapter(backbone: Backbone, name: str, seed: int) -> None:
    """A random one that matters, in use and trainable."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = ["q_proj", "down_proj"]
        backbone.model.add_adapter(LoraConfig(r=4, target_modules=layers), name)
        for key, parameter in backbone.model.named_parameters():
            if f"lora_B.{name}." in key:
                nn.init.normal_(parameter, std=0.3)
    backbone.adapters[name] = name
    backbone.use_adapter(name)
    backbone.model.eval()
    for key, parameter in backbone.model.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(True)


def save_adapter(teacher: str, folder: Path, seed: int) -> Backbone:
    """Written as a training writes it; returns the teacher that has it on."""
    backbone = load_backbone(teacher, "fp32", torch.device("cpu"))
    add_adapter(backbone, "trained", seed)
    backbone.model.save_pretrained(folder)
    return backbone


def plain_scores(backbone: Backbone, head: Head) -> Tensor:
    """(N,) by the model as it stands, one by one, in float64."""
    model: Any = backbone.model
    with torch.no_grad():
        found = [model(torch.tensor([p]), output_hidden_states=True) for p in PROMPTS]
    states = torch.cat([output.hidden_states[-1][:, -1] for output in found]).double()
    mean, scale, weight = (vars(head)[name].tolist() for name in ("mean", "scale", "weight"))
    logits = [
        sum((s - m) / d * w for s, m, d, w in zip(state, mean, scale, weight, strict=True))
        for state in states.tolist()
    ]
    return torch.sigmoid(torch.tensor(logits) + head.bias)


def loaded(folder: Path, backbone: Backbone, budget: int = 8192) -> ProcessReward:
    return ProcessReward.load(folder, Passes(backbone, PREFIX), TokenBudget(budget))


def needing(backbone: Backbone) -> set[str]:
    return {name for name, p in backbone.model.named_parameters() if p.requires_grad}


# ---- scores -------------------------------------------------------------------------------------


def test_what_is_saved_scores_as_the_plain_formula(backbone: Backbone, tmp_path: Path):
    head = random_head()
    save_head(head, tmp_path / "deep" / "prm", backbone.name, {"auc": 0.75})
    found = loaded(tmp_path / "deep" / "prm", backbone)
    for name, value in vars(head).items():
        assert vars(found.head)[name].equal(value)
    facts = json.loads((tmp_path / "deep" / "prm" / "process_reward.json").read_text())
    assert facts["auc"] == 0.75
    scores = found.score(PROMPTS)
    torch.testing.assert_close(scores, plain_scores(backbone, head), atol=1e-4, rtol=1e-4)
    assert scores.dtype == torch.float32
    assert ((scores > 0) & (scores < 1)).all()
    assert len(set(scores.tolist())) == len(PROMPTS)
    assert backbone.adapter is None
    # However few of them fit memory at once.
    torch.testing.assert_close(
        loaded(tmp_path / "deep" / "prm", backbone, 24).score(PROMPTS), scores
    )


def test_where_memory_runs_out_fewer_are_read_at_once_or_it_is_told(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
):
    found = ProcessReward(random_head(), Passes(backbone), TokenBudget(8192))
    expected = found.score(PROMPTS)
    plain = found.passes.last_states

    def small(prompts: Any) -> Tensor:
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(prompts)

    most = 2
    monkeypatch.setattr(found.passes, "last_states", small)
    torch.testing.assert_close(found.score(PROMPTS), expected)
    most = 0
    with pytest.raises(MemoryError, match="no memory to score one step"):
        found.score(PROMPTS)


# ---- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_use", [None, "other", "trained"])
@pytest.mark.parametrize("own", [True, False], ids=["own adapter", "no adapter"])
def test_it_reads_under_its_own_adapter_and_leaves_the_teacher_as_it_was(
    tiny_teacher: str, backbone: Backbone, tmp_path: Path, in_use: str | None, own: bool
):
    """Also where the one in use is being trained."""
    head = random_head()
    save_head(head, tmp_path, backbone.name, {})
    expected = plain_scores(backbone, head)
    if own:
        expected = plain_scores(save_adapter(tiny_teacher, tmp_path / "adapter", seed=5), head)
    if in_use:
        add_adapter(backbone, in_use, seed=8)
    version, weights = backbone.adapter_version, needing(backbone)
    assert bool(weights) == bool(in_use)
    plain = plain_scores(backbone, head)

    found, scores = loaded(tmp_path, backbone), expected
    for _ in range(2):
        assert backbone.adapter == in_use
        assert backbone.adapter_version == version
        assert needing(backbone) == weights
        torch.testing.assert_close(plain_scores(backbone, head), plain, atol=0, rtol=0)
        scores = found.score(PROMPTS)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    if in_use or own:
        assert (scores - plain).abs().max() > 1e-3
    assert not found.states(PROMPTS).requires_grad


def test_what_fails_inside_leaves_the_teacher_as_it_was(backbone: Backbone):
    add_adapter(backbone, "trained", seed=8)
    add_adapter(backbone, "other", seed=9)
    backbone.use_adapter("trained")
    parameters = [p for name, p in backbone.model.named_parameters() if ".trained." in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    for name in ("other", None):
        with pytest.raises(ZeroDivisionError), using(backbone, name):  # noqa: PT012
            assert backbone.adapter == name
            assert not trainable(backbone)
            raise ZeroDivisionError
        assert backbone.adapter == "trained"
        assert {*map(id, trainable(backbone))} == {*map(id, parameters)}


def test_the_shared_prefix_is_not_mixed_up(tiny_teacher: str, backbone: Backbone, tmp_path: Path):
    """Passes that go on from one prefix, under two adapters by turns."""
    head = random_head()
    save_head(head, tmp_path, backbone.name, {})
    expected = plain_scores(save_adapter(tiny_teacher, tmp_path / "adapter", seed=5), head)
    passes = Passes(backbone, PREFIX)
    found = ProcessReward.load(tmp_path, passes, TokenBudget(8192))
    states = Passes(backbone).last_states(PROMPTS)
    for _ in range(2):
        torch.testing.assert_close(passes.last_states(PROMPTS), states, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.score(PROMPTS), expected, atol=1e-4, rtol=1e-4)


# ---- refusals -----------------------------------------------------------------------------------


def test_another_models_is_refused(backbone: Backbone, tmp_path: Path):
    save_head(random_head(), tmp_path / "name", "another", {})
    with pytest.raises(TeacherError, match=r"trained on 'another' .* Train one for this teacher"):
        loaded(tmp_path / "name", backbone)
    save_head(random_head(16), tmp_path / "width", backbone.name, {})
    with pytest.raises(TeacherError, match=r"states of 16, not on .* with 32"):
        loaded(tmp_path / "width", backbone)
    save_head(random_head(), tmp_path / "format", backbone.name, {})
    facts = tmp_path / "format" / "process_reward.json"
    facts.write_text(facts.read_text().replace("reward-1", "reward-2"))
    with pytest.raises(TeacherError, match="Train one for this teacher"):
        loaded(tmp_path / "format", backbone)
    assert backbone.adapter is None


@pytest.mark.parametrize("what", ["nothing", "no head", "no numbers", "cut off", "a part", "a list",
                                  "no model"])  # fmt: skip
def test_what_is_none_is_refused(backbone: Backbone, tmp_path: Path, what: str):
    weights, facts = tmp_path / "process_reward.safetensors", tmp_path / "process_reward.json"
    if what != "nothing":
        save_head(random_head(), tmp_path, backbone.name, {})
    if what == "no head":
        weights.unlink()
    elif what == "no numbers":
        facts.write_text("{")
    elif what == "cut off":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif what == "a part":
        save_file({"weight": torch.zeros(32), "bias": torch.tensor(0.0)}, weights)
    elif what == "a list":
        facts.write_text("[]")
    elif what == "no model":
        facts.write_text('{"format": "cotrain-process-reward-1"}')
    with pytest.raises(TeacherError, match=r"process reward model .*"):
        loaded(tmp_path, backbone)


def test_an_adapter_that_does_not_fit_leaves_the_one_in_training_alone(
    backbone: Backbone, tmp_path: Path
):
    """Regression: it stayed in use, but no weight of it required a gradient any more."""
    add_adapter(backbone, "trained", seed=8)
    weights = needing(backbone)
    save_head(random_head(), tmp_path, backbone.name, {})
    (tmp_path / "adapter").mkdir()
    backbone.model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 7)}, file)
    with pytest.raises(TeacherError, match="does not fit"):
        loaded(tmp_path, backbone)
    assert backbone.adapter == "trained"
    assert needing(backbone) == weights


def test_what_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"Cannot write .* Free space there"):
        save_head(random_head(), tmp_path / "file" / "prm", "model", {})
