"""The workflow: sparse reward on the teacher, dense transfer to the student, sparse reward again.

A route is a way from the two base models to a trained student; `half` is the paper's. --help lists
them, from the tables in workflow/routes.py. Beside the paper's, which match labels, there are two
controls that match compute, and one route of a later paper (semi_opd).

Stages that routes share run once. Each stage is a child process whose printed command line can be
run by itself; it leaves a manifest and is skipped on the next call. At the end OUTPUT_DIR gets
report.md, report.png and results.json. What only the workflow needs is in workflow/: presets (the
settings and their sources), routes, stages, fit and memory (what fits the machine), budget,
processes, report, figure, paper_results.

    python bridge.py                                             # the toy, on a CPU, in minutes
    python bridge.py --routes all --seeds 1 2 3 --jobs 2         # a study
    python bridge.py --teacher Qwen/Qwen3-8B --dry_run           # the plan: commands and settings
    python bridge.py --teacher Qwen/Qwen3-8B                     # student Qwen/Qwen3-1.7B, DAPO
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from common.run.errors import check
from common.run.process import NOT_NEGATIVE, PORT, POSITIVE, SHARE, start
from workflow.budget import print_budget
from workflow.fit import FIT_HEADER, Machine, check_fit, check_hardware, find_machine
from workflow.hours import gpu_of, print_extrapolation, print_hours
from workflow.presets import fill_in, preset_of
from workflow.processes import run_stages
from workflow.report import markdown, write_report
from workflow.routes import ROUTES, plan, table_of_routes
from workflow.stages import print_plan


@dataclass
class Args:
    teacher: str = "toy/teacher"
    """the large model: a local folder or a hub id"""
    trained_teacher: str | None = None
    """a teacher that reward has shaped already: it takes the RL teacher's place in every route"""
    student: str | None = None
    """the small model; default: toy/student, or the paper's for Qwen3 and Llama-3.3-70B-Instruct"""
    output_dir: str | None = None
    """where everything is written; default: runs/bridge-TEACHER, or -PRESET, and -quick"""
    routes: tuple[Literal[*ROUTES, "paper", "all"], ...] = ("half", "cold")
    """what to run and compare (listed above); paper: those that it reports for this teacher"""
    seeds: Annotated[tuple[int, ...], NOT_NEGATIVE] = (0,)
    """every trained stage is repeated with each"""
    jobs: Annotated[int, POSITIVE] = 1
    """stages that run at the same time, each with its share of the CPU's threads"""
    dry_run: bool = False
    """print every command and setting, run nothing"""
    only_report: bool = False
    """run nothing; write the report of stages that are finished"""
    task: str | None = None
    """what is asked and what earns a reward; default: math, else a .py file (docs/tasks.md)"""
    dataset: str | None = None
    """training problems; default: the task's first, or DAPO-Math-17k for math on other models"""
    benchmarks: tuple[str, ...] | None = None
    """what is evaluated; default: the task's first, or math500 aime24 aime25"""
    decontaminate: tuple[str, ...] | None = None
    """sets whose problems are removed; default: --benchmarks, for a hub dataset every benchmark"""
    columns: tuple[str, ...] | None = None
    """columns of other names in --dataset than the task knows: problem=question answer=solution"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where every stage runs"""
    backend: Literal["auto", "torch", "vllm"] = "auto"
    """what samples: transformers or vLLM; auto takes vLLM on a GPU"""
    nproc_per_node: Annotated[int | None, POSITIVE] = None
    """ranks on this machine; default: as many as there are GPUs, or 1"""
    nnodes: Annotated[int, POSITIVE] = 1
    """machines with a shared folder, each of which runs this command with its own --node_rank"""
    node_rank: Annotated[int, NOT_NEGATIVE] = 0
    """number of this machine: 0 also writes the report"""
    master_addr: str | None = None
    """address of machine 0, if there are several"""
    master_port: Annotated[int, PORT] = 29500
    """a free port of machine 0"""
    gpu_tflops: Annotated[float | None, POSITIVE] = None
    """of each GPU, dense bfloat16, for the least time that is printed; default: by its name"""
    gpu_memory_gb: Annotated[float | None, POSITIVE] = None
    """of each GPU; default: what is there (set it to plan for other machines with --dry_run)"""
    host_memory_gb: Annotated[float | None, POSITIVE] = None
    """of this machine; default: what is there"""

    preset: str | None = None
    """one_gpu_day, eight_gpu_day, or a JSON file: settings laid over the paper's, or the toy's
    (workflow/presets.py)"""
    quick: bool = False
    """every stage for real and small; at its end, how long the whole would take"""
    num_steps: Annotated[int | None, POSITIVE] = None
    """instead of the preset's, in every training stage (as the next five)"""
    prompts_per_step: Annotated[int | None, POSITIVE] = None
    """prompts per step"""
    group_size: Annotated[int | None, POSITIVE] = None
    """completions per prompt"""
    micro_batch_tokens: Annotated[int | None, POSITIVE] = None
    """tokens per forward and backward, padding included"""
    learning_rate: Annotated[float | None, POSITIVE] = None
    """AdamW's peak rate"""
    num_minibatches: Annotated[int | None, POSITIVE] = None
    """optimizer steps per pass over a step's rollouts"""
    teacher_lora_rank: Annotated[int | None, POSITIVE] = None
    """train the teacher as adapters of this rank (LoRA), at 10 times the preset's rate"""
    student_lora_rank: Annotated[int | None, POSITIVE] = None
    """the same for the student; OPD at 2 times the preset's rate"""
    teacher_cpu_offload: bool = False
    """keep the teacher's weights and optimizer in host memory while it is trained: far slower"""
    student_cpu_offload: bool = False
    """the same for the student, and for the teacher beside it"""
    max_prompt_tokens: Annotated[int | None, POSITIVE] = None
    """instead of the preset's, in every stage (as the next three)"""
    max_new_tokens: Annotated[int | None, POSITIVE] = None
    """longest completion"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """compute type"""
    tensor_parallel: Annotated[int | None, POSITIVE] = None
    """GPUs that share one vLLM, for a model that does not fit one"""
    chat_template: str | None = None
    """a .jinja file, or a model whose chat template is used; default: each model's own, or for a
    student without one the teacher's in every stage"""
    vllm_gpu_memory: Annotated[float | None, SHARE] = None
    """share of the GPU's memory that vLLM may take while it samples"""
    num_samples: Annotated[int | None, POSITIVE] = None
    """instead of the preset's, in the evaluations: completions per problem"""
    num_problems: Annotated[int | None, POSITIVE] = None
    """take the first problems of each benchmark only"""


def main(args: Args) -> None:
    check_args(args)
    fill_in(args)
    preset = preset_of(args)
    check(not (args.quick and args.teacher.startswith("toy/")), "--quick is for models of the hub")
    machine = find_machine(args)
    stages, evaluations = plan(args, preset, machine)
    check_folder(Path(args.output_dir))
    problems, rows, details = check_fit(args, machine, stages)
    if machine.gpu and rows:
        print(f"\n{markdown(FIT_HEADER, rows)}\n(for each GPU; computed, not measured)\n")
    if args.dry_run:
        print("\n".join(details))
        print_plan(stages, preset)
        print_budget(stages)
        if not problems:
            show_hours(args, machine, stages)
        print("".join(f"\nthis would not run: {problem}" for problem in problems))
        return
    began = time.perf_counter()
    if not args.only_report:
        check_hardware(args, machine, stages)
        check(not problems, "; ".join(problems))
        print_budget(stages)
        show_hours(args, machine, stages)
        run_stages(stages, args.jobs, machine.forks)
    check_finished(stages)  # with what is there now: a file may have been replaced meanwhile
    if args.node_rank == 0:
        write_report(Path(args.output_dir), args, evaluations)
    print(f"total: {time.perf_counter() - began:.0f} s")
    if args.quick:
        whole = replace(args, quick=False)
        gpu = gpu_of(machine.gpu_name, args.gpu_tflops)
        whole_stages = plan(whole, preset_of(whole), machine)[0]
        print_extrapolation(stages, whole_stages, gpu, machine)


def show_hours(args: Args, machine: Machine, stages: list) -> None:
    """Print how long the training takes at least, where it runs on GPUs."""
    if machine.gpu:
        print_hours(stages, machine, gpu_of(machine.gpu_name, args.gpu_tflops))


def check_args(args: Args) -> None:
    check(args.seeds and args.routes, "--seeds and --routes need a value each")
    check(args.benchmarks != (), "--benchmarks needs a value, for example toy or math500")
    check(len(set(args.seeds)) == len(args.seeds), "a seed stands twice in --seeds")


def check_folder(folder: Path) -> None:
    """The report must not replace the files of another run."""
    # One that was killed at once has left a folder of no files.
    is_empty = not folder.is_file() and all(path.is_dir() for path in folder.rglob("*"))
    is_study = any((folder / "base").glob("eval_*"))
    check(is_empty or is_study, f"{folder} exists and is no study's; choose another --output_dir")


def check_finished(stages: list) -> None:
    """Refuse a report while stages are unfinished, or finished with other data."""
    missing = [stage.name for stage in stages if not stage.is_finished()]
    names = ", ".join(missing[:3])
    message = f"{len(missing)} of {len(stages)} stages are not finished ({names} ...)"
    check(not missing, f"{message}; the same command without --only_report runs them")


if __name__ == "__main__":
    start(main, Args, f"{__doc__}\n{table_of_routes()}")
