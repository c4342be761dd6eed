"""Row pointers and kv indices of a ragged batch."""
