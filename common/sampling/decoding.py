"""Attention of a single query, and a key-value cache that grows in place."""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "grouped"


def grouped_attention(module, query, key, value, attention_mask, scaling, **options):
    """Attend as transformers' SDPA does, but copy nothing for a single query [B, H, 1, head size]:
    behind a mask, SDPA copies the K key heads for the H heads that share them, at every token."""
    B, H, T, head_size = query.shape
    if T > 1:
        options["scaling"] = scaling
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    queries = query.view(B, key.shape[1], -1, head_size)  # [B, K, H / K, head size]
    output = scaled_dot_product_attention(queries, key, value, attention_mask, scale=scaling)
    return output.reshape(B, 1, H, -1), None  # a GPU's kernels may return it transposed


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class GrowingLayer(DynamicLayer):
    """A layer's cache [B, H, T, head size] that is not copied at every token: `keys` and `values`
    are the front of buffers half as long again, in which new tokens are written behind the old."""

    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        # Repeating or dropping rows replaces keys and values: they leave the buffers.
        if self.buffers and self.keys.data_ptr() != self.buffers[0].data_ptr():
            self.buffers = None
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            B, H, _, head_size = key_states.shape
            shape = (B, H, end + end // 2 + 16, head_size)
            buffers = (key_states.new_empty(shape), value_states.new_empty(shape))
            if length > 0:
                buffers[0][:, :, :length], buffers[1][:, :, :length] = self.keys, self.values
            self.buffers = buffers
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, length:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


def new_cache() -> Cache:
    """Return an empty cache of growing layers."""
    return Cache(layer_class_to_replicate=GrowingLayer)
