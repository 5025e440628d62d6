"""The manifests: valid for Kubernetes, in agreement with each other, and what they start runs."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.packages import need
from support.processes import free_port
from support.program_options import arguments_of, parse
from support.ray_cluster import ROOT, environment
from support.rendering import assert_complete
from support.slow import slow

need("kubernetes-validate")

import kubernetes_validate  # noqa: E402

pytestmark = slow

FOLDER = ROOT / "examples" / "kubernetes"
VERSION = "1.37.0"
DOCUMENTS = {
    f"{path.name} {number}": document
    for path in sorted(FOLDER.glob("*.yaml"))
    for number, document in enumerate(yaml.safe_load_all(path.read_text()))
}
JOBS = {name: each for name, each in DOCUMENTS.items() if each["kind"] == "Job"}


def job(file):
    (found,) = (each for name, each in JOBS.items() if name.startswith(f"{file} "))
    return copy.deepcopy(found)


def container_of(found):
    (only,) = found["spec"]["template"]["spec"]["containers"]
    return only


def validate(document):
    kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_manifests_are_valid(name):
    validate(DOCUMENTS[name])


def test_wrong_manifests_would_be_refused():
    def misspelt(spec):
        spec["completionMod"] = spec.pop("completionMode")

    def of_another_type(spec):
        spec["completions"] = "four"

    def without_what_is_required(spec):
        del spec["template"]["spec"]["containers"][0]["name"]

    def misspelt_deep_inside(spec):
        security = spec["template"]["spec"]["containers"][0]["securityContext"]
        security["readOnlyRootFileSystem"] = True

    for change in (misspelt, of_another_type, without_what_is_required, misspelt_deep_inside):
        wrong = job("render.yaml")
        validate(wrong)
        change(wrong["spec"])
        with pytest.raises(kubernetes_validate.ValidationError):
            validate(wrong)


@pytest.mark.parametrize("name", JOBS)
def test_commands_are_the_programs(name):
    found = container_of(JOBS[name])
    # The image's entry point is clear-dit.
    words = [*found.get("command", ["clear-dit"]), *found["args"]]
    command, parameters = parse(arguments_of(words))
    assert command == ("render" if "render" in name else "generate")
    assert Path(parameters["out"]).is_relative_to("/data")
    assert (parameters.get("parallel") == "patch") == ("patch" in name)


@pytest.mark.parametrize("name", JOBS)
def test_pods_are_confined(name):
    pod = JOBS[name]["spec"]["template"]["spec"]
    found = container_of(JOBS[name])
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert found["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    resources = found["resources"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    # Everything that is written to is mounted, and every secret comes from a Secret.
    mounted = {each["mountPath"]: each["name"] for each in found["volumeMounts"]}
    assert mounted == {"/data": "work", "/models": "models", "/tmp": "tmp", "/dev/shm": "shm"}
    assert sorted(mounted.values()) == sorted(each["name"] for each in pod["volumes"])
    variables = {each["name"]: each for each in found["env"]}
    assert (variables["HOME"]["value"], variables["HF_HOME"]["value"]) == ("/tmp", "/models")
    assert variables["HF_TOKEN"].keys() == {"name", "valueFrom"}


def test_what_one_manifest_names_another_has():
    claims = {
        each["metadata"]["name"]
        for each in DOCUMENTS.values()
        if each["kind"] == "PersistentVolumeClaim"
    }
    for found in JOBS.values():
        pod = found["spec"]["template"]["spec"]
        named = [each.get("persistentVolumeClaim", {}).get("claimName") for each in pod["volumes"]]
        assert {name for name in named if name} == claims
        assert pod["securityContext"]["runAsUser"] == 1000  # of the image, see test_docker.py
        for rule in found["spec"]["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes")
            assert codes is None or codes["containerName"] == container_of(found)["name"]
    assert len({container_of(found)["image"] for found in JOBS.values()}) == 1


def test_numbers_agree():
    render = job("render.yaml")["spec"]
    (world,) = (v for v in container_of({"spec": render})["env"] if v["name"] == "WORLD_SIZE")
    assert render["completions"] == render["parallelism"] == int(world["value"])
    assert container_of({"spec": render})["resources"]["limits"]["nvidia.com/gpu"] == 1
    for name in ("patch.yaml", "patch-nodes.yaml"):
        found = container_of(job(name))
        (count,) = re.findall(r"--nproc-per-node=(\d+)", " ".join(found["command"]))
        assert found["resources"]["limits"]["nvidia.com/gpu"] == int(count)
    nodes = job("patch-nodes.yaml")
    assert f"--nnodes={nodes['spec']['completions']}" in container_of(nodes)["command"]
    (service,) = (each for each in DOCUMENTS.values() if each["kind"] == "Service")
    name = nodes["metadata"]["name"]
    subdomain = nodes["spec"]["template"]["spec"]["subdomain"]
    assert f"--master-addr={name}-0.{subdomain}" in container_of(nodes)["command"]
    assert service["metadata"]["name"] == subdomain
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}


class Pods:
    """What an indexed Job starts, as processes here: with the demo, on a CPU."""

    def __init__(self, file, work, **instead):
        self.job, self.work = job(file), work
        self.instead = {"--model": "demo", "--weights": "none", **instead}

    def start(self, index):
        found = container_of(self.job)
        variables = {
            each["name"]: str(index) if "fieldRef" in each["valueFrom"] else ""
            for each in found["env"]
            if "valueFrom" in each
        } | {each["name"]: each["value"] for each in found["env"] if "value" in each}
        for name in ("HOME", "HF_HOME", "HF_TOKEN"):
            del variables[name]
        words = [*found.get("command", ["clear-dit"]), *found["args"]]
        words = [self._here(word, variables) for word in words]
        env = environment(**variables)
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        return subprocess.Popen([*words, "--device=cpu"], env=env, stderr=subprocess.PIPE)

    def _here(self, word, variables):
        for name, value in variables.items():
            word = word.replace(f"$({name})", value)
        name = word.partition("=")[0]
        word = f"{name}={self.instead[name]}" if name in self.instead else word
        return word.replace("/data", str(self.work))

    def run(self):
        pods = [self.start(index) for index in range(self.job["spec"].get("completions", 1))]
        told = [pod.communicate(timeout=300)[1].decode() for pod in pods]
        return [pod.returncode for pod in pods], told


def test_pods_share_the_jobs(tmp_path):
    text = "".join(f'{{"prompt": "a house", "seed": {n}, "id": "{n}"}}\n' for n in range(5))
    (tmp_path / "jobs.jsonl").write_text(text.replace("}", ', "height": 64, "width": 64}'))
    pods = Pods("render.yaml", tmp_path)
    pods.job["spec"]["completions"] = 2
    status, told = pods.run()
    assert status == [0, 0], told
    assert_complete(tmp_path / "images", 5)
    # A bad line ends a pod with what the Job takes as the end of all.
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a house", "height": 65}\n')
    status, told = pods.run()
    (rule, *_) = pods.job["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert set(status) == set(rule["onExitCodes"]["values"])
    assert "line 1: --height must be a multiple of 16" in told[0]


SMALL = {"--height": 640, "--width": 640, "--nproc-per-node": 1}


@pytest.mark.parametrize("file", ["patch.yaml", "patch-nodes.yaml"])
def test_pods_share_an_image(file, tmp_path):
    meet = {"--master-addr": "127.0.0.1", "--master-port": free_port()}
    pods = Pods(file, tmp_path, **SMALL, **meet)
    if file == "patch.yaml":
        pods.instead["--nproc-per-node"] = 2
    container_of(pods.job)["args"].append("--steps=2")
    status, told = pods.run()
    assert not any(status), told
    assert (tmp_path / "lighthouse.png").exists()
