"""The speed benchmark on tiny random models. Times are checked against injected clocks, never against the machine."""

import dataclasses
import importlib.util
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from eval import peer_hf, random_llama, timing
from eval.bench import BenchConfig, RandomModel, bench
from eval.random_llama import RandomLlama
from eval.step_bytes import dense_bytes, observed_bytes, tpu_bandwidth, weights_read
from eval.timing import Measured, Repeats, Workload, prepare, spread
from recycled_jax.checkpoint import load_model
from recycled_jax.config import LlamaConfig
from recycled_jax.frame import FixedStride, LayerTrace, Never
from recycled_jax.generate import generate
from recycled_jax.mesh import MeshSizes
from recycled_jax.policies import make_policy
from tests.recycled_jax.random_model import CONFIG, prompts, tiny_model
from tests.recycled_jax.tiny import save_tiny

TINY = RandomModel(RandomLlama(layers=2, embed=32, query_heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=97))
QUICK = {"decode_steps": 4, "repeats": 2, "warmups": 1, "prefill_repeats": 1, "prefill_warmups": 0}
RECYCLED = {"name": "recycled", "stride": 2}
SCHEMA = {
    "schema", "kind", "valid", "status", "date", "git", "versions", "device", "model", "weights", "dtype", "policy",
    "implementation", "mode", "length", "capacity", "batch", "decode_steps", "repeats", "compile_s", "prefill_ms",
    "decode_ms_per_step", "full_step_ms", "recycled_step_ms", "tokens_per_s", "dense", "ratio_decode", "ratio_prefill",
    "bytes_per_step", "floor_ms", "mbu", "ideal_speedup", "effective_stride", "peak_memory_bytes", "command",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny"))


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch):
    """A gigabyte per second, measured or not: summing large arrays would take most of these tests' time."""
    monkeypatch.setattr("eval.bench.bandwidth", lambda: (1e9, "measured"))


def steady():
    """A clock on which everything takes 20 ms: 5 ms for each of 4 steps."""
    return partial(next, itertools.count(0, 0.02))


def fake(workload, policy):
    """A candidate that compiles nothing: reading takes 3 ms, a step 2 ms, 4 ms if the policy is dense; by its clock."""

    def candidate(clock):
        slow = (2 if policy.name == "full" else 1) * clock()
        return Measured((3.0 * slow,) * 2, (2.0 * slow,) * 2)

    return candidate


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_each_cell_with_the_fields_of_the_schema(checkpoint, tmp_path):
    config = BenchConfig(
        tmp_path / "new",
        model=checkpoint,
        lengths=(128,),
        batches=(2,),
        policies=(RECYCLED,),
        budgets=(16,),
        **QUICK,
    )
    path = bench(config, clock=steady())
    assert path == tmp_path / "new" / "bench.jsonl"
    lines = records(path)
    assert [(line["length"], line["batch"], line["policy"]["k"]) for line in lines] == [(128, 2, 16)]
    for line in lines:
        assert line.keys() >= SCHEMA
        assert line["policy"] == {
            "name": "recycled", "k": 16, "stride": 2, "refresh": "full", "pool": 7, "group_reduction": "max"
        }  # fmt: skip
        times = pytest.approx({"p10": 5, "p50": 5, "p90": 5})
        for name in ("decode_ms_per_step", "full_step_ms", "recycled_step_ms"):
            assert line[name] == times
        assert line["dense"]["decode_ms_per_step"] == times and line["dense"]["drift"] == pytest.approx(0)
        assert line["prefill_ms"]["p50"] == pytest.approx(20) and line["end_to_end_ms"] == pytest.approx(40)
        assert line["ratio_decode"] == pytest.approx(1) and line["ratio_prefill"] == pytest.approx(1)
        assert line["tokens_per_s"] == pytest.approx(2 / 5e-3)
        assert line["floor_ms"] == pytest.approx(sum(line["bytes_per_step"].values()) / 1e9 * 1e3)
        assert line["mbu"] == pytest.approx(line["floor_ms"] / 5)
        assert line["capacity"] == line["length"] + 128  # room for 5 tokens, in 128s
        assert line["effective_stride"] == [2.0, 2.0] and line["ideal_speedup"] > 1
        assert (line["valid"], line["status"], line["weights"], line["mode"]) == (True, "ok", "real", "gather")


def test_caches_can_be_made_up(tmp_path):
    decoding = QUICK | {"prefill_repeats": 0}
    config = BenchConfig(tmp_path, model=TINY, lengths=(300,), policies=(RECYCLED,), budgets=(16,), **decoding)
    [line] = records(bench(config, clock=steady()))
    assert (line["prefill_ms"], line["end_to_end_ms"], line["ratio_prefill"]) == (None, None, None)
    assert line["decode_ms_per_step"]["p50"] == pytest.approx(5) and line["effective_stride"] == [2.0, 2.0]
    read = dataclasses.replace(config, prefill_repeats=1)  # another configuration: it is measured too
    made_up, whole = records(bench(read, clock=steady()))
    assert made_up == line and whole["prefill_ms"] is not None
    for name in ("bytes_per_step", "floor_ms", "capacity"):
        assert made_up[name] == whole[name]
    with pytest.raises(ValueError, match="prefill_repeats=0 makes up caches, but 'h2o' needs of the prompts"):
        bench(dataclasses.replace(config, policies=("h2o",)), clock=steady())
    with pytest.raises(ValueError, match="prefill_repeats=0 makes up caches, which is for random weights"):
        BenchConfig(tmp_path, **decoding)


def test_a_mesh_divides_what_a_device_reads(tmp_path):
    sizes = {"lengths": (300,), "policies": (RECYCLED,), "budgets": (16,), **QUICK, "prefill_repeats": 0}
    even = RandomModel(dataclasses.replace(TINY.random, vocab=96))
    config = BenchConfig(tmp_path, model=even, **sizes)
    mesh = dataclasses.replace(config, mesh=MeshSizes(data=1, tensor=2, sequence=4))
    [alone] = records(bench(config, clock=steady()))
    [_, shared] = records(bench(mesh, clock=steady()))
    assert shared["device"]["mesh"] == {"data": 1, "fsdp": 1, "tensor": 2, "sequence": 4}
    assert shared["device"]["chips"] == 8
    assert shared["bytes_per_step"]["kv_read"] == pytest.approx(alone["bytes_per_step"]["kv_read"] / 8)
    assert shared["bytes_per_step"]["weights"] == pytest.approx(alone["bytes_per_step"]["weights"] / 2)
    with pytest.raises(ValueError, match="expected a divisor of kv_heads=2"):
        bench(dataclasses.replace(config, mesh=MeshSizes(data=2, tensor=4), batches=(2,)))


def test_the_ratio_is_dense_over_policy_and_dense_is_the_runs_before_and_after(tmp_path):
    run = BenchConfig(tmp_path, model=TINY, lengths=(128,), policies=(RECYCLED,), budgets=(8, 16), **QUICK)
    clock = partial(next, iter([1.0, 1.0, 1.02, 1.0, 1.04]))
    first, second = records(bench(run, clock=clock, prepare=fake))
    # dense takes 4 ms a step, then 4.08, then 4.16; the policies 2
    assert first["ratio_decode"] == pytest.approx(4.04 / 2) and first["dense"]["drift"] == pytest.approx(0.02)
    assert second["ratio_decode"] == pytest.approx(4.12 / 2)
    assert second["dense"]["drift"] == pytest.approx(4.16 / 4.08 - 1)
    assert first["ratio_prefill"] == pytest.approx(6.06 / 3)
    assert first["valid"] and second["valid"]


def test_a_drifting_clock_voids_the_record_and_the_next_run_measures_it_again(tmp_path):
    config = BenchConfig(tmp_path, model=TINY, lengths=(128,), policies=(RECYCLED,), budgets=(16,), **QUICK)
    [line] = records(bench(config, clock=partial(next, iter([1.0, 1.0, 1.06])), prepare=fake))
    assert not line["valid"] and line["status"] == "ok"
    assert line["dense"]["drift"] == pytest.approx(0.06) and line["ratio_prefill"] is None
    lines = records(bench(config, clock=partial(next, iter([1.0, 1.0, 1.04])), prepare=fake))
    assert [line["valid"] for line in lines] == [False, True]


def test_what_does_not_fit_is_recorded_and_the_run_goes_on(tmp_path):
    def failing(too_big, workload, policy):
        if policy.name == too_big:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes")
        return fake(workload, policy)

    policies = (RECYCLED, "streaming")
    config = BenchConfig(tmp_path / "a", model=TINY, lengths=(128,), policies=policies, budgets=(16,), **QUICK)
    one = lambda: 1.0  # noqa: E731
    first, second = records(bench(config, clock=one, prepare=partial(failing, "recycled")))
    assert (first["status"], first["valid"]) == ("oom", False) and "decode_ms_per_step" not in first
    assert (second["status"], second["valid"], second["ratio_decode"]) == ("ok", True, 2.0)

    # where only the dense policy does not fit, the others still have their times, and no ratio
    config = dataclasses.replace(config, out=tmp_path / "b")
    for line in records(bench(config, clock=one, prepare=partial(failing, "full"))):
        assert (line["status"], line["dense"], line["ratio_decode"]) == ("ok", None, None)
        assert line["decode_ms_per_step"]["p50"] == 2.0

    def broken(workload, policy):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        bench(dataclasses.replace(config, out=tmp_path / "c"), clock=one, prepare=broken)


def test_resume_skips_what_is_there_and_cuts_a_torn_line(tmp_path):
    def counting(workload, policy):
        measured.append((policy.name, int(workload.lengths.max())))
        return fake(workload, policy)

    measured: list = []
    config = BenchConfig(tmp_path, model=TINY, lengths=(128, 256), policies=(RECYCLED,), budgets=(16,), **QUICK)
    one = lambda: 1.0  # noqa: E731
    path = bench(config, clock=one, prepare=counting)
    assert measured == [("full", 128), ("recycled", 128), ("full", 256), ("recycled", 256)]
    whole = path.read_text()
    path.write_text(whole[:-20])
    measured.clear()
    bench(config, clock=one, prepare=counting)
    assert measured == [("full", 256), ("recycled", 256)] and len(records(path)) == 2
    measured.clear()
    bench(config, clock=one, prepare=counting)
    assert measured == []
    # another budget, other repeats are another configuration
    bench(dataclasses.replace(config, lengths=(128,), budgets=(16, 8)), clock=one, prepare=counting)
    bench(dataclasses.replace(config, lengths=(128,), repeats=3), clock=one, prepare=counting)
    assert measured == [("full", 128), ("recycled", 128)] * 2 and len(records(path)) == 4


def test_budgets_are_for_policies_that_have_k_and_do_not_set_it(tmp_path):
    policies = (RECYCLED, {"name": "recycled", "k": 32}, "full")
    config = BenchConfig(tmp_path, model=TINY, lengths=(128,), policies=policies, budgets=(16, 24), **QUICK)
    lines = records(bench(config, clock=lambda: 1.0, prepare=fake))
    assert [(line["policy"]["name"], line["policy"].get("k")) for line in lines] == [
        ("recycled", 16), ("recycled", 24), ("recycled", 32), ("full", None)
    ]  # fmt: skip


def test_a_forced_stride_is_what_runs(tmp_path):
    def watching(workload, policy):
        schedules.append(policy.method.schedule if policy.name != "full" else None)
        return fake(workload, policy)

    schedules: list = []
    policies = ("recycled-dynamic", "streaming")
    config = BenchConfig(tmp_path, model=TINY, lengths=(128,), policies=policies, budgets=(16,), **QUICK)
    with pytest.raises(ValueError, match="'recycled-dynamic', whose schedule looks at queries"):
        bench(config)
    lines = records(bench(dataclasses.replace(config, force_stride=4), clock=lambda: 1.0, prepare=watching))
    assert schedules == [None, FixedStride(4), Never()]
    assert all(line["force_stride"] == 4 and line["weights"] == "random" for line in lines)


def test_settings_that_cannot_be_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"lengths=\[0\] must hold numbers of at least 1"):
        BenchConfig(tmp_path, lengths=(0,))
    with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        BenchConfig(tmp_path, repeats=0)
    with pytest.raises(ValueError, match="warmups=-1 must be at least 0"):
        BenchConfig(tmp_path, warmups=-1)
    with pytest.raises(ValueError, match="policy='recycld' is unknown"):
        bench(BenchConfig(tmp_path, policies=("recycld",)))
    corrected = {"name": "tidal", "dense_layers": [0], "selection_layers": [1], "correct_every": 8}
    with pytest.raises(ValueError, match="'tidal' with correct_every=8, whose corrections are not timed"):
        bench(BenchConfig(tmp_path, model=TINY, policies=(corrected,)))


@pytest.mark.parametrize(
    "name, knobs, kinds",
    [
        ("full", {}, (2, 0)),
        ("recycled", {"k": 8, "stride": 4}, (2, 2)),
        ("streaming", {"k": 8}, (0, 2)),
        ("h2o", {"k": 8}, (0, 0)),
    ],
)
def test_every_run_of_a_block_is_the_same_and_gives_what_generate_gives(name, knobs, kinds, monkeypatch):
    """A block begins on the cache that the block before has written to; that must not show."""
    seen = []

    def remember(tree):
        if isinstance(tree, tuple) and isinstance(tree[1], tuple):  # of a block, not of a prefill
            seen.append(np.asarray(tree[1].tokens).T.tolist())
        return waits(tree)

    model, params = tiny_model()
    batch, policy = prompts(40, 40), make_policy(name, **knobs)
    workload = Workload.of(model, params, batch, Repeats(12, 2, 1, 1, 0))
    candidate = prepare(workload, policy)
    waits = jax.block_until_ready
    monkeypatch.setattr(timing.jax, "block_until_ready", remember)
    measured = candidate(steady())
    monkeypatch.undo()
    expected = generate(model, params, batch, policy=policy, max_new_tokens=13).tokens
    assert seen[0] == [row[1:] for row in expected]
    assert all(tokens == seen[0] for tokens in seen[:3])
    assert (len(measured.full_step_ms), len(measured.recycled_step_ms)) == kinds
    assert len(measured.decode_ms) == 2 and len(measured.prefill_ms) == 1


def test_the_two_kinds_of_step_are_a_refresh_each_and_none():
    policy = make_policy("recycled-dynamic", k=8)
    refreshing, reusing = timing._kinds_of_step(policy)
    for kind, schedule in ((refreshing, FixedStride(1)), (reusing, Never())):
        assert kind == dataclasses.replace(policy, method=dataclasses.replace(policy.method, schedule=schedule))
    assert timing._kinds_of_step(make_policy("full")) == timing._kinds_of_step(make_policy("snapkv")) == (None, None)


def test_percentiles_by_hand():
    assert spread([4.0, 0.0, 1.0, 3.0, 2.0]) == {"p10": pytest.approx(0.4), "p50": 2.0, "p90": pytest.approx(3.6)}
    assert spread(()) is None


def test_bytes_of_a_step_by_hand():
    """2 layers, 3 kv heads of 4 channels of 2 bytes: a slot of keys is 24 bytes. Prompts of 9 and 19, 2 steps."""
    config = LlamaConfig(vocab=5, embed=8, mlp=1, layers=2, query_heads=3, kv_heads=3, head_dim=4)
    lengths = np.array([9, 19])
    dense = dense_bytes(config, lengths, steps=2, weights=1000.0, element=2)
    # rows of 10 and 20 slots, then 11 and 21: 31 on average, keys and values, 2 layers
    assert dense.to_json() == {"weights": 1000.0, "kv_read": 2 * 31 * 2 * 24, "kv_write": 0, "scores": 0}
    assert dense_bytes(config, lengths, steps=2, weights=0, element=2, shards=2).kv_read == dense.kv_read / 2

    def trace(refreshed, attended, scored):
        rows = [np.ones((2, 2, 2)) * np.reshape(x, (-1, 1, 1)) for x in (refreshed, attended, scored)]
        nothing = np.zeros((2, 2, 2))
        return LayerTrace(nothing, rows[0].astype(bool), nothing, nothing, rows[1], rows[2], nothing)

    full, selection = (make_policy("recycled", k=5, stride=2, refresh=refresh) for refresh in ("full", "selection"))
    measure = partial(observed_bytes, config, weights=1000.0, element=2)
    # step 1 recycles: 5 keys and values; step 2 refreshes: attends everything (16 on average), reads and writes 5
    seen = measure(full, trace([0, 1], [5, 16], [0, 10]), lengths)
    per_layer_and_row = 24 * 2 * 2
    assert seen.kv_read == per_layer_and_row * (2 * 5 + 2 * 16 + 2 * 5) / 2
    assert seen.kv_write == per_layer_and_row * (2 * 5) / 2 and seen.scores == 0
    # only scores: 16 keys, and attends the selection
    seen = measure(selection, trace([0, 1], [5, 5], [0, 16 + 10]), lengths)
    assert seen.kv_read == per_layer_and_row * (2 * 5 + 2 * 5 + 2 * 5) / 2
    assert seen.scores == per_layer_and_row * 16 / 2 and seen.kv_write == per_layer_and_row * (2 * 5) / 2
    assert seen.total == 1000 + seen.kv_read + seen.kv_write + seen.scores
    # what scorers of other methods read is not copied
    quest = make_policy("quest", k=16, page=4, dense_layers=())
    assert measure(quest, trace([1, 1], [5, 5], [8, 8]), lengths).scores == per_layer_and_row * 8


def test_bytes_of_what_really_ran_are_those_of_the_formulas():
    def ran(policy):
        seen = generate(*tiny_model(), prompts(40), policy=policy, max_new_tokens=5).telemetry
        return LayerTrace(*(getattr(seen, name) for name in LayerTrace._fields))

    n, k, slot = 40 + 2.5, 8, CONFIG.kv_heads * CONFIG.head_dim * 4 * CONFIG.layers  # n: mean of 41 to 44
    for refresh, read, scores in (("full", 3 * 2 * k + 2 * 44 + 2 * k, 0), ("selection", 4 * 2 * k + 2 * k, 44)):
        policy = make_policy("recycled", k=k, stride=4, refresh=refresh)
        seen = observed_bytes(CONFIG, policy, ran(policy), np.array([40]), weights=0.0, element=4)
        assert (seen.kv_read, seen.scores, seen.kv_write) == (slot * read / 4, slot * scores / 4, slot * 2 * k / 4)
    dense = make_policy("full")
    seen = observed_bytes(CONFIG, dense, ran(dense), np.array([40]), weights=0.0, element=4)
    assert seen.kv_read == slot * 2 * n
    assert seen == dense_bytes(CONFIG, np.array([40]), steps=4, weights=0.0, element=4)


def test_weights_that_a_step_reads():
    params = tiny_model()[1]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    table = CONFIG.vocab * CONFIG.embed
    assert weights_read(CONFIG, params, batch=3) == 4 * (count - table + 3 * CONFIG.embed)
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    params = {"params": {name: leaf for name, leaf in params["params"].items() if name != "lm_head"}}
    assert weights_read(tied, params, batch=3) == 4 * (count - table)


@pytest.mark.parametrize("kind, cores, expected", [("TPU v5e", 1, 0.82), ("TPU v5p", 2, 2.46), ("TPU v6e", 1, 1.64)])
def test_bandwidth_of_a_tpu_is_that_of_all_cores_of_the_device(kind, cores, expected):
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(kind, cores, "tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert tpu_bandwidth() == pytest.approx(expected * 1e12)


def test_a_random_llama_is_the_same_from_its_seed_and_from_its_folder(tmp_path):
    path = random_llama.write(tmp_path, TINY.random)
    model, params = random_llama.make(TINY.random)
    loaded, read = load_model(path)
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, params, read)
    changed = path.stat().st_mtime_ns
    assert random_llama.write(tmp_path, TINY.random) == path and path.stat().st_mtime_ns == changed
    other = dataclasses.replace(TINY.random, seed=1)
    assert other.name != TINY.random.name
    assert not np.array_equal(random_llama.make(other)[1]["params"]["embed_tokens"], params["params"]["embed_tokens"])
    rounded = random_llama.make(TINY.random, "bfloat16")[1]["params"]["embed_tokens"]
    np.testing.assert_array_equal(rounded, params["params"]["embed_tokens"].astype(jnp.bfloat16))


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is there")
def test_a_peer_without_pytorch_is_one_sentence(tmp_path):
    config = BenchConfig(tmp_path, model=TINY, lengths=(128,), policies=(RECYCLED,), budgets=(16,), peer="hf", **QUICK)
    with pytest.raises(ValueError, match="peer='hf' needs PyTorch, which is not installed"):
        bench(config)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is in the extra `parity`")
class TestPeer:
    @pytest.mark.parametrize("model", [TINY, "checkpoint"])
    def test_the_fastest_setting_stands_beside_us(self, model, checkpoint, tmp_path):
        config = BenchConfig(
            tmp_path, model=checkpoint if model == "checkpoint" else model, lengths=(128,), batches=(2,),
            policies=(RECYCLED,), budgets=(16,), peer="hf", **QUICK,
        )  # fmt: skip
        ours, theirs = records(bench(config))
        assert theirs.keys() >= SCHEMA and theirs["policy"] == {"name": "hf"}
        medians = theirs["peer"]["decode_ms_per_step"]
        assert medians.keys() == {f"{a}, {c}" for a in peer_hf.ATTENTIONS for c in peer_hf.CACHES}
        assert theirs["decode_ms_per_step"]["p50"] == min(medians.values()) == medians[theirs["peer"]["fastest"]]
        assert theirs["ideal_speedup"] == 1 and theirs["bytes_per_step"]["kv_read"] > ours["bytes_per_step"]["kv_read"]
        assert len(records(bench(config))) == 2 + sum(not line["valid"] for line in (ours, theirs))

    def test_its_steps_give_our_tokens_with_every_cache_and_attention(self, checkpoint):
        import torch  # pyright: ignore[reportMissingImports]

        peer = peer_hf.load(checkpoint, "float32")
        model, params = load_model(checkpoint)
        prompt = np.random.default_rng(0).integers(0, 256, 60).tolist()
        endless = model.clone(config=dataclasses.replace(model.config, eos_ids=()))
        expected = generate(endless, params, [prompt], policy=make_policy("full"), max_new_tokens=6).tokens[0]
        with torch.inference_mode():
            read = peer_hf._prefill(peer, torch.tensor([prompt]))
            for attention in peer_hf.ATTENTIONS:
                peer.model.set_attn_implementation(attention)
                for cache in peer_hf.CACHES:
                    held, token, tokens = peer_hf._filled(peer, read, cache, 66), read.token, [int(read.token)]
                    for _ in range(5):
                        token = (
                            peer.model(input_ids=token, past_key_values=held, use_cache=True).logits[:, -1:].argmax(-1)
                        )
                        tokens.append(int(token))
                    assert tokens == expected

    def test_other_logits_are_refused(self, checkpoint, monkeypatch):
        def turned(folder, dtype, device):
            model = right(folder, dtype, device)
            model.model.norm.weight.data *= 1.01
            return model

        right = peer_hf._model
        monkeypatch.setattr(peer_hf, "_model", turned)
        with pytest.raises(ValueError, match="computes other logits than ours"):
            peer_hf.load(checkpoint, "float32")
