"""The tables of docs/ and the README say what the kept JSON says."""

import math

import pytest
from kept_results import ROOT, cells, document, lines, text

PAGE = (ROOT / "docs/results/dma.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST = text("docs/index.md")
LIMITS = (ROOT / "docs/guide/limits.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("cell", cells("train_speed"), ids=lambda c: f"{c['size']}-{c['length']}")
def test_training_speed(cell):
    speed = [f"{cell['tokens_per_second'][name]:,.0f}" for name in ("dma", "cudnn", "flash")]
    low, middle, high = (f"{cell['ratio'][part]:.2f}" for part in ("low", "median", "high"))
    row = f"| {cell['size']} | {cell['length']:,} | {' | '.join(speed)} | {middle}x [{low}, {high}]"
    assert row in PAGE


@pytest.mark.parametrize("cell", cells("dma_prefill"), ids=lambda c: f"{c['model']}-{c['length']}")
def test_long_prompts(cell):
    length = "1M" if cell["length"] == 1 << 20 else f"{cell['length'] >> 10}K"
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {length} |")]
    values = [value.strip() for value in row.strip("|").split("|")]
    column = {"dma": 1, "dense cudnn": 2, "dense flash": 3}[cell["model"]]
    dense = int(column > 1)
    assert values[column] == f"{cell['prefill']['median']:.3f}"
    assert values[4 + dense] == f"{cell['peak_bytes'] / 2**30:.2f}"
    assert values[6 + dense] == f"{cell['cache_bytes'] / 2**20:,.0f}"


@pytest.mark.parametrize("cell", cells("stripes_gpu_backward"), ids=lambda c: f"{c['kind']}")
def test_backward_of_stripes_and_blocks(cell):
    rows = PAGE[PAGE.index("## Gradients under") :].splitlines()
    (row,) = [line for line in rows if line.startswith(f"| {cell['length']:,} |")]
    values = row.strip("|").split("|")
    kinds = ["dam", "columns", "streaming", "blocks"]
    assert values[1 + kinds.index(cell["kind"])].split()[0] == f"{cell['ratio']:.2f}x"


RECALL = {
    "lines_200": "| 200 lines, 4.9K tokens |",
    "lines_360": "| 360 lines, 8.1K tokens |",
    "ruler": "| needles in 8K tokens, RULER's form |",
    "minference": "| needles in 8K tokens, MInference's form |",
    "multikey_2": "| one key among hundreds",
    "keyvalue": "| 350 key-value pairs of words, 7K tokens |",
}


DECODE = {
    "lines_200": "| 200 lines, 4.1K tokens |",
    "lines_360": "| 360 lines, 7.3K tokens |",
    "needle": "| needles, 8.2K tokens |",
    "multikey_2": "| RULER's multikey 2,",
    "keyvalue": "| 350 pairs of words,",
    "28M_lines_360": "| model `28M`, 360 lines",
    "mha_lines_360": "| model `mha`, 360 lines",
}


CAPPED = {
    "lines_200": "| 200 lines, 4.1K tokens |",
    "needle": "| needles, 8.2K tokens |",
}


def shown(row):
    """A score with its interval as the README writes them, 100 without decimals."""
    low, high = (f"{100 * x:.1f}".replace("100.0", "100") for x in row["interval"])
    return f"{100 * row['score']:.1f} % [{low}, {high}]".replace("100.0 %", "100 %")


@pytest.mark.parametrize("name", RECALL)
def test_recall_in_the_readme(name):
    (line,) = [x for x in README.splitlines() if x.startswith(RECALL[name])]
    _, full, dynamic, density = (value.strip() for value in line.strip("|").split("|"))
    (row,) = document(f"recall_{name}")["quality"]
    assert (row["mode"], row["n"]) == ("dynamic", 500)
    assert dynamic == shown(row)
    assert density == f"{row['density']:.2f}"
    (control,) = document(f"recall_full_{name}")["quality"]
    assert (control["mode"], control["n"]) == ("full", 500)
    assert full == shown(control)


@pytest.mark.parametrize("name", DECODE)
def test_decode_in_the_guide(name):
    guide = (ROOT / "docs/guide/accelerate.md").read_text(encoding="utf-8")
    line = next(x for x in guide.splitlines() if x.startswith(DECODE[name]))
    dense, sparse, density = (value.strip() for value in line.strip("|").split("|")[1:])
    rows = [document(f"decode{kind}_{name}")["quality"][0] for kind in ("_dense", "")]
    assert all((row["mode"], row["n"]) == ("dynamic", 500) for row in rows)
    assert [dense, sparse] == [shown(row) for row in rows]
    assert rows[0]["decode"] is None
    assert density == f"{rows[1]['decode']:.2f}"
    # What the page and the README say of all cells.
    assert rows[0]["score"] - rows[1]["score"] <= 0.0081
    assert 0.07 <= round(rows[1]["decode"], 2) <= 0.14


@pytest.mark.parametrize("name", CAPPED)
def test_capped_caches_in_the_guide(name):
    guide = (ROOT / "docs/guide/accelerate.md").read_text(encoding="utf-8")
    (row,) = document(f"capped_{name}")["quality"]
    assert (row["mode"], row["n"]) == ("dynamic", 500)
    slots = row["settings"]["max_cache_tokens"]
    assert f"{CAPPED[name]} {slots:,} | {shown(row)} |" in guide


@pytest.mark.parametrize(
    "row", document("demo")["quality"], ids=lambda r: f"{r['task']}-{r['mode']}"
)
def test_demo_in_the_limits(row):
    start = {"L": "| LongEval", "R": "| recall inside", "N": "| needles", "P": "| perplexity"}
    (line,) = [x for x in LIMITS if x.startswith(start[row["task"][0]])]
    values = [value.strip() for value in line.strip("|").split("|")]
    value = values[1 + ["full", "static", "dynamic", "auto"].index(row["mode"])]
    if row["metric"] == "perplexity":
        assert value == f"{row['score']:.2f}"
        return
    assert value.split(" %")[0] == f"{100 * row['score']:g}"
    assert row["mode"] == "full" or value.split()[-1] == f"{row['density']:.2f}"


@pytest.mark.parametrize("cell", document("next_tokens")["cells"], ids=lambda c: f"{c['coverage']}")
def test_next_tokens(cell):
    guide = (ROOT / "docs/guide/accelerate.md").read_text(encoding="utf-8")
    (line,) = [x for x in guide.splitlines() if x.startswith(f"| {cell['coverage']} | 0.")]
    same, largest = 100 * cell["same_most_likely"], f"{cell['largest_kl']:.2g}"
    values = f"{cell['density']:.2f} | {same:.1f} % | {cell['mean_kl']:.3f} | {largest} |"
    assert line == f"| {cell['coverage']} | {values}"


def test_first_page():
    forward = {c["length"]: c["ratio"]["median"] for c in cells("gpu_op") if c["score"] == "normal"}
    said = f"{forward[8192]:.1f}x as fast as the fastest dense kernel at 8K tokens, "
    assert said + f"{forward[32768]:.1f}x at 32K, {forward[524288]:.0f}x at 512K" in FIRST
    long = {c["model"]: c for c in cells("dma_prefill") if c["length"] == 1 << 18}
    dma, dense = long["dma"], long["dense cudnn"]
    seconds = dma["prefill"]["median"], dense["prefill"]["median"]
    assert "256K tokens takes {:.2f} s against {:.2f} s".format(*seconds) in FIRST
    peaks = dma["peak_bytes"] / 2**30, dense["peak_bytes"] / 2**30
    assert "in {:.2f} GiB against {:.1f} GiB".format(*peaks) in FIRST
    timed = [row for row in document("demo")["speed"] if row["mode"] == "dynamic"]
    speed = {row["length"]: row["ratio"] for row in timed}
    said = (
        f"{speed[8192]:.2f}x as fast as torch's SDPA at 8,192 tokens, {speed[4096]:.2f}x at 4,096"
    )
    assert said in FIRST
    asked = [document(f"recall_{name}")["quality"][0] for name in ("ruler", "minference")]
    right = sum(round(row["score"] * row["n"]) for row in asked)
    assert f"{right} of {sum(row['n'] for row in asked)} needles at 8K with" in FIRST
    assert all(f"with {row['density']:.2f} of the pairs" in FIRST for row in asked)


def spread(ratio):
    return f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def of_op(cell, times):
    return [
        f"{cell['density']:.3f}",
        *(f"{times[name] * 1e3:.2f}" for name in ("cudnn", "flash", "dynamic")),
        spread(cell["speedup"]),
        f"{cell['selection']['median'] * 1e3:.2f}",
        f"{cell['peak'] / cell['peak_flash']:.1f}",
    ]


def of_model(cell, times):
    dense, peaks = ("cudnn", "flash"), cell["peaks"]
    return [
        f"{100 * cell['kept']:g} %",
        f"{cell['density']:.3f}",
        *(f"{times[name]:.3f}" if name in times else "" for name in (*dense, "dynamic")),
        *(spread(cell["speedup"][name]) if name in times else "" for name in dense),
        *(f"{peaks[x] / 2**30:.2f}" if x in peaks else "" for x in ("flash", "dynamic")),
    ]


def of_step(cell, times):
    best = cell["fastest"]
    return [
        cell["part"].split()[-1],
        f"{cell['density']:.3f}",
        *(f"{times[name] * 1e3:.3f}" for name in ("cudnn", "copied", "dynamic")),
        ("" if best == "cudnn" else f"{best} ") + spread(cell["speedup"][best]),
        spread(cell["speedup"]["copied"]),
    ]


@pytest.mark.parametrize(
    "cell",
    cells("dynamic_gpu"),
    ids=lambda c: f"{c['part']}-{c['shape']}-{c['length']}-{c.get('kept', '')}",
)
def test_dynamic_masks_on_a_gpu(cell):
    page = (ROOT / "docs/results/dynamic.md").read_text(encoding="utf-8")
    times = {name: t["median"] for name, t in cell["times"].items()}
    values = {"op": of_op, "model": of_model}.get(cell["part"], of_step)(cell, times)
    row = [cell["shape"], f"{cell['length']:,}", *values]
    assert f"| {' | '.join(row)} |" in page


def test_dynamic_masks_on_a_gpu_in_short():
    found = {
        (c["part"], c["shape"], c["length"], c.get("kept", 0)): {
            n: t["median"] for n, t in c["times"].items()
        }
        for c in cells("dynamic_gpu")
    }

    def faster(*cell, than="cudnn"):
        return found[cell][than] / found[cell]["dynamic"]

    def less(kept):
        return 100 * (1 - 1 / faster("model", "1B", 32768, kept, than="flash"))

    at = [f"{faster('op', '1B', n, 0):.1f}x" for n in (8192, 32768, 131072)]
    long = {shape: faster("model", shape, 131072, 0.025) for shape in ("1B", "8B")}
    longest = found["model", "1B", 1 << 20, 0.025]["dynamic"]
    readme = " ".join(README.split())
    said = (
        f"{at[0]} as fast as cuDNN's at 8K tokens, {at[1]} at 32K and {at[2]} at 128K; the whole "
    )
    said += f"model reads 32K tokens in {less(0.1):.0f} to {less(0.025):.0f} % less time than with "
    said += f"flash, 128K {long['1B']:.1f}x as fast as with cuDNN (Llama-3.1-8B's shape "
    said += f"{long['8B']:.1f}x), and a million tokens in {longest:.0f} s"
    assert said in readme
    said = f"{at[1]} as fast as cuDNN's at 32K tokens and {at[2]} at 128K, and the whole model "
    said += f"reads 32K tokens {faster('model', '1B', 32768, 0.025):.1f}x and 128K "
    assert f"{said}{long['1B']:.1f}x as fast" in FIRST


@pytest.mark.parametrize("cell", [*cells("parallel"), *cells("parallel_1b")])
def test_two_gpus(cell):
    page = (ROOT / "docs/guide/parallel.md").read_text(encoding="utf-8")
    digits = 3 if cell["part"] == "prefill" else 4
    one, two = (f"{cell[who]['median']:.{digits}f} s" for who in ("alone", "together"))
    low, middle, high = (f"{100 * cell['efficiency'][x]:.1f}" for x in ("low", "median", "high"))
    assert f"| {one} | {two} | {middle} % [{low}, {high}] |" in page


def of_method(row):
    if row is None:
        return ""
    score = row["score"]
    said = f"{score:.2f}" if "perplexity" in row["task"]["name"] else f"{100 * score:.1f} %"
    return said if row["method"] == "full" else f"{said} at {row['density']['prefill']:.2f}"


def test_methods_without_training():
    found = {
        (
            row["checkpoint"].split()[0].strip(","),
            row["task"]["name"],
            row["method"],
            row["target"],
        ): row
        for row in lines("compare")
        if row["checkpoint"].endswith("H200") and "score" in row
    }
    tasks = ("lines", "needles", "multikey_2", "words", "perplexity")
    columns = [("embedded", f"{task} 8K") for task in tasks]
    columns += [("28M", "lines 8K"), ("28M", "lines 16K")]
    head = "| | embedded: lines 8K |"
    table = README[README.index(head) :].split("\n\n")[0].splitlines()[2:]
    for line in table:
        name, *values = (value.strip() for value in line.strip("|").split("|"))
        method = "full" if name.startswith("full") else name.split("`")[1]
        target = {"full": 1.0, "dynamic": 0.9 if "0.9" in name else 0.985}.get(method, 0.1)
        assert values == [of_method(found.get((*c, method, target))) for c in columns]
    assert len(table) == 11


@pytest.mark.parametrize("kind", ["multiquery", "multivalue"])
def test_decoded_answers_of_ruler(kind):
    full, ours = (
        document(f"ruler_28M_{kind}_{mode}")["quality"][0] for mode in ("full", "dynamic")
    )
    assert full["n"] == ours["n"] == 500
    said = f"{100 * full['score']:.1f} % | {100 * ours['score']:.1f} % at {ours['density']:.2f}"
    assert f"| {kind} 8K, decoded | {said} |" in README
    assert f"whose steps see {ours['decode']:.2f} of the keys" in README


BOOKS = {"books": "books kept from training", "pg19": "PG-19's test books"}
PLACES = ("0-1K", "1K-2K", "2K-4K", "4K-8K")


@pytest.mark.parametrize("name", ["embedded", "28M", "mha"])
@pytest.mark.parametrize("books", BOOKS)
def test_perplexity_by_position(books, name):
    full, ours = (
        document(f"perplexity_{books}_{name}_{mode}")["quality"][0] for mode in ("full", "dynamic")
    )
    assert full["n"] == ours["n"] == 24
    more = 100 * (ours["score"] / full["score"] - 1)
    by = [
        100 * math.expm1(ours["metrics"][f"nll_{place}"] - full["metrics"][f"nll_{place}"])
        for place in PLACES
    ]
    guide = (ROOT / "docs/guide/accelerate.md").read_text(encoding="utf-8")
    said = f"| {BOOKS[books]}, `{name}` | {full['score']:.2f} | {ours['score']:.2f} ({more:+.1f} %)"
    assert f"{said} | {ours['density']:.2f} | {' | '.join(f'{x:+.1f} %' for x in by)} |" in guide


def test_questions_at_low_coverage():
    rows = [row for row in lines("compare") if row["checkpoint"].endswith("H200")]
    full = {(r["checkpoint"], r["task"]["name"]): r for r in rows if r["method"] == "full"}
    low = [r for r in rows if (r["method"], r["target"]) == ("dynamic", 0.9)]
    text = [r for r in low if "perplexity" in r["task"]["name"] and r["checkpoint"][0] == "e"]
    asked = [r for r in low if r["task"]["run"] == "recall"]
    assert len(asked) >= 4

    def against(row):
        return full[row["checkpoint"], row["task"]["name"]]["score"]

    fewer = 100 * max(against(row) - row["score"] for row in asked)
    least, most = (f(row["density"]["prefill"] for row in asked) for f in (min, max))
    more = 100 * (text[0]["score"] / against(text[0]) - 1)
    guide = " ".join((ROOT / "docs/guide/accelerate.md").read_text(encoding="utf-8").split())
    assert f"at most {fewer:.1f} points fewer of their questions in {len(asked)} cells" in guide
    assert f"at {least:.2f} to {most:.2f} of the pairs; perplexity rises by {more:.1f} %" in guide


def compared():
    """Rows of the README's table of two more models, and the records that they are made of."""
    rows = [row for row in lines("compare") if row["checkpoint"] in ("28M", "mha")]
    return {(r["task"]["name"], r["checkpoint"], r["method"]): r for r in rows if "score" in r}


@pytest.mark.parametrize("task", sorted({task for task, _, _ in compared()}))
def test_two_more_models(task):
    table = README[README.index("| | 28M, full |") :].splitlines()
    (line,) = [line for line in table if line.startswith(f"| {task} |")]
    values = [value.strip() for value in line.strip("|").split("|")][1:]
    for name, full, dynamic in (("28M", *values[:2]), ("mha", *values[2:])):
        if not full:
            assert (task, name, "dynamic") not in compared()
            continue
        one, two = (compared()[task, name, method] for method in ("full", "dynamic"))
        if "perplexity" in task:
            more = two["score"] / one["score"] - 1
            said = f"{one['score']:.2f}", f"{two['score']:.2f} ({100 * more:+.1f} %)"
        else:
            said = f"{100 * one['score']:.1f} %", f"{100 * two['score']:.1f} %"
            assert one["n"] == two["n"] == 500
            assert one["score"] - two["score"] <= 0.006 + 1e-9
        assert full == said[0]
        assert dynamic == f"{said[1]} at {two['density']['prefill']:.2f}"


def test_training_runs():
    runs = document("train_runs")["runs"]
    one, ddp, fsdp = (f"{run['loss']:.3f}" for run in runs if run["recipe"] == "80M")
    page = (ROOT / "docs/guide/parallel.md").read_text(encoding="utf-8")
    assert f"loss {one} on one GPU, {ddp} under DDP, {fsdp} under FSDP2" in page
    table = (ROOT / "docs/train.md").read_text(encoding="utf-8")
    times = [f"{int(run['seconds'])}" for run in runs if run["recipe"] in ("28M", "mha")]
    assert f"{' and '.join(times)} s on one H200" in table


def test_training_on_a_cpu():
    found = {
        (c["length"], c["keep"], c["scores"]): c["ratio"] for c in cells("lifetimes_cpu_train")
    }
    few, more, most = (found[8192, keep, "iid"]["sdpa"][1] for keep in (256, 1024, 4096))
    said = f"{few:.1f}x with 256 keys kept, {more:.1f}x with 1,024, {most:.1f}x with 4,096"
    assert said in README
    changes = text("CHANGELOG.md")
    assert f"take 1/{few:.1f} of the time" in changes
    masked = [x["sdpa under the mask"][1] for at, x in found.items() if at[0] == 4096]
    span = f"{min(masked):.0f} to {max(masked):.0f} times"
    assert f"take {span} ours at 4K" in changes
    assert f"takes {span} as long as ours at 4K" in README


def test_rows_with_lists_of_their_own():
    chosen = {"rows": 16, "keys": 32, "warps": 1, "stages": 3}
    shapes = {}
    for cell in cells("row_lists"):
        if cell["pass"] == "forward":
            shape = tuple(cell[name] for name in ("ratio", "head_dim", "length"))
            times = shapes.setdefault(shape, {})
            if cell.get("before"):
                times["before"] = cell["milliseconds"]
            elif chosen.items() <= cell.items():
                times["now"] = cell["milliseconds"]
    ratios = sorted(times["before"] / times["now"] for times in shapes.values())
    said = f"{ratios[0]:.1f} to {ratios[-1]:.1f} times as fast forward on an H200 as before"
    assert said in text("CHANGELOG.md")


def test_what_the_sanitizer_reported():
    page, found = text("docs/guide/reliability.md"), document("sanitizer")
    assert not found["not_launched"]
    calls = found["plain"]["calls"]
    assert set(calls.values()) == {"ok"}
    assert len(calls) == 10
    assert "all ten calls ended under each tool with right results" in page
    assert all(tool["calls"] == calls for tool in found["tools"].values())
    assert not any(tool["others"] for tool in found["tools"].values())
    later = document("sanitizer_importance")
    assert later["plain"]["calls"] == {"importance_of_blocks": "ok"}
    assert {tool["status"] for tool in later["tools"].values()} == {"clean"}
    assert "no tool reported anything about it" in page
    memory, races, unwritten = (
        found["tools"][tool]["ours"] for tool in ("memcheck", "racecheck", "initcheck")
    )
    assert not memory
    assert f"All {sum(unwritten.values()):,} reports are about these three" in page
    assert len(unwritten) == 3
    assert len(races) == 6
    assert all(f"`{kernel}`" in page for kernel in [*unwritten, *races])
