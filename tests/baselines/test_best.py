import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynmask.baselines.best import best

NUMBERS = st.sampled_from([-torch.inf, -2.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 3.0, torch.inf])


@given(st.lists(NUMBERS, min_size=1, max_size=12), st.data())
def test_the_largest_come_first_and_of_equal_ones_the_earlier(numbers, data):
    count = data.draw(st.integers(0, len(numbers)))
    ranked = sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))
    assert best(torch.tensor(numbers), count).tolist() == ranked[:count]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_row_by_itself(dtype):
    score = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(best(score, 7), order[..., :7])
