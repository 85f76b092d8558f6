"""examples/calibrate_and_serve.py: the server's models are accelerated, and answer over HTTP."""

import json
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dynmask

pytest.importorskip("accelerate", reason="transformers serve needs accelerate to load a model")
PROMPT = "It was a cold day. The old man walked to the river, and he did not look back! " * 8


@pytest.fixture
def serving(example):
    return example("calibrate_and_serve")


@pytest.fixture
def plan(serving, dense_folder, text_files, tmp_path):
    texts = [Path(path).read_text() for path in text_files]
    folder = tmp_path / "plan"
    settings = {"capture_length": 64, "coverage_length": 128}
    serving.load_or_make_plan(folder, dense_folder, texts, **settings)
    serving.load_or_make_plan(folder, dense_folder, [], **settings)  # it is there: nothing is done
    return dynmask.MaskPlan.load(folder)


def written(model, tokenizer):
    """What a model writes behind the prompt."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_manager_s_models_are_accelerated(serving, plan, dense_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    dense = written(model, tokenizer)
    with dynmask.accelerate(model, plan, mode="static"):
        sparse = written(model, tokenizer)
    assert sparse != dense
    manager = serving.manager(plan, "static")(device="cpu", force_model=dense_folder)
    (loaded,) = (timed.model for timed in manager.loaded_models.values())
    assert written(loaded, tokenizer) == sparse
    with pytest.raises(ValueError, match="inside accelerate"):
        dynmask.accelerate(loaded, plan)
    manager.shutdown()


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["accelerated", "dma"])
def test_generate_takes_the_tokenizer_that_the_server_gives(
    kind, beams, dense_folder, dma_folder, tokenizer
):
    """generate hands its tokenizer on to the model, for no use."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    options = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    if kind == "dma":
        model = dynmask.DmaForCausalLM.from_pretrained(dma_folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(dense_folder)
        dynmask.accelerate(model)
    made = model.generate(**prompt, **options)
    stop = {"stop_strings": ["no such end"], "tokenizer": tokenizer}
    assert torch.equal(model.generate(**prompt, **options, **stop), made)
    written = tokenizer.decode(made[0, prompt["input_ids"].shape[1] :])
    stop["stop_strings"] = [written[:3]]
    if beams == 1:  # other beams may go on
        assert len(model.generate(**prompt, **options, **stop)[0]) < len(made[0])


@pytest.fixture
def ask(serving, monkeypatch):
    """Serve a model and send one completion; returns the text."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="needs pip install 'transformers[serving]'")
    servers = []

    def ask(folder, *arguments):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        servers.append(
            serving.serve(
                folder,
                *arguments,
                mode="static" if arguments else "auto",
                port=port,
                device="cpu",
                non_blocking=True,
            )
        )
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stop": ["no such end"]}
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        for _ in range(100):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.load(answer)["choices"][0]["text"]
            except urllib.error.HTTPError:
                raise
            except urllib.error.URLError:
                time.sleep(0.1)  # The server thread is not up yet.
        raise AssertionError("no server")

    yield ask
    for server in servers:
        server.kill_server()


def test_dense_model_is_served_by_its_plan(ask, plan, dense_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    with dynmask.accelerate(model, plan, mode="static"):
        expected = written(model, tokenizer)
    assert ask(dense_folder, plan) == expected


def test_dma_checkpoint_is_served(ask, dma_folder, tokenizer):
    model = dynmask.DmaForCausalLM.from_pretrained(dma_folder)
    assert ask(dma_folder) == written(model, tokenizer)
    with torch.no_grad():
        model.config.keep = None
        assert ask(dma_folder) != written(model, tokenizer)
