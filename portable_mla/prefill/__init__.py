"""Prefill over expanded keys and values, over cached contexts, and the merge of partial results."""
