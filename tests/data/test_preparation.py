"""`scripts/prepare_data.py`, whole: from a publisher's files to a set that a run can use."""

import importlib.util
import json
import random
import shutil
from pathlib import Path

import polars as pl
import pytest

from cotrain import assets
from cotrain.config import DataConfig
from cotrain.data import prepared
from cotrain.data.interactions import load_interactions
from cotrain.data.preparation import PrepareOptions, prepare
from cotrain.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
SPEC = importlib.util.spec_from_file_location("prepare_data", ROOT / "scripts" / "prepare_data.py")
assert SPEC is not None
assert SPEC.loader is not None
SCRIPT = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SCRIPT)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COTRAIN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def ratings(path: Path, users: int = 30, seed: int = 0) -> Path:
    """A folder like a release of MovieLens, with ratings in random order."""
    draw = random.Random(seed)
    lines = [
        f"{user},{item},{draw.randint(1, 10) / 2},{1_000_000_000 + draw.randint(0, 500)}"
        for user in range(1, users + 1)
        for item in draw.sample(range(1, 41), draw.randint(1, 20))
    ]
    draw.shuffle(lines)
    path.mkdir()
    (path / "ratings.csv").write_text(
        "\n".join(["userId,movieId,rating,timestamp", *lines]) + "\n", encoding="utf-8"
    )
    movies = [f"{item},Film {item} (1999),Drama|Comedy" for item in range(1, 51) if item != 7]
    (path / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies, '51,"",']) + "\n")
    return path


def run(*argv: str | Path) -> int:
    return SCRIPT.main([str(word) for word in argv])


# ---- the whole way ------------------------------------------------------------------------------


def test_a_release_becomes_a_set_that_a_run_loads(tmp_path, capsys):
    folder = ratings(tmp_path / "ml-small")
    code = run(
        "movielens", "--input", folder, "--name", "small",
        "--min-user-interactions", "5", "--min-item-interactions", "5",
    )  # fmt: skip
    assert code == 0
    data = load_interactions(DataConfig(name="small"))
    table = pl.read_parquet(prepared.root() / "small" / "interactions.parquet")
    assert (data.num_interactions, data.num_users) == (table.height, table["user_id"].n_unique())
    source = pl.read_csv(folder / "ratings.csv")
    by_hand = source.rename({"userId": "user_id", "movieId": "item_id"})
    while True:
        size = by_hand.height
        for column in ("user_id", "item_id"):
            by_hand = by_hand.filter(pl.len().over(column) >= 5)
        if by_hand.height == size:
            break
    by_hand = by_hand.sort("user_id", "timestamp", maintain_order=True)
    names = ["user_id", "item_id", "timestamp", "rating"]
    assert table.select(names).rows() == by_hand.select(names).rows()
    assert table["position"].to_list() == [
        place for (length,) in by_hand.group_by("user_id", maintain_order=True).len().select("len")
        .rows() for place in range(length)
    ]  # fmt: skip

    said = capsys.readouterr().out
    assert "users with fewer than 5 events, items with fewer than 5" in said
    for line in (f"users              {data.num_users}", "density", "length, mean", "length, max"):
        assert line in said
    untitled = f"1 of {data.num_items} items have no title (1 are not in the table of items)"
    assert untitled in said
    assert f"Written to {prepared.root() / 'small'}. Use it with --data.name small" in said


def test_the_record_says_what_was_read_and_done_and_the_same_input_gives_the_same_bytes(tmp_path):
    folder = ratings(tmp_path / "release")
    (tmp_path / "deeper").mkdir()
    copy = Path(shutil.copytree(folder, tmp_path / "deeper" / "copy"))
    sets = []
    for source, output in ((folder, tmp_path / "a"), (copy, tmp_path / "b")):
        run("movielens", "--input", source, "--name", "x", "--output", output, "--min-rating", "2")
        sets.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert sets[0] == sets[1]
    record = json.loads(sets[0][prepared.MANIFEST])
    assert record["source"] == "movielens"
    assert [entry["file"] for entry in record["inputs"]] == ["ratings.csv", "movies.csv"]
    assert record["options"]["min_rating"] == 2.0
    assert [step["step"] for step in record["steps"]] == [
        "ratings.csv: lines read",
        "rating below 2",
    ]
    assert record["statistics"]["interactions"] == record["steps"][-1]["left"]
    assert str(tmp_path) not in sets[0][prepared.MANIFEST].decode()


@pytest.mark.parametrize("source", ["tables", "recbole", "movielens"])
def test_ml_100k_prepared_from_any_form_equals_the_asset(tmp_path, monkeypatch, source):
    monkeypatch.delenv("COTRAIN_HOME")
    asset = assets.fetch("ml-100k")
    expected = load_interactions(DataConfig())
    monkeypatch.setenv("COTRAIN_HOME", str(tmp_path / "home"))
    table = pl.read_parquet(asset / "interactions.parquet").select(
        "user_id", "item_id", "rating", "timestamp"
    )
    path = tmp_path / "input"
    path.mkdir()
    if source == "tables":
        path = asset
    elif source == "recbole":
        header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        body = table.write_csv(separator="\t", include_header=False)
        (path / "ml-100k.inter").write_text(header + body)
    else:
        table.write_csv(path / "u.data", separator="\t", include_header=False)
    run(source, "--input", path, "--name", "again")
    data = load_interactions(DataConfig(name="again"))
    assert data.user_ids == expected.user_ids
    assert data.catalog.item_ids == expected.catalog.item_ids
    assert data.items.tolist() == expected.items.tolist()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark tables are not here")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("amazon-beauty", (22_363, 12_101, 198_502)), ("ml-1m", (6_040, 3_416, 999_611))],
)
def test_the_benchmark_tables_keep_their_size_and_order(name, sizes):
    folder = SHARED / name
    run("tables", "--input", folder, "--order-column", "position", "--name", name)
    data = load_interactions(DataConfig(name=name))
    assert (data.num_users, data.num_items, data.num_interactions) == sizes
    straight = load_interactions(
        DataConfig(
            interactions=str(folder / "interactions.parquet"), items=str(folder / "items.parquet")
        )
    )
    assert data.user_ids == straight.user_ids
    assert data.items.tolist() == straight.items.tolist()
    assert data.catalog == straight.catalog


# ---- refusals -----------------------------------------------------------------------------------


def test_an_existing_set_is_refused_before_anything_is_read(tmp_path):
    folder = ratings(tmp_path / "release")
    run("movielens", "--input", folder, "--name", "x")
    with pytest.raises(DataError, match="Give --overwrite"):
        run("movielens", "--input", tmp_path / "missing", "--name", "x")
    run("movielens", "--input", folder, "--name", "x", "--overwrite", "--duplicates", "last")
    assert prepared.read_manifest(prepared.root() / "x")["options"]["duplicates"] == "last"


def test_damaged_input_writes_nothing_and_can_be_allowed(tmp_path, home, capsys):
    folder = ratings(tmp_path / "release")
    text = (folder / "ratings.csv").read_text()
    (folder / "ratings.csv").write_text(text + "oops\n")
    with pytest.raises(DataError, match=r"--max-bad-share.*\n.*another number of fields.*'oops'"):
        run("movielens", "--input", folder, "--name", "x")
    assert not list(home.glob("prepared/*"))
    run("movielens", "--input", folder, "--name", "x", "--max-bad-share", "0.1")
    assert "'oops'" in capsys.readouterr().out


def test_items_of_another_set_are_refused(tmp_path):
    folder = ratings(tmp_path / "release")
    (folder / "movies.csv").write_text("movieId,title,genres\n1000,Other (1999),Drama\n")
    with pytest.raises(DataError, match=r"None of the \d+ item ids"):
        run("movielens", "--input", folder, "--name", "x")


def test_options_out_of_range_are_named_together():
    options = PrepareOptions(
        "tables", "x", name="x", max_bad_share=2.0, min_user_interactions=0,
        max_user_interactions=0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"(?s)3 option.*--max-user.*--min-user.*--max-bad-share"):
        prepare(options)


def test_the_command_line_knows_every_option():
    words = ["tables", "--input", "x", "--name", "y", "--drop-repeats", "--min-rating", "3.5"]
    found = PrepareOptions(**vars(SCRIPT.parser().parse_args(words)))
    assert found == PrepareOptions("tables", "x", name="y", drop_repeats=True, min_rating=3.5)
    for wrong in (["tables", "--input", "x"], ["netflix", "--input", "x", "--name", "y"]):
        with pytest.raises(SystemExit):
            SCRIPT.parser().parse_args(wrong)
