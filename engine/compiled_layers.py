"""How does an unchanged transformers model run as fused kernels? Its decoder layers go through torch.compile.

All layers share one piece of compiled code: weights and the layer's number are its inputs (attention_op.py), the number
of tokens is symbolic. So a start compiles one layer twice (one token, and several), which takes seconds, and not a
model for each batch size, which takes minutes; between whole model and layers we measured 0.1 ms of a 10 ms step.

On CPU it is C++: norms, rotary embeddings and activations become loops that touch memory once, and the products stay
oneDNN's (packed_linear.py). That takes a C++ compiler.

What inductor and Triton make is kept on disk (``engine.compile_cache``), and so are FlashInfer's kernels, which take
minutes; a second start reads them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from engine.cpu_kernel import compiler

_INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled_code(folder: str) -> Path:
    """Say to torch and FlashInfer where compiled code is kept; before the first of it is compiled or imported.

    They know no other way than the environment; what somebody has set there stays. Some versions of torch write their
    own default there when they are imported: that is nobody's wish.
    """
    path = Path(folder).expanduser()
    if os.environ.get(_INDUCTOR_FOLDER) in (None, os.path.abspath(default_cache_dir())):
        os.environ[_INDUCTOR_FOLDER] = str(path / "inductor")
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(path / "flashinfer"))
    return path


def generator_missing(device: str) -> str | None:
    """Why torch cannot generate code for a device of its type ``device`` here; None if it can, as far as we know."""
    if device == "cpu" and compiler() is None:
        return "torch needs a C++ compiler to generate code for a CPU, and none is installed"
    return None


def decoder_layers(model: Any) -> tuple[nn.Module, ...]:
    """The repeated layers of a transformers model; empty if they are not to be found."""
    num_layers = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
    return tuple(lists[0]) if lists else ()


class CompiledLayers:
    """The layers of one model, compiled or, after ``undo``, as they were."""

    def __init__(self, model: Any, backend: str = "inductor") -> None:
        """Nothing is compiled before the first call."""
        self._layers = decoder_layers(model)
        # Else the number of threads of this process becomes part of the code, and of its name in the cache.
        options = {"cpp.dynamic_threads": True} if backend == "inductor" else None
        for layer in self._layers:
            layer.compile(dynamic=True, fullgraph=True, backend=backend, options=options)

    @property
    def num_layers(self) -> int:
        """How many there are; 0: the model keeps its layers where we do not find them."""
        return len(self._layers)

    def undo(self) -> None:
        """Compute eagerly from now on."""
        for layer in self._layers:
            layer._compiled_call_impl = None
        torch._dynamo.reset()
