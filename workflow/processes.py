"""Stages as child processes: what is ready runs, `jobs` at a time; a failure stops the others."""

import os
import re
import selectors
import signal
import subprocess
import sys

from common.run.errors import RunFailure, UserError
from common.run.inputs import ROOT
from common.run.process import Stopped
from workflow.fork_server import ForkServer
from workflow.stages import Stage


class Child:
    """One running stage; what it prints goes to NAME.log beside its folder."""

    def __init__(self, stage: Stage, environment: dict[str, str], server: ForkServer | None):
        self.stage = stage
        self.log = stage.folder.with_name(stage.name + ".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log_file = open(self.log, "ab")  # noqa: SIM115
        self.log_start = self.log_file.tell()
        script = [str(ROOT / stage.script), *stage.words]
        if server is not None:
            self.process = server.start(script)
            return
        launcher = [sys.executable]
        if stage.launcher[0] == "torchrun":
            launcher += ["-m", "torch.distributed.run", *stage.launcher[1:]]
        # In a session of its own, so that Ctrl-C reaches it once: through us.
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(
            [*launcher, *script], **pipes, start_new_session=True, env=environment
        )

    def pass_on(self, echo: bool) -> bool:
        """Write what it has printed to its log; False at its end."""
        piece = self.process.stdout.read1()
        self.log_file.write(piece)
        if echo:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        return piece != b""

    def finish(self) -> None:
        """Raise if it has failed."""
        code = self.process.wait()
        self.log_file.close()
        if code == 0 and self.stage.manifest.exists():
            return
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace").strip()
        # torchrun ends with a table of its own, and with code 1.
        errors = re.findall(r"^(?:rank \d+: )?error: .*", text, re.MULTILINE)
        reason = " / ".join(errors[:1] or text.splitlines()[-5:])
        bad_input = code == 2 or re.search(r"^ *exitcode *: 2 ", text, re.MULTILINE)
        raise (UserError if bad_input else RunFailure)(
            f"stage {self.stage.name} failed with exit code {code} ({reason}); log: {self.log}; "
            f"to retry: {self.stage.command}"
        )


def run_stages(stages: list[Stage], jobs: int, forks: bool = False) -> None:
    """Run each stage once what it needs is finished, `jobs` at a time; `forks`: from one warm
    Python. If one fails, or a signal comes, the others are stopped: they save what they have
    done."""
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
    environment = threads | os.environ
    waiting, done = list(stages), set()
    with selectors.DefaultSelector() as running, ForkServer(environment) as server:
        try:
            while waiting or running.get_map():
                for stage in list(waiting):
                    ready = all(s.folder in done for s in (*stage.needs, *stage.budget_of))
                    if not ready or len(running.get_map()) == jobs:
                        continue
                    waiting.remove(stage)
                    if stage.is_finished():
                        print(f"\n# {stage.name}: finished before\n{stage.command}")
                        done.add(stage.folder)
                        continue
                    print(f"\n# {stage.name}\n{stage.command}", flush=True)
                    child = Child(stage, environment, server if forks else None)
                    running.register(child.process.stdout, selectors.EVENT_READ, child)
                for key, _ in running.select() if running.get_map() else ():
                    if not key.data.pass_on(echo=jobs == 1):
                        running.unregister(key.fileobj)
                        key.data.finish()
                        done.add(key.data.stage.folder)
        except BaseException as error:
            number = error.number if isinstance(error, Stopped) else signal.SIGTERM
            children = [key.data for key in running.get_map().values()]
            for child in children:
                child.process.send_signal(number)
            for child in children:
                child.log_file.write(child.process.stdout.read())
                child.process.wait()
            raise
