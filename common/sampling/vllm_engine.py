"""Sampling with vLLM in the trainer's process, from a copy of the weights that is proven after each
sync (sync_proof.py)."""

import os
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from common.model.load import generation_config_of, load_pretrained
from common.model.lora import whole_weights
from common.model.shard import DTYPES, device_of
from common.model.tokenizer import end_ids
from common.run.errors import RunFailure, UserError, check, one_line
from common.run.ranks import gather, num_ranks
from common.sampling.rollout import Rollout, text_of
from common.sampling.sync_proof import (
    WeightSyncError,
    check_canary,
    check_fresh,
    logprob_differences,
    stale_parameters,
)

BATCHED_TOKENS = 8192  # tokens of a forward pass, or one whole sequence if it is longer


def batched_tokens(args) -> int:
    """Return how many tokens a forward pass of vLLM takes at most."""
    return max(args.max_prompt_tokens + args.max_new_tokens, BATCHED_TOKENS)


class VLLMEngine:
    """Samples with vLLM from the weights of `model`, or of the folder `name` if there is no model.

    vLLM reads the shape from `name` and starts with random weights; those of `model` come through
    `sync`, which proves that they came. On a GPU it sleeps between `sleep` and `sync`, and the
    update has its memory. args: a script's, of which it reads --dtype, --max_prompt_tokens,
    --max_new_tokens, --vllm_gpu_memory, --vllm_sequences, --enforce_eager and --tensor_parallel.
    canary: prompts whose log-probs are compared with the model's after each sync. Raises UserError
    if vLLM cannot run the model.
    """

    batch_size = 4096  # sequences in a call; vLLM schedules them itself

    def __init__(self, name: str, tokenizer, args, model=None, canary: Sequence[list[int]] = ()):
        from vllm import LLM

        self.model, self.tokenizer, self.dtype = model, tokenizer, DTYPES[args.dtype]
        self.canary = [ids[-256:] for ids in canary]
        self.trained = model is not None and any(p.requires_grad for p in model.parameters())
        self.can_sleep = model is not None and device_of(model).type == "cuda"
        self.asleep = False
        self.num_ranks = args.tensor_parallel
        inside_ranks = _inside_ranks(self.num_ranks) if dist.is_initialized() else {}
        threads = torch.get_num_threads()
        if not args.enforce_eager:
            print(f"starting vLLM for {name}: 1 to 3 minutes, while it compiles")
        try:
            self.llm = LLM(
                name,
                skip_tokenizer_init=True,  # token ids in, token ids out
                load_format="auto" if model is None else "dummy",
                dtype=args.dtype,
                max_model_len=args.max_prompt_tokens + args.max_new_tokens,
                max_num_seqs=args.vllm_sequences,
                max_num_batched_tokens=batched_tokens(args),
                gpu_memory_utilization=args.vllm_gpu_memory,
                enforce_eager=args.enforce_eager,
                enable_sleep_mode=self.can_sleep,
                logprobs_mode="processed_logprobs",  # after the temperature
                generation_config="vllm",  # else the model's own top_k and penalties
                **inside_ranks,
            )
            self.eos_ids = end_ids(tokenizer, model or _configs_of(name))
            torch.set_num_threads(threads)  # vLLM leaves one: an offloaded update needs them all
            torch.backends.cuda.enable_cudnn_sdp(True)  # which its import has turned off
            proof = self.sync() if model else None
        except Exception as error:  # of many types: too little memory, an unknown architecture ...
            known = any(word in str(error).lower() for word in ("memory", "max_model_len"))
            hint = "change --vllm_gpu_memory, or shorten --max_prompt_tokens or --max_new_tokens"
            hint = hint if known else "--backend torch may"
            raise UserError(f"vLLM cannot run {name}: {one_line(error)}; {hint}") from error
        if proof:
            print(
                f"vLLM holds the weights of {name}: {proof['sync/parameters']} tensors equal to "
                f"the bit, log-probs within {proof['sync/canary_max']:.1e}"
            )

    def generate(
        self, prompts, group_size, *, seeds, max_new_tokens, temperature, top_p=1.0, top_k=0
    ) -> list[Rollout]:
        """Sample G completions of each of P prompts; arguments and rollouts are TorchEngine's."""
        if self.asleep:  # its weights are gone until the next sync
            if self.trained:
                raise WeightSyncError("vLLM was asked for rollouts after it slept, before a sync")
            self.sync()
        copies = group_size if temperature == 0 else 1  # vLLM decodes a prompt greedily only once
        shared = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        shared |= {"max_tokens": max_new_tokens, "n": group_size // copies}
        words = [int(np.random.SeedSequence(seed).generate_state(1)[0]) for seed in seeds]
        outputs = self._run(prompts, [shared | {"seed": word} for word in words])
        rollouts = []
        for prompt_ids, output in zip(prompts, outputs, strict=True):
            for sample in output.outputs * copies:
                ids, logprobs = list(sample.token_ids), torch.tensor(sample.logprobs.logprobs)
                finish = "eos" if ids[-1] in self.eos_ids else "length"
                text = text_of(self.tokenizer, ids, finish)
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

    def sleep(self) -> None:
        """Free the GPU's memory, weights included, until the next sync. (Level 1 would keep them in
        pinned host memory, beside the trainer's own model.)"""
        if self.can_sleep and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def sync(self) -> dict[str, float]:
        """Load the model's weights into the engine, then prove that it holds them (bit by bit) and
        that it computes with them (log-probs of the canary). Returns the proofs' metrics.

        Log-probs alone would not do: at lr 1e-6 a step moves those of bfloat16 by less than their
        rounding. Nor would bits: engines keep hidden, packed copies. Raises WeightSyncError.
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
        """Return the mean and the largest |difference| of the engine's and the trainer's log-probs
        at temperature 1, over eight sampled tokens of each of the canary's prompts (whose own
        tokens may be unlikely, and such log-probs far apart). Of several ranks the worst."""
        seeds = [(0, number) for number in range(len(self.canary))]
        sampled = self.generate(self.canary, 1, seeds=seeds, max_new_tokens=8, temperature=1.0)
        difference = logprob_differences(self.model, sampled)
        of_ranks = gather([(difference.mean().item(), difference.max().item())])
        return max(mean for mean, _ in of_ranks), max(largest for _, largest in of_ranks)


def _configs_of(name: str) -> SimpleNamespace:
    """Return a model's configs, as its attributes, without the model."""
    config = load_pretrained("AutoConfig", name)
    generation_config = generation_config_of(name, config)
    return SimpleNamespace(config=config, generation_config=generation_config)


def _inside_ranks(tensor_parallel: int) -> dict[str, object]:
    """Return the arguments of an engine in a rank of torchrun, which joins the process group that
    is there and starts none of its own."""
    divides = num_ranks() % tensor_parallel == 0
    check(divides, f"--tensor_parallel {tensor_parallel} does not divide the {num_ranks()} ranks")
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None  # it would end our group too
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")  # --cpu_offload without torchrun
    arguments: dict[str, object] = {"tensor_parallel_size": tensor_parallel}
    arguments["distributed_executor_backend"] = "external_launcher"
    if tensor_parallel > 1:
        arguments["async_scheduling"] = False  # ranks must schedule alike
        # It maps memory that expandable segments (common.run.process) cannot share: CUDA ends the
        # process (vllm#42609).
        arguments["disable_custom_all_reduce"] = True
    return arguments
