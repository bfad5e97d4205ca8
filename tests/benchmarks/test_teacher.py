"""The engine beside the plain loop: arithmetic, tables, and both sides on a tiny model."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cotrain.benchmarks import processes, teacher, teacher_worker
from cotrain.benchmarks import teacher_tables as tables
from cotrain.benchmarks.settings import SHAPE_7B, TeacherSettings
from cotrain.benchmarks.teacher import ENGINE, PLAIN, Bench, Measured, Point
from cotrain.benchmarks.teacher_rows import make_rows
from cotrain.benchmarks.teacher_shape import VOCABULARY, RandomPrompts, config_7b, random_model
from cotrain.config import TeacherConfig

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def numbers(seconds: float, rows: int = 8) -> dict[str, Any]:
    return {
        "rows": rows, "seconds": seconds, "cpu_seconds": 2 * seconds, "device": "cpu",
        "prompt_tokens": 100 * rows, "peak_mb": 1000.0, "compute": "fp32", "compiled": False,
    }  # fmt: skip


# ---- arithmetic ---------------------------------------------------------------------------------


def test_rank_correlation_by_hand():
    values = np.array([[1.0, 2, 3], [1, 2, 3], [1, 2, 3], [1, 1, 2]])
    others = np.array([[10.0, 20, 30], [3, 2, 1], [1, 3, 2], [1, 1, 9]])
    np.testing.assert_allclose(teacher.spearman(values, others), [1, -1, 0.5, 1])


def test_what_every_row_gives_an_identifier_does_not_make_rankings_alike():
    random = np.random.default_rng(0)
    bias = 100 * np.arange(20)
    ours, theirs = random.random((64, 20)), random.random((64, 20))
    states = np.ones((64, 4))
    found = teacher.nearness(
        Measured([numbers(2.0)], 1.1 * states, ours + bias),
        Measured([numbers(4.0)], states, theirs + bias),
    )
    assert found["spearman"] == pytest.approx(1)
    assert abs(found["spearman_calibrated"]) < 0.1
    assert found["gap"] == pytest.approx(0.1)
    assert found["rows_per_s"] == 4


def test_ratios_are_of_median_times_with_that_of_each_repeat():
    ours = Measured([numbers(2.0), numbers(1.0), numbers(3.0)], np.ones((2, 3)))
    theirs = Measured([numbers(4.0), numbers(8.0), numbers(3.0)], np.ones((2, 3)))
    found = teacher.summarise(ours, theirs)
    assert found["ratio"] == 2
    assert found["ratios"] == [2, 8, 1]
    assert found["largest_gap"] == 0
    text = tables.summary(
        {"rows": 8, "quantization": "nf4", "repeats": {ENGINE: ours.repeats}, **found}, 3
    )
    assert "2.00 × as fast, from 1.00 to 8.00 over 3 repeats" in text


def test_the_fastest_exact_setting_is_held_against_the_faster_plain_loop():
    def line(side: str, quantization: str, rate: float, spearman: float) -> dict[str, Any]:
        return {
            "side": side, "quantization": quantization, "compile": "off", "error": None,
            "repeats": [numbers(8 / rate)], "rows_per_s": rate, "spearman": 1.0,
            "spearman_calibrated": spearman, "gap": 0.01,
        }  # fmt: skip

    lines = [
        line(PLAIN, "fp32", 2, 1), line(PLAIN, "nf4", 1, 0.9), line(PLAIN, "nf4", 4, 0.9),
        line(ENGINE, "fp32", 5, 1), line(ENGINE, "bf16", 8, 0.98), line(ENGINE, "nf4", 9, 0.97),
        {"side": ENGINE, "quantization": "int8", "compute": "auto", "compile": "on",
         "repeats": [], "error": "failed with exit code 1"},
    ]  # fmt: skip
    best = teacher.fastest(lines)
    assert best is not None
    assert best["quantization"] == "bf16"
    assert best["ratios"] == {"nf4": 2, "fp32": 4}
    text = tables.exactness_table(lines, best)
    assert "bf16, products in fp32, 8.00 rows/s; 2.00 × generate in nf4, 4.00 ×" in text
    assert "failed with exit code 1" in text
    assert teacher.fastest(lines[:3]) is None


# ---- the driver ---------------------------------------------------------------------------------


def test_a_plain_batch_that_does_not_fit_is_halved_for_good(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tried = []

    def run_worker(command: list[str], job: dict[str, Any], threads: int) -> dict[str, Any]:
        tried.append(job["batch_rows"])
        if job["batch_rows"] > 6:
            raise processes.WorkerFailed("it", -9)
        if job["batch_rows"] > 3:
            return {"out_of_memory": True}
        np.savez(job["arrays"], states=np.ones((8, 2)), logits=np.ones((8, 3)))
        return numbers(1.0)

    monkeypatch.setattr(processes, "run_worker", run_worker)
    bench, measured = Bench({}, threads=1), Measured()
    for _ in range(2):
        bench.measure(Point(PLAIN, 12, "nf4"), measured)
    assert tried == [12, 6, 3, 3]
    assert measured.logits.shape == (8, 3)
    assert "batches of 3 from now on" in capsys.readouterr().out
    with pytest.raises(processes.WorkerFailed):  # the engine halves by itself
        bench.measure(Point(ENGINE, 8, "nf4"), measured)


# ---- both sides ---------------------------------------------------------------------------------


def job_of(model: str, rows: int = 5, **others: Any) -> dict[str, Any]:
    job = dataclasses.asdict(TeacherSettings(model=model, num_candidates=5, history_length=3))
    return job | {"rows": rows, "batch_rows": 3, "quantization": "fp32", **others}


def settings_of(job: dict[str, Any]) -> TeacherConfig:
    names = ("model", "quantization", "compute", "num_candidates", "history_length")
    return TeacherConfig(compile="off", **{name: job[name] for name in names})


def test_both_sides_compute_the_same(tiny_teacher: str):
    job = job_of(tiny_teacher)
    settings = settings_of(job)
    rows = make_rows(job, settings)
    ours = teacher_worker.engine(job, settings, rows, CPU)
    theirs = teacher_worker.plain(job, settings, rows, CPU)
    torch.testing.assert_close(ours.states, theirs.states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    assert ours.states.shape == (5, 32)
    assert ours.logits.shape == (5, 5)
    lengths = [len(prompt) for prompt in rows.tokens()]
    # Two batches, padded to their longest, and nine tokens more of every row.
    assert theirs.numbers["computed_tokens"] == (
        3 * (max(lengths[:3]) + 9) + 2 * (max(lengths[3:]) + 9)
    )
    assert ours.numbers["computed_tokens"] <= 5 * max(lengths)
    assert ours.numbers["failed"] == 0
    for side in (ours, theirs):
        assert side.numbers["seconds"] > 0
        assert side.numbers["peak_mb"] > 0
        assert side.numbers["compute"] == "fp32"


def test_rows_are_the_same_in_every_process_and_show_nothing_seen(tiny_teacher: str):
    job = job_of(tiny_teacher)
    one, other = (make_rows(job, settings_of(job)) for _ in range(2))
    assert one.tokens() == other.tokens()
    assert make_rows(job | {"seed": 1}, settings_of(job)).tokens() != one.tokens()
    for history, candidates in zip(one.histories, one.candidates, strict=True):
        assert len(set(candidates)) == 5
        assert not {0, *history} & {*candidates}


def tiny_shape(num_layers: int = 2) -> LlamaConfig:
    config = config_7b(num_layers)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    return config


def test_a_model_of_the_shape_alone_is_measured_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teacher_worker, "config_7b", tiny_shape)
    job = job_of(SHAPE_7B, rows=3, quantization="nf4")
    settings = settings_of(job)
    rows = make_rows(job, settings)
    ours = teacher_worker.engine(job, settings, rows, CPU)
    theirs = teacher_worker.plain(job, settings, rows, CPU)
    assert teacher.relative_gaps(ours.states.numpy(), theirs.states.numpy()).max() < 0.05
    assert theirs.numbers["failed"] == 0


@pytest.mark.gpu
def test_a_gpu_is_measured_with_its_own_matrix_products(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teacher_worker, "config_7b", lambda: config_7b(num_layers=2))
    job = job_of(SHAPE_7B, rows=4, quantization="nf4")
    settings = settings_of(job)
    rows, gpu = make_rows(job, settings), torch.device("cuda")
    ours = teacher_worker.engine(job, settings, rows, gpu)
    theirs = teacher_worker.plain(job, settings, rows, gpu)
    assert teacher.relative_gaps(ours.states.numpy(), theirs.states.numpy()).max() < 0.05
    share = ours.numbers["products_flops_per_s"] / ours.numbers["matmul_flops_per_s"]
    assert 0 < share < 1


def test_random_weights_follow_their_seed_and_are_packed():
    ids = torch.arange(4)[None]
    models: list[Any] = [random_model(tiny_shape(), "nf4", CPU, seed) for seed in (0, 0, 1)]
    same, again, other = (model(input_ids=ids).logits.float() for model in models)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    weight = models[0].model.layers[1].mlp.up_proj.weight
    assert (weight.dtype, weight.numel()) == (torch.uint8, 64 * 128 // 2)
    assert sum(p.numel() for p in config_layers(config_7b())) == 6_979_321_856


def config_layers(config: LlamaConfig) -> list[torch.Tensor]:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return [weight for weight in model.model.layers.parameters() if weight.dim() == 2]


def test_random_prompts_share_a_beginning_and_have_the_lengths_asked_for():
    prompts = RandomPrompts(200, 20, seed=0, vocabulary=VOCABULARY)
    built = [prompts.build([row], []) for row in range(200)]
    assert {tuple(prompt[:100]) for prompt in built} == {tuple(prompts.prefix)}
    lengths = [len(prompt) for prompt in built]
    assert 350 <= min(lengths) < 360
    assert 490 < max(lengths) <= 500
    assert max(map(max, built)) < VOCABULARY


def test_weights_that_multiply_are_those_of_linear_layers_packed_or_not():
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    for quantization in ("nf4", "bf16"):
        model = random_model(tiny_shape(), quantization, CPU, 0)
        assert teacher_worker.multiplying_weights(model.get_decoder()) == 2 * layer
    assert teacher_worker.matmul_rate(CPU, (16, 16, 16), repeats=2) > 0


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_prints_its_tables(tiny_teacher: str, tmp_path: Path):
    out = tmp_path / "result.json"
    command = [
        sys.executable, str(ROOT / "scripts" / "benchmark.py"), "teacher", "--model", tiny_teacher,
        "--rows", "4", "--quantization", "fp32", "--repeats", "1", "--threads", "1",
        "--num-candidates", "5", "--json", str(out),
    ]  # fmt: skip
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "× as fast" in text
    (found,) = json.loads(out.read_text())["comparison"]
    assert found["largest_gap"] < 1e-4
    ours, theirs = (found["repeats"][side][0] for side in (ENGINE, PLAIN))
    for key in ("prompts", "prompt_tokens", "threads", "compute"):
        assert ours[key] == theirs[key], key
