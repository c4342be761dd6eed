"""Compiles the kernels for an architecture that need not be there, and reads what they use."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from portable_mla.backends.triton.combine.kernels.combine import combine_kernel
from portable_mla.backends.triton.combine.runner import Combine
from portable_mla.backends.triton.config.decode import Tile
from portable_mla.backends.triton.config.prefill import PrefillTile
from portable_mla.backends.triton.decode.kernels.decode import decode_kernel
from portable_mla.backends.triton.decode.runner import TritonRunner
from portable_mla.backends.triton.prefill.kernels.prefill import prefill_kernel
from portable_mla.backends.triton.prefill.runner import TritonPrefill
from portable_mla.core.arch import Arch
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.shape import Request
from portable_mla.prefill.context_bounds import poison_constants
from portable_mla.prefill.kernels.merge import merge_kernel
from portable_mla.prefill.kernels.poison_rows import poison_rows_kernel
from portable_mla.prefill.merge import merge_constants

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MATRIX_SASS = re.compile(r"\b(HGMMA|HMMA|UTCHMMA)\b")
MATRIX_PTX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
MATRIX_GCN = re.compile(r"^\s+v_mfma_f32_(\w+)", re.MULTILINE)
SPILL = re.compile(r"\b(STL|LDL|scratch_load\w*|scratch_store\w*)\b")
MBARRIER = re.compile(r"mbarrier\.init.*@global_smem, i32 (\d+)")
MBARRIER_STEP = 16  # bytes from one allocation to the next
LABEL = re.compile(r"^\.?L\w+:", re.MULTILINE)

Constants = Mapping[str, Any]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses."""

    registers: int
    spills: int  # bytes of stack frame on NVIDIA, spilled vector registers on AMD
    loop_spills: int  # spill instructions in the basic blocks that hold matrix instructions
    shared: int  # bytes
    matrix: dict[str, int]  # matrix instructions by kind

    @classmethod
    def of(cls, compiled: Any) -> Resources:
        """Read from AMD's assembly, or from NVIDIA's binary with the tools that Triton brings.

        Where those cannot disassemble for the architecture, matrix instructions are PTX's and loop_spills is 0.
        """
        shared = int(compiled.metadata.shared)
        if "amdgcn" in compiled.asm:
            text = compiled.asm["amdgcn"]
            counts = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s*(\d+)", text)}
            registers, spills = counts["vgpr_count"], counts["vgpr_spill_count"]
            return cls(registers, spills, _loop_spills(text, MATRIX_GCN), shared, _kinds(text, MATRIX_GCN))
        cubin = compiled.asm["cubin"]
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _nvidia_tool("cuobjdump", cubin, "-res-usage"))
        assert usage is not None, "cuobjdump speaks of no registers"
        registers, stack = int(usage[1]), int(usage[2])
        try:
            text = _nvidia_tool("nvdisasm", cubin, "-c")
        except subprocess.CalledProcessError as failure:
            if "Cannot decode architecture" not in failure.stderr:  # a part newer than this Triton's disassembler
                raise
            return cls(registers, stack, 0, shared, _kinds(compiled.asm["ptx"], MATRIX_PTX))
        return cls(registers, stack, _loop_spills(text, MATRIX_SASS), shared, _kinds(text, MATRIX_SASS))


def compile_decode(request: Request, tile: Tile, *, aligned: bool = True, small: bool = False) -> Resources:
    """The decode kernel as the runner launches it. aligned: the cache's address and strides allow wide loads; small: on
    AMD, no tensor has more than 2 GiB, so that loads go through buffers with 32-bit offsets."""
    loads: Literal["descriptor", "pointer"] = tile.loads if aligned else "pointer"
    constants = TritonRunner(request, tile).decode_constants(loads) | {"stride_lse_head": 1}
    dtype = DTYPES[request.shape.q_dtype]
    types = default_types(decode_kernel)
    types |= {name: "i32!" for name in types if name.startswith(("stride_q", "stride_kv", "stride_out"))}
    types |= dict.fromkeys(("q_ptr", "kv_ptr", "out_ptr"), f"*{dtype}!")
    if request.shape.cache_format.quantised:
        types["kv_ptr"] = cache_type(request)
    if not request.shape.cache_format.needs_scale:
        constants["kv_scale_ptr"] = None
    types |= dict.fromkeys(("part_indptr_ptr", "items_ptr"), "*i32!")
    types |= dict.fromkeys(("table_header_ptr", "status_ptr"), "*i64!")
    types["softmax_scale"] = "fp32"
    if not aligned:
        types |= {name: types[name].rstrip("!") for name in ("kv_ptr", "stride_kv_page", "stride_kv_slot")}
    for name, width in (("latent_desc", request.shape.latent_dim), ("rope_desc", request.shape.rope_dim)):
        if loads == "descriptor" and width:
            types[name] = f"tensordesc<{dtype}[1, {tile.block_n}, {width}]>"
        else:
            constants[name] = None
    if small:
        types |= {name: f"{kind}<" for name, kind in types.items() if kind.startswith("*")}
    return compile_kernel(decode_kernel, request.arch, types, constants)


def cache_type(request: Request) -> str:
    """Pointer to an fp8 cache as the decode kernel reads it: to bytes, unless all is fp8 and the hardware converts."""
    shape = request.shape
    if shape.cache_format is CacheFormat.fp8_656 or not request.arch.converts(shape.cache_format.dtype):
        return "*u8!"
    return "*fp8e4b8!" if shape.cache_format is CacheFormat.fp8_e4m3fnuz else "*fp8e4nv!"


def compile_gluon(request: Request) -> Any:
    """Hopper's Gluon kernel as its runner launches it, compiled; imported here, for not every Triton has its names."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from portable_mla.backends.nvidia.hopper.decode.kernels.entry import sm90_decode_kernel
    from portable_mla.backends.nvidia.hopper.decode.runner import BLOCK, LAYOUT, TILES, Sm90Runner, cache_blocks
    from portable_mla.backends.nvidia.hopper.eviction import rewriting

    shape = request.shape
    runner = Sm90Runner(request, Tile(64, 64, 8, 2))
    constants = runner.decode_constants()
    dtype, types = DTYPES[shape.q_dtype], default_types(sm90_decode_kernel)
    blocks = ([constants["QUERY_ROWS"], BLOCK], LAYOUT), *cache_blocks(shape.page_size, TILES // constants["BOXES"])
    boxes = dict(zip(("q_desc", "kv_desc", "box_desc"), blocks, strict=True))
    types |= {name: f"tensordesc<{dtype}{block},{layout!r}>" for name, (block, layout) in boxes.items()}
    types |= dict.fromkeys(("kv_ptr", "out_ptr"), f"*{dtype}!")
    types |= dict.fromkeys(("heads_ptr", "items_ptr"), "*i32!")
    types |= dict.fromkeys(("table_header_ptr", "status_ptr"), "*i64!")
    types["partial_out_ptr"] = "*fp16!" if runner.partials.dtype == torch.float16 else "*fp32!"
    types |= dict.fromkeys(("stride_slot", "stride_out_token", "stride_out_head"), "i32!")
    types["softmax_scale"] = "fp32"
    with rewriting():
        return _compiled(sm90_decode_kernel, request.arch, types, constants, GluonASTSource)


def compile_gluon_prefill(request: Request, *, causal: bool = True) -> Any:
    """Hopper's Gluon prefill kernel as its runner launches it, compiled."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from portable_mla.backends.nvidia.hopper.prefill.kernels.entry import sm90_prefill_kernel
    from portable_mla.backends.nvidia.hopper.prefill.runner import BOX, HALF, Sm90PrefillRunner, box_layout

    constants = Sm90PrefillRunner(request).constants(causal)
    dtype, block_n, rope = DTYPES[request.shape.q_dtype], constants["BLOCK_N"], constants["ROPE"] or BOX
    boxes = {
        "q_desc": (HALF, BOX), "q_rope_desc": (HALF, rope), "k_nope_desc": (block_n, BOX), "k_pe_desc": (block_n, rope),
        "v_desc": (block_n, BOX),
    }  # fmt: skip
    types = index_types(sm90_prefill_kernel)
    types |= {
        name: f"tensordesc<{dtype}[{rows}, {columns}],{box_layout(columns)!r}>"
        for name, (rows, columns) in boxes.items()
    }
    types |= {"out_ptr": "*fp32!" if request.float32_out else f"*{dtype}!", "lse_ptr": "*fp32!"}
    types |= {"stride_out_token": "i32!", "stride_out_head": "i32!", "softmax_scale": "fp32"}
    types |= dict.fromkeys(("q_ptr", "k_nope_ptr", "k_pe_ptr", "v_ptr"), f"*{dtype}!")
    return _compiled(sm90_prefill_kernel, request.arch, types, constants, GluonASTSource)


def serialised_wgmma(compiled: Any) -> list[str]:
    """What ptxas says of wgmmas that it makes wait for one another (remarks C75xx), which Triton does not show."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        for ptxas in (tools / "ptxas", tools / "ptxas-blackwell"):  # of two, the one that reads this PTX version
            command = [str(ptxas), "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return [line for line in done.stderr.splitlines() if "(C75" in line]
    raise RuntimeError(done.stderr)


def stray_mbarriers(compiled: Any) -> list[int]:
    """Places in shared memory of mbarriers that do not lie beside the next one.

    One that nobody waits for is dead once it is initialised, and Triton gives its place to data. PTX wants it
    invalidated first; where it is not, a program that is preempted can find the mbarrier in its data.
    """
    places = sorted(map(int, MBARRIER.findall(compiled.asm["llir"])))
    assert places, "no mbarrier is initialised"
    return [place for place, following in itertools.pairwise(places) if following - place > MBARRIER_STEP]


def compile_combine(request: Request, kind: str, *, dependent: bool = False) -> Resources:
    """One of the combines. dependent: as Hopper's Gluon runner launches it, for bfloat16."""
    constants = Combine(request, 1, narrow=dependent, dependent=dependent).constants[kind]
    types = default_types(combine_kernel)
    types |= {"stride_out_token": "i32!", "stride_out_head": "i32!", "token_slots_ptr": "*i32!"}
    types["out_ptr"] = f"*{DTYPES[request.shape.q_dtype]}!"
    types["partial_out_ptr"] = "*fp16!" if dependent else "*fp32!"
    return compile_kernel(combine_kernel, request.arch, types, constants | {"stride_lse_head": 1})


def compile_prefill(request: Request, tile: PrefillTile, *, causal: bool = True, aligned: bool = True) -> Resources:
    """The prefill kernel as its runner launches it. aligned: keys' addresses and strides allow descriptors."""
    shape, descriptors = request.shape, aligned and tile.loads == "descriptor"
    constants = TritonPrefill(request, tile).constants(causal=causal, descriptors=descriptors)
    dtype = DTYPES[shape.q_dtype]
    types = default_types(prefill_kernel)
    types |= {name: "i32!" for name in types if name.startswith("stride_") and "lse" not in name}
    types |= dict.fromkeys(("q_ptr", "k_nope_ptr", "k_pe_ptr", "v_ptr"), f"*{dtype}!")
    types |= {"cu_q_ptr": "*i32!", "cu_k_ptr": "*i32!", "softmax_scale": "fp32"}
    types["out_ptr"] = "*fp32!" if request.float32_out else f"*{dtype}!"
    for name, width in (("nope", "NOPE"), ("rest", "REST"), ("rope", "ROPE"), ("v", "V")):
        if descriptors and constants[width]:
            block = [tile.block_n, *([] if name == "rope" else [1]), constants[width]]
            types[f"{name}_desc"] = f"tensordesc<{dtype}{block}>"
        else:
            constants[f"{name}_desc"] = None
    return compile_kernel(prefill_kernel, request.arch, types, constants | {"stride_lse_head": 1})


def compile_merge(arch: Arch, width: int) -> Resources:
    """The kernel that merges results of this width."""
    heads = dict.fromkeys(("stride_first_lse_head", "stride_rest_lse_head", "stride_lse_head"), 1)
    return compile_kernel(merge_kernel, arch, default_types(merge_kernel), merge_constants(width) | heads)


def compile_poison(arch: Arch, width: int) -> Resources:
    """The kernel that finds contexts over their bounds, for results of this width."""
    types = default_types(poison_rows_kernel) | {"status_ptr": "*i64!", "out_ptr": "*bf16!"}
    types |= dict.fromkeys(("lens_ptr", "cu_seqlens_ptr"), "*i32!")
    return compile_kernel(poison_rows_kernel, arch, types, poison_constants(width) | {"stride_lse_head": 1})


def index_types(kernel: Any) -> dict[str, str]:
    """Of a metadata kernel: 32-bit numbers, but for the status words and the page table's address."""
    types = {name: "*i32!" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    return types | {name: "*i64!" for name in ("table_header_ptr", "status_ptr") if name in types}


def default_types(kernel: Any) -> dict[str, str]:
    """Of a kernel over tensors: float32 and 32-bit numbers."""
    return {name: "*fp32!" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}


def compile_kernel(kernel: Any, arch: Arch, types: Mapping[str, str], launch: Constants) -> Resources:
    """Its resources. types and launch: as `_compiled` has them."""
    return Resources.of(_compiled(kernel, arch, types, launch, ASTSource))


def _compiled(kernel: Any, arch: Arch, types: Mapping[str, str], launch: Constants, source_type: Any) -> Any:
    """types: of the arguments that are not constants; "!" behind one marks a value divisible by 16, and "<" a tensor of
    at most 2 GiB."""
    assert isinstance(kernel, triton.JITFunction), "main refuses an interpreted process"
    constants = {name: value for name, value in launch.items() if name in kernel.arg_names}
    options = {name: value for name, value in launch.items() if name not in constants}
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names and name not in constants}
    signature = {name: types[name].rstrip("!<") if name in types else "constexpr" for name in kernel.arg_names}
    marks = {"!": ["tt.divisibility", 16], "<": ["tt.pointer_range", 32]}
    attributes = {
        (index,): [marks[mark] for mark in marks if mark in types[name]]
        for index, name in enumerate(kernel.arg_names)
        if name in types and types[name][-1] in marks
    }
    source = source_type(kernel, signature, constexprs=constants, attrs=attributes)
    target = ("hip", arch.name) if arch.vendor == "amd" else ("cuda", int(arch.name.removeprefix("sm")))
    return triton.compile(source, target=GPUTarget(*target, arch.wave), options=options)


def _kinds(assembly: str, matrix: re.Pattern[str]) -> dict[str, int]:
    names: list[str] = matrix.findall(assembly)
    return {name: names.count(name) for name in sorted(set(names))}


def _loop_spills(assembly: str, matrix: re.Pattern[str]) -> int:
    return sum(len(SPILL.findall(block)) for block in LABEL.split(assembly) if matrix.search(block))


def _nvidia_tool(name: str, cubin: bytes, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(path), *arguments, file.name], capture_output=True, text=True, check=True)
    return done.stdout
