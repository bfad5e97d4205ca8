"""Loading holds one full-precision copy of a teacher, the file, and never a second one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Memory beyond what importing takes. The file is mapped, and its pages can be dropped at any time;
# everything else, which cannot, is counted every two milliseconds.
MEASURE = """
import json, sys, threading, time
import bitsandbytes, torch
from transformers.models.llama import modeling_llama
from cotrain.teacher.backbone import load_backbone

def held():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        samples.append(held())

done, samples, before = threading.Event(), [], held()
watcher = threading.Thread(target=watch)
watcher.start()
backbone = load_backbone(sys.argv[1], sys.argv[2], torch.device("cpu"), sys.argv[3])
done.set()
watcher.join()
print(json.dumps({"peak": max(samples) - before, "after": held() - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("quantization", "compute", "peak", "after"),
    [
        ("nf4", "fp32", 0.9, 0.4),
        # 2 bytes a weight are left, and unpacking goes by way of 4.
        ("nf4", "bf16", 1.5, 0.75),
        pytest.param("int8", "auto", 0.9, 0.5, marks=pytest.mark.slow),
        pytest.param("bf16", "auto", 0.9, 0.6, marks=pytest.mark.slow),
        pytest.param("fp32", "auto", 0.5, 0.2, marks=pytest.mark.slow),
    ],
)
def test_loading_never_holds_two_full_precision_copies(
    smollm2: str, quantization: str, compute: str, peak: float, after: float
):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, smollm2, quantization, compute],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    size = (Path(smollm2) / "model.safetensors").stat().st_size
    assert found["peak"] < peak * size
    assert found["after"] < after * size
