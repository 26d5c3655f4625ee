"""Models and tokenizers by path or hub id, what must hold between two, and sharding over ranks."""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from common.data import prompt_text
from common.fingerprint import model_path
from common.logprob import device_of, full_weight, head_weight, hidden_states
from common.run import (
    UserError,
    check,
    num_ranks,
    one_line,
    rank,
    sum_over_ranks,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

logging.set_verbosity_error()
logging.disable_progress_bar()


def _find(name: str) -> str:
    """`name` as a path or hub id that exists. One question: the hub's loader retries for 30 s."""
    path = model_path(name)
    if Path(path).exists():
        check((Path(path) / "config.json").is_file(), f"model folder {name} has no config.json")
        return path
    try:
        if try_to_load_from_cache(path, "config.json") is None:
            HfApi().model_info(path, timeout=20)
    except Exception as error:  # a dozen types; each of them means that there is no model
        reason = one_line(error)
        message = f"model {name} is neither a local folder nor a hub id that answers ({reason})"
        raise UserError(message) from error
    return path


def _load(load, name: str, **kwargs):
    path = _find(name)
    try:
        return load(path, trust_remote_code=False, **kwargs)  # False: None would ask on stdin
    except Exception as error:  # a damaged file, a missing package, an unknown architecture ...
        raise UserError(f"cannot load {name}: {one_line(error)}") from error


def load_tokenizer(
    name: str, teacher: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `name`; with the chat template of model `chat_template`, if one is given.

    The teacher's, if one is given, must mean the same by every token: distillation compares
    distributions token by token. A base model without a template is trained on its teacher's.
    """
    tokenizer = _load(AutoTokenizer.from_pretrained, name)
    if chat_template is not None:
        tokenizer.chat_template = _load(AutoTokenizer.from_pretrained, chat_template).chat_template
    theirs = None if teacher is None else _load(AutoTokenizer.from_pretrained, teacher)
    if theirs is not None and tokenizer.chat_template is None:
        print(f"{name} has no chat template: it is trained on that of {teacher}")
        tokenizer.chat_template = theirs.chat_template
    check(
        tokenizer.chat_template is not None,
        f"{chat_template or name} has no chat template; name a model that has one of the same "
        "family with --chat_template",
    )
    check(tokenizer.eos_token_id is not None, f"the tokenizer of {name} has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks go by length, never by token
    if theirs is not None:
        differing = len(dict(tokenizer.get_vocab().items() ^ theirs.get_vocab().items()))
        check(
            differing == 0,
            f"teacher {teacher} and student {name} have different vocabularies ({differing} tokens "
            "differ); choose two models of one family",
        )
        if theirs.chat_template and prompt_text(theirs, "1+1") != prompt_text(tokenizer, "1+1"):
            print(f"{name} and {teacher} have different chat templates: prompts are {name}'s")
    return tokenizer


def lacks_chat_template(name: str) -> bool:
    """Whether a model that is on this machine has none."""
    path = model_path(name)
    here = Path(path).exists() or try_to_load_from_cache(path, "tokenizer_config.json")
    return bool(here) and _load(AutoTokenizer.from_pretrained, name).chat_template is None


def end_ids(tokenizer, *models: PreTrainedModel) -> list[int]:
    """Every id that ends a turn: the tokenizer's EOS, what the chat template writes behind an
    answer, and those of the models' configs. A base model has another EOS than its instruct
    siblings."""
    ids = {tokenizer.eos_token_id}
    turn = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("2")[2]
    behind = tokenizer(text, add_special_tokens=False)["input_ids"][:1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids |= special.intersection(behind)
    for config in (c for model in models for c in (model.generation_config, model.config)):
        listed = getattr(config, "eos_token_id", None)
        ids |= set(listed) if isinstance(listed, list) else {listed}
    return sorted(ids - {None})


def share_end_ids(tokenizer, *models: PreTrainedModel) -> None:
    """Let what ends a turn of one model end those of all of them: a student that learns to write
    its teacher's EOS would else never stop. Goes into what is saved of them."""
    ids = end_ids(tokenizer, *models)
    for model in models:
        model.generation_config.eos_token_id = ids


def check_lengths(args, *names: str) -> None:
    """Positions that a model was not made for give nonsense, and no error."""
    length = args.max_prompt_tokens + args.max_new_tokens
    for name in names:
        limit = _load(AutoConfig.from_pretrained, name).get_text_config().max_position_embeddings
        check(
            length <= limit,
            f"--max_prompt_tokens and --max_new_tokens are {length} together, and {name} takes at "
            f"most {limit} tokens",
        )


def _make_savable(config: GenerationConfig) -> None:
    """Published ones hold a temperature for greedy decoding, which save_pretrained refuses: at the
    end of training. None of these settings is used here."""
    try:
        config.validate(strict=True)
    except ValueError:
        ids = {n: v for n, v in config.to_diff_dict().items() if n.endswith("_token_id")}
        config.__dict__.update(GenerationConfig(**ids).__dict__)


def load_model(
    name: str, dtype: str, device: torch.device, trainable: bool = False
) -> PreTrainedModel:
    """A causal language model: float32 weights if trainable, whatever `dtype`; else in it."""
    weights_dtype = torch.float32 if trainable else DTYPES[dtype]
    kwargs = {"dtype": weights_dtype, "use_safetensors": True}  # a pickle could run code
    model = _load(AutoModelForCausalLM.from_pretrained, name, **kwargs).to(device)
    model.requires_grad_(trainable)
    _make_savable(model.generation_config)
    model.eval()  # never train(): dropout would make the sampled and the trained policy differ
    _check_head(model, name)
    return model


def load_for_training(
    name: str, args, device: torch.device, trainable: bool = False
) -> PreTrainedModel:
    """As load_model; where there are ranks, sharded over them by FSDP2. Each rank reads its part of
    each tensor from the files: no whole copy is held anywhere."""
    if not dist.is_initialized():
        model = load_model(name, args.dtype, device, trainable)
        _recompute_activations(model, args)
        return model
    config = _load(AutoConfig.from_pretrained, name)
    with torch.device("meta"):
        dtype = torch.float32 if trainable else DTYPES[args.dtype]
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.name_or_path = model_path(name)
    try:
        model.generation_config = GenerationConfig.from_pretrained(model_path(name))
    except OSError:  # not every folder has one
        model.generation_config = GenerationConfig.from_model_config(config)
    _make_savable(model.generation_config)
    model.requires_grad_(trainable).eval()
    _recompute_activations(model, args)
    _shard(model, args, device)
    model.to_empty(device="cpu" if args.cpu_offload else device)
    _read_shards(model, name)
    _make_buffers(model, device)
    _check_head(model, name)
    return model


def _recompute_activations(model: PreTrainedModel, args) -> None:
    """--activation_checkpointing: keep each decoder layer's input only, compute the rest again in
    backward. (transformers' own switch works in train mode only, and turns the cache off.)"""
    if args.activation_checkpointing:
        for layer in model.get_decoder().layers:
            again = {"use_reentrant": False, "preserve_rng_state": False}
            layer.forward = partial(checkpoint, layer.forward, **again)


def _shard(model: PreTrainedModel, args, device: torch.device) -> None:
    """FSDP2: a group of parameters for each decoder layer, and one for the rest, where embedding
    and head are, which may be tied. They are gathered as `dtype`, gradients summed in float32."""
    options = {"mesh": init_device_mesh(device.type, (num_ranks(),)), "reshard_after_forward": True}
    options |= {"mp_policy": MixedPrecisionPolicy(DTYPES[args.dtype], torch.float32)}
    if args.cpu_offload:
        options |= {"offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")}
    for module in (*model.get_decoder().layers, model):
        fully_shard(module, **options)
        # The loss is divided by a sum over all ranks already: gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def _read_shards(model: PreTrainedModel, name: str) -> None:
    """This rank's rows of each parameter, from the safetensors files."""
    files = _weight_files(name)
    missing = [parameter for parameter, _ in model.named_parameters() if parameter not in files]
    check(
        not missing, f"{name} cannot be sharded: its files have no tensor {', '.join(missing[:2])}"
    )
    with contextlib.ExitStack() as stack:
        opened = {f: stack.enter_context(safe_open(f, "pt")) for f in set(files.values())}
        for key, parameter in model.named_parameters():
            shard, rows = parameter.to_local(), opened[files[key]].get_slice(key)
            whole = tuple(rows.get_shape())
            check(whole == tuple(parameter.shape), f"{name}: {key} has shape {whole} in the files")
            first = min(len(parameter), rank() * -(-len(parameter) // num_ranks()))
            if len(shard) > 0:
                shard.copy_(rows[first : first + len(shard)])


def _weight_files(name: str) -> dict[str, str]:
    """Tensor -> file."""
    path, missing_is_none = _find(name), {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(path, "model.safetensors.index.json", **missing_is_none)
    if index is not None:
        files = json.loads(Path(index).read_text())["weight_map"]
        paths = {file: cached_file(path, file) for file in set(files.values())}
        return {tensor: paths[file] for tensor, file in files.items()}
    single = cached_file(path, "model.safetensors", **missing_is_none)
    check(single is not None, f"{name} has no safetensors files")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def _make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Rotary frequencies, which are in no file: computed again, as the module does."""
    for owner in {name.rpartition(".")[0] for name, _ in model.named_buffers()}:
        module = model.get_submodule(owner)
        fresh = type(module)(module.config)
        for key, buffer in fresh.named_buffers(recurse=False):
            module.register_buffer(key, buffer.to(device), persistent=False)


def keep_gradients(model, keep: bool) -> None:
    """Whether the next backward adds to float32 gradients of whole parameters on the device, and
    leaves their sum over ranks, and their way to host memory, to one that does not keep them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not keep)


def clip_grad_norm(parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale the gradients down to a norm of `limit` over all parameters and ranks; returns the norm
    before."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return full_weight(norm, torch.float32)


@contextlib.contextmanager
def gathered(model) -> Iterator[None]:
    """The whole model on each rank, for sampling: then ranks need not decode in step."""
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in groups:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in groups:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


@torch.no_grad()
def _check_head(model: PreTrainedModel, name: str) -> None:
    """The chunked head is hidden @ W.T: a model that scales or caps logits would train wrong."""
    ids = torch.arange(4, device=device_of(model))[None]
    expected = model(input_ids=ids, use_cache=False).logits[0]
    hidden = hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool), model.dtype)
    same = torch.allclose(
        (hidden @ head_weight(model, model.dtype).T).float(), expected.float(), rtol=0.05, atol=0.05
    )
    check(
        same,
        f"{name} ({type(model).__name__}) scales or caps its logits behind the head: not supported",
    )


def forward_flops(model: PreTrainedModel, rollouts: list, shared: int = 1) -> float:
    """FLOPs of a forward pass over prompts and completions (2 a multiply-add), of a dense model's
    matrix products; backward costs twice as much.

    The head counts at the tokens that predict a completion token, attention at pairs of a query and
    a key that it may see. `shared`: so many completions have their prompt computed once (sampling).
    Of all ranks.
    """
    config, head = model.config, model.get_output_embeddings()
    body = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m != head)
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * head_size
    flops = 0.0
    for rollout in rollouts:
        prompt, completion = len(rollout.prompt_ids), len(rollout.completion_ids)
        length = prompt + completion - 1  # the last token predicts nothing
        prompt_pairs, all_pairs = prompt * (prompt + 1) / 2, length * (length + 1) / 2
        flops += 2 * body * (prompt / shared + completion - 1)
        flops += 2 * head.weight.numel() * completion
        flops += pair * (prompt_pairs / shared + all_pairs - prompt_pairs)
    return sum_over_ranks(flops)
