"""The loop: failures, resuming, changed files, signals, watching, and the command."""

import errno
import json
import os
import signal
import threading
import time

import pytest
from support.command_line import run

from clear_dit import progress
from clear_dit.errors import RequestError
from clear_dit.render.claims import Claims
from clear_dit.render.launch import Launch
from clear_dit.render.manifest import Manifest, check_own, read_manifest
from clear_dit.render.run import render

FLAGS = {"height": 32, "width": 32, "steps": 1, "radius": 2, "weights": "none", "device": "cpu"}


@pytest.fixture
def generate(tmp_path, fake_runner):
    """Renders lines into tmp_path/out."""

    def run(*lines, runner=None, **options):
        path = tmp_path / "jobs.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        flags = FLAGS | options.pop("flags", {})
        runner = runner or fake_runner()
        return render(path, tmp_path / "out", flags, progress=False, make_runner=runner, **options)

    return run


def statuses(folder):
    entries = read_manifest(folder / "out" / "manifest.jsonl")
    return {name: entry["status"] for name, entry in entries.items()}


A, B, C = ({"prompt": f"a {name}", "id": name} for name in ("house", "cat", "tree"))


def test_goes_on_after_a_failure_and_tries_it_again(generate, fake_runner, tmp_path, caplog):
    failing = fake_runner(fail={"a cat": MemoryError("too large"), "a tree": KeyError("bug")})
    result = generate(A, B, C, runner=failing)
    assert (result["done"], result["failed"], result["waiting"]) == (1, 2, 0)
    entries = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert entries["cat"]["error"] == "too large"
    assert entries["tree"]["error"] == "KeyError: 'bug'"
    assert "cat (line 2) failed: too large" in caplog.text
    result = generate(A, B, C)
    assert (result["done"], result["generated"]) == (3, 2)
    assert "error" not in read_manifest(tmp_path / "out" / "manifest.jsonl")["cat"]


def test_a_full_disk_ends_the_run(generate, fake_runner, tmp_path):
    full = OSError("house.png could not be written (No space left on device).")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        generate(A, B, runner=fake_runner(fail={"a house": full}))
    assert statuses(tmp_path) == {"house": "failed", "cat": "waiting"}


def test_jobs_are_known_by_their_content(generate, tmp_path):
    assert generate(A, B)["generated"] == 2
    assert generate(C, B, A)["generated"] == 1  # another order, one more
    assert generate(B, flags={"seed": 1})["generated"] == 1  # the same id, another image
    assert statuses(tmp_path) == {"cat": "done"}
    assert (tmp_path / "out" / "house.png").is_file()  # of a line that is no longer there
    assert generate(A, B)["generated"] == 1
    result = generate(A, B)
    assert (result["generated"], result["done"]) == (0, 2)


def test_what_a_killed_process_left_is_repaired(generate, tmp_path):
    generate(A, B)
    out = tmp_path / "out"
    before = json.loads((out / "cat.json").read_text())
    (out / "house.json").unlink()
    (out / "cat.json").write_text('{"job": "another"}')
    (out / ".clear-dit-abc.png").write_bytes(b"half")
    manifest = (out / "manifest.jsonl").read_bytes()
    (out / "manifest.jsonl").write_bytes(manifest[:-20])
    assert generate(A, B)["generated"] == 0
    assert json.loads((out / "cat.json").read_text())["job"] == before["job"]
    assert (out / "house.json").is_file()
    assert not (out / ".clear-dit-abc.png").exists()
    assert statuses(tmp_path) == {"house": "done", "cat": "done"}


def test_an_image_that_is_cut_off_is_generated_again(generate, tmp_path):
    generate(A)
    image = tmp_path / "out" / "house.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:-30])
    assert generate(A)["generated"] == 1
    assert image.read_bytes() == whole


@pytest.mark.parametrize("content", [b"mine", None])
def test_somebody_elses_file_is_not_replaced(generate, tmp_path, content):
    image = tmp_path / "out" / "house.png"
    image.parent.mkdir()
    if content is None:
        image.mkdir()
    else:
        image.write_bytes(content)
    with pytest.raises(RequestError, match=r"line 1: there is a .*house.png that no render wrote"):
        generate(A, B)
    assert not (tmp_path / "out" / "cat.png").exists()
    assert content is None or image.read_bytes() == content


def test_a_torn_line_does_not_hide_the_next(tmp_path):
    claims = Claims(tmp_path)
    manifest = Manifest(tmp_path, claims, "jobs.jsonl")
    entry = {"id": "a", "line": 1, "job": "0", "status": "waiting"}
    manifest.begin([entry])
    with manifest.path.open("ab") as file:
        file.write(b'{"id": "a", "status": "do')
    check_own(manifest.path)
    assert manifest.news() == {"a": {**entry, "file": "jobs.jsonl"}}
    manifest.add({**entry, "status": "failed"}, {**entry, "id": "b", "status": "done"})
    assert {name: entry["status"] for name, entry in manifest.news().items()} == {
        "a": "failed",
        "b": "done",
    }
    assert manifest.news() == {}
    check_own(manifest.path)
    with claims.leaving() as last:
        assert last
        manifest.compact()
    assert manifest.path.read_bytes().count(b"\n") == 2


@pytest.fixture
def generate_file(tmp_path, fake_runner):
    """Renders a file of prompts, each with an id, into tmp_path/out."""

    def run(name, **prompts):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        lines = ({"prompt": prompt, "id": label} for label, prompt in prompts.items())
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return render(path, tmp_path / "out", FLAGS, progress=False, make_runner=fake_runner())

    return run


def test_another_job_file_adds_to_the_manifest(generate_file, tmp_path):
    manifest = tmp_path / "out" / "manifest.jsonl"
    generate_file("a.jsonl", house="a house", cat="a cat", sea="the sea")
    first = manifest.read_text()
    assert generate_file("b/a.jsonl", tree="a tree", cat="a cat")["generated"] == 1
    both = manifest.read_text()
    assert both.startswith(first)
    (added,) = map(json.loads, both.removeprefix(first).splitlines())
    assert (added["id"], added["line"], added["file"]) == ("tree", 1, "../b/a.jsonl")
    # The same command again, and without one of its lines.
    assert generate_file("a.jsonl", house="a house", cat="a cat", sea="the sea")["generated"] == 0
    assert manifest.read_text() == both
    generate_file("a.jsonl", house="a house", cat="a cat")
    assert list(read_manifest(manifest)) == ["house", "cat", "tree"]


def test_an_id_of_another_job_file_is_refused(generate_file, tmp_path):
    generate_file("a.jsonl", house="a house", cat="a cat")
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    told = f"line 2: the id 'cat' is that of another job in this folder, of line 2 of {tmp_path}/a"
    with pytest.raises(RequestError, match=told):
        generate_file("b.jsonl", dog="a dog", cat="a red cat")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # In its own file it is a job that changed.
    assert generate_file("a.jsonl", house="a house", cat="a red cat")["generated"] == 1


def test_a_folder_of_an_earlier_version_goes_on(generate_file, tmp_path):
    """Its manifest does not say which file a job is of."""
    manifest = tmp_path / "out" / "manifest.jsonl"
    generate_file("a.jsonl", house="a house", cat="a cat")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        del line["file"]
    before = "".join(f"{json.dumps(line)}\n" for line in lines)
    manifest.write_text(before)
    generate_file("b.jsonl", tree="a tree")
    assert manifest.read_text().startswith(before)
    assert list(read_manifest(manifest)) == ["house", "cat", "tree"]
    result = generate_file("a.jsonl", cat="a cat", house="a red house")
    assert (result["done"], result["generated"]) == (2, 1)
    entries = read_manifest(manifest).values()
    assert [(entry["id"], entry["line"], entry["file"]) for entry in entries] == [
        ("cat", 1, "../a.jsonl"),
        ("house", 2, "../a.jsonl"),
        ("tree", 1, "../b.jsonl"),
    ]


@pytest.mark.parametrize("joins", [False, True])
def test_what_failed_before_is_tried(fork, tmp_path, fake_runner, joins):
    """Also of another file, and where another process is at work."""
    out, log = tmp_path / "out", tmp_path / "log"
    for name, prompts in {"a": "a house\n", "b": "a cat\na house\n", "c": "the sea\n"}.items():
        (tmp_path / f"{name}.txt").write_text(prompts)

    def run(name, **options):
        path = tmp_path / f"{name}.txt"
        return render(path, out, FLAGS, progress=False, make_runner=fake_runner(**options))

    assert run("a", fail={"a house": MemoryError("too large")})["failed"] == 1
    if joins:
        fork(run, "c", seconds=600, log=log)
        while not log.exists():
            time.sleep(0.02)
    result = run("b")
    assert (result["done"], result["generated"]) == (2, 2)


@pytest.mark.parametrize(
    "content",
    [
        b"a note\n",
        b'{"image": "a.png", "label": 3}\n',
        b'{"id": "a", "status": "done"}\n',
        b"[" * 100_000,
        b"\x89PNG\r\n\x1a\n\0\0\xff",
        b"3\n",
        None,
    ],
)
def test_somebody_elses_manifest_is_not_touched(generate, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    manifest = out / "manifest.jsonl"
    if content is None:
        manifest.mkdir()
    else:
        manifest.write_bytes(content)
    with pytest.raises(RequestError, match=r"^--out: .*manifest\.jsonl") as told:
        generate(A, B)
    assert "\n" not in str(told.value)
    assert list(out.iterdir()) == [manifest]
    assert content is None or manifest.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"\0\0\0\n", b'{"id": "ho', b'{"l', b'{"id": "\xc3'])
def test_what_a_crash_left_of_a_manifest_is_repaired(generate, tmp_path, content):
    generate(A)
    (tmp_path / "out" / "manifest.jsonl").write_bytes(content)
    assert generate(A)["generated"] == 0
    assert statuses(tmp_path) == {"house": "done"}


def test_repeated_lines_are_said_once(tmp_path, fake_runner, caplog):
    (tmp_path / "jobs.txt").write_text("a house\n# a cat\na house\n")
    options = {"progress": False, "make_runner": fake_runner()}
    result = render(tmp_path / "jobs.txt", tmp_path / "out", FLAGS, **options)
    assert result["jobs"] == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'jobs.txt'}: 1 line repeats what another asks for, which is generated once: "
        "3 (as 1)."
    ]


def test_one_signal_finishes_the_image_and_two_stop_now(generate, fake_runner, tmp_path):
    log, handler = tmp_path / "log", signal.getsignal(signal.SIGINT)

    def send(*delays):
        def work():
            while not log.exists():
                time.sleep(0.01)
            for delay in delays:
                time.sleep(delay)
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    thread = send(0)
    result = generate(A, B, runner=fake_runner(seconds=0.4, log=log))
    thread.join()
    assert (result["done"], result["waiting"], result["stopped"]) == (1, 1, True)
    assert sorted(statuses(tmp_path).values()) == ["done", "waiting"]
    log.unlink()
    thread = send(0, 0.6)
    with pytest.raises(KeyboardInterrupt):
        generate(A, B, runner=fake_runner(seconds=30, log=log))
    thread.join()
    assert sorted(statuses(tmp_path).values()) == ["done", "waiting"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_watches_for_whole_lines(generate, tmp_path, caplog):
    path, out = tmp_path / "jobs.jsonl", tmp_path / "out"

    def until(name):
        while not (out / f"{name}.png").exists():
            time.sleep(0.05)

    def write():
        until("house")
        with path.open("a") as file:
            file.write(json.dumps(B) + "\nnonsense\n" + json.dumps(C)[:20])
            file.flush()
            until("cat")
            file.write(json.dumps(C)[20:] + "\n")
        until("tree")
        path.write_text(json.dumps(B) + "\n" + json.dumps(A | {"seed": 3}) + "\n")
        while b'"seed": 3' not in (out / "house.json").read_bytes():
            time.sleep(0.05)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=write)
    thread.start()
    result = generate(A, watch=True)
    thread.join()
    assert (result["done"], result["generated"], result["waiting"]) == (2, 4, 0)
    assert caplog.text.count("line 3: not JSON") == 1
    assert statuses(tmp_path) == {"cat": "done", "house": "done"}


def test_the_command_generates_with_the_demo(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    (tmp_path / "jobs.txt").write_text("a red house\n")
    arguments = [tmp_path / "jobs.txt", "--out", tmp_path / "out", "--seeds", 2, "--json"]
    for name in ("height", "width"):
        arguments += [f"--{name}", 64]
    arguments += ["--steps", 1, "--radius", 4, "--device", "cpu"]
    assert run("render", *arguments) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert (result["jobs"], result["done"], result["generated"]) == (2, 2, 2)
    assert "\n2 of 2 images 100%, " in captured.err
    assert "\r" not in captured.err
    for sidecar in (tmp_path / "out").glob("*.json"):
        assert json.loads(sidecar.read_text())["weights"] == "auto"
    assert len(list((tmp_path / "out").glob("a-red-house-*.png"))) == 2


def test_the_command_tells_by_its_status(monkeypatch, tmp_path, capsys, fake_runner):
    (tmp_path / "jobs.txt").write_text("a house\n\x07\n")
    arguments = (tmp_path / "jobs.txt", "--out", tmp_path / "out", "--steps", 1, "--device", "cpu")
    assert run("render", *arguments) == 2
    assert "line 2: prompt: the prompt has the control character U+0007" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "jobs.txt").write_text("a house\n")
    result = {"done": 0, "failed": 1, "waiting": 0, "jobs": 1, "generated": 0, "seconds": 1.0}
    monkeypatch.setattr("clear_dit.render.run.render", lambda *_, **__: result)
    assert run("render", *arguments) == 1
    result |= {"waiting": 1}
    assert run("render", *arguments) == 130
    assert run("render", *arguments, "--seeds", 0) == 2


def test_processes_of_a_launcher_take_the_gpu_of_their_rank(monkeypatch):
    assert Launch.from_environment() == Launch(0, 1, 0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    launch = Launch.from_environment()
    assert launch == Launch(5, 8, 1)
    assert launch.device(None) is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert launch.device(None) == launch.device("cuda") == "cuda:1"
    assert launch.device("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(RequestError, match="process 1 of this machine has no GPU: there are 1"):
        launch.device(None)
