"""AutoencoderKLFlux2, of FLUX.2 and FLUX.3: AutoencoderKL with its own scaling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import kl
from .kind import Scaling


def scaling(vae: Any) -> Scaling:
    """By the running statistics of a batch norm over patches, which never runs itself."""
    mean, variance = (each.view(1, -1, 1, 1) for each in (vae.bn.running_mean, vae.bn.running_var))
    factor = (variance + vae.config.batch_norm_eps).rsqrt()
    return Scaling(factor, mean, vae.config.patch_size[0])


KIND = replace(kl.KIND, scaling=scaling)
