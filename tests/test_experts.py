"""Routers and stacked experts become linear layers, keep the function, and are smoothed, rotated and served in INT8."""

import json
import types

import pytest
import torch
import transformers
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from calibration.checkpoint.verify import verify
from calibration.discovery.discover import discover
from calibration.discovery.rotations import find_rotations
from calibration.observation.absmax import needed_absmax, observe_absmax, with_idle_experts
from calibration.pipeline import calibrate
from calibration.report.page import report
from calibration.running.modules import plain_kernels
from calibration.running.products import (
    ProductLinear,
    chosen_experts,
    every_expert,
    expert_blocks,
    make_linear,
    stored_experts,
)
from calibration.smoothing.choose_rotation import rotation_of
from calibration.smoothing.factors import smooth_groups
from calibration.smoothing.gate import check_equivalence
from calibration.smoothing.rotation_gate import check_rotation
from tests.helpers import engine, tiny_architectures, tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.config import SmoothQuantVllmConfig
from vllm_smoothquant.experts.four_bits import OurFourBitExperts
from vllm_smoothquant.format import int4, int8
from vllm_smoothquant.format.config import InputActivations, Scheme, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import quantised_layers, read_headers, read_tensors
from vllm_smoothquant.kernels import build, ops

# Architectures whose files have one matrix for each expert.
ONE_BY_ONE = (
    "mixtral", "qwen2-moe", "qwen3-moe", "glm4-moe", "olmoe", "phimoe", "jamba", "deepseek-v2", "deepseek-v3",
    "qwen3-next",
)  # fmt: skip
STACKED = ("granite-moe", "gpt-oss")
# Its router is a class of linear layer with another forward, so that the norm before it is not folded.
OWN_ROUTER = ("phimoe",)
# Its router is a linear layer as any other.
LINEAR_ROUTER = ("jamba",)


def linear(name):
    """The tiny model `name` with outliers in its norms, its experts as linear layers; the logits that it had before."""
    model, ids = tiny_architectures.build(name), tiny_architectures.tokens(2)
    with torch.no_grad(), plain_kernels(model):
        before = model(input_ids=ids, use_cache=False).logits
    make_linear(model)
    return model, ids, before


@pytest.mark.parametrize("name", list(tiny_architectures.ZOO))
def test_the_function_stays_the_same_bit_for_bit(name):
    model, ids, before = linear(name)
    with torch.no_grad(), plain_kernels(model):
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before, rtol=0, atol=0, equal_nan=True)
    assert bool(expert_blocks(model)) == (name in ONE_BY_ONE)
    routers = [m for m in model.modules() if isinstance(m, ProductLinear) and "experts." not in m.file_name]
    assert bool(routers) == (name in (*ONE_BY_ONE, *STACKED) and name not in OWN_ROUTER + LINEAR_ROUTER), (
        "also of stacked"
    )
    assert all(isinstance(m.weight, torch.nn.Parameter) for m in model.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_every_expert_runs_and_the_function_stays(name):
    model, ids, before = linear(name)
    ran = set()
    layers = {n for block in expert_blocks(model).values() for expert in block for n in expert}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(lambda *_, layer=layer: ran.add(layer))
    with torch.no_grad(), plain_kernels(model), every_expert(model):
        after = model(input_ids=ids, use_cache=False).logits
    assert ran == layers
    # The outputs of more experts are added, those that were not chosen times zero.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6 * float(before.abs().max()))


@pytest.mark.parametrize("name", [name for name in ONE_BY_ONE if name not in OWN_ROUTER])
def test_all_experts_and_the_router_follow_the_norm(name):
    model, ids, _ = linear(name)
    graph = discover(model, ids)
    for block, experts in expert_blocks(model).items():
        (group,) = (g for g in graph.groups if experts[0][0] in {r.name for r in g.readers})
        readers = {reader.name for reader in group.readers}
        assert group.kind == "norm"
        assert group.foldable.all()
        assert {layer for expert in experts for layer in expert[:2]} <= readers
        routers = [model.get_submodule(reader) for reader in readers if not reader.startswith(f"{block}.")]
        assert any(isinstance(router, ProductLinear) or name in LINEAR_ROUTER for router in routers)
        for _, up, down in experts:
            (inner,) = (g for g in graph.groups if g.source == up)
            assert [reader.name for reader in inner.readers] == [down]


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_smoothing_keeps_the_function_and_the_routing(name):
    model, ids, _ = linear(name)
    graph = discover(model, ids)
    layers = [linear.name for linear in graph.linears]
    absmax = observe_absmax(model, needed_absmax(graph, layers), ids)
    smoothing = smooth_groups(model, graph, absmax, {group.source: 0.5 for group in graph.groups}, layers)
    report = check_equivalence(smoothing, [ids])
    assert report["logits"]["change"] <= 1e-4


def test_another_routing_is_refused():
    """A fold that the router does not follow changes which experts a token gets."""
    model, ids, _ = linear("mixtral")
    graph = discover(model, ids)
    layers = [linear.name for linear in graph.linears]
    absmax = observe_absmax(model, needed_absmax(graph, layers), ids)
    alphas = {g.source: 0.5 for g in graph.groups if "post_attention" in g.source}
    smoothing = smooth_groups(model, graph, absmax, alphas, layers)
    factors = smoothing.parameters

    def forget(name):
        return model.get_submodule(name).state_dict() if name.endswith("gate.weight.gate") else factors(name)

    object.__setattr__(smoothing, "parameters", forget)
    with pytest.raises(SmoothQuantError, match=r"the same function: .*gate\.weight\.gate"):
        check_equivalence(smoothing, [ids])


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_rotation_keeps_the_function(name):
    model, ids, _ = linear(name)
    model.config.tie_word_embeddings = False
    graph = find_rotations(model, ids)
    if "stream" not in graph.sizes:
        assert graph.refusals
        return
    report = check_rotation(rotation_of(graph, model), [ids])
    assert report["logits"] <= 1e-4


def test_an_expert_that_no_token_reached_takes_the_maxima_of_the_others():
    model, _, _ = linear("qwen3-moe")
    block = next(iter(expert_blocks(model).values()))
    absmax = {name: torch.full((4,), float(i)) for i, expert in enumerate(block[:-1]) for name in expert}
    filled = with_idle_experts(model, absmax)
    assert all(torch.equal(filled[name], absmax[block[-2][0]]) for name in block[-1])
    assert all(filled[name] is absmax[name] for name in absmax)


def test_files_have_one_matrix_for_each_expert(tmp_path):
    model, text = tiny_checkpoints.save("mixtral", tmp_path / "model"), tiny_checkpoints.save_text(tmp_path / "t.jsonl")
    size = {"samples": 4, "seq_len": tiny_checkpoints.SEQ_LEN, "quiet": True}
    calibrate(str(model), tmp_path / "out", dataset=str(text), level="O3", weights="channel", rotation="none", **size)
    assert not verify(tmp_path / "out", str(model)).faults
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert quantization["experts"] == {"num_bits": 8, "strategy": "token", "dynamic": True}
    headers = read_headers(tmp_path / "out")
    experts = [name for name in quantised_layers(headers) if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert not any(f"{name}.input_scale" in headers for name in experts), "static scales are for other layers only"
    source, stored = dict(read_tensors(model)), dict(read_tensors(tmp_path / "out"))
    ratios = [stored[f"{n}.weight"].float() * stored[f"{n}.weight_scale"] / source[f"{n}.weight"] for n in experts]
    assert all(torch.isfinite(r).float().mean() > 0.9 for r in ratios)


def test_an_ignored_expert_keeps_its_whole_block_in_floating_point(tmp_path):
    """vLLM computes the experts of a block at once."""
    model, text = tiny_checkpoints.save("mixtral", tmp_path / "model"), tiny_checkpoints.save_text(tmp_path / "t.jsonl")
    size = {"samples": 4, "seq_len": tiny_checkpoints.SEQ_LEN, "quiet": True, "rotation": "none"}
    ignore = ["model.layers.0.mlp.experts.down_proj.3.*"]
    manifest = calibrate(str(model), tmp_path / "out", dataset=str(text), ignore=ignore, **size)
    assert len([name for name in manifest["kept"] if ".experts." in name]) == 4 * 3
    assert not verify(tmp_path / "out", str(model)).faults


def test_experts_do_not_fall_back(tmp_path):
    """vLLM computes those of a block at once; the layers beside them do."""
    model, text = tiny_checkpoints.save("mixtral", tmp_path / "model"), tiny_checkpoints.save_text(tmp_path / "t.jsonl")
    size = {"samples": 4, "seq_len": tiny_checkpoints.SEQ_LEN, "quiet": True, "rotation": "none"}
    manifest = calibrate(str(model), tmp_path / "out", dataset=str(text), max_fallback=0.9, **size)
    assert manifest["fallen_back"]
    assert not any(".experts." in name for name in manifest["fallen_back"])


def test_a_block_with_some_experts_in_int8_is_refused_by_the_plugin():
    names = [f"model.layers.0.mlp.experts.{i}.down_proj" for i in range(2)]
    per_token = {"num_bits": 8, "strategy": "token", "dynamic": True}
    entry = {
        "quant_method": "smoothquant", "format_version": 2, "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": per_token, "experts": per_token, "ignore": names[:1],
    }  # fmt: skip
    read = SmoothQuantVllmConfig.from_config(entry)
    read.tensors = read.quantised = frozenset(names[1:])
    with pytest.raises(SmoothQuantError, match=r"all experts of .* in integers or none"):
        read._experts_method(torch.nn.Module(), "model.layers.0.mlp.experts")


def test_the_report_shows_experts_in_one_picture(tmp_path):
    """Load and error of each expert; their channels share the pictures of a kind."""
    model, text = tiny_checkpoints.save("olmoe", tmp_path / "model"), tiny_checkpoints.save_text(tmp_path / "t.jsonl")
    size = {"samples": 4, "seq_len": tiny_checkpoints.SEQ_LEN, "quiet": True, "rotation": "none"}
    manifest = calibrate(str(model), tmp_path / "out", dataset=str(text), alpha="auto", **size)
    blocks = manifest["experts"]
    assert [sum(entry["load"]) for entry in blocks.values()] == [2 * 4 * tiny_checkpoints.SEQ_LEN] * 2
    figures = report(tmp_path / "out", tmp_path / "page.html")["figures"]
    assert "experts" in figures
    assert len(figures) < 12


def test_names_of_experts_without_running_the_model():
    with torch.device("meta"):
        model = tiny_architectures.build("mixtral")
    names = stored_experts(model)
    assert len(names) == 2 * 4 * 3
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in names


def test_a_call_without_chosen_experts_is_an_error():
    with pytest.raises(SmoothQuantError, match="expected the chosen experts and their weights"):
        chosen_experts((torch.ones(3, 4),), {})


# --- the product ---


def experts_reference(x, w13, s13, w2, s2, chosen, weights, act, b13=None, b2=None):
    """Each token and each of its experts, one after the other, by int8.linear_reference."""
    y = torch.zeros(len(x), w2.shape[1], dtype=torch.float64)
    inner = w2.shape[2]
    for t in range(len(x)):
        for e, weight in zip(chosen[t].tolist(), weights[t].tolist(), strict=True):
            if e < 0:
                continue
            bias = None if b13 is None else b13[e]
            both = int8.linear_reference(x[t : t + 1].float(), w13[e], s13[e][:, None], strategy="token", bias=bias)
            hidden = act(both[:, :inner]) * both[:, inner:]
            bias = None if b2 is None else b2[e]
            y[t] += weight * int8.linear_reference(hidden, w2[e], s2[e][:, None], strategy="token", bias=bias)[0]
    return y


ACTIVATIONS = [
    torch.nn.functional.silu,
    torch.nn.functional.gelu,
    lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
]


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", range(3))
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts", "choices"), [(1, 64, 48, 4, 2), (37, 100, 36, 8, 3), (600, 33, 17, 5, 1)]
)
def test_our_product_equals_the_reference(dtype, activation, tokens, hidden, inner, experts, choices):
    """Integers are exact, so that float32 differs by the rounding of a few operations; two halves of a batch as well.

    exp, erf and tanh differ by some units in the last place, which may move a hidden value across a rounding tie.
    """
    generator = torch.Generator().manual_seed(0)

    def integers(*shape):
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)

    w13, w2 = integers(experts, 2 * inner, hidden), integers(experts, hidden, inner)
    s13, s2 = (torch.rand(w.shape[:2], generator=generator) * 1e-2 + 1e-3 for w in (w13, w2))
    b13, b2 = (torch.randn(s.shape, generator=generator) for s in (s13, s2))
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :choices].int()
    chosen[0, -1] = -1
    weights = torch.rand(tokens, choices, generator=generator)
    sums = [w.sum(2, dtype=torch.int32) for w in (w13, w2)]
    got = ops.int8_experts(x, w13, s13, sums[0], b13, w2, s2, sums[1], b2, chosen, weights, activation)
    assert got.dtype == dtype
    expected = experts_reference(x, w13, s13, w2, s2, chosen, weights, ACTIVATIONS[activation], b13, b2)
    error = (got.double() - expected).abs().amax(1) / expected.abs().amax()
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert (error < rounding).float().mean() > 0.97
    assert error.max() < rounding + 1e-3, "one step of one hidden value"


def test_no_tokens_give_no_rows():
    w13, w2 = torch.zeros(2, 8, 16, dtype=torch.int8), torch.zeros(2, 16, 4, dtype=torch.int8)
    scales = [torch.ones(w.shape[:2]) for w in (w13, w2)]
    sums = [w.sum(2, dtype=torch.int32) for w in (w13, w2)]
    empty = torch.empty(0, 16), torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2)
    got = ops.int8_experts(empty[0], w13, scales[0], sums[0], None, w2, scales[1], sums[1], None, *empty[1:], 0)
    assert got.shape == (0, 16)


# --- the method for 4-bit experts on x86 ---


def four_bit_block(group_size, experts=4, inner=64, hidden=96, num_bits=16, **attributes):
    """(A block as vLLM builds it, its method, the real weights of w13 and w2), loaded through vLLM's parameters."""
    generator = torch.Generator().manual_seed(3)
    layer = torch.nn.Module()
    layer.moe_config = types.SimpleNamespace(has_bias=False)
    layer.activation, layer.expert_map, layer.apply_router_weight_on_input = MoEActivation.SILU, None, False
    for name, value in attributes.items():
        setattr(layer, name, value)

    def copy(param, loaded, name, shard_id, expert_id, return_success=False):
        rows = {"w1": slice(0, inner), "w3": slice(inner, 2 * inner), "w2": slice(None)}[shard_id]
        param.data[expert_id, rows] = loaded

    scheme = Scheme(Weights("group", group_size, num_bits=4), InputActivations(num_bits=num_bits))
    method = OurFourBitExperts("model.layers.0.mlp.experts", scheme, layer, lambda: None)
    method.create_weights(layer, experts, hidden, inner, torch.float32, weight_loader=copy)
    real = {}
    for expert in range(experts):
        for shard, (name, shape) in {
            "w1": ("w13", (inner, hidden)), "w3": ("w13", (inner, hidden)), "w2": ("w2", (hidden, inner)),
        }.items():  # fmt: skip
            weight = torch.randn(shape, generator=generator) * 0.1
            scale = int4.group_scale(weight, group_size)
            q = int4.quantize(weight, scale)
            real[expert, shard] = int4.dequantize(q, scale)
            for suffix, tensor in (("weight_packed", int4.pack(q)), ("weight_scale", scale)):
                parameter = getattr(layer, f"{name}_{suffix}")
                parameter.weight_loader(parameter, tensor, f"{shard}.{suffix}", shard, expert)
    return layer, method, real


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("num_bits", [16, 8])
def test_our_4_bit_experts_equal_the_reference(dtype, on_input, num_bits):
    """Half of eight experts are on another rank."""
    places = torch.tensor([-1, 0, -1, 1, 2, -1, 3, -1])
    layer, method, real = four_bit_block(
        32, num_bits=num_bits, expert_map=places, apply_router_weight_on_input=on_input
    )

    def rounded(values):
        if num_bits == 16:
            return values
        scale = int8.input_scale(values.float()[None], "token")
        return int8.quantize(values.float()[None], scale)[0].double() * scale.double()[0]

    method.process_weights_after_loading(layer)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(37, 96, generator=generator).to(dtype)
    choices = 1 if on_input else 3
    chosen = torch.rand(37, 8, generator=generator).argsort(1)[:, :choices]
    weights = torch.rand(37, choices, generator=generator)
    y = method.apply(layer, x, weights, chosen, None, None)
    expected = torch.zeros(37, 96, dtype=torch.float64)
    for token in range(37):
        for expert, weight in zip(places[chosen[token]].tolist(), weights[token].double(), strict=True):
            if expert >= 0:
                row = rounded(x[token] * weight.to(dtype) if on_input else x[token]).double()
                gate, up, down = (real[expert, shard].double() for shard in ("w1", "w3", "w2"))
                hidden_values = torch.nn.functional.silu(row @ gate.t()) * (row @ up.t())
                out = rounded(hidden_values.to(dtype)).double() @ down.t()
                expected[token] += out if on_input else weight * out
    assert y.dtype == dtype
    # Float32 sums; in bfloat16 the hidden values are rounded as well.
    torch.testing.assert_close(
        y.double(), expected, rtol=0, atol=float(expected.abs().max()) * torch.finfo(dtype).eps * 4
    )
    assert method.apply(layer, x[:0], weights[:0], chosen[:0], None, None).shape == (0, 96)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: method.apply(layer, x, weights, chosen, None, None), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), y)
    parts = [getattr(layer, f"{name}_{part}") for name in ("w13", "w2") for part in ("weight_packed", "weight_scale")]
    arguments = (x, *parts[:2], None, *parts[2:], None, places[chosen].int(), weights, 0, num_bits == 8)
    results = torch.library.opcheck(ops.int4_experts, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def test_a_damaged_block_of_4_bit_experts_is_refused():
    layer, method, _ = four_bit_block(32)
    scale = layer.w13_weight_scale
    for value, message in ((0.0, "expected finite values other than zero"), (float("nan"), "expected finite")):
        with pytest.raises(SmoothQuantError, match=message):
            scale.weight_loader(scale, torch.full((64, 3), value), "w1.weight_scale", "w1", 2)
    packed = layer.w2_weight_packed
    with pytest.raises(SmoothQuantError, match=r"expected torch\.int32, got torch\.int8"):
        packed.weight_loader(packed, torch.zeros(96, 8, dtype=torch.int8), "w2.weight_packed", "w2", 0)
    method.loading.loaded["w2_weight_packed"].discard((3, "w2"))
    with pytest.raises(SmoothQuantError, match="a matrix and a scale for each expert, got none for expert 3"):
        method.process_weights_after_loading(layer)
    with pytest.raises(SmoothQuantError, match=r"inputs of each rank.s experts in groups of 64.*got 32 inputs"):
        four_bit_block(64, inner=32, hidden=128)


# --- served ---


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny INT8 checkpoint of Qwen3-MoE, rotated; prompts; their log-probabilities by the plain reference.

    Static outside the experts, because two ranks measure two dynamic scales, one for each half of a row.
    """
    folder = tmp_path_factory.mktemp("mixture")
    model, text = (
        tiny_checkpoints.save("qwen3-moe", folder / "model"),
        tiny_checkpoints.save_text(folder / "text.jsonl"),
    )
    size = {"samples": 4, "seq_len": tiny_checkpoints.SEQ_LEN, "quiet": True}
    scheme = {"level": "O3", "weights": "channel", "rotation": "always"}
    calibrate(str(model), folder / "out", dataset=str(text), **scheme, **size)
    prompts = [torch.arange(3, 3 + n).tolist() for n in (40, 7)]
    reference = load_reference(folder / "out")
    with torch.no_grad():
        expected = [reference(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1) for ids in prompts]
    return folder / "out", prompts, expected


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_serves_the_reference(mixture, ranks):
    """Two ranks have half of the experts each. Bounds as in tests/test_served_models.py."""
    folder, prompts, expected = mixture
    arguments, environment = {}, {}
    if ranks > 1:
        arguments = {"tensor_parallel_size": ranks, "enable_expert_parallel": True}
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    served = engine.logprobs(folder, prompts, vocabulary=True, environment=environment, **arguments)
    error = torch.cat([(a - b).abs().flatten() for a, b in zip(served, expected, strict=True)])
    print(f"{ranks} ranks: median {float(error.median()):.1e}, mean {float(error.mean()):.1e}")
    assert error.median() < 1e-4
    assert error.mean() < 0.01


def test_a_router_that_returns_more_than_one_tensor_is_observed_by_its_input(tmp_path):
    """PhiMoE's is a linear layer that returns scores and choices: it has no output of which maxima could be taken."""
    source = tiny_checkpoints.save("phimoe", tmp_path / "model")
    text = str(tiny_checkpoints.save_text(tmp_path / "text.jsonl"))
    record = calibrate(str(source), tmp_path / "out", dataset=text, samples=8, seq_len=32, quiet=True)
    assert not [name for name in record["quantized"] if "router" in name]
    assert len(record["quantized"]) == 2 * (4 + 3 * 4)  # attention, and three layers of four experts, in two blocks


def test_a_parameter_that_takes_part_in_a_sum_stays_one():
    """RWKV mixes by `1 - parameter`: the operators of Python do not go through torch's protocol."""
    config = transformers.RwkvConfig(vocab_size=256, hidden_size=128, num_hidden_layers=2, context_length=64)
    torch.manual_seed(0)
    model, ids = transformers.RwkvForCausalLM(config).eval(), tiny_architectures.tokens(2)
    before = dict(model.named_parameters())
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        make_linear(model)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
    assert before.keys() == dict(model.named_parameters()).keys()


def test_experts_get_no_factor_while_serving(tmp_path):
    """Nothing folds into PhiMoE's router. The search may divide inputs at run time, but not those of experts."""
    source = tiny_checkpoints.save("phimoe", tmp_path / "model")
    text = str(tiny_checkpoints.save_text(tmp_path / "text.jsonl"))
    size = {"samples": 8, "seq_len": 32, "quiet": True, "rotation": "none"}
    calibrate(str(source), tmp_path / "out", dataset=text, alpha="auto", **size)
    smoothed = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["smoothed"]
    assert not [name for name in smoothed if "experts" in name]
    assert not verify(tmp_path / "out", str(source)).faults
