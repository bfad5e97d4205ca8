"""The ways to train a teacher, by name."""

from typing import Any

from cotrain.config import FinetuneConfig
from cotrain.errors import ConfigError
from cotrain.finetune import run
from cotrain.finetune.bigrec import bigrec
from cotrain.finetune.cot_sft import cot_sft
from cotrain.finetune.process_training import process_reward
from cotrain.finetune.rank_sft import rank_sft
from cotrain.finetune.rl import rl
from cotrain.finetune.star import star

METHODS: dict[str, run.Method] = {
    "rank-sft": rank_sft,
    "cot-sft": cot_sft,
    "star": star,
    "process-reward": process_reward,
    "rl": rl,
    "bigrec": bigrec,
}


def train(method: str, config: FinetuneConfig, last: bool = True) -> dict[str, Any]:
    """Train a teacher; arguments, result and errors as for `run.run`."""
    _check(method, config)
    mode: run.Mode = "cot"
    if method == "rank-sft":
        mode = "direct"
    elif method == "bigrec":
        mode = "bigrec" if config.bigrec.task == "title" else "pointwise"
    return run.run(method, METHODS[method], mode, config, last)


def _check(method: str, config: FinetuneConfig) -> None:
    """What one method needs and the others do not."""
    if method == "cot-sft" and config.cot.rationales is None:
        raise ConfigError(
            "cot.rationales is none; name the file or folder that "
            "scripts/generate_rationales.py wrote."
        )
    if method == "rl" and config.rl.process_weight and config.rl.process_reward is None:
        raise ConfigError(
            f"rl.process_weight is {config.rl.process_weight}, but rl.process_reward is none; name "
            "the folder that scripts/train_teacher.py process-reward wrote, or set "
            "rl.process_weight 0."
        )
