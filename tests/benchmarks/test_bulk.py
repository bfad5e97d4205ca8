"""The benchmark's file of users is what scripts/recommend.py reads, of any kind."""

from pathlib import Path

import numpy as np
import pytest

from cotrain.benchmarks import bulk
from cotrain.benchmarks.settings import BulkSettings
from cotrain.data.histories import HistoryFile
from cotrain.rationale.answers import FinishedRun


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_users_are_drawn_from_the_run(finished_run: Path, tmp_path: Path, kind, monkeypatch):
    monkeypatch.setattr(bulk, "_PIECE", 40)
    run = FinishedRun.open(finished_run)
    settings = BulkSettings(str(finished_run), users=100, kind=kind)
    length = bulk.write_histories(run, settings, tmp_path / f"h.{kind}")
    assert [path.name for path in tmp_path.iterdir()] == [f"h.{kind}"]
    pieces = [*HistoryFile(tmp_path / f"h.{kind}")]
    lengths = np.concatenate([piece.lengths for piece in pieces])
    assert len(lengths) == 100
    assert lengths.mean() == length
    known = {tuple(run.data.history(user).tolist()) for user in range(run.data.num_users)}
    items = [int(item) for piece in pieces for item in piece.items.to_pylist()]
    first = [run.data.catalog.item_ids.index(item) for item in items[: lengths[0]]]
    assert tuple(first) in known


def test_the_text_has_what_a_reader_needs():
    facts = {"processor": "", "cores": 2, "threads": 1, "load_at_start": 0.5}
    said = bulk.text(
        {
            "machine": facts, "users": 1_000_000, "history_length": 106.0, "seconds": 200.0,
            "users_per_s": 5000.0, "cpu_seconds": 210.0, "peak_mb": 900.0, "read_mb": 80.0,
            "written_mb": 90.0, "settings": {"kind": "csv"},
        }
    )  # fmt: skip
    assert "1,000,000 users with 106 items on average, csv: 200.0 s, 5,000 users/s" in said
    assert "Peak memory 900 MB" in said
    assert "load 0.5" in said
