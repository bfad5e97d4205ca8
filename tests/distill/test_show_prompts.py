"""`--show_prompts`: the run's own prompts, printed without a teacher."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from cotrain import config as configuration
from cotrain.data.batches import SequenceDataset
from cotrain.data.interactions import load_interactions
from cotrain.errors import ConfigError, TeacherError

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "train_online.py"
specification = importlib.util.spec_from_file_location("train_online", SCRIPT)
assert specification is not None
assert specification.loader is not None
train_online = importlib.util.module_from_spec(specification)
specification.loader.exec_module(train_online)


@pytest.fixture(scope="module")
def weightless(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher whose weights cannot be read."""
    folder = tmp_path_factory.mktemp("weightless") / "teacher"
    shutil.copytree(tiny_teacher, folder)
    (folder / "model.safetensors").write_bytes(b"")
    return str(folder)


@pytest.fixture
def show(weightless: str, small_tables: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    """What is printed under these settings, and the settings."""

    def shown(count: Any, **changes: Any) -> tuple[str, configuration.Config]:
        options = {
            "data.interactions": small_tables[0], "data.items": small_tables[1],
            "teacher.model": weightless, "teacher.num_candidates": 5, "train.batch_size": 16,
            "train.epochs": 3, "train.warmup_epochs": 1, "query.fraction": 0.5,
            "teacher.template": "default",
            **{name.replace("__", "."): value for name, value in changes.items()},
        }  # fmt: skip
        argv = [f"--{name}={value}" for name, value in options.items()]
        assert train_online.main([*argv[:3], "--show_prompts", str(count), *argv[3:]]) == 0
        return capsys.readouterr().out, configuration.parse(argv, train_online.QUICKSTART)

    return shown


def prompts_in(printed: str) -> list[str]:
    return printed.split("\n──── Prompt ")[1:]


def test_histories_of_the_run_and_popular_candidates(show, weightless):
    printed, config = show(3)
    assert "No student is trained yet: the candidates are the most popular items" in printed
    data = load_interactions(config.data)
    dataset = SequenceDataset(data, config.student.max_length, config.seed, config.train.windows)
    tokenizer = AutoTokenizer.from_pretrained(weightless)
    prompts = prompts_in(printed)
    assert len(prompts) == 3
    heads = set()
    for prompt in prompts:
        heading, _, text = prompt.partition(" ────\n")
        text = text.rstrip("\n")
        user = data.user_ids.index(int(heading.split("user ")[1].split(",")[0]))
        history = dataset[user, config.train.warmup_epochs]["history"]
        assert isinstance(history, np.ndarray)
        assert f"{len(history)} items before the cut" in heading
        titles = [line[2:] for line in text.splitlines() if line.startswith("- ")]
        assert titles == [data.catalog.titles[item] for item in history[-10:]]
        candidates = [line[4:].split(" | ")[0] for line in text.splitlines() if line[:1] == "["]
        popular = [item for item in np.argsort(-data.train_counts, kind="stable") if item]
        unseen = [item for item in popular if item not in history][:5]
        assert sorted(data.catalog.titles[item] for item in unseen) == sorted(
            line.removesuffix("<|im_end|>") for line in candidates
        )
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert f" {len(tokens)} tokens" in heading
        shared = int(heading.split("the first ")[1].split()[0])
        heads.add(tuple(tokens[:shared]))
    assert len(heads) == 1
    assert show(3)[0] == printed
    assert show(3, seed=1)[0] != printed


def test_what_follows_a_prompt_is_told(show):
    printed, _ = show(1, teacher__mode="cot", teacher__reasoning_tokens=33)
    assert "This user\n──── up to 33 tokens of reasoning, then 5 tokens ────\nRanking: [" in printed
    printed, _ = show(1, teacher__mode="generate")
    assert "Ranking: [\n──── up to 19 tokens of ranking ────" in printed


def test_the_first_window_is_shown(show):
    printed, _ = show(
        1, teacher__num_candidates=30, teacher__window=4, teacher__identifiers="numbers"
    )
    assert "30 candidates are ranked 4 at a time" in printed
    lines = prompts_in(printed)[0].splitlines()
    assert [line[:3] for line in lines if line[:1] == "["] == ["[1]", "[2]", "[3]", "[4]"]


def test_no_more_rows_than_ask(show):
    printed, _ = show(99)
    assert len(prompts_in(printed)) == 30
    assert printed.endswith("Only 30 rows ask the teacher in an epoch; see query.fraction.\n")


def test_only_one_process_prints(show, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    assert show(1)[0] == ""


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5", ""])
def test_a_count_that_is_none_is_refused(show, count):
    with pytest.raises(ConfigError, match=r"--show_prompts is .*expected how many"):
        show(count)
    with pytest.raises(ConfigError, match=r"--show_prompts is .*expected how many"):
        train_online.main([f"--show_prompts={count}"])
    with pytest.raises(ConfigError, match=r"--show_prompts is ''"):
        train_online.main(["--show_prompts"])


def test_settings_are_checked_as_for_a_run(show, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"teacher\.model is none"):
        show(1, teacher__model="none")
    with pytest.raises(ConfigError, match="'default', 'movies', 'products'"):
        show(1, teacher__template="nonesuch")
    with pytest.raises(ConfigError, match="has only"):
        show(1, teacher__num_candidates=26, data__items="none", data__interactions=few(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(TeacherError, match=r"tokenizer of teacher\.model"):
        show(1, teacher__model=tmp_path)


def few(folder: Path) -> Path:
    rows = [f"{user},{item},{item}" for user in range(3) for item in range(5)]
    (folder / "few.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    return folder / "few.csv"
