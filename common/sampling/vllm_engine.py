"""Sampling with vLLM, in the trainer's process, from a copy of the weights that is proven after
each sync (sync_proof.py).
"""

import os
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from common.model.load import end_ids
from common.model.lora import whole_weights
from common.model.shard import DTYPES, device_of
from common.run.errors import RunFailure, UserError, check, one_line
from common.run.lazy import transformers
from common.run.ranks import gather, num_ranks
from common.sampling.rollout import Rollout
from common.sampling.sync_proof import (
    WeightSyncError,
    check_canary,
    check_fresh,
    stale_parameters,
    trainer_logprobs,
)

MAX_NUM_SEQS = 256  # that it decodes at once: its own default on large GPUs is 1,024, and a buffer
# of the sampler takes so many times the vocabulary
VLLM_VERSION = "0.32."  # the calls below are its calls


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
        self.num_ranks = args.tensor_parallel
        inside_ranks = _inside_ranks(self.num_ranks) if dist.is_initialized() else {}
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
                **inside_ranks,
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
        seeds: Sequence[tuple[int, ...]],
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[Rollout]:
        """As TorchEngine's: P prompts -> N = P·G rollouts, grouped; a seed for each prompt."""
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
                    "seed": int(np.random.SeedSequence(seed).generate_state(1)[0]),
                }
                for seed in seeds
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
                [SamplingParams(**shared | settings) for settings in sampling],
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
        check_fresh(stale)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise WeightSyncError("vLLM keeps prefixes that it computed with the old weights")
        proven = time.perf_counter()
        mean, largest = self.canary_difference()
        check_canary(mean, largest, self.dtype)
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
            self._apply(lambda engine: engine.load_weights(whole_weights(self.model, self.dtype)))
        except Exception as error:
            raise WeightSyncError(f"vLLM took no new weights: {one_line(error)}") from error

    def _apply(self, function: Callable):
        return self.llm.apply_model(function)[0]

    def canary_difference(self) -> tuple[float, float]:
        """Mean and largest |difference| of the engine's and the trainer's log-probs at temperature
        1, over the canary's prompts and eight sampled tokens each: prefill and decoding. Of several
        ranks the worst."""
        settings = {"temperature": 1.0, "seed": 0, "max_tokens": 8, "prompt_logprobs": 0}
        outputs = self._run(self.canary, [settings] * len(self.canary))
        sequences, logprobs = [], []
        for ids, output in zip(self.canary, outputs, strict=True):
            sample = output.outputs[0]
            sequences.append(ids + list(sample.token_ids))
            logprobs += output.prompt_logprobs.logprobs + sample.logprobs.logprobs
        difference = (trainer_logprobs(self.model, sequences) - torch.tensor(logprobs)).abs()
        of_ranks = gather([(difference.mean().item(), difference.max().item())])
        return max(mean for mean, _ in of_ranks), max(largest for _, largest in of_ranks)


def _configs_of(name: str) -> SimpleNamespace:
    """A model's configs without its weights. Not every folder has a generation_config.json."""
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    try:
        generation_config = transformers.GenerationConfig.from_pretrained(name)
    except OSError:
        generation_config = transformers.GenerationConfig()
    return SimpleNamespace(config=config, generation_config=generation_config)


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
    arguments: dict[str, object] = {"distributed_executor_backend": "external_launcher"}
    if tensor_parallel > 1:
        arguments["async_scheduling"] = False  # ranks must schedule alike
        _name_shared_memory()
    return arguments | {"tensor_parallel_size": tensor_parallel}


def _name_shared_memory() -> None:
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
