"""Models by path or hub id: whole, sharded over ranks, with adapters, or frozen."""

from functools import partial
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist
from huggingface_hub import HfApi, try_to_load_from_cache
from torch.utils.checkpoint import checkpoint

from common.model.head import head_weight, hidden_states
from common.model.lora import AdaptersOff, add_adapters, init_adapters
from common.model.shard import DTYPES, device_of, make_buffers, read_shards, shard
from common.run.errors import UserError, check, one_line
from common.run.inputs import model_path
from common.run.preflight import check_size


def load_pretrained(kind: str, name: str, **kwargs):
    """Load transformers' AutoConfig, AutoTokenizer or AutoModelForCausalLM of a path or hub id."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # of downloads, which it has disabled too
    try:
        load = getattr(transformers, kind).from_pretrained
        return load(find(name), trust_remote_code=False, **kwargs)  # None would ask on stdin
    except UserError:
        raise
    except Exception as error:  # a damaged file, a missing package, an unknown architecture ...
        raise UserError(f"cannot load {name}: {one_line(error)}") from error


def find(name: str) -> str:
    """Return `name` as a path or hub id that exists. The hub is asked one question: its loader
    would retry for 30 s."""
    path = model_path(name)
    if Path(path).exists():
        check((Path(path) / "config.json").is_file(), f"model folder {name} has no config.json")
        return path
    try:
        if try_to_load_from_cache(path, "config.json") is None:
            info = HfApi().model_info(path, timeout=20, files_metadata=True)
            sizes = [f.size or 0 for f in info.siblings if f.rfilename.endswith(".safetensors")]
            print(f"downloading {name}: {sum(sizes) / 1e9:.1f} GB, as far as it is not there yet")
    except Exception as error:  # a dozen types; each of them means that there is no model
        raise UserError(
            f"model {name} is neither a local folder nor a hub id that answers "
            f"({one_line(error)}); a gated one needs its licence accepted, and hf auth login"
        ) from error
    return path


def check_shapes(*names: str, length: int, lora_rank: int = 0, device: str = "cpu") -> None:
    """Refuse prompts and completions of more tokens together than a model has positions for, which
    would give nonsense and no error, adapters wider than a layer of the first model, and large
    models where --device auto has found no GPU."""
    if lora_rank:
        empty_model(load_pretrained("AutoConfig", names[0]), torch.float32, lora_rank)
    for name in names:
        config = load_pretrained("AutoConfig", name).get_text_config()
        check(
            length <= config.max_position_embeddings,
            f"--max_prompt_tokens and --max_new_tokens are {length} together, and {name} takes at "
            f"most {config.max_position_embeddings} tokens",
        )
        if device == "auto":
            check_size(name, empty_model(config, torch.float32).num_parameters(), device)


def empty_model(config, dtype: torch.dtype, lora_rank: int = 0):
    """Make a model, or one with adapters, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except Exception as error:  # sizes that no layer can have, an unknown architecture ...
            name = config.name_or_path
            raise UserError(f"config.json of {name} is of no model: {one_line(error)}") from error
        if lora_rank:
            add_adapters(model, lora_rank)
    return model


def generation_config_of(name: str, config):
    """Return the GenerationConfig of a model's folder; not every folder has one."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model_path(name))
    except OSError:
        return GenerationConfig.from_model_config(config)


def load_model(name: str, dtype: str, device: torch.device, trainable: bool = False):
    """Load a causal language model: float32 weights if trainable, whatever `dtype`; else in it."""
    weights_dtype = torch.float32 if trainable else DTYPES[dtype]
    kwargs = {"dtype": weights_dtype, "use_safetensors": True}  # a pickle could run code
    model = load_pretrained("AutoModelForCausalLM", name, **kwargs).to(device)
    model.requires_grad_(trainable)
    _make_savable(model)
    model.eval()  # never train(): dropout would make the sampled and the trained policy differ
    _check_head(model, name)
    return model


def load_for_training(
    name: str, args, device: torch.device, *, trainable: bool = False, flops_role: str = "policy"
):
    """Load a model as load_model does; where there are ranks, sharded over them by FSDP2. Each rank
    reads its part of each tensor from the files: no whole copy is held anywhere. With --lora_rank
    what is trainable are adapters, and the rest is frozen in the compute type.

    flops_role: what its FLOPs count for, the policy or the teacher.
    """
    lora_rank = args.lora_rank if trainable else 0
    if dist.is_initialized():
        model = _load_sharded(name, args, device, trainable, lora_rank)
    else:
        model = load_model(name, args.dtype, device, trainable and not lora_rank)
        if lora_rank:
            add_adapters(model, lora_rank)
            init_adapters(model, args.seed)
        _recompute_activations(model, args)
    model.flops_role = flops_role
    return model


def load_reference(model, args, device: torch.device):
    """Return the frozen policy that a run begins from: a copy, or `model` with its adapters off."""
    return AdaptersOff(model) if args.lora_rank else load_for_training(args.model, args, device)


def _load_sharded(name: str, args, device: torch.device, trainable: bool, lora_rank: int):
    dtype = torch.float32 if trainable and not lora_rank else DTYPES[args.dtype]
    model = empty_model(load_pretrained("AutoConfig", name), dtype, lora_rank)
    model.name_or_path = model_path(name)
    model.generation_config = generation_config_of(name, model.config)
    _make_savable(model)
    if not lora_rank:
        model.requires_grad_(trainable)
    model.eval()
    _recompute_activations(model, args)
    # Adapters are gathered in float32: bfloat16 would round their updates away.
    shard(model, None if lora_rank else DTYPES[args.dtype], args.cpu_offload, device)
    model.to_empty(device="cpu" if args.cpu_offload else device)
    read_shards(model, find(name))
    if lora_rank:
        init_adapters(model, args.seed)
    make_buffers(model, device)
    _check_head(model, name)
    return model


def _make_savable(model) -> None:
    """Keep only the token ids of a generation config that save_pretrained would refuse, at the end
    of training: published ones hold a temperature for greedy decoding. None of it is used here."""
    from transformers import GenerationConfig

    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        ids = {n: v for n, v in config.to_diff_dict().items() if n.endswith("_token_id")}
        config.__dict__.update(GenerationConfig(**ids).__dict__)


def _recompute_activations(model, args) -> None:
    """--activation_checkpointing: keep each decoder layer's input only, compute the rest again in
    backward. (transformers' own switch works in train mode only, and turns the cache off.)"""
    if args.activation_checkpointing:
        for layer in model.get_decoder().layers:
            again = {"use_reentrant": False, "preserve_rng_state": False}
            layer.forward = partial(checkpoint, layer.forward, **again)


@torch.no_grad()
def _check_head(model, name: str) -> None:
    """Refuse a model that scales or caps its logits: the chunked head, hidden @ W.T, would train it
    wrong."""
    ids = torch.arange(4, device=device_of(model))[None]
    expected = model(input_ids=ids, use_cache=False).logits[0]
    hidden = hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool))
    logits = hidden @ head_weight(model, hidden.dtype).T
    same = torch.allclose(logits.float(), expected.float(), rtol=0.05, atol=0.05)
    check(
        same,
        f"{name} ({type(model).__name__}) scales or caps its logits behind the head: not supported",
    )
