"""The log of a run: metrics.jsonl, rollouts/, TensorBoard, and with --track Weights & Biases."""

import gzip
import hashlib
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path

from common.run.errors import check
from common.run.folder import write_atomic, write_jsonl
from common.run.inputs import ROOT


class Log:
    """The writer of a run's log. Steps after `step`, which are done again, leave the log first.
    keep_rollouts: of so many of the newest steps; a step's may be 50 MB."""

    def __init__(self, folder: Path, step: int, config: dict, track: bool, keep_rollouts: int):
        self.folder, self.path, self.wandb = folder, folder / "metrics.jsonl", None
        self.keep_rollouts = keep_rollouts
        self.first: dict[str, float] | None = None  # the metrics of the first step
        self.told: set[str] = set()  # the symptoms, in this process
        if self.path.exists():
            lines = [
                line for line in self.path.read_text("utf-8").splitlines() if line.endswith("}")
            ]
            rows = [row for row in map(json.loads, lines) if row["step"] <= step]
            write_jsonl(self.path, rows)
            self.first = rows[0] if rows else None
        if track:
            import wandb

            name = hashlib.sha256(json.dumps(config, default=str).encode()).hexdigest()[:16]
            run = {"project": ROOT.name, "id": name, "config": config, "resume": "allow"}
            self.wandb = wandb.init(**run, sync_tensorboard=True)  # the same run, found again
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float], rollouts: list[dict]) -> None:
        write_jsonl(self.folder / "rollouts" / f"step_{step}.jsonl", rollouts)
        self._put_away(step - self.keep_rollouts)
        row = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no nan
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | row) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        self.first = self.first or row
        for symptom, advice in symptoms(self.first, row):
            if symptom not in self.told:
                print(f"\nstep {step}: {symptom}; {advice}")
                self.told.add(symptom)

    def _put_away(self, step: int) -> None:
        """Remove a step's rollouts; keep those of the first, and of every 50th compressed."""
        path = self.folder / "rollouts" / f"step_{step}.jsonl"
        if step % 50 == 0 and path.exists():
            write_atomic(path.with_name(f"{path.name}.gz"), gzip.compress(path.read_bytes()))
        if step > 1:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self.board.close()
        if self.wandb:
            self.wandb.finish()


def symptoms(first: dict[str, float], now: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Yield what a run that goes wrong shows, with what to do, from the metrics of its first step
    and of this one."""
    if now["rollout/truncated"] == 1:
        yield "every completion was cut off", "raise --max_new_tokens"
    elif now["rollout/no_answer"] == 1:
        advice = "look at rollouts/, and at what --task asks for (math: \\boxed{...})"
        yield "no completion had an answer", advice
    entropies = [row.get("policy/entropy") for row in (first, now)]
    if None not in entropies and entropies[1] < entropies[0] / 10:
        advice = "if accuracy is still low, lower --learning_rate"
        yield "policy/entropy is below a tenth of its start", advice
    longer = now["rollout/length"] > 2 * first["rollout/length"]
    if longer and now["rollout/accuracy"] <= first["rollout/accuracy"]:
        advice = "read rollouts/: longer is not better here"
        yield "completions are twice as long as at the start and no more accurate", advice


def check_track(track: bool) -> None:
    installed = importlib.util.find_spec("wandb") is not None
    check(installed or not track, "--track needs Weights & Biases: pip install wandb")
