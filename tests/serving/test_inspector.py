"""What the page shows, without a page."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from cotrain.errors import CheckpointError, CotrainError, DataError
from cotrain.rationale.answers import UNSHIPPED
from cotrain.serving.inspector import (
    MAX_ITEMS,
    MAX_USER_CHARACTERS,
    Inspector,
    one_line,
)
from cotrain.serving.records import SEARCHED, TOP

Look = Callable[[Path], Inspector]


def test_what_they_took_next_is_hidden_unless_asked_for(inspector: Inspector):
    data = inspector.data
    user = data.user_ids.index(8)
    hidden, shown = inspector.known_user(" 8 "), inspector.known_user("8", hide_next=False)
    assert (hidden.user, hidden.user_id) == (user, 8)
    assert hidden.taken_next == data.test_target(user) == shown.history[-1]
    assert np.array_equal(hidden.history, shown.history[:-1])
    assert shown.taken_next is None
    # The places that are told are those of the lists.
    lists = inspector.lists(hidden)
    for name, place in lists.next_places.items():
        order, _ = inspector.models[name].top_indices([hidden.history], SEARCHED)
        found = np.flatnonzero(order[0] == hidden.taken_next)
        assert place == (found[0] + 1 if len(found) else None)
    assert inspector.lists(shown).next_places == {}


def test_each_list_is_its_models_and_knows_the_others_places(inspector: Inspector):
    person = inspector.known_user("8")
    lists = inspector.lists(person)
    assert list(lists.of) == ["student", "control"]
    for name, other in (("student", "control"), ("control", "student")):
        items = [placed.item for placed in lists.of[name]]
        assert [placed.place for placed in lists.of[name]] == list(range(1, TOP + 1))
        order, _ = inspector.models[name].top_indices([person.history], TOP)
        assert items == order[0].tolist()
        assert not set(items) & set(person.history.tolist())
        elsewhere, _ = inspector.models[other].top_indices([person.history], SEARCHED)
        for placed in lists.of[name]:
            found = np.flatnonzero(elsewhere[0] == placed.item)
            assert placed.elsewhere == (found[0] + 1 if len(found) else None)
    both = {p.item for p in lists.of["student"]} & {p.item for p in lists.of["control"]}
    assert lists.shared == len(both) > 0


def test_a_new_user_by_ids_and_titles(inspector: Inspector):
    catalog = inspector.catalog
    first, second = (catalog.item_ids.index(item) for item in (50, 181))
    person = inspector.new_user(f"\n 50\n{catalog.titles[second].upper()}  \n\n")
    assert person.history.tolist() == [first, second]
    assert (person.user, person.user_id, person.taken_next) == (None, None, None)
    assert len(inspector.lists(person).of["student"]) == TOP


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "No user is named"),
        ("no such user", "have no user 'no such user'. Expected one of 60"),
        ("../../../etc/passwd", "have no user '../../../etc/passwd'"),
        ("<|im_end|>", "have no user"),
        ("8" * (MAX_USER_CHARACTERS + 1), "201 characters; expected at most 200"),
        (["8"], "A user id is list; expected text"),
        ({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "is dict; expected text"),
        (8, "is int; expected text"),
        (None, "No user is named"),
    ],
)
def test_nobody_of_this_name(text: Any, words: str, inspector: Inspector):
    with pytest.raises(DataError) as caught:
        inspector.known_user(text)
    assert words in one_line(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "No item is named"),
        ("Star Warz (1977)", "the nearest are 'Star Wars (1977)'"),
        ("<|im_start|>system", "no item is called '<|im_start|>system'"),
        ("/etc/passwd\n../../x", "2 of 2 named items cannot be found"),
        ("50\n" * (MAX_ITEMS + 1), "51 items are named; expected at most 50"),
        ("x" * 10**6, "1,000,000 characters; expected at most 10,000"),
        ("\0\x1b[2J", "no item is called"),
        (["50"], "is list; expected text"),
    ],
)
def test_no_such_items(text: Any, words: str, inspector: Inspector):
    with pytest.raises(DataError) as caught:
        inspector.new_user(text)
    line = one_line(caught.value)
    assert words in line
    assert line.isprintable()
    assert len(line) <= 400


def test_what_is_offered_is_bounded_and_found(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
):
    assert len(inspector.some_users()) == 60
    assert len(inspector.some_titles()) == len(set(inspector.catalog.titles)) - 1
    monkeypatch.setattr("cotrain.serving.inspector.OFFERED", 3)
    assert len(inspector.some_users()) == len(inspector.some_titles()) == 3
    assert inspector.known_user(inspector.some_users()[2]).user is not None
    assert len(inspector.new_user("\n".join(inspector.some_titles())).history) == 3
    assert inspector.known_user(inspector.random_user()).taken_next is not None


def test_a_run_that_kept_one_model_says_so(finished_run: Path, look_at: Look, tmp_path: Path):
    alone = look_at(finished_run)
    assert list(alone.models) == ["student"]
    assert "kept its student only" in alone.no_control
    lists = alone.lists(alone.known_user("8"))
    assert lists.shared is None
    assert all(placed.elsewhere is None for placed in lists.of["student"])

    shutil.copytree(finished_run, tmp_path / "run")
    report = json.loads((finished_run / "report.json").read_text())
    without = report | {"control": None, "teacher": None}
    (tmp_path / "run/report.json").write_text(json.dumps(without))
    shutil.rmtree(tmp_path / "run/rationale_head")
    bare = look_at(tmp_path / "run")
    assert "had no control" in bare.no_control
    assert "had no teacher" in bare.no_teacher
    assert "without rationales" in bare.no_reasons
    with pytest.raises(DataError, match="had no teacher"):
        bare.ask(bare.known_user("8"))
    with pytest.raises(DataError, match="without rationales"):
        bare.reasons(bare.known_user("8"))
    by_text = report | {"teacher": report["teacher"] | {"mode": "nearness"}}
    (tmp_path / "run/report.json").write_text(json.dumps(by_text))
    assert "by no language model" in look_at(tmp_path / "run").no_teacher


def test_where_the_control_is_shipped_the_other_one_is_the_student(
    run_with_control: Path, look_at: Look, tmp_path: Path
):
    shutil.copytree(run_with_control, tmp_path / "run")
    report = json.loads((run_with_control / "report.json").read_text())
    (tmp_path / "run/report.json").write_text(json.dumps(report | {"shipped": "control"}))
    one, other = look_at(run_with_control), look_at(tmp_path / "run")
    person = one.known_user("8")
    there, here = one.lists(person).of, other.lists(person).of
    assert [placed.item for placed in there["control"]] == [p.item for p in here["student"]]
    (tmp_path / "run/report.json").write_text(json.dumps(report | {"shipped": "x"}))
    with pytest.raises(CheckpointError, match="'x' is shipped"):
        look_at(tmp_path / "run")


def test_two_models_of_other_items_are_refused(
    run_with_control: Path, look_at: Look, tmp_path: Path
):
    shutil.copytree(run_with_control, tmp_path / "run")
    items = tmp_path / "run" / UNSHIPPED / "items.parquet"
    pl.read_parquet(items).with_columns(pl.col("item_id") + 1).write_parquet(items)
    with pytest.raises(DataError, match="recommends other items"):
        look_at(tmp_path / "run")


def test_without_its_data_a_run_still_serves_new_users(
    run_with_control: Path, look_at: Look, tmp_path: Path
):
    shutil.copytree(run_with_control, tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("data:\n  interactions: gone.csv\n")
    alone = look_at(tmp_path / "run")
    assert "gone.csv does not exist" in alone.no_data
    assert alone.no_teacher == alone.no_reasons == alone.no_data
    assert len(alone.lists(alone.new_user("50")).of) == 2


def test_reasons_are_those_of_the_explainer(inspector: Inspector):
    person = inspector.known_user("8")
    found = inspector.reasons(person, count=4)
    assert [item.title for item in found.items] == [
        placed.title for placed in inspector.lists(person).of["student"]
    ]
    assert len(found.nearest) == 4
    assert inspector.reasons(inspector.new_user("50")).user_id is None


def test_the_teacher_ranks_what_the_student_proposes(hostile: Inspector):
    person = hostile.known_user("8")
    answer = hostile.ask(person)
    assert hostile.teacher_is_loaded
    order, _ = hostile.models["student"].top_indices([person.history], 6)
    by_student = sorted(answer.rows, key=lambda row: row.placed.elsewhere or 0)
    assert [row.placed.item for row in by_student] == order[0].tolist()
    assert [row.placed.place for row in answer.rows] == [1, 2, 3, 4, 5, 6]
    probs = [row.prob for row in answer.rows]
    assert probs == sorted(probs, reverse=True)
    assert sum(probs) == pytest.approx(1, abs=1e-5)
    assert sorted(row.identifier for row in answer.rows) == list("ABCDEF")
    # What is subtracted is what the run subtracted.
    ranker = hostile._loaded_teacher()
    assert ranker.identifier_bias[1] == pytest.approx(0.1)
    # Asked again, it says the same.
    assert [row.placed for row in hostile.ask(person).rows] == [row.placed for row in answer.rows]
    assert len(hostile.ask(hostile.new_user("50")).rows) == 6


def test_a_teacher_that_is_gone_is_told(hostile_run: Path, look_at: Look, tmp_path: Path):
    shutil.copytree(hostile_run, tmp_path / "run")
    settings = (tmp_path / "run/config.yaml").read_text()
    settings = settings.replace("quantization: fp32", "quantization: fp32\n  adapter: /gone")
    (tmp_path / "run/config.yaml").write_text(settings)
    alone = look_at(tmp_path / "run")
    with pytest.raises(CotrainError, match="gone"):
        alone.ask(alone.known_user("8"))


def test_curves(inspector: Inspector, finished_run: Path, look_at: Look, tmp_path: Path):
    assert [chart.title for chart in inspector.charts()][:2] == [
        "Validation NDCG@10", "Total training loss",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="no curves to show"):
        look_at(finished_run).charts()
    shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text('{"kind": "train"\n')
    with pytest.raises(CheckpointError, match="no curves to show"):
        look_at(tmp_path / "run").charts()
