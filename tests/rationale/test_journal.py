"""A file that is killed while it grows, and opened again."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.data.interactions import InteractionData
from cotrain.errors import DataError
from cotrain.rationale.journal import Journal
from cotrain.rationale.records import Rationale, position_hash, read_rationales


def a_rationale(user: int | str = 1, cut: int = 2, text: str = "Because.") -> Rationale:
    return Rationale(user, 9, cut, "0" * 32, text, "model", "movies", -0.5, 3, [])


ROWS = [a_rationale(user, cut, f"Ünlike «{user}» {cut}") for user in (1, "1", 2) for cut in (1, 2)]


def test_what_is_appended_is_on_disk_and_read_back(tmp_path: Path):
    journal = Journal(tmp_path / "new" / "rationales.jsonl")
    journal.append(ROWS[:4])
    assert list(read_rationales(journal.path)) == ROWS[:4]
    journal.append(ROWS)  # what is there is not written again
    journal.close()
    again = Journal(journal.path)
    assert again.written == {row.key for row in ROWS}
    assert again.mended == ""
    again.append(ROWS)
    again.close()
    assert list(read_rationales(journal.path)) == ROWS


@given(st.integers(0, 400))
@settings(deadline=None)
def test_a_file_cut_anywhere_loses_at_most_the_unfinished_row(
    tmp_path_factory: pytest.TempPathFactory, left: int
):
    path = tmp_path_factory.mktemp("journal") / "rationales.jsonl"
    journal = Journal(path)
    journal.append(ROWS)
    journal.close()
    whole = path.read_bytes()
    cut = whole[: min(left, len(whole))]
    path.write_bytes(cut)
    again = Journal(path)
    kept = cut.count(b"\n")
    assert again.written == {row.key for row in ROWS[:kept]}
    assert bool(again.mended) == (not cut.endswith(b"\n") and bool(cut))
    again.append(ROWS)
    again.close()
    assert path.read_bytes() == whole


def test_a_torn_line_longer_than_a_piece_is_cut_off(tmp_path: Path):
    path = tmp_path / "rationales.jsonl"
    path.write_text(ROWS[0].to_json() + "\n" + "x" * 200_000)
    journal = Journal(path)
    assert journal.written == {ROWS[0].key}
    assert "200000 bytes" in journal.mended
    journal.close()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([ROWS[0].to_json(), ROWS[0].to_json()], r"two rationales for user 1, cut 1"),
        ([ROWS[0].to_json(), "{}"], r"Line 2 of .* is not a rationale: it lacks user_id"),
        (["not json"], r"Line 1 of .* is not a rationale"),
    ],
)
def test_what_nobody_of_ours_wrote_is_an_error_and_stays(
    tmp_path: Path, lines: list[str], message: str
):
    path = tmp_path / "rationales.jsonl"
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with pytest.raises(DataError, match=message):
        Journal(path)
    assert path.read_bytes() == before


def test_two_processes_do_not_write_one_file(tmp_path: Path):
    journal = Journal(tmp_path / "rationales.jsonl")
    with pytest.raises(DataError, match="being written by another process"):
        Journal(journal.path)
    journal.close()
    Journal(journal.path).close()


def test_rows_of_other_data_are_refused(tmp_path: Path, ml100k: InteractionData):
    ids = [ml100k.catalog.item_ids[item] for item in ml100k.history(3)]
    good = Rationale(
        ml100k.user_ids[3], ids[4], 4, position_hash(ids[:4], ids[4]), "So.", "m", "movies"
    )
    journal = Journal(tmp_path / "rationales.jsonl")
    journal.append([good])
    journal.check(ml100k)
    journal.append([a_rationale("nobody"), Rationale(**{**vars(good), "cut": 5})])
    with pytest.raises(DataError, match=r"other data: \('nobody', 2\), \(.*, 5\) \(user, cut\)"):
        journal.check(ml100k)
    journal.close()
