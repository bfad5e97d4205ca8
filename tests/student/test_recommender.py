"""A saved student gives the same items from a folder, from the hub and from memory, in raw ids; and
what is no saved student is refused before anything in it is believed or run."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from huggingface_hub import ModelCard, hub_mixin
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from cotrain.data.catalog import Catalog
from cotrain.errors import AssetError, ConfigError, CotrainError, DataError
from cotrain.student import recommender as module
from cotrain.student.recommender import Recommender
from cotrain.student.sasrec import SASRec

NUM_ITEMS = 30
FILES = {"README.md", "config.json", "items.parquet", "model.safetensors"}


def text_ids(count: int) -> list[Any]:
    return [f"B{index:03}" for index in range(1, count + 1)]


def make(ids: list[Any]) -> Recommender:
    torch.manual_seed(0)
    model = SASRec(len(ids), hidden_size=8, num_layers=2, num_heads=2, max_length=6, dropout=0.5)
    with torch.no_grad():  # scores that differ
        model.item_embedding.weight[1:].normal_()
    titles = [f"Title {item}" for item in ids]
    return Recommender(model, Catalog([None, *ids], ["", *titles], [""] * (len(ids) + 1)))


@pytest.fixture
def recommender() -> Recommender:
    return make(text_ids(NUM_ITEMS))


@pytest.fixture
def folder(recommender: Recommender, tmp_path: Path) -> Path:
    recommender.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


HISTORIES = [["B003"], ["B001", "B002", "B030"], [f"B{i:03}" for i in range(1, 16)]]


# ---- recommending -------------------------------------------------------------------------------


def by_sorting(recommender: Recommender, history: list[Any], seen: set[Any]) -> list[Any]:
    """All unseen raw ids by score, one user alone."""
    catalog, model = recommender.catalog, recommender.model.eval()
    indices = np.array([catalog.item_ids.index(item) for item in history])
    with torch.no_grad():
        scores = (model.user_states([indices]) @ model.item_vectors.T)[0]
    order = scores[1:].argsort(descending=True) + 1
    return [catalog.item_ids[index] for index in order if catalog.item_ids[index] not in seen]


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_equals_sorting_all_scores_of_each_user(recommender, exclude_seen, batch_size):
    found = recommender.recommend(HISTORIES, 5, exclude_seen=exclude_seen, batch_size=batch_size)
    for history, ids, scores in zip(HISTORIES, found.item_ids, found.scores, strict=True):
        seen = set(history) if exclude_seen else set()
        assert ids == by_sorting(recommender, history, seen)[:5]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)


def test_bounds_on_memory_change_nothing(recommender, monkeypatch):
    rng = np.random.default_rng(0)
    histories = [
        [f"B{i:03}" for i in rng.integers(1, NUM_ITEMS + 1, rng.integers(1, 40))] for _ in range(12)
    ]
    whole = recommender.recommend(histories, 4)
    monkeypatch.setattr(module, "MAX_SCORES", 40)
    monkeypatch.setattr(module, "MAX_SEEN", 30)
    parts = recommender.recommend(histories, 4)
    assert parts.item_ids == whole.item_ids
    for left, right in zip(parts.scores, whole.scores, strict=True):
        assert left == pytest.approx(right, abs=1e-5)


def test_training_mode_is_neither_used_nor_changed(recommender):
    recommender.model.eval()
    expected = recommender.recommend(HISTORIES, 5)
    recommender.model.train()
    assert recommender.recommend(HISTORIES, 5).scores == expected.scores
    assert recommender.model.training


def test_fewer_items_where_no_more_are_left(recommender):
    almost_all = text_ids(NUM_ITEMS)[:-2]
    found = recommender.recommend([almost_all, ["B001"]], k=1000)
    assert set(found.item_ids[0]) == {"B029", "B030"}
    assert len(found.scores[0]) == 2
    assert len(found.item_ids[1]) == NUM_ITEMS - 1
    everything = recommender.recommend([text_ids(NUM_ITEMS)])
    assert everything.item_ids == everything.scores == [[]]


def test_nobody_is_a_fine_batch(recommender):
    found = recommender.recommend([])
    assert (found.item_ids, found.scores, found.unknown.tolist()) == ([], [], [])


@pytest.mark.parametrize(
    "history", [np.array([3, 17]), pl.Series([3, 17]), (3, 17), iter([3, 17])], ids=type
)
def test_any_list_of_ids_will_do(history):
    recommender = make(list(range(1, 31)))
    expected = recommender.recommend([[3, 17]], 5).item_ids
    assert recommender.recommend([history], 5).item_ids == expected
    assert all(type(item) is int for item in expected[0])


def test_unknown_ids_are_an_error_that_names_them(recommender):
    with pytest.raises(DataError) as raised:
        recommender.recommend([["B001"], ["nobody", "B002", 7], [None]])
    message = str(raised.value)
    assert "2 of 3 histories" in message
    assert "'nobody', 7, None" in message
    assert "such as 'B001', 'B002', 'B003'" in message
    assert "unknown='skip'" in message


def test_at_most_five_unknown_ids_are_named(recommender):
    with pytest.raises(DataError, match=r"'x4', … \(9 in all\)"):
        recommender.recommend([[f"x{i}" for i in range(9)]])


def test_unknown_ids_are_skipped_and_counted_on_request(recommender):
    histories = [["B001", "who", "B002", "who"], ["B001", "B002"], ["who"], []]
    found = recommender.recommend(histories, 5, unknown="skip")
    assert found.unknown.tolist() == [2, 0, 1, 0]
    assert found.item_ids[0] == found.item_ids[1]
    assert found.item_ids[2:] == [[], []]


def test_an_empty_history_is_an_error(recommender):
    with pytest.raises(DataError, match=r"without an item: 1 of 2"):
        recommender.recommend([["B001"], []])


@pytest.mark.parametrize("histories", [["B001", "B002"], [3], [[["B001"]]], [None]])
def test_what_is_no_list_of_lists_is_an_error(recommender, histories):
    with pytest.raises(DataError, match=r"History 0 is .* a list of raw item ids for each user"):
        recommender.recommend(histories)


@pytest.mark.parametrize("arguments", [{"k": 0}, {"batch_size": 0}, {"unknown": "ignore"}])
def test_impossible_arguments(recommender, arguments):
    with pytest.raises(ValueError, match="expected"):
        recommender.recommend([["B001"]], **arguments)


# ---- saving and loading -------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [text_ids(12), [7, -3, 2**62, 0, 5]], ids=["text", "numbers"])
def test_a_folder_gives_back_the_same(ids, tmp_path):
    saved = make(ids)
    saved.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    before = torch.get_rng_state()
    loaded = Recommender.from_pretrained(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.catalog == saved.catalog
    assert loaded.model.settings == saved.model.settings
    assert not loaded.model.training
    histories = [ids[:2], ids[1:4]]
    assert loaded.recommend(histories, 3).item_ids == saved.recommend(histories, 3).item_ids
    assert loaded.recommend(histories, 3).scores == saved.recommend(histories, 3).scores
    # Trainable as it was.
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_saving_into_the_folder_it_came_from(folder, recommender):
    """Weights that are still mapped from the file would be lost when it is written anew."""
    loaded = Recommender.from_pretrained(folder)
    with torch.no_grad():
        loaded.model.item_embedding.weight.mul_(2)
    loaded.save_pretrained(folder)
    again = Recommender.from_pretrained(folder)
    assert torch.equal(again.model.item_vectors, 2 * recommender.model.item_vectors)


def test_the_model_alone_can_be_read_too(folder, recommender):
    model = SASRec.from_pretrained(folder)
    assert torch.equal(model.item_vectors, recommender.model.item_vectors)


def test_folders_of_model_and_catalogue_saved_apart(tmp_path, recommender):
    """Runs wrote these before there was a Recommender."""
    recommender.model.save_pretrained(tmp_path)
    recommender.catalog.save(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path)
    assert loaded.recommend(HISTORIES).item_ids == recommender.recommend(HISTORIES).item_ids


def test_the_card_says_what_it_is(recommender, tmp_path):
    recommender.save_pretrained(
        tmp_path,
        model_card_kwargs={
            "dataset_name": "films",
            "protocol": "One held-out item of each user.",
            "metrics": {"recall@10": 0.25, "ndcg@10": 0.125},
        },
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict()["library_name"] == "cotrain"
    for part in (
        "for films", "SASRec", "30 items", "| hidden_size | 8 |", "One held-out item",
        "| recall@10 | 0.2500 |", "['B001', 'B002']",
    ):  # fmt: skip
        assert part in card.text
    assert "Evaluation" not in recommender.generate_model_card().text


def test_a_card_stays_with_its_model(recommender, folder, tmp_path):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Written by hand\n")
    loaded = Recommender.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy/README.md").read_text() == (folder / "README.md").read_text()
    loaded.save_pretrained(tmp_path / "new", model_card_kwargs={"dataset_name": "films"})
    assert "for films" in (tmp_path / "new/README.md").read_text()
    recommender.save_pretrained(folder)  # one that the user has there is not written over
    assert "by hand" in (folder / "README.md").read_text()


# ---- the hub ------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that is a cache folder: what is pushed can be read as if it had been downloaded."""
    cache = tmp_path / "hub"

    class Api:
        def __init__(self, token: Any = None):
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("RepoUrl", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: Path, repo_type: str, **_: Any) -> str:
            assert repo_type == "model"
            repo = cache / ("models--" + repo_id.replace("/", "--"))
            shutil.copytree(folder_path, repo / "snapshots" / COMMIT)
            (repo / "refs").mkdir()
            (repo / "refs/main").write_text(COMMIT)
            return f"hub/{repo_id}"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    return cache


def test_push_and_read_back(recommender, hub, tmp_path):
    facts = {"dataset_name": "films", "metrics": {"ndcg@10": 0.5}}
    assert recommender.push_to_hub("me/films", model_card_kwargs=facts) == "hub/me/films"
    pushed = hub / "models--me--films/snapshots" / COMMIT
    assert {path.name for path in pushed.iterdir()} == FILES
    assert "for films" in (pushed / "README.md").read_text()
    for revision in (None, "main", COMMIT):
        loaded = Recommender.from_pretrained(
            "me/films", revision=revision, cache_dir=hub, local_files_only=True
        )
        assert loaded.recommend(HISTORIES).item_ids == recommender.recommend(HISTORIES).item_ids
    with pytest.raises(AssetError, match="next of it cannot be had"):
        Recommender.from_pretrained(
            "me/films", revision="next", cache_dir=hub, local_files_only=True
        )


def test_save_can_push_at_once(recommender, hub, tmp_path):
    recommender.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="me/films")
    pushed = hub / "models--me--films/snapshots" / COMMIT
    for name in FILES:
        assert (pushed / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()


def test_a_loaded_card_is_pushed_as_it_is(folder, hub):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Written by hand\n")
    Recommender.from_pretrained(folder).push_to_hub("me/films")
    card = hub / "models--me--films/snapshots" / COMMIT / "README.md"
    assert card.read_text() == (folder / "README.md").read_text()


def test_only_the_known_files_are_fetched(recommender, monkeypatch, folder):
    asked = {}

    def snapshot(name: str, **arguments: Any) -> str:
        asked.update(arguments, name=name)
        return str(folder)

    monkeypatch.setattr("cotrain.student.pretrained.snapshot_download", snapshot)
    Recommender.from_pretrained("me/films", revision="v2", token="secret")
    assert set(asked["allow_patterns"]) == FILES
    assert (asked["name"], asked["revision"], asked["token"]) == ("me/films", "v2", "secret")


@pytest.mark.parametrize("name", ["me/films", "me/films/more", "no folder!", "../no/folder", "-x"])
def test_a_name_that_leads_nowhere(name, tmp_path):
    with pytest.raises(AssetError, match=r"There is no folder|is no folder here"):
        Recommender.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)


def test_a_missing_folder_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(AssetError, match="There is no folder"):
        Recommender.from_pretrained(tmp_path / "student")
    with pytest.raises(ConfigError, match="which has no revisions"):
        Recommender.from_pretrained(tmp_path, revision="main")


# ---- what is refused ----------------------------------------------------------------------------


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_pickled_weights_are_never_opened(folder, tmp_path):
    trace = tmp_path / "trace"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    Recommender.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(AssetError, match=r"lacks 'model.safetensors'.*\('pytorch_model.bin'\)"):
        Recommender.from_pretrained(folder)
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(AssetError, match="cannot be read as safetensors"):
        Recommender.from_pretrained(folder)
    assert not trace.exists()


def test_the_model_alone_refuses_them_too(folder, tmp_path, monkeypatch):
    """The mixin falls back to `torch.load` for a hub name without safetensors."""
    trace = tmp_path / "trace"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    (folder / "model.safetensors").unlink()

    def download(filename: str, **_: Any) -> str:
        if not (folder / filename).exists():
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(hub_mixin, "hf_hub_download", download)
    with pytest.raises(AssetError, match="pickled weights are never opened"):
        SASRec.from_pretrained("me/films")
    assert not trace.exists()


@pytest.mark.parametrize("name", sorted(FILES - {"README.md"}))
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(AssetError, match=f"lacks '{name}'"):
        Recommender.from_pretrained(folder)


@pytest.mark.parametrize("name", sorted(FILES - {"README.md"}))
@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_a_damaged_file_is_named(folder, name, damage):
    path = folder / name
    content = path.read_bytes()
    damaged = {"empty": b"", "cut": content[: len(content) // 2], "noise": b"\xff\x00" * 500}
    path.write_bytes(damaged[damage])
    with pytest.raises(CotrainError, match=f"{name} cannot be read as"):
        Recommender.from_pretrained(folder)


def test_a_damaged_card_is_named(folder):
    (folder / "README.md").write_text("---\n[not: yaml\n---\n")
    with pytest.raises(AssetError, match=r"model card .* cannot be read"):
        Recommender.from_pretrained(folder)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 8, "auto_map": "x"}, "unknown keys 'auto_map', 'hiden_size'"),
        ({"architecture": "GRU4Rec"}, "architecture 'GRU4Rec'"),
        ({"hidden_size": "8"}, "hidden_size is '8', expected int"),
        ({"num_heads": True}, "num_heads is True, expected int"),
        ({"num_layers": 0}, "num_layers is 0, expected 1 or more"),
        ({"dropout": 1.0, "max_length": -1}, "max_length is -1.*; dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"num_heads": 3}, "hidden_size 8 is not a multiple of num_heads 3"),
        ({"num_layers": 10**9}, "too few for num_layers"),
        ({"num_layers": 3}, "blocks.2.*is absent"),
        ({"num_layers": 1}, "blocks.1.*expected absent"),
        ({"hidden_size": 10**30}, "cannot be built"),
        ({"max_length": 7}, r"position_embedding.weight is \[6, 8\], expected \[7, 8\]"),
    ],
)
def test_a_config_that_does_not_describe_the_weights(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(AssetError, match=message):
        Recommender.from_pretrained(folder)


def test_a_config_that_is_no_object_or_lacks_the_size(folder):
    (folder / "config.json").write_text("[1, 2]")
    with pytest.raises(AssetError, match="holds list; expected an object"):
        Recommender.from_pretrained(folder)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(AssetError, match="num_items is missing"):
        Recommender.from_pretrained(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(AssetError, match="cannot be read as JSON"):
        Recommender.from_pretrained(folder)


def test_model_and_catalogue_of_different_sizes(folder, recommender):
    smaller = make(text_ids(NUM_ITEMS - 1)).catalog
    smaller.save(folder)
    with pytest.raises(DataError, match="num_items 30, its catalogue 29"):
        Recommender.from_pretrained(folder)
    with pytest.raises(DataError, match="num_items 30, its catalogue 29"):
        Recommender(recommender.model, smaller)


@pytest.mark.parametrize("wrong", ["B002", None])
def test_items_without_an_id_of_their_own(folder, wrong):
    ids = pl.read_parquet(folder / "items.parquet")
    ids = ids.with_columns(item_id=pl.Series([wrong, *text_ids(NUM_ITEMS)[1:]], dtype=pl.String))
    ids.write_parquet(folder / "items.parquet")
    with pytest.raises(DataError, match="without an id of their own"):
        Recommender.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["final_norm.bias"] = weights["final_norm.bias"].clone()
    weights["final_norm.bias"][3] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(AssetError, match=r"final_norm\.bias holds NaN or infinity"):
        Recommender.from_pretrained(folder)


def test_weights_that_are_no_floats(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.to(torch.int8) for k, v in weights.items()}, folder / "model.safetensors")
    with pytest.raises(AssetError, match="holds 'I8'; expected floating point"):
        Recommender.from_pretrained(folder)


# ---- the package --------------------------------------------------------------------------------


def test_the_package_offers_it_without_loading_what_it_does_not_need():
    code = (
        "import sys, cotrain; assert 'torch' not in sys.modules;"
        "from cotrain import Recommender;"
        "print([m for m in ('transformers', 'accelerate', 'sentence_transformers') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
