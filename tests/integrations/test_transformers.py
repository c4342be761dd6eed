"""The integration with transformers: the models' own logits and tokens are the reference."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install portable-mla[transformers]")
try:
    from portable_mla.integrations import transformers as integration
except ImportError as refusal:
    pytest.skip(str(refusal), allow_module_level=True)

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface

from portable_mla import (
    CacheFormat,
    Capacity,
    LayerGeometry,
    LayerStep,
    MLAAttention,
    MLALayer,
    PagedLatentCache,
    Yarn,
    rope_table,
    yarn_mscale,
)
from portable_mla.errors import CacheFull
from portable_mla.integrations.transformers.attention import attend
from portable_mla.integrations.transformers.paged import attend_paged
from portable_mla.integrations.transformers.patching import mla_modules
from portable_mla.integrations.transformers.version import check_continuous_batching, check_version
from tests.support.hf_models import FAMILIES, SPARSE, VOCABULARY, YARN, left_padded, tiny

LOGITS = 2**-14  # largest difference, of the largest logit: float32 sums of another order through two layers


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def model_of(family: str, device: str = "cpu", **changes: Any) -> Any:
    """A tiny model, or a skip where the installed transformers has none."""
    try:
        return tiny(family, device, **changes)
    except ImportError:
        pytest.skip(f"transformers {importlib.metadata.version('transformers')} has no {family}")


def pair_of(family: str, device: str = "cpu", **changes: Any) -> tuple[Any, Any]:
    """Two equal models, the second one patched and verified."""
    stock, ours = model_of(family, device, **changes), model_of(family, device, **changes)
    integration.patch(ours)
    return stock, ours


def difference(got: Tensor, wanted: Tensor) -> float:
    """Largest difference of logits, of the largest logit; asserts the bound."""
    error = float((got - wanted).abs().max() / wanted.abs().max())
    assert error <= LOGITS, f"logits differ by {error:.1e} of the largest"
    return error


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": 6, "do_sample": False} | options
    return model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, pad_token_id=0, **options
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_its_own_logits_and_tokens(family: str, device: str) -> None:
    stock, ours = pair_of(family, device)
    ids, mask = left_padded(device=device)
    wanted = generate(stock, ids, mask)
    cache = integration.LatentCache(ours.config, pages=24, page_size=4)
    for kind, got in (
        ("its own cache", generate(ours, ids, mask)),
        ("LatentCache", generate(ours, ids, mask, past_key_values=cache)),
    ):
        error = difference(torch.stack(got.logits), torch.stack(wanted.logits))
        assert torch.equal(got.sequences, wanted.sequences)
        print(f"{family}, {kind}: logits differ by {error:.1e}, tokens identical")
    real = mask.bool()
    difference(ours(ids, attention_mask=mask).logits[real], stock(ids, attention_mask=mask).logits[real])
    # 5 + 11 + 17 prompt tokens and 5 more each take pages of 4; left padding takes none
    pages = sum(-(-(length + 5) // 4) for length in (5, 11, 17))
    layers = ours.config.num_hidden_layers
    assert cache.memory() == {"in use": layers * pages * 4 * 48 * 4, "pool": layers * 24 * 4 * 48 * 4}


@pytest.mark.parametrize(
    "changes", [{"q_lora_rank": None}, {"rope_interleave": False}, {"rope_parameters": YARN}], ids=str
)
def test_the_kinds_of_deepseek_v3(changes: dict[str, Any], device: str) -> None:
    stock, ours = pair_of("deepseek_v3", device, **changes)
    ids, mask = left_padded(device=device)
    wanted = generate(stock, ids, mask)
    got = generate(ours, ids, mask, past_key_values=integration.LatentCache(ours.config, pages=24, page_size=4))
    difference(torch.stack(got.logits), torch.stack(wanted.logits))
    assert torch.equal(got.sequences, wanted.sequences)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_beam_search_and_a_static_cache(options: dict[str, Any], device: str) -> None:
    stock, ours = pair_of("deepseek_v3", device)
    ids, mask = left_padded(device=device)
    wanted = generate(stock, ids, mask, **options).sequences
    assert torch.equal(generate(ours, ids, mask, **options).sequences, wanted)
    if "num_beams" in options:
        cache = integration.LatentCache(ours.config, pages=200, page_size=4)
        assert torch.equal(generate(ours, ids, mask, past_key_values=cache, **options).sequences, wanted)


def test_a_prompt_in_chunks_gives_the_same_logits(device: str) -> None:
    stock, ours = pair_of("deepseek_v3", device)
    ids, _ = left_padded((17, 17), device)
    cache = integration.LatentCache(ours.config, pages=24, page_size=4)
    parts = [ours(part, past_key_values=cache).logits for part in ids.split([6, 10, 1], dim=1)]
    difference(torch.cat(parts, 1), stock(ids).logits)
    assert cache.get_seq_length() == 17
    cache.reset()
    assert cache.memory()["in use"] == 0
    difference(ours(ids, past_key_values=cache).logits, stock(ids).logits)


def test_a_latent_cache_serves_a_model_that_records_gradients_and_says_so(device: str) -> None:
    stock, ours = pair_of("deepseek_v3", device)
    ids, _ = left_padded((17, 17), device)
    cache = integration.LatentCache(ours.config, pages=24, page_size=4)
    with torch.enable_grad(), pytest.warns(UserWarning, match="LatentCache.attend was given"):
        parts = [ours(part, past_key_values=cache).logits for part in ids.split([16, 1], dim=1)]
    difference(torch.cat(parts, 1).detach(), stock(ids).logits)


@pytest.mark.parametrize("cached", [0, 4])
def test_the_pool_of_continuous_batching_never_requires_grad(cached: int) -> None:
    model = model_of("deepseek_v3")
    module = next(iter(mla_modules(model).values()))
    pool = torch.zeros(16, 1, 48)
    pages = SimpleNamespace(
        layer_index_to_group_indices={module.layer_idx: (0, 0)}, sliding_windows={module.layer_idx: 1},
        key_cache=[pool], value_cache=[torch.zeros_like(pool)], block_size=4,
    )  # fmt: skip
    tokens, new = torch.arange(cached + 3), torch.arange(cached, cached + 3)
    offsets, lens = (torch.tensor([0, n], dtype=torch.int32) for n in (3, cached + 3))
    with torch.enable_grad(), pytest.warns(UserWarning, match="attend_paged was given query"):
        query, key, value = (
            torch.randn(1, n, 3, width, requires_grad=True) for n, width in ((8, 40), (1, 32), (1, 16))
        )
        out, _ = attend_paged(
            module, query, key, value, None, 0.2, pages, write_index=[new], read_index=[tokens if cached else new[:0]],
            cu_seq_lens_q=offsets, cu_seq_lens_k=lens, max_seqlen_q=3, max_seqlen_k=cached + 3,
        )  # fmt: skip
    assert not out.requires_grad and not pool.requires_grad
    assert torch.equal(pool[new, 0, :32], key[0, 0])


def test_continuous_batching_generates_what_generate_does(device: str) -> None:
    try:
        check_continuous_batching()
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    stock, ours = pair_of("deepseek_v3", device)
    prompts = [[5, 9, 33, 8, 120], list(range(2, 19)), [7] * 9, list(range(40, 90))]
    before = ours.config.to_dict()
    with integration.continuous_batching(ours):
        results = ours.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(block_size=8, num_blocks=40, max_batch_tokens=32),
            progress_bar=False,
        )
    got = {tuple(result.prompt_ids): list(result.generated_tokens) for result in results.values()}
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        assert (
            got[tuple(prompt)]
            == generate(stock, ids, torch.ones_like(ids), max_new_tokens=10).sequences[0, len(prompt) :].tolist()
        )
    assert ours.config.to_dict() == before


def test_continuous_batching_refuses_what_it_would_get_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = model_of("deepseek_v3")
    with pytest.raises(ValueError, match="is not patched"), integration.continuous_batching(stock):
        pass
    integration.patch(stock)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "5.18.0")
    with (
        pytest.raises(NotImplementedError, match=r"5\.15 to 5\.17, got 5\.18\.0"),
        integration.continuous_batching(stock),
    ):
        pass
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "5.17.3")
    stock.config.rope_parameters = {"rope_type": "longrope"}
    with pytest.raises(NotImplementedError, match="'longrope'"), integration.continuous_batching(stock):
        pass


def test_unpatching_leaves_no_trace() -> None:
    model = model_of("deepseek_v3")
    ids, mask = left_padded()
    before, config = model(ids, attention_mask=mask).logits, model.config.to_dict()
    assert integration.patch(model) == 2
    assert model.config.to_dict() == config, "a saved config must not name this library"
    integration.unpatch(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    with pytest.raises(ValueError, match="is not patched"):
        integration.unpatch(model)


def test_gradients_are_those_of_the_model(device: str) -> None:
    stock, ours = pair_of("deepseek_v3", device)
    ids, _ = left_padded((17, 17), device)
    for model in (stock, ours):
        with torch.enable_grad():
            torch.autograd.backward(model(ids, labels=ids).loss)
    wanted = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - wanted[name].grad).norm() / wanted[name].grad.norm().clamp_min(1e-6)
            assert error <= 1e-4, f"{name}: gradients differ by {error:.1e}"


def test_a_compiled_decode_is_one_graph(device: str) -> None:
    stock, ours = pair_of("deepseek_v3", device)
    ids, _ = left_padded((17, 17), device)
    caches = [StaticCache(config=stock.config, max_cache_len=32) for _ in range(2)]
    logits = stock(ids, past_key_values=caches[0]).logits
    ours(ids, past_key_values=caches[1])
    token, position = logits[:, -1:].argmax(-1), torch.full((2, 1), 17, device=device)
    compiled: Any = torch.compile(ours.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    got = compiled(token, position_ids=position, past_key_values=caches[1]).logits
    difference(got, stock(token, position_ids=position, past_key_values=caches[0]).logits)


# Traps: each of these was silently wrong with a plain attention function.


def test_without_a_mask_function_it_refuses_to_see_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair_of("deepseek_v3")
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, "portable_mla")
    with pytest.raises(ValueError, match="attention_mask: expected .* got None; a mask function is registered"):
        ours(left_padded()[0])


@pytest.mark.parametrize("family", SPARSE)
def test_sparse_models_are_refused_and_not_made_dense(family: str) -> None:
    model = model_of(family, index_topk=8, index_n_heads=2, index_head_dim=32)
    with pytest.raises(NotImplementedError, match="dense MLA alone"):
        integration.patch(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "keyword", [{"indices": torch.zeros(1)}, {"s_aux": torch.zeros(1)}, {"softcap": 30.0}, {"sliding_window": 8},
                {"output_attentions": True}, {"is_causal": False}, {"cu_seq_lens_q": torch.zeros(1)}], ids=str
)  # fmt: skip
def test_keywords_with_a_meaning_are_refused_by_name(keyword: dict[str, Any]) -> None:
    (module, *_) = mla_modules(model_of("deepseek_v3")).values()
    q, latent, k_pe, mask = (
        torch.zeros(1, 8, 3, 40),
        torch.zeros(1, 1, 3, 32),
        torch.zeros(1, 1, 3, 16),
        torch.zeros(1, 1, 3, 3),
    )
    attend(module, q, latent, k_pe, mask, scaling=1.0, position_ids=torch.zeros(1))
    (name,) = keyword
    if keyword == {"is_causal": False}:
        attend(module, q, latent, k_pe, mask, scaling=1.0, **keyword)  # the mask says so already
        return
    with pytest.raises(NotImplementedError, match=f"^{name}: "):
        attend(module, q, latent, k_pe, mask, scaling=1.0, **keyword)


def test_masks_that_pages_cannot_serve_are_refused() -> None:
    _, ours = pair_of("deepseek_v3")
    ids, mask = left_padded((17, 9))
    for wrong in (mask.flip(1), mask.clone().index_fill_(1, torch.tensor([12]), 0)):
        with pytest.raises(ValueError, match="padding on the left alone"):
            ours(ids, attention_mask=wrong, past_key_values=integration.LatentCache(ours.config, pages=24))


def test_verify_finds_a_module_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("deepseek_v3")
    module = model.model.layers[1].self_attn
    monkeypatch.setattr(
        "portable_mla.integrations.transformers.attention.softmax_scale_of", lambda _, scaling: scaling * 1.01
    )
    with pytest.raises(RuntimeError, match=r"self_attn: differs from the unpatched module by "):
        integration.patch(model)
    assert model.config._attn_implementation == "eager"
    assert "expand_kv" not in vars(module)


def test_a_latent_cache_says_what_is_wrong() -> None:
    stock, ours = pair_of("deepseek_v3")
    ids, _ = left_padded((17, 17))
    config = ours.config
    with pytest.raises(RuntimeError, match="a LatentCache serves patched models"):
        stock(ids, past_key_values=integration.LatentCache(config, pages=24))
    with pytest.raises(CacheFull):
        ours(ids, past_key_values=integration.LatentCache(config, pages=3, page_size=8))
    with pytest.raises(ValueError, match="pages, page_size: expected at least 1, got 0 and 64"):
        integration.LatentCache(config, pages=0)
    with pytest.raises(NotImplementedError, match="assisted generation"):
        integration.LatentCache(config, pages=3).crop(-1)
    with pytest.raises(ValueError, match="expected MLA modules"):
        integration.patch(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("version", ["5.14.9", "4.57.1", "5.14.0.dev0"])
def test_an_older_transformers_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(ImportError, match=f"needs transformers 5.15 or newer .* got {version}"):
        check_version()


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "longcat_flash", "minicpm3"])
def test_mlalayer_loads_a_module_and_is_it(family: str) -> None:
    changes: dict[str, Any] = {"rope_parameters": YARN} if family == "deepseek_v3" else {}
    model = model_of(family, **changes)
    module = next(iter(mla_modules(model).values()))
    geometry = LayerGeometry(
        64, 8, 32, 16, 24, 20, module.scaling, 24, "half" if family == "minicpm3" else "interleaved",
        q_factor=getattr(module, "mla_scale_q_lora", 1.0), latent_factor=getattr(module, "mla_scale_kv_lora", 1.0),
        norm_eps=module.kv_a_layernorm.variance_epsilon,
    )  # fmt: skip
    layer = MLALayer(geometry)
    layer.load_state_dict(module.state_dict())
    assert layer.state_dict().keys() == module.state_dict().keys()
    hidden = torch.randn(1, 19, 64, generator=torch.Generator().manual_seed(3))
    angles = model.model.rotary_emb(hidden, torch.arange(19)[None])
    cos, sin = (angles.real, angles.imag) if isinstance(angles, Tensor) else angles
    yarn = Yarn(4.0, 128) if changes else None
    table = rope_table(19, 16, theta=model.config.rope_parameters["rope_theta"], yarn=yarn)
    torch.testing.assert_close(torch.cat([cos[0, :, :8], sin[0, :, :8]], 1), table, rtol=0, atol=2e-6)
    mask = torch.full((19, 19), torch.finfo(torch.float32).min).triu(1)[None, None]
    wanted = module(hidden, position_embeddings=angles, attention_mask=mask)[0][0]
    shape = geometry.shape(torch.float32, CacheFormat.fp32, page_size=4)
    cache = PagedLatentCache(shape, 8)
    cache.allocate("a", 19)
    attention = MLAAttention(shape, Capacity(1, 19, 19, 32, 8), device="cpu")
    batch = cache.batch(["a"], max_query_len=19)
    attention.plan(batch)
    got = layer(hidden[0], cache[0], LayerStep.of(attention, batch, 19, table))
    error = float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
    print(f"{family}: worst row differs by {error:.1e}")
    assert error <= 2**-15
    if changes:
        assert module.scaling == pytest.approx(40**-0.5 * yarn_mscale(4.0) ** 2)


def test_the_stock_cache_holds_as_much_as_ours_uses(device: str) -> None:
    _, ours = pair_of("deepseek_v3", device)
    ids, _ = left_padded((16, 16), device)
    stock_cache, cache = DynamicCache(config=ours.config), integration.LatentCache(ours.config, pages=8, page_size=8)
    for kind in (stock_cache, cache):
        ours(ids, past_key_values=kind)
    layers: list[Any] = stock_cache.layers
    assert cache.memory()["in use"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert ours.config.vocab_size == VOCABULARY


@pytest.mark.gpu
def test_gpu_kernels_serve_a_model_of_deepseeks_widths() -> None:
    widths = {
        "kv_lora_rank": 512, "q_lora_rank": 192, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "head_dim": 64, "hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 16,
        "initializer_range": 0.05, "first_k_dense_replace": 2,
    }  # fmt: skip
    stock, ours = (model_of("deepseek_v3", "cuda", **widths).bfloat16() for _ in range(2))
    integration.patch(ours)
    ids, _ = left_padded((40, 40), "cuda")
    cache = integration.LatentCache(ours.config, pages=8, page_size=64)
    got = torch.cat([ours(part, past_key_values=cache).logits for part in ids.split([30, 6, 1, 1, 1, 1], dim=1)], 1)
    wanted, exact = stock(ids).logits.double(), stock.float()(ids).logits.double()
    error, stocks = ((one.double() - exact).norm() / exact.norm() for one in (got, wanted))
    print(f"error {error:.1e} against float32, stock's own {stocks:.1e}, served by {cache.backend}")
    assert cache.backend not in (None, "reference", "cpu")
    assert error <= 2 * stocks


class Adapter(torch.nn.Module):
    """A change on top of a linear layer, as adapters are."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """Twice the base."""
        doubled: Tensor = 2 * self.base(x)
        return doubled


def test_an_adapter_that_is_put_on_after_patching_is_refused_and_not_left_out() -> None:
    model = model_of("deepseek_v3")
    integration.patch(model)
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj = Adapter(attention.kv_b_proj)
    ids = torch.randint(1, VOCABULARY, (1, 5))
    with pytest.raises(NotImplementedError, match=r"kv_b_proj.*got tests?\.?.*Adapter"):
        model(input_ids=ids)
    integration.unpatch(model)
    assert model(input_ids=ids).logits.isfinite().all()


def test_an_adapted_model_is_refused_with_the_path_of_the_adapters_class() -> None:
    model = model_of("deepseek_v3")
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj = Adapter(attention.kv_b_proj)
    with pytest.raises(NotImplementedError, match=r"kv_b_proj: expected a plain torch.nn.Linear.*test_transformers"):
        integration.patch(model)


def test_a_patch_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("deepseek_v3")
    before = model.config._attn_implementation
    set_implementation = type(model).set_attn_implementation

    def fail(self: Any, name: Any) -> None:
        if name != before:
            raise RuntimeError("no")
        set_implementation(self, name)

    monkeypatch.setattr(type(model), "set_attn_implementation", fail)
    with pytest.raises(RuntimeError, match="no"):
        integration.patch(model)
    monkeypatch.undo()
    assert not any("expand_kv" in module.__dict__ for module in model.modules())
    assert integration.patch(model) > 0


@pytest.mark.parametrize("size", [2, 4, 6])
def test_chunks_that_are_padding_alone_give_the_tokens_of_a_whole_prompt(size: int) -> None:
    model = model_of("deepseek_v3")
    ids, mask = left_padded((3, 11))
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **options)
    integration.patch(model)
    cache = integration.LatentCache(model.config, pages=64, page_size=4)
    assert torch.equal(model.generate(ids, past_key_values=cache, prefill_chunk_size=size, **options), wanted)


def test_a_full_pool_changes_nothing_and_the_step_can_be_tried_again() -> None:
    model = model_of("deepseek_v3")
    integration.patch(model)
    cache = integration.LatentCache(model.config, pages=4, page_size=4)
    ids, mask = left_padded((5, 8))
    model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    used = cache.memory()
    with pytest.raises(CacheFull):
        cache.batch_repeat_interleave(2)
    assert cache.memory() == used
    more = torch.cat([mask, torch.ones(2, 8, dtype=mask.dtype)], dim=1)
    for _ in range(2):
        with pytest.raises(CacheFull):
            model(input_ids=ids, attention_mask=more, past_key_values=cache)
        assert cache.get_seq_length() == 8 and cache.memory() == used
    cache.reset()
    assert cache.memory()["in use"] == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_last_token_that_sees_nothing_is_no_left_padding_where_others_see_keys(dtype: torch.dtype) -> None:
    from portable_mla.integrations.transformers.masks import padding_of

    seen = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    seen[1, 0, 2] = False  # padding on the right
    mask = seen if dtype == torch.bool else torch.zeros(2, 1, 3, 3).masked_fill(~seen, -torch.inf)
    with pytest.raises(ValueError, match="attention_mask: request 1: .*padding on the left alone"):
        padding_of(mask, 3, 3)
    assert padding_of(mask[:1], 3, 3) == [0]
    assert padding_of(torch.zeros(1, 1, 3, 3, dtype=torch.bool), 3, 3) == [3]
