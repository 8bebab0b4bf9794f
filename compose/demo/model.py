"""The demo model for training: Qwen3-MoE's arithmetic in one short file, with all experts of a layer in one tensor.

Letters: B chats, T tokens of a chat, N = B * T rows, D model width, F expert width, E experts, K experts a token,
H heads, N_kv key-value heads, W head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from compose.checkpoint_folder import ModelSizes


class Attention(nn.Module):
    """Causal attention with normed, rotated queries and keys; all three projections are one matrix."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.query_width, self.kv_width = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
        self.query_key_value = nn.Parameter(torch.empty(self.query_width + 2 * self.kv_width, sizes.width))
        self.out = nn.Parameter(torch.empty(sizes.width, self.query_width))
        self.query_norm = nn.RMSNorm(sizes.head_width, sizes.norm_epsilon)
        self.key_norm = nn.RMSNorm(sizes.head_width, sizes.norm_epsilon)

    def forward(self, x_btd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        sizes, (num_chats, num_tokens, _) = self.sizes, x_btd.shape
        widths = [self.query_width, self.kv_width, self.kv_width]
        query, key, value = torch.split(functional.linear(x_btd, self.query_key_value), widths, dim=-1)
        query = self.query_norm(query.view(num_chats, num_tokens, sizes.heads, sizes.head_width)).transpose(1, 2)
        key = self.key_norm(key.view(num_chats, num_tokens, sizes.kv_heads, sizes.head_width)).transpose(1, 2)
        value = value.view(num_chats, num_tokens, sizes.kv_heads, sizes.head_width).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            _rotate(query, rotation),
            _rotate(key, rotation),
            value,
            is_causal=True,
            enable_gqa=sizes.heads != sizes.kv_heads,
        )
        return functional.linear(mixed.transpose(1, 2).reshape(num_chats, num_tokens, self.query_width), self.out)


class Experts(nn.Module):
    """A gate that picks K of E gated FFNs for each row. Weights of the K are made to sum to 1."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.gate = nn.Parameter(torch.empty(sizes.experts, sizes.width))
        self.gate_up = nn.Parameter(torch.empty(sizes.experts, 2 * sizes.expert_width, sizes.width))
        self.down = nn.Parameter(torch.empty(sizes.experts, sizes.width, sizes.expert_width))

    def forward(self, x_nd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the rows' new values [N, D], the gate's probabilities [N, E], and the experts taken [N, K]."""
        num_chosen = self.sizes.experts_per_token
        probabilities = functional.linear(x_nd, self.gate).float().softmax(dim=-1)
        weights, chosen = probabilities.topk(num_chosen, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        # Rows sorted by expert: each expert then reads one block, which is several times faster than a mask an expert.
        order = chosen.flatten().argsort()
        counts = chosen.flatten().bincount(minlength=self.sizes.experts).tolist()
        rows = x_nd.index_select(0, order // num_chosen)
        outputs = []
        for expert, block in enumerate(torch.split(rows, counts)):
            gate, up = functional.linear(block, self.gate_up[expert]).chunk(2, dim=-1)
            outputs.append(functional.linear(functional.silu(gate) * up, self.down[expert]))
        weighted = torch.cat(outputs) * weights.flatten().index_select(0, order).unsqueeze(-1).to(x_nd.dtype)
        return torch.zeros_like(x_nd).index_add(0, order // num_chosen, weighted), probabilities, chosen


class Layer(nn.Module):
    """Two residual lines."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(sizes.width, sizes.norm_epsilon)
        self.attention = Attention(sizes)
        self.experts_norm = nn.RMSNorm(sizes.width, sizes.norm_epsilon)
        self.experts = Experts(sizes)

    def attend(self, x_btd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """The first one."""
        attended: Tensor = self.attention(self.attention_norm(x_btd), rotation)
        return x_btd + attended

    def feed(self, x_nd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The second one, with the gate's probabilities and choices; every row for itself."""
        fed, probabilities, chosen = self.experts(self.experts_norm(x_nd))
        return x_nd + fed, probabilities, chosen


class DemoModel(nn.Module):
    """Token ids in, logits out; `balance_loss` is 1 where every layer uses its experts evenly, and more elsewhere."""

    def __init__(self, sizes: ModelSizes, seed: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Parameter(torch.empty(sizes.vocabulary, sizes.width))
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width, sizes.norm_epsilon)
        self.head = nn.Parameter(torch.empty(sizes.vocabulary, sizes.width))
        self._initialise(torch.Generator().manual_seed(seed))

    def typed_layers(self) -> Iterator[Layer]:
        """Returns the layers in order, typed."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def _initialise(self, generator: torch.Generator) -> None:
        """Every matrix by its own width; those that write into the residual start at zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            if name.endswith((".out", ".down")):
                nn.init.zeros_(parameter)
            elif name == "embedding":
                nn.init.normal_(parameter, std=0.5, generator=generator)
            elif name == "head":
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)

    def forward(self, ids_bt: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits [rows, V] of all rows or of those that `kept` [N] (bool) names; balance loss; experts by layer."""
        rotation = rotary_table(ids_bt.shape[1], self.sizes, self.head.dtype)
        x_btd = functional.embedding(ids_bt, self.embedding)
        balance, choices = x_btd.new_zeros((), dtype=torch.float32), []
        for index, layer in enumerate(self.typed_layers()):
            x_btd = layer.attend(x_btd, rotation)
            x_nd = x_btd.flatten(0, 1)
            # Rows that are not asked for end where no other row can look at them: in the last layer.
            if kept is not None and index == self.sizes.layers - 1:
                x_nd = x_nd[kept]
            x_nd, probabilities, chosen = layer.feed(x_nd)
            x_btd = x_nd.view_as(x_btd) if x_nd.numel() == x_btd.numel() else x_btd
            balance = balance + balance_loss(probabilities, chosen) / self.sizes.layers
            choices.append(chosen)
        return functional.linear(self.norm(x_nd), self.head), balance, choices


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Switch Transformers (arXiv 2101.03961), eq. 4: share of rows times mean probability, summed, times E."""
    num_experts = probabilities.shape[-1]
    shares = chosen.flatten().bincount(minlength=num_experts).float() / chosen.numel()
    return num_experts * (shares * probabilities.mean(dim=0)).sum()


def rotary_table(num_tokens: int, sizes: ModelSizes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, W], each half of W alike, as Qwen3 rotates."""
    frequencies = sizes.rope_theta ** -(torch.arange(0, sizes.head_width, 2) / sizes.head_width)
    angles = torch.outer(torch.arange(num_tokens).float(), frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x_bhtw: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosines, sines = rotation
    first, second = x_bhtw.chunk(2, dim=-1)
    return x_bhtw * cosines + torch.cat((-second, first), dim=-1) * sines
