"""Two machines, as two torchrun agents on this one: bridge.py on each, over a shared folder."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_bridge import TINY

from common.run.inputs import ROOT

pytestmark = pytest.mark.slow
ROUTE = ["--routes", "raw_teacher", "--nproc_per_node", "2", "--nnodes", "2"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_both(folder: Path, *flags: str) -> list[subprocess.Popen]:
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command = [sys.executable, str(ROOT / "bridge.py"), *TINY, *ROUTE, *address, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [*command, "--node_rank", str(node), "--output_dir", str(folder)],
            **pipes,
            env=environment,
        )
        for node in (1, 0)
    ]


def ends(nodes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    outputs = [node.communicate(timeout=400)[0] for node in nodes]
    return [node.returncode for node in nodes], outputs


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in map(int, children) for p in (child, *descendants(child))]


def test_a_workflow_over_two_machines(tmp_path):
    """Each waits for the other in every stage; the first one writes the report. A rank that is
    killed on the second machine ends both with a message; the same two commands go on."""
    folder = tmp_path / "out"
    flags = ["--num_steps", "16"]
    nodes = start_both(folder, *flags)
    metrics = folder / "seed_0" / "raw_teacher_fkl_warmup" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.1)
    ranks = [
        pid
        for pid in descendants(nodes[0].pid)
        if b"fkl_warmup.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()
    ]
    os.kill(ranks[0], signal.SIGKILL)
    codes, outputs = ends(nodes)
    assert codes == [1, 1], outputs
    assert all("error: stage raw_teacher_fkl_warmup failed" in output for output in outputs)
    assert not (folder / "report.md").exists()

    codes, outputs = ends(start_both(folder, *flags))
    assert codes == [0, 0], outputs
    assert all(output.count("finished before") == 2 for output in outputs)  # two evaluations
    assert (folder / "report.md").exists()
    assert [output.count("report: ") for output in outputs] == [0, 1]
    codes, outputs = ends(start_both(folder, *flags))
    assert codes == [0, 0], outputs
    assert all(output.count("finished before") == 5 for output in outputs)
