"""Backends, one file or folder each. The only import name is portable_mla.backends."""

if __name__ != "portable_mla.backends":
    raise ImportError(f"import portable_mla.backends, not {__name__}: two names would load every module twice")
