"""The metadata layer: what a step looks like, in the forms that backends read."""

from portable_mla.metadata.batch import PagedBatch as PagedBatch
from portable_mla.metadata.decode import DecodeMetadata as DecodeMetadata
from portable_mla.metadata.decode import Form as Form
