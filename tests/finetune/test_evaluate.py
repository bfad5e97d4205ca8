"""How good a teacher is: the rows it is asked for, the numbers, and what they are compared with."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.config import DataConfig, EvaluateConfig, parse_as
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.errors import ConfigError, DataError, TeacherError
from cotrain.finetune import evaluate as module
from cotrain.finetune.evaluate import (
    evaluate,
    expected_calibration_error,
    facts_of,
    intervals,
    make_rows,
    open_output,
    parse_searches,
    position_bias,
)
from cotrain.finetune.examples import held_out_users, make_examples
from cotrain.finetune.quality import Measured
from cotrain.student.recommender import Recommender
from cotrain.student.sasrec import SASRec
from cotrain.teacher import backbone as backbones
from cotrain.teacher.ranker import RankLLM
from cotrain.teacher.verdict import TeacherVerdict

K = 5
Configured = Callable[..., EvaluateConfig]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread is faster for models this small, and the tokenizer takes longer to read."""
    threads = torch.get_num_threads()
    read = functools.cache(backbones.load_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "use_all_cores", lambda processes: torch.set_num_threads(1))
        patch.setattr(backbones, "load_tokenizer", read)
        patch.setattr(module, "load_tokenizer", read)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(small_tables: tuple[Path, Path]) -> InteractionData:
    interactions, items = small_tables
    return load_interactions(DataConfig(interactions=str(interactions), items=str(items)))


@pytest.fixture(scope="module")
def configured(tiny_teacher: str, small_tables: tuple[Path, Path]) -> Configured:
    """Settings of a small evaluation; options override others."""
    interactions, items = small_tables

    def with_options(folder: Path, *options: str) -> EvaluateConfig:
        return parse_as(
            EvaluateConfig,
            [
                "--data.interactions", str(interactions), "--data.items", str(items),
                "--teacher.model", tiny_teacher, "--teacher.quantization", "fp32",
                "--teacher.num_candidates", str(K), "--teacher.history_length", "3",
                "--teacher.template", "brief", "--teacher.max_title_tokens", "8",
                "--teacher.calibration_rows", "4", "--examples.candidates", "random",
                "--measure.rows", "20", "--measure.bootstrap_samples", "200",
                "--output", str(folder), *options,
            ],
        )  # fmt: skip

    return with_options


# ---- ways to search -----------------------------------------------------------------------------


def cot(configured: Configured, searches: str, *options: str) -> EvaluateConfig:
    return configured(
        Path("unused"), "--teacher.mode", "cot", "--measure.searches", searches, *options
    )


def test_searches_are_read_with_and_without_spaces(configured: Configured):
    for text in ("greedy,sc4,tree2x3x4,sc16", " sc4, greedy ,tree2x3x4 , sc16"):
        config = cot(configured, text, "--teacher.process_reward", "folder")
        found = parse_searches(config)
        assert set(found) == {"greedy", "sc4", "tree2x3x4", "sc16"}
        assert found["greedy"] == dataclasses.replace(config.teacher, search="none")
        for count in (4, 16):
            assert found[f"sc{count}"] == dataclasses.replace(
                config.teacher, search="self_consistency", samples=count
            )
        assert found["tree2x3x4"] == dataclasses.replace(
            config.teacher, search="tree", branches=2, samples=3, search_steps=4
        )


def test_without_searches_the_settings_hold(configured: Configured):
    config = configured(Path("unused"))
    assert parse_searches(config) == {"ranking": config.teacher}


@pytest.mark.parametrize(
    "text",
    ["beam", "sc", "sc0", "sc-1", "sc4x2", "tree2x2", "tree2x0x1", "tree2x2x2x2", "", "greedy,,sc2",
     "Greedy", "sc4;greedy", "sc 4"],
)  # fmt: skip
def test_an_unknown_search_is_refused(configured: Configured, text: str):
    config = cot(configured, "greedy", "--teacher.process_reward", "folder")
    measured = dataclasses.replace(config.measure, searches=text)
    with pytest.raises(ConfigError, match=r"measure\.searches has '.*expected greedy, scN"):
        parse_searches(dataclasses.replace(config, measure=measured))


def test_searches_that_the_other_settings_rule_out_are_refused(configured: Configured):
    with pytest.raises(ConfigError, match=r"'tree2x2x2', but teacher\.process_reward is none"):
        parse_searches(cot(configured, "greedy, tree2x2x2"))
    with pytest.raises(ConfigError, match=r"'greedy', but teacher\.mode is direct"):
        parse_searches(configured(Path("unused"), "--measure.searches", "greedy"))
    # Once sc2 was measured there on one of its two reasonings.
    emit = cot(configured, "greedy,sc2", "--teacher.decision_position", "emit")
    with pytest.raises(ConfigError, match=r"has 'sc2', but .*decision_position predict"):
        parse_searches(emit)


# ---- numbers ------------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    # Sure of: the first (right), the second (wrong), the first (right), the third (wrong).
    probs = torch.tensor(
        [[0.92, 0.04, 0.04], [0.02, 0.96, 0.02], [1.0, 0.0, 0.0], [0.25, 0.3, 0.45]]
    )
    places = np.array([0, 2, 0, 1])
    tops = abs(2 / 3 - (0.92 + 0.96 + 1.0) / 3)  # of one bin, its upper end included
    expected = 3 / 4 * tops + 1 / 4 * 0.45
    assert expected_calibration_error(probs, places) == pytest.approx(expected, abs=1e-6)
    # Of one bin for all.
    whole = abs(2 / 4 - (0.92 + 0.96 + 1.0 + 0.45) / 4)
    assert expected_calibration_error(probs, places, bins=1) == pytest.approx(whole, abs=1e-6)
    certain = torch.eye(3)
    assert expected_calibration_error(certain, np.array([0, 1, 2])) == 0
    assert expected_calibration_error(certain, np.array([1, 2, 0])) == 1


@settings(max_examples=30, deadline=None)
@given(ranks=st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_intervals_hold_the_mean_and_stay_within_what_there_is(ranks: list[int]):
    found = intervals(np.array(ranks), 200)
    values = {
        "accuracy@1": [float(rank == 1) for rank in ranks],
        "ndcg@10": [1 / math.log2(rank + 1) if rank <= 10 else 0.0 for rank in ranks],
        "mrr": [1 / rank for rank in ranks],
    }
    assert set(found) == set(values)
    for name, own in values.items():
        interval = found[name]
        assert interval.mean == pytest.approx(np.mean(own), abs=1e-6)
        assert min(own) - 1e-6 <= interval.low <= interval.mean + 1e-6
        assert interval.mean - 1e-6 <= interval.high <= max(own) + 1e-6
        if len(set(ranks)) == 1:
            assert interval.low == pytest.approx(interval.high)


def measured(
    ranks: list[list[float]], shown: list[list[int]], valid: list[bool], places: list[int],
    probs: list[list[float]],
) -> Measured:  # fmt: skip
    told = torch.tensor(ranks)
    verdict = TeacherVerdict(
        identifier_logits=None, ranks=told, probs=torch.tensor(probs),
        decision_state=torch.zeros(len(ranks), 2), valid=torch.tensor(valid),
        confidence=torch.full((len(ranks),), 0.5) * torch.tensor(valid),
        agreement=torch.zeros(len(ranks)), shown_order=torch.tensor(shown), prompt_tokens=30,
        generated_tokens=6,
    )  # fmt: skip
    own = told[range(len(ranks)), places].numpy().astype(np.int64)
    own = np.where(valid, own, told.shape[1])
    return Measured(verdict, own, verdict.probs, np.array(places))


def test_rows_without_a_verdict_count_as_wrong_and_tell_nothing_of_honesty_and_bias():
    found = measured(
        [[1.0, 2.0], [2.0, 1.0], [0.0, 0.0]], [[0, 1], [0, 1], [1, 0]], [True, True, False],
        [0, 0, 0], [[0.75, 0.25], [0.35, 0.65], [0.0, 0.0]],
    )  # fmt: skip
    assert position_bias(found) == [1.5, 1.5]
    facts = facts_of(found, 2.0, 100, 2)
    assert facts["accuracy@1"]["mean"] == pytest.approx(1 / 3)
    assert facts["mrr"]["mean"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert (facts["valid_rate"], facts["confidence"]) == (pytest.approx(2 / 3), 0.5)
    # Where all is 0 the first would pass for the likeliest, and it is the true one.
    assert facts["calibration_error"] == pytest.approx((0.25 + 0.65) / 2)
    assert facts["nll_of_even"] == pytest.approx(math.log(2))
    assert facts["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.35) + math.log(1e-6)) / 3)
    assert (facts["prompt_tokens_per_row"], facts["rows_per_s"]) == (10, 1.5)


def test_position_bias_is_by_the_place_where_a_candidate_is_shown():
    # Whatever is shown first is ranked first.
    shown = [[0, 1, 2], [2, 0, 1], [1, 0, 2]]
    ranks = [[1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [2.0, 1.0, 3.0]]
    found = measured(ranks, shown, [True] * 3, [0] * 3, [[1.0, 0.0, 0.0]] * 3)
    assert position_bias(found) == [1, 2, 3]
    assert facts_of(found, 1.0, 100, 3)["position_spread"] == 2


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("users", ["all", "held_out"])
def test_rows_are_validation_targets(configured: Configured, data: InteractionData, users: str):
    config = configured(
        Path("unused"), "--measure.rows", "none", "--measure.users", users, "--examples.held_out",
        "0.3", "--seed", "3",
    )  # fmt: skip
    rows, looked_at = make_rows(data, config, None)
    evaluated = set(data.evaluated_users("validation").tolist())
    apart = set(held_out_users(data, 0.3, 3).tolist())
    expected = evaluated if users == "all" else evaluated & apart
    assert [row.user for row in rows] == sorted(expected)
    assert looked_at == len(rows)
    for row in rows:
        history = data.history(row.user)
        end = data.held_out.train_end[row.user] - data.offsets[row.user]
        assert row.cut == end
        assert row.history == tuple(history[:end].tolist())
        assert row.target == history[end]
        assert row.target in row.candidates
        assert len(set(row.candidates)) == K
        assert not set(row.candidates) & set(row.history) - {row.target}
    if users == "held_out":
        # Those whom a training with the same settings leaves out.
        found = make_examples(
            data, dataclasses.replace(config.examples, rows=10**6), K, config.seed, None
        )
        assert {row.user for row in found.train} & apart == set()
        assert len({row.user for row in found.train}) > 30
        assert {row.user for row in found.validation} == {row.user for row in rows}


def test_fewer_rows_are_drawn_by_the_seed(configured: Configured, data: InteractionData):
    every, looked_at = make_rows(data, configured(Path("u"), "--measure.rows", "none"), None)
    config = configured(Path("u"), "--measure.rows", "7")
    some, also = make_rows(data, config, None)
    assert looked_at == also == len(every)
    assert len(some) == 7
    assert all(row in every for row in some)
    assert [row.user for row in some] == sorted(row.user for row in some)
    again, _ = make_rows(data, config, None)
    assert again == some
    other, _ = make_rows(data, dataclasses.replace(config, seed=1), None)
    assert [row.user for row in other] != [row.user for row in some]


def test_where_no_candidates_hold_the_true_item_it_is_told(
    configured: Configured, data: InteractionData
):
    class Bad:
        """A student who never finds what is taken."""

        def top_items(self, histories: Any, count: int) -> Any:
            taken = {data.target(int(user), "validation")
                     for user in data.evaluated_users("validation")}  # fmt: skip
            items = [item for item in range(1, data.num_items + 1) if item not in taken][:count]
            ids = torch.tensor([items] * len(histories))
            return SimpleNamespace(cpu=lambda: SimpleNamespace(item_ids=ids, scores=ids / 1.0))

    student: Any = Bad()
    with pytest.raises(DataError, match=r"None of \d+ validation rows has the true item"):
        make_rows(data, configured(Path("unused")), student)


# ---- whole --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Evaluated:
    """An evaluation that is over."""

    folder: Path
    config: EvaluateConfig
    report: dict[str, Any]

    @property
    def rows(self) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "rows.parquet")


@pytest.fixture(scope="module")
def whole(configured: Configured, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluations") / "first"
    config = configured(folder)
    return Evaluated(folder, config, evaluate(config))


def test_the_report_says_what_its_rows_say(whole: Evaluated, data: InteractionData):
    rows, report = whole.rows, whole.report
    ranks = rows["teacher_rank"].to_numpy()
    assert len(ranks) == report["rows"] == 20
    assert report["rows_looked_at"] == len(data.evaluated_users("validation"))
    assert report["accuracy@1"]["mean"] == pytest.approx((ranks == 1).mean())
    assert report["mrr"]["mean"] == pytest.approx((1 / ranks).mean())
    assert report["ndcg@10"]["mean"] == pytest.approx((1 / np.log2(ranks + 1)).mean())
    assert report["nll"] == pytest.approx(-np.log(rows["probability"].to_numpy()).mean(), abs=1e-4)
    assert report["valid_rate"] == rows["valid"].cast(pl.Float64).mean() == 1
    assert len(set(ranks)) > 2
    assert set(rows["student_rank"]) == {None}
    targets = {
        data.user_ids[user]: data.catalog.item_ids[data.target(user, "validation")]
        for user in data.evaluated_users("validation").tolist()
    }
    assert all(targets[user] == item for user, item in rows.select("user_id", "item_id").rows())
    names = sorted(path.name for path in whole.folder.iterdir())
    assert names == ["report.html", "report.json", "rows.parquet"]
    kept = json.loads((whole.folder / "report.json").read_text())
    assert len(kept.pop("samples")) == 10
    assert kept == report
    (orders,) = report["tables"].values()
    assert [row["order"] for row in orders] == ["teacher", "any, expected"]
    assert orders[0]["mrr"].startswith(f"{(1 / ranks).mean():.4f} (")


def test_it_was_calibrated_on_training_rows(
    whole: Evaluated, data: InteractionData, monkeypatch: pytest.MonkeyPatch
):
    asked: list[Any] = []
    monkeypatch.setattr(
        RankLLM, "calibrate", lambda self, *rows: asked.append((*rows[:2], len(rows[2])))
    )
    ranker = module.make_ranker(data, whole.config)
    module.calibrate(ranker, data, whole.config, None)
    ((histories, candidates, seeds),) = asked
    assert len(histories) == len(candidates) == seeds == 4
    for history, shown in zip(histories, candidates, strict=True):
        owners = [
            user
            for user in data.trained_users
            if tuple(data.train_history(user)[: len(history)].tolist()) == tuple(history)
            and data.train_history(user)[len(history)] in shown
        ]
        assert owners


def test_a_second_one_into_the_same_folder_is_refused(whole: Evaluated, tmp_path: Path):
    before = (whole.folder / "report.json").read_text()
    with pytest.raises(ConfigError, match="is there already and nothing is overwritten"):
        evaluate(whole.config)
    assert (whole.folder / "report.json").read_text() == before
    empty = dataclasses.replace(whole.config, output=str(tmp_path))
    assert open_output(empty) == tmp_path


def test_a_folder_that_cannot_be_written_is_told_at_once(whole: Evaluated, tmp_path: Path):
    """It was once found out when all rows had been measured."""
    (tmp_path / "file").write_text("no folder")
    for name in ("file", "file/out", "file/out/in"):
        with pytest.raises(ConfigError, match="Choose another --output"):
            evaluate(dataclasses.replace(whole.config, output=str(tmp_path / name)))
    fresh = tmp_path / "new" / "out"
    assert open_output(dataclasses.replace(whole.config, output=str(fresh))) == fresh
    assert not fresh.parent.exists()


# ---- beside another -----------------------------------------------------------------------------


def test_the_same_rows_are_compared_in_pairs(
    configured: Configured, whole: Evaluated, tmp_path: Path
):
    other = tmp_path / "other"
    other.mkdir()
    # One who puts every true item first, in another order of rows.
    best = whole.rows.with_columns(teacher_rank=pl.lit(1)).reverse()
    best.write_parquet(other / "rows.parquet")

    report = evaluate(configured(tmp_path / "out", "--measure.against", str(other)))

    assert report["against"] == str(other)
    for name in ("accuracy@1", "ndcg@10", "mrr"):
        assert report[name] == whole.report[name]
    orders, pairs = report["tables"].values()
    assert orders[-1]["order"] == "the other teacher"
    assert orders[-1]["mrr"] == "1.0000 (1.0000 to 1.0000)"
    (pair,) = pairs
    assert pair["teacher less"] == "the other teacher"
    mean = whole.report["mrr"]["mean"] - 1
    assert pair["mrr"].startswith(f"{mean:+.4f} (")
    assert float(pair["mrr"].rpartition("= ")[2]) < 0.05


def test_other_rows_are_refused(configured: Configured, whole: Evaluated, data: InteractionData):
    rows, _ = make_rows(data, configured(Path("unused"), "--measure.rows", "none"), None)
    own = [row for row in rows if data.user_ids[row.user] in set(whole.rows["user_id"])]
    found = module.read_rows(whole.folder, own[::-1], data)["teacher_rank"]
    assert found.tolist() == whole.rows["teacher_rank"].to_list()[::-1]
    with pytest.raises(DataError, match=rf"lacks {len(rows) - 20} of these {len(rows)} rows"):
        module.read_rows(whole.folder, rows, data)
    moved = [dataclasses.replace(own[0], target=own[0].history[0])]
    with pytest.raises(DataError, match="lacks 1 of these 1 rows"):
        module.read_rows(whole.folder, moved, data)


@pytest.mark.parametrize("content", [None, "no parquet", "other columns"])
def test_what_is_no_evaluation_is_refused_before_the_teacher_is_loaded(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
):
    def refuse(*_: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(module, "make_ranker", refuse)
    other, file = tmp_path / "other", tmp_path / "other" / "rows.parquet"
    if content is not None:
        other.mkdir()
        if content == "no parquet":
            file.write_text(content)
        else:
            pl.DataFrame({"user_id": [1]}).write_parquet(file)
    with pytest.raises(DataError, match=r"cannot be read.*scripts/evaluate\.py teacher"):
        evaluate(configured(tmp_path / "out", "--measure.against", str(other)))
    assert not (tmp_path / "out").exists()


def test_the_students_own_order_is_beside_it(
    configured: Configured, data: InteractionData, tmp_path: Path
):
    worth = data.train_counts + np.linspace(0.5, 0, len(data.catalog))  # no two alike
    model = SASRec(data.num_items, hidden_size=8, num_layers=1, num_heads=2, max_length=10)
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(torch.eye(8)[0])
        model.item_embedding.weight[1:, 0] = torch.from_numpy(worth[1:]).float() / 10
    Recommender(model, data.catalog).save_pretrained(tmp_path / "student")
    config = configured(
        tmp_path / "out", "--examples.candidates", "student", "--examples.student",
        str(tmp_path / "student"), "--teacher.num_candidates", "20", "--measure.rows", "none",
    )  # fmt: skip

    report = evaluate(config)

    rows = pl.read_parquet(tmp_path / "out" / "rows.parquet")
    expected = {}
    for user in data.evaluated_users("validation").tolist():
        values = worth.copy()
        values[[0, *data.history_before(user, "validation")]] = -1
        target = data.target(user, "validation")
        rank = int((values >= values[target]).sum())
        if values[target] > 0 and rank <= 20:
            expected[data.user_ids[user]] = rank
    assert len(expected) > 2
    assert dict(rows.select("user_id", "student_rank").rows()) == expected
    assert report["rows"] == len(expected) < report["rows_looked_at"]
    ranks = np.array(list(expected.values()))
    assert report["student_order"]["mrr"] == pytest.approx((1 / ranks).mean())
    orders, pairs = report["tables"].values()
    assert [row["order"] for row in orders] == ["teacher", "student", "any, expected"]
    gap = report["mrr"]["mean"] - (1 / ranks).mean()
    assert pairs[0]["mrr"].startswith(f"{gap:+.4f} (")


def test_ways_to_search_are_measured_on_the_same_rows(configured: Configured, tmp_path: Path):
    config = configured(
        tmp_path / "out", "--teacher.mode", "cot", "--measure.searches", "greedy, sc2",
        "--measure.rows", "4", "--teacher.reasoning_tokens", "6", "--teacher.template", "movies",
    )  # fmt: skip

    report = evaluate(config)

    greedy, drawn = report["tables"]["Ways to search"]
    assert (greedy["search"], drawn["search"]) == ("greedy", "sc2")
    assert 0 < greedy["generated tokens"] <= 6
    assert greedy["generated tokens"] < drawn["generated tokens"] <= 12
    # The first of them is the report's own, and its rows are those on disk.
    ranks = pl.read_parquet(tmp_path / "out" / "rows.parquet")["teacher_rank"].to_numpy()
    assert greedy["mrr"].startswith(f"{(1 / ranks).mean():.4f} (")
    assert report["mrr"]["mean"] == pytest.approx((1 / ranks).mean())
    samples = json.loads((tmp_path / "out" / "report.json").read_text())["samples"]
    assert all(sample["lines"][1].startswith("Reasoning: ") for sample in samples)


def test_a_mode_without_labels_is_not_calibrated(
    configured: Configured, data: InteractionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the student's scores as weights it was, without any scores, and always failed."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr(RankLLM, "calibrate", refuse)
    config = configured(
        tmp_path / "out", "--teacher.mode", "pointwise", "--measure.rows", "3",
        "--teacher.num_candidates", "3",
    )  # fmt: skip
    assert evaluate(config)["rows"] == 3


def test_a_teacher_that_says_nothing_is_told(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rank = RankLLM.rank

    def silent(self: RankLLM, *rows: Any) -> TeacherVerdict:
        verdict = rank(self, *rows)
        return dataclasses.replace(verdict, valid=torch.zeros_like(verdict.valid))

    monkeypatch.setattr(RankLLM, "rank", silent)
    with pytest.raises(TeacherError, match="gives no verdict on any of 3 validation rows"):
        evaluate(configured(tmp_path / "out", "--measure.rows", "3"))
    assert not (tmp_path / "out").exists()
