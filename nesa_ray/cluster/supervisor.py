"""The process that owns a LocalCluster's processes.  Run as a script, standard library only: starts in 20 ms.

It adopts every process that its children leave behind (PR_SET_CHILD_SUBREAPER), so "all of the cluster" is "all of my
descendants", exactly: daemons, workers, and drivers of submitted jobs.  It takes commands as JSON lines on stdin,
answers each with its exit code, and when stdin ends (the owner closed it, or died in any way) it kills its
descendants and removes the cluster's directory.  All of them share its session, so that niceness counts between them
(the kernel's autogrouping weighs sessions first).
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def children() -> dict[int, list[int]]:
    """Child pids by parent pid, of the whole machine; zombies are left out."""
    out: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    out.setdefault(int(parent), []).append(int(entry.name))
    return out


def descendants(pid: int) -> list[int]:
    """All living processes below `pid`."""
    tree, found = children(), [pid]
    for p in found:
        found.extend(tree.get(p, []))
    return found[1:]


def reap() -> bool:
    """Takes the exit codes of dead children; whether there still are children."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def kill_descendants(max_seconds: float) -> bool:
    """Kills until no descendant lives; False if some still do after max_seconds."""
    end = time.monotonic() + max_seconds
    while (living := descendants(os.getpid())) or reap():
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def run(request: dict) -> None:
    """Runs one command to its end and reports its exit code."""
    with open(request["log"], "wb") as log:
        code = subprocess.call(
            request["argv"], env=request["env"], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    print(json.dumps({"name": request["name"], "code": code}), flush=True)


def main(directory: str) -> int:
    """Serves commands until the owner is gone, then leaves nothing behind."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, signal.SIG_IGN)  # the end of stdin is the one signal to stop
    owner, pending = os.getppid(), b""
    while os.getppid() == owner:  # a fork of the owner may hold the pipe open after the owner's death
        if not select.select([0], [], [], 1.0)[0]:
            continue
        chunk = os.read(0, 1 << 16)
        if not chunk:
            break
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            threading.Thread(target=run, args=(json.loads(line),), daemon=True).start()
    clean = kill_descendants(10.0)
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0 if clean else 1)


if __name__ == "__main__":
    main(sys.argv[1])
