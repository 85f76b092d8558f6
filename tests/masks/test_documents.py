import pytest
import torch

from dynmask.masks import Documents, Lifetimes, Padding
from dynmask.masks.lifetimes import NEVER

IDS = [[0, 0, 0, 2, 2, 7], [5, 6, 6, 6, 6, 6], [-3, -3, -3, -3, -3, -3]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_ends_and_ordinals(dtype):
    ids = IDS[:2] if dtype == torch.uint8 else IDS
    documents = Documents(torch.tensor(ids, dtype=dtype))
    ends = [[max(j for j, other in enumerate(row) if other == x) + 1 for x in row] for row in ids]
    ordinals = [[sorted(set(row)).index(x) for x in row] for row in ids]
    assert documents.ends().tolist() == ends
    assert documents.ordinals().tolist() == ordinals
    assert documents.ends().dtype == documents.ordinals().dtype == torch.int32


def test_strided_ids():
    ids = torch.tensor(IDS).T.contiguous().T
    assert Documents(ids).ends().equal(Documents(torch.tensor(IDS)).ends())


def test_no_slots():
    assert Documents(torch.zeros(2, 0, dtype=torch.int64)).ends().shape == (2, 0)


def test_to():
    documents = Documents(torch.tensor(IDS))
    assert documents.to("cpu") is documents
    assert documents.to("meta").device.type == "meta"


def test_alone_it_is_causal_within_each_document():
    ids = torch.tensor(IDS)
    slot = torch.arange(6)
    expected = (ids[:, :, None] == ids[:, None]) & (slot <= slot[:, None])
    ends = Documents(ids).ends()[:, None]
    assert Lifetimes(ends).dense(6)[:, 0].equal(expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_and_shows_what_both_show(rows):
    ids = torch.tensor(IDS)[:rows]
    mask = Lifetimes.top(torch.randn(3, 2, 6), keep=2)
    seen = (mask & Documents(ids)).dense(6)
    assert seen.equal(mask.dense(6) & (ids[:, None, :, None] == ids[:, None, None]))


def test_one_expiry_takes_a_whole_batch():
    ids = torch.tensor(IDS)
    mask = Lifetimes(torch.full((1, 1, 6), NEVER, dtype=torch.int32)) & Documents(ids)
    assert mask.expiry.shape == (3, 1, 6)
    padded = mask & Padding(torch.tensor([0, 1, 6]), torch.tensor([6, 3, 6]))
    real = torch.tensor([[1] * 6, [0, 1, 1, 0, 0, 0], [0] * 6]).bool()
    both = real[:, None, :, None] & real[:, None, None]
    assert padded.dense(6).equal(mask.dense(6) & both)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\[B, K\] integer"),
        (torch.zeros(1, 3), r"\[B, K\] integer"),
        (torch.zeros(1, 3, dtype=torch.bool), r"\[B, K\] integer"),
        (torch.tensor([[0, 1], [1, 0]]), "fall along K"),
    ],
    ids=["shape", "float", "bool", "falling"],
)
def test_refuses(ids, match):
    with pytest.raises(ValueError, match=match):
        Documents(ids)
