"""DecodeMetadata: a decode step in the forms that backends read, and Needs: the forms that one of them reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from portable_mla.metadata.batch import PagedBatch
from portable_mla.metadata.ragged.forms import RaggedForms
from portable_mla.metadata.status import Status

if TYPE_CHECKING:  # the planner needs Triton, which a CPU may lack
    from portable_mla.metadata.split_plan.plan import PlanShape, SplitPlan


@dataclass(frozen=True)
class Needs:
    """The forms that a backend reads beside the batch itself; only those are built.

    split_plan: a split plan of this shape. query_indptr: row pointers of the queries. positions: of the query tokens; a
    split plan has them anyway. index_size: ragged kv indices of so many tokens each (the page size, a divisor of it, 1
    for token indices).
    """

    split_plan: PlanShape | None = None
    query_indptr: bool = False
    positions: bool = False
    index_size: int | None = None


@dataclass(slots=True)
class DecodeMetadata:
    """One decode step. A form that was not asked for is None. All buffers keep their addresses from step to step."""

    batch: PagedBatch
    status: Status
    split_plan: SplitPlan | None = None
    ragged: RaggedForms | None = None
    debug: bool = False  # kernels that read it assert on the device
    max_pages: int = 2**31 - 1  # page ids are below it
