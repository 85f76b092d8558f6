import copy
import json
import lzma

import datasets
import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from dynmask.eval.words import is_eval_word
from dynmask.train.corpus import Corpus
from dynmask.train.texts import Folder, Table


def test_files_by_pattern(text_folder):
    names = [p.name for p in Folder(text_folder, "train*").files()]
    assert names == ["train.jsonl", "train.txt"]
    with pytest.raises(ValueError, match=r"no \.txt, .* matches 'valid\*'"):
        Folder(text_folder, "valid*").files()


def test_documents_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("Größe\nzwei", encoding="utf-8")
    with lzma.open(tmp_path / "b.txt.xz", "wt", encoding="utf-8") as file:
        file.write("packed")
    rows = "\n".join(json.dumps({"text": t, "other": t * 2}) for t in ("one", "two"))
    (tmp_path / "c.jsonl").write_text(rows, encoding="utf-8")
    with lzma.open(tmp_path / "d.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(rows)
    found = list(Folder(tmp_path))
    assert found == ["Größe\nzwei", "packed", "one", "two", "one", "two"]
    assert list(Folder(tmp_path, "c*", "other")) == ["oneone", "twotwo"]


@pytest.mark.parametrize("row", ['{"body": "x"}', '{"text": 3}', "[1]", "no json"])
def test_wrong_row_is_named(tmp_path, row):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + row, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl line 2"):
        list(Folder(tmp_path))


def test_table_of_a_dataset(tmp_path, monkeypatch):
    # Of the home it would be another user's.
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "cache"))
    rows = {"text": ["one", "two"], "number": [1, 2]}
    split = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    split.to_parquet(tmp_path / "files" / "train.parquet")
    for folder in ("saved", "files"):
        path = str(tmp_path / folder)
        assert list(Table(path)) == ["one", "two"]
        with pytest.raises(ValueError, match=r"column='number' .* a row has text, number"):
            list(Table(path, column="number"))
        with pytest.raises(ValueError, match="split 'test'"):
            list(Table(path, split="test"))


def test_tokens_are_those_of_the_documents(text_folder, tokenizer):
    expected = [
        i
        for text in Folder(text_folder)
        for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    corpus = Corpus.build(Folder(text_folder), tokenizer)
    assert corpus.tokens.dtype == np.uint16
    assert corpus.tokens.tolist() == expected


def test_tokenizer_that_joins_paragraphs_gets_whole_documents(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<end>"], show_progress=False)
    text = "He said so.\nShe did not.\n" * 3
    backend.train_from_iterator([text], trainer)
    joining = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = Corpus.build(Folder(tmp_path), joining)
    assert corpus.tokens.tolist() == [*joining(text)["input_ids"], joining.eos_token_id]


def test_no_more_documents_than_needed(text_folder, tokenizer):
    whole = Corpus.build(Folder(text_folder, "*.jsonl"), tokenizer)
    part = Corpus.build(Folder(text_folder, "*.jsonl"), tokenizer, most=1)
    end = whole.tokens.tolist().index(tokenizer.eos_token_id)
    assert part.tokens.tolist() == whole.tokens[: end + 1].tolist()


def test_key_words_are_frequent_and_not_of_the_evaluation(corpus, text_folder):
    text = (text_folder / "train.txt").read_text(encoding="utf-8").split()
    assert len(corpus.words) >= 1000
    assert not any(is_eval_word(word) for word in corpus.words)
    assert all(sum(word == other.strip(".") for other in text) >= 5 for word in corpus.words[-3:])


def test_cache_is_used_for_the_same_files_only(text_folder, tokenizer, tmp_path, monkeypatch):
    texts, cache = Folder(text_folder, "*.jsonl"), tmp_path / "new" / "corpus"
    first = Corpus.build(texts, tokenizer, cache=cache)
    assert {p.name for p in cache.iterdir()} == {"corpus.json", "tokens.bin"}
    with monkeypatch.context() as patch:
        patch.setattr("dynmask.train.corpus._key_words", None)
        again = Corpus.build(texts, tokenizer, cache=cache)
    assert again.sha256() == first.sha256() == Corpus.build(texts, tokenizer).sha256()
    np.testing.assert_array_equal(again.tokens, first.tokens)
    (tmp_path / "other.txt").write_text("Other words.", encoding="utf-8")
    other = Corpus.build(Folder(tmp_path, "*.txt"), tokenizer, cache=cache)
    assert other.sha256() != first.sha256()


def test_cache_that_was_interrupted_is_made_again(text_folder, tokenizer, tmp_path, monkeypatch):
    texts = Folder(text_folder, "*.jsonl")
    first = Corpus.build(texts, tokenizer, cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("dynmask.train.corpus._sha256", None)
        with pytest.raises(TypeError):
            Corpus.build(Folder(text_folder, "*.txt"), tokenizer, cache=tmp_path)
    again = Corpus.build(texts, tokenizer, cache=tmp_path)
    np.testing.assert_array_equal(again.tokens, first.tokens)


def test_tokenizer_without_an_end(text_folder, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(ValueError, match="eos_token_id=None"):
        Corpus.build(Folder(text_folder), without)
