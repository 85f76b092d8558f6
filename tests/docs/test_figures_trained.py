"""What the README and docs say of trained methods, and beside the papers, is in the kept JSON."""

import math
import statistics

from kept_results import cells, document, lines, text


def chosen(name, part, worst):
    """Runs of a part by method, all seeds at the rate that is least in `worst` at the first."""
    rows = [row for row in lines(f"trained_{name}") if row["part"] == part and "times" not in row]
    found = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [r for r in rows if r["method"] == method and "diverged" not in r]
        best = min((row for row in mine if row["seed"] == 0), key=worst)
        found[method.replace("-", "_")] = [row for row in mine if row["lr"] == best["lr"]]
    return found


def perplexities(part="10M"):
    """Of models of a size, each seed's."""
    runs = chosen("scaling", part, lambda row: row["valid_loss"])
    return {name: [row["perplexity"]["score"] for row in mine] for name, mine in runs.items()}


def above_full():
    """How much higher perplexity is than full attention's, window by window at the same seeds."""
    runs = chosen("scaling", "10M", lambda row: row["valid_loss"])
    loss = {
        name: {row["seed"]: statistics.fmean(row["perplexity"]["rows"]) for row in mine}
        for name, mine in runs.items()
    }
    return {
        name: math.expm1(statistics.fmean(each[seed] - loss["mha"][seed] for seed in each))
        for name, each in loss.items()
    }


def right(row):
    return {at["length"]: 100 * at["accuracy"] for at in row["lengths"]}


def recalled(length, part="d128, 512 pairs"):
    """Right values in percent, each seed's."""
    runs = chosen("mqar", part, lambda row: -sum(right(row).values()))
    return {name: [right(row)[length] for row in mine] for name, mine in runs.items()}


def means(found):
    return {name: f"{statistics.fmean(each):.1f}" for name, each in found.items()}


def test_trained_from_scratch():
    each = perplexities()
    found = means(each)
    assert all(len(seeds) == 3 for seeds in each.values())
    said = (
        "perplexity {mha} with full attention ({low:.1f} to {high:.1f}), {swa} with a sliding "
        "window, {nsa} with NSA, {mla} with MLA and {dma} with DMA"
    )
    readme = text("README.md")
    assert said.format(**found, low=min(each["mha"]), high=max(each["mha"])) in readme
    assert "; {dma_window} with [`DmaConfig(window=256)`]".format(**found) in readme
    limits = text("docs/guide/limits.md")
    said = "perplexity {dma} against {mha} with full attention and {dma_window} with a `window`"
    assert said.format(**found) in limits
    more = above_full()
    said = "DMA is {dma:.0%} above full attention, with the window {dma_window:.0%}."
    assert said.format(**more).replace("%", " %") in readme
    said = "perplexity is {dma:.0%} higher, with a `window` {dma_window:.0%}, seed"
    assert said.format(**more).replace("%", " %") in limits


def test_larger_again_and_past_the_trained_length():
    readme = text("README.md")
    larger = perplexities("30M")
    assert all(len(seeds) == 1 for seeds in larger.values())
    said = (
        "{swa} sliding window, {nsa} NSA, {mha} full attention, {mla} MLA, {dma} DMA; DMA with the "
        "window is at {dma_window}."
    )
    assert said.format(**means(larger)) in readme
    for found in (larger, perplexities()):
        order = sorted(found, key=lambda name: statistics.fmean(found[name]))
        assert [n for n in order if n != "dma_window"] == ["swa", "nsa", "mha", "mla", "dma"]
    again = next(row for row in lines("trained_scaling_again") if row["method"] == "mha")
    (first,) = [row for row in lines("trained_scaling") if row["key"] == again["key"]]
    assert (first["compiled"], again["compiled"]) == (True, False)
    twice = [row["perplexity"]["score"] for row in (first, again)]
    assert "came to {:.1f} under torch.compile and {:.1f} without;".format(*twice) in readme

    needles = {
        (row["method"], row["length"]): f"{100 * row['result']['score']:.0f}"
        for row in lines("trained_past")
        if row["task"] == "needle"
    }
    said = (
        "full attention finds {mha[0]} % in 4,096 tokens, as trained, and {mha[1]} % in 8,192; NSA "
        "{nsa[0]} and {nsa[1]} %, DMA {dma[0]} and {dma[1]} %, with the window {near[0]} and "
        "{near[1]} %."
    )
    methods = {"mha": "mha", "nsa": "nsa", "dma": "dma", "near": "dma-window"}
    asked = {name: [needles[m, at] for at in (4096, 8192)] for name, m in methods.items()}
    assert said.format(**asked) in readme
    said = "asked at 8,192: DMA {dma[1]} %, with half of the keys nearest {near[1]}; MHA {mha[1]}, "
    assert (said + "NSA {nsa[1]} ([").format(**asked) in text("docs/results/papers.md")


def test_more_nearest_keys():
    """The mechanism page's rows of text, as other pages tell them."""
    rows = {row["method"]: row for row in lines("trained_mechanism") if row["part"] == "text"}
    found = {name: f"{row['perplexity']['score']:.1f}" for name, row in rows.items()}
    said = (
        "perplexity is {0[base]} where scores choose all of them, {0[half of them nearest]} where "
        "half of them are the nearest, {0[all but one nearest]} where all but one are, and "
        "{0[all keys]} with all 4,096"
    )
    page = text("docs/dma.md")
    assert said.format(found) in page
    said = "full attention without scores, at its own best rate, is at {mha} "
    assert said.format(**means(perplexities())) in page


def test_facts_want_more_keys():
    """The mechanism page's rows of recall, mean of three seeds, as other pages tell them."""
    own, doubled = {}, []
    for row in lines("trained_mechanism"):
        if row["part"] == "recall":
            own.setdefault(row["method"], []).append(100 * row["recall"][-1]["accuracy"])
            if row["method"] == "base":
                doubled.append(100 * row["keep_changed"][1]["recall"][-1]["accuracy"])
    assert all(len(seeds) == 3 for seeds in own.values())
    found = {name: f"{statistics.fmean(seeds):.0f}" for name, seeds in own.items()}
    said = (
        "64 kept keys answer {0[base]} % ({low:.0f} to {high:.0f} by the seed), 128 answer "
        "{0[2 w]} %, all keys {every:.1f} %; the models trained with 64 answer {doubled:.0f} % "
        "with 128 at inference. 32 of 64 nearest answer {0[half of them nearest]} %, all but one "
        "{0[all but one nearest]} %"
    )
    given = {"low": min(own["base"]), "high": max(own["base"])}
    given |= {"every": statistics.fmean(own["all keys"]), "doubled": statistics.fmean(doubled)}
    page = " ".join(text("docs/dma.md").split())
    assert said.format(found, **given) in page
    fixed = own["Wdt and A fixed"]
    ends = {"low": min(fixed), "high": max(fixed)}
    said = "64 kept keys answer {:.0f} % ({low:.0f} to {high:.0f} by the seed). The score"
    assert said.format(statistics.fmean(fixed), **ends) in page


def test_associative_recall():
    short, long = recalled(2048), recalled(8192)
    assert all(len(seeds) == 3 for seeds in long.values())
    early, late = means(short), means(long)
    found = {method: f"{early[method]} / {late[method]}" for method in early}
    said = (
        "DMA answers {dma} % ({low:.0f} to {high:.0f} and {lowest:.0f} to {highest:.0f}), NSA "
        "{nsa}, a sliding window {swa}, full attention {mha} and MLA {mla}"
    )
    ends = {"low": min(short["dma"]), "high": max(short["dma"])}
    ends |= {"lowest": min(long["dma"]), "highest": max(long["dma"])}
    readme = text("README.md")
    assert said.format(**found, **ends) in readme
    (times,) = [
        row for row in lines("trained_mqar") if row["part"] == "d128, 512 pairs" and "times" in row
    ]
    (at,) = [at["seconds"] for at in times["times"] if at["length"] == 8192]
    ratio = at["dma"]["median"] / at["mha"]["median"]
    assert f"over rows of 8K takes {ratio:.2f} of full attention's time" in readme
    wide = recalled(8192, "d256, 512 pairs")
    said = "at 8K, DMA answers {dma} % ({:.0f} to {:.0f}), NSA {nsa} ({:.0f} to {:.0f})"
    ends = [end(wide[name]) for name in ("dma", "nsa") for end in (min, max)]
    assert said.format(*ends, **means(wide)) in readme
    took = {name: 1e3 * x["median"] for name, x in at.items()}
    said = "in {nsa:.1f} ms on an H200, full attention in {mha:.1f}."
    assert said.format(**took) in text("CHANGELOG.md")


def test_beside_the_papers():
    page = text("docs/results/papers.md")
    got = {
        (r["checkpoint"].split()[0].strip(","), r["task"]["name"], r["method"]): 100 * r["score"]
        for r in lines("compare")
        if r["checkpoint"].endswith("H200") and r["target"] in (0.985, 1.0) and "score" in r
    }
    said = []
    for name, length in (("embedded", "8K"), ("28M", "16K")):
        pair = [got[name, f"lines {length}", method] for method in ("dynamic", "full")]
        said.append("{:.1f} against {:.1f} % at {}".format(*pair, length))
    assert f"masks made from the input: {', '.join(said)}" in page
    asked = [row for row in document("demo")["quality"] if row["task"] == "LongEval, 200 lines"]
    static, full = (next(r for r in asked if r["mode"] == mode) for mode in ("static", "full"))
    assert f"{100 * static['score']:.1f} against {100 * full['score']:.0f} %" in page
    models = {
        (c["length"], c["kept"]): c["times"]
        for c in cells("dynamic_gpu")
        if (c["part"], c["shape"]) == ("model", "1B")
    }
    less = {
        name: [
            100 * (1 - t["dynamic"]["median"] / t[name]["median"])
            for t in (models[32768, 0.1], models[32768, 0.025])
        ]
        for name in ("flash", "cudnn")
    }
    said = "{:.0f} to {:.0f} % less than with flash, ".format(*less["flash"])
    assert said + "{:.0f} to {:.0f} % less than with cuDNN".format(*less["cudnn"]) in page
    seconds = models[1 << 20, 0.025]["dynamic"]["median"]
    assert f"a million tokens in {seconds:.0f} s" in page
    (capped,) = document("capped_needle")["quality"]
    assert f"answers {100 * capped['score']:.1f} % of the needles" in page
    said = "DMA {dma}, with half of the keys nearest {dma_window}; MHA {mha}, SWA {swa}, "
    assert (said + "NSA {nsa}, MLA {mla}").format(**means(perplexities())) in page
    said = "DMA {dma} %, NSA {nsa}, SWA {swa}; MHA {mha}, MLA {mla}"
    assert said.format(**means(recalled(8192))) in page
    more = means(recalled(8192, "d128, 2048 pairs"))
    assert "of 2,048 pairs {dma} %, NSA {nsa}, SWA {swa}; MHA {mha}".format(**more) in page
    wide = recalled(8192, "d256, 512 pairs")
    assert all(len(seeds) == 3 for seeds in wide.values())
    assert "twice as wide {dma} %, NSA {nsa}, SWA {swa}".format(**means(wide)) in page
    table = {(c["length"], c["call"]): c for c in cells("gpu_table2")}
    ratios = [table[n, "prefill"]["ratio_step"]["median"] for n in (4096, 16384, 32768)]
    assert "timed as well: {:.1f}x, {:.1f}x, {:.1f}x".format(*ratios) in page
    rows = [table[32768, call]["ratio_step"]["median"] for call in ("bounded", "decode")]
    assert "{:.1f}x from a bounded cache, {:.1f}x over the whole".format(*rows) in page
