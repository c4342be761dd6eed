"""The metadata layer: what a step looks like, in the forms that backends read."""

from portable_mla.metadata.batch import PagedBatch as PagedBatch
from portable_mla.metadata.buffers import DecodeBuffers as DecodeBuffers
from portable_mla.metadata.decode_metadata import DecodeMetadata as DecodeMetadata
from portable_mla.metadata.decode_metadata import Needs as Needs
from portable_mla.metadata.status import Limits as Limits
from portable_mla.metadata.status import Status as Status
