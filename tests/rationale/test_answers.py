"""What a run that was really trained answers about its users, by `scripts/recommend.py`."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotrain import config as configuration
from cotrain.config import Config
from cotrain.data.interactions import InteractionData
from cotrain.distill import run as runs
from cotrain.errors import CheckpointError, ConfigError, DataError
from cotrain.rationale.answers import FinishedRun, agreement_text, readable
from cotrain.rationale.explain import ExplainedItem, Explanation, Reason
from cotrain.rationale.head import FOLDER
from cotrain.runtime import tracking
from cotrain.student.recommender import Recommender

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "recommend.py"
specification = importlib.util.spec_from_file_location("recommend", SCRIPT)
assert specification is not None
assert specification.loader is not None
recommend = importlib.util.module_from_spec(specification)
specification.loader.exec_module(recommend)

USER = "8"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """With a student this small a second one costs more than it does."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tracking, "use_all_cores", lambda processes: None)
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def settings_are_read_once() -> Iterator[None]:
    """The files of finished runs: each reading takes a second."""
    parse = configuration.parse
    known: dict[str, Config] = {}

    def parse_once(argv: list[str], *more: Any) -> Config:
        if argv[0] != "--config":
            return parse(argv, *more)
        text = Path(argv[1]).read_text()
        if text not in known:
            known[text] = parse(argv, *more)
        return known[text]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(configuration, "parse", parse_once)
        yield


@pytest.fixture(scope="module")
def settings_of(small_tables: tuple[Path, Path]) -> Callable[..., Config]:
    """`settings_of(folder, *options)`: of a run of two epochs on 60 users, without a teacher."""

    def made(folder: Path, *options: str) -> Config:
        interactions, items = map(str, small_tables)
        return configuration.parse(
            [
                "--data.name", "small", "--data.interactions", interactions, "--data.items", items,
                "--teacher.model", "none", "--student.hidden_size", "16",
                "--student.max_length", "20", "--train.epochs", "2", "--train.warmup_epochs", "1",
                "--train.batch_size", "16", "--eval.bootstrap_samples", "200",
                "--output_dir", str(folder), *options,
            ]
        )  # fmt: skip

    return made


@pytest.fixture(scope="module")
def trained(
    settings_of: Callable[..., Config], small_data: InteractionData, make_rationale: Any,
    write_store: Any, tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A finished run that learned from a reason for every fifth training interaction."""
    folder = tmp_path_factory.mktemp("answers")
    ends = small_data.held_out.train_end - small_data.offsets[:-1]
    positions = [(user, cut) for user in range(60) for cut in range(1, ends[user])]
    rationales = [make_rationale(small_data, *position) for position in positions[::5]]
    store = write_store(folder / "store", rationales)
    options = ["--distill.rationales", str(store), "--distill.lambda_rdr", "0.1"]
    runs.run(settings_of(folder / "run", *options))
    return folder / "run"


@pytest.fixture(scope="module")
def trained_alone(
    settings_of: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run that had no reasons to learn from."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    runs.run(settings_of(folder, "--train.epochs", "1"))
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`answer(run, *options)`: what the script prints; with --json, what that says."""

    def made(run: Path, *options: str) -> Any:
        capsys.readouterr()
        assert recommend.main(["--run", str(run), *options]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in options else printed

    return made


# ---- recommendations ----------------------------------------------------------------------------


def test_a_user_gets_what_the_exported_student_recommends(
    trained: Path, small_data: InteractionData, answer: Callable[..., Any]
):
    student = Recommender.from_pretrained(trained / "student")
    catalog = small_data.catalog
    for user in (0, 31, 59):
        history = [catalog.item_ids[item] for item in small_data.history(user)]
        expected = student.recommend([history], k=7)
        raw_id = small_data.user_ids[user]
        found = answer(trained, "--user", str(raw_id), "--k", "7", "--json")
        assert [item["item_id"] for item in found["items"]] == expected.item_ids[0]
        assert [item["score"] for item in found["items"]] == pytest.approx(expected.scores[0])
        for item in found["items"]:
            index = catalog.item_ids.index(item["item_id"])
            assert (item["title"], item["categories"]) == (
                catalog.titles[index], catalog.categories[index],
            )  # fmt: skip
            assert item["reasons"] == []
            assert item["item_id"] not in history  # also not the held-out ones
        assert found["user_id"] == raw_id
        assert found["interactions"] == len(history)
        last = [catalog.titles[item] for item in small_data.history(user)[:-4:-1]]
        assert found["last_titles"] == last
        assert found["nearest"] == []
        assert "agreement" not in found


def test_the_text_says_the_same(trained: Path, answer: Callable[..., Any]):
    found = answer(trained, "--user", USER, "--k", "4", "--json")
    lines = answer(trained, "--user", USER, "--k", "4").splitlines()
    assert lines[0] == (
        f"User 8, {found['interactions']} interactions, the last: {'; '.join(found['last_titles'])}"
    )
    expected = [
        f"{rank:3}. {item['title']} [{item['categories'].replace('|', ', ')}]  {item['score']:.2f}"
        for rank, item in enumerate(found["items"], start=1)
    ]
    assert lines[1:] == ["", *expected]


def test_no_more_items_than_are_left(
    trained: Path, small_data: InteractionData, answer: Callable[..., Any]
):
    found = answer(trained, "--user", USER, "--k", "100000", "--json")
    history = small_data.history(small_data.user_ids.index(8))
    assert len(found["items"]) == small_data.num_items - len(set(history.tolist()))


def test_a_run_without_reasons_recommends(trained_alone: Path, answer: Callable[..., Any]):
    found = answer(trained_alone, "--user", USER, "--json")
    assert len(found["items"]) == 10
    assert FinishedRun.open(trained_alone).agreement is None


# ---- reasons ------------------------------------------------------------------------------------


def test_items_are_explained_by_rationales_of_the_store(
    trained: Path, small_data: InteractionData, answer: Callable[..., Any]
):
    plain = answer(trained, "--user", USER, "--json")
    found = answer(trained, "--user", USER, "--explain", "--reasons", "2", "--json")
    assert [item | {"reasons": []} for item in found["items"]] == plain["items"]
    store = FinishedRun.open(trained).explainer().store
    reasons = [reason for item in found["items"] for reason in item["reasons"]]
    assert [len(item["reasons"]) for item in found["items"]] == [2] * 10
    assert len(found["nearest"]) == 3
    for reason in [*reasons, *found["nearest"]]:
        (written,) = store.texts(np.array([reason["row"]]))
        assert (reason["text"], reason["item_id"]) == (written.rationale, written.item_id)
        assert reason["own"] == (written.user_id == 8)
        assert reason["title"] in reason["text"]  # as these were written
        assert -1 <= reason["cosine"] <= 1
        user = small_data.user_ids.index(written.user_id)
        assert 1 <= written.cut < len(small_data.history(user)) - 2
    assert all(reason["likeness"] is None for reason in found["nearest"])


def test_the_text_shows_each_reason_under_its_item(trained: Path, answer: Callable[..., Any]):
    options = ["--user", USER, "--k", "3", "--explain"]
    found = answer(trained, *options, "--json")
    lines = answer(trained, *options).splitlines()
    for rank, item in enumerate(found["items"], start=1):
        (reason,) = item["reasons"]
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{rank:3}. "))
        assert lines[place + 1].lstrip().startswith(f"{reason['cosine']:.2f}  “{reason['text']}”")
    place = lines.index("Nearest reasons, whatever is recommended:")
    for line, reason in zip(lines[place + 1 :], found["nearest"], strict=False):
        assert f"“{reason['text']}” — written for {reason['title']}" in line
        assert (", their own" in line) == reason["own"]


def test_a_smaller_pool_leaves_less_to_choose_from(trained: Path, answer: Callable[..., Any]):
    options = ["--user", USER, "--explain", "--json", "--pool"]
    nearest = answer(trained, *options, "1")
    assert {item["reasons"][0]["row"] for item in nearest["items"]} == {
        nearest["nearest"][0]["row"]
    }
    many = answer(trained, *options, "500")
    assert len({item["reasons"][0]["row"] for item in many["items"]}) > 3


def test_own_reasons_can_be_left_out(trained: Path, answer: Callable[..., Any]):
    options = ["--user", USER, "--explain", "--pool", "100000", "--reasons", "100000", "--json"]
    own = {
        excluded: sum(reason["own"] for reason in
                      answer(trained, *options, *excluded)["items"][0]["reasons"])
        for excluded in ((), ("--exclude-own",))
    }  # fmt: skip
    assert own[()] > 5
    assert own["--exclude-own",] == 0


def test_reasons_that_were_moved_are_found_where_they_are(
    copied: Path, trained: Path, tmp_path: Path, answer: Callable[..., Any]
):
    head = copied / FOLDER / "head.safetensors"
    kept = trained.parent / "store"
    moved = Path(shutil.copytree(kept, tmp_path / "elsewhere"))
    # As long, so that the file's header holds.
    gone = kept.with_name("gone!")
    head.write_bytes(head.read_bytes().replace(str(kept).encode(), str(gone).encode()))
    options = ["--user", USER, "--explain", "--json"]
    with pytest.raises(DataError, match=f"{gone}, are not there. Name their folder with --store"):
        answer(copied, *options)
    found = answer(copied, *options, "--store", str(moved))
    expected = answer(trained, *options)
    assert found == expected | {"run": str(copied)}


# ---- agreement ----------------------------------------------------------------------------------


def test_agreement_is_shown_as_the_run_measured_it(trained: Path, answer: Callable[..., Any]):
    report = json.loads((trained / "report.json").read_text())
    expected = report["rationales"]["agreement"][report["shipped"]]
    assert answer(trained, "--user", USER, "--explain", "--json")["agreement"] == expected
    printed = answer(trained, "--user", USER, "--explain")
    assert printed.endswith(agreement_text(expected) + "\n")


def test_agreement_measured_anew_is_that_of_the_run(trained: Path, answer: Callable[..., Any]):
    """Which reasons are found, and which are drawn, is the same; the bootstrap's draws differ."""
    of_run = FinishedRun.open(trained).agreement
    assert of_run is not None
    found = answer(trained, "--agreement", "--json")
    assert found.keys() == {"run", "agreement"}
    for name in ("nearest", "shown"):
        for key in ("users", "share", "random", "difference"):
            assert found["agreement"][name][key] == pytest.approx(of_run[name][key])
    printed = answer(trained, "--agreement")
    assert printed == agreement_text(found["agreement"]) + "\n"
    other = answer(trained, "--agreement", "--k", "3", "--pool", "5", "--json")["agreement"]
    assert (other["k"], other["pool"]) == (3, 5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"rationales": {"agreement": null}, "shipped": "student"}'),
    ],
    ids=["none", "bytes", "torn", "a list", "items without categories"],
)
def test_a_report_that_does_not_say_leaves_agreement_out(
    copied: Path, answer: Callable[..., Any], damage: Callable[[Path], Any]
):
    damage(copied / "report.json")
    assert answer(copied, "--user", USER, "--explain", "--json")["agreement"] is None
    assert "random" not in answer(copied, "--user", USER, "--explain")


# ---- words --------------------------------------------------------------------------------------


def test_items_and_reasons_are_a_line_each():
    reason = Reason(3, "It is\n  dark. ", 9, "Heat", True, 0.456, 0.9)
    items = [
        ExplainedItem(1, "Fargo", "Crime|Drama", 12.345, [reason]),
        ExplainedItem(2, "Ünlike", "", -0.5, []),
    ]
    nearest = [dataclasses.replace(reason, own=False, cosine=-0.1, likeness=None)]
    assert readable(Explanation(8, items, nearest)).splitlines() == [
        "  1. Fargo [Crime, Drama]  12.35",
        "       0.46  “It is dark.” — written for Heat, their own",
        "  2. Ünlike  -0.50",
        "",
        "Nearest reasons, whatever is recommended:",
        "     -0.10  “It is dark.” — written for Heat",
    ]
    assert readable(Explanation(8, items[1:], [])) == "  1. Ünlike  -0.50"


def test_agreement_is_told_in_percent_and_points():
    one = {"share": 0.5, "random": 0.75, "difference": -0.25, "ci95": [-0.3, 0.001], "users": 1234}
    other = {"share": 1.0, "random": 0.9, "difference": 0.1, "ci95": [0.05, 0.15], "users": 7}
    assert agreement_text({"nearest": one, "shown": other}).splitlines()[1:] == [
        "  the nearest reason: 50.0 % against 75.0 % at random; -25.0 points, 95 % interval "
        "-30.0 to +0.1 (1,234 users)",
        "  the reason shown for the item: 100.0 % against 90.0 % at random; +10.0 points, 95 % "
        "interval +5.0 to +15.0 (7 users)",
    ]


# ---- what cannot be answered --------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, trained: Path, small_tables: Any):
    for folder in (tmp_path, tmp_path / "nowhere", trained / "student", small_tables[0]):
        with pytest.raises(CheckpointError, match=r"is no run folder: .*train_online\.py wrote"):
            recommend.main(["--run", str(folder), "--user", USER])


def test_a_run_that_has_not_finished_is_to_be_resumed(
    settings_of: Callable[..., Config], tmp_path: Path
):
    """Stopped between its beginning and its end."""
    folder = tmp_path / "run"
    runs.prepare(settings_of(folder))
    with pytest.raises(CheckpointError, match=f"no student yet.*--resume {folder}$"):
        recommend.main(["--run", str(folder), "--user", USER])


def test_reasons_of_a_run_without_any_are_refused(trained_alone: Path):
    for options in (["--user", USER, "--explain"], ["--agreement"]):
        with pytest.raises(DataError, match=r"trained without rationales.*--distill\.rationales"):
            recommend.main(["--run", str(trained_alone), *options])


def test_another_store_is_refused(
    trained: Path, small_data: InteractionData, make_rationale: Any, make_store: Any, tmp_path: Path
):
    few = [make_rationale(small_data, user, 1) for user in range(5)]
    argv = ["--run", str(trained), "--user", USER, "--explain", "--store"]
    other = make_store(few, np.ones((5, 12)))
    with pytest.raises(DataError, match="leads from 16 to 8 numbers"):
        recommend.main([*argv, str(other)])
    held_out = make_rationale(small_data, 0, len(small_data.history(0)) - 1)
    leaking = make_store([*few, held_out], name="leaking")
    with pytest.raises(DataError, match="1 of interactions that are held out"):
        recommend.main([*argv, str(leaking)])
    with pytest.raises(DataError, match="are not there"):
        recommend.main([*argv, str(tmp_path / "nowhere")])


@pytest.mark.parametrize("user", ["61", "", "8 ", "08", "nobody"])
def test_an_unknown_user_is_named(trained: Path, user: str):
    with pytest.raises(DataError) as caught:
        recommend.main(["--run", str(trained), "--user", user])
    said = str(caught.value)
    assert f"The data 'small' have no user {user!r}" in said
    assert "one of its 60 users: 1, 2, 3, 4, 5, … (60 in all)" in said


@pytest.mark.parametrize("option", ["--k", "--reasons", "--pool"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_counts_below_one_are_refused(trained: Path, option: str, value: str):
    with pytest.raises(ConfigError, match=f"{option} is {value}; expected 1 or more"):
        recommend.main(["--run", str(trained), "--user", USER, option, value])


@pytest.mark.parametrize(
    "argv", [["--run", "x", "--k", "few"], ["--user", USER], ["--run", "x", "--exp"]]
)
def test_what_the_options_do_not_allow_is_a_usage_error(
    argv: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        recommend.main(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_mistake_is_one_line_and_costs_no_time(trained: Path):
    """Neither a traceback nor the import of the libraries."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), "--run", str(trained), "--k", "0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: --k is 0; expected 1 or more."
    assert "Traceback" not in done.stderr
    assert "| torch" not in done.stderr
