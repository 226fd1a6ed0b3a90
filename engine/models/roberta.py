"""RoBERTa's encoder: token numbers to hidden states.

transformers' RoBERTa costs a process 2.5 s of imports, on two cores twice what torch itself does, for seventy lines of network.
Names of tensors, arithmetic, initial weights and the order of random numbers are transformers', bit for bit on a CPU:
tests/engine/models/test_roberta.py compares the two.

```
tokens (M,T) -> words + token type + positions -> LayerNorm -> L x [x = LN(x + attention(x)); x = LN(x + feed forward(x))] -> (M,T,H)
```

A token's position number is its place among those that are no padding, after the padding token's own number, which padding has.

M captions, T text tokens, H width, A heads, D = H / A.
Source: Liu et al. 2019, arXiv:1907.11692; post-norm layers as in BERT (Devlin et al. 2018, arXiv:1810.04805).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.ranker import KoclipConfig

PAD_TOKEN = 1  # RoBERTa's; its position numbers start after it
_EPS = 1e-5  # of LayerNorm: klue/roberta's, as RoBERTa's; transformers' default is BERT's 1e-12
_INITIAL_STD = 0.02


class Roberta(nn.Module):
    """The encoder of a config, random weights, float32.

    Args:
        pooled: with the pooling layer's weights, which nothing here uses, for checkpoints that hold them.
    """

    def __init__(self, config: KoclipConfig, *, pooled: bool = False) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        if pooled:
            self.pooler = nn.ModuleDict({"dense": _linear(config.text_dim, config.text_dim)})
        self.apply(_initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """(M, T) int64, padded with 1 -> (M, T, H); a caption's hidden states do not depend on its padding."""
        is_word = tokens != PAD_TOKEN
        hidden = self.embeddings(tokens, is_word)  # (M, T, H)
        states: Tensor = self.encoder(hidden, is_word[:, None, None])
        return states


class _Embeddings(nn.Module):
    def __init__(self, config: KoclipConfig) -> None:
        super().__init__()
        H = config.text_dim
        self.word_embeddings = nn.Embedding(config.text_vocab_size, H, padding_idx=PAD_TOKEN, dtype=torch.float32)
        self.token_type_embeddings = nn.Embedding(1, H, dtype=torch.float32)
        self.LayerNorm = nn.LayerNorm(H, eps=_EPS, dtype=torch.float32)
        self.dropout = nn.Dropout(config.dropout)
        rows = config.text_position_rows
        self.position_embeddings = nn.Embedding(rows, H, padding_idx=PAD_TOKEN, dtype=torch.float32)

    def forward(self, tokens: Tensor, is_word: Tensor) -> Tensor:
        is_counted = is_word.long()  # ONNX sums no booleans
        positions = is_counted.cumsum(dim=1) * is_counted + PAD_TOKEN  # (M, T)
        embedded = self.word_embeddings(tokens) + self.token_type_embeddings(torch.zeros_like(tokens))
        embedded = embedded + self.position_embeddings(positions)
        hidden: Tensor = self.dropout(self.LayerNorm(embedded))
        return hidden


class _Encoder(nn.Module):
    def __init__(self, config: KoclipConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_Layer(config) for _ in range(config.text_layers)])

    def forward(self, hidden: Tensor, is_word: Tensor) -> Tensor:
        for layer in self.layer:
            hidden = layer(hidden, is_word)
        return hidden


class _Layer(nn.Module):
    def __init__(self, config: KoclipConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = nn.ModuleDict({"dense": _linear(config.text_dim, config.text_ff_dim)})
        self.output = _Output(config.text_ff_dim, config)

    def forward(self, hidden: Tensor, is_word: Tensor) -> Tensor:
        hidden = self.attention(hidden, is_word)
        inner = F.gelu(self.intermediate["dense"](hidden))
        output: Tensor = self.output(inner, hidden)
        return output


class _Attention(nn.Module):
    def __init__(self, config: KoclipConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.text_heads, config.dropout
        self.self = nn.ModuleDict({name: _linear(config.text_dim, config.text_dim) for name in _PROJECTIONS})
        self.output = _Output(config.text_dim, config)

    def forward(self, hidden: Tensor, is_word: Tensor) -> Tensor:
        """(M, T, H), (M, 1, 1, T) -> (M, T, H)."""
        heads = (self.self[name](hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for name in _PROJECTIONS)
        query, key, value = heads  # (M, A, T, D)
        dropout = self.dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=is_word, dropout_p=dropout)
        output: Tensor = self.output(read.transpose(1, 2).flatten(2), hidden)
        return output


_PROJECTIONS = ("query", "key", "value")


class _Output(nn.Module):
    """What closes a branch: projection, dropout, residual, LayerNorm."""

    def __init__(self, width: int, config: KoclipConfig) -> None:
        super().__init__()
        self.dense = _linear(width, config.text_dim)
        self.LayerNorm = nn.LayerNorm(config.text_dim, eps=_EPS, dtype=torch.float32)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, branch: Tensor, residual: Tensor) -> Tensor:
        output: Tensor = self.LayerNorm(self.dropout(self.dense(branch)) + residual)
        return output


def _linear(width_in: int, width_out: int) -> nn.Linear:
    return nn.Linear(width_in, width_out, dtype=torch.float32)


def _initialise(module: nn.Module) -> None:
    """BERT's: normal of standard deviation 0.02, biases and the padding's rows 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INITIAL_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
