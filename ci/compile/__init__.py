"""The compile gate: every kernel for every architecture, without a GPU."""
