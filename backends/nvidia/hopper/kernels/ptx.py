"""What the sm90 decode kernel needs beside Gluon's own operations: named barriers, dependent launch, opaque values.

Triton's mbarrier.arrive costs up to two bar.sync, because its barrier pass takes it for an access to all of shared
memory. Between warps of one program named barriers cost one instruction, so mbarriers serve the TMA alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language import core

from portable_mla.backends.nvidia.hopper.eviction import MARK, POLICY

# Named barriers. Triton uses 0, 1 and 2 + the partition's index.
WEIGHTS_0 = gl.constexpr(7)  # weights and maximum of the even block are in shared memory
WEIGHTS_1 = gl.constexpr(8)  # the same of the odd block
FREE_LEFT_0 = gl.constexpr(9)  # columns 0..255 of the even block may be overwritten
FREE_LEFT_1 = gl.constexpr(10)
FREE_RIGHT_0 = gl.constexpr(11)
FREE_RIGHT_1 = gl.constexpr(12)
FREE_QUERY = gl.constexpr(13)

PAIR_THREADS = gl.constexpr(256)  # both compute warpgroups
RELEASE_THREADS = gl.constexpr(160)  # one compute warpgroup and a loader warp
QUERY_THREADS = gl.constexpr(320)  # both compute warpgroups and both loader warps

# Renamed after Triton 3.6.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier


def _statement(text, _semantic):
    core.inline_asm_elementwise(
        f"{text}; // $0", "=r", [], dtype=core.int32, is_pure=False, pack=1, _semantic=_semantic
    )


def _number(value):
    return int(getattr(value, "value", value))


@core.extern
def load_once(desc, coordinates, barrier, tile, _semantic=None):
    """TMA of what is read once: L2 drops it first. Without policies in Triton, eviction.py sees to it."""
    if not POLICY:
        _statement(f"// {MARK}", _semantic)
    tma_load(desc, coordinates, barrier, tile, _semantic=_semantic, **POLICY)


@core.extern
def arrive(barrier, threads, _semantic=None):
    """Arrive at a named barrier without waiting; orders the shared memory accesses before it."""
    _statement(f"bar.arrive {_number(barrier)}, {_number(threads)}", _semantic)


@core.extern
def meet(barrier, threads, _semantic=None):
    """Wait at a named barrier until `threads` threads have arrived, these included."""
    _statement(f"bar.sync {_number(barrier)}, {_number(threads)}", _semantic)


@core.extern
def wait_for_previous_kernel(_semantic=None):
    """Wait until the kernel before has ended and its writes can be seen: a dependent launch does not by itself."""
    _statement("griddepcontrol.wait", _semantic)


@core.extern
def launch_dependents(_semantic=None):
    """Let a kernel launched as dependent begin; its own wait holds it back until this grid has ended."""
    _statement("griddepcontrol.launch_dependents", _semantic)


@core.extern
def prefetch_bytes(pointer, count, _semantic=None):
    """Ask for `count` bytes, a multiple of 16, to be brought into L2."""
    core.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // $0", "=r,l,r", [pointer, _semantic.to_tensor(count)],
        dtype=core.int32, is_pure=False, pack=1, _semantic=_semantic,
    )  # fmt: skip


@core.extern
def prefetch_line(pointer, _semantic=None):
    """Ask for the cache line of a pointer to be brought into L2."""
    core.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [pointer], dtype=core.int32, is_pure=False, pack=1,
        _semantic=_semantic,
    )  # fmt: skip


@core.extern
def read_4(pointer, _semantic=None):
    """Four int32 of 16 bytes, read where this is written: the compiler would put it off until a value is needed."""
    return core.inline_asm_elementwise(
        "ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [pointer], dtype=[core.int32] * 4,
        is_pure=False, pack=1, _semantic=_semantic,
    )  # fmt: skip


@core.extern
def multiply(left, right, _semantic=None):
    """The rounded product, never fused with a subtraction."""
    return core.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [left, _semantic.to_tensor(right)], dtype=core.float32, is_pure=True,
        pack=1, _semantic=_semantic,
    )  # fmt: skip


@core.extern
def multiply_unless_one(values, factor, count, _semantic=None):
    """Products of float32 values and their row's factor; a warp whose factors are all 1 branches around them.

    count: values of a thread, of which the first four are of all its rows.
    """
    count = _number(count)
    kept = " ".join(f"mov.f32 ${i}, ${count + i};" for i in range(count))
    other = " ".join(f"setp.neu.or.f32 p, ${2 * count + i}, 0f3F800000, p;" for i in range(1, 4))
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    text = (
        f"{{ .reg .pred p; {kept} setp.neu.f32 p, ${2 * count}, 0f3F800000; {other} "
        f"vote.sync.any.pred p, p, 0xffffffff; @!p bra.uni DONE; {products} DONE: }}"
    )
    return core.inline_asm_elementwise(
        text, ",".join(["=&f"] * count + ["f"] * 2 * count), [values, factor], dtype=core.float32, is_pure=False,
        pack=count, _semantic=_semantic,
    )  # fmt: skip


@core.extern
def pack_pairs(left, right, dtype, _semantic=None):
    """Pairs of float32 values rounded to bfloat16 or float16, as int32: the left one is stored first."""
    name = {"bf16": "bf16x2", "fp16": "f16x2"}[core._unwrap_if_constexpr(dtype).name]
    return core.inline_asm_elementwise(
        f"cvt.rn.{name}.f32 $0, $2, $1;", "=r,f,f", [left, right], dtype=core.int32, is_pure=True, pack=1,
        _semantic=_semantic,
    )  # fmt: skip


@core.extern
def publish_barriers(_semantic=None):
    """Make initialised mbarriers visible to the TMA."""
    _statement("fence.mbarrier_init.release.cluster", _semantic)


@core.extern
def reinterpret(memory, shape, layout, _semantic=None):
    """The same shared memory in another shape; the method was renamed after Triton 3.6."""
    method = getattr(memory, "reinterpret", None) or memory._reinterpret
    return method(memory.dtype, shape, layout, _semantic=_semantic)


@core.extern
def opaque(value, _semantic=None):
    """The value, hidden from code motion: addresses made from it are computed anew instead of spilled."""
    return core.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [_semantic.to_tensor(value)], dtype=core.int32, is_pure=False, pack=1,
        _semantic=_semantic,
    )  # fmt: skip


@gluon.jit
def new_barrier():
    """An mbarrier of its own allocation: views of one array would alias, and each access would cost a bar.sync."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    return barrier


@gluon.jit
def new_barriers(BOXES: gl.constexpr):
    """An mbarrier for each box that half a block is loaded in."""
    if BOXES == 1:
        return (new_barrier(),)
    elif BOXES == 2:
        return (new_barrier(), new_barrier())
    else:
        return (new_barrier(), new_barrier(), new_barrier(), new_barrier())
