"""`scripts/recommend.py` for new users, with filters, and for files; what it says of users of the
data and of reasons is in tests/rationale/test_answers.py."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cotrain.errors import ConfigError, DataError
from cotrain.student.recommender import Recommender

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "recommend.py"
specification = importlib.util.spec_from_file_location("recommend_script", SCRIPT)
assert specification is not None
assert specification.loader is not None
recommend = importlib.util.module_from_spec(specification)
specification.loader.exec_module(recommend)


@pytest.fixture
def answer(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """`answer(*options)`: what the script says with --json."""

    def made(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert recommend.main(["--run", str(finished_run), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return made


def ids_of(found: dict[str, Any]) -> list[Any]:
    return [item["item_id"] for item in found["items"]]


def test_a_new_user_by_ids_and_titles(finished_run: Path, answer: Callable[..., Any]):
    student = Recommender.from_pretrained(finished_run / "student")
    expected = student.recommend([[50, 181, 1]], 4)
    title = student.catalog.titles[student.catalog.item_ids.index(1)]
    by_ids = answer("--items", "50,181,1", "--k", "4")
    assert ids_of(by_ids) == expected.item_ids[0]
    assert (by_ids["user_id"], by_ids["interactions"]) == (None, 3)
    assert by_ids["last_titles"][0] == title
    # The order of the command line is that of the history.
    assert (
        answer("--items", "50", "--items", " 181", "--title", title.upper(), "--k", "4") == by_ids
    )
    assert answer("--title", title, "--items", "50,181", "--k", "4") != by_ids


def test_a_new_user_without_the_data(finished_run: Path, tmp_path: Path, capsys: Any):
    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy)
    (copy / "config.yaml").write_text("data:\n  interactions: gone.csv\n")
    assert recommend.main(["--run", str(copy), "--items", "50", "--k", "2"]) == 0
    assert capsys.readouterr().out.startswith("New user, 1 interactions, the last: Star Wars")
    with pytest.raises(DataError, match=r"gone.csv does not exist"):
        recommend.main(["--run", str(copy), "--user", "8"])


def test_a_new_user_gets_reasons(answer: Callable[..., Any]):
    plain, found = (answer("--items", "50,181", "--k", "3", *more) for more in ([], ["--explain"]))
    assert ids_of(found) == ids_of(plain)
    assert all(item["reasons"][0]["text"].startswith("Reason") for item in found["items"])
    assert not any(reason["own"] for reason in found["nearest"])


def test_filters(answer: Callable[..., Any], tmp_path: Path, capsys: Any):
    some = answer("--user", "8", "--k", "5", "--categories", "comedy", "Sci-Fi")
    assert len(some["items"]) == 5
    assert all({"Comedy", "Sci-Fi"} & {*i["categories"].split("|")} for i in some["items"])
    best = ids_of(answer("--user", "8", "--k", "6"))
    deny, allow = tmp_path / "deny.txt", tmp_path / "allow.txt"
    deny.write_text(f"{best[0]}\n{best[2]}\n")
    allow.write_text("\n".join(map(str, best)))
    left = [best[1], *best[3:]]
    assert ids_of(answer("--user", "8", "--k", "4", "--deny", str(deny))) == left
    assert ids_of(answer("--user", "8", "--allow", str(allow), "--deny", str(deny))) == left
    explained = answer("--user", "8", "--allow", str(allow), "--deny", str(deny), "--explain")
    assert ids_of(explained) == left
    seen = answer("--items", "50", "--k", "100000", "--keep-seen")
    assert 50 in ids_of(seen)
    assert 50 not in ids_of(answer("--items", "50", "--k", "100000"))


def test_a_file_of_users(finished_run: Path, answer: Callable[..., Any], tmp_path: Path):
    source, target = tmp_path / "users.csv", tmp_path / "lists.jsonl"
    source.write_text("who,took\nx,50|181\ny,who|1\nz,\n")
    options = ["--histories", str(source), "--output", str(target), "--k", "3"]
    options += ["--user-column", "who", "--items-column", "took"]
    found = answer(*options)
    assert (found["users"], found["unknown"], found["without"]) == (3, 1, 1)
    rows = pl.read_ndjson(target).to_dicts()
    assert [row["user_id"] for row in rows] == ["x", "y", "z"]
    student = Recommender.from_pretrained(finished_run / "student")
    expected = student.recommend([[50, 181], [1]], 3).item_ids
    assert [row["item_ids"] for row in rows] == [*expected, []]
    with pytest.raises(ConfigError, match="nothing is overwritten unasked"):
        answer(*options)
    with pytest.raises(DataError, match="first in row 2: 'who'"):
        answer(*options, "--strict", "--overwrite")
    assert len(pl.read_ndjson(target)) == 3
    assert answer(*options, "--overwrite")["users"] == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--user", "8", "--items", "50"], "--user and --items or --title name different users"),
        (["--histories", "a.csv"], "--histories and --output belong together"),
        (["--user", "8", "--output", "a.csv"], "belong together"),
        (["--histories", "a.csv", "--output", "b.csv", "--explain"], "no room for reasons"),
        ([], "There is nothing to do"),
        (["--agreement", "--explain"], "--explain needs the --user"),
    ],
)
def test_options_that_contradict_each_other(options: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        recommend.main(["--run", "nowhere", *options])


def test_mistakes_of_a_person_are_one_message(finished_run: Path):
    argv = [sys.executable, str(SCRIPT), "--run", str(finished_run), "--title", "Toy Stroy (1995)"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: 1 of 1 named items cannot be found")
    assert "the nearest are 'Toy Story (1995)'" in done.stderr
    assert "Traceback" not in done.stderr
