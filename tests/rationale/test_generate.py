"""Rationales in a folder: what a row says, and that no stop of any kind loses or doubles one."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cotrain.config import DataConfig, GenerateConfig, RationaleConfig, TeacherConfig
from cotrain.data.interactions import InteractionData
from cotrain.errors import ConfigError, DataError
from cotrain.rationale import generate
from cotrain.rationale.checks import FLAGS
from cotrain.rationale.journal import Journal
from cotrain.rationale.prompts import load_template
from cotrain.rationale.records import Rationale, position_hash, read_rationales
from cotrain.rationale.selection import select_positions

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "generate_rationales.py"
specification = importlib.util.spec_from_file_location("generate_rationales", SCRIPT)
assert specification is not None
assert specification.loader is not None
generate_rationales = importlib.util.module_from_spec(specification)
specification.loader.exec_module(generate_rationales)
Options = dict[str, Any]
MAX_TOKENS = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small is slower with several, and the same number gives the same last bits."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if sys.platform == "linux" else set()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(generate, "use_all_cores", lambda _: torch.set_num_threads(1))
        if sys.platform == "linux":  # those that are launched take it over
            os.sched_setaffinity(0, {max(cores)})
        yield
    if sys.platform == "linux":
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def settings(tiny_teacher: str, small_tables: tuple[Path, Path]) -> Options:
    """Forty short texts in batches of about seven."""
    return {
        "data.name": "small",
        "data.interactions": small_tables[0],
        "data.items": small_tables[1],
        "teacher.model": tiny_teacher,
        "teacher.batch_tokens": 1000,
        "rationale.quantization": "fp32",
        "rationale.template": "default",
        "rationale.history_length": 3,
        "rationale.max_tokens": MAX_TOKENS,
        "rationale.language": None,
        "rationale.rows": 40,
    }


@pytest.fixture
def options(settings: Options, tmp_path: Path) -> Options:
    return {**settings, "output": tmp_path / "rationales"}


@pytest.fixture(scope="module")
def forty(settings: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an undisturbed call; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("undisturbed") / "rationales"
    write({**settings, "output": folder})
    return folder


def write(options: Options) -> Path:
    """Without the reading of a command line, which takes as long as all the rest."""
    parts: dict[str, Options] = {"data": {}, "teacher": {}, "rationale": {}, "": {}}
    for name, value in options.items():
        part, _, field = name.rpartition(".")
        parts[part][field] = str(value) if isinstance(value, Path) else value
    config = GenerateConfig(
        DataConfig(**parts["data"]), TeacherConfig(**parts["teacher"]),
        RationaleConfig(**parts["rationale"]), **parts[""],
    )  # fmt: skip
    return generate.generate(config)


def words(options: Options) -> list[str]:
    values = {name: "none" if value is None else str(value) for name, value in options.items()}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def call(options: Options) -> int:
    """The script, in this process."""
    return generate_rationales.main(words(options))


def launch(options: Options) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *words(options)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def rows_of(folder: Path, name: str = "rationales.jsonl") -> list[Rationale]:
    return list(read_rationales(folder / name))


def lines_of(folder: Path) -> list[str]:
    """In an order that does not depend on when they were written."""
    return sorted((folder / "rationales.jsonl").read_text().splitlines())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- rows ---------------------------------------------------------------------------------------


def test_every_row_explains_a_training_interaction_of_the_data(
    forty: Path, small_data: InteractionData, tiny_teacher: str
):
    rows = rows_of(forty)
    assert len({row.key for row in rows}) == len(rows) == 40
    ids = small_data.catalog.item_ids
    ends = small_data.held_out.train_end - small_data.offsets[:-1]
    for row in rows:
        user = small_data.user_ids.index(row.user_id)
        assert 0 < row.cut < ends[user]  # neither validation nor test
        past = [ids[item] for item in small_data.history(user)[: row.cut + 1]]
        assert row.item_id == past[-1]
        assert row.history_hash == position_hash(past[:-1], past[-1])
        assert (row.model, row.template) == (tiny_teacher, "default")
        assert row.rationale.startswith(load_template("default").opening)
        assert "\n" not in row.rationale
        assert row.tokens is not None
        assert 0 < row.tokens <= MAX_TOKENS
        assert row.logprob is not None
        assert -30 < row.logprob < 0
        assert set(row.flags) <= FLAGS.keys()
    assert len({row.rationale for row in rows}) > 30
    names = [field.name for field in fields(Rationale)]
    for line in (forty / "rationales.jsonl").read_text().splitlines():
        assert list(json.loads(line)) == names


def test_the_folder_says_what_is_in_it(forty: Path):
    names = {path.name for path in forty.iterdir() if not path.name.startswith(".")}
    assert names == {"rationales.jsonl", "config.yaml", "report.json", "rationales.html"}
    report = json.loads((forty / "report.json").read_text())
    rows = rows_of(forty)
    assert report["rows"] == 40
    assert report["clean"] == sum(not row.flags for row in rows)
    assert report["tokens"] == sum(row.tokens or 0 for row in rows)
    assert sum(chosen for *_, chosen in report["strata"]) == 40
    assert "this machine, fp32" in report["asked"]["Written by"]


def test_the_same_seed_writes_the_same(options: Options, forty: Path):
    write(options)
    assert contents(options["output"])["rationales.jsonl"] == contents(forty)["rationales.jsonl"]


def test_what_is_drawn_depends_on_the_seed_alone(options: Options, forty: Path):
    options |= {"rationale.temperature": 1, "rationale.rows": 6}
    texts = []
    for name, seed in [("one", 0), ("again", 0), ("other", 1)]:
        folder = options["output"].with_name(name)
        write({**options, "output": folder, "seed": seed})
        texts.append((folder / "rationales.jsonl").read_bytes())
    assert texts[0] == texts[1] != texts[2]
    likeliest = {row.key: row.rationale for row in rows_of(forty)}
    drawn = rows_of(options["output"].with_name("one"))
    assert all(likeliest[row.key] != row.rationale for row in drawn)


def test_flagged_ones_go_to_a_file_of_their_own(options: Options, forty: Path):
    folder = options["output"]
    options |= {"rationale.keep_flagged": False, "rationale.max_tokens": 24}
    write(options)
    kept, dropped = rows_of(folder), rows_of(folder, "dropped.jsonl")
    assert kept
    assert not any(row.flags for row in kept)
    assert dropped
    assert all(row.flags for row in dropped)
    keys = sorted((row.user_id, row.cut) for row in [*kept, *dropped])
    assert keys == sorted((row.user_id, row.cut) for row in rows_of(forty))
    report = json.loads((folder / "report.json").read_text())
    assert (report["rows"], report["clean"]) == (40, len(kept))
    before = contents(folder)
    write(options)  # what was dropped is not asked for again
    for name in ("rationales.jsonl", "dropped.jsonl"):
        assert contents(folder)[name] == before[name]


def test_what_memory_does_not_do_for_is_counted_and_tried_again(
    options: Options, forty: Path, capsys: pytest.CaptureFixture
):
    def fail(*_: Any) -> None:
        raise MemoryError

    options["rationale.rows"] = 3
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cotrain.rationale.writers.write", fail)
        write(options)
    assert "Memory does not do for 3 of them" in capsys.readouterr().out
    assert rows_of(options["output"]) == []
    write(options)
    assert "Memory" not in capsys.readouterr().out
    assert {row.key for row in rows_of(options["output"])} < {row.key for row in rows_of(forty)}


# ---- the same folder again ----------------------------------------------------------------------


def test_another_budget_goes_on_without_doubling(options: Options, small_data: InteractionData):
    folder = options["output"]
    write({**options, "rationale.rows": 8})
    first = (folder / "rationales.jsonl").read_bytes()
    assert first.count(b"\n") == 8
    # By a share, with other batches, and unlike the first without strata.
    more = {**options, "teacher.batch_tokens": 700, "rationale.strata": "none"}
    del more["rationale.rows"]
    write({**more, "rationale.fraction": 0.003})
    second = (folder / "rationales.jsonl").read_bytes()
    assert second.startswith(first)
    rows = rows_of(folder)
    expected = set()
    for budget in (RationaleConfig(rows=8), RationaleConfig(fraction=0.003, strata="none")):
        positions = select_positions(small_data, budget, seed=0)
        users = [small_data.user_ids[user] for user in positions.user]
        expected |= set(zip(users, positions.cut.tolist(), strict=True))
    assert len(rows) == len(expected) > 18
    assert {row.key for row in rows} == expected
    assert json.loads((folder / "report.json").read_text())["rows"] == len(rows)
    write({**options, "rationale.rows": 5})  # fewer than there are
    assert (folder / "rationales.jsonl").read_bytes() == second


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", 3, "seed 0 → 3"),
        ("rationale.temperature", 0.5, r"rationale.temperature 0.0 → 0.5"),
        ("rationale.max_tokens", 9, "rationale.max_tokens 8 → 9"),
        ("rationale.template", "movies", "rationale.template 'default' → 'movies'"),
        ("rationale.keep_flagged", False, "rationale.keep_flagged True → False"),
        ("data.split", "time", "data.split 'leave-one-out' → 'time'"),
    ],
)
def test_a_folder_of_other_settings_is_refused_and_left_alone(
    options: Options, forty: Path, tmp_path: Path, name: str, value: object, said: str
):
    folder = Path(shutil.copytree(forty, tmp_path / "begun"))
    before = contents(folder)
    with pytest.raises(ConfigError, match=f"other settings: {said}. Choose another --output"):
        write({**options, "output": folder, name: value})
    assert contents(folder) == before


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(options: Options):
    folder = options["output"]
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files and no rationales"):
        write(options)
    assert contents(folder) == {"notes.txt": b"mine"}
    (folder / "config.yaml").write_text("- a list\n")
    with pytest.raises(ConfigError, match=r"config\.yaml holds no settings"):
        write(options)
    (folder / "config.yaml").write_text("train: {epochs: 3}\n")  # of a run
    with pytest.raises(ConfigError, match="rationales of other settings"):
        write(options)
    assert contents(folder).keys() == {"notes.txt", "config.yaml"}
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        write({**options, "output": folder / "notes.txt"})


def test_rationales_of_other_data_are_refused_and_left_alone(
    options: Options, forty: Path, small_tables: tuple[Path, Path], tmp_path: Path
):
    """The settings are the same; the table that they name is not."""
    table = tmp_path / "interactions.csv"
    shutil.copy(small_tables[0], table)
    options |= {"data.interactions": table, "rationale.rows": 5}
    write(options)
    rows = (options["output"] / "rationales.jsonl").read_bytes()
    latest_first = pl.col("timestamp").max() - pl.col("timestamp")
    pl.read_csv(table).with_columns(timestamp=latest_first).write_csv(table)
    with pytest.raises(DataError, match="holds rationales of other data"):
        write(options)
    assert (options["output"] / "rationales.jsonl").read_bytes() == rows


# ---- stopped ------------------------------------------------------------------------------------


def test_an_interrupted_call_stops_with_130_and_goes_on(
    options: Options, forty: Path, capsys: pytest.CaptureFixture
):
    append, folder = Journal.append, options["output"]

    def interrupted(self: Journal, rows: Any) -> None:
        append(self, rows)
        if len(self.written) > 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "append", interrupted)
        assert call(options) == 130
    count = len(rows_of(folder))
    assert 10 < count < 40
    said = capsys.readouterr().err
    assert f"Stopped with {count} rationales in {folder}. The same command goes on." in said
    assert not (folder / "report.json").exists()
    assert call(options) == 0
    assert f"Going on: {count} of 40 are written already." in capsys.readouterr().out
    assert lines_of(folder) == lines_of(forty)
    report = json.loads((folder / "report.json").read_text())
    assert report["asked"]["Rate of the last call"].endswith(f", {40 - count} rows")


def test_a_kill_while_the_settings_are_written_leaves_a_folder_to_go_on_with(options: Options):
    """Regression: the first half of config.yaml was all that there was of it."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    folder = options["output"]
    folder.mkdir()
    (folder / ".config.yaml.tmp").write_text("data:\n  na")
    options["rationale.rows"] = 3
    write(options)
    settings = (folder / "config.yaml").read_bytes()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write({**options, "teacher.batch_tokens": 900})
    assert (folder / "config.yaml").read_bytes() == settings
    assert len(rows_of(folder)) == 3


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {count} rows in two minutes"
        time.sleep(0.002)


def kill_at_random_moments(options: Options, kills: int, seed: int) -> None:
    """Each after at least one new row, and before the last; what was on disk stays there."""
    path, total = options["output"] / "rationales.jsonl", options["rationale.rows"]
    random, before = np.random.default_rng(seed), b""
    for left in range(kills, 0, -1):
        rows = before.count(b"\n")
        wanted = rows + 1 + int(random.integers((total - rows) // (2 * left)))
        process = launch(options)
        wait_for_rows(path, wanted, process)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        now = path.read_bytes()
        assert now.startswith(before)
        assert wanted <= now.count(b"\n") < total
        # What a kill within a write leaves, which none of these may have met.
        torn = now.splitlines(keepends=True)[0][: int(random.integers(1, 200))]
        before = now[: now.rindex(b"\n") + 1]
        path.write_bytes(before + torn)


def check_killed(options: Options, kills: int, seed: int, capsys: pytest.CaptureFixture) -> None:
    undisturbed = options["output"].with_name("undisturbed")
    assert call({**options, "output": undisturbed}) == 0
    kill_at_random_moments(options, kills, seed)
    capsys.readouterr()
    assert call(options) == 0
    assert "a line that had not been finished" in capsys.readouterr().out
    rows = rows_of(options["output"])
    assert len({row.key for row in rows}) == len(rows) == options["rationale.rows"]
    assert lines_of(options["output"]) == lines_of(undisturbed)


def test_a_killed_script_that_is_started_again_ends_like_one_left_alone(
    options: Options, capsys: pytest.CaptureFixture
):
    check_killed(options | {"rationale.rows": 100, "rationale.temperature": 1}, 2, 0, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_script_killed_again_and_again_ends_like_one_left_alone(
    options: Options, capsys: pytest.CaptureFixture, temperature: int
):
    options |= {"rationale.rows": 400, "rationale.temperature": temperature}
    options |= {"rationale.top_p": 0.9} if temperature else {}
    check_killed(options, 8, 1 + temperature, capsys)


@pytest.mark.slow
def test_the_script_itself_ends_with_130_when_interrupted(options: Options, forty: Path):
    options["teacher.batch_tokens"] = 1  # one by one
    process = launch(options)
    wait_for_rows(options["output"] / "rationales.jsonl", 3, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on." in said
    assert "Traceback" not in said
    assert 3 <= len(rows_of(options["output"])) < 40
