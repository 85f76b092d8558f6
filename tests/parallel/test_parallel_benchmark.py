"""`benchmarks/parallel.py` in two processes on the CPU: all parts run, and a broken one is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "parallel.py"


def launch(out, *args, script=SCRIPT):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", str(script), "--device", "cpu", "--rounds", "1"]
    paths = [str(ROOT), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [*torchrun, "--out", str(out), *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return done, json.loads(out.read_text())


def names(cells):
    keys = ("part", "model", "size", "sharing")
    return [" ".join(cell[key] for key in keys if key in cell) for cell in cells]


def test_every_part(tmp_path):
    done, found = launch(tmp_path / "out.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (found["complete"], found["failed"], found["processes"]) == (True, [], 2)
    tensor = ["tensor dense", "tensor dynamic", "tensor dma"]
    train = ["train tiny ddp", "train tiny fsdp"]
    assert names(found["cells"]) == ["prefill", *tensor, *train]
    for cell in found["cells"]:
        alone, together = (cell[side]["median"] for side in ("alone", "together"))
        share = 1 if cell["part"] == "train" else 2
        assert cell["efficiency"]["median"] == pytest.approx(alone / together / share)
    cells = dict(zip(names(found["cells"]), found["cells"], strict=True))
    assert 0 < cells["tensor dynamic"]["density"] < 1, "the masks leave something out"
    assert all(cells[name]["error"] < 1e-9 for name in tensor)
    assert all(len(set(cells[name]["losses"])) == 1 for name in train)


BROKEN = """
import sys
import parallel, parallel_tensor
from transformers import LlamaForCausalLM

forward = LlamaForCausalLM.forward


def wrong(self, *args, **inputs):
    found = forward(self, *args, **inputs)
    if hasattr(self.model.layers[0].self_attn.q_proj.weight, "to_local"):
        found.logits = found.logits * 1.001
    return found


def breaks(*args):
    if parallel.dist.get_rank() == 0:
        raise MemoryError("full")
    return build(*args)


LlamaForCausalLM.forward = wrong
build, parallel.build = parallel.build, breaks
parallel.main()
"""


def test_a_part_that_fails_leaves_the_others(tmp_path):
    """Wrong logits of one model, and a process that runs out of memory before the others."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    done, found = launch(tmp_path / "out.json", "--sharing", "ddp", script=script)
    assert done.returncode == 1
    assert not found["complete"]
    said = {failure["part"]: failure["error"] for failure in found["failed"]}
    assert said.keys() == {"prefill", "tensor dense", "tensor dynamic"}
    assert "process 0: MemoryError: full" in said["prefill"]
    assert "dense: the logits of split and alone differ by 0.00" in said["tensor dense"]
    assert names(found["cells"]) == ["tensor dma", "train tiny ddp"]
