"""How a process of a training ends."""

import os
import subprocess
import sys

from tests.warm import python

SCRIPT = """
import atexit
from pipeline.distributed.startup import end_process

class Held:
    def __del__(self):
        print("taken down")

held = Held()
atexit.register(print, "handlers have run")
print("the last line")
end_process(75)
"""


def test_a_process_ends_with_its_output_and_handlers_and_not_with_the_interpreters_end():
    """What is freed while the interpreter is taken down, such as gloo's tensors, may abort it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, env=environment
    )
    assert process.returncode == 75, process.stderr
    assert process.stdout.splitlines() == ["the last line", "handlers have run"]


def test_an_engine_does_not_wait_for_the_compiler_of_an_optimizer_that_nobody_uses():
    """DeepSpeed imports Muon with every engine, and compiling it loads torch's inductor, which takes seconds."""
    code = "import sys\nfrom pipeline.distributed import startup\n{}\n"
    code += "import deepspeed.runtime.zero.muon.muon_optimizer\nprint('torch._inductor.compile_fx' in sys.modules)"
    loaded = []
    for first in ("", "startup._leave_muon_uncompiled()"):
        done = subprocess.run([python(), "-c", code.format(first)], capture_output=True, text=True, check=True)
        loaded.append(done.stdout.split()[-1])
    assert loaded == ["True", "False"]
