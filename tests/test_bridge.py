"""The workflow: its plan, and one run of it with a step a stage."""

import json
import re
import shlex
import socket

import pytest
from test_scripts import run

import bridge
from common.run import ROOT

TINY = [
    *("--num_steps", "1", "--prompts_per_step", "2", "--group_size", "2"),
    *("--num_samples", "2", "--num_problems", "8"),
]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the plan needs the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_the_plan_for_the_real_models_needs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bridge.main(bridge.Args(teacher="Qwen/Qwen3-8B", dry_run=True))
    printed = capsys.readouterr().out
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("python ")]
    scripts = [command[1] for command in commands]
    assert scripts.count("evaluate.py") == 7
    assert [s for s in scripts if s != "evaluate.py"] == [
        *("grpo.py", "fkl_warmup.py", "opd.py", "grpo.py", "grpo.py")
    ]
    teacher_grpo = next(command for command in commands if command[1] == "grpo.py")
    assert teacher_grpo[teacher_grpo.index("--model") + 1] == "Qwen/Qwen3-8B"
    assert teacher_grpo[teacher_grpo.index("--learning_rate") + 1] == "1e-06"
    for source in ("paper", "authors' scripts", "ours: the paper's 10 epochs of a half"):
        assert re.search(rf"^teacher_grpo .* {source}", printed, re.MULTILINE)
    assert "token budget" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("teacher", ["toy/teacher", "Qwen/Qwen3-8B"])
def test_every_planned_flag_is_one_of_its_script(teacher):
    args = bridge.Args(teacher=teacher)
    for stage in bridge.plan(args, bridge.fill_in(args)):
        module = __import__(stage.script.removesuffix(".py"))
        fields = module.Args.__dataclass_fields__
        assert set(stage.flags) <= set(fields), stage.name


@pytest.mark.parametrize("teacher", ["toy/teacher", "Qwen/Qwen3-8B"])
def test_cold_has_the_label_uses_of_both_grpo_stages(teacher):
    args = bridge.Args(teacher=teacher)
    stages = {stage.name: stage for stage in bridge.plan(args, bridge.fill_in(args))}
    steps = {
        name: s.settings["num_steps"].value for name, s in stages.items() if "eval" not in name
    }
    assert steps["cold"] == steps["teacher_grpo"] + steps["student_grpo"]
    if teacher.startswith("toy"):  # and the student updates of warmup, OPD and GRPO
        assert steps["cold"] == steps["fkl_warmup"] + steps["opd"] + steps["student_grpo"]
    for name in ("prompts_per_step", "group_size"):
        values = {stages[n].flags[name] for n in ("cold", "teacher_grpo", "student_grpo")}
        assert len(values) == 1


def test_the_workflow_runs_skips_and_reports(tmp_path):
    folder = tmp_path / "out"
    done = run("bridge", *TINY, "--output_dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((folder / "seed_0" / "results.json").read_text())["rows"]
    assert len(rows) == 7
    uses = {row["title"]: row["label_uses"] for row in rows}
    assert (uses["untrained student"], uses["raw teacher"]) == (0, 0)
    assert uses["bridge: + OPD (1H)"] == 4
    assert uses["bridge: + GRPO (2H)"] == uses["cold GRPO (1H + 2H)"] == 8
    report = (folder / "seed_0" / "report.md").read_text()
    assert report.count("\n| ") == 9
    assert "it is no evidence" in report
    assert (folder / "seed_0" / "report.png").read_bytes()[:4] == b"\x89PNG"
    again = run("bridge", *TINY, "--output_dir", folder)
    assert again.returncode == 0
    assert again.stdout.count("finished before") == 12
    other = run("bridge", *TINY, "--output_dir", folder, "--group_size", "4")
    assert other.returncode == 2
    assert "finished with other settings (group_size)" in other.stderr


def test_a_failing_stage_stops_the_workflow(tmp_path):
    flags = [*TINY, "--dataset", "nothing.jsonl", "--output_dir", tmp_path / "out"]
    done = run("bridge", *flags)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: stage teacher_grpo failed")
    assert "nothing.jsonl does not exist" in message
    assert "to retry: python grpo.py" in message
    assert not (tmp_path / "out" / "seed_0" / "fkl_warmup").exists()
    assert ROOT.joinpath("bridge.py").exists()
