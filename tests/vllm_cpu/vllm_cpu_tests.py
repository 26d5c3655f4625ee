"""A vLLM plugin: what the trainers' engine needs on a CPU, where only its tests run.

vLLM loads it in every process that has this folder on its PYTHONPATH.
"""

import os
from pathlib import Path

import torch


def apply() -> None:
    """Replace what of vLLM's CPU backend cannot be trained with. Call it once a process."""
    from vllm.model_executor.layers import utils

    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # threads are the trainer's too
    utils.dispatch_cpu_unquantized_gemm = keep_plain_weights
    _change_settings()
    _name_shared_memory()


def keep_plain_weights(layer, remove_weight: bool) -> None:
    """Multiply with the weights as they are. vLLM's CPU kernels multiply with packed copies, and
    drop the originals, or keep them beside a copy that no load refreshes."""
    layer.cpu_linear = torch.nn.functional.linear


def _change_settings() -> None:
    """Turn off chunked prefill, which breaks the seeds of samples on a CPU, and divide the memory,
    of which each rank would else take its share of the whole."""
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config

    def changed(self, *args, **kwargs):
        self.enable_chunked_prefill = False
        self.gpu_memory_utilization /= int(os.environ.get("WORLD_SIZE", 1))
        return create(self, *args, **kwargs)

    EngineArgs.create_engine_config = changed


def _name_shared_memory() -> None:
    """Name the files of /dev/shm through which ranks share an engine by the run's port, and unlink
    them as soon as all ranks have opened them. vLLM names them alike in every run: a run that is
    killed leaves them, and no later one could start."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    name_of, start = _CPUSHMDistributed.make_group_name, _CPUSHMDistributed._init_cpu_shm

    def start_and_unlink(self) -> int:
        handle = start(self)
        Path("/dev/shm", f"{self.group_name}_{self.communicator.rank}").unlink(missing_ok=True)
        return handle

    def name_by_port(communicator) -> str:
        return os.environ["MASTER_PORT"] + name_of(communicator).strip("/")

    _CPUSHMDistributed.make_group_name = staticmethod(name_by_port)
    _CPUSHMDistributed._init_cpu_shm = start_and_unlink
