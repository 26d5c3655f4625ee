"""A run as its trainer sees it: steps, phases, a log, a folder that the same command resumes."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from common.model import flops
from common.model.memory import print_plan
from common.model.save import file_dtype, save_final
from common.run import checkpoint
from common.run.atomic_files import write_json, write_jsonl, writing
from common.run.errors import RunFailure, check, one_line
from common.run.folder import claim_folder, lock_folder
from common.run.inputs import ROOT, inputs_of
from common.run.process import STOP, Stopped, check_ranges, start
from common.run.ranks import gather, max_over_ranks, num_ranks, on_first_rank, rank, sum_over_ranks
from common.sampling.rollout import Rollout, rollout_metrics
from common.tasks.data import fingerprint

WATCHED = ("rollout/reward", "rollout/length", "loss/total")  # what the progress bar shows


@dataclasses.dataclass
class Progress:
    """What a run has done so far; saved with each checkpoint."""

    step: int = 0
    cursor: int = 0  # items drawn from the training stream
    generated_tokens: int = 0
    flops: float = 0.0  # of the trained model: sampling, its updates, and in GRPO the reference's
    teacher_flops: float = 0.0  # of a teacher: sampling and scoring
    verifier_calls: int = 0  # label uses, where the verdicts are the reward; monitoring elsewhere
    skipped_updates: int = 0  # whose loss or gradient was not finite
    seconds: float = 0.0


def start_training(main: Callable, args_type: type, description: str) -> None:
    """As start; --dry_run is answered with the memory plan, and `main` is not called."""
    start(lambda args: print_plan(args) if args.dry_run else main(args), args_type, description)


def check_training(args) -> None:
    """What no trainer can run with."""
    check_ranges(args)
    check(args.learning_rate is not None, f"set --learning_rate for {args.model} (the paper: 1e-6)")
    rows = args.prompts_per_step * args.group_size
    check(
        args.num_minibatches <= rows,
        f"--num_minibatches {args.num_minibatches} exceeds the {rows} rollouts of a step",
    )


def learning_rate_at(step: int, args) -> float:
    """The rate of step 1, 2, ...: linear warmup, then constant or down to 0 after the last."""
    if step <= args.warmup_steps:
        return args.learning_rate * step / args.warmup_steps
    left = (args.num_steps - step + 1) / (args.num_steps - args.warmup_steps)
    cosine = 0.5 - 0.5 * math.cos(math.pi * left)
    factor = {"constant": 1.0, "linear": left, "cosine": cosine}[args.lr_schedule]
    return args.learning_rate * factor


def mean(updates: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the optimizer steps that have it."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {name: sum(listed) / len(listed) for name, listed in values.items()}


class Run:
    """One training run and its folder.

    A fresh `output_dir` is created; one of the same config is resumed from its newest checkpoint;
    one of another config is left untouched and raises UserError with the differences. `dataset`:
    the prompts, or given rollouts, that the run draws from.

        run = Run(__file__, args, tokenizer, dataset)
        run.restore(model, optimizer)
        with run:
            for step in run.steps():
                run.phase("generate")
                ...
                run.log(metrics)
        run.finish(tokenizer)
    """

    def __init__(self, script: str, args, tokenizer, dataset: list):
        self.script, self.args, self.folder = Path(script).stem, args, Path(args.output_dir)
        has_wandb = importlib.util.find_spec("wandb") is not None
        check(has_wandb or not args.track, "--track needs Weights & Biases: pip install wandb")
        inputs = on_first_rank(lambda: inputs_of(args))
        data = fingerprint(tokenizer, dataset, args)
        self.config = {"script": self.script, **vars(args), **inputs, **data}
        self.finished, self.checkpoint = on_first_rank(self._open_folder)
        self.progress = Progress()
        if self.finished:
            print(f"{self.folder} is finished already")
        elif self.checkpoint:
            self.progress = Progress(**json.loads((self.checkpoint / "progress.json").read_text()))
            print(f"resuming {self.folder} after step {self.progress.step}")
        self._completed = dataclasses.replace(self.progress)  # as of the last completed step
        self._saved_step, self._updating = self.progress.step, False
        self._drawn: list[Rollout] = []  # of this step

    def _open_folder(self) -> tuple[bool, Path | None]:
        """Claim and lock the folder; whether it is finished, and what to resume from."""
        claim_folder(self.folder, self.config)
        self._lock = lock_folder(self.folder)
        if (self.folder / "manifest.json").exists():
            return True, None
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        (self.folder / "rollouts").mkdir(exist_ok=True)
        return False, checkpoint.newest_checkpoint(self.folder / "checkpoints")

    def restore(self, model, optimizer) -> None:
        """What is trained; if the run is resumed, as its checkpoint has it."""
        self.model, self.optimizer = model, optimizer
        # In a fresh run too: moments that are first made among activations pin the memory there.
        checkpoint.prepare_state(optimizer)
        if self.checkpoint:
            checkpoint.load_checkpoint(self.checkpoint, model, optimizer)

    # --- the loop ---

    def __enter__(self) -> "Run":
        STOP.in_loop = True
        if rank() == 0:
            self._open_logs()
        return self

    def __exit__(self, kind, error, trace) -> None:
        """If a signal or a failure ends the loop while the model is that of the last completed
        step, this step is saved. (Not if one rank fails: a sharded model is saved by all of them,
        and the others are elsewhere.)"""
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
        """The steps that are left, 1, 2, ..., each with its learning rate set, until --num_steps or
        a budget is reached. Each must be logged."""
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
        """Whether --stop_at_tokens or --stop_at_flops is reached."""
        args, done = self.args, self.progress
        tokens_spent = 0 < args.stop_at_tokens <= done.generated_tokens
        return tokens_spent or 0 < args.stop_at_flops <= done.flops + done.teacher_flops

    def phase(self, name: str) -> None:
        """A phase of the step begins, and the one before it ends: its seconds go to time/NAME. A
        signal is obeyed before `update`, in which the weights change."""
        if name == "update":
            self._obey_signal()
            self._updating = True
        self._phases.append((name, time.perf_counter()))

    def _obey_signal(self) -> None:
        """Ranks that saw the signal at different boundaries would wait for each other for ever."""
        number = max_over_ranks(STOP.number or 0)
        if number:
            raise Stopped(number, f" after step {self._completed.step}")

    def add_drawn(self, rollouts: list[Rollout]) -> None:
        """Rollouts of this step, whether they are trained on or not: for the log and the budget."""
        self._drawn += rollouts
        lengths = [len(rollout.completion_ids) for rollout in rollouts if rollout.finish != "given"]
        self.progress.generated_tokens += sum_over_ranks(sum(lengths))
        self.progress.verifier_calls += sum_over_ranks(len(rollouts))

    def is_finite(self, loss: float, grad_norm: float, rollouts: list[Rollout]) -> bool:
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

    def log(self, metrics: dict[str, float]) -> None:
        """End the step: log its metrics and rollouts, save it if it is time, obey a signal."""
        times = self._seconds_of_phases()
        progress, step = self.progress, self.progress.step + 1
        progress.step = step
        progress.seconds += times["time/step"]
        progress.flops += sum_over_ranks(flops.take("policy"))
        progress.teacher_flops += sum_over_ranks(flops.take("teacher"))
        metrics = rollout_metrics(self._drawn) | metrics | times
        metrics["optim/learning_rate"] = learning_rate_at(step, self.args)
        metrics["optim/skipped"] = progress.skipped_updates
        rows = gather([rollout.row() for rollout in self._drawn])
        with writing(self.folder):
            on_first_rank(lambda: self._write_log(step, metrics, rows))
        self._bar.set_postfix({name: f"{metrics[name]:.3f}" for name in WATCHED}, refresh=False)
        self._bar.update()
        self._drawn = []
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

    def _open_logs(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        step, path = self.progress.step, self.folder / "metrics.jsonl"
        if path.exists():  # steps after the checkpoint are done again
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            write_jsonl(path, [row for row in map(json.loads, lines) if row["step"] <= step])
        self._board = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)
        self._wandb = None
        if self.args.track:
            import wandb

            name = hashlib.sha256(json.dumps(self.config).encode()).hexdigest()[:16]  # found again
            self._wandb = wandb.init(project=ROOT.name, id=name, config=self.config, resume="allow")

    def _write_log(self, step: int, metrics: dict[str, float], rows: list[dict]) -> None:
        write_jsonl(self.folder / "rollouts" / f"step_{step}.jsonl", rows)
        row = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no nan
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | row) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(metrics, step=step)

    def _save_checkpoint(self) -> None:
        progress, keep = dataclasses.asdict(self._completed), self.args.keep_checkpoints
        folder = self.folder / "checkpoints"
        checkpoint.save_checkpoint(folder, progress, self.model, self.optimizer, keep)
        self._saved_step = self._completed.step

    # --- the end ---

    def finish(self, tokenizer) -> None:
        """Save the final model; then, last of all, the manifest."""
        dtype = self.args.save_dtype
        dtype = file_dtype(self.args.model) if dtype == "auto" else dtype
        save_final(self.model, tokenizer, self.folder / "final", dtype)
        with writing(self.folder):
            on_first_rank(self._write_manifest)
        print(
            f"finished {self.folder}: {self.progress.step} steps in {self.progress.seconds:.0f} s; "
            f"final/ is in {dtype}"
        )

    def _write_manifest(self) -> None:
        self._board.close()
        manifest = {"script": self.script} | dataclasses.asdict(self.progress)
        write_json(self.folder / "manifest.json", manifest)
        if self._wandb:
            self._wandb.finish()
