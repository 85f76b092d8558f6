"""Models and plans go to a hub and come back by name, from the hub and then from its cache."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import serving

from dynmask import MaskPlan

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "ecosystem.md"
COMMON = """
import json, torch, transformers
import dynmask.dma  # makes DMA checkpoints known to transformers
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
from dynmask.assets import load_texts, load_tokenizer

torch.set_num_threads(1)
ids = torch.arange(5, 305)[None]

@torch.no_grad()
def logits(model):
    return model(ids).logits
"""
PUSH = """
sizes = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
             max_position_embeddings=512, pad_token_id=1, bos_token_id=None, eos_token_id=0)
torch.manual_seed(0)
dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
dma = dynmask.DmaForCausalLM(dynmask.DmaConfig(**sizes, keep=16)).eval()
tokenizer = load_tokenizer()
for name, model in (("acme/dense", dense), ("acme/dma", dma)):
    model.push_to_hub(name)
    tokenizer.push_to_hub(name)
texts = [text[:2000] for text in load_texts("calibration")[:3]]
plan = dynmask.calibrate(dense, tokenizer, texts, capture_length=64, coverage_length=128)
plan.save("plan")

api = HfApi()
api.create_repo("acme/plan", exist_ok=True)
api.upload_folder(repo_id="acme/plan", folder_path="plan")
with dynmask.accelerate(dense, plan, mode="static"):
    sparse = logits(dense)
torch.save({"dense": logits(dense), "dma": logits(dma), "sparse": sparse}, "expected.pt")
"""
LOAD = """
expected = torch.load("expected.pt", weights_only=True)
dma = AutoModelForCausalLM.from_pretrained("acme/dma")
dense = AutoModelForCausalLM.from_pretrained("acme/dense")
tokenizer = AutoTokenizer.from_pretrained("acme/dma")
folder = snapshot_download("acme/plan")
plan = dynmask.MaskPlan.load(folder)
with dynmask.accelerate(dense, plan, mode="static"):
    sparse = logits(dense)
converted = dynmask.from_pretrained_dense("acme/dense", keep=None)
print(json.dumps({
    "kind": type(dma).__name__,
    "keep": dma.config.keep,
    "dma": torch.equal(logits(dma), expected["dma"]),
    "sparse": torch.equal(sparse, expected["sparse"]),
    "masks matter": not torch.allclose(expected["sparse"], expected["dense"], atol=1e-3),
    "converted": torch.allclose(logits(converted), expected["dense"], atol=1e-4),
    "tokenizer": len(tokenizer),
    "plan": folder,
}))
"""
SHOWN = """
model, made = dma, plan
plan.save("my-plan")
{block}
print(json.dumps(plan.inspect() == made.inspect()))
"""
RIGHT = {
    "kind": "DmaForCausalLM",
    "keep": 16,
    "dma": True,
    "sparse": True,
    "masks matter": True,
    "converted": True,
    "tokenizer": 4096,
}


def run(code, folder, **environment):
    """Run code in a process of its own: the hub's address is read when its client is imported."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    env = {
        **mine,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "hf_local",
        "HF_HUB_ETAG_TIMEOUT": "300",
        "HF_HUB_DOWNLOAD_TIMEOUT": "300",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=env,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What was loaded online, the folder of the cache, and the files on the hub."""
    folder, repos = tmp_path_factory.mktemp("hub"), {}
    with serving(repos) as address:
        loaded = run(PUSH + LOAD, folder, HF_ENDPOINT=address)
    return loaded, folder, repos


def test_pushed_models_and_plans_load_by_name(hub):
    loaded, _, repos = hub
    assert {key: loaded[key] for key in RIGHT} == RIGHT
    assert set(repos["acme/dma"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads(repos["acme/dma"]["config.json"])["model_type"] == "dma"
    kinds = sorted(name.rpartition(".")[2] for name in repos["acme/plan"])
    assert kinds == ["json", "safetensors"]


def test_the_guide_shows_what_works(tmp_path):
    (block,) = re.findall(r"^```py\n(.*?)^```$", GUIDE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    with serving(repos := {}) as address:
        assert run(PUSH + SHOWN.format(block=block), tmp_path, HF_ENDPOINT=address) is True
    assert {"me/my-dma", "me/my-plan"} <= repos.keys()


def test_they_load_from_the_cache_without_a_hub(hub):
    _, folder, _ = hub
    loaded = run(LOAD, folder, HF_HUB_OFFLINE="1")
    assert {key: loaded[key] for key in RIGHT} == RIGHT


def test_snapshots_are_links_and_saving_over_one_changes_no_blob(hub, tmp_path):
    loaded, _, _ = hub
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    blobs = {}
    for entry in os.scandir(loaded["plan"]):
        assert entry.is_symlink()
        target = Path(entry.path).resolve()
        blobs[target] = target.read_bytes()
        (snapshot / entry.name).symlink_to(target)
    plan = MaskPlan.load(snapshot).with_coverage(0.5)
    plan.save(snapshot)
    assert MaskPlan.load(snapshot).settings.coverage == 0.5
    assert {path: path.read_bytes() for path in blobs} == blobs
