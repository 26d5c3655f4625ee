"""The memory that a trainer needs, computed from the models' configs before anything is loaded.

Every number is of one rank, in bytes. What is counted, with P parameters, R ranks, c bytes of the
compute type (4 or 2), T tokens of a micro-batch, D hidden, V vocabulary:

    weights, gradients, optimizer    4 P / R, 4 P / R, 8 P / R; in host memory with --cpu_offload
    frozen models                    c P / R each
    LoRA                             c P / R frozen; the first line for the adapters alone; one
                                     linear layer's sum, in float32 and rounded, at a time
    gathered                         two layers and embedding and head at a time, where sharded
    activations                      of one layer and every layer's input with checkpointing, or all
    head                             a compute copy, its float32 gradient, and a chunk of logits
    sampling                         vLLM's share of the GPU, or the gathered model and its cache
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn

from common.model.flops import head_size
from common.model.load import empty_model
from common.run.inputs import model_path
from common.sampling.vllm_engine import batched_tokens

GB = 1e9
GRAPHS = 1 * GB  # vLLM's CUDA graphs: an allowance too
SEQUENCES = 4  # whole ones in vLLM's cache, of which most are shorter: with fewer it samples slowly
LOSS_COPIES = 44  # bytes a logit of float32 copies in opd.py's loss_fn, of jsd: measured
FIXED = 2 * GB  # CUDA context, communication buffers, fragmentation: an allowance, not measured

# For a plan without the network, which gated models need in any case.
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads")
FIELDS += ("num_key_value_heads", "intermediate_size", "tie_word_embeddings")
LLAMA3 = {
    "meta-llama/Llama-3.1-8B-Instruct": (4096, 32, 32, 8, 14336, False),
    "meta-llama/Llama-3.3-70B-Instruct": (8192, 80, 64, 8, 28672, False),
}
QWEN3 = {
    "Qwen/Qwen3-0.6B": (1024, 28, 16, 8, 3072, True),
    "Qwen/Qwen3-1.7B": (2048, 28, 16, 8, 6144, True),
    "Qwen/Qwen3-4B": (2560, 36, 32, 8, 9728, True),
    "Qwen/Qwen3-8B": (4096, 36, 32, 8, 12288, False),
    "Qwen/Qwen3-14B": (5120, 40, 40, 8, 17408, False),
    "Qwen/Qwen3-32B": (5120, 64, 64, 8, 25600, False),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that the plan needs."""

    params: int  # tied ones once
    layer: int  # parameters of one decoder layer
    lora: int  # parameters of adapters of rank 1 on its linear layers: their inputs and outputs
    layers: int
    hidden: int
    vocab: int
    inner: int  # width of the MLP
    qk: int  # width of queries and keys together
    kv: int  # width of keys and values together
    kv_heads: int
    qk_norm: bool

    @property
    def rest(self) -> int:
        return self.params - self.layers * self.layer

    def activations(self, c: int) -> int:
        """Bytes a token and layer that autograd keeps (attention without its T x T scores);
        c: bytes of the compute type."""
        norms = 16 * self.hidden + 2 * c * self.hidden
        attention = 2 * c * self.qk + (8 * self.qk if self.qk_norm else 0)
        return norms + attention + 4 * c * self.inner


@cache
def shape_of(name: str) -> Shape | None:
    """Return the shape of a model by its config.json, here or in the hub's cache, or by its name;
    else None."""
    try:
        model = model_of(name)
        return model and shape_of_model(model)
    except AttributeError:  # of an architecture with other names
        return None


def model_of(name: str, lora_rank: int = 0):
    """Return a model without memory for its weights; None if its config cannot be read."""
    try:
        config = config_of(name)
        return config and empty_model(config, torch.float32, lora_rank)
    except Exception:  # of many types: damaged, or of an unknown architecture
        return None


def config_of(name: str):
    """Return a model's config, without the network; None where there is none."""
    path = model_path(name)
    if (Path(path) / "config.json").exists() or try_to_load_from_cache(path, "config.json"):
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    for known, kind, vocab in ((QWEN3, "Qwen3Config", 151_936), (LLAMA3, "LlamaConfig", 128_256)):
        if name in known:
            fields = dict(zip(FIELDS, known[name], strict=True))
            return getattr(transformers, kind)(vocab_size=vocab, head_dim=128, **fields)
    return None


def shape_of_model(model) -> Shape:
    config, layer = model.config, model.get_decoder().layers[0]
    width = head_size(config)
    kv = config.num_key_value_heads * width
    return Shape(
        params=sum(p.numel() for p in model.parameters()),
        layer=sum(p.numel() for p in layer.parameters()),
        lora=sum(sum(m.weight.shape) for m in layer.modules() if isinstance(m, nn.Linear)),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        inner=config.intermediate_size,
        qk=config.num_attention_heads * width + kv,
        kv=2 * kv,
        kv_heads=config.num_key_value_heads,
        qk_norm=any("q_norm" in name for name, _ in layer.named_modules()),
    )


@dataclass(frozen=True)
class Item:
    name: str
    size: float  # bytes
    where: str = "device"  # or "host"
    phase: str = "always"  # or "update", "sampling"


@dataclass(frozen=True)
class Plan:
    """The items of one rank, and what they come to."""

    items: list[Item]

    def peak(self, phase: str) -> float:
        of_phase = ("always", phase)
        return sum(i.size for i in self.items if i.where == "device" and i.phase in of_phase)

    @property
    def device(self) -> float:
        return max(self.peak("update"), self.peak("sampling"))

    @property
    def host(self) -> float:
        return sum(item.size for item in self.items if item.where == "host")

    def table(self, gpu_memory: float | None) -> str:
        """Return each item in GB, what they come to, and whether it fits a GPU of so many bytes."""
        lines = [
            f"{i.size / GB:8.2f}  {i.where:6}  {i.name}" + f" ({i.phase})" * (i.phase != "always")
            for i in self.items
        ]
        lines.append(f"{self.peak('update') / GB:8.2f}  device  in the update")
        lines.append(f"{self.peak('sampling') / GB:8.2f}  device  while sampling")
        lines.append(f"{self.host / GB:8.2f}  host")
        if gpu_memory:
            fits = "fits" if self.device <= gpu_memory else "does NOT fit"
            lines.append(f"{fits} a GPU of {gpu_memory / GB:.0f} GB")
        return "\n".join(lines)


def moved_parameters(args, shape: Shape) -> int:
    """Count the parameters that a trainer changes: those of a model, or of its adapters."""
    return args.lora_rank * shape.lora * shape.layers if args.lora_rank else shape.params


def plan(
    args,
    trained: Shape,
    frozen: Sequence[Shape],
    sampled: Shape | None,
    ranks: int,
    gpu_memory: float | None = None,
    *,
    loss_is_fused: bool,
) -> Plan:
    """The plan of a trainer with these Args, whose rollouts come from `sampled` (None: from a
    file). gpu_memory: bytes of each rank's GPU; None on a CPU."""
    c = {"float32": 4, "bfloat16": 2}[args.dtype]
    sharded = ranks > 1 or args.cpu_offload or c == 2
    home = "host" if args.cpu_offload else "device"
    moved = moved_parameters(args, trained)
    params = moved / ranks
    items = [
        Item("weights, float32", 4 * params, home),
        Item("gradients, float32", 4 * params, home, "always" if home == "host" else "update"),
        Item("AdamW's moments, float32", 8 * params, home),
    ]
    if args.lora_rank:
        items.insert(0, Item("frozen weights", c * trained.params / ranks, home))
    items += [Item("frozen model", c * shape.params / ranks, home) for shape in frozen]
    if sharded:
        gathered = max(c * (2 * s.layer + s.rest) for s in (trained, *frozen))
        items.append(Item("gathered layers, embedding, head", gathered, phase="update"))
        largest = max(trained.layer, trained.vocab * trained.hidden)
        gradients = 8 * args.lora_rank * trained.lora if args.lora_rank else (c + 4) * largest
        items.append(Item("gradients of a gathered layer", gradients, phase="update"))
    if args.lora_rank:
        merged = (4 + c) * trained.hidden * trained.inner
        items.append(Item("merged weight of a linear layer", merged, phase="update"))
    length = args.max_prompt_tokens + args.max_new_tokens
    tokens = max(length, args.micro_batch_tokens)
    per_layer = trained.activations(c)
    kept = per_layer * trained.layers
    if args.activation_checkpointing:
        kept = per_layer + c * trained.hidden * trained.layers
    kept += 8 * trained.hidden + 4 * c * trained.inner  # outside the layers; backward's temporaries
    items.append(Item("activations", tokens * kept, phase="update"))
    head = trained.vocab * trained.hidden
    copy = (c if args.lora_rank else 4 + c) * head if sharded else 0
    copy += sum(c * s.vocab * s.hidden for s in frozen[:1] if sharded)  # a second one samples
    chunk = min(args.chunk_size, tokens)
    # GRPO's kernel writes the gradient over the logits. Plain torch makes float32 copies of a
    # chunk of both models' logits.
    copies = LOSS_COPIES if gpu_memory and not loss_is_fused else 0  # a CPU: slices
    logits = chunk * max(shape.vocab for shape in (trained, *frozen)) * (2 * c + copies)
    items.append(Item("head: copies, gradient, chunk of logits", copy + logits, phase="update"))
    if gpu_memory and sampled and args.backend != "torch":
        share = args.vllm_gpu_memory * gpu_memory
        items.append(Item("vLLM, asleep during the update", share, phase="sampling"))
    elif sampled:
        prompts = min(max(1, 512 // args.group_size), -(-args.prompts_per_step // ranks))
        rows = prompts * args.group_size
        cache = 1.5 * rows * length * sampled.layers * sampled.kv * c  # it grows by half
        copies = sharded + (args.lora_rank > 0 and sampled is trained)  # gathered, merged
        gathered = copies * c * sampled.params
        items.append(Item("sampling: model and cache", gathered + cache, phase="sampling"))
    if gpu_memory:
        items.append(Item("CUDA context and fragmentation (allowance)", FIXED))
    return Plan(items)


def engine_size(args, sampled: Shape, whole: float = SEQUENCES) -> float:
    """Bytes that vLLM needs of each GPU: its part of the weights, of the cache of so many whole
    sequences and of its longest forward pass, buffers of its sampler, and CUDA graphs."""
    c = {"float32": 4, "bfloat16": 2}[args.dtype]
    length = args.max_prompt_tokens + args.max_new_tokens
    cache = whole * length * sampled.layers * sampled.kv
    forward = batched_tokens(args) * (2 * sampled.inner + sampled.qk)
    parted = c * (sampled.params + forward) / args.tensor_parallel
    parted += c * cache / min(args.tensor_parallel, sampled.kv_heads)  # no head is divided
    residual = 4 * c * batched_tokens(args) * sampled.hidden
    # Logits, probabilities and log-probs in float32, and counts in int32.
    sampler = 4 * 4 * args.vllm_sequences * sampled.vocab
    return parted + residual + sampler + GRAPHS
