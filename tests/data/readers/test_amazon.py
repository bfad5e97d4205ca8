"""Amazon reviews of 2014, 2018 and 2023 as they are published, and what may be wrong with them."""

import ast
import gzip
import json
from pathlib import Path

import polars as pl
import pytest

from cotrain.data.cleaning import clean
from cotrain.data.readers import amazon
from cotrain.data.readers.raw import Columns, RawData
from cotrain.errors import DataError

REVIEWS_2014 = [
    '{"reviewerID": "A1YJEY40YUW4SE", "asin": "7806397051", "reviewerName": "Andrea", "helpful": '
    '[3, 4], "reviewText": "Very oily\\n and \\"creamy\\".", "overall": 1.0, "summary": '
    '"Don\'t waste your money", "unixReviewTime": 1391040000, "reviewTime": "01 30, 2014"}',
    '{"reviewerID": "A60XNB876KYML", "asin": "7806397051", "helpful": [0, 0], "reviewText": '
    '"Fine", "overall": 3.0, "summary": "OK", "unixReviewTime": 1397779200, "reviewTime": '
    '"04 18, 2014"}',
]
REVIEWS_2018 = [
    '{"overall": 5.0, "vote": "2", "verified": true, "reviewTime": "08 22, 2013", "reviewerID": '
    '"A34A1UP40713F8", "asin": "B00009W3I4", "style": {"Style:": " Dryer Vent"}, "reviewerName": '
    '"James", "reviewText": "Works", "summary": "Five Stars", "unixReviewTime": 1377129600}',
    '{"overall": 4, "verified": false, "reviewTime": "02 8, 2016", "reviewerID": '
    '"A1AHW6I678O6F2", "asin": "B00009W3PA", "unixReviewTime": 1454889600, "image": ["x"]}',
]
REVIEWS_2023 = [
    '{"rating": 5.0, "title": "Such a lovely scent", "text": "This spray", "images": [], "asin": '
    '"B00YQ6X8EO", "parent_asin": "B00YQ6X8EP", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", '
    '"timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": true}',
    '{"rating": 4.0, "title": "Works", "text": "", "images": [], "asin": "B081TJ8YS3", '
    '"parent_asin": "B081TJ8YS3", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", "timestamp": '
    '1588615855070, "helpful_vote": 1, "verified_purchase": true}',
]
EDITIONS = {"2014": REVIEWS_2014, "2018": REVIEWS_2018, "2023": REVIEWS_2023}

# Metadata of 2014 is Python: single quotes, and double ones around text with an apostrophe.
META_2014 = [
    "{'asin': '0000000001', 'title': 'Never reviewed', 'categories': [['Beauty']]}",
    "{'asin': '7806397051', 'description': 'Xtreme', 'title': \"WAWO's 15 Color\", "
    "'imUrl': 'http', 'related': {'also_viewed': ['B004Q8C0YG']}, 'salesRank': {'Beauty': 52254}, "
    "'categories': [['Beauty', 'Makeup', 'Face'], ['Beauty', 'Sets']]}",
]
META_2018 = [
    '{"category": ["Appliances", "Parts &amp; Accessories"], "tech1": "", "description": ["x"], '
    '"title": "Dryer Vent", "also_buy": [], "rank": [], "price": "$1", "asin": "B00009W3I4"}',
    '{"category": [], "title": "", "asin": "B00009W3PA"}',
    '{"category": ["Appliances"], "title": "Dryer Vent again", "asin": "B00009W3I4"}',
]
META_2023 = [
    '{"main_category": "All Beauty", "title": "Howard LC0008 Leather Conditioner", '
    '"average_rating": 4.8, "features": [], "price": null, "categories": ["Beauty", "Care"], '
    '"details": {"Brand": "Howard"}, "parent_asin": "B00YQ6X8EP", "bought_together": null}',
    '{"main_category": "All Beauty", "title": null, "categories": [], "parent_asin": "B081TJ8YS3"}',
]


def write(path: Path, lines: list[str] | str) -> Path:
    text = lines if isinstance(lines, str) else "".join(f"{line}\n" for line in lines)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(reviews: Path, items: Path | None = None) -> RawData:
    return amazon.read(reviews, items, Columns())


def found(raw: RawData) -> list[tuple]:
    return raw.interactions.select("user_id", "item_id", "rating", "timestamp").rows()


def notes(raw: RawData) -> str:
    return "\n".join(raw.ledger.notes)


# ---- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json.gz", ".json"])
@pytest.mark.parametrize("edition", EDITIONS)
def test_reviews_of_each_edition(tmp_path, edition, suffix):
    raw = read(write(tmp_path / f"reviews_Beauty_5{suffix}", EDITIONS[edition]))
    assert (
        found(raw)
        == {
            "2014": [
                ("A1YJEY40YUW4SE", "7806397051", 1.0, 1391040000),
                ("A60XNB876KYML", "7806397051", 3.0, 1397779200),
            ],
            "2018": [
                ("A34A1UP40713F8", "B00009W3I4", 5.0, 1377129600),
                ("A1AHW6I678O6F2", "B00009W3PA", 4.0, 1454889600),
            ],
            "2023": [
                ("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B00YQ6X8EP", 5.0, 1588687728923),
                ("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B081TJ8YS3", 4.0, 1588615855070),
            ],
        }[edition]
    )
    assert raw.items is None
    assert edition in raw.ledger.steps[0].text


def test_csv_of_2023_and_its_milliseconds(tmp_path):
    text = "user_id,parent_asin,rating,timestamp\n"
    text += "AGK,B00YQ6X8EP,5.0,1588687728923\nAGK,B081TJ8YS3,4.0,1588615855070\n"
    raw = read(write(tmp_path / "All_Beauty.csv.gz", text))
    assert found(raw) == [
        ("AGK", "B00YQ6X8EP", 5.0, 1588687728923),
        ("AGK", "B081TJ8YS3", 4.0, 1588615855070),
    ]
    events = clean(raw, 0)
    assert events.table["timestamp"].to_list() == [1588615855, 1588687728]
    assert "Timestamps are in milliseconds" in notes(raw)


def test_a_gzip_file_that_a_browser_unpacked(tmp_path):
    path = tmp_path / "reviews_Beauty_5.json.gz"
    path.write_bytes("".join(f"{line}\n" for line in REVIEWS_2014).encode())
    assert len(found(read(path))) == 2


def test_metadata_of_2014_is_python(tmp_path):
    reviews = write(tmp_path / "reviews.json.gz", REVIEWS_2014)
    raw = read(reviews, write(tmp_path / "meta.json.gz", META_2014))
    assert raw.items is not None
    assert raw.items.rows() == [("7806397051", "WAWO's 15 Color", "Beauty|Makeup|Face|Sets")]
    assert "2 lines of meta.json.gz read as Python, not JSON" in notes(raw)
    assert "2 items read, 1 of the 1 with reviews" in notes(raw)


def test_metadata_of_2014_as_strict_json(tmp_path):
    strict = [json.dumps(ast.literal_eval(line)) for line in META_2014]
    reviews = write(tmp_path / "reviews.json.gz", REVIEWS_2014)
    raw = read(reviews, write(tmp_path / "meta.json.gz", strict))
    assert raw.items is not None
    assert raw.items.rows() == [("7806397051", "WAWO's 15 Color", "Beauty|Makeup|Face|Sets")]


def test_metadata_of_2018_and_2023(tmp_path):
    raw = read(
        write(tmp_path / "a.json.gz", REVIEWS_2018), write(tmp_path / "b.json.gz", META_2018)
    )
    assert raw.items is not None
    assert raw.items.rows() == [
        ("B00009W3I4", "Dryer Vent", "Appliances|Parts &amp; Accessories"),
        ("B00009W3PA", "", None),
    ]
    assert "1 row of b.json.gz dropped: the item id stands in an earlier row" in notes(raw)
    raw = read(
        write(tmp_path / "c.jsonl.gz", REVIEWS_2023), write(tmp_path / "d.jsonl.gz", META_2023)
    )
    assert raw.items is not None
    assert raw.items.rows() == [
        ("B00YQ6X8EP", "Howard LC0008 Leather Conditioner", "Beauty|Care"),
        ("B081TJ8YS3", None, None),
    ]


def test_reviews_that_are_python_literals(tmp_path):
    loose = [repr(json.loads(line)) for line in REVIEWS_2014]
    raw = read(write(tmp_path / "reviews.json.gz", loose))
    assert found(raw) == found(read(write(tmp_path / "strict.json.gz", REVIEWS_2014)))
    assert "2 lines of reviews.json.gz read as Python" in notes(raw)


def test_values_of_other_types_are_read_as_what_they_say(tmp_path):
    lines = [
        '{"reviewerID": 7, "asin": 12, "overall": "4.0", "unixReviewTime": "1391040000"}',
        '{"reviewerID": "7", "asin": "12", "overall": null, "unixReviewTime": 1.391040000e9}',
        '{"reviewerID": "7", "asin": "12", "overall": NaN, "unixReviewTime": 1391040001}',
    ]
    rows = found(read(write(tmp_path / "reviews.json", lines)))
    assert [row[:2] for row in rows] == [("7", "12")] * 3
    assert [row[3] for row in rows] == [1391040000, 1391040000, 1391040001]
    assert rows[0][2] == 4.0
    assert rows[1][2] is None
    assert rows[2][2] is None or rows[2][2] != rows[2][2]


# ---- what may be wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        REVIEWS_2014[0][:60],
        "<html>503 Service Unavailable</html>",
        "[1, 2]",
        "null",
        REVIEWS_2014[0] + " " + REVIEWS_2014[1],
        "{'reviewerID': 'A1', 'asin': __import__('os')}",
        '{"reviewerID": "A\x00", }',
    ],
)
def test_a_line_that_is_no_object_is_dropped_counted_and_shown(tmp_path, line):
    lines = [*REVIEWS_2014, line, *REVIEWS_2014, *REVIEWS_2014]
    raw = read(write(tmp_path / "reviews.json.gz", lines))
    assert raw.interactions["source_row"].to_list() == [1, 2, 4, 5, 6, 7]
    step = raw.ledger.steps[1]
    assert (step.text, step.dropped, step.left) == ("no JSON object", 1, 6)
    assert step.examples[0].startswith(f"line 3: {line[:20]!r}"[:-1])
    assert clean(raw, 0.2).table.height == 6


def test_a_damaged_line_in_a_later_block_has_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr("cotrain.data.readers.sources.BLOCK_BYTES", 1000)
    lines = [*REVIEWS_2014 * 20, "{broken", *REVIEWS_2014 * 20]
    raw = read(write(tmp_path / "reviews.json.gz", lines))
    assert raw.ledger.steps[1].examples == ["line 41: '{broken'"]
    assert raw.interactions["source_row"].to_list() == [*range(1, 41), *range(42, 82)]


def test_missing_keys_are_counted_by_the_check(tmp_path):
    lines = [*REVIEWS_2014 * 3, '{"asin": "B1", "overall": 1.0}', '{"reviewerID": "A1"}']
    raw = read(write(tmp_path / "reviews.json", lines))
    assert clean(raw, 0.5).table.height == 6
    assert {step.text: step.examples for step in raw.ledger.steps[1:]} == {
        "no user_id": ["line 7"],
        "no item_id": ["line 8"],
    }


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_truncated_gzip_file_is_an_error(tmp_path, share):
    # Random ids, so that the packed file is long enough to be cut anywhere.
    ids = pl.Series(range(3000)).hash(seed=1).to_list()
    lines = [REVIEWS_2014[1].replace("A60XNB876KYML", f"A{number}") for number in ids]
    path = write(tmp_path / "reviews.json.gz", lines)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"reviews.json.gz is cut off or damaged somewhere after"):
        read(path)


def test_a_cut_off_plain_file_is_an_error_and_a_missing_last_line_end_is_none(tmp_path):
    text = "\n".join(REVIEWS_2014)
    assert len(found(read(write(tmp_path / "whole.json", text)))) == 2
    for cut in (len(text) - 1, len(text) - 30, len(REVIEWS_2014[0]) + 2):
        with pytest.raises(DataError, match=r"cut.json is cut off: its last line, 2, stops"):
            read(write(tmp_path / "cut.json", text[:cut]))


def test_blank_lines_are_passed_over(tmp_path):
    raw = read(write(tmp_path / "r.json", [REVIEWS_2014[0], "", " ", REVIEWS_2014[1]]))
    assert raw.interactions["source_row"].to_list() == [1, 4]
    assert "2 lines of r.json passed over: blank" in notes(raw)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (META_2018, "Metadata belongs to --items"),
        (["user,item,rating"], "holds no Amazon reviews"),
        ([], "is empty"),
    ],
)
def test_other_files_are_refused(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "reviews.json", lines))


def test_a_file_that_turns_into_something_else_is_refused_early(tmp_path):
    with pytest.raises(DataError, match=r"is not what it is taken for: 9 of the first 10 lines"):
        read(write(tmp_path / "reviews.json", [REVIEWS_2014[0], *["rubbish"] * 9]))


@pytest.mark.parametrize("name", ["", "missing.json.gz"])
def test_a_folder_or_nothing_is_no_file(tmp_path, name):
    with pytest.raises(DataError, match="--input takes one file"):
        read(tmp_path / name)


def test_damaged_metadata_is_counted(tmp_path):
    reviews = write(tmp_path / "reviews.json.gz", REVIEWS_2014)
    raw = read(reviews, write(tmp_path / "meta.json.gz", [*META_2014, "{'asin': '78063"]))
    assert "1 line of meta.json.gz dropped, no objects: line 3" in notes(raw)
    with pytest.raises(DataError, match=r"meta.json is cut off"):
        read(reviews, write(tmp_path / "meta.json", "\n".join([*META_2014, "{'asin': '78063"])))
