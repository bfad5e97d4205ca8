"""torch.compile, layer by layer, where the same code serves every layer, length and batch."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cotrain.teacher.backbone import Backbone


def compiling_pays(backbone: Backbone) -> bool:
    """Where it has been measured to: on a CPU with bf16 products, if there is a C++ compiler."""
    on_cpu = backbone.device.type == "cpu" and backbone.compute == "bf16"
    return on_cpu and any(map(shutil.which, ("g++", "clang++")))


def compile_layers(backbone: Backbone) -> None:
    """Compile the decoder's layers, at their first use, for any number of rows and tokens.

    Layers share their code, so it is compiled once for all of them and not once for each, and the
    whole takes seconds and not minutes.
    """
    import torch._dynamo

    # Otherwise a layer's own number, which a cache asks for, would make each layer another program.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for layer in _layers(backbone):
        layer.forward = torch.compile(layer.forward, dynamic=True)
    backbone.compiled = True


def uncompile_layers(backbone: Backbone) -> None:
    """Undo `compile_layers`."""
    for layer in _layers(backbone):
        compiled: Any = layer.forward
        layer.forward = compiled._torchdynamo_orig_callable
    backbone.compiled = False


def _layers(backbone: Backbone) -> list[nn.Module]:
    names = set(backbone.model._no_split_modules or ())
    return [module for module in backbone.model.modules() if type(module).__name__ in names]


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Compiled layers run as they are written."""
    with torch.compiler.set_stance("force_eager"):
        yield
