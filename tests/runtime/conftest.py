"""Event files that are read in the order in which they were written."""

import pytest
from tensorboard.summary.writer import event_file_writer


@pytest.fixture(autouse=True)
def files_in_order(monkeypatch: pytest.MonkeyPatch):
    """Those of one second and process are read in the order of their names, .10 before .9."""
    counter = event_file_writer.AtomicCounter(0)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)
