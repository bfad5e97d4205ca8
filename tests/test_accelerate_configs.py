"""Every file that a run can be launched by is read as accelerate and DeepSpeed read it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.deepspeed import HfDeepSpeedConfig

REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted((REPOSITORY / "accelerate_configs").glob("*.yaml"))
DEEPSPEED = sorted((REPOSITORY / "ds_configs").glob("*.json"))
EXPECTED = {
    "cpu": ("NO", 1, True),
    "cpu_2_processes": ("MULTI_GPU", 2, False),
    "single_gpu": ("NO", 1, False),
    "multi_gpu": ("MULTI_GPU", 4, False),
    "deepspeed_zero1": ("DEEPSPEED", 4, False),
    "deepspeed_zero2": ("DEEPSPEED", 4, False),
    "deepspeed_zero3": ("DEEPSPEED", 4, False),
    "deepspeed_zero2_offload": ("DEEPSPEED", 4, False),
    "multi_node_deepspeed": ("DEEPSPEED", 16, False),
    "deepspeed_cpu": ("DEEPSPEED", 2, False),
}


def test_the_files_are_those_that_the_readmes_name():
    assert {path.stem for path in CONFIGS} == set(EXPECTED)
    for paths in (CONFIGS, DEEPSPEED):
        readme = (paths[0].parent / "README.md").read_text()
        for path in paths:
            assert readme.count(f"| `{path.name}` |") == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it(path: Path):
    config: Any = load_config_from_file(str(path))
    kind, processes, on_cpu = EXPECTED[path.stem]
    assert (config.distributed_type, config.num_processes, config.use_cpu) == (
        kind, processes, on_cpu,
    )  # fmt: skip
    if kind == "DEEPSPEED":
        # Else accelerate refuses: what DeepSpeed's own file says must not be said twice.
        assert "mixed_precision" not in yaml.safe_load(path.read_text())
        assert (REPOSITORY / config.deepspeed_config["deepspeed_config_file"]) in DEEPSPEED
        # Weights in 4 bits cannot be sharded as they are loaded.
        assert config.deepspeed_config["zero3_init_flag"] is False
    else:
        assert config.mixed_precision == "no"


SCRIPT = """
from cotrain.runtime.processes import make_accelerator
found = make_accelerator()
print(f"{found.process_index} of {found.num_processes} on {found.device.type}")
"""


@pytest.mark.parametrize(("name", "count"), [("cpu", 1), ("cpu_2_processes", 2)])
def test_it_starts_as_many_processes_as_it_says(tmp_path: Path, name: str, count: int):
    """Regression: of a file that accelerate reads well it started one process of two."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    file = REPOSITORY / "accelerate_configs" / f"{name}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    done = subprocess.run(
        [*command, "--main_process_port", "0", str(script)], capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Lines of processes that write at a time may run together.
    told = re.findall(r"\d of \d on cpu", done.stdout)
    assert sorted(told) == [f"{n} of {count} on cpu" for n in range(count)]


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_reads_it(path: Path):
    config = HfDeepSpeedConfig(str(path))
    stage = int(path.stem.partition("zero")[2][0])
    assert config.get_value("zero_optimization.stage") == stage
    assert config.is_offload() == path.stem.endswith("offload")
    for name in ("train_micro_batch_size_per_gpu", "gradient_clipping"):
        assert config.get_value(name) == "auto"
    assert json.loads(path.read_text()).keys().isdisjoint({"optimizer", "scheduler", "fp16"})
