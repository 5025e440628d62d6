"""The networks metrics need: which are here, how to get the others, and what they say of images.

Nothing is downloaded: an evaluation must not depend on what the network happened to give.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import first_line

if TYPE_CHECKING:
    from ..demo.probe import Probe

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
# The paper does not name its networks; its CLIP-T of 31 is what the ViT-B models give.
CLIP_REPOSITORY = "openai/clip-vit-base-patch32"
DINO_REPOSITORY = "facebook/dino-vits16"
LPIPS_LEAST_SIDE = 32

PairMeasure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Network(ABC):
    """One network: whether it is here, and its features of images."""

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot be used here and how to get it, in a line; None if it can be."""

    def load(self, device: torch.device) -> None:
        """Read its weights onto a device."""
        raise NotImplementedError

    def features(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What it says of images uint8 (batch, 3, height, width) and their prompts.

        Returns:
            Tensors on the CPU, (batch, ...) each.
        """
        raise NotImplementedError


class ProbeNetwork(Network):
    """The demo's own classifier, trained on rendered images of its world: no general measure.

    features: (batch, 128), its last hidden layer, scaled to a mean square of 1 on rendered images
    (KID's polynomial is meant for numbers near 1); seen: (batch, 7), the attributes it reads.
    """

    def __init__(self, model_folder: str, square: bool) -> None:
        self.path: Path = Path(model_folder) / "probe" / "probe.safetensors"
        self.square = square

    def missing(self) -> str | None:
        if not self.path.is_file():
            return "reads images of the demo's world only, and this model has no probe/ folder"
        if not self.square:
            return "the demo's probe reads square images only"
        return None

    def load(self, device: torch.device) -> None:
        from ..demo.probe import load_probe, rendered_features

        self.probe: Probe = load_probe(self.path)
        self.scale: torch.Tensor = rendered_features(self.probe).square().mean().rsqrt()

    @torch.no_grad()
    def features(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        from ..demo.probe import shrink

        small = shrink(images.permute(0, 2, 3, 1).numpy())
        return {
            "features": self.probe.features(small) * self.scale,
            "seen": self.probe.read_labels(small),
        }


class InceptionNetwork(Network):
    """Inception v3 as FID is defined with it, from torch-fidelity.

    features: (batch, 2048); logits: (batch, 1008), without bias, for IS.
    """

    def missing(self) -> str | None:
        return _cannot_import("torch_fidelity") or _not_cached(INCEPTION_URL)

    def load(self, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.device = device
        self.network: Any = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"]
        ).to(device)

    @torch.no_grad()
    def features(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        features, logits = self.network(images.to(self.device))
        return {"features": features.cpu(), "logits": logits.cpu()}


class LpipsNetwork(Network):
    """LPIPS (Zhang et al. 2018) on AlexNet: compares pairs instead of giving features."""

    def __init__(self, least_side: int) -> None:
        self.least_side = least_side

    def missing(self) -> str | None:
        if self.least_side < LPIPS_LEAST_SIDE:
            return f"needs images of {LPIPS_LEAST_SIDE} px or more"
        return _cannot_import("torchvision") or _not_cached(ALEXNET_URL)

    def pair_measure(self, device: torch.device) -> PairMeasure:
        """A function of two batches of images in [0, 1] that gives a value for each pair."""
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)
        metric.to(device)

        def measure(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
            value = metric(teacher, student)
            metric.reset()
            return torch.atleast_1d(value)

        return measure


class TransformersNetwork(Network):
    """An image encoder of transformers, from the hub's cache or a folder.

    CLIP: features (batch, channels) of the images and text (batch, channels) of the prompts.
    DINO: features (batch, channels), the class token of the last layer.
    """

    def __init__(self, repository: str) -> None:
        self.repository = repository

    def missing(self) -> str | None:
        folder = self._folder()
        names = ("model.safetensors", "pytorch_model.bin")
        if folder is None or not any((folder / name).is_file() for name in names):
            return (
                f"{self.repository} is not in the cache of the hub; get it with "
                f"`hf download {self.repository}`"
            )
        return None

    def _folder(self) -> Path | None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        if Path(self.repository).is_dir():
            return Path(self.repository)
        try:
            return Path(snapshot_download(self.repository, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None

    def load(self, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        from ..generation.models import quiet_libraries

        folder = self._folder()
        with quiet_libraries():
            self.model: Any = AutoModel.from_pretrained(folder).eval().to(device)
            self.processor: Any = AutoImageProcessor.from_pretrained(folder)
            self.is_clip: bool = self.model.config.model_type == "clip"
            if self.is_clip:
                self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def features(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        model = self.model
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(model.device)
        if not self.is_clip:
            hidden = model(pixel_values=pixels).last_hidden_state
            return {"features": hidden[:, 0].float().cpu()}
        projected = model.visual_projection(model.vision_model(pixels).pooler_output)
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, return_tensors="pt"
        ).to(model.device)
        texts = model.text_projection(model.text_model(**tokens).pooler_output)
        return {"features": projected.float().cpu(), "text": texts.float().cpu()}


def _cannot_import(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        return (
            f"{module.replace('_', '-')} cannot be imported here ({first_line(error)}); "
            'pip install "torchmetrics[image]"'
        )
    return None


def _not_cached(url: str) -> str | None:
    """Whether torch.hub would have to download a file."""
    name = url.rsplit("/", 1)[1]
    if (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file():
        return None
    return (
        f"{name} is not in the cache of torch.hub; get it with "
        f"`python -c \"import torch; torch.hub.load_state_dict_from_url('{url}')\"`"
    )


def make_networks(model_folder: str, height: int, width: int) -> dict[str, Any]:
    """All networks by name, none loaded, for images of height x width pixels of a model."""
    return {
        "probe": ProbeNetwork(model_folder, square=height == width),
        "inception": InceptionNetwork(),
        "lpips": LpipsNetwork(min(height, width)),
        "clip": TransformersNetwork(CLIP_REPOSITORY),
        "dino": TransformersNetwork(DINO_REPOSITORY),
    }
