"""Where this package registers its operators with PyTorch.

As `torch.ops.clear_dit`; as `torch.ops.<name>` for a copy of this folder that is imported under
another name (docs/kernel-hub.md), so that several copies do not clash in one process.
"""

NAMESPACE = __name__.partition(".")[0]
