"""MovieLens in each of GroupLens' layouts, byte for byte, and what may be wrong with them."""

import shutil
import zipfile
from pathlib import Path

import polars as pl
import pytest

from cotrain import assets
from cotrain.data.cleaning import clean
from cotrain.data.readers import movielens
from cotrain.data.readers.raw import Columns, RawData
from cotrain.errors import DataError

# First lines of the published files.
FILES = {
    "100k": {
        "ml-100k/u.data": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n22\t377\t1\t878887116\n",
        "ml-100k/u.item": "242|Kolya (1996)|24-Jan-1997||http://us.imdb.com/M/title-exact?Kolya%20"
        "(1996)|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "302|L.A. Confidential (1997)|01-Jan-1997||http://us.imdb.com/M/title-exact?L%2EA%2E+"
        "|0|0|0|0|0|0|1|0|0|0|1|0|0|1|0|0|1|0|0\n"
        "377|Misérables, Les (1995)|01-Jan-1994|||0|0|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0\n"
        "267|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n",
        # These stand beside u.data and must not be taken for it.
        "ml-100k/u1.base": "1\t1\t5\t874965758\n",
        "ml-100k/README": "SUMMARY & USAGE LICENSE\n",
    },
    "1m": {
        "ml-1m/ratings.dat": "196::242::3::978300760\n186::302::3::978302109\n"
        "22::377::1::978301968\n",
        "ml-1m/movies.dat": "242::Kolya (1996)::Comedy\n"
        "302::L.A. Confidential (1997)::Crime|Film-Noir|Mystery|Thriller\n"
        "377::Misérables, Les (1995)::Drama\n260::Star Wars: Episode IV (1977)::Action\n",
        "ml-1m/users.dat": "1::F::1::10::48067\n",
    },
    "10m": {
        "ml-10M100K/ratings.dat": "196::242::3.5::838985046\n186::302::3::838983525\n"
        "22::377::.5::838983392\n",
        "ml-10M100K/movies.dat": "242::Kolya (1996)::Comedy\n"
        "302::L.A. Confidential (1997)::Crime|Film-Noir|Mystery|Thriller\n"
        "377::Misérables, Les (1995)::Drama\n8::Nothing (1900)::(no genres listed)\n",
        "ml-10M100K/tags.dat": "15::4973::excellent!::1215184630\n",
    },
    "25m": {
        "ml-25m/ratings.csv": "userId,movieId,rating,timestamp\n196,242,3.0,1147880044\n"
        "186,302,3.0,1147868817\n22,377,0.5,1147868828\n",
        "ml-25m/movies.csv": "movieId,title,genres\n242,Kolya (1996),Comedy\n"
        "302,L.A. Confidential (1997),Crime|Film-Noir|Mystery|Thriller\n"
        '377,"Misérables, Les (1995)",Drama\n'
        '9,"""Great Performances"" Cats (1998)",(no genres listed)\n',
        "ml-25m/tags.csv": "userId,movieId,tag,timestamp\n3,260,classic,1439472355\n",
    },
}
LATIN_1 = {"100k", "1m"}


def write(folder: Path, files: dict[str, str], encoding: str = "utf-8") -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(encoding))
    return folder / next(iter(files)).partition("/")[0]


def release(folder: Path, edition: str, **changes: str) -> Path:
    """An unpacked release, with the content of some files (by base name) replaced."""
    files = {name: changes.get(Path(name).name, text) for name, text in FILES[edition].items()}
    return write(folder, files, "latin-1" if edition in LATIN_1 else "utf-8")


def zipped(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder.parent, folder.name))


def read(path: Path, items: Path | None = None) -> RawData:
    return movielens.read(path, items, Columns())


def rows(table: pl.DataFrame | None) -> list[tuple]:
    assert table is not None
    return table.rows()


def notes(raw: RawData) -> str:
    return "\n".join(raw.ledger.notes)


# ---- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("edition", FILES)
def test_every_layout_gives_the_same_form(tmp_path, edition, packed):
    path = release(tmp_path, edition)
    raw = read(zipped(path) if packed else path)
    rows = raw.interactions
    assert rows.select("user_id", "item_id").rows() == [(196, 242), (186, 302), (22, 377)]
    last = {"100k": 1.0, "1m": 1.0}.get(edition, 0.5)
    assert rows["rating"].to_list() == [3.5 if edition == "10m" else 3.0, 3.0, last]
    first = {"100k": 881250949, "1m": 978300760, "10m": 838985046, "25m": 1147880044}
    assert rows["timestamp"][0] == first[edition]
    assert rows["source_row"].to_list() == ([2, 3, 4] if edition == "25m" else [1, 2, 3])
    assert raw.items is not None
    items = {row[0]: row[1:] for row in raw.items.rows()}
    assert items[242] == ("Kolya (1996)", "Comedy")
    assert items[302] == ("L.A. Confidential (1997)", "Crime|Film-Noir|Mystery|Thriller")
    assert items[377] == ("Les Misérables (1995)", "Drama")
    assert "1 title changed: article" in notes(raw)


def test_titles_with_separators_quotes_and_nothing_known(tmp_path):
    items = {edition: read(release(tmp_path / edition, edition)).items for edition in FILES}
    found = {key: {row[0]: row[1:] for row in rows(table)} for key, table in items.items()}
    assert found["100k"][267] == (None, None)
    assert found["1m"][260] == ("Star Wars: Episode IV (1977)", "Action")
    assert found["10m"][8] == ("Nothing (1900)", None)
    assert found["25m"][9] == ('"Great Performances" Cats (1998)', None)


def test_the_file_of_ratings_itself_and_movies_from_elsewhere(tmp_path):
    folder = release(tmp_path, "25m")
    (folder / "movies.csv").rename(tmp_path / "films.csv")
    alone = read(folder / "ratings.csv")
    assert alone.items is None
    assert "No movies.csv stands beside" in notes(alone)
    both = read(folder / "ratings.csv", tmp_path / "films.csv")
    assert both.items is not None
    assert both.files == [folder / "ratings.csv", tmp_path / "films.csv"]


def test_the_real_ml_100k_as_grouplens_writes_it(tmp_path):
    """Every rating of the asset, written as u.data and u.item, is read as it was."""
    asset = assets.fetch("ml-100k")
    interactions = pl.read_parquet(asset / "interactions.parquet")
    items = pl.read_parquet(asset / "items.parquet")
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    interactions.select("user_id", "item_id", "rating", "timestamp").write_csv(
        folder / "u.data", separator="\t", include_header=False
    )
    lines = []
    for item, title, categories in items.rows():
        genres = categories.split("|") if categories else ["unknown"]
        flags = ["1" if genre in genres else "0" for genre in movielens._GENRES_100K]
        lines.append("|".join([str(item), title or "unknown", "01-Jan-1995", "", "", *flags]))
    (folder / "u.item").write_bytes(("\n".join(lines) + "\n").encode("latin-1"))

    raw = read(folder)
    assert raw.interactions.select("user_id", "item_id", "rating", "timestamp").rows() == (
        interactions.select("user_id", "item_id", "rating", "timestamp").rows()
    )
    assert raw.items is not None
    blank = pl.col("title", "categories").fill_null("")
    as_sets = pl.col("categories").str.split("|").list.sort()
    assert (
        raw.items.with_columns(blank).with_columns(as_sets).rows()
        == items.with_columns(blank).with_columns(as_sets).rows()
    )


# ---- what may be wrong --------------------------------------------------------------------------


def damaged(tmp_path: Path, edition: str, name: str, text: str) -> RawData:
    return read(release(tmp_path, edition, **{name: text}))


GOOD = "196,242,3.0,1147880044\n"


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("196,242,3.0", "another number of fields than 4"),
        ("196,242,3.0,1147880044,7", "another number of fields than 4"),
        ("196,242,3.0,1147880044,", "another number of fields than 4"),
        ("userId,movieId,rating,timestamp", "the header again"),
        ("x196,242,3.0,1147880044", "no number in field 'user_id'"),
        ("196,tt242,3.0,1147880044", "no number in field 'item_id'"),
        ("196,99999999999999999999,3.0,1147880044", "no number in field 'item_id'"),
        ("196,242,good,1147880044", "no number in field 'rating'"),
        ("196,242,3.0,2006-05-17", "no number in field 'timestamp'"),
    ],
)
def test_a_line_that_is_no_rating_is_dropped_counted_and_shown(tmp_path, line, cause):
    text = f"userId,movieId,rating,timestamp\n{GOOD * 3}{line}\n{GOOD * 2}"
    raw = damaged(tmp_path, "25m", "ratings.csv", text)
    assert raw.interactions["source_row"].to_list() == [2, 3, 4, 6, 7]
    assert raw.interactions["item_id"].to_list() == [242] * 5
    read_step, dropped = raw.ledger.steps
    assert (read_step.left, dropped.text, dropped.dropped, dropped.left) == (6, cause, 1, 5)
    assert dropped.examples == [f"line 5: {line!r}"]
    with pytest.raises(DataError, match=r"(?s)1 of 6 rows \(16\.67%\).*--max-bad-share.*line 5"):
        clean(raw, 0.001)


def test_bytes_that_are_no_utf_8(tmp_path):
    folder = release(tmp_path, "25m")
    data = f"userId,movieId,rating,timestamp\n{GOOD * 3}".encode() + b"196,2\xff,3.0,1147880044\n"
    (folder / "ratings.csv").write_bytes(data)
    raw = read(folder)
    assert [(step.text, step.dropped) for step in raw.ledger.steps[1:]] == [("not UTF-8", 1)]


def test_windows_line_ends_blanks_and_a_byte_order_mark_change_nothing(tmp_path):
    text = "userId,movieId,rating,timestamp\n" + GOOD + "186, 302,3.0,1147868817\n"
    plain = damaged(tmp_path / "a", "25m", "ratings.csv", text)
    odd = "\ufeff" + text.replace("\n", "\r\n") + "\r\n"
    other = damaged(tmp_path / "b", "25m", "ratings.csv", odd)
    assert other.interactions.rows() == plain.interactions.rows()
    assert "1 line of ratings.csv passed over: blank" in notes(other)


@pytest.mark.parametrize(
    ("edition", "name", "text"),
    [
        ("25m", "ratings.csv", "userId;movieId;rating;timestamp\n196;242;3.0;1147880044\n"),
        ("25m", "ratings.csv", "user_id,item_id\n1,2\n"),
        ("1m", "ratings.dat", "196,242,3,978300760\n186,302,3,978302109\n"),
        ("1m", "ratings.dat", "196:242:3:978300760\n186:302:3:978302109\n"),
        ("100k", "u.data", "196 242 3 881250949\n186 302 3 891717742\n"),
    ],
)
def test_another_separator_or_header_is_an_error_that_shows_it(tmp_path, edition, name, text):
    with pytest.raises(DataError, match=f"{name}.*(expected|fields)"):
        damaged(tmp_path, edition, name, text)


def test_single_colons_between_double_ones_are_no_separator(tmp_path):
    text = "196::242::3::978300760\n" * 3 + "196:x:242::3::978300760\n196::242:3::978300760\n"
    raw = damaged(tmp_path, "1m", "ratings.dat", text)
    assert raw.interactions.height == 3
    assert raw.ledger.damaged == 2


def test_utf_16_is_an_error_and_not_a_million_damaged_lines(tmp_path):
    folder = release(tmp_path, "25m")
    (folder / "ratings.csv").write_text(FILES["25m"]["ml-25m/ratings.csv"], encoding="utf-16")
    with pytest.raises(DataError, match="no UTF-8 text"):
        read(folder)


@pytest.mark.parametrize("text", ["", "userId,movieId,rating,timestamp\n"])
def test_no_rows(tmp_path, text):
    with pytest.raises(DataError, match=r"is empty|has no rows"):
        damaged(tmp_path, "25m", "ratings.csv", text)


# ---- cut off in the middle ----------------------------------------------------------------------


@pytest.mark.parametrize("end", ["1", "19", "196,", "196,242", "196,242,3.", "196,242,3.0,"])
def test_a_last_line_that_stops_before_its_time_is_an_error(tmp_path, end):
    text = "userId,movieId,rating,timestamp\n" + GOOD * 3 + end
    with pytest.raises(DataError, match=r"cut off.*line.* 5"):
        clean(damaged(tmp_path, "25m", "ratings.csv", text), 1)


@pytest.mark.parametrize("digits", range(1, 10))
def test_a_last_timestamp_that_lacks_digits_is_an_error(tmp_path, digits):
    text = "userId,movieId,rating,timestamp\n" + GOOD * 3 + f"196,242,3.0,{'1147880044'[:digits]}"
    with pytest.raises(DataError, match=r"cut off.*line 5.*no line end"):
        clean(damaged(tmp_path, "25m", "ratings.csv", text), 1)


def test_a_whole_last_line_without_its_end_is_kept_with_a_warning(tmp_path):
    raw = damaged(tmp_path, "25m", "ratings.csv", ("userId,movieId,rating,timestamp\n" + GOOD)[:-1])
    assert clean(raw, 0).table.height == 1
    assert "WARNING: ratings.csv has no line end after its last row (line 2)" in notes(raw)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_zip_that_is_cut_off_or_damaged(tmp_path, share):
    path = zipped(release(tmp_path, "25m"))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match="no whole zip archive"):
        read(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("ml-25m/ratings.csv", FILES["25m"]["ml-25m/ratings.csv"])
    data = path.read_bytes()
    path.write_bytes(data.replace(b"1147880044", b"1147880045"))
    with pytest.raises(DataError, match=r"cut off or damaged.*CRC"):
        read(path)


def test_movies_that_are_no_movies(tmp_path):
    good = FILES["1m"]["ml-1m/movies.dat"]
    raw = damaged(tmp_path / "a", "1m", "movies.dat", good + "5::Cut\n" + good[:8] + "\nx::y::z\n")
    assert raw.items is not None
    assert raw.items["item_id"].to_list() == [242, 302, 377, 260]
    assert "3 of 7 lines of movies.dat dropped, no movies: line 5, line 6" in notes(raw)
    with pytest.raises(DataError, match="no list of movies"):
        damaged(tmp_path / "b", "1m", "movies.dat", "a,b\nc,d\n")


def test_repeated_movies_keep_the_first(tmp_path):
    text = FILES["25m"]["ml-25m/movies.csv"] + "242,Again (1999),Drama\n"
    raw = damaged(tmp_path, "25m", "movies.csv", text)
    assert raw.items is not None
    assert raw.items.filter(item_id=242)["title"].to_list() == ["Kolya (1996)"]
    assert "1 row of movies.csv dropped: the item id stands in an earlier row" in notes(raw)


@pytest.mark.parametrize("what", ["missing", "empty", "other", "twice"])
def test_a_place_without_ratings(tmp_path, what):
    folder = tmp_path / "place"
    if what != "missing":
        folder.mkdir()
    if what == "other":
        (folder / "scores.csv").write_text("userId\n")
    if what == "twice":
        write(folder, {"a/ratings.csv": "x", "b/ratings.csv": "x"})
    with pytest.raises(DataError, match=r"--input"):
        read(folder)
    if what == "other":
        with pytest.raises(DataError, match="no file of MovieLens ratings"):
            read(folder / "scores.csv")
