"""The Triton kernels without a GPU: run by Triton's interpreter against float64, and compiled ahead
of time for three generations of GPUs."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from common.run.inputs import ROOT

pytest.importorskip("triton")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_python(code: str, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


INTERPRETED = """
import math
import torch
from common.model import logprob

def oracle(logits, tokens, temperature, up_logprobs, up_entropy):
    x = (logits.double() / temperature).requires_grad_()
    logp = x.log_softmax(-1)
    lp = logp.gather(-1, tokens.clamp(min=0)[:, None]).squeeze(-1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp.clamp(min=-1e300), 0.0).sum(-1)
    keep = tokens >= 0
    ((lp * up_logprobs).nan_to_num(neginf=0.0) + entropy * up_entropy)[keep].sum().backward()
    grad = x.grad / temperature
    # d entropy of a word of probability 0 is 0; autograd's is nan
    return lp * keep, entropy * keep, grad.nan_to_num(0.0) * keep[:, None]

def kernels(logits, tokens, temperature, up_logprobs, up_entropy, out):
    saved = logprob._forward_triton(logits, tokens, temperature)
    logprobs, entropy, largest, log_sum = saved
    logprob._backward_triton(
        logits, tokens, entropy, largest, log_sum, up_logprobs, up_entropy, temperature, out)
    return logprobs, entropy, out

torch.manual_seed(SEED)
checked = 0
for V in (1, 17, 1000, 4096, 4097, 151_936):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if V > 5000 and dtype == torch.float16:
            continue
        for scale, temperature in ((1.0, 1.0), (5.0, 0.7), (1e4, 1.0)):
            N = 5 if V < 5000 else 2
            logits = (torch.randn(N, V) * scale).clamp(-6e4, 6e4).to(dtype)
            if V >= 17 and scale == 5.0:
                logits[:, 3] = -torch.inf
                logits[0, V // 2 :] = -torch.inf
            tokens = torch.randint(0, max(1, V // 3), (N,))
            tokens[logits[range(N), tokens] == -torch.inf] = 0
            if N > 2:
                tokens[1] = -100
            up = torch.randn(2, N)
            expected = oracle(logits, tokens, temperature, *up.double())
            for overwrite in (False, True):
                given = logits.clone()
                out = given if overwrite else torch.empty_like(given)
                got = kernels(given, tokens, temperature, *up, out)
                assert (got[0] <= 0).all()
                for name, a, b in zip(("logprob", "entropy"), got, expected):
                    torch.testing.assert_close(
                        a.double(), b, rtol=2e-6, atol=2e-5, msg=lambda m: f"{name} {V} {m}")
                tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
                torch.testing.assert_close(
                    got[2].double(), expected[2], rtol=tolerance, atol=tolerance)
                assert overwrite == (not torch.equal(given, logits)) or V == 1
                # and PyTorch's path, of the same contract
                ours = logprob._forward_torch(logits, tokens, temperature)
                for a, b in zip(ours[:2], expected):
                    torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-5)
                out = torch.empty_like(logits)
                logprob._backward_torch(logits, tokens, *ours[1:], *up, temperature, out)
                torch.testing.assert_close(
                    out.double(), expected[2], rtol=tolerance, atol=tolerance)
                checked += 1
# One output's gradient alone.
logits, tokens = torch.randn(4, 100) * 3, torch.randint(0, 100, (4,))
up = torch.randn(4)
for which in (0, 1):
    ups = [up if which == i else None for i in (0, 1)]
    filled = [torch.zeros(4) if u is None else u for u in ups]
    expected = oracle(logits, tokens, 1.0, *(u.double() for u in filled))[2]
    for backend in ("triton", "torch"):
        saved = getattr(logprob, f"_forward_{backend}")(logits, tokens, 1.0)
        out = torch.empty_like(logits)
        getattr(logprob, f"_backward_{backend}")(logits, tokens, *saved[1:], *ups, 1.0, out)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
# Rows that begin beyond 2^31 elements: 4.3 GB of bfloat16, of which two pages are touched.
stride = 2**31 + 1024
storage = torch.empty(stride + 1000, dtype=torch.bfloat16)
logits = storage.as_strided((2, 1000), (stride, 1))
logits.copy_(torch.randn(2, 1000))
tokens, up = torch.tensor([5, 999]), torch.randn(2, 2)
expected = oracle(logits, tokens, 1.0, *up.double())
got = kernels(logits, tokens, 1.0, *up, logits)
torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-5)
torch.testing.assert_close(got[2].double(), expected[2], rtol=1e-2, atol=1e-2)
print("checked", checked)
"""


def test_the_kernels_against_float64():
    seed = 20260512
    print(f"seed: {seed}")
    code = INTERPRETED.replace("SEED", str(seed))
    assert run_python(code, TRITON_INTERPRET="1") == "checked 102\n"


DIVERGENCES = """
import torch
from common.model import divergence as fused

def mean(p, values):
    return torch.where(p > 0, p * values, 0.0).sum(-1)

def oracle(kind, logits, teacher_logits, temperature, up):
    x = (logits.double() / temperature).requires_grad_()
    logp = x.log_softmax(-1).clamp(min=-1e300)  # keeps 0 times it finite
    logq = (teacher_logits.double() / temperature).log_softmax(-1).clamp(min=-1e300)
    p, q = logp.exp(), logq.exp()
    logm = torch.logaddexp(logp, logq) - fused.LOG_2
    found = {
        "entropy": -mean(p, logp),
        "teacher_entropy": -mean(q, logq),
        "reverse_kl": mean(p, logp - logq),
        "forward_kl": mean(q, logq - logp),
        "jsd": (mean(p, logp - logm) + mean(q, logq - logm)) / 2,
    }
    (found[kind] * up).sum().backward()
    return found, x.grad / temperature

torch.manual_seed(SEED)
checked = 0
for V in (1, 17, 2048, 2049, 151_936):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for scale, temperature in ((1.0, 1.0), (5.0, 0.7), (300.0, 1.0)):
            if V > 5000 and (dtype == torch.float16 or scale > 1):
                continue
            N = 4 if V < 5000 else 2
            logits, teacher = (torch.randn(2, N, V) * scale).to(dtype)
            if V >= 17 and scale == 5.0:  # words that both rule out, or all of a block
                logits[:, 3], teacher[:, 3] = -torch.inf, -torch.inf
                logits[0, V // 2 :], teacher[0, V // 2 :] = -torch.inf, -torch.inf
            teacher[-1] = logits[-1]  # one student that is its teacher
            up = torch.randn(N)
            wide = max(1, scale / 10)  # float32 keeps that much less of a difference
            for kind in ("reverse_kl", "forward_kl", "jsd"):
                expected, gradient = oracle(kind, logits, teacher, temperature, up.double())
                for backend in ("triton", "torch"):
                    forward = getattr(fused, f"_forward_{backend}")
                    backward = getattr(fused, f"_backward_{backend}")
                    found = forward(logits, teacher, kind, temperature)
                    for name, values in expected.items():
                        if name == "jsd" and kind != "jsd":
                            continue
                        got = found[fused.ROW.index(name)].double()
                        torch.testing.assert_close(
                            got, values, rtol=1e-5, atol=2e-5 * wide,
                            msg=lambda m: f"{backend} {name} {V} {dtype} {scale} {m}")
                    assert found[fused.ROW.index("reverse_kl"), -1] == 0
                    for overwrite in (False, True):
                        given = logits.clone()
                        out = given if overwrite else torch.empty_like(given)
                        backward(given, teacher, found, up, kind, temperature, out)
                        near = {torch.float32: 2e-5, torch.bfloat16: 1e-2}.get(dtype, 2e-3)
                        torch.testing.assert_close(
                            out.double(), gradient, rtol=near, atol=near * wide,
                            msg=lambda m: f"{backend} d {kind} {V} {dtype} {scale} {m}")
                checked += 1
print("checked", checked)
"""


def test_the_divergences_against_float64():
    seed = 20260513
    print(f"seed: {seed}")
    code = DIVERGENCES.replace("SEED", str(seed))
    assert run_python(code, TRITON_INTERPRET="1") == "checked 114\n"


COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from common.model import divergence, logprob

KINDS = [{"KIND": kind} for kind in ("reverse_kl", "forward_kl", "jsd")]
folder, architecture = sys.argv[1], int(sys.argv[2])
target = GPUTarget("cuda", architecture, 32)
for module, name, variants in (
    (logprob, "forward", [{}]),
    (logprob, "backward", [{}]),
    (divergence, "forward", [{"JSD": False}, {"JSD": True}]),
    (divergence, "backward", KINDS),
):
    kernel = getattr(module, f"_{name}_kernel")
    for logits in ("bf16", "fp32"):
        for variant in variants:
            fixed = variant | {"BLOCK": module.BLOCK}
            types = {"logits": f"*{logits}", "out": f"*{logits}", "tokens": "*i64"}
            types |= {"teacher_logits": f"*{logits}", "teacher_stride": "i64"}
            types |= {"row_stride": "i64", "out_stride": "i64"}
            types |= {"num_words": "i32", "num_rows": "i32", "temperature": "fp32"}
            types |= dict.fromkeys(fixed, "constexpr")
            signature = {arg: types.get(arg, "*fp32") for arg in kernel.arg_names}
            source = ASTSource(kernel, signature, constexprs=fixed)
            compiled = triton.compile(source, target=target, options={"num_warps": 8})
            label = "-".join([module.__name__, name, *map(str, variant.values())])
            path = f"{folder}/{label}_{logits}_{architecture}.cubin"
            open(path, "wb").write(compiled.asm["cubin"])
            print(label, logits, architecture, compiled.metadata.shared, path)
"""


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_kernels_compile_without_spills(architecture, tmp_path):
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    script = tmp_path / "compile.py"
    script.write_text(COMPILED)
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), str(architecture)],
            capture_output=True,
            text=True,
            env=ENVIRONMENT | {"TRITON_CACHE_DIR": cache},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 14
    for line in lines:
        name, logits, _, shared, path = line.split()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True
        ).stdout
        found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        print(f"sm_{architecture} {name} {logits}: {found}, shared memory {shared} bytes")
        assert found["STACK"] == found["LOCAL"] == 0
        assert found["REG"] <= 64  # 8 warps a program, 4 programs a multiprocessor


def test_both_outputs_are_differentiable():
    from common.model.logprob import token_logprobs

    logits = torch.randn(3, 11, requires_grad=True)
    tokens = torch.tensor([0, 10, -100])
    for output in (0, 1):
        (grad,) = torch.autograd.grad(token_logprobs(logits, tokens, 0.7)[output].sum(), logits)
        step = 1e-2
        for row in range(3):
            for column in (0, 4, 10):
                bump = torch.zeros_like(logits)
                bump[row, column] = step
                with torch.no_grad():
                    high, low = (
                        token_logprobs(logits + sign * bump, tokens, 0.7)[output][row].double()
                        for sign in (1, -1)
                    )
                numeric = (high - low) / (2 * step)
                assert grad[row, column].item() == pytest.approx(numeric.item(), abs=2e-3)
        assert (grad[2] == 0).all()


def test_the_gradient_may_overwrite_the_logits():
    from common.model.logprob import token_logprobs

    logits, tokens = torch.randn(3, 11), torch.tensor([0, 10, 4])
    kept = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(token_logprobs(kept, tokens)[0].sum(), kept)
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(token_logprobs(leaf, tokens, 1.0, True)[0].sum(), leaf)
    torch.testing.assert_close(grad, expected)
    assert grad.data_ptr() == leaf.data_ptr()


def test_the_chunks_logits_are_freed():
    """They once were not: a chunk of them stayed behind at each micro-batch."""
    from common.model.head import head_backward
    from common.model.logprob import token_logprobs

    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs Linux")

    class Model:
        weight = torch.randn(150_000, 8, requires_grad=True)

        def get_output_embeddings(self):
            return self

    def loss_fn(logits, tokens):
        return -token_logprobs(logits, tokens, 1.0, True)[0].sum(), {}

    def resident() -> int:
        for _ in range(5):
            hidden = torch.randn(64, 8).requires_grad_()  # 38 MB of logits
            inputs = {"tokens": torch.zeros(64, dtype=torch.long)}
            head_backward(hidden, Model(), loss_fn, inputs, 1.0, chunk_size=64)
        return int(statm.read_text().split()[1]) * 4096

    assert resident() + 100e6 > resident()
