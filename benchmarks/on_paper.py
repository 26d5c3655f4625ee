"""A step of the real preset on paper: FLOPs and bytes of each part, and the least time that the
published limits of an H100 leave it. Computed; nothing here was measured.

    python -m benchmarks.on_paper                                 # teacher GRPO, OPD, student GRPO

Every completion counts --length tokens. A part takes the longer of its FLOPs at 989 TFLOP/s (dense
bfloat16) and its bytes at 3.35 TB/s. vLLM decodes as many sequences at once as its cache holds.
"""

from dataclasses import dataclass

import fkl_warmup
import grpo
import opd
from common.run.process import start
from workflow import memory
from workflow.presets import KINDS, REAL

PEAK_FLOPS, BANDWIDTH = 989e12, 3.35e12  # NVIDIA's data sheet of the H100 SXM
GPU_MEMORY = 80e9
LAUNCH, SYNC = 5e-6, 50e-6  # seconds of a kernel's launch, and of a wait of the host: assumed
C = 2  # bytes of bfloat16


@dataclass
class Args:
    teacher: str = "Qwen/Qwen3-8B"
    """the teacher"""
    student: str = "Qwen/Qwen3-1.7B"
    """the student"""
    prompt: int = 256
    """tokens of a prompt"""
    length: int = 16_384
    """tokens of a completion"""


@dataclass(frozen=True)
class Part:
    name: str
    flops: float = 0.0
    bytes: float = 0.0
    fixed: float = 0.0  # seconds of launches and waits
    own: bool = False  # an overhead of this design, not of the method

    @property
    def seconds(self) -> float:
        return max(self.flops / PEAK_FLOPS, self.bytes / BANDWIDTH) + self.fixed


def sampling(shape: memory.Shape, sequences: int, flags, args: Args) -> list[Part]:
    body, head = shape.layers * shape.layer, shape.vocab * shape.hidden
    kv_token = C * shape.layers * shape.kv
    whole = args.prompt + args.length
    room = flags.vllm_gpu_memory * GPU_MEMORY - C * shape.params
    batch = max(
        1, min(flags.vllm_sequences, sequences, int(room / (kv_token * whole / 2)))
    )  # half full
    rounds = sequences / batch * args.length
    tokens, context = sequences * args.length, args.prompt + args.length / 2
    attention = 4 * shape.layers * (shape.qk - shape.kv / 2) * tokens * context
    return [
        Part(
            f"decode: weights, {batch} at once",
            2 * (body + head) * tokens,
            C * shape.params * rounds,
        ),
        Part("decode: keys and values", attention, kv_token * tokens * context),
    ]


def passes(shape: memory.Shape, sequences: int, args: Args, times: int, what: str) -> list[Part]:
    """`times` forward-sized passes: 1 to score; 3 to update, and the layers once more, for their
    activations are computed again."""
    again = times + (times == 3)
    tokens = sequences * (args.prompt + args.length)
    pairs = sequences * (args.prompt + args.length) ** 2 / 2
    layers = 2 * shape.layers * shape.layer * tokens * again
    attention = 4 * shape.layers * (shape.qk - shape.kv / 2) * pairs * again
    head = 2 * shape.vocab * shape.hidden * sequences * args.length * times
    return [
        Part(f"{what}: layers", layers),
        Part(f"{what}: attention", attention),
        Part(f"{what}: head", head),
    ]


def overheads(shape: memory.Shape, sequences: int, scored: int, flags, args: Args) -> list[Part]:
    """Return what this design adds to the method's own work, for the trained model. scored: forward
    passes beside the update's."""
    updates = flags.num_minibatches
    whole = args.prompt + args.length
    micro_batches = sequences / max(1, flags.micro_batch_tokens // whole)
    chunks = sequences * args.length / flags.chunk_size
    logits = sequences * args.length * shape.vocab
    layers = shape.layers * shape.layer
    # FSDP2 casts float32 to bfloat16 at each gathering, forward and backward, and adds float32.
    gathering = micro_batches * (2 * layers * (4 + C) + layers * (C + 4 + 4 + 4))
    gathering += scored * micro_batches * layers * (4 + C)
    # The loss reads and writes logits; with a teacher it reads both twice, and once for the top 16.
    kernel_bytes = (7 if hasattr(flags, "teacher") else 3) * C * logits
    launches = 2 * -(-shape.vocab // 4096) + 30
    return [
        Part(
            "logits: written and read again by products and loss", 0, 4 * C * logits + kernel_bytes
        ),
        Part("head's gradient added up in float32", 0, chunks * 12 * shape.vocab * shape.hidden),
        Part("gathering and gradients a micro-batch", 0, gathering, own=True),
        Part("AdamW", 0, updates * 28 * shape.params),
        Part("chunk loop: launches", fixed=chunks * launches * LAUNCH, own=True),
        Part("waits of the host", fixed=micro_batches * 6 * SYNC, own=True),
        Part("sync to vLLM and its bit-by-bit proof", 0, (4 + 4 * C) * shape.params, own=True),
        Part("canary: prefill and 8 tokens", 0, 10 * C * shape.params, own=True),
    ]


def step(kind: str, trained: str, teacher: str | None, args: Args) -> list[Part]:
    module = {"grpo.py": grpo, "opd.py": opd, "fkl_warmup.py": fkl_warmup}[KINDS[kind][0]]
    settings = {name: setting.value for name, setting in REAL[kind].items()}
    flags = module.Args(**settings)
    shape, sequences = memory.shape_of(trained), flags.prompts_per_step * flags.group_size
    parts = sampling(shape, sequences, flags, args)
    scored = 0
    if teacher:
        parts += passes(memory.shape_of(teacher), sequences, args, 1, "teacher")
    else:
        scored = 2 if flags.num_minibatches > 1 else 1
        for part in passes(shape, sequences, args, 1, "reference and old log-probs"):
            parts.append(Part(part.name, scored * part.flops))
    parts += passes(shape, sequences, args, 3, "update")
    return parts + overheads(shape, sequences, scored, flags, args)


def table(title: str, parts: list[Part]) -> None:
    total = sum(part.seconds for part in parts)
    print(f"\n{title}\n\n| part | TFLOPs | TB | s | share |\n|---|---|---|---|---|")
    for part in parts:
        name = f"*{part.name}*" if part.own else part.name
        numbers = f"{part.flops / 1e12:,.0f} | {part.bytes / 1e12:,.2f} | {part.seconds:,.1f}"
        print(f"| {name} | {numbers} | {part.seconds / total:.1%} |")
    own = sum(part.seconds for part in parts if part.own)
    print(f"| all; *this design's own* | | | {total:,.0f}; *{own:,.1f}* | {own / total:.2%} |")


def main(args: Args) -> None:
    for kind, trained, teacher in (
        ("teacher_grpo", args.teacher, None),
        ("opd", args.student, args.teacher),
        ("student_grpo", args.student, None),
    ):
        title = f"{kind} of {trained}, completions of {args.length:,} tokens"
        table(title, step(kind, trained, teacher, args))


if __name__ == "__main__":
    start(main, Args, __doc__)
