"""A student of one's own, GRU4Rec here, is trained, saved, loaded and recommends as SASRec does."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cotrain.config import StudentConfig
from cotrain.data.packing import PackedSequences, pack
from cotrain.distill.loop import Run, fit
from cotrain.distill.outcome import finish
from cotrain.distill.state import CotrainState
from cotrain.errors import AssetError, ConfigError
from cotrain.export.run import export
from cotrain.rationale.answers import FinishedRun
from cotrain.student.architectures import new_student, student_class
from cotrain.student.recommender import Recommender

GRU4REC = "scripts.recipes.gru4rec:GRU4Rec"
SETTINGS = StudentConfig(
    architecture=GRU4REC, hidden_size=8, num_layers=2, max_length=6, dropout=0.5
)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parent.parent.parent)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StudentConfig]:
    """Settings that name a GRU4Rec of which some members are others."""

    def named(**members: Any) -> StudentConfig:
        kind = type("Own", (student_class(GRU4REC),), members)
        monkeypatch.setitem(sys.modules, "own", SimpleNamespace(Own=kind))
        return StudentConfig("own:Own", hidden_size=8, num_layers=1, max_length=6)

    return named


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(first.equal(second) for first, second in pairs)


def test_a_whole_run(prepared: Callable[..., tuple[CotrainState, Run]], tmp_path: Path):
    state, run = prepared("--student.architecture", GRU4REC, "--student.num_layers", "1")
    fit(state, run)
    report = finish(state, run)
    assert state.meter.totals["rows_valid"] > 0
    assert state.control is not None
    assert not same(state.student.bare, state.control.bare)  # pyright: ignore[reportArgumentType]
    shipped = state.student if report["shipped"] == "student" else state.control

    found = FinishedRun.open(run.folder).recommender
    assert type(found.model).__name__ == "GRU4Rec"
    assert found.model.settings == {
        "num_items": run.data.num_items, "hidden_size": 16, "num_layers": 1, "max_length": 20,
        "dropout": 0.3,
    }  # fmt: skip
    histories = [np.array([3, 1, 4]), np.array([1])]
    shipped.bare.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            found.model.user_states(histories), shipped.bare.user_states(histories)
        )
    card = (run.folder / "student/README.md").read_text()
    assert "from scripts.recipes.gru4rec import GRU4Rec" in card

    # No saved folder decides what code is run.
    with pytest.raises(AssetError, match="no code is run on its word"):
        Recommender.from_pretrained(run.folder / "student")
    kind = student_class(GRU4REC)
    again = Recommender.from_pretrained(run.folder / "student", architecture=kind)
    again.save_pretrained(tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"a graph for SASRec and the student of .* is a GRU4Rec"):
        export(run.folder, "onnx", tmp_path / "graph", say=lambda line: None)


def test_with_nothing_to_learn_from_the_teacher_student_and_control_are_the_same_to_the_bit(
    prepared: Callable[..., tuple[CotrainState, Run]],
):
    state, run = prepared(
        "--student.architecture", GRU4REC, "--distill.lambda_rank", "0", "--distill.lambda_emb", "0"
    )
    fit(state, run)
    assert state.meter.totals["rows_valid"] > 0
    assert state.control is not None
    assert same(state.student.model, state.control.model)


def test_its_states_are_those_of_a_plain_gru_in_any_order_of_rows():
    torch.manual_seed(0)
    model: Any = new_student(20, SETTINGS, sparse=False).eval()
    rows = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6]), np.array([7, 8, 9])]
    packed = pack(rows)
    states = model.encode(packed)
    for row, start in zip(rows, packed.starts.tolist(), strict=True):
        embedded = model.item_embedding(torch.from_numpy(row))[:, None]
        expected = model.output(model.gru(embedded)[0][:, 0])
        torch.testing.assert_close(states[start : start + len(row)], expected)


def test_trying_it_draws_no_random_number():
    torch.manual_seed(0)
    student_class(GRU4REC)(20, hidden_size=8)  # pyright: ignore[reportCallIssue]
    after_building = torch.get_rng_state()
    torch.manual_seed(0)
    new_student(20, StudentConfig(GRU4REC, hidden_size=8, num_layers=1), sparse=False)
    assert torch.get_rng_state().equal(after_building)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gru4rec", "expected sasrec, or a class of your own as module:Class"),
        ("no.such.module:GRU4Rec", "cannot be imported: ModuleNotFoundError"),
        ("scripts.recipes.gru4rec:GRU5Rec", "cannot be imported: AttributeError"),
        ("torch.nn:Linear", "is no student.* lacks 'encode', 'user_states'"),
        ("subprocess:Popen", "is no student"),
    ],
)
def test_what_is_no_student_is_refused(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        student_class(name)


def looks_ahead(self: Any, sequences: PackedSequences) -> Tensor:
    states = self.item_embedding(sequences.item_ids)
    return states + states.mean(0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"encode": looks_ahead}, "sees later items, or other rows"),
        (
            {"encode": lambda self, sequences: self.item_vectors[:1]},
            r"encode gives \(1, 8\) for 15 positions; expected \(15, 8\)",
        ),
        ({"item_vectors": torch.zeros(3, 8)}, "item_vectors the same"),
        ({"encode": lambda self, sequences: 1 / 0}, "cannot be built or tried.*ZeroDivisionError"),
    ],
    ids=["leak", "shape", "item_vectors", "raises"],
)
def test_what_training_could_not_rely_on_is_refused(
    own: Callable[..., StudentConfig], members: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        new_student(20, own(**members), sparse=False)


def test_lazy_updates_need_a_student_that_knows_of_them():
    with pytest.raises(ConfigError, match="takes no argument `sparse`"):
        new_student(20, SETTINGS, sparse=True)
