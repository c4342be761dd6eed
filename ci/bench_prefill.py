"""TFLOP/s of prefill on this GPU, beside FlashAttention-3 (vLLM's build, where it is installed) and torch's cuDNN
attention, both over keys that are concatenated per head beforehand.

python -m ci.bench_prefill [--rows 1x4096x128 4x2048x128] [--geometry 128+64/128 ...] [--rounds 5] [--ms 10]

Causal bf16; rows are sequences x tokens x heads. Operations are those of the pairs that are seen: two matrix products.
The contenders take turns; the median of the rounds is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from portable_mla import MLAShape, Phase, arch_of, explain
from portable_mla.backends.triton.backend import PREFILL_GEOMETRIES
from portable_mla.core.shape import Capacity, Request
from portable_mla.dispatch.interface import PrefillInputs, prefill_runner
from portable_mla.dispatch.select import load

ROWS = ["1x4096x128", "1x16384x16", "1x8192x128", "4x2048x128", "1x16384x128"]
PEERS = ("flash_attn3", "cudnn")  # of which one may refuse a row
REST = 0.1  # seconds between stretches, so that none is throttled for the heat of the one before
Geometry = tuple[int, int, int]


def inputs_of(geometry: Geometry, sequences: int, length: int, heads: int) -> PrefillInputs:
    """Random tensors, k_nope and v as views of one projection, k_pe of cache rows."""
    nope, rope, v_dim = geometry
    tokens = sequences * length
    q, projection, row = (
        torch.randn(tokens, *shape, dtype=torch.bfloat16, device="cuda")
        for shape in ((heads, nope + rope), (heads, nope + v_dim), (512 + rope,))
    )
    offsets = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")
    return PrefillInputs(q, projection[..., :nope], row[:, 512:], projection[..., nope:], offsets, offsets)


def contenders(inputs: PrefillInputs, geometry: Geometry, length: int) -> dict[str, Callable[[], object]]:
    """Every backend that serves this prefill, and cuDNN."""
    tokens, heads, _ = inputs.q.shape
    capacity = Capacity(inputs.sequences, tokens, length, length, 0, 0)
    arch, scale = arch_of(inputs.q.device), (geometry[0] + geometry[1]) ** -0.5
    shape = MLAShape.expanded(heads, *geometry, torch.bfloat16)
    request = Request(arch, shape, Phase.prefill, length, False, False, capacity)
    out, lse = torch.empty_like(inputs.v), torch.empty(tokens, heads, device="cuda")
    found: dict[str, Callable[[], object]] = {}
    for candidate in explain(request).candidates:
        if not candidate.reasons and candidate.name != "reference":
            run = prefill_runner(load(candidate.name, arch.vendor), request).run
            found[candidate.name] = lambda run=run: run(inputs, out, lse, softmax_scale=scale)
    k = torch.cat([inputs.k_nope, inputs.k_pe[:, None].expand(-1, heads, -1)], -1)
    v = inputs.v.contiguous()
    queries, keys, values = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (inputs.q, k, v))
    offsets = inputs.cu_seqlens_q

    def cudnn() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)

    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return found | {"cudnn": cudnn}

    def flash_attn3() -> object:
        return flash_attn_varlen_func(
            q=inputs.q, k=k, v=v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=length, max_seqlen_k=length,
            softmax_scale=scale, causal=True, fa_version=3,
        )  # fmt: skip

    return found | {"flash_attn3": flash_attn3, "cudnn": cudnn}


def milliseconds(call: Callable[[], object], budget: float) -> float:
    """One call's share of a stretch of about `budget` milliseconds."""

    def stretch(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    return stretch(max(1, int(budget / stretch(1))))


def measure(geometry: Geometry, row: str, rounds: int, budget: float) -> str:
    """One line of the table."""
    sequences, length, heads = map(int, row.split("x"))
    flops = sequences * heads * length * (length + 1) * (sum(geometry))
    calls = contenders(inputs_of(geometry, sequences, length, heads), geometry, length)
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            call()
            times[name] = []
        except (RuntimeError, AssertionError) as refusal:  # cuDNN has no kernel for every geometry
            if name not in PEERS:
                raise SystemExit(f"{name} fails: {refusal}") from refusal
            print(f"{name} refuses {geometry}: {(str(refusal).splitlines() or [repr(refusal)])[0]}")
    for _ in range(rounds):
        for name, of_one in times.items():
            time.sleep(REST)
            of_one.append(milliseconds(calls[name], budget))
    medians = {name: statistics.median(of_one) for name, of_one in times.items()}
    cells = (f"{name} {flops / ms / 1e9:.0f} TFLOP/s ({ms * 1e3:.0f} us)" for name, ms in medians.items())
    return "{}+{}/{} ".format(*geometry) + f"{row}: {', '.join(cells)}"


def main() -> None:
    """Print a line for each geometry and row."""
    names = {"{}+{}/{}".format(*geometry): geometry for geometry in PREFILL_GEOMETRIES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="SxTxH")
    parser.add_argument("--geometry", nargs="+", choices=list(names), default=list(names))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ms", type=float, default=10.0, help="of each stretch")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}")
    for geometry in options.geometry:
        for row in options.rows:
            print(measure(names[geometry], row, options.rounds, options.ms), flush=True)


if __name__ == "__main__":
    main()
