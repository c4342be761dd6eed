"""Compile the kernels of a step beside attention: plan, indices, cache write, and those around vendors' libraries."""

from __future__ import annotations

from dataclasses import replace

from ci.compile.cross_compile import DTYPES, Resources, compile_kernel, default_types, index_types
from portable_mla.backends.library.batch import finish_constants, prepare_constants
from portable_mla.backends.library.kernels.batch import finish_rows_kernel, prepare_step_kernel
from portable_mla.backends.triton.config.decode import Tile
from portable_mla.backends.triton.decode.runner import plan_shape
from portable_mla.cache.kernels.write import write_latent_kernel
from portable_mla.cache.write_launch import write_constants
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.shape import Request
from portable_mla.metadata.ragged.forms import ragged_constants
from portable_mla.metadata.ragged.kernels.ragged import write_ragged_kernel
from portable_mla.metadata.split_plan.kernels.plan import plan_splits_kernel
from portable_mla.metadata.split_plan.plan import plan_constants


def compile_plan(request: Request, tile: Tile, *, row_tiles: int = 0) -> Resources:
    """The kernel that plans the splits, for a ragged batch without positions of its own, with heads if row_tiles."""
    shape = replace(plan_shape(request, tile), row_tiles=row_tiles, halves=row_tiles > 0)
    constants = plan_constants(shape, request.shape.page_size) | {"positions_ptr": None}
    constants |= {} if row_tiles else {"heads_ptr": None}
    return compile_kernel(plan_splits_kernel, request.arch, index_types(plan_splits_kernel), constants)


def compile_write(request: Request) -> Resources:
    """The kernel that writes rows, with all of its inputs but for the unquantised copy."""
    shape = request.shape
    constants = write_constants(shape.page_size, shape.latent_dim, shape.rope_dim, True, shape.cache_format)
    dtype, stored = f"*{DTYPES[shape.q_dtype]}!", "*u8!" if shape.cache_format.quantised else "*bf16!"
    types = index_types(write_latent_kernel) | {"eps": "fp32"}
    types |= dict.fromkeys(("cos_sin_ptr", "kv_scale_ptr", "kv_group_ptr"), "*fp32!")
    types |= dict.fromkeys(("c_kv_ptr", "k_pe_ptr", "norm_weight_ptr", "q_source_ptr", "q_pe_ptr"), dtype)
    types |= {"kv_latent_ptr": stored, "kv_rope_ptr": stored if shape.cache_format.needs_scale else "*bf16!"}
    present = {
        "kv_group_ptr": shape.cache_format is CacheFormat.fp8_656,
        "kv_scale_ptr": shape.cache_format.needs_scale,
    }
    constants |= {"rows_ptr": None} | {name: None for name, given in present.items() if not given}
    return compile_kernel(write_latent_kernel, request.arch, types, constants)


def compile_ragged(request: Request) -> Resources:
    """The kernel that writes ragged token indices, for a ragged batch without positions of its own."""
    constants = ragged_constants(request.shape.page_size, 1) | {"given_positions_ptr": None}
    return compile_kernel(write_ragged_kernel, request.arch, index_types(write_ragged_kernel), constants)


def compile_step(request: Request) -> Resources:
    """The kernel that copies a ragged batch and its page table for a vendor's library."""
    types, constants = index_types(prepare_step_kernel), prepare_constants(request.shape.page_size)
    return compile_kernel(prepare_step_kernel, request.arch, types, constants)


def compile_finish(request: Request, *, copied: bool) -> Resources:
    """The kernel that finishes a library's rows. copied: the library could not write into the result."""
    constants = finish_constants(request.shape.latent_dim, copied) | ({} if copied else {"from_out_ptr": None})
    dtype, types = f"*{DTYPES[request.shape.q_dtype]}!", default_types(finish_rows_kernel)
    types |= {"from_out_ptr": dtype, "out_ptr": dtype, "states_ptr": "*i32!", "natural_per_unit": "fp32"}
    types |= {"stride_out_token": "i32!", "stride_out_head": "i32!"}
    return compile_kernel(finish_rows_kernel, request.arch, types, constants | {"stride_lse_head": 1})
