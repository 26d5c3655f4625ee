"""Checkpoints of Llama-3's form, made small: its template, BOS, three EOS ids, scaled rotations."""

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

BEGIN, END = "<|begin_of_text|>", ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
MARKERS = ("<|start_header_id|>", "<|end_header_id|>")
TEMPLATE = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\n' }}"
    "{{- 'Today Date: ' + date_string + '\n\n<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)


def make_llama(
    folder: Path, hidden_size: int, seed: int, padding: str = "left", kv_heads: int = 2
) -> str:
    """padding: what makes the files of two tokenizers differ, though their vocabularies agree."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained("toy/student", padding_side=padding)
    tokenizer.add_special_tokens({"additional_special_tokens": [BEGIN, *END, *MARKERS]})
    ids = dict(zip((BEGIN, *END), tokenizer.convert_tokens_to_ids([BEGIN, *END]), strict=True))
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = BEGIN, END[2], None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, ids[BEGIN])]
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        tie_word_embeddings=False,
        bos_token_id=ids[BEGIN],
        eos_token_id=[ids[end] for end in END],
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [ids[end] for end in END]
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
