"""Self-taught reasoning on a tiny teacher: what is kept, what is learned from it, what is safe."""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cotrain.config import FinetuneConfig, parse_as
from cotrain.errors import CotrainError
from cotrain.finetune import run as runs
from cotrain.finetune import star as module
from cotrain.finetune.cot_sft import CotObjective
from cotrain.finetune.run import Context, Outcome
from cotrain.finetune.star import Kept, star
from cotrain.finetune.tuning import Interrupted, Progress
from cotrain.runtime import checkpoint, tracking
from cotrain.teacher import backbone as backbones
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.process_reward import using
from cotrain.teacher.search import Thinker, Thought

K = 4
HINT = "The right one is"
# Round, prompt, and what was drawn from it.
Drawn = tuple[int, list[int], list[Thought]]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread is faster for models this small, and the tokenizer takes longer to read."""
    threads = torch.get_num_threads()
    read = functools.cache(backbones.load_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "use_all_cores", lambda processes: torch.set_num_threads(1))
        patch.setattr(backbones, "load_tokenizer", read)
        patch.setattr(runs, "load_tokenizer", read)
        # A random teacher would hardly ever come to an end.
        patch.setattr(Backbone, "stop_ids", frozenset(range(0, 49_152, 6)))
        yield
    torch.set_num_threads(threads)


@dataclass
class Watched:
    """A training, and what went through it."""

    folder: Path
    context: Context
    draws: list[Drawn]
    objectives: list[CotObjective]
    report: dict[str, Any]

    def kept(self, number: int) -> dict[str, Any]:
        return json.loads((self.folder / f"round_{number}" / "kept.json").read_text("utf-8"))


Train = Callable[..., Watched]


@pytest.fixture(scope="module")
def train(tiny_teacher: str, small_tables: tuple[Path, Path]) -> Train:
    """`train(folder)`: two rounds, the second of which always seems better; `stops_in` a round."""
    interactions, items = small_tables

    def watched(folder: Path, stops_in: int | None = None) -> Watched:
        config = parse_as(
            FinetuneConfig,
            [
                "--data.interactions", str(interactions), "--data.items", str(items),
                "--teacher.model", tiny_teacher, "--teacher.quantization", "fp32",
                "--teacher.num_candidates", str(K), "--teacher.history_length", "3",
                "--teacher.template", "movies", "--teacher.reasoning_tokens", "16",
                "--examples.candidates", "random", "--examples.rows", "6",
                "--examples.validation_rows", "3", "--lora.rank", "4", "--lora.modules",
                "attention", "--star.samples", "2", "--star.rounds", "2", "--sft.epochs", "1",
                "--sft.batch_size", "2", "--sft.learning_rate", "0.002", "--sft.lr_warmup_steps",
                "0", "--output", str(folder),
            ],
        )  # fmt: skip
        seen = Watched(folder, Any, [], [], {})  # pyright: ignore
        draw, fit = Thinker.draw, module.tune

        def watched_draw(self: Thinker, prompts: Any, *rest: Any, **named: Any) -> Any:
            if len(seen.objectives) + 1 == stops_in:
                raise Interrupted("Stopped.")
            found = draw(self, prompts, *rest, **named)
            number = len(seen.objectives) + 1
            seen.draws += [(number, *pair) for pair in zip(prompts, found, strict=True)]
            return found

        def watched_fit(adapter: Any, objective: Any, *rest: Any) -> Progress:
            seen.objectives.append(objective)
            done = fit(adapter, objective, *rest)
            return replace(done, best={**done.best, "nll": 1.0 / len(seen.objectives)})

        def work(context: Context) -> Outcome:
            seen.context = context
            return star(context)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Thinker, "draw", watched_draw)
            patch.setattr(module, "tune", watched_fit)
            if stops_in is None:
                seen.report = runs.run("star", work, "cot", config)
            else:
                with pytest.raises(Interrupted):
                    runs.run("star", work, "cot", config)
        return seen

    return watched


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return train(tmp_path_factory.mktemp("star") / "whole")


def again(seen: Watched, folder: Path) -> Context:
    """The same in another folder, for a training that is planted."""
    log: Any = SimpleNamespace(write=lambda row: None)
    return replace(seen.context, folder=folder, log=log)


# ---- what is kept -------------------------------------------------------------------------------


def placed(context: Context, hinted: bool) -> dict[tuple[int, ...], tuple[int, int, list[int]]]:
    """Row, place of the right item, and the prompt without a hint, of every prompt of every order
    in which a row's candidates can be shown."""
    prompts, found = context.ranker.prompts, {}
    for row, example in enumerate(context.examples.train):
        for order in itertools.permutations(range(K)):
            shown = [example.candidates[place] for place in order]
            right = shown.index(example.target)
            plain = prompts.build(example.history, shown)
            told = prompts.build(example.history, shown, right) if hinted else plain
            found[tuple(told)] = (row, right, plain)
    return found


def leading(seen: Watched, draws: list[Drawn], hinted: bool) -> list[Kept]:
    """Of the first round what is to be kept, by a plain pass over each reasoning."""
    context, known = seen.context, placed(seen.context, hinted)
    backbone, prompts = context.ranker.backbone, context.ranker.prompts
    model: Any = backbone.model
    lines, told = [], []
    with torch.no_grad(), using(backbone, None):  # a new adapter changes nothing
        for _, prompt, thoughts in draws:
            row, right, plain = known[tuple(prompt)]
            for thought in thoughts:
                tokens = torch.tensor([plain + thought.tokens + prompts.answer])
                lines.append(model(tokens).logits[0, -1, prompts.identifiers.first_tokens])
                text = backbone.tokenizer.decode(thought.tokens, skip_special_tokens=True)
                told.append((row, right, thought.finished, " ".join(str(text).split())))
    logits = torch.stack(lines)
    logits = logits - (logits - logits.mean(1, keepdim=True)).mean(0)
    kept = []
    for scores, (row, right, finished, text) in zip(logits.tolist(), told, strict=True):
        margin = scores.pop(right) - max(scores)
        if margin > 0 and finished and len(text.split()) > 2 and "[" not in text:
            kept.append(Kept(row, text, margin, hinted))
    return kept


def test_kept_is_what_leads_to_the_right_item_without_the_hint(whole: Watched):
    tokenizer = whole.context.ranker.backbone.tokenizer
    first = [drawn for drawn in whole.draws if drawn[0] == 1]
    hinted = [HINT in str(tokenizer.decode(prompt)) for _, prompt, _ in first]
    plain = [drawn for drawn, told in zip(first, hinted, strict=True) if not told]
    told = [drawn for drawn, told in zip(first, hinted, strict=True) if told]

    own = leading(whole, plain, hinted=False)
    rest = leading(whole, told, hinted=True)

    # Every row once, and with a hint those that had none.
    solved = {one.row for one in own}
    known = placed(whole.context, hinted=True)
    assert len(plain) == 6
    assert {known[tuple(prompt)][0] for _, prompt, _ in told} == set(range(6)) - solved
    assert solved
    assert rest
    expected = {}
    for one in sorted(own + rest, key=lambda one: one.margin):
        expected[one.row] = one  # the surest
    kept = [Kept(**one) for one in whole.kept(1)["kept"]]
    assert [one.row for one in kept] == sorted(expected)
    for one in kept:
        other = expected[one.row]
        assert (one.text, one.hinted) == (other.text, other.hinted)
        assert one.margin == pytest.approx(other.margin, abs=1e-4)
    facts = whole.kept(1)["facts"]
    assert facts["rows solved"] == len(solved)
    assert facts["rows with a hint"] == len({one.row for one in rest})
    assert facts["drawn"] == 2 * len(first)
    assert facts["kept rate"] == len(kept) / 6


def test_a_hint_is_never_learned(whole: Watched):
    tokenizer = whole.context.ranker.backbone.tokenizer
    for number, objective in enumerate(whole.objectives, 1):
        kept = whole.kept(number)["kept"]
        assert len(objective) == len(kept)
        for row, one in enumerate(kept):
            encoded = objective.encode(row, 0)
            text = str(tokenizer.decode(encoded.tokens))
            assert HINT not in text
            assert objective.train[row].text == one["text"]
            assert objective.train[row].example is whole.context.examples.train[one["row"]]
            said = str(tokenizer.decode(encoded.tokens[encoded.prompt_tokens :]))
            assert said.endswith("\nRanking: [")
            assert said.count("[") == 1
    assert any(one["hinted"] for one in whole.kept(1)["kept"])


def test_the_report_tells_of_each_round(whole: Watched):
    assert [row["round"] for row in whole.report["tables"]["Rounds"]] == [1, 2]
    assert whole.report["best_round"] == whole.report["best_step"] == 2
    assert whole.report["steps"] == sum(max(1, len(each) // 2) for each in whole.objectives)
    rows = [row for row in whole.context.log.rows() if row["kind"] == "validation"]
    assert [row["step"] for row in rows] == [1, 2]
    kept = json.loads((whole.folder / "report.json").read_text("utf-8"))
    texts = [line for sample in kept["samples"] for line in sample["lines"]]
    assert f"Reasoning: This user likes {whole.kept(1)['kept'][0]['text']}" in texts


# ---- stops --------------------------------------------------------------------------------------


def test_a_round_that_was_drawn_is_not_drawn_again(whole: Watched, train: Train, tmp_path: Path):
    train(tmp_path / "part", stops_in=2)
    assert checkpoint.steps(tmp_path / "part" / "round_1")
    assert not (tmp_path / "part" / "round_2").exists()

    rest = train(tmp_path / "part")

    first = {tuple(prompt) for number, prompt, _ in whole.draws if number == 1}
    assert not first & {tuple(prompt) for _, prompt, _ in rest.draws}
    for number in (1, 2):
        one, other = whole.kept(number), rest.kept(number)
        assert one["facts"] == other["facts"]
        for kept, same in zip(one["kept"], other["kept"], strict=True):
            assert kept.pop("margin") == pytest.approx(same.pop("margin"), abs=1e-3)
            assert kept == same
    weights = [load_file(seen.folder / "adapter" / "adapter_model.safetensors")
               for seen in (whole, rest)]  # fmt: skip
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-4, rtol=1e-3)
    assert not list(rest.folder.rglob("checkpoints"))


def test_without_a_gain_it_ends_as_it_began(
    whole: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    context, asked = again(whole, tmp_path), []
    (tmp_path / "round_1").mkdir()
    (tmp_path / "round_1" / "kept.json").write_text(json.dumps(whole.kept(1)))
    before = context.adapter.state()

    def worse(adapter: Any, objective: Any, *_: Any) -> Progress:
        asked.append(len(objective))
        for value in adapter.parameters.values():
            value.data += 1
        best = {"step": 3.0, "nll": 99.0, "ndcg@10": 0.9, "accuracy@1": 0.0, "mrr": 0.1}
        return Progress(step=3, best=best)

    monkeypatch.setattr(module, "tune", worse)
    outcome = star(context)

    assert asked == [len(whole.kept(1)["kept"])]
    assert outcome.facts == {"best_round": 0}
    assert outcome.progress is not None
    assert outcome.progress.best == {"step": 0.0, **outcome.progress.start}
    for name, value in context.adapter.state().items():
        assert torch.equal(value, before[name])


def test_where_nothing_is_kept_the_adapter_is_safe(
    whole: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    context = again(whole, tmp_path)
    before = context.adapter.state()

    def cut_off(self: Thinker, prompts: Any, count: int, *_: Any) -> list[list[Thought]]:
        return [[Thought([50, 51, 52, 53], 4, False)] * count for _ in prompts]

    monkeypatch.setattr(Thinker, "draw", cut_off)
    with pytest.raises(CotrainError, match=r"Round 1 kept none .*the best adapter so far is in"):
        star(context)

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(before)
    for name, value in saved.items():
        assert torch.equal(value, before[name.removeprefix("base_model.model.").replace(
            ".weight", ".trained.weight")])  # fmt: skip


# ---- the pure parts -----------------------------------------------------------------------------


def test_what_a_letter_has_above_the_others_is_taken_out():
    worth = torch.tensor([[[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]], [[2.0, 3.0, 1.0], [2.0, 2.0, 2.0]]])
    letters = torch.tensor([5.0, 0.0, -2.0])
    rows = torch.tensor([7.0, -1.0])[:, None, None]
    found = module._unbiased(worth + letters + rows)
    torch.testing.assert_close(found, worth - 2)
    assert module._unbiased(torch.zeros(0, 2, 3)).shape == (0, 2, 3)


def keeping(text: str, finished: bool = True, scores: tuple[float, ...] = (1.0, 3.0, 2.5)) -> Any:
    """What is kept of one reasoning of row 7, whose right item is the second."""
    thinker = SimpleNamespace(text_of=lambda tokens: text)
    context: Any = SimpleNamespace(ranker=SimpleNamespace(reader=SimpleNamespace(thinker=thinker)))
    logits = torch.tensor([scores])
    return module._right_ones(context, 7, [Thought([1], 1, finished)], logits, 1, True)


def test_one_that_is_right_is_kept_with_its_margin():
    assert keeping("  likes\n old   films. ") == ([Kept(7, "likes old films.", 0.5, True)], 1.0)


@pytest.mark.parametrize("text", ["likes [A] more", "too short", "", "  \n "])
def test_what_says_nothing_or_names_a_label_is_not_kept(text: str):
    assert keeping(text) == ([], 1.0)


def test_what_was_cut_off_or_is_wrong_or_no_better_is_not_kept():
    assert keeping("likes old films", finished=False) == ([], 1.0)
    assert keeping("likes old films", scores=(4.0, 3.0, 0.0)) == ([], 0.0)
    assert keeping("likes old films", scores=(3.0, 3.0, 0.0)) == ([], 0.0)


KEPT = st.builds(
    Kept, st.integers(0, 3), st.sampled_from(["a b c", "d e f", "g h i"]), st.floats(0.1, 9),
    st.booleans(),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(kept=st.lists(KEPT, max_size=12), per_row=st.integers(1, 3))
def test_of_a_row_the_surest_different_texts_stay(kept: list[Kept], per_row: int):
    found = module._deduplicated(kept, per_row)
    assert [one.row for one in found] == sorted(one.row for one in found)
    for row in range(4):
        own = [one for one in kept if one.row == row]
        best = {text: max(one.margin for one in own if one.text == text)
                for text in {one.text for one in own}}  # fmt: skip
        mine = [one for one in found if one.row == row]
        assert [one.margin for one in mine] == sorted(best.values(), reverse=True)[:per_row]
        assert all(best[one.text] == one.margin for one in mine)
        assert len({one.text for one in mine}) == len(mine)
