"""A linear layer in float32 on a CPU, by oneDNN.

torch's own product there is MKL's, which leaves half of what an AMD processor can do unused: on a fifth-generation EPYC MiniLM takes 0.75
of its time for a sentence, 0.62 once the weights are packed, and 0.57 for a batch.
"""

import torch
import torch.nn.functional as F  # noqa: N812  torch's customary name
from torch import Tensor

ROWS = 16  # oneDNN compiles a program for each number of rows, which takes longer than the product: they are rounded up to these

# The operator is what torch's own compiler makes of a linear layer on a CPU.
_is_here = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


class Linear:
    """x [n, in] → x · weightᵀ + bias [n, out]. No gradients."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """weight: [out, in], used where it lies, so that replicas share it; bias: [out]."""
        self._weight, self._bias = weight, bias
        self._is_ours = _is_here and weight.device.type == "cpu" and weight.dtype == torch.float32

    def pack(self) -> None:
        """Lay a copy of the weight out as the product wants it; that takes as long as copying it, and the copy is this process's own."""
        if self._is_ours:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)  # noqa: SLF001

    def __call__(self, x: Tensor) -> Tensor:
        """See there."""
        if not self._is_ours:
            return F.linear(x, self._weight, self._bias)
        rows = len(x)
        if missing := -rows % ROWS:
            x = F.pad(x, (0, 0, 0, missing))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")  # noqa: SLF001
        return y[:rows]
