"""Runs on few users with a tiny teacher."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from cotrain.config import parse
from cotrain.distill.loop import Interrupted, Pace, Run, fit
from cotrain.distill.outcome import finish
from cotrain.distill.run import prepare
from cotrain.distill.state import CotrainState
from cotrain.runtime import tracking


@pytest.fixture
def prepared(
    tmp_path: Path,
    tiny_teacher: str,
    small_tables: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., tuple[CotrainState, Run]]]:
    """A run on 60 users with a tiny teacher, not started; options override settings."""
    threads = torch.get_num_threads()
    # With models this small a second thread costs more than it does.
    monkeypatch.setattr(tracking, "use_all_cores", lambda processes: torch.set_num_threads(1))

    def build(*options: str) -> tuple[CotrainState, Run]:
        interactions, items = small_tables
        return prepare(
            parse(
                [
                    "--data.interactions", str(interactions), "--data.items", str(items),
                    "--teacher.model", tiny_teacher, "--teacher.quantization", "fp32",
                    "--teacher.num_candidates", "5", "--student.hidden_size", "16",
                    "--student.max_length", "20", "--train.epochs", "3",
                    "--train.warmup_epochs", "1", "--train.batch_size", "16",
                    "--query.fraction", "0.5", "--distill.confidence", "none",
                    "--distill.audit", "off",
                    "--teacher.calibration_rows", "8", "--teacher.compile", "off",
                    "--output_dir", str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"),
                    *options,
                ]
            )
        )  # fmt: skip

    yield build
    torch.set_num_threads(threads)


@pytest.fixture
def fit_until(monkeypatch: pytest.MonkeyPatch) -> Callable[[CotrainState, Run, int], None]:
    """Trains, and stops a run as Ctrl-C does, behind a step."""

    def stopped(state: CotrainState, run: Run, step: int) -> None:
        tick = Pace.tick

        def interrupting(pace: Pace, report: dict[str, float]) -> None:
            tick(pace, report)
            if pace.state.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patched:
            patched.setattr(Pace, "tick", interrupting)
            with pytest.raises(Interrupted):
                fit(state, run)

    return stopped


@pytest.fixture(scope="session")
def results() -> Callable[[CotrainState, Run], dict[str, Any]]:
    """All that a finished run found out, without its times."""
    kept = ("student", "control", "lift", "shipped", "effective_rank", "slices", "examples")
    counts = ("rows_asked", "rows_valid", "before_calibration")

    def found(state: CotrainState, run: Run) -> dict[str, Any]:
        report = finish(state, run)
        rows = [{k: v for k, v in row.items() if "_per_s" not in k} for row in run.log.rows()]
        teacher = report["teacher"]
        asked = None if teacher is None else [teacher[key] for key in counts]
        return {key: report[key] for key in kept} | {"rows": rows, "counts": asked}

    return found


@pytest.fixture(scope="session")
def writing_teacher(
    tiny_teacher: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Folder of a tiny teacher that writes `X] > [Y] > …`: what kind of token comes next follows
    from the last one, which letter from all that it read."""
    folder = tmp_path_factory.mktemp("writing-teacher")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    kinds = [
        [
            tokenizer.encode(f"Ranking: [{letter}", add_special_tokens=False)[-1]
            for letter in "ABCDE"
        ],
        [tokenizer.encode("[A]", add_special_tokens=False)[-1]],
        [tokenizer.encode("] >", add_special_tokens=False)[-1]],
        [tokenizer.encode("> [", add_special_tokens=False)[-1]],
    ]
    before = [kinds[-1], *kinds[:-1]]
    axes = torch.eye(model.config.hidden_size)
    with torch.no_grad():
        for axis, tokens, earlier in zip(axes, kinds, before, strict=False):
            model.model.embed_tokens.weight[earlier] += 5 * axis
            model.lm_head.weight[tokens] += 4 * axis
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
