"""The split plan: which program reads which part of which request's context, and its definition."""
