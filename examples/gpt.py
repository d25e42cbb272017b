"""A small GPT over bytes: pre-norm blocks, causal attention, dropout, tied embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that every torch reader knows


@dataclass(frozen=True)
class GPTConfig:
    """Sizes; the defaults make 1.3 million parameters."""

    vocabulary: int = 256
    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 160
    dropout: float = 0.1


class Attention(nn.Module):
    """Causal self-attention, written out: the fused kernels' backward is not deterministic everywhere."""

    mask: torch.Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.drop_weights = nn.Dropout(config.dropout)
        self.drop_out = nn.Dropout(config.dropout)
        future = torch.ones(config.context, config.context, dtype=torch.bool).triu(1)
        self.register_buffer("mask", future, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(self.mask[:length, :length], float("-inf"))
        mixed = self.drop_weights(scores.softmax(dim=-1)) @ value
        merged = mixed.transpose(1, 2).reshape(batch, length, width)
        output: torch.Tensor = self.drop_out(self.out(merged))
        return output


class Block(nn.Module):
    """Attention and a two-layer perceptron, each added to the stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_attention(x))
        output: torch.Tensor = x + self.mlp(self.norm_mlp(x))
        return output


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(self._initialise)
        self.head.weight = self.token.weight  # tied: one tensor under two names

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocabulary] of int64 bytes [batch, length]."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.drop(self.token(inputs) + self.position(positions))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats for each byte."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())
