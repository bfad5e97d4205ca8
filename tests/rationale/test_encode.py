"""From JSON lines to a store: what is left out, what a kill leaves, the same vectors at last."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from cotrain.config import EncodeConfig, TeacherConfig
from cotrain.data.interactions import InteractionData
from cotrain.data.item_text import sentence_vectors
from cotrain.errors import ConfigError, DataError, TeacherError
from cotrain.rationale import encode as encoding
from cotrain.rationale.encode import encode
from cotrain.rationale.encoders import TextEncoder
from cotrain.rationale.records import Rationale
from cotrain.rationale.store import ROWS, VECTORS, RationaleStore
from cotrain.teacher.backbone import load_backbone

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "encode_rationales.py"
specification = importlib.util.spec_from_file_location("encode_rationales", SCRIPT)
assert specification is not None
assert specification.loader is not None
encode_rationales = importlib.util.module_from_spec(specification)
specification.loader.exec_module(encode_rationales)

CPU = torch.device("cpu")


@pytest.fixture
def forty(small_data: InteractionData, make_rationale: Callable[..., Rationale]) -> list[Rationale]:
    """Of one user, with texts of many lengths."""
    words = "because they like old films with ghosts and little talk about money"
    return [
        make_rationale(small_data, 0, cut, f"{words[: 6 * (1 + cut % 12)]} {cut}")
        for cut in range(1, 41)
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(rationales: Sequence[Rationale], name: str = "rationales.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(r.to_json() + "\n" for r in rationales), encoding="utf-8")
        return path

    return written


def quiet(line: str) -> None:
    pass


def vectors_of(store: RationaleStore) -> Tensor:
    return store.vectors(np.arange(len(store)))


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_store_holds_every_text_by_its_row(write, forty, small_data, static_encoder, dtype):
    source = write(forty)
    lines: list[str] = []
    config = EncodeConfig(rationales=str(source), encoder=static_encoder, dtype=dtype)
    made = encode(config, lines.append)
    assert made.folder == source.parent / "encoder"
    assert sorted(path.name for path in made.folder.iterdir()) == [ROWS, VECTORS]
    assert sorted(path.name for path in source.parent.iterdir()) == ["encoder", source.name]
    expected = sentence_vectors([r.rationale for r in forty], static_encoder, CPU, progress=False)
    torch.testing.assert_close(
        vectors_of(made), expected.to(getattr(torch, dtype)).float(), rtol=0, atol=0
    )
    assert made.texts(np.arange(40)) == forty
    assert len(made.match(small_data).places) == 40
    with safe_open(made.folder / VECTORS, "pt") as file:
        assert file.get_tensor("vectors").dtype == getattr(torch, dtype)
        assert file.metadata()["encoder"] == static_encoder
        assert file.metadata()["source"] == "rationales.jsonl"
    assert "40 lines in rationales.jsonl, 0 left out, 0 repeated, 40 to encode" in lines[0]
    assert "40 vectors of 16" in lines[-1]


def test_parts_chunks_and_groups_change_nothing(write, forty, static_encoder, monkeypatch):
    """Regression: of several parts of lines only the first two were read."""
    whole = encode(EncodeConfig(rationales=str(write(forty)), encoder=static_encoder), quiet)
    monkeypatch.setattr(encoding, "LINES", 6)
    monkeypatch.setattr(encoding, "CHUNK", 3)
    monkeypatch.setattr("cotrain.rationale.store.ROW_GROUP", 7)
    config = EncodeConfig(
        rationales=str(write(forty)), encoder=static_encoder, output=str(whole.folder / "in parts")
    )
    parts = encode(config, quiet)
    assert parts.texts(np.arange(40)) == forty
    # Texts of one batch are padded to one length, which moves the last bits.
    torch.testing.assert_close(vectors_of(parts), vectors_of(whole), rtol=1e-3, atol=1e-4)


def test_flagged_blank_and_repeated_lines_are_left_out_and_counted(
    write, forty, small_data, static_encoder, monkeypatch
):
    monkeypatch.setattr(encoding, "LINES", 5)
    changed = list(forty)
    changed[3] = dataclasses.replace(forty[3], flags=["too_long", "refusal"])
    changed[4] = dataclasses.replace(forty[4], flags=["too_long"])
    changed[5] = dataclasses.replace(forty[5], rationale=" \n")
    changed[6] = dataclasses.replace(forty[6], flags=["empty", "refusal"], rationale="")
    changed.append(dataclasses.replace(forty[30], rationale="Another reason."))
    # Of one that was left out, the next may stand.
    changed.append(dataclasses.replace(forty[3], rationale="They like it."))
    lines: list[str] = []
    config = EncodeConfig(rationales=str(write(changed)), encoder=static_encoder)
    made = encode(config, lines.append)
    assert made.texts(np.arange(len(made))) == [
        *forty[:3], changed[4], *forty[7:], changed[-1]
    ]  # fmt: skip
    left_out = {"refusal": 1, "blank": 1, "empty": 1}
    counts = {"lines": 42, "rows": 38, "repeated": 1, "left_out": left_out}
    assert json.loads(made.facts["counts"]) == counts
    assert "3 left out (blank 1, empty 1, refusal 1), 1 repeated, 38 to encode" in lines[0]
    made.match(small_data)


def test_flagged_lines_can_be_kept(write, forty, static_encoder):
    flagged = [dataclasses.replace(r, flags=["refusal"]) for r in forty]
    config = EncodeConfig(
        rationales=str(write(flagged)), encoder=static_encoder, drop_flags="too_long, empty"
    )
    assert len(encode(config, quiet)) == 40
    config = dataclasses.replace(config, drop_flags=None, output=str(write(flagged)) + ".store")
    assert len(encode(config, quiet)) == 40


def test_where_nothing_is_left_there_is_an_error_and_no_folder(write, forty, static_encoder):
    source = write([dataclasses.replace(r, flags=["refusal"]) for r in forty[:3]])
    config = EncodeConfig(rationales=str(source), encoder=static_encoder)
    with pytest.raises(DataError, match=r"nothing to encode: 3 lines, left out: refusal 3"):
        encode(config, quiet)
    source.write_text("")
    with pytest.raises(DataError, match=r"nothing to encode: 0 lines, left out: none"):
        encode(config, quiet)
    assert [path.name for path in source.parent.iterdir()] == [source.name]


@pytest.mark.parametrize(("name", "other"), [("user_id", "9"), ("item_id", "x")])
def test_ids_of_two_types_are_refused(write, forty, static_encoder, name, other):
    forty[20] = dataclasses.replace(forty[20], **{name: other})
    config = EncodeConfig(rationales=str(write(forty)), encoder=static_encoder)
    with pytest.raises(DataError, match=f"{name} {getattr(forty[0], name)} .*'{other}'"):
        encode(config, quiet)


def test_ids_no_table_can_hold_are_refused(write, forty, static_encoder):
    forty[20] = dataclasses.replace(forty[20], item_id=2**70)
    config = EncodeConfig(rationales=str(write(forty)), encoder=static_encoder)
    with pytest.raises(DataError, match="no table can hold"):
        encode(config, quiet)


def test_a_line_that_is_none_is_named(write, forty, static_encoder):
    source = write(forty)
    source.write_text(source.read_text() + '{"user_id": 1')
    with pytest.raises(DataError, match="Line 41"):
        encode(EncodeConfig(rationales=str(source), encoder=static_encoder), quiet)


def test_the_data_are_named_by_the_settings_beside_the_rationales(write, forty, static_encoder):
    source = write(forty)
    source.with_name("config.yaml").write_text("data:\n  name: ml-100k\n")
    config = EncodeConfig(rationales=str(source.parent), encoder=static_encoder)
    assert encode(config, quiet).facts["data"] == "ml-100k"


def test_a_folder_without_rationales_is_refused(tmp_path):
    with pytest.raises(DataError, match="no rationales at"):
        encode(EncodeConfig(rationales=str(tmp_path)), quiet)


# ---- encoders -----------------------------------------------------------------------------------


def test_the_default_encoder_puts_like_reasons_together(write, forty):
    texts = ["They like cartoons for children.", "Animated family films.", "A bloody war drama."]
    three = [dataclasses.replace(r, rationale=t) for r, t in zip(forty, texts, strict=False)]
    made = encode(EncodeConfig(rationales=str(write(three))), quiet)
    assert made.folder.name == "all-minilm-l6-v2"
    likeness = torch.corrcoef(vectors_of(made))
    assert likeness[0, 1] > likeness[0, 2] + 0.1
    expected = sentence_vectors(texts, "all-minilm-l6-v2", CPU, progress=False)
    torch.testing.assert_close(vectors_of(made), expected, rtol=0, atol=1e-3)


def teacher_config(model: str, **changes: Any) -> TeacherConfig:
    return TeacherConfig(model=model, quantization="fp32", **changes)


@pytest.mark.parametrize("batch_tokens", [None, 16])
def test_the_teacher_is_the_mean_of_its_last_layer(write, forty, tiny_teacher, batch_tokens):
    config = EncodeConfig(
        rationales=str(write(forty[:12])), encoder="teacher", dtype="float32",
        teacher=teacher_config(tiny_teacher, batch_tokens=batch_tokens),
    )  # fmt: skip
    made = encode(config, quiet)
    assert made.folder.name == f"teacher-{Path(tiny_teacher).name}"
    assert made.encoder == f"teacher {tiny_teacher} fp32 fp32 base"
    backbone = load_backbone(tiny_teacher, "fp32", CPU)
    for row, rationale in enumerate(forty[:12]):
        ids = backbone.tokenizer(rationale.rationale, add_special_tokens=False).input_ids
        with torch.no_grad():
            states = backbone.decoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(vectors_of(made)[row], states.mean(0), rtol=1e-4, atol=1e-5)


def test_a_text_too_long_for_the_teacher_is_cut(write, forty, tiny_teacher):
    forty[0] = dataclasses.replace(forty[0], rationale="word " * 3000)
    config = EncodeConfig(
        rationales=str(write(forty[:2])), encoder="teacher", teacher=teacher_config(tiny_teacher)
    )
    assert vectors_of(encode(config, quiet)).isfinite().all()


def test_memory_that_does_not_do_for_one_text_is_an_error(write, forty, tiny_teacher, monkeypatch):
    def fail(*_: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr("cotrain.teacher.passes.Passes.mean_states", fail)
    config = EncodeConfig(
        rationales=str(write(forty[:2])), encoder="teacher", teacher=teacher_config(tiny_teacher)
    )
    with pytest.raises(TeacherError, match="no memory to read one rationale"):
        encode(config, quiet)


def stand_in(function: Callable[[list[str]], Tensor], dimension: int = 2) -> Callable[..., Any]:
    return lambda *_: TextEncoder("stand-in", dimension, function)


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (70_000.0, "float16", "set --dtype float32"),
        (torch.nan, "float16", "another encoder"),
        (torch.inf, "float32", "another encoder"),
    ],
)
def test_vectors_that_are_not_finite_are_refused(write, forty, monkeypatch, value, dtype, said):
    def encode_texts(texts: list[str]) -> Tensor:
        vectors = torch.ones(len(texts), 2)
        vectors[6, 1] = value
        return vectors

    monkeypatch.setattr(encoding, "load_encoder", stand_in(encode_texts))
    with pytest.raises(DataError, match=said) as caught:
        encode(EncodeConfig(rationales=str(write(forty)), dtype=dtype), quiet)
    assert f"1 of 40 rationales from row 0 on: user {forty[6].user_id} cut {forty[6].cut}" in str(
        caught.value
    )


# ---- interrupted --------------------------------------------------------------------------------


class Interrupted:
    """Encodes so many chunks, then is stopped; counts the texts that it saw."""

    def __init__(self, chunks: int):
        self.chunks = chunks
        self.seen: list[str] = []

    def __call__(self, texts: list[str]) -> Tensor:
        if not self.chunks:
            raise KeyboardInterrupt
        self.chunks -= 1
        self.seen += texts
        return torch.tensor([[len(text), hash(text) % 1000] for text in texts]).float()


@pytest.mark.parametrize("stops", [[0], [1], [3, 0, 2]])
@pytest.mark.parametrize("torn", [0, 5])
def test_an_interrupted_encoding_goes_on_where_it_stood(write, forty, monkeypatch, stops, torn):
    monkeypatch.setattr(encoding, "CHUNK", 4)
    monkeypatch.setattr("cotrain.rationale.store.ROW_GROUP", 16)
    config = EncodeConfig(rationales=str(write(forty)))
    seen: list[str] = []
    for chunks in stops:
        one = Interrupted(chunks)
        monkeypatch.setattr(encoding, "load_encoder", stand_in(one))
        with pytest.raises(KeyboardInterrupt):
            encode(config, quiet)
        seen += one.seen
        (partial,) = write(forty).parent.glob(".*.partial")
        with (partial / VECTORS).open("ab") as file:
            file.write(torn * b"x")  # what was written after the last note
    last = Interrupted(100)
    monkeypatch.setattr(encoding, "load_encoder", stand_in(last))
    lines: list[str] = []
    made = encode(config, lines.append)
    assert seen + last.seen == [r.rationale for r in forty]  # each of them once
    assert any(f"Going on at row {4 * sum(stops)} of 40" in line for line in lines) == any(stops)
    assert vectors_of(made).equal(Interrupted(1)([r.rationale for r in forty]))
    assert not list(made.folder.parent.glob(".*"))


def test_what_was_begun_is_not_mixed_with_something_else(write, forty, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 4)
    config = EncodeConfig(rationales=str(write(forty)), output=str(write(forty)) + ".store")
    monkeypatch.setattr(encoding, "load_encoder", stand_in(Interrupted(2)))
    with pytest.raises(KeyboardInterrupt):
        encode(config, quiet)
    monkeypatch.setattr(encoding, "load_encoder", stand_in(Interrupted(100)))
    for name, value in {"dtype": "float32", "encoder": "other", "drop_flags": None}.items():
        with pytest.raises(DataError, match=f"begun with something else: {name} was"):
            encode(dataclasses.replace(config, **{name: value}), quiet)
    write(forty[:39])  # generated anew, or gone on with meanwhile
    with pytest.raises(DataError, match="begun with something else: source was"):
        encode(config, quiet)
    write(forty)
    monkeypatch.setattr(encoding, "load_encoder", stand_in(Interrupted(100), dimension=3))
    with pytest.raises(DataError, match="the encoder is another one than then"):
        encode(config, quiet)
    monkeypatch.setattr(encoding, "load_encoder", stand_in(Interrupted(100)))
    # How many texts at once is no part of the result.
    assert len(encode(dataclasses.replace(config, batch_size=1), quiet)) == 40


def test_before_the_first_vector_other_settings_may_follow(write, forty, monkeypatch):
    config = EncodeConfig(rationales=str(write(forty)), output=str(write(forty)) + ".store")
    monkeypatch.setattr(encoding, "load_encoder", stand_in(Interrupted(0)))
    with pytest.raises(KeyboardInterrupt):
        encode(config, quiet)
    write(forty[:30])
    monkeypatch.setattr(encoding, "load_encoder", stand_in(Interrupted(100)))
    assert len(encode(dataclasses.replace(config, dtype="float32"), quiet)) == 30


def test_a_store_is_never_overwritten(write, forty, static_encoder):
    config = EncodeConfig(rationales=str(write(forty)), encoder=static_encoder)
    made = encode(config, quiet)
    before = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    with pytest.raises(DataError, match="is there already and is not touched"):
        encode(dataclasses.replace(config, dtype="float32"), quiet)
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == before


_KILLED = """
import sys
from cotrain.config import EncodeConfig
from cotrain.rationale import encode
encode.CHUNK = 4
encode.encode(EncodeConfig(rationales=sys.argv[1], encoder=sys.argv[2]))
"""


def test_a_killed_process_loses_at_most_a_chunk(write, small_data, make_rationale, static_encoder):
    ends = small_data.held_out.train_end - small_data.offsets[:-1]
    many = [
        make_rationale(small_data, user, cut, f"Reason {cut} of {user}")
        for user in range(20)
        for cut in range(1, int(ends[user]))
    ]
    source = write(many)
    config = EncodeConfig(rationales=str(source), encoder=static_encoder)
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(source), static_encoder])
    state = source.parent / ".encoder.partial" / "state.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if state.is_file() and json.loads(state.read_text())["done"] >= 40:
            break
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = json.loads(state.read_text())["done"]
    assert 40 <= done < len(many)
    lines: list[str] = []
    made = encode(config, lines.append)
    assert f"Going on at row {done}" in lines[1]
    assert made.texts(np.arange(len(many))) == many
    expected = sentence_vectors([r.rationale for r in many], static_encoder, CPU, progress=False)
    torch.testing.assert_close(vectors_of(made), expected, rtol=1e-3, atol=1e-3)


# ---- the script ---------------------------------------------------------------------------------


def test_the_script_encodes_what_the_command_line_names(write, forty, static_encoder, capsys):
    source = write(forty, "mine.jsonl")
    argv = ["--rationales", str(source), "--encoder", static_encoder, "--dtype=float32"]
    assert encode_rationales.main(argv) == 0
    folder = source.parent / "mine-encoder"
    assert f"Store: {folder}, 40 vectors of 16" in capsys.readouterr().out
    assert pl.read_parquet(folder / ROWS)["row"].to_list() == list(range(40))


def test_the_script_asks_for_rationales():
    with pytest.raises(ConfigError, match="rationales is not set"):
        encode_rationales.main([])
