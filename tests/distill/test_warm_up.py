"""A warm-up that another run takes over is the one it would have had by itself."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cotrain.config import parse
from cotrain.distill.loop import Run, fit
from cotrain.distill.outcome import finish
from cotrain.distill.run import prepare
from cotrain.distill.state import CotrainState
from cotrain.distill.warm_up import FOLDER, decides
from cotrain.errors import CheckpointError, ConfigError
from cotrain.runtime import checkpoint

Prepare = Callable[..., tuple[CotrainState, Run]]
ALONE = ("--teacher.model", "none", "--train.keep_warm_up", "true")


def rows(run: Run) -> list[dict]:
    found = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "_per_s" not in k} for row in found]


def test_a_run_goes_on_from_the_warm_up_of_another_as_from_its_own(prepared: Prepare):
    first, source = prepared(*ALONE)
    fit(first, source)
    assert checkpoint.steps(source.folder / FOLDER) == [4]
    whole, own = prepared()
    fit(whole, own)
    state, run = prepared("--train.warm_start", str(source.folder))
    assert (state.epoch, state.step, state.control, state.started) == (1, 4, None, False)
    assert len(rows(run)) == 4 + 2  # steps, a validation and what goes with it
    fit(state, run)
    assert rows(run) == rows(own)
    for one, other in zip(state.learners, whole.learners, strict=True):
        assert one.best_metric == other.best_metric
        for name, weight in one.bare.state_dict().items():
            assert weight.equal(other.bare.state_dict()[name]), name
    assert state.projector is not None
    assert whole.projector is not None
    for weight, other in zip(
        state.projector.parameters(), whole.projector.parameters(), strict=True
    ):
        assert torch.equal(weight, other)
    reports = [finish(*each) for each in ((state, run), (whole, own))]
    for part in ("student", "control", "lift", "slices", "shipped"):
        assert reports[0][part] == reports[1][part]


def test_a_run_that_took_over_is_resumed_from_its_own_checkpoints(prepared: Prepare):
    first, source = prepared(*ALONE)
    fit(first, source)
    taking_over = ("--train.warm_start", str(source.folder))
    whole, own = prepared(*taking_over)
    fit(whole, own)
    state, run = prepared(*taking_over, "--train.checkpoint_every_steps", "3")
    fit(state, run, until_epoch=2)
    assert checkpoint.steps(run.folder) == [6]
    again, resumed = prepare(run.config, resume=True)
    assert again.step == 6
    fit(again, resumed)
    assert rows(resumed) == rows(own)
    for name, weight in again.student.bare.state_dict().items():
        assert weight.equal(whole.student.bare.state_dict()[name]), name


def test_the_end_of_the_warm_up_is_kept_and_no_other_step(prepared: Prepare):
    state, run = prepared("--train.keep_warm_up", "true", "--train.warmup_epochs", "2",
                          "--train.checkpoint_every_steps", "1")  # fmt: skip
    fit(state, run)
    assert checkpoint.steps(run.folder / FOLDER) == [8]
    without, other = prepared()
    fit(without, other)
    assert not (other.folder / FOLDER).exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seed", "1"), r"seed: 0 there, 1 here"),
        (("--student.hidden_size", "32"), r"student\.hidden_size: 16 there, 32 here"),
        (("--train.warmup_epochs", "2"), r"train\.warmup_epochs: 1 there, 2 here"),
        (("--distill.rationales", "some/store"), r"distill\.rationales: None there"),
        (("--student.item_text", "teacher"), r"student\.item_text: None there"),
    ],
)
def test_a_warm_up_of_other_settings_is_refused(
    prepared: Prepare, options: tuple[str, ...], words: str
):
    state, run = prepared(*ALONE, "--train.max_steps", "5")
    fit(state, run)
    with pytest.raises(ConfigError, match=words):
        prepared("--train.warm_start", str(run.folder), "--train.max_steps", "5", *options)


def test_where_no_warm_up_was_kept_there_is_none_to_take_over(prepared: Prepare, tmp_path: Path):
    with pytest.raises(ConfigError, match="keeps no warm-up"):
        prepared("--train.warm_start", str(tmp_path / "nowhere"))
    state, run = prepared(*ALONE)
    with pytest.raises(ConfigError, match="keeps no warm-up"):  # it has not come to its end
        prepared("--train.warm_start", str(run.folder))
    fit(state, run)
    (run.folder / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="has 0 bytes, and had"):
        prepared("--train.warm_start", str(run.folder))


def test_what_comes_after_a_warm_up_does_not_decide_about_it():
    plain = decides(parse([]))
    for later in (
        ("--teacher.model", "none"), ("--distill.lambda_rank", "3"), ("--query.fraction", "1"),
        ("--train.control", "false"), ("--train.keep_warm_up", "true"),
        ("--tracking.with", "none"), ("--output_dir", "somewhere"),
    ):  # fmt: skip
        assert decides(parse(list(later))) == plain
    # The learning rate follows a schedule over all epochs, and the teacher's states start items.
    for other in (("--train.epochs", "50"), ("--student.item_text", "teacher")):
        assert decides(parse(list(other))) != plain
    texts = ["--student.item_text", "teacher"]
    assert decides(parse(texts)) != decides(parse([*texts, "--teacher.quantization", "fp32"]))
