"""demo --hf: a small DeepSeek-V3 of transformers writes on from real text, with its own attention and with ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portable_mla.cli.demo import choose_device
from portable_mla.cli.report import Section

TEXT = Path(__file__).parent / "data" / "gettysburg_address.txt"
SOURCE = "Abraham Lincoln, the address at Gettysburg, 1863 (public domain)"
NEW_TOKENS = 24
PAGE_SIZE = 16

# DeepSeek-V3's attention widths, so that GPU kernels serve them, in a model of 4 layers that a CPU runs in seconds.
_MODEL: dict[str, Any] = {
    "vocab_size": 257,  # bytes, and padding
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": 192,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 256,
}


@dataclass(frozen=True)
class HfFigures:
    """What the comparison found."""

    facts: dict[str, object]

    @property
    def passed(self) -> bool:
        """Every token of both is the same; in bfloat16, where rounding decides between near ties, `patch` has compared
        every module, and the tokens are reported alone."""
        return bool(self.facts["identical_tokens"]) or self.facts["dtype"] != "float32"

    def section(self) -> Section:
        """For a person."""
        rows = [(name.replace("_", " "), str(value)) for name, value in self.facts.items()]
        verdict = "passed" if self.passed else "FAILED"
        return Section("Demo: DeepSeek-V3 of transformers", ("fact", "value"), (*rows, ("result", verdict)))


@torch.inference_mode()
def run_hf(device_name: str | None, seed: int) -> HfFigures:
    """Generate greedily from the text's paragraphs, left-padded into one batch, with eager attention over a
    DynamicCache and with ours over a LatentCache, on the CPU in float32 unless a device is named; on a GPU in bfloat16.
    Rates count the prompts' time too, after a warm-up; a CPU uses one thread, so that other load shows less.
    Raises ImportError where transformers is missing or too old, RuntimeError where a module differs from its own.
    """
    device = choose_device(device_name or "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return HfFigures(_compare(device.device, seed))
    finally:
        torch.set_num_threads(threads)


def _compare(device: str, seed: int) -> dict[str, object]:
    from portable_mla.integrations import transformers as integration

    model = _model(device, seed)
    paragraphs = [part.encode() for part in TEXT.read_text().strip().split("\n\n")]
    ids, mask = _left_padded(paragraphs, device)
    warm_up = ids[:, -8:], mask[:, -8:]
    _generate(model, *warm_up, _dynamic_cache(model), 2)
    stock_cache = _dynamic_cache(model)
    stock, stock_seconds = _timed(lambda: _generate(model, ids, mask, stock_cache, NEW_TOKENS))
    modules = integration.patch(model)
    longest = ids.shape[1] + NEW_TOKENS
    cache = integration.LatentCache(model.config, pages=len(paragraphs) * -(-longest // PAGE_SIZE), page_size=PAGE_SIZE)
    _generate(model, *warm_up, cache, 2)
    cache.reset()
    ours, our_seconds = _timed(lambda: _generate(model, ids, mask, cache, NEW_TOKENS))
    tokens = len(paragraphs) * NEW_TOKENS
    new = slice(ids.shape[1], None)
    alike = stock.sequences[:, new] == ours.sequences[:, new]
    logits = _same_prefix_difference(torch.stack(stock.logits), torch.stack(ours.logits), alike)
    config = model.config
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    expanded = config.num_attention_heads * widths * model.dtype.itemsize
    held, rows = stock_cache.layers, len(paragraphs) * stock_cache.get_seq_length()
    return {
        "text": f"{len(b''.join(paragraphs))} bytes in {len(paragraphs)} prompts: {SOURCE}",
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers_patched": modules,
        "tokens_generated": tokens,
        "identical_tokens": torch.equal(stock.sequences, ours.sequences),
        "tokens_alike_before_the_first_that_is_not": int(alike.long().cumprod(1).sum()),
        "largest_logit_difference_after_the_same_tokens_of_the_largest_logit": f"{logits:.1e}",
        "stock_cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in held),
        "stock_bytes_expanded_in_each_layer_each_step": rows * expanded,
        "our_cache_bytes_in_use": cache.memory()["in use"],
        "stock_tokens_per_second": round(tokens / stock_seconds, 1),
        "our_tokens_per_second": round(tokens / our_seconds, 1),
    }


def _same_prefix_difference(stock: Tensor, ours: Tensor, alike: Tensor) -> float:
    """Of logits [steps, prompts, vocabulary] that follow the same tokens: a step's is the last where its token is not
    alike [prompts, steps]."""
    before = torch.nn.functional.pad(alike.long().cumprod(1)[:, :-1], (1, 0), value=1).T.bool()
    difference = (ours.float() - stock.float()).abs().amax(2)
    return float(difference[before].max() / stock.float().abs().max())


def _model(device: str, seed: int) -> Any:
    from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**_MODEL)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = DeepseekV3ForCausalLM(config)
    return model.to(device, dtype).eval()


def _dynamic_cache(model: Any) -> Any:
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.config)


def _left_padded(prompts: list[bytes], device: str) -> tuple[Tensor, Tensor]:
    """Bytes as token ids and their mask, [prompts, longest] int64."""
    longest, padding = max(map(len, prompts)), int(_MODEL["pad_token_id"])
    ids = torch.tensor(
        [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device, dtype=torch.int64
    )
    return ids, (ids != padding).long()


def _generate(model: Any, ids: Tensor, mask: Tensor, cache: Any, new_tokens: int) -> Any:
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and seconds until it was there: token ids are read on the host at each step."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
