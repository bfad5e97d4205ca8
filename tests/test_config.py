"""Settings: what wins, what is refused, and that every mistake is told in one message."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotrain.config import (
    Config,
    DataConfig,
    EvalConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    leaves,
    parse,
    save,
    to_dict,
)
from cotrain.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[1] / "scripts" / "recipes").glob("*.yaml"))


def write(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def value_of(config: Config, name: str):
    value = config
    for part in name.split("."):
        # `with` is a word of Python, and so the field has another name.
        value = getattr(value, part if hasattr(value, part) else f"{part}_")
    return value


def mistakes(*argv: str) -> list[str]:
    """The lines of the ConfigError that these arguments lead to, without its heading."""
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"The configuration has {len(lines)} mistake(s):"
    return [line.removeprefix("  - ") for line in lines]


# ---- what wins ----------------------------------------------------------------------------------


def test_defaults_then_yaml_then_command_line(tmp_path):
    file = write(tmp_path, "seed: 3\ntrain:\n  epochs: 50\n  batch_size: 8\n")
    assert parse([]) == Config()
    config = parse(["--config", file, "--train.batch_size=16", "--teacher.item_noun", "book"])
    assert config == Config(
        seed=3,
        train=TrainConfig(epochs=50, batch_size=16),
        teacher=TeacherConfig(item_noun="book"),
    )
    assert parse(["--teacher.item_noun", "book", "--train.batch_size", "16", f"--config={file}"]) \
        == config  # fmt: skip


def test_file_of_the_command_line_replaces_the_default_file(tmp_path):
    default = tmp_path / "default.yaml"
    default.write_text("seed: 1\ntrain:\n  batch_size: 8\n")
    file = write(tmp_path, "seed: 2\n")
    assert parse([], default).train.batch_size == 8
    assert parse(["--config", file], default) == Config(seed=2)


def test_last_of_two_equal_options_wins():
    assert parse(["--seed", "1", "--seed", "2"]).seed == 2


def test_dotted_names_and_empty_sections_in_yaml(tmp_path):
    file = write(tmp_path, "train.epochs: 50\ndata:\nteacher:\n  # item_noun: book\n")
    assert parse(["--config", file]) == Config(train=TrainConfig(epochs=50))
    assert parse(["--config", write(tmp_path, "# nothing\n")]) == Config()


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("teacher.quantisation", "teacher.quantization"),
        ("train.learning_rates", "train.learning_rate"),
        ("epochs", "train.epochs"),  # the section is missing
        ("student.max_steps", "train.max_steps"),  # the wrong section
        ("sed", "seed"),
    ],
)
def test_unknown_names_lead_to_the_nearest(tmp_path, wrong, near):
    expected = f"unknown setting {wrong!r}; the nearest known one is {near!r}."
    assert mistakes(f"--{wrong}", "3") == [f"command line: {expected}"]
    file = write(tmp_path, f"{wrong}: 3\n")
    assert mistakes("--config", file) == [f"{file}: {expected}"]
    section, _, name = wrong.rpartition(".")
    if section:
        file = write(tmp_path, f"{section}:\n  {name}: 3\n")
        assert mistakes("--config", file) == [f"{file}: {expected}"]


def test_unknown_name_without_a_near_one_leads_to_help(tmp_path):
    assert mistakes("--xyzzy", "3") == [
        "command line: unknown setting 'xyzzy'; see --help for the known ones."
    ]
    file = write(tmp_path, "1: 2\n")
    assert mistakes("--config", file)[0].startswith(f"{file}: unknown setting '1'")


def test_a_section_is_no_setting(tmp_path):
    file = write(tmp_path, "train: 3\n")
    assert "unknown setting 'train'" in mistakes("--config", file)[0]
    file = write(tmp_path, "seed:\n  train: 3\n")
    assert "unknown setting 'seed.train'" in mistakes("--config", file)[0]


def test_words_that_are_no_option_and_options_without_a_value():
    assert mistakes("epochs=3", "-x", "--train.epochs", "--seed") == [
        "'epochs=3' on the command line is not an option; expected --name value.",
        "'-x' on the command line is not an option; expected --name value.",
        "--train.epochs has no value; expected --train.epochs VALUE.",
        "--seed has no value; expected --seed VALUE.",
    ]


# ---- types and ranges ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("train.epochs", "2.5", "a whole number"),
        ("train.epochs", "abc", "a whole number"),
        ("train.epochs", "true", "a whole number"),
        ("train.epochs", "", "a whole number"),
        ("train.epochs", "1e2", "a whole number"),
        ("train.epochs", "none", "a whole number"),
        ("train.max_steps", "1.5", "a whole number or none"),
        ("train.learning_rate", "fast", "a number"),
        ("train.learning_rate", "true", "a number"),
        ("train.control", "perhaps", "true or false"),
        ("train.control", "1", "true or false"),
        ("teacher.quantization", "fp64", "one of nf4, int8, bf16, fp32"),
        ("teacher.quantization", "NF4", "one of nf4, int8, bf16, fp32"),
        ("teacher.mode", "listwise", "one of direct, generate, cot, bigrec, pointwise"),
        ("distill.confidence", "true", "one of auto, entropy, agreement, none"),
        ("teacher.window", "all", "a whole number or none"),
        ("teacher.batch_tokens", "8k", "a whole number or none"),
    ],
)
def test_wrong_types(tmp_path, name, value, expected):
    assert mistakes(f"--{name}={value}") == [
        f"command line: {name} is {value!r}; expected {expected}."
    ]
    file = write(tmp_path, f"{name}: {value!r}\n")
    assert mistakes("--config", file) == [f"{file}: {name} is {value!r}; expected {expected}."]


@pytest.mark.parametrize(
    ("line", "received", "expected"),
    [
        ("train.epochs: 3.0", "3.0", "a whole number"),
        ("train.epochs: true", "True", "a whole number"),
        ("train.epochs: [3]", "[3]", "a whole number"),
        ("seed: null", "None", "a whole number"),
        ("train.control: 0", "0", "true or false"),
        # As text these would be the noun "null" and a folder called "[1, 2]".
        ("teacher.item_noun: null", "None", "text"),
        ("output_dir: [1, 2]", "[1, 2]", "text or none"),
    ],
)
def test_wrong_types_that_only_yaml_can_write(tmp_path, line, received, expected):
    file = write(tmp_path, line)
    name = line.partition(":")[0]
    assert mistakes("--config", file) == [f"{file}: {name} is {received}; expected {expected}."]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", ".nan", ".inf", "-.inf", "1e999"])
def test_numbers_that_are_not_finite(value):
    (line,) = mistakes(f"--distill.lambda_emb={value}")
    assert line.startswith(("distill.lambda_emb is ", "command line: distill.lambda_emb is "))
    assert line.endswith(("expected a finite number.", "expected a number."))


def test_not_a_number_in_yaml(tmp_path):
    file = write(tmp_path, "query: {fraction: .nan}\ndistill: {lambda_rank: .inf}\n")
    assert mistakes("--config", file) == [
        "distill.lambda_rank is inf; expected a finite number.",
        "query.fraction is nan; expected a finite number.",
    ]


NUMERIC = [leaf for leaf in leaves() if leaf.field.metadata["bounds"]]
# The neighbours of a bound, inside and outside.
STEPS = {"≥": (0, -1), ">": (1, 0), "≤": (0, 1), "<": (-1, 0)}
# Accepted values that only another setting could contradict.
COMPANIONS = {
    "train.epochs": ["--train.warmup_epochs=0"],
    "student.hidden_size": ["--student.num_heads=1"],
    "teacher.num_candidates": ["--teacher.identifiers=numbers"],
    "teacher.window": ["--teacher.identifiers=numbers"],
}


@pytest.mark.parametrize("leaf", NUMERIC, ids=lambda leaf: leaf.name)
def test_every_range_ends_where_it_says(leaf):
    unit = 1e-9 if leaf.type is float else 1
    for sign, bound in leaf.field.metadata["bounds"].items():
        inside, outside = (bound + step * unit for step in STEPS[sign])
        options = COMPANIONS.get(leaf.name, [])
        assert value_of(parse([*options, f"--{leaf.name}={inside!r}"]), leaf.name) == inside
        (line,) = mistakes(*options, f"--{leaf.name}={outside!r}")
        assert line.startswith(f"{leaf.name} is ")
        assert f"{sign} {bound}" in line


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("false", False), ("True", True), ("yes", True), ("no", False)],
)
def test_booleans(tmp_path, text, value):
    assert parse(["--train.control", text]).train.control is value
    file = write(tmp_path, f"train: {{control: {text}}}")
    assert parse(["--config", file]).train.control is value


@pytest.mark.parametrize("text", ["none", "None", "null"])
def test_none_switches_an_optional_setting_off(tmp_path, text):
    """`none`, the word of the help texts, was a folder's name or a type mistake."""
    file = write(tmp_path, "train: {max_steps: 5}\noutput_dir: there\n")
    options = [f"--{name}={text}" for name in ("train.max_steps", "output_dir")]
    config = parse(["--config", file, *options, f"--data.categories_column={text}"])
    assert config == Config(data=DataConfig(categories_column=None))
    file = write(tmp_path, f"train: {{max_steps: {text}}}\ndata: {{categories_column: {text}}}\n")
    assert parse(["--config", file]) == Config(data=DataConfig(categories_column=None))


def test_none_stays_a_word_where_it_is_one():
    assert parse(["--distill.confidence", "none"]).distill.confidence == "none"
    assert parse(["--teacher.item_noun", "none"]).teacher.item_noun == "none"


@pytest.mark.parametrize("text", ["5", "true", "1e3", "a: b", "[x]", "{x}", "2020-01-01", "=", ""])
def test_text_stays_as_it_was_typed(text):
    assert parse([f"--data.name={text}"]).data.name == text


def test_exponents_without_a_dot_are_numbers(tmp_path):
    """YAML 1.1 reads 1e-3 as text."""
    file = write(tmp_path, "train: {learning_rate: 1e-3, weight_decay: 1}")
    config = parse(["--config", file])
    assert config.train.learning_rate == 0.001
    assert config.train.weight_decay == 1.0


# ---- all at once --------------------------------------------------------------------------------


def test_all_mistakes_in_one_message(tmp_path):
    file = write(tmp_path, "train: {epoch: 3, batch_size: 2.5}\ndistill: {lambda_rank: -1}\n")
    found = mistakes(
        "--config", file, "--query.fraction", "1.5", "--teacher.mode=x", "word", "--eval.batch_size"
    )
    assert found == [
        "'word' on the command line is not an option; expected --name value.",
        "--eval.batch_size has no value; expected --eval.batch_size VALUE.",
        f"{file}: unknown setting 'train.epoch'; the nearest known one is 'train.epochs'.",
        f"{file}: train.batch_size is 2.5; expected a whole number.",
        "command line: teacher.mode is 'x'; expected one of direct, generate, cot, "
        "bigrec, pointwise.",
        "distill.lambda_rank is -1.0; expected ≥ 0.",
        "query.fraction is 1.5; expected ≥ 0 and ≤ 1.",
    ]


def test_contradictions_between_settings():
    found = mistakes(
        "--student.hidden_size=10", "--student.num_heads=3", "--data.items=x.csv",
        "--train.epochs=5", "--train.warmup_epochs=5",
    )  # fmt: skip
    assert len(found) == 3
    assert found[0].startswith("student.hidden_size 10 is not a multiple of student.num_heads 3")
    assert found[1].startswith("train.warmup_epochs 5 leaves no epoch of train.epochs 5")
    assert found[2].startswith("data.items is set without data.interactions")


def test_contradictions_of_the_student():
    (line,) = mistakes("--teacher.model=none", "--student.item_text=teacher")
    assert line.startswith("student.item_text is teacher, but teacher.model is none")
    (line,) = mistakes("--train.item_updates=lazy")
    assert "chunked_ce touches every item in every step" in line
    (line,) = mistakes("--train.loss=gbce", "--train.label_smoothing=0.1")
    assert "has no meaning for train.loss gbce" in line
    # Without a teacher nothing waits for the end of the warm-up.
    assert parse(["--teacher.model=none", "--train.epochs=2"]).teacher.model is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["num_candidates=27"], "27 candidates in one prompt, but teacher.identifiers letters"),
        (["num_candidates=60", "window=40"], "40 candidates in one prompt, but"),
        (
            ["num_candidates=60", "window=10", "stride=10"],
            "teacher.stride 10 moves a window past all of its 10 candidates",
        ),
        (
            ["compute=bf16", "quantization=int8"],
            "teacher.compute bf16 has no meaning for teacher.q",
        ),
        (
            ["compute=fp32", "quantization=bf16"],
            "teacher.compute fp32 has no meaning for teacher.q",
        ),
    ],
)
def test_contradictions_of_the_teacher(options: list[str], expected: str):
    (line,) = mistakes(*(f"--teacher.{option}" for option in options))
    assert line.startswith(expected)


def test_one_ranking_agrees_with_nothing():
    (line,) = mistakes("--distill.confidence=agreement")
    assert line.startswith("distill.confidence is agreement, but teacher.shuffles 1 gives one")
    config = parse(["--distill.confidence=agreement", "--teacher.shuffles=2"])
    assert config.distill.confidence == "agreement"


@pytest.mark.parametrize(
    ("options", "num_shown"),
    [
        ([], 20),
        (["num_candidates=26"], 26),
        (["num_candidates=200", "window=26", "stride=25"], 26),
        (["stride=20"], 20),  # nothing slides
        (["num_candidates=100", "identifiers=numbers"], 100),
        # A window that is wider than the list is the list.
        (["num_candidates=10", "window=100"], 10),
        (["compute=bf16", "quantization=nf4"], 20),
        (["compute=fp32", "quantization=fp32"], 20),
    ],
)
def test_settings_of_the_teacher_that_go_together(options: list[str], num_shown: int):
    teacher = parse([f"--teacher.{option}" for option in options]).teacher
    assert teacher.num_shown == num_shown


def test_cuts_that_only_one_split_has():
    (line,) = mistakes("--data.validation_start=5", "--data.test_start=9")
    assert line.startswith("data.validation_start and data.test_start set, but data.split is leave")
    (line,) = mistakes("--data.split=time", "--data.test_start=9")
    assert line.startswith("data.test_start is set without the other start")
    both = ["--data.split=time", "--data.validation_start=5", "--data.test_start=2001-01-31"]
    assert parse(both).data.test_start == "2001-01-31"


def test_files_that_are_no_settings(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read .*nowhere\.yaml: No such file"):
        parse(["--config", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(ConfigError, match=r"Cannot read .*: Is a directory"):
        parse(["--config", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"is not a YAML file: .*\n.*line 1"):
        parse(["--config", write(tmp_path, "a: [1\n")])
    with pytest.raises(ConfigError, match="is not a YAML file"):
        parse(["--config", write(tmp_path, "!!python/object/apply:os.getcwd []\n")])
    with pytest.raises(ConfigError, match="holds list; expected settings, name: value"):
        parse(["--config", write(tmp_path, "- seed\n")])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="is not a YAML file"):
        parse(["--config", str(binary)])


# ---- saving -------------------------------------------------------------------------------------


def test_round_trip_of_every_setting(tmp_path):
    """Each leaf away from its default, where there is another value."""
    other = {
        "student.hidden_size": 96,
        "student.num_heads": 3,
        "data.interactions": "a b/é.csv",
        "data.items": "null.csv",
        "train.epochs": 41,
        "teacher.stride": 3,  # less than its window
        # A search wants labels of one token, and bigrec and pointwise no windows.
        "teacher.mode": "cot",
        "teacher.search": "none",
        # With any other loss, label smoothing and lazy updates contradict each other.
        "train.loss": "ce",
        "train.item_updates": "all",
        "tracking.with": "wandb,mlflow",
        "distill.blend_beta": 0.4,
        "train.control": True,  # a blend is made with it
        "train.rounds": 1,  # several want a teacher that is asked live, by letters
    }
    for leaf in leaves():
        default = leaf.field.default
        choices = typing.get_args(leaf.type)
        if leaf.name in other:
            continue
        if isinstance(default, bool):
            other[leaf.name] = not default
        elif isinstance(default, float):
            other[leaf.name] = default / 3 + 1e-7
        elif isinstance(default, int):
            other[leaf.name] = default + 1
        elif int in choices:
            other[leaf.name] = 7
        elif type(None) in choices or not choices:
            other[leaf.name] = "it's: #1"
        else:
            other[leaf.name] = choices[-1]
    config = parse([f"--{name}={value!s}" for name, value in other.items()])
    assert {leaf.name: value_of(config, leaf.name) for leaf in leaves()} == other
    save(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


@settings(max_examples=15, deadline=None)
@given(
    text=st.text(),
    path=st.none() | st.text().filter(lambda text: text.lower() not in ("none", "null")),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    dropout=st.floats(min_value=0, max_value=1, exclude_max=True),
    steps=st.none() | st.integers(min_value=1),
    control=st.booleans(),
)
def test_round_trip_of_any_value(tmp_path_factory, text, path, rate, dropout, steps, control):
    config = Config(
        data=DataConfig(name=text),
        student=StudentConfig(dropout=dropout),
        teacher=TeacherConfig(item_noun=text[::-1]),
        train=TrainConfig(learning_rate=rate, max_steps=steps, control=control),
        output_dir=path,
    )
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    save(config, file)
    assert parse(["--config", str(file)]) == config


def test_saved_settings_are_plain_values():
    def plain(value) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        return value is None or type(value) in (str, int, float, bool)

    assert plain(to_dict(Config()))


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EvalConfig().batch_size = 3  # pyright: ignore


# ---- what is shipped ----------------------------------------------------------------------------


def test_there_are_recipes():
    assert "quickstart.yaml" in [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_can_be_overridden(path):
    parse(["--config", str(path)])
    assert parse(["--seed", "11"], path).seed == 11


def test_every_setting_has_help_and_every_number_a_range():
    for leaf in leaves():
        text = leaf.field.metadata["help"]
        assert len(text) > 10, leaf.name
        kinds = {leaf.type, *typing.get_args(leaf.type)}
        if kinds & {int, float}:
            assert leaf.field.metadata["bounds"], leaf.name
        if type(None) in kinds:
            assert "none" in text, leaf.name
        default = leaf.field.default
        assert leaf.range_problem(default) is None, leaf.name


def help_text(capsys, *argv: str, default_file: Path | None = None) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(argv, default_file, prog="train_online.py")
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_names_every_setting_its_range_and_its_default(capsys):
    shown = help_text(capsys, "--help")
    assert shown.startswith("usage: train_online.py")
    for leaf in leaves():
        # From the option's own entry up to the end of it, which is its default.
        entry = re.search(
            rf" --{re.escape(leaf.name)} \S+ (?!\[)((?!default: ).)*default: ([^)]*)\)", shown
        )
        assert entry, leaf.name
        default = leaf.field.default
        written = "null" if default is None else str(default)
        assert entry[2] == written, leaf.name
        for sign, bound in leaf.field.metadata["bounds"].items():
            assert f"{sign} {bound}" in entry[0], leaf.name


def test_help_shows_the_defaults_of_the_default_file(capsys, tmp_path):
    file = Path(write(tmp_path, "train: {epochs: 77}\n"))
    assert "(type: int, default: 77)" in help_text(capsys, "-h", default_file=file)
