"""Dynamic Mask Attention in a plain PyTorch model, without transformers' models or a trainer.

A toy task that needs recall: among 96 tokens, eight say "name n has value v" at random places; the
last eight tokens ask for the names in another order. Each row may read 16 keys, so the model has to
learn which tokens are worth keeping. Chance is a loss of ln 4 = 1.39.

Two ways to the same thing, each trained for some steps in the same small model:

* ``OpAttention``, written here around the op: any score of the keys that you like.
* ``DynamicMaskAttention``, the ready layer: the paper's score, RoPE, padding, a cache.

    python examples/dma_op_in_plain_pytorch.py [--steps 120]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmask import DmaConfig, DynamicMaskAttention, Lifetimes, attention

NAMES, VALUES, FILLERS, LENGTH = 8, 4, 16, 96
FACTS = NAMES * VALUES  # Tokens 0 to 31 are facts, then come eight questions, then fillers.
WIDTH, HEADS, GROUPS, KEEP = 64, 4, 2, 16


class OpAttention(nn.Module):
    """Causal attention in which a row sees the ``KEEP`` best keys so far, by a learned score."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = WIDTH // HEADS
        self.q_proj = nn.Linear(WIDTH, HEADS * self.dim, bias=False)
        self.k_proj = nn.Linear(WIDTH, GROUPS * self.dim, bias=False)
        self.v_proj = nn.Linear(WIDTH, GROUPS * self.dim, bias=False)
        self.o_proj = nn.Linear(HEADS * self.dim, WIDTH, bias=False)
        self.score = nn.Linear(WIDTH, GROUPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, WIDTH]`` for ``x [B, N, WIDTH]``."""
        by_head = (*x.shape[:2], -1, self.dim)
        q = F.rms_norm(self.q_proj(x).view(by_head), (self.dim,)).transpose(1, 2)  # [B, H, N, D]
        k = F.rms_norm(self.k_proj(x).view(by_head), (self.dim,)).transpose(1, 2)  # [B, G, N, D]
        v = self.v_proj(x).view(by_head).transpose(1, 2)
        score = F.logsigmoid(self.score(x)).transpose(1, 2)  # [B, G, N], of the keys alone
        mask = Lifetimes.top(score, keep=KEEP)  # which keys: exact, without a gradient
        out = attention(q, k, v, mask, bias=score)  # in the logits the score gets its gradient
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """One block of attention and MLP; returns the logits of the questions' values."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(FACTS + NAMES + FILLERS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = attn
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[B, NAMES, VALUES]`` for ``tokens [B, LENGTH]``."""
        x = self.embed(tokens)
        x = x + self.attn(self.norm(x))
        x = x + self.mlp(x)
        return self.head(x[:, -NAMES:])


def make_batch(rows: int) -> tuple[Tensor, Tensor]:
    """Return tokens ``[rows, LENGTH]`` and the values that are asked for, ``[rows, NAMES]``."""
    value = torch.randint(VALUES, (rows, NAMES))
    tokens = FACTS + NAMES + torch.randint(FILLERS, (rows, LENGTH))
    place = torch.rand(rows, LENGTH - NAMES).argsort(1)[:, :NAMES]
    tokens.scatter_(1, place, torch.arange(NAMES) * VALUES + value)
    asked = torch.rand(rows, NAMES).argsort(1)
    tokens[:, -NAMES:] = FACTS + asked
    return tokens, value.gather(1, asked)


def loss_of(model: Model, tokens: Tensor, values: Tensor) -> Tensor:
    """Return the mean cross-entropy of the values, in nats."""
    return F.cross_entropy(model(tokens).flatten(0, 1), values.flatten())


def train(attn: nn.Module, steps: int) -> tuple[float, float]:
    """Train a model around ``attn``; return the loss on unseen rows before and after."""
    torch.manual_seed(2)
    model, unseen = Model(attn), make_batch(64)
    with torch.no_grad():
        before = loss_of(model, *unseen).item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, *make_batch(16)).backward()
        optimizer.step()
    with torch.no_grad():
        return before, loss_of(model, *unseen).item()


def main(arguments: list[str] | None = None) -> None:
    """Train both models and print their losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args(arguments).steps
    torch.manual_seed(0)
    layer = DynamicMaskAttention(
        DmaConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            keep=KEEP,
            initializer_range=0.1,  # 0.02 is for wide models
        )
    )
    for name, attn in (("op", OpAttention()), ("layer", layer)):
        before, after = train(attn, steps)
        print(f"{name}: loss {before:.2f} before, {after:.2f} after {steps} steps")


if __name__ == "__main__":
    main()
