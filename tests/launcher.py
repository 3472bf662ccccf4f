"""
A Python that imports torch once and forks for each run of a stage, so that ten kills of 01 cost
seconds; what runs in the fork is the script from its first line, disturbed as the test wants it.

python tests/launcher.py [MODULE ...]   imports these, too; then it reads a job a line, and prints
its process id, and when it has ended its exit status. A job is a JSON object:

argv, stdout, stderr   the command; the files that take what it says
out                    how the paths of its outputs begin
operations, calls      when: before its n-th opening, renaming or removal of an output; at its n-th
                       call of a function of the stage or of common.py, counted from main() on. With
                       calls, a run that is not killed leaves both counts in the file `stdout`-seen
signal                 what it gets then (SIGKILL, SIGINT), by number; 0: it waits until the file
                       `stdout`-waits, which it makes, is gone
bytes, torn            the largest file that it may write; torn: it is killed in the middle of the
                       write that goes beyond, else that write fails
bound                  permissions bind it, though it be root
"""
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback

import torch  # noqa: F401
from transformers import (AutoModelForCausalLM, LlamaForCausalLM,  # noqa: F401
                          PreTrainedTokenizerFast)


def watch(job, seen):
    """Count in `seen`, and do at the moment what the job asks for."""
    ours = []

    def count(kind):
        seen[kind] += 1
        if seen[kind] == job[kind] and job["signal"]:
            os.kill(os.getpid(), job["signal"])
        elif seen[kind] == job[kind]:
            waits = f"{job['stdout']}-waits"
            os.close(os.open(waits, os.O_CREAT))
            ends = time.time() + 300  # a test that was killed leaves nobody waiting
            while os.path.exists(waits) and time.time() < ends:
                time.sleep(0.01)

    def operation(event, args):
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(job["out"]):
            count("operations")

    def call(frame, event, arg):
        if frame.f_code.co_name == "main":
            ours[:] = sys.argv[0], os.path.abspath("common.py")
        if frame.f_code.co_filename in ours:
            count("calls")

    sys.addaudithook(operation)
    sys.settrace(call if job["calls"] else None)


def child(job):
    """What the fork does: never returns."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if job["bytes"]:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["bytes"], job["bytes"]))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if job["torn"] else signal.SIG_IGN)
    if job["bound"]:  # without capabilities, as anybody is
        ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())
    sys.argv, seen = job["argv"], {"operations": 0, "calls": 0}
    watch(job, seen)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.settrace(None)
    sys.stdout.flush()
    if job["calls"]:
        told = json.dumps(seen)  # before it counts this file
        with open(f"{job['stdout']}-seen", "w") as f:
            f.write(told)
    os._exit(code)  # at once: taking torch apart would cost a second


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        os.setpgid(pid, pid)
        if pid == 0:
            child(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
