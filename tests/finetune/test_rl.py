"""Reinforcement on a tiny teacher: what reaches the policy, what changes, when it stops."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cotrain.config import FinetuneConfig, parse_as
from cotrain.errors import ConfigError, CotrainError
from cotrain.finetune import grpo, rollouts
from cotrain.finetune import rl as module
from cotrain.finetune.quality import Measured
from cotrain.finetune.rewards import Scored
from cotrain.finetune.rl import rewards_table, rl
from cotrain.finetune.rollouts import Actor, Rollout
from cotrain.finetune.run import Context, prepare
from cotrain.finetune.tuning import Interrupted
from cotrain.runtime import checkpoint, tracking
from cotrain.teacher.process_reward import Head, save_head
from cotrain.teacher.steps import split_steps
from cotrain.teacher.writing import Written

Prepare = Callable[..., Context]


def build(teacher: str, tables: tuple[Path, Path], folder: Path, *options: str) -> Context:
    interactions, items = tables
    config = parse_as(
        FinetuneConfig,
        [
            "--data.interactions", str(interactions), "--data.items", str(items),
            "--teacher.model", teacher, "--teacher.quantization", "fp32",
            "--teacher.num_candidates", "4", "--teacher.history_length", "3",
            "--teacher.reasoning_tokens", "6", "--examples.candidates", "random",
            "--examples.rows", "8", "--examples.validation_rows", "3", "--lora.rank", "4",
            "--lora.modules", "attention", "--rl.steps", "2", "--rl.prompts_per_step", "2",
            "--rl.group_size", "4", "--rl.process_weight", "0", "--rl.learning_rate", "0.01",
            "--rl.min_tokens", "2", "--output", str(folder), *options,
        ],
    )  # fmt: skip
    settings = dataclasses.replace(config.teacher, mode="cot")
    return prepare("rl", dataclasses.replace(config, teacher=settings))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """With models this small a second thread costs more than it does."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "use_all_cores", lambda processes: torch.set_num_threads(1))
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def prepared(tmp_path: Path, tiny_teacher: str, small_tables: tuple[Path, Path]) -> Prepare:
    """Everything before the first step, on 60 users; options override settings."""

    def with_options(*options: str, folder: str = "training") -> Context:
        return build(tiny_teacher, small_tables, tmp_path / folder, *options)

    return with_options


@pytest.fixture(scope="module")
def idle(
    one_thread: None, tiny_teacher: str, small_tables: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Context:  # fmt: skip
    """The same for tests that train nothing."""
    context = build(tiny_teacher, small_tables, tmp_path_factory.mktemp("idle") / "training")
    context.ranker.backbone.model.eval()
    return context


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that differ within every group: the mean of the tokens that were drawn."""

    def scored(self: Actor, task: Any, end: Any, logits: Tensor, steps: Any) -> Rollout:
        completion, reasoning, ended = end
        value = float(np.mean(completion)) / 49_152
        return Rollout(
            task, completion, reasoning, "", ended, logits, 1, Scored(value, {"rank": value})
        )

    monkeypatch.setattr(Actor, "_rewarded", scored)


def rows_of(context: Context, kind: str) -> list[dict[str, Any]]:
    return [row for row in context.log.rows() if row["kind"] == kind]


def same(state: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    return all(
        torch.allclose(value, other[name], rtol=0, atol=tolerance) for name, value in state.items()
    )


@pytest.mark.parametrize(
    ("quantization", "dtypes"),
    [("nf4", {torch.uint8, torch.float32}), ("bf16", {torch.bfloat16, torch.float32})],
)
def test_a_training_changes_the_adapter_alone(
    prepared: Prepare, uneven: None, quantization: str, dtypes: set[torch.dtype]
):
    context = prepared("--teacher.quantization", quantization, "--rl.steps", "1")
    backbone, adapter = context.ranker.backbone, context.adapter
    model: Any = backbone.model
    before, stops = adapter.state(), backbone.stop_ids
    frozen = {
        name: value.clone()
        for name, value in model.named_parameters()
        if name not in adapter.parameters
    }
    settings, generation = model.config.to_dict(), model.generation_config.to_dict()
    padding = backbone.tokenizer.pad_token

    outcome = rl(context)

    rest = {n: v for n, v in model.named_parameters() if n not in adapter.parameters}
    assert {value.dtype for value in rest.values()} == dtypes
    assert all(torch.equal(value, rest[name]) for name, value in frozen.items())
    # In bf16, as TRL would have it on 4 bits, steps of 1e-5 would be lost.
    assert {value.dtype for value in adapter.parameters.values()} == {torch.float32}
    # The end may have been worse, and then the start is kept; the last step's weights differ.
    weights, _ = checkpoint.load_latest(context.folder)
    assert same(weights["start"], {name: value.float() for name, value in before.items()})
    assert not same(weights["adapter"], weights["start"], 1e-4)
    assert same(adapter.state(), weights["start" if outcome.facts["best_step"] == 0 else "adapter"])
    assert "forward" not in vars(model)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (settings, generation)
    assert (backbone.stop_ids, backbone.tokenizer.pad_token) == (stops, padding)
    assert not any(module.training for module in model.modules())
    assert {name for name, value in model.named_parameters() if value.requires_grad} == set(
        adapter.parameters
    )


def test_what_a_training_tells(prepared: Prepare, capsys: pytest.CaptureFixture):
    context = prepared()

    outcome = rl(context)

    rows = rows_of(context, "rl")
    assert [row["step"] for row in rows] == [1, 2]
    assert {
        "reward", "reward_std", "rank", "rank_std", "format", "grounding", "repetition", "length",
        "kl", "entropy", "loss", "grad_norm", "lr", "completion_tokens", "cut_off", "zero_spread",
        "distinct", "no_verdict", "letter_bias", "letter_bias_spread",
    } <= set(rows[0])  # fmt: skip
    assert [row["lr"] for row in rows] == pytest.approx([0.01, 0.005])
    assert rows[0]["completion_tokens"] <= 6
    assert [row["step"] for row in rows_of(context, "validation")] == [0, 2]
    facts = outcome.facts
    assert {"accuracy@1", "ndcg@10", "mrr"} <= set(facts["validation_start"])
    assert facts["validation_best"] in (facts["validation_start"], facts["validation_end"])
    assert (facts["steps"], facts["rollouts"]) == (2, 16)
    assert [row["part"] for row in outcome.tables["Rewards"]][:2] == ["reward", "rank"]
    # Two prompts a step, the best and the worst of each, at the first and the last step.
    assert [sample.heading for sample in outcome.samples] == [
        f"Step {step}, prompt {prompt}: the {name} of 4"
        for step in (1, 2) for prompt in (1, 2) for name in ("best", "worst")
    ]  # fmt: skip
    # Nothing of TRL's own on the screen or on the disk.
    shown = capsys.readouterr()
    assert "{'loss'" not in shown.out + shown.err
    assert "Warning" not in shown.err
    known = {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints"}
    assert {path.name for path in context.folder.iterdir() if "tfevents" not in path.name} <= (
        known | {"tensorboard"}
    )


def test_the_policy_is_given_the_prompts_as_the_ranker_builds_them(
    prepared: Prepare, uneven: None, monkeypatch: pytest.MonkeyPatch
):
    context = prepared("--rl.steps", "1")
    seen: list[tuple[list[int], list[int]]] = []
    plain = grpo.token_logprobs

    def spied(backbone: Any, rows: Any, temperature: float) -> Any:
        seen.extend(rows)
        return plain(backbone, rows, temperature)

    monkeypatch.setattr(grpo, "token_logprobs", spied)
    drawn: list[list[Rollout]] = []
    draw = Actor.draw

    def remembered(self: Actor, step: int, places: Sequence[int]) -> list[Rollout]:
        drawn.append(draw(self, step, places))
        return drawn[-1]

    monkeypatch.setattr(Actor, "draw", remembered)

    rl(context)

    (rows,) = drawn
    built = [context.ranker.prompts.build(row.task.example.history, row.task.shown) for row in rows]
    given = sorted((prompt, row.completion) for prompt, row in zip(built, rows, strict=True))
    assert len({tuple(prompt) for prompt in built}) == 2
    # Once for the reference and once for the policy.
    assert sorted(seen) == sorted(given + given)
    for row in rows:
        assert sorted(row.task.shown) == sorted(row.task.example.candidates)
        assert row.task.shown[row.task.place] == row.task.example.target


def test_log_probabilities_are_those_of_the_model(idle: Context):
    context = idle
    backbone = context.ranker.backbone
    rows = [([5, 6, 7, 8], [9, 10]), ([11, 12], [13, 14, 15]), ([20], [21])]

    found = grpo.token_logprobs(backbone, rows, temperature=0.7)

    for (prompt, own), (logprobs, entropies) in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = backbone.model(torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1]
        plain = torch.log_softmax(logits.double() / 0.7, dim=1)
        assert logprobs.detach().numpy() == pytest.approx(
            plain[torch.arange(len(own)), torch.tensor(own)].numpy(), abs=1e-4
        )
        assert entropies.numpy() == pytest.approx(-(plain.exp() * plain).sum(1).numpy(), abs=1e-4)


def test_chunks_change_neither_values_nor_gradients(idle: Context, monkeypatch: pytest.MonkeyPatch):
    context = idle
    rows = [([5, 6, 7], [9, 10, 11]), ([11, 12], [13, 14])]
    parameters = list(context.adapter.parameters.values())
    found = []
    for chunk in (256, 2):
        monkeypatch.setattr(grpo, "_CHUNK", chunk)
        logprobs = torch.cat(
            [row for row, _ in grpo.token_logprobs(context.ranker.backbone, rows, 1)]
        )
        found.append([logprobs.detach(), *torch.autograd.grad(logprobs.sum(), parameters)])
    for whole, in_chunks in zip(*found, strict=True):
        assert torch.allclose(whole, in_chunks, atol=1e-3)


def test_the_divergence_is_from_the_weights_at_the_start(prepared: Prepare, uneven: None):
    # Dropout, which would be a divergence of its own, is in neither of them.
    context = prepared("--lora.dropout", "0.5", "--rl.beta", "0.1")

    rl(context)

    first, second = rows_of(context, "rl")
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-4


def test_how_a_step_is_computed_does_not_matter(prepared: Prepare, uneven: None):
    states = []
    for number, options in enumerate(
        [(), ("--sft.micro_batch_tokens", "1", "--sft.gradient_checkpointing", "on")]
    ):
        context = prepared("--rl.steps", "1", *options, folder=f"training{number}")
        rl(context)
        states.append(checkpoint.load_latest(context.folder)[0]["adapter"])
    assert same(states[0], states[1], 1e-5)


# ---- completions ---------------------------------------------------------------------------------


def planted(context: Context, monkeypatch: pytest.MonkeyPatch, texts: Sequence[list[int]]) -> Actor:
    """An actor whose policy writes these tokens."""
    written = [Written(tokens, False, 0.0) for tokens in texts]
    monkeypatch.setattr(rollouts, "write", lambda *_: (written, None))
    return Actor(context, torch.zeros(4))


def test_the_verdict_after_a_reasoning_is_rewarded_by_its_rank(
    idle: Context, monkeypatch: pytest.MonkeyPatch
):
    context = idle
    backbone, prompts = context.ranker.backbone, context.ranker.prompts
    tokens = [
        backbone.tokenizer.encode(text, add_special_tokens=False)
        for text in (" crime.", " war and war and war and war.", " love", " drama.\nRanking: [A]")
    ]
    actor = planted(context, monkeypatch, tokens)

    found = actor.draw(0, [0])

    task = actor.task(0, 0)
    ids = torch.tensor(prompts.identifiers.first_tokens)
    for rollout in found:
        with torch.no_grad():
            whole = torch.tensor([task.tokens + rollout.reasoning + prompts.answer])
            logits = backbone.model(whole).logits[0, -1, ids]
        assert torch.allclose(rollout.logits, logits, atol=1e-4)
        rank = int((logits >= logits[task.place]).sum())
        assert (rollout.rank, rollout.scored.parts["rank"]) == (rank, 1 / rank)
    assert found[1].scored.parts["repetition"] > 0.3
    assert [rollout.scored.parts["format"] for rollout in found] == [0, 0, 0, 1]


def test_a_letter_that_the_policy_likes_is_not_rewarded(
    idle: Context, monkeypatch: pytest.MonkeyPatch
):
    context = idle
    actor = planted(context, monkeypatch, [[50]] * 4)
    task = actor.task(0, 0)
    others = [place for place in range(4) if place != task.place]
    logits = torch.zeros(4)
    logits[others[0]], logits[task.place] = 3.0, 2.0
    end = ([50], [50], False)

    assert actor._rewarded(task, end, logits, None).rank == 2
    actor.bias[others[0]] = 1.5
    assert actor._rewarded(task, end, logits, None).rank == 1


def test_the_running_mean_takes_a_prompt_once_and_after_its_ranks(
    idle: Context, monkeypatch: pytest.MonkeyPatch
):
    context = idle
    actor = planted(context, monkeypatch, [[50]] * 8)

    found = actor.draw(0, [0, 1])

    shown = torch.stack([found[0].logits, found[4].logits])  # the same for every completion
    mean = (shown - shown.mean(1, keepdim=True)).mean(0)
    assert torch.allclose(actor.bias, mean * 2 / 202, atol=1e-5)
    for rollout in found:  # read without any mean
        own = rollout.logits[rollout.task.place]
        assert rollout.rank == int((rollout.logits >= own).sum())


def test_where_a_completion_ends(idle: Context):
    context = idle
    actor, tokenizer = Actor(context, torch.zeros(4)), context.ranker.backbone.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    stop = next(iter(context.ranker.backbone.stop_ids))
    reasoning, opening = encode(" crime films."), encode("\nRanking:")
    # What decides the end is learned from, what came by chance behind it is not.
    assert actor._end([*reasoning, stop, *encode(" x")]) == ([*reasoning, stop], reasoning, True)
    ranked = actor._end([*reasoning, *opening, *encode(" [B] > [")])
    assert ranked == (reasoning + opening, reasoning, True)
    assert actor._end([*reasoning, *opening, stop]) == (reasoning + opening, reasoning, True)
    assert actor._end([*reasoning, stop, *opening]) == ([*reasoning, stop], reasoning, True)
    assert actor._end(reasoning) == (reasoning, reasoning, False)
    assert actor._end([stop, stop]) == ([stop], [], True)
    assert actor._end(encode("Ranking:")) == (encode("Ranking:"), [], True)


def test_a_step_is_drawn_the_same_whatever_was_drawn_before(idle: Context):
    context = idle
    first, second = Actor(context, torch.zeros(4)), Actor(context, torch.zeros(4))
    second.draw(0, [0, 1])

    alike = zip(first.draw(1, [0, 1]), second.draw(1, [0, 1]), strict=True)

    assert all(one.completion == other.completion for one, other in alike)
    # Each row once before any comes again.
    users = [first.task(step, place).example for step in range(4) for place in range(2)]
    assert len({id(example) for example in users}) == len(first.rows) == 8


def test_steps_are_scored_by_the_process_reward_model(prepared: Prepare, tmp_path: Path):
    named = str(tmp_path / "process")
    context = prepared(
        "--rl.process_weight", "0.5", "--rl.process_reward", named, "--teacher.reasoning_tokens",
        "24",
    )  # fmt: skip
    backbone = context.ranker.backbone
    size = backbone.hidden_size
    torch.manual_seed(0)
    head = Head(torch.randn(size) / 4, torch.tensor(0.1), torch.zeros(size), torch.ones(size))
    save_head(head, Path(named), backbone.name, {})

    actor = Actor(context, torch.zeros(4))
    found = actor.draw(0, [0, 1])

    assert actor.process is not None
    for rollout in found:
        ends = split_steps(backbone.tokenizer, rollout.reasoning)
        scores = actor.process.score(
            [rollout.task.tokens + rollout.reasoning[:end] for end in ends]
        )
        assert rollout.scored.parts["process"] == pytest.approx(float(scores.mean()), abs=1e-5)
        parts = rollout.scored.parts
        assert rollout.scored.reward == pytest.approx(
            parts["rank"] + 0.1 * parts["format"] + 0.1 * parts["grounding"]
            + 0.5 * parts["process"] - 0.2 * parts["repetition"] - 0.2 * parts["length"]
        )  # fmt: skip
    assert max(len(split_steps(backbone.tokenizer, r.reasoning)) for r in found) > 1
    # Scoring with the model as it is left the adapter on, and to be trained.
    assert backbone.adapter == "trained"
    assert all(parameter.requires_grad for parameter in context.adapter.parameters.values())


# ---- stops ---------------------------------------------------------------------------------------


def test_it_stops_where_all_rewards_are_equal(prepared: Prepare, monkeypatch: pytest.MonkeyPatch):
    context = prepared("--rl.steps", "9")
    before = context.adapter.state()
    monkeypatch.setattr(
        rollouts.rewards, "combined", lambda parts, settings: Scored(0.0, dict(parts))
    )

    outcome = rl(context)

    assert outcome.facts["steps"] == 5
    assert "nothing to learn" in outcome.facts["warning"]
    assert [row["zero_spread"] for row in rows_of(context, "rl")] == [1.0] * 5
    assert same(context.adapter.state(), before)
    assert checkpoint.steps(context.folder) == [5]


def test_an_interrupted_training_goes_on_as_if_nothing_had_been(
    prepared: Prepare, uneven: None, monkeypatch: pytest.MonkeyPatch
):
    whole = prepared("--rl.steps", "2", folder="whole")
    rl(whole)
    context = prepared("--rl.steps", "2")
    training = module._Training(context)
    stepped = training.stepped

    def ask_to_stop(logs: dict[str, Any]) -> bool:
        training.stop.received = training.progress.step == 0
        return stepped(logs)

    monkeypatch.setattr(training, "stepped", ask_to_stop)
    with pytest.raises(Interrupted, match="step 1 of 2"):
        training.run()
    assert checkpoint.steps(context.folder) == [1]

    again = prepared("--rl.steps", "2")
    outcome = rl(again)

    assert outcome.facts["steps"] == 2
    assert [row["step"] for row in rows_of(again, "rl")] == [1, 2]
    for one, other in zip(rows_of(whole, "rl"), rows_of(again, "rl"), strict=True):
        assert list(one) == list(other)
        for name in set(one) - {"kind"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    ends = [checkpoint.load_latest(of.folder)[0] for of in (whole, again)]
    assert same(ends[0]["adapter"], ends[1]["adapter"], 1e-4)
    assert same(ends[0]["start"], ends[1]["start"])


def test_a_loss_that_is_no_number_ends_it_with_the_adapter_saved(
    prepared: Prepare, uneven: None, monkeypatch: pytest.MonkeyPatch
):
    context = prepared("--rl.beta", "0", "--rl.steps", "3")
    training = module._Training(context)
    plain = grpo.token_logprobs

    def broken(backbone: Any, rows: Any, temperature: float) -> Any:
        factor = float("nan") if training.progress.step == 2 else 1.0
        found = plain(backbone, rows, temperature)
        return [(logprobs * factor, entropies) for logprobs, entropies in found]

    monkeypatch.setattr(grpo, "token_logprobs", broken)
    monkeypatch.setattr(grpo, "_weights", None)  # without rl.beta there is no reference pass
    with pytest.raises(CotrainError, match=r"step 3.*rl\.learning_rate \(now 0\.01\)"):
        training.run()

    assert all("kl" not in row for row in rows_of(context, "rl"))
    kept = context.adapter.state()
    assert all(value.isfinite().all() for value in kept.values())
    assert (context.folder / "adapter" / "adapter_model.safetensors").is_file()
    # Weights with which a loss was a number: those before the second step.
    assert same(kept, training.sound)
    assert not same(kept, training.start, 1e-4)


def test_the_start_is_kept_where_the_end_is_worse(
    prepared: Prepare, uneven: None, monkeypatch: pytest.MonkeyPatch
):
    context = prepared("--rl.steps", "1", "--sft.best_by", "ndcg@10")
    before, measure, asked = context.adapter.state(), module.measure, []

    def worse_each_time(*arguments: Any, **options: Any) -> Measured:
        asked.append(1)
        ranks = np.full(len(context.examples.validation), len(asked))
        return dataclasses.replace(measure(*arguments, **options), ranks=ranks)

    monkeypatch.setattr(module, "measure", worse_each_time)

    facts = rl(context).facts

    assert facts["best_step"] == 0
    assert facts["validation_best"] == facts["validation_start"]
    assert facts["validation_start"]["mrr"] == 1
    assert facts["validation_end"]["mrr"] == 0.5
    assert facts["kept"].startswith("the adapter of the start")
    assert same(context.adapter.state(), before)


def test_settings_that_cannot_work(idle: Context, monkeypatch: pytest.MonkeyPatch):
    settings = dataclasses.replace(idle.config.rl, process_weight=0.5)
    config = dataclasses.replace(idle.config, rl=settings)
    with pytest.raises(ConfigError, match=r"rl\.process_reward is none"):
        rl(dataclasses.replace(idle, config=config))
    monkeypatch.setattr(type(idle.accelerator), "num_processes", 2)
    with pytest.raises(ConfigError, match="one process, but 2"):
        rl(idle)


def test_the_table_compares_both_ends():
    history = [{"reward": float(step), "rank": 1.0} for step in range(12)]

    table = rewards_table(history)

    assert table == [
        {"part": "reward", "first 5 steps": 2.0, "last 5 steps": 9.0, "change": 7.0},
        {"part": "rank", "first 5 steps": 1.0, "last 5 steps": 1.0, "change": 0.0},
    ]
    assert rewards_table(history[:3])[0] == {
        "part": "reward", "first 1 steps": 0.0, "last 1 steps": 2.0, "change": 2.0,
    }  # fmt: skip
    assert rewards_table([]) == []
