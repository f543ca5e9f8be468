"""llama.cpp's server out of the wheel `xllamacpp`, started as its own program would be.

    python benchmarks/wheel_server.py --model FILE --port PORT --parallel 4 --ctx-size 2048

Everything that is not named here keeps the server's default.
"""

from __future__ import annotations

import argparse
import threading


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    for name in ("port", "threads", "threads-batch", "parallel", "ctx-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames, params.port = [options.host], options.port
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads_batch
    params.n_parallel, params.n_ctx = options.parallel, options.ctx_size
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
