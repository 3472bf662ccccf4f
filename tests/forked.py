"""A Python that imports the slow libraries once and forks for each script: starting is most of the
time of a recipe on a tiny model.

    python forked.py SOCKET             the server; ends after ten minutes without a command
    python forked.py SOCKET x.py ARGS   runs x.py as python would: its output, its exit status
"""
import json
import os
import runpy
import socket
import sys
import traceback


def work(argv, fds):
    """What the child does: never returns."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)
    sys.argv, sys.path[0], code = argv, os.path.dirname(os.path.abspath(argv[0])), 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(address):
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import rank_bm25  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    torch.set_num_threads(1)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{address}.new")
        server.listen()
        os.rename(f"{address}.new", address)  # there only when it listens
        server.settimeout(600)
        while True:
            try:
                client, _ = server.accept()
            except TimeoutError:
                return
            text, fds, *_ = socket.recv_fds(client, 100_000, 3)
            child = os.fork() or work(json.loads(text), fds)
            for fd in fds:
                os.close(fd)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            client.sendall(bytes([code % 256]))
            client.close()


def ask(address, argv):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        socket.send_fds(client, [json.dumps(argv).encode()], [0, 1, 2])
        return client.recv(1)[0]


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], sys.argv[2:]) if sys.argv[2:] else serve(sys.argv[1]))
