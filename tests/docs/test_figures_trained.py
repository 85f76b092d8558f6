"""What the README and docs say of trained methods, and beside the papers, is in the kept JSON."""

from kept_results import cells, document, lines, text


def trained(name, part):
    """Rows of a part at the first seed, by method."""
    rows = [row for row in lines(f"trained_{name}") if row["part"] == part]
    found = {}
    for row in rows:
        if row.get("seed") == 0:
            found.setdefault(row["method"], []).append(row)
    return found, [row for row in rows if "times" in row]


def test_trained_from_scratch():
    found = {
        method.replace("-", "_"): min(rows, key=lambda row: row["valid_loss"])
        for method, rows in trained("scaling", "10M")[0].items()
    }
    found = {method: f"{row['perplexity']['score']:.1f}" for method, row in found.items()}
    said = (
        "perplexity {mha} with full attention, {swa} with a sliding window, {nsa} with NSA, "
        "{mla} with MLA and {dma} with DMA"
    )
    readme = text("README.md")
    assert said.format(**found) in readme
    assert "; {dma_window} with [`DmaConfig(window=256)`]".format(**found) in readme
    said = "perplexity {dma} against {mha} with full attention and {dma_window} with a `window`"
    assert said.format(**found) in text("docs/guide/limits.md")
    said = "{dma_window} with half of the keys nearest, {dma} without and {mha} with full attention"
    assert said.format(**found) in text("docs/dma.md")


def test_associative_recall():
    rows, (times,) = trained("mqar", "d128, 512 pairs")

    def right(row):
        return {at["length"]: 100 * at["accuracy"] for at in row["lengths"]}

    best = {}
    for method, runs in rows.items():
        assert len(runs) == 4
        best[method] = right(max(runs, key=lambda row: sum(right(row).values())))
    found = {m: f"{at[2048]:.1f} / {at[8192]:.1f}" for m, at in best.items()}
    said = (
        "DMA answers {dma} %, NSA {nsa}, a sliding window {swa}, full attention {mha} and MLA {mla}"
    )
    readme = text("README.md")
    assert said.format(**found) in readme
    (long,) = [at["seconds"] for at in times["times"] if at["length"] == 8192]
    ratio = long["dma"]["median"] / long["mha"]["median"]
    assert f"over rows of 8K takes {ratio:.2f} of full attention's time" in readme


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
    books = {
        method.replace("-", "_"): min(rows, key=lambda row: row["valid_loss"])["perplexity"]
        for method, rows in trained("scaling", "10M")[0].items()
    }
    books = {method: f"{found['score']:.1f}" for method, found in books.items()}
    said = "DMA {dma}, with half of the keys nearest {dma_window}; MHA {mha}, SWA {swa}, "
    assert (said + "NSA {nsa}, MLA {mla}").format(**books) in page
    recall = {
        method: max(
            ({at["length"]: 100 * at["accuracy"] for at in row["lengths"]} for row in rows),
            key=lambda at: sum(at.values()),
        )[8192]
        for method, rows in trained("mqar", "d128, 512 pairs")[0].items()
    }
    said = "DMA {dma:.1f} %, NSA {nsa:.1f}, SWA {swa:.1f}; MHA {mha:.1f}, MLA {mla:.1f}"
    assert said.format(**recall) in page
    table = {(c["length"], c["call"]): c for c in cells("gpu_table2")}
    ratios = [table[n, "prefill"]["ratio_step"]["median"] for n in (4096, 16384, 32768)]
    assert "timed as well: {:.1f}x, {:.1f}x, {:.1f}x".format(*ratios) in page
    rows = [table[32768, call]["ratio_step"]["median"] for call in ("bounded", "decode")]
    assert "{:.1f}x from a bounded cache, {:.1f}x over the whole".format(*rows) in page
