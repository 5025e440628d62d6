"""Job files as spreadsheets and pandas write them: the same jobs, or refused by name."""

import codecs
import zipfile

import pytest

from clear_dit import options
from clear_dit.errors import RequestError
from clear_dit.generation.prompts import read_prompts
from clear_dit.render.jobs import JobReader
from clear_dit.render.lines import read_lines

FLAGS = {"height": 64, "width": 64, "steps": 2, "radius": 2, "weights": "none", "device": "cpu"}
# (line, fields) of PLAIN, and how others write it.
EXPECTED = [(2, {"prompt": "a red house", "steps": 4}), (3, {"prompt": "a, b; c"})]
PLAIN = 'prompt,steps\na red house,4\n"a, b; c",\n'
SEMICOLONS = 'prompt;steps\na red house;4\n"a, b; c";\n'
WAYS = {
    "commas": PLAIN,
    "semicolons": SEMICOLONS,
    "tabs": "prompt\tsteps\r\na red house\t4\r\na, b; c\t\r\n",
    "bars": "prompt|steps\na red house|4\na, b; c|\n",
    "old Mac": PLAIN.replace("\n", "\r"),
    "capitals": PLAIN.replace("prompt,steps", "Prompt,STEPS"),
    "spaces": PLAIN.replace("prompt,steps", " Prompt , steps "),
    "spaces after": 'prompt, steps\n"a red house", 4\n"a, b; c", \n',
    "quoted names": PLAIN.replace("prompt,steps", '"Prompt","Steps"'),
    "empty columns": 'prompt,steps,,\na red house,4,,\n"a, b; c",,,\n,,,\n,,,\n',
    "empty cells beyond": 'prompt;steps\na red house;4;;\n"a, b; c";;;\n;;;\n\n',
    "an empty column between": 'prompt,,steps\na red house,,4\n"a, b; c",,\n',
    "whole numbers of pandas": PLAIN.replace(",4", ",4.0"),
    "nothing of pandas": PLAIN.replace('c",', 'c",nan'),
    "nothing of a spreadsheet": PLAIN.replace('c",', 'c",#N/A'),
    "the index of pandas": ',prompt,steps\n0,a red house,4.0\n1,"a, b; c",\n2,,\n',
    "that index, read again": 'Unnamed: 0,prompt,steps\n0,a red house,4\n1,"a, b; c",NaN\n',
    "two such": 'Unnamed: 0.1,Unnamed: 0,prompt,steps\n0,0,a red house,4\n1,1,"a, b; c",\n',
    "columns pandas named": 'prompt,steps,Unnamed: 2\na red house,4,\n"a, b; c",,nan\n',
}
ENCODINGS = {
    "a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "UTF-16": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "UTF-16, the other": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "the other without a mark": lambda text: text.encode("utf-16-be"),
}


def read(folder, text, name="a.csv", **options):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [
        (n, str(e) if isinstance(e, RequestError) else e) for n, e in read_lines(path, **options)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_writing_one_table(tmp_path, way):
    assert read(tmp_path, WAYS[way]) == EXPECTED
    assert read_prompts(tmp_path / "a.csv") == ["a red house", "a, b; c"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("way", ["tabs", "semicolons"])
def test_encodings(tmp_path, encoding, way):
    text = WAYS[way].replace("house", "Häuschen 海")
    assert read(tmp_path, ENCODINGS[encoding](text))[0][1]["prompt"] == "a red Häuschen 海"
    assert read_prompts(tmp_path / "a.csv")[0] == "a red Häuschen 海"
    (tmp_path / "a.txt").write_bytes(ENCODINGS[encoding]("a tree\na Häuschen 海\n"))
    assert read_prompts(tmp_path / "a.txt") == ["a tree", "a Häuschen 海"]


@pytest.mark.parametrize(
    ("first", "table"),
    [
        ("sep=,\n", PLAIN),
        ("sep=;\r\n", SEMICOLONS),
        ('"sep=;"\n', SEMICOLONS),
        ("SEP=,,,\n", PLAIN),
        ("sep=\t\n", WAYS["tabs"]),
        (
            "sep=:\n",
            PLAIN.replace("s,", "s:").replace("e,4", "e:4").replace("t,", "t:").replace('",', '":'),
        ),
    ],
)
def test_a_line_that_names_the_delimiter(tmp_path, first, table):
    assert read(tmp_path, first + table) == [(line + 1, fields) for line, fields in EXPECTED]
    assert read_prompts(tmp_path / "a.csv") == ["a red house", "a, b; c"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_breaks_in_prompts_are_blanks_and_lines_those_of_the_file(tmp_path, end):
    text = f'Prompt;steps{end}"a red{end}  house,{end}{end}by ""night""";4{end}{end}a tree;x{end}'
    told = "steps must be an integer, got 'x'."
    assert read(tmp_path, text) == [
        (2, {"prompt": 'a red house, by "night"', "steps": 4}),
        (7, told),
    ]
    assert read_prompts(tmp_path / "a.csv") == ['a red house, by "night"', "a tree"]
    assert JobReader(FLAGS, tmp_path).read(tmp_path / "a.csv").errors == [f"line 7: {told}"]


def test_prompts_of_one_column_are_never_cut(tmp_path):
    text = 'Prompt\na house, red; old\tand | small\n"a tree, tall"\n'
    prompts = ["a house, red; old\tand | small".replace("\t", " "), "a tree, tall"]
    assert [entry["prompt"] for _, entry in read(tmp_path, text.replace("\t", " "))] == prompts
    assert read_prompts(tmp_path / "a.csv") == prompts


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prompt,steps\na house, red,4\n", "has 3 cells, and the first line names 2 columns"),
        ("prompt;steps\na house; red;4\n", "has 3 cells, and the first line names 2 columns"),
        ("prompt,\na house, red\n", "has 'red' in column 2, which has no name"),
        (",prompt\nred,a house\n", "has 'red' in column 1, which has no name"),
        ("prompt,Unnamed: 1\na house,3\n", "has '3' in column 2, which has no name"),
    ],
)
def test_a_cell_that_a_delimiter_cut_is_refused_everywhere(tmp_path, text, told):
    ((line, error),) = read(tmp_path, text)
    assert (line, told in error) == (2, True)
    with pytest.raises(RequestError, match="line 2: has "):
        read_prompts(tmp_path / "a.csv")


@pytest.mark.parametrize("value", ["0,1", "1,0", "0,5", "0, 5", "0,25,0,5", ",5", "0,"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_decimal_comma_is_never_two_numbers(tmp_path, value, delimiter):
    text = f'prompt{delimiter}strength\na house{delimiter}"{value}"\n'
    ((_, error),) = read(tmp_path, text)
    assert f"strength '{value}' may be one number with a decimal comma" in error
    if delimiter != ",":
        assert read(tmp_path, text.replace('"', "")) == [(2, error)]
    with pytest.raises(
        RequestError, match=r"^--strength .* may be one number with a decimal comma"
    ):
        options.fractions("--strength", value)


def test_several_strengths_and_other_numbers(tmp_path):
    text = 'prompt;strength;guidance\na;0.5,0.25;3.5\nb;"0.0,1.0";3\nc;1;3,5\nd;0.5;\n'
    entries = [entry for _, entry in read(tmp_path, text)]
    assert [entry["strength"] for entry in entries[:2]] == [(0.5, 0.25), (0.0, 1.0)]
    assert entries[2] == "guidance must be a number, got '3,5'; write 3.5."
    assert entries[3] == {"prompt": "d", "strength": (0.5,)}


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        ("42.0", 42),
        ("42.", 42),
        ("9007199254740992.0", 2**53),
        ("9007199254740993", 2**53 + 1),
        ("12345678901234567168.0", "seed has been rounded to 12345678901234567168.0"),
        ("42.5", "seed must be an integer, got '42.5'"),
        ("42,0", "seed must be an integer, got '42,0'"),
        ("1.23457E+11", "seed must be an integer, got '1.23457E+11'"),
        ("1e3", "seed must be an integer, got '1e3'"),
    ],
)
def test_whole_numbers_are_those_that_were_meant(tmp_path, seed, expected):
    ((_, entry),) = read(tmp_path, f'prompt,seed\na,"{seed}"\n')
    if isinstance(expected, int):
        assert entry["seed"] == expected
    else:
        assert entry.startswith(expected)


def test_names_of_columns(tmp_path):
    assert read(tmp_path, "PROMPT;Low Resolution Guidance;Down-Factor\na;1;2\n") == [
        (2, {"prompt": "a", "low_resolution_guidance": 1.0, "down_factor": 2})
    ]
    ((line, error),) = read(tmp_path, "sep=;\nPrompt;Note\na;b\n")
    assert (line, "there is no column 'Note'" in error) == (2, True)
    ((_, error),) = read(tmp_path, "Prompt;prompt\na;b\n")
    assert "the column 'prompt' is there twice" in error
    with pytest.raises(RequestError, match='line 1: there is more than one column "prompt"'):
        read_prompts(tmp_path / "a.csv")
    ((_, error),) = read(tmp_path, "prompt,steps\nnan,4\n")
    assert error == "prompt: the prompt is empty; describe an image."


@pytest.mark.parametrize("name", ["a.csv", "a.xlsx", "a.txt", "a.xls", "a.ods"])
def test_workbooks_are_refused_with_what_to_do(tmp_path, name):
    with zipfile.ZipFile(tmp_path / name, "w") as file:
        file.writestr("xl/workbook.xml", "<workbook/>")
    with pytest.raises(RequestError, match=r"workbook, not text; save the sheet as CSV"):
        list(read_lines(tmp_path / name))
    (tmp_path / name).write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(64))
    with pytest.raises(RequestError, match=r"workbook, not text; save the sheet as CSV"):
        read_prompts(tmp_path / name)


def test_a_prompt_that_is_still_written_is_waited_for(tmp_path):
    text = 'prompt;steps\na house;4\n"a tree\nby the'
    assert read(tmp_path, text + "\n", growing=True) == [(2, {"prompt": "a house", "steps": 4})]
    assert "unexpected end of data" in read(tmp_path, text)[1][1]
    assert read(tmp_path, text + ' sea";\n', growing=True)[1] == (
        3,
        {"prompt": "a tree by the sea"},
    )
