"""How soon the command line answers: what `--help` must not load, and processor time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.slow import slow

ROOT = Path(__file__).parents[2]
COMMANDS = (
    *("generate", "doctor", "render", "sample", "distill", "calibrate", "app"),
    *("evaluate", "evaluate seams"),
    *("bench", "bench attention", "bench growth", "bench denoise", "bench plan", "bench parallel"),
)
HEAVY = {
    *("torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "safetensors"),
    *("huggingface_hub", "triton", "gradio", "torchmetrics", "peft", "tifffile"),
}
# Seconds on a quiet core that should do, once all is compiled; a slower machine has twice these.
SECONDS = {"--help": 0.5, "doctor": 4}
MARGIN = 2


def python(*arguments):
    """Run a fresh interpreter; what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def processor_seconds(*arguments):
    """Of `clear-dit`, however busy the machine is: user and system time of the process."""
    before = os.times()
    python("-m", "clear_dit", *arguments)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def test_help_of_every_command_loads_nothing_heavy():
    program = f"""
import sys
from clear_dit import cli
for command in ("", *{COMMANDS}):
    sys.argv = ["clear-dit", *command.split(), "-h"]
    try:
        cli.main()
    except SystemExit as status:
        assert not status.code, command
print(*sorted({HEAVY} & set(sys.modules)), sep=" ")
"""
    assert python("-c", program).splitlines()[-1] == ""


@slow
@pytest.mark.parametrize("command", SECONDS)
def test_the_command_answers_soon(command):
    processor_seconds(command)  # compiles what never was
    assert processor_seconds(command) < MARGIN * SECONDS[command]
