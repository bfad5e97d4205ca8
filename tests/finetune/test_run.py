"""A training, whole: when it begins, when it goes on, what it leaves behind."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from cotrain.config import DataConfig, FinetuneConfig, TeacherConfig, parse_as, to_dict
from cotrain.data.catalog import Catalog
from cotrain.data.interactions import InteractionData, load_interactions
from cotrain.errors import CheckpointError, ConfigError, DataError, TeacherError
from cotrain.finetune import run as module
from cotrain.finetune.lora import TrainableAdapter
from cotrain.finetune.quality import measure, metrics_of
from cotrain.finetune.rank_sft import rank_sft
from cotrain.finetune.run import Context, Outcome, any_order, open_folder, prepare, run
from cotrain.finetune.tuning import Interrupted
from cotrain.finetune_settings import LoraSettings, SftConfig, StarConfig
from cotrain.runtime import checkpoint, tracking
from cotrain.student.recommender import Recommender
from cotrain.student.sasrec import SASRec
from cotrain.teacher import backbone as backbones
from cotrain.teacher.backbone import Backbone, load_backbone
from cotrain.teacher.prompts import make_prompts
from cotrain.teacher.ranker import RankLLM

K = 20
Settings = Callable[..., FinetuneConfig]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread is faster for models this small, and the tokenizer takes longer to read."""
    threads = torch.get_num_threads()
    read = functools.cache(backbones.load_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "use_all_cores", lambda processes: torch.set_num_threads(1))
        patch.setattr(backbones, "load_tokenizer", read)
        patch.setattr(module, "load_tokenizer", read)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(small_tables: tuple[Path, Path]) -> InteractionData:
    interactions, items = small_tables
    return load_interactions(DataConfig(interactions=str(interactions), items=str(items)))


def worth(data: InteractionData) -> np.ndarray:
    """(V,) by which the student orders items: how often they were taken, no two alike."""
    return data.train_counts + np.linspace(0.5, 0, len(data.catalog))


@pytest.fixture(scope="module")
def student(data: InteractionData, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a student who recommends what most take."""
    model = SASRec(data.num_items, hidden_size=8, num_layers=1, num_heads=2, max_length=10)
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.final_norm.bias.copy_(torch.eye(8)[0])
        model.item_embedding.weight[1:, 0] = torch.from_numpy(worth(data)[1:]).float() / 10
    folder = tmp_path_factory.mktemp("student")
    Recommender(model, data.catalog).save_pretrained(folder / "student")
    return str(folder)


@pytest.fixture(scope="module")
def settings(tiny_teacher: str, small_tables: tuple[Path, Path], student: str) -> Settings:
    """Of a small training; options override others."""
    interactions, items = small_tables

    def with_options(folder: Path, *options: str) -> FinetuneConfig:
        return parse_as(
            FinetuneConfig,
            [
                "--data.interactions", str(interactions), "--data.items", str(items),
                "--teacher.model", tiny_teacher, "--teacher.quantization", "fp32",
                "--teacher.num_candidates", str(K), "--teacher.history_length", "3",
                "--teacher.template", "brief", "--teacher.max_title_tokens", "8",
                "--examples.student", student, "--examples.rows", "8", "--examples.held_out", "0.5",
                "--lora.rank", "4", "--sft.batch_size", "4", "--sft.epochs", "1",
                "--sft.learning_rate", "0.01", "--sft.lr_warmup_steps", "0",
                "--output", str(folder), *options,
            ],
        )  # fmt: skip

    return with_options


# ---- whether it may begin -----------------------------------------------------------------------


def started(folder: Path, config: FinetuneConfig, method: str = "star") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "environment.json").write_text(json.dumps({"method": method}))
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)), "utf-8")


def test_a_training_begins_where_nothing_is(tmp_path: Path):
    config = FinetuneConfig()
    assert not open_folder(tmp_path / "not" / "there", config, "star")
    assert not open_folder(tmp_path, config, "star")
    assert list(tmp_path.iterdir()) == []


def test_it_goes_on_with_the_same_settings(tmp_path: Path):
    config = FinetuneConfig(sft=SftConfig(epochs=3), seed=4)
    started(tmp_path, config)
    assert open_folder(tmp_path, config, "star")
    # What only says how it is computed, and how long.
    other = dataclasses.replace(
        config, output="elsewhere", star=StarConfig(rounds=9),
        teacher=TeacherConfig(batch_tokens=77, compile="off"),
        sft=SftConfig(epochs=3, micro_batch_tokens=9, gradient_checkpointing="on", patience=99),
    )  # fmt: skip
    assert open_folder(tmp_path, other, "star")


def test_other_settings_are_named(tmp_path: Path):
    config = FinetuneConfig()
    started(tmp_path, config)
    other = dataclasses.replace(config, seed=1, sft=SftConfig(loss="ranknet"))
    with pytest.raises(ConfigError) as caught:
        open_folder(tmp_path, other, "rl")
    assert "other settings: method 'star' → 'rl', sft.loss 'ce' → 'ranknet', seed 0 → 1. " in str(
        caught.value
    )
    many = LoraSettings(rank=1, alpha=1, dropout=0.5, modules="mlp", last_layers=1)
    with pytest.raises(ConfigError, match=r"lora\.last_layers None → 1, … \(6 in all\)\. Choose"):
        open_folder(tmp_path, dataclasses.replace(config, lora=many, seed=1), "star")
    (tmp_path / "config.yaml").write_text("- no settings\n")
    with pytest.raises(ConfigError, match=r"other settings: data\.name None → 'ml-100k'"):
        open_folder(tmp_path, config, "star")


@pytest.mark.parametrize("what", ["a file", "other files", "a finished training"])
def test_nothing_is_overwritten(tmp_path: Path, what: str):
    folder, config = tmp_path / "out", FinetuneConfig()
    if what == "a file":
        folder.write_text("mine")
    elif what == "other files":
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    else:
        started(folder, config)
        (folder / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"{what}.*(Choose another --output|expected a folder)"):
        open_folder(folder, config, "star")


# ---- what is found out before the training ------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(module, "load_backbone", refuse)


def test_a_student_of_other_items_is_refused(
    settings: Settings, data: InteractionData, tmp_path: Path, no_weights: None
):
    known = data.catalog
    ids = [known.item_ids[0], *reversed(known.item_ids[1:])]
    other = Recommender(
        SASRec(data.num_items, hidden_size=8, num_layers=1, num_heads=2, max_length=10),
        Catalog(ids, known.titles, known.categories),
    )
    other.save_pretrained(tmp_path / "other")
    config = settings(tmp_path / "out", "--examples.student", str(tmp_path / "other"))
    with pytest.raises(DataError, match=rf"knows {data.num_items:,} items, which are not the"):
        prepare("rank-sft", config)
    assert not (tmp_path / "out").exists()


def test_what_the_data_cannot_give_is_refused(settings: Settings, tmp_path: Path, no_weights: None):
    config = settings(tmp_path / "out")
    many = dataclasses.replace(config.teacher, num_candidates=99_999, window=20, template="brief")
    with pytest.raises(ConfigError, match="99999, but the catalogue has only"):
        prepare("rank-sft", dataclasses.replace(config, teacher=many))
    small = settings(tmp_path / "out", "--examples.min_history", "9999")
    with pytest.raises(DataError, match="None of 0 training positions"):
        prepare("rank-sft", small)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_width_is_refused_before_the_training(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    narrow = Backbone(LlamaForCausalLM(shape), tokenizer, "narrow", "fp32")
    TrainableAdapter(narrow, LoraSettings(rank=2), 0).save(tmp_path / "narrow")
    config = settings(tmp_path / "out", "--teacher.adapter", str(tmp_path / "narrow"))
    with pytest.raises(TeacherError, match=r"narrow'.*Expected .* adapter trained on this model"):
        run("rank-sft", never, "direct", config)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_training(
    settings: Settings, tmp_path: Path
):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"Cannot write to .*Choose another --output"):
        run("rank-sft", never, "direct", settings(tmp_path / "file" / "out"))


def never(context: Context) -> Outcome:
    raise AssertionError("the training began")


# ---- one that ends ------------------------------------------------------------------------------


@dataclasses.dataclass
class Ended:
    """A training that is over."""

    folder: Path
    config: FinetuneConfig
    context: Context
    report: dict[str, Any]


@pytest.fixture(scope="module")
def ended(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("trainings") / "rank"
    config, seen = settings(folder), []

    def work(context: Context) -> Outcome:
        seen.append(context)
        return rank_sft(context)

    report = run("rank-sft", work, "direct", config)
    return Ended(folder, config, seen[0], report)


def test_the_folder_holds_all_and_no_checkpoint(ended: Ended):
    names = {path.name for path in ended.folder.iterdir()}
    expected = {
        "adapter", "config.yaml", "environment.json", "metrics.jsonl", "report.html", "report.json"
    }  # fmt: skip
    assert expected <= names
    assert not list(ended.folder.rglob("checkpoints"))
    assert not [path for path in ended.folder.rglob("*") if path.name.endswith(".tmp")]
    content = yaml.safe_load((ended.folder / "config.yaml").read_text())
    assert content == to_dict(ended.context.config)
    facts = json.loads((ended.folder / "environment.json").read_text())
    assert facts["method"] == "rank-sft"
    rows = [json.loads(line) for line in (ended.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("validation", 0), ("train", 1), ("train", 2), ("validation", 2),
    ]  # fmt: skip
    kept = json.loads((ended.folder / "report.json").read_text())
    samples = kept.pop("samples")
    assert kept == ended.report
    assert [sample["heading"] for sample in samples[:2]] == ["Held-out row 1", "Held-out row 2"]
    page = (ended.folder / "report.html").read_text()
    assert "rank-sft on" in page
    assert "The student&#39;s own order" in page
    with pytest.raises(ConfigError, match="holds a finished training"):
        run("rank-sft", never, "direct", ended.config)


def test_what_the_report_says_of_orders(ended: Ended, data: InteractionData):
    report, rows = ended.report, ended.context.examples.validation
    assert report["validation_rows"] == len(rows) > 1
    assert report["held_out_users"] == ended.context.examples.num_validation == 30
    assert report["rows"] == 8
    # The student orders what was not seen by its worth.
    ranks = []
    for row in rows:
        values = worth(data)
        values[[0, *row.history]] = -1
        ranks.append(int((values >= values[row.target]).sum()))
    assert report["student_order"] == metrics_of(np.array(ranks))
    assert report["student_order"]["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    places = np.arange(1, K + 1)
    assert report["any_order"]["accuracy@1"] == pytest.approx(1 / K)
    assert report["any_order"]["mrr"] == pytest.approx((1 / places).mean())
    gains = np.where(places <= 10, 1 / np.log2(places + 1), 0)
    assert any_order(K)["ndcg@10"] == pytest.approx(gains.mean())


def test_the_adapter_on_disk_is_the_one_that_was_measured(
    ended: Ended, tiny_teacher: str, data: InteractionData
):
    backbone = load_backbone(
        tiny_teacher, "fp32", torch.device("cpu"), adapter=str(ended.folder / "adapter")
    )
    chosen = ended.context.config.teacher
    prompts = make_prompts(
        chosen, backbone.tokenizer, data.catalog.titles, data.catalog.categories, 2048
    )
    ranker = RankLLM(backbone, prompts, chosen)
    found = measure(ranker, ended.context.examples.validation, ended.config.seed).summary()
    assert found == pytest.approx(ended.report["validation_best"], abs=1e-4)
    assert ended.report["best_step"] in (0, 2)
    weights = backbone.model.get_adapter_state_dict("default").values()
    assert ended.report["trained_parameters"] == sum(value.numel() for value in weights)


# ---- one that is interrupted --------------------------------------------------------------------


def test_an_interrupted_training_goes_on_where_its_checkpoint_was(
    settings: Settings, tmp_path: Path
):
    config = settings(
        tmp_path / "out", "--examples.candidates", "random", "--examples.student", "none"
    )
    logged = []

    def interrupted(context: Context) -> Outcome:
        context.log.write({"kind": "train", "step": 1, "loss": 3.0})
        state = {"log_bytes": context.log.num_bytes, "progress": {"step": 1}}
        checkpoint.save(context.folder, 1, {"adapter": context.adapter.state()}, state, 1)
        context.log.write({"kind": "train", "step": 2, "loss": 2.0})
        raise Interrupted("Stopped.")

    def goes_on(context: Context) -> Outcome:
        logged.extend(context.log.rows())
        return Outcome(facts={"rows": 3}, keeps_adapter=False)

    with pytest.raises(Interrupted):
        run("rank-sft", interrupted, "direct", config)
    assert checkpoint.steps(tmp_path / "out") == [1]
    assert not (tmp_path / "out" / "report.json").exists()
    with pytest.raises(ConfigError, match="other settings: seed 0 → 1"):
        run("rank-sft", never, "direct", dataclasses.replace(config, seed=1))

    report = run("rank-sft", goes_on, "direct", config)

    # What came after the checkpoint will be written again.
    assert logged == [{"kind": "train", "step": 1, "loss": 3.0}]
    assert report["rows"] == 3
    # There is no student whose order could be shown, and nothing to keep.
    assert "student_order" not in report
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "checkpoints").exists()
