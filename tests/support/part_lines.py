"""Lines of a part's file of benchmarks/gpu.py, which is on sys.path."""

from playbook.part_file import PartFile

ENVIRONMENT = {"hardware": "none", "torch": "0", "triton": "0"}


def tasks_line(*labels):
    return {"event": "tasks", "labels": labels, "environment": ENVIRONMENT}


def begin(task, shard=0, at=0.0, alone=False):
    return {"event": "begin", "task": task, "shard": shard, "at": at, "alone": alone}


def failed(task, problem="killed by SIGKILL", lost=True):
    return {"event": "failed", "task": task, "problem": problem, "lost": lost}


def end(task):
    return {"event": "end", "task": task}


def written(folder, name, *lines):
    file = PartFile(folder, name)
    for line in lines:
        file.append(line)
    return file
