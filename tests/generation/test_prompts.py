import json

import pytest

from clear_dit.errors import RequestError
from clear_dit.generation.prompts import MAX_WORDS, read_prompts


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a house\n\n  a grün tree \r\n"),
        ("p.TXT", "\ufeffa house\na grün tree"),
        ("p.txt", "\ufeff# a cat\na house\n \t#a dog\r\na grün tree\n#"),
        ("p.jsonl", '{"prompt": "a house", "id": 7}\n\n{"prompt": " a gr\\u00fcn tree"}\n'),
        ("p.csv", "id,prompt\r\n1,a house\r\n2,  a grün tree\r\n"),
        ("p.csv", 'prompt\n"a house"\n\na grün tree\n'),
    ],
)
def test_three_formats(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert read_prompts(path) == ["a house", "a grün tree"]
    assert read_prompts(str(path), limit=1) == ["a house"]


def test_a_prompt_that_begins_with_a_comments_sign(tmp_path):
    path = write(tmp_path, "p.txt", "\\#1 in red\n \\# \na #2\n\\\\#\n\\a\n")
    assert read_prompts(path) == ["#1 in red", "#", "a #2", "\\\\#", "\\a"]
    path = write(tmp_path, "p.jsonl", '{"prompt": "# one"}\n{"prompt": "\\\\#"}\n')
    assert read_prompts(path) == ["# one", "\\#"]


@pytest.mark.parametrize("separator", ["\u2028", "\u3000", ", "])
def test_only_newlines_end_a_prompt(tmp_path, separator):
    prompt = f"a house{separator}a tree"
    assert read_prompts(write(tmp_path, "p.txt", prompt)) == [prompt]
    quoted = write(tmp_path, "p.csv", f'prompt\n"{prompt}"\n')
    assert read_prompts(quoted) == [prompt]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "there is no prompt in it"),
        ("p.txt", " \n\n", "there is no prompt in it"),
        ("p.txt", "# a house\n", "there is no prompt in it"),
        ("p.csv", "", "there is no prompt in it"),
        ("p.csv", "prompt\n", "there is no prompt in it"),
        ("p.txt", "a\nb\x07c\n", "line 2: the prompt has the control character U\\+0007"),
        ("p.txt", "a\x0cb\n", "line 1: the prompt has the control character U\\+000C"),
        ("p.txt", "a\x00b\n", "line 1: the prompt has the control character U\\+0000"),
        ("p.csv", 'prompt\n"a\nb\x07"\n', "line 2: the prompt has the control character U\\+0007"),
        ("p.jsonl", '{"prompt": "a\\ud800"}', "line 1: .* control character U\\+D800"),
        ("p.txt", "a\n" + "word " * 10_000, "may have 20000 characters, got 49999"),
        ("p.txt", "a\n" + "a " * (MAX_WORDS + 1), "line 2: a prompt may have 2000 words, got 2001"),
        ("p.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("p.jsonl", '{"text": "a"}', 'line 1: must be an object with the key "prompt"'),
        ("p.jsonl", '"a"', "line 1: must be an object"),
        ("p.jsonl", '{"prompt": 3}', "line 1: a prompt must be text, got int"),
        ("p.jsonl", '{"prompt": " "}', "line 1: the prompt is empty"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt', "line 2: not JSON"),
        ("p.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("p.csv", "text,id\na,1\n", 'no column "prompt"; the columns are: text, id'),
        ("p.csv", "id,prompt\n1,a\n2\n", "line 3: the prompt is empty"),
        ("p.csv", 'prompt\n"a', "line 2: unexpected end of data"),
        ("p.png", "a", "are read from .txt, .jsonl, .csv files"),
    ],
)
def test_refused_by_line(tmp_path, name, content, message):
    with pytest.raises(RequestError, match=message) as caught:
        read_prompts(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_limit_leaves_the_rest_alone(tmp_path):
    lines = [json.dumps({"prompt": f"image {i}"}) for i in range(5)]
    path = write(tmp_path, "p.jsonl", "\n".join([*lines, "broken"]))
    assert read_prompts(path, limit=5)[-1] == "image 4"


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(RequestError, match="this is none"):
        read_prompts(tmp_path / "folder.txt")
    with pytest.raises(RequestError, match="there is no such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(RequestError, match=r"no such file|cannot be read"):
        read_prompts(tmp_path / ("x" * 300 + ".txt"))
