"""A release: addresses, citation, the security policy and the workflows. Nothing is published."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

from clear_dit import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = ROOT / ".github" / "workflows"
REPOSITORY = "https://git.example/someone/clear-dit"


def load_addresses():
    spec = importlib.util.spec_from_file_location("addresses", ROOT / ".ci" / "addresses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    for name in ("README.md", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


def test_links_become_addresses(checkout):
    load_addresses().main(checkout, REPOSITORY, f"v{__version__}")
    readme = (checkout / "README.md").read_text()
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    assert len(targets) > 10
    assert all(target.startswith("https://") for target in targets)
    assert f"({REPOSITORY}/raw/v{__version__}/assets/images/demo.png)" in readme
    # The rest is as it was: commands and code too.
    plain = re.sub(rf"{REPOSITORY}/(raw|blob)/v{__version__}/", "", readme)
    assert plain == (ROOT / "README.md").read_text()


def test_a_release_has_its_addresses(checkout):
    load_addresses().main(checkout, REPOSITORY, f"v{__version__}")
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    assert project.pop("urls").keys() >= {"Documentation", "Source", "Changelog", "Issues"}
    assert project == PROJECT


def test_another_tag_than_the_version_is_refused(checkout):
    with pytest.raises(SystemExit, match=rf"v{re.escape(__version__)}, got v9\.9"):
        load_addresses().main(checkout, REPOSITORY, "v9.9")
    assert (checkout / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_a_second_time_is_refused(checkout):
    load_addresses().main(checkout, REPOSITORY, f"v{__version__}")
    with pytest.raises(SystemExit, match=r"project.urls already"):
        load_addresses().main(checkout, REPOSITORY, f"v{__version__}")


def test_links_of_readme_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / "README.md").read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_version_is_one_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == __version__ == citation["version"]
    assert " AND ".join(citation["license"]) == PROJECT["license"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_security_policy_says_where_to_report():
    policy = (ROOT / "SECURITY.md").read_text()
    for part in ("Report a vulnerability", "## Versions", "## What counts", "## What does not"):
        assert part in policy


def test_a_release_is_tried_on_every_python_before_it_is_published():
    jobs = yaml.safe_load((WORKFLOWS / "release.yml").read_text())["jobs"]
    classifiers = "\n".join(PROJECT["classifiers"])
    assert jobs["smoke"]["strategy"]["matrix"]["python"] == re.findall(r":: (3\.\d+)", classifiers)
    assert set(jobs["publish"]["needs"]) == jobs.keys() - {"publish"}
    # A token of the workflow's own, of this job alone; no password.
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["environment"] == "pypi"
    writes = [name for name, job in jobs.items() if "write" in job["permissions"].values()]
    assert writes == ["publish"]
    assert "secrets." not in (WORKFLOWS / "release.yml").read_text()


def test_actions_are_pinned_by_commit():
    for path in WORKFLOWS.glob("*.yml"):
        for action in re.findall(r"uses: ([\w-]+/\S+)", path.read_text()):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), f"{path.name}: {action}"


def schema_of(path: Path) -> str:
    return "citation-file-format" if path.suffix == ".cff" else "github-workflows"


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [ROOT / "CITATION.cff", *sorted(WORKFLOWS.glob("*.yml"))], ids=lambda path: path.name
)
def test_files_follow_their_schemas(path, tmp_path):
    command = [str(Path(sysconfig.get_path("scripts")) / "check-jsonschema")]
    command += ["--builtin-schema", f"vendor.{schema_of(path)}"]
    subprocess.run([*command, path], check=True)
    # And a file that does not is seen.
    broken = tmp_path / path.name
    broken.write_text(re.sub(r"^(title|jobs):", r"un\1:", path.read_text(), flags=re.MULTILINE))
    assert subprocess.run([*command, broken]).returncode == 1


@pytest.mark.slow
def test_workflows_give_nothing_away():
    zizmor = Path(sysconfig.get_path("scripts")) / "zizmor"
    command = [zizmor, "--offline", "--persona=pedantic", WORKFLOWS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
