"""The merge of a decode's partial results in Triton."""
