"""The scripts that train and measure a teacher: mistakes are told before anything is loaded."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from cotrain.config import EvaluateConfig, FinetuneConfig, parse_as, to_dict
from cotrain.errors import ConfigError
from cotrain.finetune import evaluate as evaluation
from cotrain.finetune import methods, run

SCRIPTS = Path(__file__).parents[2] / "scripts"
RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))
STUDENT = ["--examples.student", "x"]
# Calls a script's main with each of some arguments, and says what came of it and what it imported.
WATCHED = """
import contextlib, io, json, runpy, sys
main, found = runpy.run_path(sys.argv[1])["main"], []
for words in json.loads(sys.argv[2]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            end = main(words)
        except SystemExit as error:
            end = error.code
        except Exception as error:
            end = f"{type(error).__name__}: {error}"
    found.append([end, text.getvalue()])
heavy = sorted({"torch", "transformers", "peft", "accelerate", "polars"} & set(sys.modules))
print(json.dumps([found, heavy]))
"""


def calls(script: str, *argvs: list[str]) -> tuple[list[list[Any]], list[str]]:
    words = [sys.executable, "-c", WATCHED, str(SCRIPTS / script), json.dumps(argvs)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


def module_of(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something was loaded")

    for module in (run, evaluation):
        for name in ("load_interactions", "load_backbone", "load_tokenizer", "open_student"):
            monkeypatch.setattr(module, name, refuse)


def test_help_and_mistakes_do_not_wait_for_the_libraries():
    names = "rank-sft, cot-sft, star, process-reward, rl, bigrec"
    asked = (
        ["--help"], ["-h"], ["rank-sft", "--help"], [], ["sft"], ["--examples.student", "x"],
        ["rl", *STUDENT, "--lora.rnak", "3"], ["star"],
    )  # fmt: skip

    found, heavy = calls("train_teacher.py", *asked)

    assert heavy == []
    (whole, text), (_, short), (of_method, explained), *mistakes = found
    assert (whole, of_method) == (0, 0)
    assert text == short
    assert all(f"\n    {name} " in text for name in names.split(", "))
    # With the defaults that hold where no file is named.
    assert "--lora.last_layers" in explained
    assert "smollm2-135m-instruct" in explained
    ends = [end for end, _ in mistakes]
    assert ends[0] == f"ConfigError: No METHOD given; expected one of {names}."
    assert ends[1] == f"ConfigError: METHOD is 'sft'; expected one of {names}."
    assert ends[2] == f"ConfigError: METHOD is '--examples.student'; expected one of {names}."
    assert "'lora.rnak'; the nearest known one is 'lora.rank'" in ends[3]
    assert "examples.candidates is student, but examples.student is none" in ends[4]


def test_the_evaluation_says_what_it_measures():
    found, heavy = calls(
        "evaluate.py", ["--help"], ["teacher", "--help"], [], ["student"],
        ["teacher", *STUDENT, "--measure.rows", "0"],
    )  # fmt: skip

    assert heavy == []
    (whole, text), (of_teacher, explained), *mistakes = found
    assert (whole, of_teacher) == (0, 0)
    assert "evaluate.py teacher --examples.student RUN" in text
    assert "--measure.against" in explained
    ends = [end for end, _ in mistakes]
    assert ends[0] == "ConfigError: Nothing named to measure; expected teacher."
    assert ends[1] == "ConfigError: What to measure is 'student'; expected teacher."
    assert "measure.rows is 0; expected ≥ 1" in ends[2]


def test_every_method_that_the_script_names_is_there():
    script = module_of("train_teacher")
    assert set(script.METHODS) == set(methods.METHODS)
    assert set(methods.METHODS) == {
        line.split()[0] for line in str(script.__doc__).split("\n\n")[2].splitlines()
    }


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["cot-sft"], r"cot\.rationales is none; name the file or folder"),
        (["rl"], r"rl\.process_weight is 0\.5, but rl\.process_reward is none"),
    ],
)
def test_what_one_method_needs_is_asked_for_at_once(
    argv: list[str], match: str, nothing_is_loaded: None
):
    with pytest.raises(ConfigError, match=match):
        module_of("train_teacher").main([*argv, *STUDENT])


@pytest.mark.parametrize(
    "argv", [["rl", "--rl.process_weight", "0"], ["cot-sft", "--cot.rationales", "x"], ["star"]]
)
def test_what_it_does_not_need_is_not_asked_for(
    argv: list[str], nothing_is_loaded: None, tmp_path: Path
):
    with pytest.raises(AssertionError, match="something was loaded"):
        module_of("train_teacher").main([*argv, *STUDENT, "--output", str(tmp_path / "new")])


def test_the_mode_is_the_methods(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(run, "run", lambda method, work, mode, *_: asked.append((method, mode)))
    script = module_of("train_teacher")
    for method in ("rank-sft", "star", "process-reward", "bigrec"):
        assert script.main([method, *STUDENT]) == 0
    script.main(["bigrec", *STUDENT, "--bigrec.task", "yes_no"])
    assert asked == [
        ("rank-sft", "direct"), ("star", "cot"), ("process-reward", "cot"), ("bigrec", "bigrec"),
        ("bigrec", "pointwise"),
    ]  # fmt: skip


def test_an_interruption_has_a_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*_: Any) -> None:
        raise run_interrupted("Stopped at step 3. The same command goes on.")

    from cotrain.finetune.tuning import Interrupted as run_interrupted

    monkeypatch.setattr(methods, "train", interrupted)
    assert module_of("train_teacher").main(["star", *STUDENT]) == 130
    assert "The same command goes on." in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", [FinetuneConfig, EvaluateConfig])
def test_every_recipe_serves_the_teachers_scripts_too(path: Path, kind: type[Any]):
    content = yaml.safe_load(path.read_text("utf-8"))
    named = [] if content["teacher"]["model"] else ["--teacher.model", "named"]
    if named:
        with pytest.raises(ConfigError) as caught:
            parse_as(kind, STUDENT, path)
        (mistake,) = str(caught.value).splitlines()[1:]
        assert mistake == "  - teacher.model is none; name the language model."
    config: Any = parse_as(kind, [*STUDENT, *named], path)
    assert config.examples.student == "x"
    found = to_dict(config)
    for section in content.keys() & found.keys():
        expected = content[section]
        if named and section == "teacher":
            expected["model"] = "named"
        assert {name: found[section][name] for name in expected} == expected
