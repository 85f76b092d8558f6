import pytest
import torch

from dynmask.masks import Padding


def test_from_mask_reads_left_right_both_and_empty():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    padding = Padding.from_mask(mask)
    assert (padding.stop - padding.start).tolist() == [2, 3, 2, 0, 4]
    assert padding.start[:3].tolist() == [2, 0, 1]
    assert padding.dense(4).equal(mask.bool())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_from_mask_takes_any_dtype(dtype):
    assert Padding.from_mask(torch.tensor([[0, 1, 1]]).to(dtype)).runs(3) == [(1, 3)]


def test_runs_are_cut_to_the_keys():
    assert Padding(torch.tensor([1, 5]), torch.tensor([9, 9])).runs(4) == [(1, 4), (4, 4)]


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.tensor([[1, 1, 1], [1, 0, 1]]), r"rows \[1\]"),
        (torch.tensor([1, 1]), r"\[B, K\]"),
        (torch.tensor([[0.0, -1e9]]), "only 0 and 1"),
    ],
    ids=["holes", "one-dimensional", "additive"],
)
def test_from_mask_refuses(mask, match):
    with pytest.raises(ValueError, match=match):
        Padding.from_mask(mask)


@pytest.mark.parametrize(
    ("start", "stop", "match"),
    [
        (torch.tensor([2]), torch.tensor([1]), "0 <= start <= stop"),
        (torch.tensor([-1]), torch.tensor([1]), "0 <= start <= stop"),
        (torch.tensor([0]), torch.tensor([1, 2]), "same length"),
        (torch.tensor([0.0]), torch.tensor([1]), "start must be"),
        (torch.tensor([0]), torch.tensor(1), "stop must be"),
    ],
    ids=["reversed", "negative", "lengths", "float", "scalar"],
)
def test_constructor_refuses(start, stop, match):
    with pytest.raises(ValueError, match=match):
        Padding(start, stop)
