"""Rollouts: token ids in, token ids out. Text is decoded for the verifier and for people, and never
encoded again.

Training samples at top_p = 1 without top_k, and log-probs are those of the distribution that was
sampled from, that is, after the temperature.

Two engines sample behind one interface (generate, sync, sleep, batch_size): TorchEngine uses the
trained model itself; VLLMEngine holds a copy of it, and proves after each sync that it does.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, Cache, DynamicLayer, GenerationConfig

from common.data import Problem, Prompt, is_unicode, read_jsonl
from common.logprob import (
    device_of,
    full_weight,
    full_weights,
    head_logprobs,
    hidden_states,
)
from common.model import DTYPES, end_ids, gathered
from common.run import (
    RunFailure,
    UserError,
    check,
    gather,
    num_ranks,
    on_first_of_host,
    one_line,
    rank,
    share_of,
)
from common.verifier import OUTCOMES, Verdict, Verifier


@dataclass(eq=False)
class Rollout:
    """One prompt with one sampled completion."""

    prompt_ids: list[int]
    completion_ids: list[int]  # ends with the EOS token, if it ended by one
    logprobs: torch.Tensor  # float32 [len(completion_ids)], at the sampling temperature
    finish: str  # "eos", "length" (max_new_tokens cut it off), or "given" (not sampled here)
    text: str  # the completion, decoded without special tokens
    problem: str = ""
    gold: str = ""
    opens_thought: bool = False  # the prompt ends inside <think>
    key: tuple[int, ...] = ()  # seeds and number of the sample: the same at any number of ranks
    verdict: Verdict | None = None
    advantage: float = 0.0  # this and the next two are set by grpo.py
    weight: float = 1.0  # of each of its tokens in the loss
    old_logprobs: torch.Tensor | None = None  # the trainer's own, before the first update

    def row(self) -> dict:
        """What is saved of it: fkl_warmup.py --rollouts reads such rows back."""
        return {
            "problem": self.problem,
            "answer": self.gold,
            "completion": self.text,
            "outcome": self.verdict.outcome,
            "extracted": self.verdict.answer,
            "finish": self.finish,
            "prompt_ids": self.prompt_ids,
            "completion_ids": self.completion_ids,
        }

    @classmethod
    def from_row(cls, row: dict) -> "Rollout":
        """A saved row again, without its log-probs."""
        ids, verdict = row["completion_ids"], Verdict(row["outcome"], row["extracted"])
        logprobs = torch.zeros(len(ids))
        own = (row["finish"], row["completion"], row["problem"], row["answer"])
        return cls(row["prompt_ids"], ids, logprobs, *own, verdict=verdict)


# === transformers ===


def draw(logprobs: torch.Tensor, uniforms: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Inverse-CDF sampling: logprobs [B, V] float32, uniforms [B] in [0, 1) -> token ids [B].

    One uniform a token, drawn ahead, makes a sample depend on its own seed alone: not on the batch
    that it shares, nor on who else has finished. It is also much faster than torch.multinomial over
    a large vocabulary.
    """
    weights = logprobs.exp()
    if top_k > 0:
        kept = weights.topk(min(top_k, weights.shape[-1])).values[:, -1:]
        weights = weights.masked_fill(weights < kept, 0.0)
    if top_p < 1.0:
        ordered, order = (weights / weights.sum(-1, keepdim=True)).sort(descending=True)
        # The token that crosses top_p is kept: what stands before it sums to less.
        dropped = (ordered.cumsum(-1) - ordered) >= top_p
        weights = weights.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
    cdf = weights.cumsum(-1)
    # Below the last value even after rounding, so that no token of probability 0 behind it can be
    # reached.
    target = (uniforms[:, None] * cdf[:, -1:]).minimum(
        torch.nextafter(cdf[:, -1:], torch.zeros_like(cdf[:, -1:]))
    )
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


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


def rows_that_fit(config, length: int, itemsize: int, free: int) -> int:
    """How many sequences of `length` tokens have their caches, which grow by half, and float32
    logits, of which there are some four at a time, in half of `free` bytes. At least 1."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * itemsize
    return max(1, int(free / 2 / (1.5 * length * cache + 16 * config.vocab_size)))


class TorchEngine:
    """Samples with the trained model itself, through transformers: nothing to synchronise.

    The prompt is computed once and shared by its G completions; finished sequences leave the batch;
    sample (p, g) of seed S is the same whatever else is in the batch.
    """

    num_ranks = 1  # that share one engine

    def __init__(self, model, tokenizer, dtype: torch.dtype = torch.float32, batch_size: int = 512):
        self.model, self.tokenizer, self.dtype, self.batch_size = (
            model,
            tokenizer,
            dtype,
            batch_size,
        )
        self.eos_ids = torch.tensor(end_ids(tokenizer, model), device=device_of(model))

    def sync(self) -> dict[str, float]:
        """Nothing to do, nothing to prove: the weights it samples with are the trained ones."""
        return {}

    def sleep(self) -> None:
        """Nothing to free."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        group_size: int,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: Sequence[int],
        top_p: float = 1.0,
        top_k: int = 0,
        first: int = 0,
    ) -> list[Rollout]:
        """P prompts -> N = P·G rollouts, grouped. Temperature 0 is greedy, with log-probs at 1.
        `first`: the seeds are those of prompts first, first + 1, ... of a step."""
        rollouts, device = [], device_of(self.model)
        rows = self.batch_size
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            length = max(map(len, prompts), default=0) + max_new_tokens
            rows = min(rows, rows_that_fit(self.model.config, length, self.dtype.itemsize, free))
        per_batch = max(1, rows // group_size)
        with torch.no_grad(), gathered(self.model):
            for start in range(0, len(prompts), per_batch):
                batch = prompts[start : start + per_batch]
                uniforms = [
                    np.random.default_rng([*seed, first + start + p, g]).random(
                        max_new_tokens, dtype=np.float32
                    )
                    for p in range(len(batch))
                    for g in range(group_size)
                ]
                uniforms = torch.from_numpy(np.stack(uniforms)).to(device)
                rollouts += self._generate_batch(
                    batch, group_size, uniforms, temperature, top_p, top_k
                )
        return rollouts

    def _generate_batch(
        self, prompts, group_size, uniforms, temperature, top_p, top_k
    ) -> list[Rollout]:
        device, pad = uniforms.device, self.tokenizer.pad_token_id
        num_rows, max_new_tokens = uniforms.shape
        # Prefill: each prompt once, left-padded so that all completions start in one column.
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        padded = bool((lengths < width).any())  # without padding attention is faster with no mask
        cache = Cache(layer_class_to_replicate=GrowingLayer)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(ids, mask if padded else None, positions, cache)
        # Share it over the group.
        cache.batch_repeat_interleave(group_size)
        logits, mask = (t.repeat_interleave(group_size, 0) for t in (logits, mask))
        positions = lengths.repeat_interleave(group_size)
        # Decode. `rows` are the sequences that are still in the shrinking batch.
        tokens = torch.full((num_rows, max_new_tokens), pad, device=device)
        logprobs = torch.zeros((num_rows, max_new_tokens), device=device)
        num_tokens = torch.full((num_rows,), max_new_tokens, device=device)
        ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
        rows = torch.arange(num_rows, device=device)
        for t in range(max_new_tokens):
            logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
            greedy = temperature == 0
            sampled = logp.argmax(-1) if greedy else draw(logp, uniforms[rows, t], top_p, top_k)
            tokens[rows, t] = sampled
            logprobs[rows, t] = logp.gather(-1, sampled[:, None]).squeeze(-1)
            just_ended = rows[torch.isin(sampled, self.eos_ids) & ~ended[rows]]
            ended[just_ended], num_tokens[just_ended] = True, t + 1
            alive = (~ended[rows]).nonzero().squeeze(-1)
            if len(alive) == 0 or t + 1 == max_new_tokens:
                break
            # To drop rows copies the cache of the others: it waits until a quarter is finished.
            if len(alive) <= 0.75 * len(rows):
                cache.batch_select_indices(alive)
                rows, sampled, mask, positions = (
                    x[alive] for x in (rows, sampled, mask, positions)
                )
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            seen = mask if padded else None
            logits = self._forward(sampled[:, None], seen, positions[:, None], cache)
            positions = positions + 1
        finish = ["eos" if e else "length" for e in ended.tolist()]
        tokens, logprobs = tokens.cpu(), logprobs.cpu()
        rollouts = []
        for n, length in enumerate(num_tokens.tolist()):
            ids = tokens[n, :length].tolist()
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            prompt_ids = prompts[n // group_size]
            rollouts.append(Rollout(prompt_ids, ids, logprobs[n, :length].clone(), finish[n], text))
        return rollouts

    def _forward(self, ids, mask, position_ids, cache) -> torch.Tensor:
        """Logits [B, V] of the last column; the cache grows by ids' columns."""
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


# === vLLM ===

MAX_NUM_SEQS = 256  # that it decodes at once: its own default on large GPUs is 1,024, and a buffer
# of the sampler takes so many times the vocabulary
VLLM_VERSION = "0.32."  # the calls below are its calls
# Of the mean |log-prob difference|. bfloat16 rounds a logit of 16 to 32 by up to 0.06, on both
# sides: 0.04 was seen of a healthy SmolLM2-135M.
CANARY_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class WeightSyncError(RunFailure):
    """The engine does not hold the trained weights, or does not compute with them."""


def resolve_backend(args, device: torch.device) -> str:
    """`args.backend`, with auto resolved: vLLM where CUDA and vLLM are there, else torch."""
    installed, install = find_spec("vllm") is not None, "requirements-gpu.txt"
    backend, share = args.backend, args.vllm_gpu_memory
    check(0 < share <= 1, f"--vllm_gpu_memory is {share}; it must be above 0 and at most 1")
    if backend == "auto":
        # To start an engine takes longer than all the sampling of the toy.
        on_gpu = device.type == "cuda" and not args.model.startswith("toy/")
        backend, slow = "vllm" if on_gpu and installed else "torch", on_gpu and not installed
        install_line = f"pip install -r {install}; or insist with --backend torch"
        check(not slow, f"vLLM is missing, and without it rollouts take days: {install_line}")
    if backend == "vllm":
        check(installed, f"--backend vllm, but vLLM is not installed: pip install -r {install}")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # shared with the trainer
        # Else attention multiplies float32 in TF32, which the canary sees (2e-3 to 4e-3).
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
        version = import_module("vllm").__version__
        known = version.startswith(VLLM_VERSION)
        check(known, f"vLLM {version} is installed, 0.32.0 is needed: pip install -r {install}")
    print(f"rollouts: {backend}")
    return backend


def make_engine(backend: str, model, tokenizer, prompts: list[Prompt], args):
    """The engine that samples from `model`; some of `prompts` become its canary."""
    if backend == "torch":
        return TorchEngine(model, tokenizer, DTYPES[args.dtype])
    return VLLMEngine(model.name_or_path, tokenizer, args, model, [p.ids for p in prompts[:4]])


def batched_tokens(args) -> int:
    """Tokens of a vLLM forward pass at most: one whole sequence, and not few."""
    return max(args.max_prompt_tokens + args.max_new_tokens, 8192)


class VLLMEngine:
    """Samples with vLLM, in this process, from `model`'s weights; without a model, from a folder's.

    It starts with random weights: what it samples from has come through `sync`, which shows that it
    has. On a GPU it sleeps between `sleep` and `sync`, so that the update has the memory.
    """

    batch_size = 4096  # sequences in one call; vLLM schedules them itself

    def __init__(
        self, name: str, tokenizer, args, model=None, canary: Sequence[list[int]] = ()
    ) -> None:
        from vllm import LLM

        self.model, self.tokenizer, self.dtype = model, tokenizer, DTYPES[args.dtype]
        self.canary = [ids[-256:] for ids in canary]
        self.trained = model is not None and any(p.requires_grad for p in model.parameters())
        self.can_sleep = model is not None and device_of(model).type == "cuda"
        self.asleep = False
        on_cpu = not torch.cuda.is_available()
        if model is not None and on_cpu:
            _keep_plain_cpu_weights()
        self.num_ranks, own = args.tensor_parallel, {}
        if dist.is_initialized():
            own = _inside_ranks(self.num_ranks)
        share = args.vllm_gpu_memory / (num_ranks() if on_cpu else 1)  # a CPU's memory is shared
        threads = torch.get_num_threads()
        length = args.max_prompt_tokens + args.max_new_tokens
        try:
            self.llm = LLM(
                name,
                skip_tokenizer_init=True,  # token ids in, token ids out
                load_format="auto" if model is None else "dummy",
                dtype=args.dtype,
                max_model_len=length,
                max_num_seqs=MAX_NUM_SEQS,
                max_num_batched_tokens=batched_tokens(args),
                enable_chunked_prefill=not on_cpu,  # it breaks the seeds of a CPU's samples
                gpu_memory_utilization=share,
                enforce_eager=args.enforce_eager,
                enable_sleep_mode=self.can_sleep,
                logprobs_mode="processed_logprobs",  # after the temperature
                generation_config="vllm",  # else the model's own top_k and penalties
                seed=args.seed,
                **own,
            )
            self.eos_ids = end_ids(tokenizer, model or _configs_of(name))
            torch.set_num_threads(threads)  # vLLM leaves one: an offloaded update needs them all
            proof = self.sync() if model else None
        except Exception as error:  # of many types: too little memory, an unknown architecture ...
            sizes = "--max_prompt_tokens or --max_new_tokens"
            hint = f"; change --vllm_gpu_memory, or shorten {sizes}"
            known = any(word in str(error).lower() for word in ("memory", "max_model_len"))
            hint = hint if known else "; --backend torch may"
            raise UserError(f"vLLM cannot run {name}: {one_line(error)}{hint}") from error
        if proof:
            print(
                f"vLLM holds the weights of {name}: {proof['sync/parameters']} tensors equal to "
                f"the bit, log-probs within {proof['sync/canary_max']:.1e}"
            )

    # --- generate ---

    def generate(
        self,
        prompts: Sequence[list[int]],
        group_size: int,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: Sequence[int],
        top_p: float = 1.0,
        top_k: int = 0,
        first: int = 0,
    ) -> list[Rollout]:
        """As TorchEngine's: P prompts -> N = P·G rollouts, grouped. Seeded by `seed` and prompt."""
        if self.asleep:  # its weights are gone until the next sync
            if self.trained:
                raise WeightSyncError("vLLM was asked for rollouts after it slept, before a sync")
            self.sync()
        copies = group_size if temperature == 0 else 1  # vLLM decodes greedily once a prompt
        outputs = self._run(
            prompts,
            [
                {
                    "n": group_size // copies,
                    "temperature": temperature,
                    "top_p": top_p,
                    "top_k": top_k,
                    "max_tokens": max_new_tokens,
                    "seed": int(np.random.SeedSequence([*seed, first + p]).generate_state(1)[0]),
                }
                for p in range(len(prompts))
            ],
        )
        rollouts = []
        for prompt_ids, output in zip(prompts, outputs, strict=True):
            for sample in output.outputs * copies:
                ids, logprobs = list(sample.token_ids), torch.tensor(sample.logprobs.logprobs)
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                finish = "eos" if ids[-1] in self.eos_ids else "length"
                rollouts.append(Rollout(prompt_ids, ids, logprobs, finish, text))
        return rollouts

    def _run(self, prompts: Sequence[list[int]], sampling: list[dict]) -> list:
        from vllm import SamplingParams

        if not prompts:
            return []
        shared = {"logprobs": 0, "flat_logprobs": True, "detokenize": False}
        shared["stop_token_ids"] = self.eos_ids
        try:
            return self.llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                [SamplingParams(**shared | own) for own in sampling],
                use_tqdm=False,
            )
        except Exception as error:  # whatever it was, this engine is finished
            raise RunFailure(f"vLLM stopped while sampling: {one_line(error)}") from error

    # --- sync ---

    def sleep(self) -> None:
        """Free the GPU's memory. The engine forgets its weights, and the next sync brings them:
        level 1 would keep them in pinned host memory, beside the trainer's own model."""
        if self.can_sleep and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def sync(self) -> dict[str, float]:
        """Load the model's weights into the engine, then prove both that it holds them (bit by bit)
        and that it computes with them (log-probs of a canary batch).

        The second alone would not do: at lr 1e-6 a step moves bfloat16 log-probs by less than their
        rounding. Nor would the first: engines keep hidden, packed copies. Raises WeightSyncError.
        """
        began = time.perf_counter()
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self._load()
        loaded = time.perf_counter()
        stale, count = self._apply(lambda engine: stale_parameters(engine, self.model, self.dtype))
        stale = list(dict.fromkeys(gather(stale)))  # ranks stop together
        if stale:
            named = ", ".join(stale[:5]) + (", ..." if len(stale) > 5 else "")
            raise WeightSyncError(
                f"after the sync {len(stale)} of vLLM's parameters differ from the trained ones "
                f"({named}); --backend torch samples with the trained model itself"
            )
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise WeightSyncError("vLLM keeps prefixes that it computed with the old weights")
        proven = time.perf_counter()
        mean, largest = self.canary_difference()
        limit = CANARY_LIMIT[self.dtype]
        if not mean <= limit:  # NaN too
            raise WeightSyncError(
                f"vLLM holds the trained weights but computes with others: its canary log-probs "
                f"differ from the trainer's by {mean:.2g} in the mean (limit {limit:g}) and by "
                f"{largest:.2g} at most; try --enforce_eager, or --backend torch"
            )
        return {
            "sync/parameters": count,
            "sync/canary_mean": mean,
            "sync/canary_max": largest,
            "sync/load_seconds": loaded - began,
            "sync/freshness_seconds": proven - loaded,
            "sync/canary_seconds": time.perf_counter() - proven,
        }

    def _load(self) -> None:
        try:
            self._apply(lambda engine: engine.load_weights(full_weights(self.model, self.dtype)))
        except Exception as error:
            raise WeightSyncError(f"vLLM took no new weights: {one_line(error)}") from error

    def _apply(self, function: Callable):
        return self.llm.apply_model(function)[0]

    @torch.no_grad()
    def canary_difference(self) -> tuple[float, float]:
        """Mean and largest |difference| of the engine's and the trainer's log-probs at temperature
        1, over the canary's prompts and eight sampled tokens each: prefill and decoding. Of several
        ranks the worst."""
        own = {"temperature": 1.0, "seed": 0, "max_tokens": 8, "prompt_logprobs": 0}
        outputs = self._run(self.canary, [own] * len(self.canary))
        sequences, theirs = [], []
        for ids, output in zip(self.canary, outputs, strict=True):
            sample = output.outputs[0]
            sequences.append(torch.tensor(ids + list(sample.token_ids)))
            theirs += output.prompt_logprobs.logprobs + sample.logprobs.logprobs
        ids = pad_sequence(sequences, batch_first=True).to(device_of(self.model))
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=ids.device)
        mask = torch.arange(ids.shape[1] - 1, device=ids.device) < lengths[:, None] - 1
        hidden = hidden_states(self.model, ids[:, :-1], mask, self.dtype)
        ours = head_logprobs(hidden, self.model, ids[:, 1:][mask], 1.0, 1024)
        difference = (ours.cpu() - torch.tensor(theirs)).abs()
        every = gather([(difference.mean().item(), difference.max().item())])
        return max(mean for mean, _ in every), max(largest for _, largest in every)


def _configs_of(name: str) -> SimpleNamespace:
    """A model's configs without its weights. Not every folder has a generation_config.json."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    try:
        generation_config = GenerationConfig.from_pretrained(name)
    except OSError:
        generation_config = GenerationConfig()
    return SimpleNamespace(config=config, generation_config=generation_config)


def stale_parameters(engine, model, dtype: torch.dtype) -> tuple[list[str], int]:
    """Names of the engine's parameters that are not, bit by bit, the model's in `dtype`; and how
    many tensors of the model were compared.

    It goes by the engine's own parameters, not by what the load reports: q, k and v are rows of one
    qkv_proj, and a vocabulary may be padded. A parameter that cannot be read, since the engine has
    packed it away, is stale.
    """
    trained, unseen = dict(model.named_parameters()), set(dict(model.named_parameters()))
    stale = []
    for name, parameter in engine.named_parameters():
        module = name.split(".")[-2]
        start = 0
        for part in getattr(engine, "packed_modules_mapping", {}).get(module, [module]):
            part_name = name.replace(f".{module}.", f".{part}.")
            if part_name not in trained:
                stale.append(f"{part_name} (not in the model)")
                continue
            whole = full_weight(trained[part_name], dtype)
            expected = held(engine.get_submodule(name.rpartition(".")[0]), part, whole)
            actual = parameter[start : start + len(expected)]
            if not same_bits(actual, expected):
                stale.append(part_name)
            start += len(expected)
            unseen.discard(part_name)
        if start < len(parameter) and module not in ("embed_tokens", "lm_head"):
            stale.append(f"{name} (rows beyond the model's)")
    return stale + [f"{name} (not in vLLM)" for name in sorted(unseen)], len(trained) - len(unseen)


def held(module, part: str, whole: torch.Tensor) -> torch.Tensor:
    """What a rank's engine holds of a parameter, if several ranks share an engine."""
    if getattr(module, "tp_size", 1) == 1:
        return whole
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, VocabParallelEmbedding):
        rows = module.shard_indices
        return whole[rows.org_vocab_start_index : rows.org_vocab_end_index]
    if isinstance(module, linear.QKVParallelLinear) and part in ("k_proj", "v_proj"):
        size = module.num_kv_heads * module.head_size
        first = module.tp_rank // module.num_kv_head_replicas * size
        return whole[first : first + size]
    if isinstance(module, linear.RowParallelLinear):  # its weight, by columns; a bias stays whole
        return whole.chunk(module.tp_size, 1)[module.tp_rank] if whole.dim() == 2 else whole
    if isinstance(module, linear.ColumnParallelLinear):
        return whole.chunk(module.tp_size)[module.tp_rank]
    return whole


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bits: NaN equals itself, and 0 is not -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def _inside_ranks(tensor_parallel: int) -> dict[str, object]:
    """Arguments of an engine in a rank of torchrun, where `tensor_parallel` ranks in a row share
    one: it takes part in the process group that is there, and starts none of its own."""
    check(
        num_ranks() % tensor_parallel == 0,
        f"--tensor_parallel {tensor_parallel} does not divide the {num_ranks()} ranks",
    )
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None  # it would end our group too
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")  # --cpu_offload without torchrun
    own = {"distributed_executor_backend": "external_launcher"}
    if tensor_parallel > 1:
        own |= {"async_scheduling": False}  # ranks must schedule alike
        _own_shared_memory()
    return own | {"tensor_parallel_size": tensor_parallel}


def _own_shared_memory() -> None:
    """On a CPU, ranks that share an engine talk through files of /dev/shm, which vLLM names alike
    in every run: one that was killed leaves them, and no later one could start. Name them by the
    run's port, and unlink them as soon as all ranks have opened them."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    name_of, start = _CPUSHMDistributed.make_group_name, _CPUSHMDistributed._init_cpu_shm

    def start_and_unlink(self) -> int:
        handle = start(self)
        Path("/dev/shm", f"{self.group_name}_{self.communicator.rank}").unlink(missing_ok=True)
        return handle

    port = os.environ["MASTER_PORT"]
    _CPUSHMDistributed.make_group_name = staticmethod(lambda c: port + name_of(c).strip("/"))
    _CPUSHMDistributed._init_cpu_shm = start_and_unlink


def _keep_plain_cpu_weights() -> None:
    """vLLM's CPU kernels multiply with packed copies of the weights and drop the originals, or keep
    them beside a copy that no load refreshes. What is trained stays plain, and can be proven."""
    from vllm.model_executor.layers import utils

    def plain(layer, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain


# === sample and verify ===


def sample_and_verify(
    engine: TorchEngine | VLLMEngine,
    verifier: Verifier,
    prompts: list[Prompt],
    group_size: int,
    args,
    seed: Sequence[int],
) -> list[Rollout]:
    """P·G graded rollouts, at `args`' length and temperature (and top_p and top_k, if it has). Of
    several ranks each samples its share of the prompts, with the seeds that one rank would use.
    (Ranks that share an engine ask it the same, and then keep their shares.)"""
    shared = engine.num_ranks
    first, prompts = share_of(prompts, rank() // shared, num_ranks() // shared)
    rollouts = engine.generate(
        [prompt.ids for prompt in prompts],
        group_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=seed,
        top_p=getattr(args, "top_p", 1.0),
        top_k=getattr(args, "top_k", 0),
        first=first,
    )
    begin, prompts = share_of(prompts, rank() % shared, shared)
    rollouts = rollouts[begin * group_size : (begin + len(prompts)) * group_size]
    for n, rollout in enumerate(rollouts):
        problem = prompts[n // group_size].problem
        rollout.problem, rollout.gold = problem.problem, problem.answer
        rollout.opens_thought = prompts[n // group_size].opens_thought
        rollout.key = (*seed, (first + begin) * group_size + n)
    verify(verifier, rollouts)
    return rollouts


def verify(verifier: Verifier, rollouts: list[Rollout]) -> None:
    """Set their verdicts. The ranks of a machine share one pool of verifier workers. A thought that
    the prompt has opened and nothing has closed holds no answer."""

    def grade(pairs: list[tuple[str, str]]) -> list[Verdict]:
        return verifier.grade([text for text, _ in pairs], [gold for _, gold in pairs])

    texts = ["<think>" * rollout.opens_thought + rollout.text for rollout in rollouts]
    golds = [rollout.gold for rollout in rollouts]
    verdicts = on_first_of_host(grade, list(zip(texts, golds, strict=True)))
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        rollout.verdict = verdict


def rollout_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Accuracy, mean length in tokens, share cut off, and the share of each verdict, of all
    ranks."""
    ends = [(r.verdict.outcome, len(r.completion_ids), r.finish == "length") for r in rollouts]
    outcomes, lengths, truncated = zip(*gather(ends), strict=True)
    return {
        "rollout/accuracy": outcomes.count("correct") / len(outcomes),
        "rollout/length": statistics.fmean(lengths),
        "rollout/truncated": statistics.fmean(truncated),
    } | {
        f"rollout/{outcome}": outcomes.count(outcome) / len(outcomes)
        for outcome in OUTCOMES
        if outcome != "correct"
    }


def _are_token_ids(ids: object, count: int) -> bool:
    listed = isinstance(ids, list) and len(ids) > 0
    return listed and all(type(token) is int and 0 <= token < count for token in ids)


def load_rollouts(tokenizer, prompts: list[Prompt], args) -> list[Rollout]:
    """Completions of the given prompts from --rollouts, a .jsonl file with problem and completion.

    Rows of other problems (another split, an evaluation set) and completions over --max_new_tokens
    are left out, with a count. A run's own rows hold token ids, which are not encoded again; a text
    gets an EOS, unless it ends with one or its row says that it was cut off.
    """
    by_key = {prompt.problem.key: prompt for prompt in prompts}
    ends = end_ids(tokenizer)
    rows, rollouts, too_long = read_jsonl(Path(args.rollouts)), [], 0
    for number, row in enumerate(rows, 1):
        texts = isinstance(row.get("problem"), str) and isinstance(row.get("completion"), str)
        where = f"{args.rollouts}, row {number}"
        check(texts, f"{where}: needs text columns problem and completion")
        prompt = by_key.get(Problem(row["problem"], "").key)
        ids, text = row.get("completion_ids"), row["completion"]
        check(is_unicode(text), f"{where}: half a surrogate pair in column completion")
        check(
            ids is None or _are_token_ids(ids, len(tokenizer)),
            f"{where}: completion_ids must be a list of one or more ids from 0 to "
            f"{len(tokenizer) - 1}",
        )
        if ids is None or tokenizer.decode(ids, skip_special_tokens=True) != text:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ended = row.get("finish") == "length" or (ids and ids[-1] in ends)
            ids = ids if ended else [*ids, tokenizer.eos_token_id]
        too_long += len(ids) > args.max_new_tokens
        if prompt is not None and len(ids) <= args.max_new_tokens:
            rollout = Rollout(prompt.ids, ids, torch.zeros(len(ids)), "given", text)
            rollout.problem, rollout.gold = prompt.problem.problem, prompt.problem.answer
            rollout.opens_thought = prompt.opens_thought
            rollouts.append(rollout)
    counts = (
        f"{len(rollouts)} of its {len(rows)} completions are of this run's problems and lengths"
    )
    print(f"{args.rollouts}: {counts}; {too_long} are over --max_new_tokens {args.max_new_tokens}")
    check(len(rollouts) > 0, f"{args.rollouts}: {counts}; {too_long} are over --max_new_tokens")
    return rollouts
