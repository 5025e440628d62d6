import dataclasses

import numpy as np
import pytest
from diffusers import FluxPipeline
from PIL import Image
from support.slow import slow

from clear_dit.demo import train
from clear_dit.demo.checkpoint import load_checkpoint
from clear_dit.demo.evaluate import contact_sheet, generate, score
from clear_dit.demo.probe import (
    held_out_captions,
    held_out_scenes,
    load_probe,
    save_probe,
    train_probe,
)
from clear_dit.demo.train import STAGES, Plan, run
from clear_dit.demo.transformer import Phase

TINY = Plan(
    sizes=(64, 128, 128),
    counts=(4, 2, 1),
    text_steps=2,
    autoencoder_steps=2,
    decoder_steps=2,
    autoencoder_crop=32,
    probe_epochs=1,
    phases=(
        Phase("phase-1", 4, 2, 2, 0.01, 2e-3, 0.3, 0.3),
        Phase("phase-2", 8, 2, 2, 0.005, 1e-3, 0.9, 0.0),
    ),
    compile_model=False,
    save_every=1,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run(folder / "work", folder / "demo", TINY, STAGES, threads=1)
    return folder


@slow
def test_all_stages_make_a_stock_pipeline(trained):
    pipe = FluxPipeline.from_pretrained(trained / "demo")
    image = pipe("a blue house", height=64, width=96, num_inference_steps=1).images[0]
    assert image.size == (96, 64)


@slow
def test_export_is_clean(trained):
    files = [path for path in (trained / "demo").rglob("*") if path.is_file()]
    assert {"README.md", "loss.png", "model_index.json"} <= {path.name for path in files}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl"}]
    with Image.open(trained / "demo" / "loss.png") as curve:
        assert curve.size == (960, 360)
    card = (trained / "demo" / "README.md").read_text()
    assert "2 steps of 2 images, 4x4 tokens" in card
    assert str(trained) not in card


@slow
def test_a_killed_phase_goes_on(trained, tmp_path, monkeypatch):
    work = trained / "work"
    longer = dataclasses.replace(
        TINY, phases=(dataclasses.replace(TINY.phases[0], name="killed", steps=4), TINY.phases[1])
    )
    real, calls = train.train_transformer.__globals__["save_checkpoint"], []

    def killed(*args, **kwargs):
        real(*args, **kwargs)
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setitem(train.train_transformer.__globals__, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(work, tmp_path, longer, ("phase-1",), threads=1)
    run(work, tmp_path, longer, ("phase-1",), threads=1)
    assert calls == [1, 2, 3, 4]
    step, losses = load_checkpoint(work / "killed.safetensors")
    assert (step, len(losses)) == (4, 4)


@slow
def test_finished_stages_are_not_repeated(trained):
    work = trained / "work"
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.npy")}
    before |= {path: path.stat().st_mtime_ns for path in work.glob("phase-*.safetensors")}
    run(work, trained / "again", TINY, STAGES, threads=1)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@slow
def test_probe_and_score(trained, tmp_path):
    probe = train_probe(TINY.image_sets(trained / "work")[0], epochs=1)
    save_probe(probe, tmp_path / "probe.safetensors")
    probe = load_probe(tmp_path / "probe.safetensors")
    pipe = FluxPipeline.from_pretrained(trained / "demo")
    images = generate(
        pipe, ["", "a tree", "a tower"], size=64, steps=1, true_cfg_scale=2.0, seed=0, batch=2
    )
    assert images.shape == (3, 64, 64, 3)
    result = score(probe, images, held_out_captions(3))
    assert result["hits"].shape == result["shuffled"].shape == (7,)
    assert contact_sheet(images, 2, 32).size == (64, 64)


def test_score_tells_right_from_shuffled():
    class Perfect:
        def read(self, images):
            return np.array([scene.labels for scene in held_out_scenes(32)])

    result = score(Perfect(), np.zeros((32, 8, 8, 3), np.uint8), held_out_captions(32))
    assert (result["hits"] == 1).all()
    assert (result["shuffled"] < 0.6).all()
