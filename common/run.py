"""A run's folder, and how a script starts and fails.

DIR/config.json           the Args, package versions, git commit, fingerprints of the data
DIR/metrics.jsonl         one object a step; TensorBoard events in DIR/tensorboard
DIR/rollouts/             each step's completions with their verdicts
DIR/checkpoints/step_N/   model, optimizer, RNG state, progress: all that an exact resume needs
DIR/final/                the trained model, as save_pretrained leaves it
DIR/manifest.json         written last: only this says that the run is finished
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter

from common.fingerprint import ROOT, inputs_of
from common.saving import file_dtype, save_model


class UserError(Exception):
    """What the user can mend, in one line: what is wrong and what to do. Exit code 2."""


class RunFailure(Exception):
    """What ended a run that had begun well, in one line. Exit code 1: the same command goes on."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


POSITIVE = (
    *("num_steps", "prompts_per_step", "group_size", "max_new_tokens", "max_prompt_tokens"),
    *("temperature", "learning_rate", "max_grad_norm", "micro_batch_tokens", "chunk_size"),
    *("num_epochs", "num_minibatches", "keep_checkpoints", "topk_size"),
    *("num_problems", "num_samples", "jobs", "gpu_memory_gb"),
)
NOT_NEGATIVE = (
    *("seed", "warmup_steps", "weight_decay", "checkpoint_every", "eval_every", "max_refills"),
    *("kl_coef", "clip_low", "clip_high", "importance_cap", "top_k"),
    *("stop_at_tokens", "stop_at_flops"),
)


def check_ranges(args, zero_allowed: tuple[str, ...] = ()) -> None:
    """Numbers that can only be a slip: zero or negative sizes and rates, infinities, NaN."""
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value = getattr(args, name, None)
        if value is not None:
            may_be_zero = name in NOT_NEGATIVE or name in zero_allowed
            valid = math.isfinite(value) and (value > 0 or (may_be_zero and value == 0))
            low = "0 or above" if may_be_zero else "above 0"
            check(valid, f"--{name} is {value}; it must be {low}")
    warmup, steps = getattr(args, "warmup_steps", 0), getattr(args, "num_steps", None)
    if steps and warmup > steps:
        share = f"{steps / warmup:.0%} of --learning_rate"
        print(f"--warmup_steps {warmup} is above --num_steps {steps}: the rate ends at {share}")


def one_line(error: Exception) -> str:
    """What an exception of a library says, for a message of one line."""
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]


def start(main: Callable, args_type: type, description: str) -> None:
    """Parse the command line into `args_type` and run `main`.

    Exit codes, each with one line on stderr: 2 for what the user can mend (UserError), 1 for a run
    that failed (RunFailure, a full disk), 128 + n for signal n.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, STOP.catch)
    # Before CUDA starts. vLLM switches it off around its own pools.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    code, message, launched = 0, "", "WORLD_SIZE" in os.environ
    try:
        main(parse(args_type, description))
    except UserError as error:
        code, message = 2, f"error: {error}"
    except (RunFailure, OSError) as error:
        hint = "the same command goes on from the last checkpoint"
        code, message = 1, f"error: {one_line(error)}; {hint}"
    except Stopped as stop:
        code, message = 128 + stop.number, f"{stop}; the same command goes on"
    if code:
        print(f"rank {rank()}: {message}" if num_ranks() > 1 else message, file=sys.stderr)
        if num_ranks() > 1:
            sys.stdout.flush()
            os._exit(code)  # torchrun ends the other ranks; to wait for them here could hang
        sys.exit(code)
    if num_ranks() > 1:  # a group of one may be vLLM's own, which it ends itself
        dist.barrier()  # a rank that closes its connections early takes the others down
        dist.destroy_process_group()
    if launched or dist.is_initialized():
        sys.stdout.flush()
        os._exit(0)  # a group's threads were seen to abort the interpreter's own way out


def parse(args_type: type, description: str):
    """The command line as `args_type`; tyro's box of several lines becomes a UserError."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(args_type, description=description, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        words = re.sub(r"[^\x20-\x7e]|(?<=\s)[-|+]+(?=\s)|---+", " ", box.getvalue())
        raise UserError(f"{' '.join(words.split())[:400]} (--help lists every flag)") from None


# === signals ===


class Stopped(BaseException):
    """A signal, where it can be obeyed."""

    def __init__(self, number: int, where: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{where}")
        self.number = number


class StopRequest:
    """What to do at SIGTERM and SIGINT: in a training loop wait for the next phase boundary, else
    stop; at the second signal exit at once."""

    number: int | None = None  # of the signal that waits to be obeyed
    in_loop = False

    def catch(self, number: int, frame) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        if not self.in_loop:
            raise Stopped(number)
        print("\nstopping after this phase; a second signal stops at once", file=sys.stderr)


STOP = StopRequest()  # signal handlers belong to the process


# === ranks ===


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def resolve_device(device: str) -> torch.device:
    """auto takes a GPU if there is one; under torchrun each rank of a machine its own."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    check(torch.cuda.is_available(), "--device cuda, but torch sees no GPU; use --device cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    check(local < count, f"--nproc_per_node is above the {count} GPUs of this machine")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def join_ranks(args) -> torch.device:
    """This process's device. Under torchrun it joins the other ranks first, and the ranks after the
    first print nothing.

    A trainer's model is sharded on a single rank too with --cpu_offload, and in bfloat16: FSDP2
    computes in bfloat16 over float32 weights (pure bfloat16 ones do not move at a rate of 1e-6), so
    that policy and frozen models compute alike on any number of ranks. Autocast would not: it keeps
    the policy's residual stream in float32.
    """
    device, launched = resolve_device(args.device), "WORLD_SIZE" in os.environ
    trains = hasattr(args, "cpu_offload")
    shards = trains and (args.cpu_offload or args.dtype == "bfloat16")
    if (launched or shards) and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        alone = {} if launched else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
        # Ranks wait for one another's rollouts, which may take far longer than NCCL's 10 minutes.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2), **alone)
    if launched and trains and args.cpu_offload:  # torchrun leaves one thread for the update
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def sum_over_ranks(value: float) -> float:
    """The same on all ranks, exact for counts."""
    if num_ranks() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return type(value)(total.item())


def max_over_ranks(value: int) -> int:
    if num_ranks() == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def sum_dicts_over_ranks(sums: dict[str, float]) -> dict[str, float]:
    """Key by key; a rank without work has no keys."""
    every = gather([sums])
    names = dict.fromkeys(name for one in every for name in one)
    return {name: sum(one.get(name, 0.0) for one in every) for name in names}


def gather(items: list) -> list:
    """The items of all ranks, in their order, on each of them."""
    if num_ranks() == 1:
        return items
    parts: list = [None] * num_ranks()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def share_of(items: list, number: int, count: int) -> tuple[int, list]:
    """The number-th of `count` slices of a list that all ranks hold, and where it begins."""
    first, end = (len(items) * (number + i) // count for i in (0, 1))
    return first, items[first:end]


def on_first_rank(function: Callable):
    """Call it on the first rank only; all ranks get what it returns."""
    if num_ranks() == 1:
        return function()
    box = [function() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first_of_host(function: Callable[[list], list], items: list) -> list:
    """`function` over the items of all ranks of a machine, called by the first of them only; each
    rank gets the results of its own items."""
    if num_ranks() == 1:
        return function(items)
    every = gather([(rank() - int(os.environ["LOCAL_RANK"]), items)])
    hosts = [host for host, _ in every]
    together = [item for host, part in every if host == hosts[rank()] for item in part]
    results = gather([function(together) if rank() == hosts[rank()] else []])[hosts[rank()]]
    before = sum(len(part) for host, part in every[: rank()] if host == hosts[rank()])
    return results[before : before + len(items)]


# === files ===


def write_atomic(path: Path, text: str) -> None:
    """`path` holds either its old content or all of `text`, whenever the process or the machine
    dies."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1, default=str) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def replace_folder(temporary: Path, folder: Path) -> None:
    """Make the finished folder `temporary` appear as `folder` in one step."""
    for path in (*temporary.rglob("*"), temporary):
        sync_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    sync_to_disk(folder.parent)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A full disk, or one that went away, ends a run in one line."""
    try:
        yield
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        raise RunFailure(f"cannot write to {folder}: {one_line(causes[0])}") from error


def checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != "checksums.json":
            with open(path, "rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything is."""
    try:
        expected = json.loads((folder / "checksums.json").read_text())
        found = checksums(folder)
    except (OSError, ValueError) as error:
        return one_line(error)
    differing = [name for name in expected if found.get(name) != expected[name]]
    return f"{', '.join(differing)} missing or changed" if differing else None


def lock_folder(folder: Path) -> io.TextIOBase:
    """A lock that lasts as long as the returned file is open, and no longer than its process."""
    file = open(folder / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"another process is writing to {folder}; wait for it, or choose another --output_dir"
        ) from None
    return file


def environment() -> dict[str, str]:
    """What a result depends on beside its Args."""
    names = ("torch", "transformers", "tokenizers", "datasets", "math-verify")
    versions = {name: version(name) for name in names}
    commit = ""
    if shutil.which("git"):
        git = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    setting = {"machine": machine(), "python": sys.version.split()[0], **versions}
    return setting | {"git_commit": commit or "not a git checkout"}


def machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{os.cpu_count()} cores ({model})", f"{memory:.0f} GiB", *gpus])


# These say how a run is watched, not what it computes: they may differ when it is resumed.
FREE = {"environment", "output_dir", "track", "checkpoint_every", "keep_checkpoints"}
FREE |= {
    "save_dtype",
    "keep_gradients",
    "skip_nonfinite",
    "vllm_gpu_memory",
    "enforce_eager",
    "cpu_offload",
}
FREE |= {"activation_checkpointing", "tensor_parallel", "gpu_memory_gb", "micro_batch_tokens"}


def claim_folder(folder: Path, config: dict[str, object]) -> dict[str, object]:
    """Make `folder` and its config.json; one of the same config may be there already.

    Raises UserError, and touches nothing, if the folder holds a run of another config, naming the
    differences, or anything else. Returns the config as it reads from the file.
    """
    path, config = folder / "config.json", json.loads(json.dumps(config, default=str))
    if path.exists():
        old = json.loads(path.read_text())
        differences = [
            f"{key}: {old.get(key)} there, {config.get(key)} here"
            for key in sorted((old.keys() | config.keys()) - FREE)
            if old.get(key) != config.get(key)
        ]
        message = f"{folder} holds a run of another config ({'; '.join(differences)})"
        check(not differences, message + "; choose another --output_dir")
        return config
    if folder.exists():
        empty = folder.is_dir() and not any(folder.iterdir())
        check(empty, f"{folder} exists and is no run's folder; choose another --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, config | {"environment": environment()})
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return config


# === the run ===


@dataclasses.dataclass
class Progress:
    """What a run has done so far; saved with each checkpoint."""

    step: int = 0
    cursor: int = 0  # prompts drawn from the training stream
    generated_tokens: int = 0
    flops: float = 0.0  # of the trained model: sampling, its updates, and in GRPO the reference's
    teacher_flops: float = 0.0  # of a teacher: sampling and scoring
    verifier_calls: int = 0  # label uses, where the verdicts are the reward; monitoring elsewhere
    skipped_updates: int = 0  # whose loss or gradient was not finite
    seconds: float = 0.0

    def add_step(self, rollouts: list) -> None:
        self.step += 1
        lengths = [len(rollout.completion_ids) for rollout in rollouts if rollout.finish != "given"]
        self.generated_tokens += sum_over_ranks(sum(lengths))
        self.verifier_calls += sum_over_ranks(len(rollouts))


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def metrics(self) -> dict[str, float]:
        laps = self.laps | {"step": time.perf_counter() - self.start}
        return {f"time/{name}": seconds for name, seconds in laps.items()}


def mean(updates: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the optimizer steps that have it."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {name: sum(listed) / len(listed) for name, listed in values.items()}


class Run:
    """The folder of one training run.

    A fresh `output_dir` is created; one of the same config is resumed from its newest checkpoint;
    one of another config is left untouched and raises UserError with the differences.
    """

    def __init__(self, script: str, args, fingerprint: dict[str, object]):
        self.script, self.args, self.folder = Path(script).stem, args, Path(args.output_dir)
        has_wandb = importlib.util.find_spec("wandb") is not None
        check(has_wandb or not args.track, "--track needs Weights & Biases: pip install wandb")
        inputs = on_first_rank(lambda: inputs_of(args))
        config = {"script": self.script, **vars(args), **inputs, **fingerprint}
        self.finished, self.checkpoint = on_first_rank(lambda: self._open(config))
        self.progress = Progress()
        if self.finished:
            print(f"{self.folder} is finished already")
            return
        if self.checkpoint:
            self.progress = Progress(**json.loads((self.checkpoint / "progress.json").read_text()))
            print(f"resuming {self.folder} after step {self.progress.step}")
        self._completed = dataclasses.replace(self.progress)  # as of the last completed step
        self._saved_step, self._between_updates = self.progress.step, True
        self._board = self._wandb = None
        if rank() == 0:
            self._drop_metrics_after(self.progress.step)
            path = self.folder / "tensorboard"
            self._board = SummaryWriter(path, purge_step=self.progress.step + 1)
        if args.track and rank() == 0:
            import wandb

            name = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]  # found again
            self._wandb = wandb.init(project=ROOT.name, id=name, config=config, resume="allow")

    def _open(self, config: dict[str, object]) -> tuple[bool, Path | None]:
        """Claim and lock the folder; whether it is finished, and what to resume from."""
        claim_folder(self.folder, config)
        self._lock = lock_folder(self.folder)
        if (self.folder / "manifest.json").exists():
            return True, None
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        (self.folder / "rollouts").mkdir(exist_ok=True)
        return False, self._newest_checkpoint()

    # --- checkpoints ---

    def _steps(self) -> list[int]:
        names = [path.name for path in (self.folder / "checkpoints").glob("step_*")]
        return sorted(
            int(name.removeprefix("step_"))
            for name in names
            if name.removeprefix("step_").isdigit()
        )

    def _newest_checkpoint(self) -> Path | None:
        """The newest one that is whole; damaged ones are put aside."""
        for step in reversed(self._steps()):
            path = self.folder / "checkpoints" / f"step_{step}"
            problem = damage(path)
            if problem is None:
                return path
            print(f"warning: {path} is damaged ({problem}); going back", file=sys.stderr)
            aside = path.with_name(f"damaged_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
        return None

    def save_checkpoint(self, model, optimizer) -> None:
        """Model, optimizer and progress after the last completed step; older ones than the last K
        are removed afterwards. Every rank writes its shards; any number of ranks can read them."""
        step = self._completed.step
        folder = self.folder / "checkpoints" / f"step_{step}"
        temporary = folder.with_name(folder.name + ".tmp")
        on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
        with writing(folder):
            write_tensors(temporary, training_state(model, optimizer))
            on_first_rank(lambda: self._complete_checkpoint(temporary, folder))
        self._saved_step = step

    def _complete_checkpoint(self, temporary: Path, folder: Path) -> None:
        save_file({"cpu": torch.get_rng_state()}, temporary / "rng.safetensors")
        write_json(temporary / "progress.json", dataclasses.asdict(self._completed))
        write_json(temporary / "checksums.json", checksums(temporary))
        replace_folder(temporary, folder)
        for old in self._steps()[: -self.args.keep_checkpoints]:
            shutil.rmtree(self.folder / "checkpoints" / f"step_{old}")

    def restore(self, model, optimizer) -> None:
        """Model, optimizer and RNG state of the checkpoint that is resumed, if one is."""
        # In a fresh run too: moments that are first made among activations pin the memory there.
        prepare_state(optimizer)
        if self.checkpoint:
            try:
                read_tensors(self.checkpoint, training_state(model, optimizer))
            except dcp.api.CheckpointException as error:
                message = f"{self.checkpoint} is not of this model and this version of the code"
                raise UserError(f"{message}; choose another --output_dir") from error
            torch.set_rng_state(load_file(self.checkpoint / "rng.safetensors")["cpu"])

    # --- the loop ---

    @contextlib.contextmanager
    def guard(self, model, optimizer) -> Iterator[None]:
        """Around the training loop: if a signal or a failure ends it while the model is that of the
        last completed step, this step is saved. (Not if one rank fails: a sharded model is saved by
        all of them, and the others are elsewhere.)"""
        STOP.in_loop = True
        try:
            yield
        except (Stopped, RunFailure) as error:
            together = num_ranks() == 1 or isinstance(error, Stopped)
            if together and self._between_updates and self._completed.step > self._saved_step:
                self.save_checkpoint(model, optimizer)
            raise
        except RuntimeError as error:
            if num_ranks() > 1 and re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
                step = self._completed.step
                message = f"another rank has ended after step {step} ({one_line(error)})"
                raise RunFailure(message) from error
            raise
        finally:
            STOP.in_loop = False

    def _obey_signal(self) -> None:
        """Ranks that saw the signal at different boundaries would wait for each other for ever."""
        number = max_over_ranks(STOP.number or 0)
        if number:
            raise Stopped(number, f" after step {self._completed.step}")

    def budget_is_spent(self) -> bool:
        """Whether --stop_at_tokens or --stop_at_flops is reached."""
        args, done = self.args, self.progress
        tokens_spent = 0 < args.stop_at_tokens <= done.generated_tokens
        return tokens_spent or 0 < args.stop_at_flops <= done.flops + done.teacher_flops

    def begin_update(self) -> None:
        """The phase boundary before the weights change."""
        self._obey_signal()
        self._between_updates = False

    def is_finite(self, loss: float, grad_norm: float, rollouts: list) -> bool:
        """Whether to take this update. One that is not finite ends the run, its batch saved, or is
        counted and left out with --skip_nonfinite."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return True
        path = self.folder / f"nonfinite_step_{self.progress.step + 1}.jsonl"
        rows = gather([rollout.row() for rollout in rollouts])
        with writing(self.folder):
            on_first_rank(lambda: write_jsonl(path, rows))
        if not self.args.skip_nonfinite:
            raise RunFailure(
                f"step {self.progress.step + 1}: loss {loss}, gradient norm {grad_norm}; its batch "
                f"is in {path}; --skip_nonfinite leaves such updates out"
            )
        self.progress.skipped_updates += 1
        return False

    def end_step(self, metrics: dict[str, float], rollouts: list, model, optimizer) -> None:
        """Log one step's metrics and sampled completions, save it if it is time, obey a signal."""
        step = self.progress.step
        self.progress.seconds += metrics["time/step"]
        metrics = metrics | {"optim/skipped": self.progress.skipped_updates}
        rows = gather([rollout.row() for rollout in rollouts])
        with writing(self.folder):
            on_first_rank(lambda: self._log(step, metrics, rows))
        self._completed, self._between_updates = dataclasses.replace(self.progress), True
        if self.args.checkpoint_every and step % self.args.checkpoint_every == 0:
            self.save_checkpoint(model, optimizer)
        self._obey_signal()

    def _log(self, step: int, metrics: dict[str, float], rows: list[dict]) -> None:
        write_jsonl(self.folder / "rollouts" / f"step_{step}.jsonl", rows)
        row = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no nan
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | row) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(metrics, step=step)

    def _drop_metrics_after(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            rows = [
                json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")
            ]
            write_jsonl(path, [row for row in rows if row["step"] <= step])

    # --- the end ---

    def finish(self, model, tokenizer) -> None:
        """Save the final model; then, last of all, the manifest."""
        temporary = self.folder / "final.tmp"
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.save_dtype()]
        with writing(self.folder):
            on_first_rank(lambda: _make_empty(temporary))
            save_model(model, temporary, dtype, writes=rank() == 0)
            on_first_rank(lambda: self._complete_final(temporary, tokenizer))
        print(
            f"finished {self.folder}: {self.progress.step} steps in {self.progress.seconds:.0f} s; "
            f"final/ is in {self.save_dtype()}"
        )

    def save_dtype(self) -> str:
        """The type of final/: --save_dtype, or that of the files that the model came from."""
        given = self.args.save_dtype
        return file_dtype(self.args.model) if given == "auto" else given

    def _complete_final(self, temporary: Path, tokenizer) -> None:
        tokenizer.save_pretrained(temporary)
        replace_folder(temporary, self.folder / "final")
        self._board.close()
        manifest = {"script": self.script} | dataclasses.asdict(self.progress)
        write_json(self.folder / "manifest.json", manifest)
        if self._wandb:
            self._wandb.finish()


# === tensors of a checkpoint ===

# Of a single process it says that it saves as one, which is what no_dist asks for.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


def training_state(model, optimizer) -> dict[str, torch.Tensor]:
    """What training changes, by name: parameters and optimizer state, sharded as they are."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {name: parameter.detach() for parameter, name in names.items()} | {
        f"optimizer/{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def prepare_state(optimizer) -> None:
    """Give parameters that AdamW has not updated yet the state that its first update would; a load
    asks for all of it, and a run may be saved before its first gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": step, **moments}


def write_tensors(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """torch's distributed checkpoint as safetensors: its default format would unpickle. A file is
    made in memory first, so there is one for every 4 GB."""
    ends = accumulate(tensor.numel() * tensor.element_size() for tensor in state.values())
    files = {name: 1 + int(end // 4e9) for name, end in zip(state, ends, strict=True)}
    writer = dcp.HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    dcp.save(state, storage_writer=writer, no_dist=num_ranks() == 1)


def read_tensors(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Into the tensors of `state`, however many ranks have written and are reading."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load(state, storage_reader=reader, no_dist=num_ranks() == 1)
