"""Hugging Face transformers: its MLA models attend over latents, in its own caches, ours, or continuous batching.

    from portable_mla.integrations import transformers as integration

    integration.patch(model)
    model.generate(ids, past_key_values=integration.LatentCache(model.config, pages=256))
    with integration.continuous_batching(model):
        model.generate_batch(prompts)

Importing this raises ImportError where transformers is missing or older than 5.15.
"""

from portable_mla.integrations.transformers.version import check_version

check_version()

from portable_mla.integrations.transformers.cache import LatentCache as LatentCache  # noqa: E402
from portable_mla.integrations.transformers.patching import continuous_batching as continuous_batching  # noqa: E402
from portable_mla.integrations.transformers.patching import patch as patch  # noqa: E402
from portable_mla.integrations.transformers.patching import unpatch as unpatch  # noqa: E402
