"""How much memory tensors take at once, whatever the process or the machine does beside them."""

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While active, notes the peak of the bytes of tensors that were made since and still live.

    Works under FakeTensorMode too: memory of what was never computed.

    Attributes:
        peak: in bytes.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live = 0
        self._tensors = Counter()  # of each storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in given:
                self._note(tensor)
        return out

    def _note(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._tensors[key]:
            self._live += size
            self.peak = max(self.peak, self._live)
        self._tensors[key] += 1
        weakref.finalize(tensor, self._forget, key, size)

    def _forget(self, key, size):
        self._tensors[key] -= 1
        if not self._tensors[key]:
            self._live -= size
