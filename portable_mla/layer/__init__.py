"""An MLA layer around the attention."""
