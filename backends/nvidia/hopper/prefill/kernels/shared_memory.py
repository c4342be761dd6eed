"""The shared memory of the sm90 prefill kernel, and the item of work that the loader hands to the warpgroups."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from portable_mla.backends.nvidia.hopper.compat import aggregate
from portable_mla.backends.nvidia.hopper.kernels.ptx import synchronize

ROWS = gl.constexpr(128)  # query rows of an item
HALF = gl.constexpr(64)  # rows of one warpgroup
BOX = gl.constexpr(64)  # columns of the largest TMA box
STAGES = gl.constexpr(2)
ITEM_FIELDS = gl.constexpr(8)
ITEM_SLOTS = gl.constexpr(4)  # a warpgroup may be two items behind what is published, and reads its own again
ADDRESSES = gl.constexpr(16)  # at most


@aggregate
class PrefillRoom:
    """Everything in shared memory. Queries and keys come in parts of columns, as many as nope and rope need."""

    query: gl.tuple  # parts [2, 64, columns], one row tile a warpgroup
    keys: gl.tuple  # parts [STAGES, BLOCK_N, columns]
    values: gl.shared_memory_descriptor  # [STAGES, BLOCK_N, v_dim]
    query_full: gl.shared_memory_descriptor  # [2, 1], one a warpgroup
    keys_full: gl.shared_memory_descriptor  # [STAGES, 1]
    values_full: gl.shared_memory_descriptor
    items: gl.shared_memory_descriptor  # [ITEM_SLOTS, ITEM_FIELDS] int32
    addresses: gl.shared_memory_descriptor  # [ADDRESSES] int64: see `publish_addresses`

    @gluon.constexpr_function
    def __init__(self, query, keys, values, query_full, keys_full, values_full, items, addresses):
        self.query = query
        self.keys = keys
        self.values = values
        self.query_full = query_full
        self.keys_full = keys_full
        self.values_full = values_full
        self.items = items
        self.addresses = addresses


@aggregate
class PrefillSource:
    """What is loaded, each tensor as rows whose columns are all of its heads."""

    q: tma.tensor_descriptor  # box [64, 64]
    q_rope: tma.tensor_descriptor  # box [64, rope]
    k_nope: tma.tensor_descriptor  # box [BLOCK_N, 64]
    k_pe: tma.tensor_descriptor  # box [BLOCK_N, rope]
    v: tma.tensor_descriptor  # box [BLOCK_N, 64]
    stride_q_head: gl.tensor
    stride_k_head: gl.tensor
    stride_v_head: gl.tensor

    @gluon.constexpr_function
    def __init__(self, q, q_rope, k_nope, k_pe, v, stride_q_head, stride_k_head, stride_v_head):
        self.q = q
        self.q_rope = q_rope
        self.k_nope = k_nope
        self.k_pe = k_pe
        self.v = v
        self.stride_q_head = stride_q_head
        self.stride_k_head = stride_k_head
        self.stride_v_head = stride_v_head


@aggregate
class PrefillWork:
    """The batch, and how its row tiles are numbered: producers.py."""

    cu_seqlens_q_ptr: gl.tensor
    cu_seqlens_k_ptr: gl.tensor
    counter_ptr: gl.tensor
    batch: gl.tensor
    tokens: gl.tensor  # rows of q
    keys: gl.tensor  # rows of k_nope, k_pe and v
    slots: gl.tensor
    heads: gl.tensor
    head_group: gl.tensor

    @gluon.constexpr_function
    def __init__(self, cu_seqlens_q_ptr, cu_seqlens_k_ptr, counter_ptr, batch, tokens, keys, slots, heads, head_group):
        self.cu_seqlens_q_ptr = cu_seqlens_q_ptr
        self.cu_seqlens_k_ptr = cu_seqlens_k_ptr
        self.counter_ptr = counter_ptr
        self.batch = batch
        self.tokens = tokens
        self.keys = keys
        self.slots = slots
        self.heads = heads
        self.head_group = head_group


@aggregate
class PrefillResults:
    """Where results go; the field names are the kernel's arguments."""

    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    stride_out_token: gl.tensor
    stride_out_head: gl.tensor
    stride_lse_token: gl.tensor
    stride_lse_head: gl.tensor

    @gluon.constexpr_function
    def __init__(self, out_ptr, lse_ptr, stride_out_token, stride_out_head, stride_lse_token, stride_lse_head):
        self.out_ptr = out_ptr
        self.lse_ptr = lse_ptr
        self.stride_out_token = stride_out_token
        self.stride_out_head = stride_out_head
        self.stride_lse_token = stride_lse_token
        self.stride_lse_head = stride_lse_head


@aggregate
class PrefillItem:
    """Up to 128 query rows of one sequence and head, over the blocks of keys that they see."""

    head: gl.tensor  # -1 after the last item
    first_row: gl.tensor  # of q
    rows: gl.tensor
    blocks: gl.tensor  # at least one, so that a row that sees nothing needs no path of its own
    key_len: gl.tensor
    sees: gl.tensor  # keys that the first row sees; each next row sees one more where attention is causal
    first_key: gl.tensor  # of k_nope, k_pe and v

    @gluon.constexpr_function
    def __init__(self, head, first_row, rows, blocks, key_len, sees, first_key):
        self.head = head
        self.first_row = first_row
        self.rows = rows
        self.blocks = blocks
        self.key_len = key_len
        self.sees = sees
        self.first_key = first_key


@gluon.jit
def _new_part(DTYPE: gl.constexpr, COUNT: gl.constexpr, LENGTH: gl.constexpr, COLUMNS: gl.constexpr):
    """Tiles in the swizzle that TMA writes and wgmma reads."""
    swizzle: gl.constexpr = 128 if COLUMNS >= BOX else 2 * COLUMNS
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle, 16, rank=2)
    return gl.allocate_shared_memory(DTYPE, [COUNT, LENGTH, COLUMNS], layout)


@gluon.jit
def _new_parts(
    DTYPE: gl.constexpr, COUNT: gl.constexpr, LENGTH: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr
):  # fmt: skip
    """Parts of powers of two columns, nope's first."""
    if NOPE == 192:
        nope = (_new_part(DTYPE, COUNT, LENGTH, 128), _new_part(DTYPE, COUNT, LENGTH, 64))
    else:
        nope = (_new_part(DTYPE, COUNT, LENGTH, NOPE),)
    if ROPE:
        rope = (_new_part(DTYPE, COUNT, LENGTH, ROPE),)
        return nope + rope
    else:
        return nope


@gluon.jit
def _new_barriers():
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(2):
        mbarrier.init(barriers.index(index), count=1)
    return barriers


@gluon.jit
def new_prefill_room(
    DTYPE: gl.constexpr, BLOCK_N: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr, V_DIM: gl.constexpr
):  # fmt: skip
    """208 KB at 128 + 64 and 128 with 128 keys a block, of the 227 there are."""
    return PrefillRoom(
        _new_parts(DTYPE, 2, HALF, NOPE, ROPE), _new_parts(DTYPE, STAGES, BLOCK_N, NOPE, ROPE),
        _new_part(DTYPE, STAGES, BLOCK_N, V_DIM), _new_barriers(), _new_barriers(), _new_barriers(),
        gl.allocate_shared_memory(gl.int32, [ITEM_SLOTS, ITEM_FIELDS], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.int64, [ADDRESSES], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )  # fmt: skip


@gluon.jit
def publish_addresses(room, addresses):
    """Keep where the inputs are, before the warps part; in registers it would cost the warpgroups spills. addresses: of
    q, k_nope, k_pe and v, their strides from row to row, and from head to head of q, k_nope and v."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    field = gl.arange(0, ADDRESSES, layout)
    packed = gl.zeros([ADDRESSES], gl.int64, layout)
    for index in gl.static_range(len(addresses)):
        packed = gl.where(field == index, addresses[index].to(gl.int64), packed)
    room.addresses.store(packed)


@gluon.jit
def read_address(room, FIELD: gl.constexpr):
    """One of them."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(room.addresses.slice(FIELD, 1).load(layout), 0)


@gluon.jit
def publish_item(room, count, item):
    """Write the item where the warpgroups read it once query_full has come; the loader is one warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    field = gl.arange(0, ITEM_FIELDS, layout)
    packed = gl.where(field == 0, item.head, item.first_row)
    packed = gl.where(field == 2, item.rows, packed)
    packed = gl.where(field == 3, item.blocks, packed)
    packed = gl.where(field == 4, item.key_len, packed)
    packed = gl.where(field == 5, item.sees, packed)
    packed = gl.where(field == 6, item.first_key, packed)
    room.items.index(count % ITEM_SLOTS).store(packed)
    synchronize()


@gluon.jit
def _field(fields, FIELD: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(fields.slice(FIELD, 1).load(layout), 0)


@gluon.jit
def receive_item(room, count):
    """The item that was published `count` items after the first."""
    fields = room.items.index(count % ITEM_SLOTS)
    return PrefillItem(
        _field(fields, 0), _field(fields, 1), _field(fields, 2), _field(fields, 3), _field(fields, 4),
        _field(fields, 5), _field(fields, 6),
    )  # fmt: skip
