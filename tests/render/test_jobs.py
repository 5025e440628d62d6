"""Job files: what is taken, what is refused and by which name."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from support.slow import slow

from clear_dit.errors import RequestError
from clear_dit.pipelines.cascade import upscaler
from clear_dit.render.identity import model_digest
from clear_dit.render.jobs import JobReader, read_jobs, repetition
from clear_dit.render.run import render
from clear_dit.weights.known import known_weights

FLAGS = {"height": 64, "width": 64, "steps": 2, "radius": 2, "device": "cpu"}


def jsonl(path, *lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def refusal(path, **flags):
    with pytest.raises(RequestError) as told:
        read_jobs(path, FLAGS | flags)
    return str(told.value)


def test_a_line_says_what_differs_from_the_flags(tmp_path):
    line = {
        "prompt": "a red house",
        "id": "house",
        "height": 96,
        "seed": 7,
        "guidance": 1,
        "radius": 4,
        "far": False,
        "weights": "none",
        "attention": "clear",
        "strength": [0.5, 0.25],
        "steps": None,
    }
    (job,) = read_jobs(jsonl(tmp_path / "jobs.jsonl", line), FLAGS)
    request = job.request
    assert (job.name, job.image, job.sidecar, job.line) == ("house", "house.png", "house.json", 1)
    assert (request.height, request.width, request.steps, request.seed) == (96, 64, 2, 7)
    assert (request.guidance, request.radius, request.weights) == (1.0, 4, None)
    assert request.far is False
    assert request.strength == (0.5, 0.25)


def test_three_formats_are_the_same_jobs(tmp_path):
    lines = "\ufeffa red house\r\n  # by the sea\r\n  a blue house \r\n#\r\n"
    (tmp_path / "a.txt").write_bytes(lines.encode())
    table = "\ufeffprompt,radius\r\na red house,2\r\na blue house,\r\n"
    (tmp_path / "a.csv").write_bytes(table.encode())
    jsonl(tmp_path / "a.jsonl", {"prompt": "a red house"}, {"prompt": "a blue house", "radius": 2})
    read = [read_jobs(tmp_path / f"a.{kind}", FLAGS) for kind in ("txt", "csv", "jsonl")]
    assert len({tuple((job.name, job.identity) for job in jobs) for jobs in read}) == 1
    assert [job.line for job in read[0]] == [1, 3]
    assert [job.line for job in read[1]] == [2, 3]


def test_seeds_are_images_of_their_own(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "a house", "seeds": 3, "seed": 5, "id": "h"},
        {"prompt": "a cat", "seeds": 1},
        {"prompt": "a dog"},
    )
    jobs = read_jobs(path, FLAGS | {"seeds": 2})
    assert [job.name for job in jobs[:3]] == ["h-5", "h-6", "h-7"]
    assert [job.request.seed for job in jobs] == [5, 6, 7, 0, 0, 1]


def test_identity_is_the_content_and_not_the_place(tmp_path):
    lines = [{"prompt": "a house", "id": "a"}, {"prompt": "a cat", "radius": 3}]
    first = read_jobs(jsonl(tmp_path / "a.jsonl", *lines), FLAGS)
    second = read_jobs(jsonl(tmp_path / "b.jsonl", *lines[::-1]), FLAGS)
    assert {(j.name, j.identity) for j in first} == {(j.name, j.identity) for j in second}
    changed = {"steps": 3, "guidance": 3.0, "seed": 1, "radius": 4, "height": 80}
    for name, value in changed.items():
        other = read_jobs(tmp_path / "a.jsonl", FLAGS | {name: value})
        assert other[0].identity != first[0].identity, name


def test_far_is_settled_before_a_job_is_told_from_another(tmp_path, demo_weights):
    jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "a house"},
        {"prompt": "a house", "far": True, "id": "far"},
        {"prompt": "a house", "far": False, "id": "local"},
        {"prompt": "a house", "radius": 8, "id": "tuned"},
        {"prompt": "a house", "radius": 4, "id": "tuned-far"},
        {"prompt": "a house", "radius": 4, "weights": str(demo_weights), "id": "named"},
        {"prompt": "a house", "attention": "full", "id": "full"},
    )
    jobs = read_jobs(tmp_path / "a.jsonl", FLAGS)
    assert [job.request.far for job in jobs] == [True, True, False, False, True, False, False]
    silent, far, local, *_ = jobs
    assert silent.identity == far.identity != local.identity
    (tmp_path / "a.csv").write_text("prompt,far\na house,true\na house,FALSE\na house,\n")
    read = JobReader(FLAGS, tmp_path).read(tmp_path / "a.csv")
    assert ([job.identity for job in read.jobs], read.errors) == (
        [far.identity, local.identity],
        [],
    )


def test_images_of_earlier_versions_are_known_again(tmp_path):
    (tmp_path / "a.txt").write_text("a house\n")
    (job,) = read_jobs(tmp_path / "a.txt", FLAGS | {"far": False})
    content = dataclasses.asdict(job.request)
    later = ["far", "preset", "stage_steps", "schedule", "upscaler", "quantize", "offload"]
    later += ["negative_prompt", "lora", "lora_scale"]
    for name in ("device", "stages_dir", *later):
        del content[name]
    content |= {"model": model_digest("demo"), "weights": "", "image": ""}
    before = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert job.identity == before[:32]


def test_identity_knows_the_negative_prompt(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "a house"},
        {"prompt": "a house", "negative_prompt": "", "id": "own"},
        {"prompt": "a house", "negative_prompt": None, "id": "none"},
        {"prompt": "a house", "negative_prompt": "a moon", "id": "moon"},
        {"prompt": "a house", "negative_prompt": " a moon ", "id": "same"},
    )
    plain, own, none, moon, same = (job.identity for job in read_jobs(path, FLAGS))
    assert plain == own == none != moon == same
    (tmp_path / "a.csv").write_text("prompt,negative prompt\na house,\na house,a moon\n")
    found = JobReader(FLAGS, tmp_path).read(tmp_path / "a.csv").jobs
    assert [job.identity for job in found] == [plain, moon]
    flags = FLAGS | {"negative_prompt": "a moon"}  # a line's empty one stands for the model's own
    assert [job.identity for job in read_jobs(path, flags)] == [moon, plain, moon, moon, moon]


def test_identity_knows_the_contents_of_upscalers(tmp_path, monkeypatch):
    monkeypatch.setattr(upscaler, "find_spec", lambda name: name)  # as if spandrel were there
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "a house"},
        {"prompt": "a house", "upscaler": "u.safetensors"},
    )
    identities = []
    for content in (b"one", b"two"):
        (tmp_path / "u.safetensors").write_bytes(content)
        jobs = read_jobs(path, FLAGS)
        assert jobs[1].request.upscaler == str(tmp_path / "u.safetensors")
        identities += [job.identity for job in jobs]
    assert len(set(identities)) == 3
    (tmp_path / "u.safetensors").unlink()
    assert "line 2: --upscaler: there is no file u.safetensors" in refusal(path)


def test_identity_knows_the_contents_of_loras(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "a house"},
        {"prompt": "a house", "lora": "l.safetensors"},
        {"prompt": "a house", "lora": "l.safetensors", "lora_scale": 1, "id": "same"},
        {"prompt": "a house", "lora": "l.safetensors", "lora_scale": 0.5},
    )
    identities = []
    for value in (1.0, 2.0):
        save_file({"transformer.x": torch.full((2,), value)}, tmp_path / "l.safetensors")
        plain, whole, same, half = read_jobs(path, FLAGS)
        assert whole.request.lora == str(tmp_path / "l.safetensors")
        assert whole.identity == same.identity
        identities += [plain.identity, whole.identity, half.identity]
    assert len(set(identities)) == 5
    save_file({"transformer.x": torch.ones(2)}, tmp_path / "other.safetensors")
    moved = jsonl(tmp_path / "b.jsonl", {"prompt": "a house", "lora": "other.safetensors"})
    assert read_jobs(moved, FLAGS)[0].identity == identities[1]
    (tmp_path / "l.safetensors").unlink()
    assert "line 2: --lora: there is no file l.safetensors" in refusal(path)


def test_identity_knows_the_contents_of_images_and_weights(tmp_path, demo_weights):
    (tmp_path / "w.safetensors").write_bytes(demo_weights.read_bytes())
    line = {"prompt": "a house", "image": "in.png", "weights": "w.safetensors", "radius": 4}
    path = jsonl(tmp_path / "a.jsonl", line | {"height": 128, "width": 128})
    identities = set()
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "in.png")
        (job,) = read_jobs(path, FLAGS)
        identities.add(job.identity)
    (tmp_path / "w.safetensors").write_bytes(demo_weights.read_bytes()[:-1] + b"x")
    identities.add(read_jobs(path, FLAGS)[0].identity)
    assert len(identities) == 3
    assert job.request.image == str(tmp_path / "in.png")


@pytest.fixture
def demo_weights():
    return Path(known_weights("demo", 4, 1, far=False))


def test_the_same_line_twice_is_one_job(tmp_path):
    (tmp_path / "a.txt").write_text("a house\na cat\na house\n")
    read = JobReader(FLAGS, tmp_path).read(tmp_path / "a.txt")
    assert ([job.line for job in read.jobs], read.repeated) == ([1, 2], {3: 1})


def test_a_line_repeats_some_of_anothers_seeds(tmp_path):
    jsonl(tmp_path / "a.jsonl", *({"prompt": "a", "seed": seed, "seeds": 3} for seed in (4, 6, 6)))
    read = JobReader(FLAGS, tmp_path).read(tmp_path / "a.jsonl")
    assert ([job.request.seed for job in read.jobs], read.repeated) == (
        [*range(4, 9)],
        {2: 1, 3: 1},
    )


def test_what_is_said_of_repeated_lines_is_bounded(tmp_path):
    path = tmp_path / "a.txt"
    assert repetition(path, {3: 1}) == (
        f"{path}: 1 line repeats what another asks for, which is generated once: 3 (as 1)."
    )
    told = repetition(path, dict.fromkeys(range(2, 50), 1))
    assert f"{path}: 48 lines repeat what another asks for" in told
    assert told.endswith("20 (as 1), 21 (as 1), and 28 more.")
    assert "22 (" not in told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nope", "line 1: not JSON (Expecting value"),
        ("[1]", "line 1: must be an object"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"prompt": 3}', "prompt: a prompt must be text, got int"),
        ('{"prompt": " "}', "the prompt is empty"),
        ('{"prompt": "a\\u0000"}', "control character U+0000"),
        ('{"prompt": "\\ud800"}', "control character U+D800"),
        ('{"radius": 3}', "the key 'prompt' is missing"),
        ('{"prompt": "a", "promt": 1}', "there is no key 'promt'"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
        ('{"prompt": "a", "far": "yes"}', "far must be true or false, got 'yes'"),
        ('{"prompt": "a", "far": 1}', "far must be true or false, got '1'"),
        ('{"prompt": "a", "far": true, "down_factor": 2}', "--far and --down-factor 2 exclude"),
        ('{"prompt": "a", "radius": true}', "radius must be an integer, got 'True'"),
        ('{"prompt": "a", "steps": "4"}', "steps must be an integer, got '4'"),
        ('{"prompt": "a", "steps": 4.5}', "steps must be an integer"),
        ('{"prompt": "a", "steps": 0}', "--steps must be from 1 to 1000, got 0"),
        ('{"prompt": "a", "seed": -1}', "--seed must be from 0"),
        (f'{{"prompt": "a", "seed": {10**30}}}', "seed must be below 2^63"),
        ('{"prompt": "a", "seed": %s}' % ("9" * 5000), "line 1: not JSON"),
        (f'{{"prompt": "a", "seed": {2**63 - 1}, "seeds": 2}}', "--seed must be"),
        ('{"prompt": "a", "seeds": 0}', "seeds must be from 1 to 10000, got 0"),
        ('{"prompt": "a", "guidance": NaN}', "guidance must be a number, got 'nan'"),
        ('{"prompt": "a", "guidance": 1e999}', "guidance must be a number, got 'inf'"),
        (f'{{"prompt": "a", "guidance": {10**400}}}', "guidance is too large"),
        ('{"prompt": "a", "negative_prompt": 3}', "negative_prompt: a prompt must be text, got"),
        ('{"prompt": "a", "negative_prompt": "b", "guidance": 1}', "--guidance 1 has none"),
        ('{"prompt": "a", "strength": {}}', "strength must be a number or a list"),
        ('{"prompt": "a", "height": 20}', "--height must be a multiple of 16"),
        ('{"prompt": "a", "width": 32768}', "--width must be a multiple of 16 from 16 to 16384"),
        ('{"prompt": "a", "attention": "some"}', "--attention must be clear or full"),
        ('{"prompt": "a", "image": "nowhere.png"}', "nowhere.png cannot be read"),
        ('{"prompt": "a", "image": "\\u0000"}', "image has control characters"),
        ('{"prompt": "a", "weights": "./no.safetensors"}', "there is no file or folder"),
        ('{"prompt": "a", "id": ""}', "id must be text"),
        ('{"prompt": "a", "id": true}', "id must be text"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, told):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    text = refusal(tmp_path / "a.jsonl")
    assert f"{tmp_path / 'a.jsonl'}: 1 line cannot be generated:" in text
    assert told in text


@pytest.mark.parametrize(
    "name",
    [
        *("../a", "a/b", "/etc/passwd", "..", ".hidden", "a\\b", "C:a", "con", "NUL.x", "a.", "é"),
        *("a" * 101, "a b", "a\n", "-a", "\u202ea"),
    ],
)
def test_ids_cannot_leave_the_folder(tmp_path, name):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "id": name})
    assert "an id names the image's file" in refusal(path) or "control characters" in refusal(path)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            [{"id": "a", "prompt": "x"}, {"id": "A", "prompt": "y"}],
            "line 2: the id 'A' is that of",
        ),
        ([{"id": "a", "prompt": "x"}] * 2, "line 2: the id 'a' is that of line 1 too"),
        (
            [{"id": "a-1", "prompt": "x"}, {"id": "a", "prompt": "x", "seeds": 2}],
            "the id 'a-1'",
        ),
    ],
)
def test_two_lines_with_one_id_are_refused(tmp_path, lines, told):
    assert told in refusal(jsonl(tmp_path / "a.jsonl", *lines))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("size\n3\n", "line 1: there is no column 'size'"),
        ("radius\n3\n", "line 1: the column 'prompt' is missing"),
        ("prompt,prompt\na,b\n", "line 1: the column 'prompt' is there twice"),
        ("prompt,steps\na,x\n", "line 2: steps must be an integer, got 'x'"),
        ("prompt,steps\na,1_0\n", "line 2: steps must be an integer, got '1_0'"),
        ("prompt,guidance\na,\nb,x\n", "line 3: guidance must be a number, got 'x'"),
        ("prompt,steps\na\n", "line 2: has 1 cells, and the first line names 2 columns"),
        ('prompt,steps\n"a\nb",0\n', "line 2: --steps must be from 1 to 1000, got 0"),
        ('prompt\n"a" b\n', "line 2: ',' expected after '\"'; the lines after it are not read"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, told):
    (tmp_path / "a.csv").write_text(text)
    assert told in refusal(tmp_path / "a.csv")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
@pytest.mark.parametrize("text", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_jobs_is_refused(tmp_path, kind, text):
    (tmp_path / f"a.{kind}").write_bytes(text)
    assert "there is no job in it" in refusal(tmp_path / f"a.{kind}") or kind == "csv"


def test_many_errors_are_counted(tmp_path):
    jsonl(tmp_path / "a.jsonl", *({"prompt": "a", "steps": 0} for _ in range(50)))
    text = refusal(tmp_path / "a.jsonl")
    assert "50 lines cannot be generated" in text
    assert text.count("\n") == 21
    assert text.endswith("and 30 more")


@slow
def test_ten_thousand_lines_are_read_and_bounded(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": "a house", "seed": n} for n in range(10_000)))
    start = time.process_time()
    jobs = read_jobs(path, FLAGS)
    assert time.process_time() - start < 20
    assert len({job.name for job in jobs}) == 10_000
    monkeypatch.setattr("clear_dit.render.jobs.MAX_JOBS", 9_999)
    assert "at most 9,999 images" in refusal(path)


def test_flags_are_refused_before_the_file_is_read(tmp_path):
    with pytest.raises(RequestError, match=r"^--steps must be from 1 to 1000, got 0"):
        read_jobs(tmp_path / "not there.txt", FLAGS | {"steps": 0})


GOOD = [
    b'{"prompt": "a red house", "id": "one", "seeds": 2}\n{"prompt": "a cat", "radius": 4}\n',
    b'\xef\xbb\xbfprompt,id,steps,strength\r\n"a, house",h1,2,"0.5,0.25"\r\na cat,,,\r\n',
    b"a red house\n# by the sea\n\\# a cat\n",
]
PARTS = [b"../x", b"\x00", b'"', b"\n", b"\xff", b"1e999", b"-1", b"{", b"[", b",", b"NaN", b"null"]
PARTS += [b'"id": "/tmp/x",', b'"id": "..",', b"\xe2\x80\xa8", b"\\ud800", b"9" * 30, b"\r", b"con"]
EDITS = st.lists(
    st.tuples(
        st.integers(0, 200), st.integers(0, 12), st.sampled_from(PARTS) | st.binary(max_size=4)
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A folder, in which only those of images may change, and readers made once."""
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, JobReader(FLAGS | {"weights": "none"}, folder)


@slow
@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(kind=st.sampled_from([0, 1, 2]), edits=EDITS)
def test_mutated_files_are_refused_or_generated_inside_the_folder(
    fuzzed, fake_runner, monkeypatch, kind, edits
):
    folder, reader = fuzzed
    monkeypatch.setattr("clear_dit.render.run.JobReader", lambda *_: reader)
    monkeypatch.setattr("clear_dit.weights.load.huggingface_hub.hf_hub_download", _no_network)
    monkeypatch.setattr("clear_dit.files.os.fsync", lambda _: None)  # a thousand times
    data = bytearray(GOOD[kind])
    for at, length, part in edits:
        data[at : at + length] = part
    path = folder / ("a.jsonl", "a.csv", "a.txt")[kind]
    path.write_bytes(data)
    try:
        jobs, errors, _ = reader.read(path)
    except RequestError:
        jobs, errors = [], ["the file"]
    if not errors and jobs and sum(job.request.height * job.request.width for job in jobs) < 10**6:
        out = folder / f"out-{path.name}"  # another file could have an id of this one
        result = render(path, out, {}, progress=False, make_runner=fake_runner())
        assert result["done"] == result["jobs"] == len(jobs)
        assert all((out / job.image).is_file() for job in jobs)
    files = {"a.jsonl", "a.csv", "a.txt"}
    assert {entry.name for entry in folder.iterdir()} <= files | {f"out-{file}" for file in files}
    assert all(entry.is_file() for entry in folder.glob("out-*/*"))


def _no_network(*args, **kwargs):
    raise OSError("no network")
