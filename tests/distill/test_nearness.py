"""The yardstick of a teacher: what it ranks by, and that a run takes it for a teacher."""

from collections.abc import Callable

import pytest
import torch

from cotrain.config import TeacherConfig, parse
from cotrain.distill import run as runs
from cotrain.distill.loop import Run, fit
from cotrain.distill.nearness import NearnessRanker
from cotrain.distill.outcome import finish
from cotrain.distill.state import CotrainState
from cotrain.errors import ConfigError

Prepare = Callable[..., tuple[CotrainState, Run]]


def ranker(history_length: int = 10) -> NearnessRanker:
    # Items 1 to 4; 3 and 4 have the direction of 1, whatever their length.
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 0.0], [1.0, 1.0]])
    return NearnessRanker(vectors, TeacherConfig(num_candidates=3, history_length=history_length))


def test_what_is_near_to_what_was_taken_stands_in_front():
    found = ranker().rank([[1], [2, 2]], [[2, 3, 4], [2, 3, 4]], [])
    assert found.ranks.tolist() == [[3, 1, 2], [1, 3, 2]]
    cosines = torch.tensor([[0, 1, 0.5**0.5], [1, 0, 0.5**0.5]])
    torch.testing.assert_close(found.identifier_logits, 20 * cosines)
    torch.testing.assert_close(found.probs, (20 * cosines).softmax(1))
    torch.testing.assert_close(found.decision_state, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert found.valid.all()


def test_only_the_items_last_taken_count():
    found = ranker(history_length=1).rank([[1, 1, 1, 2]], [[2, 3, 4]], [])
    assert found.ranks.tolist() == [[1, 3, 2]]


def test_nobody_asked_is_no_error():
    found = ranker().rank([], [], [])
    assert found.probs.shape == (0, 3)
    assert found.decision_state.shape == (0, 2)


@pytest.mark.parametrize("when", ["live", "offline"])
def test_a_run_learns_from_it_as_from_a_teacher(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch, when: str
):
    def encode(texts: list[str], *others: object) -> torch.Tensor:
        return torch.randn(len(texts), 8, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(runs, "sentence_vectors", encode)
    monkeypatch.setattr(runs, "kept", lambda texts, name, encoder: encoder())
    state, run = prepared(
        "--teacher.model", "none", "--distill.ranker", "nearness", "--distill.target", "blend",
        "--distill.audit", "warn", "--query.when", when, "--teacher.num_candidates", "20",
    )  # fmt: skip
    fit(state, run)
    assert state.control is not None
    report = finish(state, run)
    teacher = report["teacher"]
    assert teacher["mode"] == "nearness"
    assert teacher["model"] == "all-minilm-l6-v2"
    assert teacher["rows_valid"] == teacher["rows_asked"] == 60
    assert len(teacher["audits"]) == 2
    assert report["examples"][0]["prompt"] == ""
    page = (run.folder / "report.html").read_text("utf-8")
    assert "nearness" in page


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--student.item_text", "teacher"), "item_text is teacher, but distill.ranker is near"),
        (("--train.rounds", "2"), "which distill.ranker nearness cannot be"),
    ],
)
def test_what_only_a_language_model_can_do_is_refused(option: tuple[str, str], words: str):
    with pytest.raises(ConfigError, match=words):
        parse(["--distill.ranker", "nearness", *option])
