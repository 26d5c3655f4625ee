"""A run as its trainer sees it: steps, phases, a log, a folder that the same command resumes."""

import dataclasses
import json
import math
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from common.model import flops
from common.model.save import save_final
from common.run import checkpoint
from common.run.errors import RunFailure, check, one_line
from common.run.folder import claim_folder, lock_folder, write_json, write_jsonl, writing
from common.run.inputs import inputs_of
from common.run.log import Log, check_track
from common.run.process import STOP, Stopped
from common.run.ranks import (
    combine,
    gather,
    max_over_ranks,
    num_ranks,
    on_first_rank,
    rank,
    sum_over_ranks,
)

WATCHED = ("rollout/reward", "rollout/length", "loss/total")  # the progress bar shows these


@dataclasses.dataclass
class Progress:
    """The counts of a run so far; saved with each checkpoint."""

    step: int = 0
    cursor: int = 0  # items drawn from the training stream
    generated_tokens: int = 0
    flops: float = 0.0  # of the trained model: sampling, its updates, and in GRPO the reference's
    teacher_flops: float = 0.0  # of a teacher: sampling and scoring
    verifier_calls: int = 0  # label uses, where the verdicts are the reward; monitoring elsewhere
    skipped_updates: int = 0  # whose loss or gradient was not finite
    seconds: float = 0.0


def check_training(args) -> None:
    """Refuse what no trainer can run with."""
    check(args.learning_rate is not None, f"set --learning_rate for {args.model} (the paper: 1e-6)")
    rows = args.prompts_per_step * args.group_size
    check(
        args.num_minibatches <= rows,
        f"--num_minibatches {args.num_minibatches} exceeds the {rows} rollouts of a step",
    )
    warmup, steps = args.warmup_steps, args.num_steps
    if warmup > steps:
        share = f"{steps / warmup:.0%} of --learning_rate"
        print(f"--warmup_steps {warmup} is above --num_steps {steps}: the rate ends at {share}")


def learning_rate_at(step: int, args) -> float:
    """Return the rate of step 1, 2, ...: linear warmup, then constant or down to 0 after the
    last."""
    if step <= args.warmup_steps:
        return args.learning_rate * step / args.warmup_steps
    left = (args.num_steps - step + 1) / (args.num_steps - args.warmup_steps)
    cosine = 0.5 - 0.5 * math.cos(math.pi * left)
    factor = {"constant": 1.0, "linear": left, "cosine": cosine}[args.lr_schedule]
    return args.learning_rate * factor


def mean(updates: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the optimizer steps that have it."""
    return combine(updates, statistics.fmean)


def _gpu_memory() -> dict[str, float]:
    """Return the most that torch held of a GPU since it was last asked, and what is free of the
    fullest now, at the end of a step: then vLLM is awake."""
    if not torch.cuda.is_initialized():
        return {}
    peak, free = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    return {
        "memory/peak_gb": max_over_ranks(peak) / 1e9,
        "memory/free_gb": -max_over_ranks(-free) / 1e9,
    }


class Run:
    """A training run and its folder.

    A fresh `output_dir` is created; one of the same config is resumed from its newest checkpoint;
    one of another config is left untouched and raises UserError with the differences.
    fingerprint: hashes of the data, which belong to the config.

        run = Run(__file__, args, fingerprint)
        run.restore(model, optimizer)
        with run:
            for step in run.steps():
                run.phase("generate")
                ...
                run.log(metrics, rollouts)
        run.finish(tokenizer)
    """

    def __init__(self, script: str, args, fingerprint: dict[str, object]):
        self.script, self.args, self.folder = Path(script).stem, args, Path(args.output_dir)
        check_track(args.track)
        inputs = on_first_rank(lambda: inputs_of(args))
        self.config = {"script": self.script, **vars(args), **inputs, **fingerprint}
        self.finished, self.checkpoint = on_first_rank(self._open_folder)
        self.progress = Progress()
        if self.finished:
            print(f"{self.folder} is finished already")
        elif self.checkpoint:
            self.progress = Progress(**json.loads((self.checkpoint / "progress.json").read_bytes()))
            print(f"resuming {self.folder} after step {self.progress.step}")
        self._completed = dataclasses.replace(self.progress)  # as of the last completed step
        self._saved_step, self._updating = self.progress.step, False

    def _open_folder(self) -> tuple[bool, Path | None]:
        """Claim and lock the folder; return whether it is finished, and what to resume from."""
        claim_folder(self.folder, self.config, type(self.args))
        self._lock = lock_folder(self.folder)
        if (self.folder / "manifest.json").exists():
            return True, None
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        (self.folder / "rollouts").mkdir(exist_ok=True)
        return False, checkpoint.newest_checkpoint(self.folder / "checkpoints")

    def restore(self, model, optimizer) -> None:
        """Register model and optimizer; if the run is resumed, load both from the checkpoint."""
        self.model, self.optimizer = model, optimizer
        # In a fresh run too: moments that are first made among activations pin the memory there.
        checkpoint.prepare_state(optimizer)
        if self.checkpoint:
            checkpoint.load_checkpoint(self.checkpoint, model, optimizer)

    # --- the loop ---

    def __enter__(self) -> "Run":
        STOP.in_loop = True
        if rank() == 0:
            options = {"track": self.args.track, "keep_rollouts": self.args.keep_rollouts}
            self._log = Log(self.folder, self.progress.step, self.config, **options)
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Save the last completed step, if a signal or a failure ends the loop while the model is
        as that step left it. (Not if one rank fails: a sharded model is saved by all of them, and
        the others are elsewhere.)"""
        STOP.in_loop = False
        if isinstance(error, (Stopped, RunFailure)):
            together = num_ranks() == 1 or isinstance(error, Stopped)
            if together and not self._updating and self._completed.step > self._saved_step:
                self._save_checkpoint()
        lost = isinstance(error, RuntimeError) and num_ranks() > 1
        if lost and re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
            step = self._completed.step
            message = f"another rank has ended after step {step} ({one_line(error)})"
            raise RunFailure(message) from error

    def steps(self) -> Iterator[int]:
        """Yield the steps that are left, 1, 2, ..., each with its learning rate set, until
        --num_steps or a budget is reached. Each must be logged."""
        first, last = self.progress.step + 1, self.args.num_steps
        bar = tqdm(total=last, initial=first - 1, desc=self.script, disable=rank() > 0)
        with bar as self._bar:
            for step in range(first, last + 1):
                if self._budget_is_spent():
                    break
                self._phases: list[tuple[str, float]] = []
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, self.args)
                yield step

    def _budget_is_spent(self) -> bool:
        args, done = self.args, self.progress
        tokens_spent = 0 < args.stop_at_tokens <= done.generated_tokens
        return tokens_spent or 0 < args.stop_at_flops <= done.flops + done.teacher_flops

    def phase(self, name: str) -> None:
        """Begin a phase of the step, and end the one before it: its seconds go to time/NAME. A
        signal is obeyed before `update`, in which the weights change."""
        if name == "update":
            self._obey_signal()
            self._updating = True
        self._phases.append((name, time.perf_counter()))

    def _obey_signal(self) -> None:
        """Stop all ranks together: those that saw the signal at different boundaries would wait for
        each other for ever."""
        number = max_over_ranks(STOP.number or 0)
        if number:
            raise Stopped(number, f" after step {self._completed.step}")

    def count_rollouts(self, rollouts: list) -> None:
        """Count rollouts of this step, whether they are trained on or not."""
        lengths = [len(rollout.completion_ids) for rollout in rollouts if rollout.finish != "given"]
        self.progress.generated_tokens += sum_over_ranks(sum(lengths))
        self.progress.verifier_calls += sum_over_ranks(len(rollouts))

    def is_finite(self, loss: float, grad_norm: float, rollouts: list) -> bool:
        """Tell whether to take this update. One that is not finite ends the run, its batch saved,
        or is counted and left out with --skip_nonfinite."""
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

    def log(self, metrics: dict[str, float], rollouts: list[dict]) -> None:
        """End the step: log its metrics and rollouts, save it if it is time, obey a signal."""
        times = self._seconds_of_phases()
        progress, step = self.progress, self.progress.step + 1
        progress.step = step
        progress.seconds += times["time/step"]
        progress.flops += sum_over_ranks(flops.take("policy"))
        progress.teacher_flops += sum_over_ranks(flops.take("teacher"))
        metrics = metrics | times
        metrics["optim/learning_rate"] = learning_rate_at(step, self.args)
        metrics["optim/skipped"] = progress.skipped_updates
        metrics |= _gpu_memory()
        with writing(self.folder):
            on_first_rank(lambda: self._log.write(step, metrics, rollouts))
        self._bar.set_postfix({name: f"{metrics[name]:.3f}" for name in WATCHED}, refresh=False)
        self._bar.update()
        self._completed, self._updating = dataclasses.replace(progress), False
        if self.args.checkpoint_every and step % self.args.checkpoint_every == 0:
            self._save_checkpoint()
        self._obey_signal()

    def _seconds_of_phases(self) -> dict[str, float]:
        ends = [began for _, began in self._phases[1:]] + [time.perf_counter()]
        times = {
            f"time/{name}": end - began
            for (name, began), end in zip(self._phases, ends, strict=True)
        }
        evaluating = times.get("time/evaluate", 0.0)
        return times | {"time/step": ends[-1] - self._phases[0][1] - evaluating}

    def _save_checkpoint(self) -> None:
        progress, keep = dataclasses.asdict(self._completed), self.args.keep_checkpoints
        folder = self.folder / "checkpoints"
        checkpoint.save_checkpoint(folder, progress, self.model, self.optimizer, keep)
        self._saved_step = self._completed.step

    # --- the end ---

    def finish(self, tokenizer) -> None:
        """Save the final model; then, last of all, the manifest."""
        save_final(self.model, tokenizer, self.folder / "final")
        with writing(self.folder):
            on_first_rank(self._write_manifest)
        print(
            f"finished {self.folder}: {self.progress.step} steps in {self.progress.seconds:.0f} s; "
            "final/ is in float32"
        )

    def _write_manifest(self) -> None:
        self._log.close()
        manifest = {"script": self.script} | dataclasses.asdict(self.progress)
        write_json(self.folder / "manifest.json", manifest)
