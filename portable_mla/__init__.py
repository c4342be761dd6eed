"""portable_mla: Multi-head Latent Attention on every GPU that serves it, and on a CPU."""

from portable_mla.attention import MLAAttention as MLAAttention
from portable_mla.cache import PagedLatentCache as PagedLatentCache
from portable_mla.cache_format import CacheFormat as CacheFormat
from portable_mla.device import Arch as Arch
from portable_mla.device import arch_named as arch_named
from portable_mla.device import arch_of as arch_of
from portable_mla.dispatch import Explanation as Explanation
from portable_mla.dispatch import explain as explain
from portable_mla.dispatch import select as select
from portable_mla.errors import BackendError as BackendError
from portable_mla.errors import CacheFull as CacheFull
from portable_mla.errors import GraphCaptureError as GraphCaptureError
from portable_mla.errors import NoBackend as NoBackend
from portable_mla.errors import PlanMismatch as PlanMismatch
from portable_mla.errors import UnsupportedDevice as UnsupportedDevice
from portable_mla.metadata import PagedBatch as PagedBatch
from portable_mla.models import MODELS as MODELS
from portable_mla.models import Model as Model
from portable_mla.ops import mla_decode as mla_decode
from portable_mla.settings import Settings as Settings
from portable_mla.shape import Capacity as Capacity
from portable_mla.shape import MLAShape as MLAShape
from portable_mla.shape import Phase as Phase
from portable_mla.shape import Request as Request
