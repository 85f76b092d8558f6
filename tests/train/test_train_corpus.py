import copy
import json
import lzma

import numpy as np
import pytest

from dynmask.eval.words import is_eval_word
from dynmask.train.corpus import Corpus, documents, text_files


def test_files_by_pattern(text_folder, tmp_path):
    assert [p.name for p in text_files(text_folder, "train*")] == ["train.jsonl", "train.txt"]
    with pytest.raises(ValueError, match=r"no \.txt, .* matches 'valid\*'"):
        text_files(text_folder, "valid*")


def test_documents_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("Größe\nzwei", encoding="utf-8")
    with lzma.open(tmp_path / "b.txt.xz", "wt", encoding="utf-8") as file:
        file.write("packed")
    rows = "\n".join(json.dumps({"text": t, "other": 1}) for t in ("one", "two"))
    (tmp_path / "c.jsonl").write_text(rows, encoding="utf-8")
    with lzma.open(tmp_path / "d.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(rows)
    found = list(documents(text_files(tmp_path)))
    assert found == ["Größe\nzwei", "packed", "one", "two", "one", "two"]


@pytest.mark.parametrize("row", ['{"body": "x"}', '{"text": 3}', "[1]", "no json"])
def test_wrong_row_is_named(tmp_path, row):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + row, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl line 2"):
        list(documents([tmp_path / "a.jsonl"]))


def test_tokens_are_those_of_the_documents(text_folder, tokenizer):
    files = text_files(text_folder)
    expected = [
        i
        for text in documents(files)
        for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    corpus = Corpus.build(files, tokenizer)
    assert corpus.tokens.dtype == np.uint16
    assert corpus.tokens.tolist() == expected


def test_key_words_are_frequent_and_not_of_the_evaluation(corpus, text_folder):
    text = (text_folder / "train.txt").read_text(encoding="utf-8").split()
    assert len(corpus.words) >= 1000
    assert not any(is_eval_word(word) for word in corpus.words)
    assert all(sum(word == other.strip(".") for other in text) >= 5 for word in corpus.words[-3:])


def test_cache_is_used_for_the_same_files_only(text_folder, tokenizer, tmp_path, monkeypatch):
    files, cache = [text_folder / "train.jsonl"], tmp_path / "new" / "corpus.npz"
    first = Corpus.build(files, tokenizer, cache=cache)
    assert [p.name for p in cache.parent.iterdir()] == ["corpus.npz"]
    with monkeypatch.context() as patch:
        patch.setattr("dynmask.train.corpus.documents", None)
        again = Corpus.build(files, tokenizer, cache=cache)
    assert again.sha256() == first.sha256()
    np.testing.assert_array_equal(again.tokens, first.tokens)
    other = tmp_path / "other.txt"
    other.write_text("Other words.", encoding="utf-8")
    assert Corpus.build([other], tokenizer, cache=cache).sha256() != first.sha256()


def test_tokenizer_without_an_end(text_folder, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(ValueError, match="eos_token_id=None"):
        Corpus.build(text_files(text_folder), without)
