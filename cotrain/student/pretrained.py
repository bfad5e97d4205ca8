"""The files of a saved student: found in a folder or on the hub, checked, read and written.

A saved folder is material from somewhere: every file is checked before it is believed, and nothing
in it is ever run. Weights are safetensors; pickled weights are never opened.
"""

import inspect
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import CONFIG_NAME, REPOCARD_NAME, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import nn

from cotrain.data import catalog
from cotrain.errors import AssetError, ConfigError, some_of
from cotrain.student.architectures import class_name
from cotrain.student.protocol import Student
from cotrain.student.sasrec import SASRec

# In config.json beside the model's own arguments: which class they are of.
ARCHITECTURE = "architecture"
_NEEDED = [CONFIG_NAME, SAFETENSORS_SINGLE_FILE, catalog.FILE]
_PICKLED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"]
_REMEDY = "Give a folder that `Recommender.save_pretrained` or a finished run wrote."


def find_folder(
    name_or_folder: str | Path, *, revision: str | None = None, **download: Any
) -> Path:
    """Folder with the files of a saved student; a hub name is downloaded into the hub's cache.

    Args:
        name_or_folder: Local folder, or else a hub name such as "owner/name".
        revision: Branch, tag or commit on the hub; none: the latest.
        download: Further arguments of `huggingface_hub.snapshot_download`.

    Raises:
        AssetError: No such folder, no such name, no network, or files are missing.
        ConfigError: A revision of a local folder.
    """
    local = Path(name_or_folder).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ConfigError(
                f"revision is {revision!r}, but {local} is a local folder, which has no revisions. "
                "Leave it, or give a hub name that is no folder here."
            )
        folder = local
    elif isinstance(name_or_folder, Path) or name_or_folder.startswith((".", "/", "~")):
        raise AssetError(f"There is no folder {local}. {_REMEDY}")
    else:
        folder = _download(name_or_folder, revision, download)
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        pickled = [path.name for pattern in _PICKLED for path in folder.glob(pattern)]
        refused = f" Pickled weights ({some_of(sorted(pickled))}) are never opened."
        raise AssetError(
            f"{name_or_folder} is no saved student: it lacks {some_of(missing)}."
            f"{refused if pickled else ''} {_REMEDY}"
        )
    return folder


def _download(name: str, revision: str | None, download: dict[str, Any]) -> Path:
    try:
        # One snapshot, so that weights and catalogue are of the same commit. No other file of the
        # repository, pickled weights among them, even reaches this machine.
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*_NEEDED, REPOCARD_NAME],
            library_name="cotrain",
            **download,
        )
    # The hub's client lets errors of its HTTP library through, which differs between its versions.
    except Exception as error:
        raise AssetError(
            f"{name!r} is no folder here, and {revision or 'the latest revision'} of it cannot be "
            f"had from the hub: {error}\nCheck the name and the network, log in with `hf auth "
            "login` where it is private, or give a local folder."
        ) from error
    return Path(folder)


def write_model(model: Student, folder: Path) -> None:
    """Writes `model.safetensors`, then `config.json`, without which nobody reads a half-written
    folder."""
    save_model(cast("nn.Module", model), str(folder / SAFETENSORS_SINGLE_FILE))
    config = {ARCHITECTURE: class_name(type(model)), **model.settings}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def saved_architecture(folder: Path) -> Any:
    """What class the saved model is of, in the words of its file.

    Raises:
        AssetError: The file is no JSON object.
    """
    return _read_json(folder / CONFIG_NAME).get(ARCHITECTURE, SASRec.__name__)


def read_config(folder: Path, kind: type[Any] = SASRec) -> dict[str, Any]:
    """The arguments that the saved model is built with.

    An argument that the file lacks has its default: files of older versions stay readable.

    Args:
        folder: What `write_model` wrote into.
        kind: The class that it should be of.

    Raises:
        AssetError: No JSON object, another architecture, unknown names or impossible values.
    """
    path = folder / CONFIG_NAME
    config = _read_json(path)
    saved = str(config.pop(ARCHITECTURE, SASRec.__name__))
    # Of a class of the user's own the module may have moved.
    if saved.rpartition(":")[2] != kind.__qualname__:
        raise AssetError(
            f"{path} is of the architecture {saved!r}, not {kind.__qualname__!r}. A saved folder "
            "holds no code, and no code is run on its word: import the class yourself and give it "
            "as `architecture`, or name another folder."
        )
    problems = _problems(config) if kind is SASRec else _wrong_names(config, kind)
    if problems:
        raise AssetError(f"{path} describes no {saved}: {'; '.join(problems)}. {_REMEDY}")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AssetError(f"{path} cannot be read as JSON: {error}. {_REMEDY}") from error
    if not isinstance(config, dict):
        raise AssetError(f"{path} holds {type(config).__name__}; expected an object. {_REMEDY}")
    return config


def _parameters(kind: type[Any]) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(kind.__init__).parameters)
    del parameters["self"]
    return parameters


def _wrong_names(config: dict[str, Any], kind: type[Any]) -> list[str]:
    """Arguments that a class does not take, or misses."""
    parameters = _parameters(kind)
    unknown = sorted(config.keys() - parameters.keys())
    missing = [
        name
        for name, parameter in parameters.items()
        if name not in config and (parameter.default is parameter.empty or name == "num_items")
    ]
    problems = [f"{name} is missing" for name in missing]
    if unknown:
        problems.insert(0, f"unknown keys {some_of(unknown)}, expected of {', '.join(parameters)}")
    return problems


def _problems(config: dict[str, Any]) -> list[str]:
    problems = _wrong_names(config, SASRec)
    for name, parameter in _parameters(SASRec).items():
        if name not in config:
            continue
        if not _fits(config[name], parameter.annotation):
            kind = getattr(parameter.annotation, "__name__", parameter.annotation)
            problems.append(f"{name} is {config[name]!r}, expected {kind}")
        elif parameter.annotation is int and config[name] < 1:
            problems.append(f"{name} is {config[name]}, expected 1 or more")
        elif name == "dropout" and not 0 <= config[name] < 1:
            problems.append(f"dropout is {config[name]}, expected 0 or more and below 1")
    heads, size = (config.get(name) for name in ("num_heads", "hidden_size"))
    if not problems and heads and size and size % heads:
        problems.append(f"hidden_size {size} is not a multiple of num_heads {heads}")
    return problems


def _fits(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return value in typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(annotation))
    # Not isinstance: True is an int, and no size. A whole number is a fine float.
    return type(value) is annotation or (annotation is float and type(value) is int)


def read_model(
    folder: Path, config: dict[str, Any], device: str | torch.device, kind: type[Any] = SASRec
) -> Student:
    """The saved model in evaluation mode.

    Args:
        folder: What `write_model` wrote.
        config: Of `read_config`.
        device: Where the weights go.
        kind: The class that it is of.

    Raises:
        AssetError: The weights are unreadable, of other shapes than the config says, no floating
            point numbers, or not finite.
    """
    path = folder / SAFETENSORS_SINGLE_FILE
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            model = _empty_model(kind, config, file, path, device)
            with torch.no_grad():
                for name, place in model.state_dict().items():
                    # Copied: the file stays mapped, and may be written over while the model lives.
                    weights = file.get_tensor(name)
                    if not torch.isfinite(weights).all():
                        raise AssetError(f"{path}: {name} holds NaN or infinity. {_REMEDY}")
                    place.copy_(weights)
    except (SafetensorError, OSError) as error:
        raise AssetError(f"{path} cannot be read as safetensors: {error}. {_REMEDY}") from error
    return model.eval()


def _empty_model(
    kind: type[Any], config: dict[str, Any], file: Any, path: Path, device: Any
) -> Any:
    """A model without values, of the shapes that config and file agree on."""
    saved = {name: file.get_slice(name) for name in sorted(file.keys())}
    # The config is not to make this machine build a billion blocks, or room for them.
    layers = config.get("num_layers")
    if isinstance(layers, int) and layers > len(saved):
        raise AssetError(
            f"{path} holds {len(saved)} tensors, too few for num_layers {layers} in "
            f"{CONFIG_NAME}. {_REMEDY}"
        )
    try:
        with torch.device("meta"):
            model = kind(**config)
    except Exception as error:  # sizes beyond what PyTorch can count, or what a user's class raises
        reason = str(error).partition("\n")[0]
        raise AssetError(f"{CONFIG_NAME} beside {path} cannot be built: {reason}") from error
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    unsaved = sorted({name for name, _ in model.named_buffers()} - expected.keys())
    if unsaved:
        raise AssetError(
            f"{kind.__qualname__} has buffers that are not saved and would stay without values: "
            f"{some_of(unsaved)}. Register them with persistent=True."
        )
    wrong = [
        f"{name} is {_shape(saved, name)}, expected {expected.get(name, 'absent')}"
        for name in sorted(saved.keys() | expected.keys())
        if name not in saved or saved[name].get_shape() != expected.get(name)
    ]
    if wrong:
        raise AssetError(
            f"{path} does not hold the weights that {CONFIG_NAME} describes: {some_of(wrong)}. "
            f"{_REMEDY}"
        )
    kinds = sorted({saved[name].get_dtype() for name in saved} - {"F64", "F32", "F16", "BF16"})
    if kinds:
        raise AssetError(f"{path} holds {some_of(kinds)}; expected floating point weights.")
    return model.to_empty(device=device)


def _shape(saved: dict[str, Any], name: str) -> list[int] | str:
    return saved[name].get_shape() if name in saved else "absent"
