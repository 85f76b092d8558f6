"""Calls of another thread at every state of the model while a run is opened or closed."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from hf_models import make_model, make_plan, random_ids, snapshot

from dynmask.hf import accelerate, attach, compat, switch

FILES = {attach.__file__, switch.__file__}
# Where a call is, in steps of the other thread: it starts, and runs its second half.
PLACES = ("here and here", "before and here", "here and afterwards")


class Call(threading.Thread):
    """A forward pass of its own thread, which can be stopped after the second layer of three."""

    def __init__(self, model, ids):
        super().__init__()
        self.model, self.ids = model, ids
        self.half, self.on = threading.Event(), threading.Event()
        self.found = None

    def run(self):
        try:
            with torch.no_grad():
                self.found = self.model(self.ids).logits
        except ValueError as error:
            self.found = error
        finally:
            self.half.set()

    def hook(self, *_):
        if threading.current_thread() is self:
            self.half.set()
            assert self.on.wait(60)

    def first_half(self):
        self.handle = self.model.model.layers[1].register_forward_hook(self.hook)
        self.start()
        assert self.half.wait(60)

    def second_half(self):
        self.on.set()
        self.join()
        self.handle.remove()


def state(model):
    """What of a module decides which attention runs, for each module."""
    marks = []
    for module in model.modules():
        config = vars(module).get("config")
        name = getattr(config, "_attn_implementation", None)
        marks.append((id(config), name, compat.ATTACHED in vars(module)))
    return marks


def at_state(model, act, number, then):
    """Run ``act`` and ``then()`` in that one of the model's states; returns how many there are."""
    count, last = 0, None

    def trace(frame, event, _):
        nonlocal count, last
        if frame.f_code.co_filename not in FILES:
            return None
        if event in ("line", "return") and (now := state(model)) != last:
            last = now
            if count == number:
                then()
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", ["open", "close"])
@pytest.mark.parametrize("configs", ["one configuration", "one each"])
def test_a_call_at_every_state(monkeypatch, configs, way, place):
    model, ids = make_model("gemma3"), random_ids(1, 11)
    if configs == "one each":
        for layer in model.model.layers:
            layer.self_attn.config = copy.copy(model.config)
    plan, before = make_plan(model), snapshot(model)
    monkeypatch.setattr(attach, "_check_plan", lambda *_: None)  # Slow, and looks on only.
    with torch.no_grad():
        plain = model(ids).logits
        with accelerate(model, plan, mode="static"):
            ours = model(ids).logits
    assert not torch.allclose(plain, ours, rtol=0.1, atol=0.1)
    ends, number, states = [], 0, 1
    while number < states:
        call, runs = Call(model, ids), []

        def open_run(runs=runs):
            runs.append(accelerate(model, plan, mode="static"))

        def here(call=call):
            if place != "before and here":
                call.first_half()
            if place != "here and afterwards":
                call.second_half()

        if way == "close":
            open_run()
        if place == "before and here":
            call.first_half()
        act = open_run if way == "open" else runs[0].close
        states = at_state(model, act, number, here)
        if place == "here and afterwards":
            call.second_half()
        runs[0].close()
        assert snapshot(model) == before
        if isinstance(call.found, ValueError):
            assert "accelerate()" in str(call.found)
            ends.append("error")
        else:
            same = (torch.allclose(call.found, x, rtol=1e-4, atol=1e-4) for x in (plain, ours))
            ends.append({(True, False): "plain", (False, True): "ours"}[tuple(same)])
        number += 1
    assert states > 6
    first, last = ("plain", "ours") if way == "open" else ("ours", "plain")
    assert ends[0] == ("error" if place == "here and afterwards" else first)
    assert ends[-1] == ("error" if place == "before and here" else last)
