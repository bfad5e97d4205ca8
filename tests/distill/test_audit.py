"""What an audit says of teachers of which it is known what they know."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cotrain.config import parse
from cotrain.distill.audit import WEIGHTS, Audit, audit, audit_rows, betas_tried, compare
from cotrain.distill.loop import Run, fit
from cotrain.distill.outcome import finish
from cotrain.distill.state import CotrainState
from cotrain.distill.targets import blend_probs
from cotrain.errors import ConfigError, DataError, TeacherError

Prepare = Callable[..., tuple[CotrainState, Run]]
ROWS, K = 400, 20
COUNTS = torch.ones(ROWS, K)


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, np.ndarray]:
    """Scores of a student, what it does not know, and the true items, which both point to."""
    draw = torch.Generator().manual_seed(0)
    known, unknown = torch.randn(2, ROWS, K, generator=draw)
    noise = torch.rand(ROWS, K, generator=draw).log().neg().log().neg()  # Gumbel
    places = (known + unknown + noise).argmax(1).numpy()
    order = known.argsort(1, descending=True)
    where = (order == torch.from_numpy(places)[:, None]).int().argmax(1).numpy()
    return known.gather(1, order), unknown.gather(1, order), where


def test_a_teacher_that_knows_what_the_student_does_not_teaches(rows: tuple):
    scores, unknown, places = rows
    found = compare(scores, unknown.softmax(1), COUNTS, places, seed=0)
    assert found.teaches
    assert found.blend > max(found.student, found.teacher)
    assert found.blend_lift.absolute == pytest.approx(found.blend - found.student)
    assert found.teacher_lift.absolute == pytest.approx(found.teacher - found.student)
    assert found.beta > 0.4
    gain = found.blend / found.student - 1
    assert found.lambda_rank("teacher") == pytest.approx(min(0.5, 2.5 * gain))
    assert found.lambda_rank("blend") == pytest.approx(min(5, 250 * gain))
    assert "knows something" in str(found)
    assert found.as_dict()["teaches"]


@pytest.mark.parametrize("kind", ["noise", "the student's own", "nothing"])
def test_a_teacher_that_knows_nothing_more_does_not(rows: tuple, kind: str):
    scores, _, places = rows
    noise = torch.rand(ROWS, K, generator=torch.Generator().manual_seed(1))
    told = {"noise": noise, "the student's own": scores, "nothing": torch.zeros(ROWS, K)}[kind]
    found = compare(scores, (3 * told).softmax(1), COUNTS, places, seed=0)
    assert not found.teaches
    assert found.lambda_rank("teacher") == found.lambda_rank("blend") == 0
    assert "nothing that it could teach" in str(found)
    if kind != "noise":
        # In a blend with itself, or with what is the same for all, no order changes.
        assert found.beta == 0
        assert found.blend_lift.absolute == 0


def test_popularity_and_chance_say_what_a_teacher_has_to_beat(rows: tuple):
    scores, unknown, places = rows
    taken = torch.zeros(ROWS, K).scatter_(1, torch.from_numpy(places)[:, None], 3)
    found = compare(scores, unknown.softmax(1), taken, places, seed=0)
    assert found.popularity == 1
    # The mean of 1 / log2(1 + place) over ten places of twenty, the other ten being worth nothing.
    assert found.chance == pytest.approx(0.2272, abs=5e-5)
    # Where all are as popular, the true one stands behind the others.
    assert compare(scores, unknown.softmax(1), COUNTS, places, seed=0).popularity == 0
    assert "(by popularity 1.0000, by chance 0.2272)" in str(found)


def test_the_weight_is_never_fitted_on_the_rows_it_is_judged_by(rows: tuple):
    # Noise that happens to help, chosen among many: fitted and judged on the same rows, each of
    # them could only gain.
    scores, _, places = rows
    lifts = []
    for seed in range(30):
        noise = torch.rand(60, K, generator=torch.Generator().manual_seed(seed))
        found = compare(
            scores[:60], (3 * noise).softmax(1), COUNTS[:60], places[:60], seed, samples=100
        )
        lifts.append(found.blend_lift.absolute)
    assert min(lifts) < 0
    assert np.mean(lifts) < 0.01


def test_an_audit_does_not_depend_on_the_scale_of_the_scores(rows: tuple):
    scores, unknown, places = rows
    told = unknown.log_softmax(1)
    one, other = betas_tried(scores, told), betas_tried(7 * scores - 3, 0.1 * told)
    assert len(one) == len(WEIGHTS)
    torch.testing.assert_close(torch.tensor(one) * 70, torch.tensor(other))
    found = compare(scores, unknown.softmax(1), COUNTS, places, seed=0)
    scaled = compare(7 * scores - 3, (0.1 * unknown).softmax(1), COUNTS, places, seed=0)
    assert scaled.blend == pytest.approx(found.blend)
    assert scaled.beta == pytest.approx(70 * found.beta)


def test_a_teacher_keeps_what_it_is_sure_of_and_what_not(rows: tuple):
    # It knows half of the rows, and of the others next to nothing; it says so.
    scores, unknown, places = rows
    noise = torch.randn(ROWS // 2, K, generator=torch.Generator().manual_seed(1))
    says = torch.cat([unknown[: ROWS // 2], 0.05 * noise])
    by_itself = compare(scores, says.softmax(1), COUNTS, places, seed=0)
    says = says / says.std(1, keepdim=True)
    assert by_itself.blend > compare(scores, says.softmax(1), COUNTS, places, seed=0).blend


def test_the_order_taught_is_the_order_audited(rows: tuple):
    scores, unknown, places = rows
    probs = unknown.softmax(1)
    found = compare(scores, probs, COUNTS, places, seed=0)
    taught = blend_probs(scores, probs, found.beta)
    own = taught[torch.arange(ROWS), torch.from_numpy(places)]
    first = (taught >= own[:, None]).sum(1) == 1
    own = scores[torch.arange(ROWS), torch.from_numpy(places)]
    assert first.sum() > ((scores >= own[:, None]).sum(1) == 1).sum()


def test_rows_are_of_users_whose_candidates_hold_what_they_took(prepared: Prepare):
    state, run = prepared()
    model = state.student.bare
    data = run.data
    rows = audit_rows(model, data, 600, 25, seed=0)
    assert model.training
    assert len(rows.users) == len(rows.histories) == len(rows.candidates) == 25
    for row, user in enumerate(rows.users.tolist()):
        taken = data.target(user, "validation")
        assert rows.candidates[row, rows.places[row]] == taken
        assert rows.histories[row] == data.history_before(user, "validation").tolist()
        assert not set(rows.candidates[row].tolist()) & set(rows.histories[row])
        assert (rows.counts[row].numpy() == data.train_counts[rows.candidates[row]]).all()
        assert rows.scores[row].tolist() == sorted(rows.scores[row].tolist(), reverse=True)
    again = audit_rows(model, data, 600, 25, seed=0)
    assert (again.users == rows.users).all()
    assert (audit_rows(model, data, 600, 25, seed=1).users != rows.users).any()
    few = audit_rows(model, data, 600, 3, seed=0)
    assert (few.users == rows.users[:3]).all()


def test_where_no_candidate_is_right_there_is_nothing_to_audit(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
):
    state, run = prepared()
    model = state.student.bare
    monkeypatch.setattr(type(run.data), "target", lambda self, user, split: 0)
    with pytest.raises(DataError, match=r"none has the true item .*distill.audit off"):
        audit_rows(model, run.data, 5, 25, seed=0)


def test_a_run_says_what_its_audits_found(prepared: Prepare, capsys: pytest.CaptureFixture):
    state, run = prepared("--distill.audit", "warn", "--distill.lambda_rank", "auto",
                          "--teacher.num_candidates", "20")  # fmt: skip
    assert state.lambda_rank == 0
    fit(state, run)
    assert [found["epoch"] for found in state.audits] == [1, 2]
    assert all(found["rows"] >= 1 for found in state.audits)
    last = state.audits[-1]
    expected = min(0.5, 2.5 * last["blend_lift"]["relative"]) if last["teaches"] else 0
    assert state.lambda_rank == pytest.approx(expected)
    rows = [row for row in run.log.rows() if row["kind"] == "audit"]
    assert [row["blend"] for row in rows] == [found["blend"] for found in state.audits]
    report = finish(state, run)
    assert report["teacher"]["audits"] == state.audits
    assert "Audit of the teacher on" in "".join(capsys.readouterr())
    page = (run.folder / "report.html").read_text("utf-8")
    assert page.count("Audit at step") == 2


def test_a_teacher_with_nothing_to_teach_does_not_start_where_that_is_asked_for(prepared: Prepare):
    state, run = prepared("--distill.audit", "stop", "--teacher.num_candidates", "20")
    with pytest.raises((TeacherError, DataError), match=r"distill.audit"):
        fit(state, run)
    assert state.step == 4  # the warm-up


def test_a_blend_needs_the_control_that_it_is_made_with():
    with pytest.raises(ConfigError, match=r"blend, which is made with the control's scores"):
        parse(["--distill.target", "blend", "--train.control", "false"])
    parse(["--distill.target", "blend", "--train.control", "false", "--teacher.model", "none"])


def test_a_weight_that_follows_the_audit_needs_one():
    with pytest.raises(ConfigError, match=r"lambda_rank is auto, but distill.audit is off"):
        parse(["--distill.lambda_rank", "auto", "--distill.audit", "off"])
    with pytest.raises(ConfigError, match=r"lambda_rank is 'much'; expected a number or one of"):
        parse(["--distill.lambda_rank", "much"])


def test_the_teacher_is_asked_about_each_row_once(prepared: Prepare):
    state, run = prepared()
    assert run.teacher is not None
    model = state.student.bare
    rows = audit_rows(model, run.data, 900, 10, seed=0)
    # The true item and the four behind it: the tiny teacher is of five.
    near = torch.from_numpy(rows.places)[:, None] + torch.arange(5)
    rows = dataclasses.replace(
        rows, candidates=rows.candidates.gather(1, near), scores=rows.scores.gather(1, near),
        counts=rows.counts.gather(1, near), places=np.zeros(10, dtype=np.int64),
    )  # fmt: skip
    found = audit(rows, run.teacher.ranker, 0, run.accelerator, samples=50)
    assert isinstance(found, Audit)
    assert found.rows == 10
    probs = run.teacher.ranker.rank(
        rows.histories, rows.candidates.tolist(), [(0, 9, int(user)) for user in rows.users]
    ).probs
    assert found == compare(rows.scores, probs, rows.counts, rows.places, 0, samples=50)
