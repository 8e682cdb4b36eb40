"""Other engines, each in a process of its own: one that crashes, or keeps threads of its own, disturbs nobody.

    peer = Peer("llama", "2")           # or Peer("genai"); PeerMissing when it is not installed or cannot run here
    peer.ask("decode", 512, 16)         # 16 greedy tokens at a context of 512; prefill is done when first asked for
    peer.ask("prefill", 512)            # a prompt of 512 tokens

Run as a script this file is the other process: it reads a question per line, and answers with the seconds it took.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


class PeerMissing(Exception):
    """This engine is not installed, or does not run on this machine; the message says which."""


class Peer:
    """The parent's end."""

    def __init__(self, *arguments: str):
        command = [sys.executable, __file__, *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.name = " ".join(arguments)
        said = self.read()
        if said != "ready":
            raise PeerMissing(f"{self.name}: {said}")

    def read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise PeerMissing(f"{self.name}: its process ended with status {self.process.wait()}")
        return line.strip()

    def ask(self, *question) -> float:
        self.process.stdin.write(" ".join(map(str, question)) + "\n")
        self.process.stdin.flush()
        return float(self.read())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def prompt(tokens: int) -> list[int]:
    """The same ids for every engine."""
    return [7 * i % 49152 for i in range(tokens)]


class Llama:
    """llama.cpp through llama-cpp-python, on the Q4_1 file that the embedded model is made from."""

    def __init__(self, threads: str, *options: str):
        import llama_cpp

        from labkit import assets

        defaults = llama_cpp.llama_model_default_params

        def plain():  # without the buffers that repack weights: where those crash, this is what is left
            params = defaults()
            params.use_extra_bufts = False
            return params

        if "plain" in options:
            llama_cpp.llama_cpp.llama_model_default_params = plain
        path = str(assets.fetch("smollm2-135m-instruct"))
        count = int(threads)
        self.model = llama_cpp.Llama(
            path, n_ctx=2048, n_batch=512, n_threads=count, n_threads_batch=count, verbose=False
        )
        self.start(16)
        self.decode(16, 2)

    def start(self, tokens: int) -> None:
        self.model.reset()
        self.model.eval(prompt(tokens))

    def decode(self, context: int, steps: int) -> None:
        if self.model.n_tokens < context:
            raise ValueError(f"decode at {context} tokens after {self.model.n_tokens}")
        self.model.n_tokens = context
        for _ in range(steps):
            self.model.eval([5])


class GenAI:
    """onnxruntime-genai on the folder that its own builder makes: 4-bit blocks and head, at its defaults."""

    def __init__(self):
        import onnxruntime_genai as og

        self.og, self.model = og, og.Model(str(built()))
        self.start(16)
        self.decode(16, 2)

    def start(self, tokens: int) -> None:
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=2048, min_length=2048, do_sample=False)
        self.generator = self.og.Generator(self.model, params)
        self.generator.append_tokens(prompt(tokens))

    def decode(self, context: int, steps: int) -> None:
        self.generator.rewind_to(context)
        self.generator.append_tokens([5])  # one run; each call below draws a token, and runs it when the next is wanted
        for _ in range(steps):
            self.generator.generate_next_token()


def built() -> Path:
    """The folder for onnxruntime-genai, made once by its own builder."""
    from labkit import embedded
    from labkit._files import whole_folder
    from labkit.paths import cache

    folder = cache() / "bench-genai"
    if not (folder / "genai_config.json").exists():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        extra = ["--extra_options", "int4_accuracy_level=4", "hf_remote=false"]
        with whole_folder(folder) as scratch:
            where = ["-i", str(embedded.folder()), "-o", str(scratch), "-c", str(scratch / "hub")]
            made = subprocess.run(builder + where + extra, capture_output=True, text=True)
            if made.returncode:  # for example a module that the builder needs and its package does not install: onnx_ir
                raise PeerMissing(f"its builder failed: {(made.stderr.strip().splitlines() or ['no output'])[-1]}")
    return folder


def main(kind: str, *arguments: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        peer = {"llama": Llama, "genai": GenAI}[kind](*arguments)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=out, flush=True)
        return
    print("ready", file=out, flush=True)
    started = 0
    for line in sys.stdin:
        what, *numbers = line.split()
        first, *rest = map(int, numbers)
        if what == "decode" and started != first:
            peer.start(first)
            started = first
        begin = time.perf_counter()
        if what == "decode":
            peer.decode(first, *rest)
        else:
            peer.start(first)
            started = 0
        print(time.perf_counter() - begin, file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
