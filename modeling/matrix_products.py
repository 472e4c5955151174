"""Matrix products on the CPU, by the faster of the libraries that torch carries.

torch gives fp32 products to MKL, which outside Intel's processors goes by its AVX2 code; oneDNN, to which torch gives
bf16, has AVX-512 code for all of them and is then more than twice as fast (`docs/performance.md`).
"""

import torch
from torch import Tensor

FEWEST_ROWS = 16
"""Below, a call of oneDNN costs more than it gains."""


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b` for `[m, k]` and `[k, n]` of one type on the CPU, written into `out` where given; no autograd.

    oneDNN makes code for each new shape, at the cost of a product of a few hundred rows: let shapes recur.
    """
    if not _onednn_is_faster(a):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    found = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return found if out is None else out.copy_(found)


def _onednn_is_faster(a: Tensor) -> bool:
    if a.dtype != torch.float32 or a.shape[0] < FEWEST_ROWS or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.backends.mkldnn.enabled) and torch.backends.cpu.get_cpu_capability() == "AVX512"
