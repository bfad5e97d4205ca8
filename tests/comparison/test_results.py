"""What a run left, read back: the right users, and a clear error where it cannot be these."""

import json

import numpy as np
import polars as pl
import pytest

from cotrain.comparison.results import read_run, training_seconds, validation_score
from cotrain.config import DataConfig
from cotrain.data.interactions import load_interactions
from cotrain.errors import DataError

REPORT = {"seconds": 12.5, "student": {"validation": {"ndcg@10": 0.25}}}


@pytest.fixture
def run(plan):
    """A run that has left its report."""
    run = plan("ce,logit_kd", 1).runs[1]
    run.folder.mkdir(parents=True)
    (run.folder / "report.json").write_text(json.dumps(REPORT))
    return run


def leave(run, users, **ranks):
    pl.DataFrame({"user_id": users, **ranks}).write_parquet(run.folder / "ranks.parquet")


def test_ranks_are_those_of_the_users_in_the_order_of_the_data(run, data):
    student, control = np.arange(1, 61), np.arange(60, 0, -1)
    leave(run, data.user_ids, student_test_rank=student, control_test_rank=control)
    found = read_run(run, data)
    assert found.report == REPORT
    assert found.ranks.tolist() == student.tolist()
    assert found.control_ranks is not None
    assert found.control_ranks.tolist() == control.tolist()
    assert (validation_score(run.folder), training_seconds(run.folder)) == (0.25, 12.5)


def test_a_run_alone_has_no_ranks_of_a_twin(run, data):
    leave(run, data.user_ids, student_test_rank=[3] * 60)
    assert read_run(run, data).control_ranks is None


def test_users_that_are_not_evaluated_are_left_out(run, small_tables):
    interactions, items = map(str, small_tables)
    data = load_interactions(
        DataConfig(
            interactions=interactions, items=items, split="time", validation_share=0.3,
            test_share=0.3,
        )
    )  # fmt: skip
    evaluated = data.evaluated_users("test")
    assert 0 < len(evaluated) < data.num_users
    ranks: list[int | None] = [None] * data.num_users
    for place, user in enumerate(evaluated.tolist()):
        ranks[user] = place + 1
    leave(run, data.user_ids, student_test_rank=ranks)
    assert read_run(run, data).ranks.tolist() == list(range(1, len(evaluated) + 1))
    # One more than is evaluated now, as where the split was another.
    ranks[ranks.index(None)] = 9
    leave(run, data.user_ids, student_test_rank=ranks)
    with pytest.raises(DataError, match="The data have changed since; choose another --output"):
        read_run(run, data)


@pytest.mark.parametrize("change", [1, -1], ids=["more users", "fewer users"])
def test_ranks_of_other_data_are_refused(run, data, change):
    users = [*data.user_ids, 9999][: 60 + change]
    leave(run, users, student_test_rank=[1] * len(users))
    expected = f"has {60 + change} users with {60 + change} test ranks .*: 60 and 60. The data have"
    with pytest.raises(DataError, match=expected):
        read_run(run, data)


def test_ranks_of_as_many_other_users_are_refused(run, data):
    leave(run, data.user_ids[::-1], student_test_rank=[1] * 60)
    with pytest.raises(DataError, match="not those of the data"):
        read_run(run, data)


def no_file(path, users):
    path.unlink(missing_ok=True)


def cut_off(path, users):
    pl.DataFrame({"user_id": users, "student_test_rank": [1] * 60}).write_parquet(path)
    path.write_bytes(path.read_bytes()[:200])


def something_else(path, users):
    path.write_text("user_id,student_test_rank\n1,1\n")


def no_ranks(path, users):
    pl.DataFrame({"user_id": users}).write_parquet(path)


def no_users(path, users):
    pl.DataFrame({"student_test_rank": [1] * 60}).write_parquet(path)


def a_twin_without_a_user(path, users):
    ranks = {"student_test_rank": [1] * 60, "control_test_rank": [None] + [1] * 59}
    pl.DataFrame({"user_id": users, **ranks}).write_parquet(path)


@pytest.mark.parametrize(
    "spoil", [no_file, cut_off, something_else, no_ranks, no_users, a_twin_without_a_user]
)
def test_ranks_that_cannot_be_read_say_how_to_go_on(run, data, spoil):
    path = run.folder / "ranks.parquet"
    spoil(path, data.user_ids)
    with pytest.raises(DataError) as caught:
        read_run(run, data)
    assert f"{path} cannot be read: " in str(caught.value)
    assert f"Delete {run.folder} and give the same command." in str(caught.value)


@pytest.mark.parametrize("text", [None, "", '{"seconds": 1', "\ud800"])
def test_a_report_that_cannot_be_read_says_how_to_go_on(run, data, text):
    path = run.folder / "report.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    for read in (lambda: read_run(run, data), lambda: validation_score(run.folder)):
        with pytest.raises(DataError) as caught:
            read()
        assert f"{path} cannot be read: " in str(caught.value)
        assert f"Delete {run.folder} and give the same command." in str(caught.value)
