"""The studies around bridge.py: the law against draws, discovery and shared teachers on made-up
runs; each study as a whole command, with tiny stages."""

import json
import os
import random
import re
import signal
import subprocess

import pytest
from conftest import SEED

from common.run.errors import UserError
from common.run.process import STOP, Stopped
from common.statistics import t_interval
from toy import allocation, studies, variants, warmups
from toy import map as toy_map
from workflow.presets import ours


def test_expected_steps_are_those_of_draws():
    rng = random.Random(SEED)
    for prior, completions in ((0.05, 8), (0.3, 4), (1.0, 2)):
        trials = []
        for _ in range(4000):
            steps = 1
            while not any(rng.random() < prior for _ in range(completions)):
                steps += 1
            trials.append(steps)
        mean = sum(trials) / len(trials)
        assert toy_map.expected_steps(prior, completions) == pytest.approx(mean, rel=0.06)
    assert toy_map.expected_steps(0.0, 192) == float("inf")


def write_step(run, number: int, rows: list[tuple[float, str]]) -> None:
    (run / "rollouts").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"reward": reward, "completion": text}) for reward, text in rows]
    (run / "rollouts" / f"step_{number}.jsonl").write_text("\n".join(lines))
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": number}) + "\n")


def test_a_success_is_a_rewarded_completion_of_the_good_way(tmp_path):
    write_step(tmp_path, 1, [(1.0, r"\boxed{3}"), (0.0, r"1+1=3;\boxed{3}")])
    write_step(tmp_path, 2, [(1.0, r"1+2=3;\boxed{3}"), (0.0, r"\boxed{3}")])
    write_step(tmp_path, 3, [(1.0, r"1+1=2;\boxed{2}"), (1.0, r"1+2=3;\boxed{3}")])
    shares = toy_map.success_shares(tmp_path)
    assert shares == [0.0, 0.5, 1.0]
    assert toy_map.first_above(0.0, shares) == 2
    assert toy_map.first_above(0.5, shares) == 3
    assert toy_map.first_above(0.0, shares[:1]) is None
    (tmp_path / "rollouts" / "step_2.jsonl").unlink()  # as --keep_rollouts does
    with pytest.raises(UserError, match="step_2"):  # not: a first success at "step 2", which is 3
        toy_map.success_shares(tmp_path)


def test_teachers_are_shared_and_students_are_not(tmp_path):
    source, folder = tmp_path / "one", tmp_path / "two"
    names = ("base/eval_raw_teacher", "seed_1/teacher_grpo", "seed_1/fkl_warmup", "seed_1/cold")
    for name in names:
        (source / name).mkdir(parents=True)
        (source / name / "file").write_text(name)
    studies.share_teachers(source, folder)
    copied = {str(path.parent.relative_to(folder)) for path in folder.rglob("file")}
    assert copied == {"base/eval_raw_teacher", "seed_1/teacher_grpo"}
    (folder / "seed_1" / "teacher_grpo" / "file").write_text("its own")
    studies.share_teachers(source, folder)
    assert (folder / "seed_1" / "teacher_grpo" / "file").read_text() == "its own"


def test_a_student_is_made_once_and_of_the_shipped_one(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(studies, "run", made.append)
    monkeypatch.setattr(studies, "hash_of_model", lambda name: "1a2b")
    for _ in range(2):
        assert studies.make_student(0.02, tmp_path) == str(tmp_path / "student")
    assert len(made) == 1
    monkeypatch.setattr(studies, "hash_of_model", lambda name: "3c4d")
    with pytest.raises(UserError, match="was made of another toy/student; choose another"):
        studies.make_student(0.02, tmp_path)


def test_a_study_waits_for_what_its_script_saves(tmp_path, monkeypatch):
    """Ctrl-C reaches the script once."""
    (tmp_path / "stub.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "def save(*_): time.sleep(0.3), pathlib.Path('saved').touch(), sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "os.kill(int(sys.argv[1]), signal.SIGINT)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    monkeypatch.setattr(STOP, "number", None)
    before = signal.signal(signal.SIGINT, STOP.catch)
    try:
        with pytest.raises(Stopped):
            studies.run(["stub.py", str(os.getpid())])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()


def test_a_variant_is_applied_within_a_checkout_too(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    tree = studies.variant("self_distillation", tmp_path / "runs")
    assert "told_prompt" in (tree / "opd.py").read_text()
    assert studies.variant("self_distillation", tmp_path / "runs") == tree


def test_a_table_cell_is_the_mean_with_its_interval():
    values = [1.0, 2.0, 4.5]
    low, high = t_interval(values)
    assert studies.mean_and_interval(values, "+") == f"+2.5 [{low:+.1f}, {high:+.1f}]"
    assert studies.mean_and_interval([3.0]) == "3.0"
    assert studies.difference([3.0, 1.0], [1.0, 4.0]) == [2.0, -3.0]


@pytest.fixture
def tiny(monkeypatch):
    """Two steps a stage, eight problems, and the shipped student, whatever its use."""
    real, calls = studies.bridge, []

    def bridge(folder, seeds, flags, tree=None):
        calls.append(folder)
        small = ["--num_steps", "2", "--prompts_per_step", "2", "--group_size", "4"]
        small += ["--num_samples", "2", "--num_problems", "32"]
        return real(folder, seeds, [*flags, *small], tree)

    for module in (toy_map, warmups, allocation, variants):
        monkeypatch.setattr(module, "bridge", bridge)
    for module in (toy_map, warmups, variants):
        monkeypatch.setattr(
            module, "make_student", lambda use, folder, shape="student": f"toy/{shape}"
        )
    return calls


@pytest.mark.slow
def test_the_map_runs_draws_and_resumes(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy_map, "COLD_RATES", (2e-4, 4e-4))
    monkeypatch.setattr(toy_map, "CHOICE_SEEDS", (1,))
    args = toy_map.Args(output_dir=tmp_path, uses=(0.02, 0.3), seeds=(1,))
    toy_map.main(args)
    printed = capsys.readouterr().out
    header, _, *rows = printed[printed.index("| prior, %") :].splitlines()[:4]
    assert header.startswith("| prior, % | cold")
    assert [row.count("|") for row in rows] == [header.count("|")] * 2
    assert "| raw-teacher bridge < cold GRPO " in printed
    for name in ("map.png", "law.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    teachers = [tmp_path / f"use_{use}" / "seed_1" / "teacher_grpo" for use in (0.02, 0.3)]
    one, other = (t / "manifest.json" for t in teachers)
    assert one.read_text() == other.read_text()  # copied: the seconds are the same
    before = one.stat().st_mtime_ns
    toy_map.main(args)
    assert one.stat().st_mtime_ns == before
    assert len(tiny) == 2 * 2 * 3  # twice: each student at each rate, and at the better one


@pytest.mark.slow
def test_the_warmups_run_and_share_the_steps(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warmups, "LENGTHS", (0, 5, 20, 40))
    monkeypatch.setattr(warmups, "BASE", 1)
    warmups.main(warmups.Args(output_dir=tmp_path, uses=(0.1,), seeds=(1,)))
    assert "0 of 40" in capsys.readouterr().out
    assert (tmp_path / "warmups.png").read_bytes()[:4] == b"\x89PNG"
    for length in (5, 20):
        preset = json.loads((tmp_path / f"warmup_{length}.json").read_text())
        assert sum(settings["num_steps"] for settings in preset.values()) == warmups.STEPS
        assert preset["fkl_warmup"]["num_steps"] == length


@pytest.mark.slow
def test_the_allocations_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(allocation, "SAMPLES", (16, 1))
    monkeypatch.setattr(allocation, "HORIZONS", (8,))
    monkeypatch.setattr(allocation, "evaluate", lambda model, folder: float(model.exists()))
    allocation.main(allocation.Args(output_dir=tmp_path, seeds=(1,)))
    printed = capsys.readouterr().out
    for row in ("12 x 16", "192 x 1", "192 x 1 of the same 288", "8 tokens", "64 tokens"):
        assert re.search(rf"^\| {row} +\| \d", printed, re.MULTILINE)
    met = (tmp_path / "pool_same" / "seed_1.jsonl").read_text().splitlines()
    assert len(met) == 4  # two steps of two prompts
    config = json.loads((tmp_path / "pool_same" / "seed_1" / "opd" / "config.json").read_text())
    assert (config["training_problems"], config["prompts_per_step"], config["group_size"]) == (
        4,
        192,
        1,
    )
    config = json.loads((tmp_path / "horizon_8" / "seed_1" / "opd" / "config.json").read_text())
    assert config["max_new_tokens"] == 8


@pytest.mark.slow
def test_the_variants_run_in_copies_of_the_tree(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(variants.VARIANTS, "progressive_horizon")
    monkeypatch.setitem(variants.TOY, "opd", {"num_steps": ours(2), "group_size": ours(2)})
    monkeypatch.setattr(variants, "evaluate", lambda model, folder: float(model.exists()))
    variants.main(variants.Args(output_dir=tmp_path, seeds=(1,)))
    printed = capsys.readouterr().out
    for name in ("opd.py as it is", "shift_target", "self_distillation"):
        assert re.search(rf"^\| {name} +\| \d", printed, re.MULTILINE)
    assert re.search(r"^\| self_distillation +\| 1.0 ", printed, re.MULTILINE)
    config = json.loads((tmp_path / "shift_target" / "seed_1" / "opd" / "config.json").read_text())
    assert config["teacher_base"] == "toy/teacher"
