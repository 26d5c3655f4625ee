"""The model's side of sampling a token: attention of one query, and a cache that grows in place."""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "grouped"


def grouped_attention(module, query, key, value, attention_mask, scaling, **options):
    """transformers' SDPA attention, but for one query a sequence: [B, H, 1, head size].

    There, behind a mask, it copies each key and value for all heads that share them, at every
    token. Seen as H / K queries of each of the K key heads they need no copy.
    """
    B, H, T, head_size = query.shape
    if T > 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    queries = query.view(B, key.shape[1], -1, head_size)
    output = scaled_dot_product_attention(queries, key, value, attention_mask, scale=scaling)
    return output.reshape(B, 1, H, -1), None  # a GPU's kernels may return it transposed


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class GrowingLayer(DynamicLayer):
    """transformers' cache of one layer, [B, H, T, head size], without its copy of all of it at
    every token: new tokens are written behind the old ones, where there is room for half as many
    more."""

    room: tuple[torch.Tensor, torch.Tensor] | None = None  # what keys and values are the front of

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            B, H, _, head_size = key_states.shape
            room = tuple(key_states.new_empty(B, H, end + end // 2 + 16, head_size) for _ in "kv")
            if length > 0:
                room[0][:, :, :length], room[1][:, :, :length] = self.keys, self.values
            self.room = room
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, length:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.room = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None
