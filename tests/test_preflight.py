"""What a stranger's GPU machine lacks, said in one line before anything is loaded."""

import stat
from dataclasses import replace

import pytest
import torch
from test_bridge import ONE_GPU, QWEN, no_network, plan_of, settings_of  # noqa: F401

import bridge
from common.model.load import check_shapes
from common.run import preflight
from common.run.errors import UserError
from common.run.preflight import Facts, check_gpu, check_size, look
from workflow import fit

H100 = Facts(True, "NVIDIA H100 80GB HBM3, 580.65", 85e9, 1.0, 9.0, "/usr/bin/cc", True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_has_it_all_is_taken_without_a_word(device, dtype, capsys):
    check_gpu(device, dtype, H100)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("device", "dtype", "facts", "message"),
    [
        ("auto", "bfloat16", {"capability": 7.5}, "7.5, has no bfloat16; use --dtype float32"),
        (
            "auto",
            "float32",
            {"compiler": None},
            "needs a C compiler and Python.h: apt install gcc python3",
        ),
        ("auto", "float32", {"has_headers": False}, "or name a compiler in CC"),
        ("cuda", "float32", {"usable": False, "listed": ""}, "torch sees no GPU; or use --device"),
        ("cuda", "float32", {"usable": False}, "lists NVIDIA H100 .* update the driver .* 580"),
    ],
)
def test_what_a_gpu_lacks_is_said_with_what_to_do(device, dtype, facts, message):
    with pytest.raises(UserError, match=message) as refusal:
        check_gpu(device, dtype, replace(H100, **facts))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("facts", [{"capability": 7.5}, {"compiler": None}, {"usable": False}])
def test_a_run_on_the_cpu_does_not_ask(facts, capsys):
    check_gpu("cpu", "bfloat16", replace(H100, **facts))
    assert capsys.readouterr().out == ""


def test_a_gpu_that_torch_cannot_use_leaves_the_cpu_with_a_word(capsys):
    check_gpu("auto", "float32", replace(H100, usable=False))
    assert capsys.readouterr().out.endswith("a CPU build; running on the CPU\n")
    check_gpu("auto", "float32", Facts())
    assert capsys.readouterr().out == ""


def test_a_large_model_without_a_gpu_must_be_insisted_on():
    check_size("Qwen/Qwen3-8B", 8_190_735_360, "cpu")
    check_size("Qwen/Qwen3-0.6B", 596_049_920, "auto")
    with pytest.raises(UserError, match="8.2B parameters, and torch sees no GPU; --device cpu"):
        check_size("Qwen/Qwen3-8B", 8_190_735_360, "auto")


def test_trainers_refuse_large_models_without_a_gpu(monkeypatch):
    check_shapes("toy/teacher", length=16, device="auto")
    monkeypatch.setattr(preflight, "MOST_ON_CPU", 1000)
    with pytest.raises(UserError, match="toy/teacher has .* and torch sees no GPU"):
        check_shapes("toy/teacher", length=16, device="auto")
    check_shapes("toy/teacher", length=16, device="cpu")


# === what nvidia-smi says ===


def lists(monkeypatch, tmp_path, *rows: str) -> None:
    """Put an nvidia-smi on the path that prints these rows, or those of the GPUs behind -i."""
    tool = tmp_path / "nvidia-smi"
    of_rows = "\n".join(f'{number}) echo "{row}";;' for number, row in enumerate(rows))
    script = f"#!/bin/sh\nshow() {{ case $1 in\n{of_rows}\nesac; }}\nall={len(rows)}\n"
    script += 'if [ "$3" = -i ]; then ids=$(echo $4 | tr , " "); else ids=$(seq 0 $((all-1))); fi\n'
    tool.write_text(script + "for i in $ids; do show $i; done\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


V100 = "[N/A], 16384, 16000, 7.0, Tesla V100-SXM2-16GB, 550.54.15"
BUSY = "Disabled, 81920, 8192, 9.0, NVIDIA H100 80GB HBM3, 580.65.06"
FREE = "Disabled, 81920, 81920, 9.0, NVIDIA H100 80GB HBM3, 580.65.06"


def test_the_fullest_gpu_and_every_name_are_seen(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lists(monkeypatch, tmp_path, FREE, BUSY, V100)
    facts = look()
    assert facts.free == pytest.approx(0.1)
    assert (facts.memory, facts.capability) == (16384 * 2**20, 7.0)
    h100, v100 = facts.listed.split("; ")
    assert (h100, v100) == ("NVIDIA H100 80GB HBM3, 580.65.06", "Tesla V100-SXM2-16GB, 550.54.15")
    assert not facts.usable  # torch has the last word


def test_only_visible_gpus_count(monkeypatch, tmp_path):
    lists(monkeypatch, tmp_path, FREE, BUSY, V100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert look().free == pytest.approx(16000 / 16384)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert look().listed == ""


def test_what_nvidia_smi_does_not_know_is_left_open(monkeypatch, tmp_path):
    """A DGX Spark shares its memory with the processor."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lists(monkeypatch, tmp_path, "[N/A], [N/A], [N/A], 12.1, NVIDIA GB10, 580.95")
    facts = look()
    assert (facts.listed, facts.memory, facts.free) == ("NVIDIA GB10, 580.95", None, 1.0)
    assert facts.capability == 12.1


def test_slices_of_a_gpu_are_not_the_whole_of_it(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lists(monkeypatch, tmp_path, FREE.replace("Disabled", "Enabled"))
    assert (look().listed, look().memory) == ("", None)


def test_a_driver_that_does_not_know_every_field_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lists(monkeypatch, tmp_path, "Tesla V100-SXM2-16GB, 418.87")
    facts = look()
    assert (facts.listed, facts.memory) == ("Tesla V100-SXM2-16GB, 418.87", None)
    with pytest.raises(UserError, match="V100-SXM2-16GB, 418.87, which torch .* update the driver"):
        check_gpu("cuda", "float32", facts)


def test_a_broken_nvidia_smi_is_none(monkeypatch, tmp_path):
    """Without a driver it prints an explanation, and exits with 9."""
    lists(monkeypatch, tmp_path, "NVIDIA-SMI has failed because it could not reach the driver.")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert look().listed == ""


def test_a_gpu_without_nvidia_smi_is_taken_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CC", "sh")  # any program will do
    monkeypatch.setattr(preflight.shutil, "which", lambda name: "/bin/sh" if name == "sh" else None)
    facts = look()
    assert facts.compiler == "/bin/sh"
    check_gpu("auto", "bfloat16", replace(facts, has_headers=True))


# === bridge.py ===


def test_a_workflow_without_a_gpu_is_refused_before_its_plan(tmp_path, monkeypatch, capsys):
    own = QWEN | {"dry_run": False, "output_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match="Qwen/Qwen3-8B has 8.2B parameters, and torch sees no GPU"):
        bridge.main(bridge.Args(**own))
    monkeypatch.setattr(preflight, "look", lambda: Facts(listed="Tesla V100, 550.54"))
    with pytest.raises(UserError, match="8.2B parameters, and nvidia-smi lists Tesla V100, 550.54"):
        bridge.main(bridge.Args(**own))
    assert "nvidia-smi lists Tesla V100, 550.54, which torch" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_network")
def test_what_others_hold_of_a_gpu_is_not_planned_with(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    own = {name: value for name, value in ONE_GPU.items() if name != "gpu_memory_gb"}
    own |= {"teacher_lora_rank": 32}
    monkeypatch.setattr(fit, "look", lambda: H100)
    assert "on each of 1 GPU(s)" not in plan_of(capsys, **own)[1]
    monkeypatch.setattr(fit, "look", lambda: replace(H100, free=0.3))
    printed = plan_of(capsys, **own)[1]
    assert "of 85 GB, of which 26 GB are free (nvidia-smi)" in printed
    assert settings_of(printed, "eval_raw_teacher")["vllm_gpu_memory"] == "0.28"


@pytest.mark.usefixtures("no_network")
def test_a_plan_names_a_gpu_that_torch_cannot_use(monkeypatch, capsys):
    own = {name: value for name, value in ONE_GPU.items() if name != "gpu_memory_gb"}
    monkeypatch.setattr(fit, "look", lambda: Facts(listed="Tesla V100, 550.54"))
    printed = plan_of(capsys, **own)[1]
    assert "torch cannot use Tesla V100, 550.54: planned for GPUs of 80 GB" in printed


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(fit, "look", lambda: H100)
    args = bridge.Args(**QWEN | {"dry_run": False, "nproc_per_node": 4})
    with pytest.raises(UserError, match="--nproc_per_node is 4, and this machine has 2 GPUs"):
        fit.find_machine(args)


def test_types_that_a_gpu_lacks_are_seen_before_the_first_stage(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for module in (fit, preflight):
        monkeypatch.setattr(module, "look", lambda: replace(H100, capability=7.5))
    own = QWEN | {"dry_run": False, "teacher_lora_rank": 32, "output_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match="7.5, has no bfloat16"):
        bridge.main(bridge.Args(**own))


def test_the_toy_stays_on_the_cpu_of_a_gpu_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    args = bridge.Args(dry_run=True)
    bridge.fill_in(args)
    machine = fit.find_machine(args)
    assert (args.device, machine.ranks, machine.launcher) == ("cpu", 1, ("python",))
    asked = bridge.Args(device="cuda")
    bridge.fill_in(asked)
    assert asked.device == "cuda"
