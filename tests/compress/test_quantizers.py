"""Quantisers: less weighted error than rounding, exact stored forms, hostile matrices."""

import numpy as np
import pytest
import torch

from paceline.compress.base import Statistic, Statistics
from paceline.compress.quantize.grids.kmeans import RowClusters
from paceline.compress.recipe import parse_steps
from paceline.errors import MethodError
from paceline.models.tensors import Sum, TwoGrained, from_tensors
from paceline.registry import quantizers

EXAMPLES = [spec for kind in quantizers.methods().values() for spec in kind.examples]


def inputs(columns, seed=0, count=400):
    """Correlated inputs, a few channels much larger than the others."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random) * torch.logspace(0, -1.5, columns)
    x = torch.randn(count, columns, generator=random) @ mix
    x[:, ::13] *= 6
    return x


def statistics(x):
    return Statistics().plus(x, frozenset({Statistic.INPUT_NORM, Statistic.SECOND_MOMENT}))


def weights(rows, columns, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=random) * 0.05


def error(spec, weight, x):
    stored = quantizers.parse(spec).compress(weight, statistics(x))
    return float((x @ (torch.from_numpy(stored.dense()) - weight).T).square().sum())


@pytest.mark.parametrize("spec", EXAMPLES)
@pytest.mark.parametrize("columns", [64, 50])
def test_two_runs_store_the_same_bytes_that_read_back(spec, columns):
    weight, stats = weights(12, columns), statistics(inputs(columns))
    kept = weight.clone()
    one, two = (quantizers.parse(spec).compress(weight, stats) for _ in range(2))
    assert torch.equal(weight, kept)
    arrays, others = one.tensors(), two.tensors()
    assert arrays.keys() == others.keys()
    assert all(arrays[name].tobytes() == others[name].tobytes() for name in arrays)
    assert one.shape == (12, columns)
    np.testing.assert_array_equal(from_tensors(arrays).dense(), one.dense())
    size = sum(part.nbytes for name, part in arrays.items() if not name.endswith("meta"))
    assert one.nbytes == size


def zeros(weight):
    weight[:] = 0


def zero_rows(weight):
    weight[::2] = 0


def outlier(weight):
    weight[1, 5] = 40


def tiny(weight):
    weight *= 1e-9


def constant(weight):
    weight[:] = 0.25


@pytest.mark.parametrize("spec", EXAMPLES)
@pytest.mark.parametrize("change", [zeros, zero_rows, outlier, tiny, constant])
def test_hostile_matrices_stay_finite_and_close(spec, change):
    x = inputs(50)
    weight = weights(8, 50)
    change(weight)
    found = torch.from_numpy(quantizers.parse(spec).compress(weight, statistics(x)).dense())
    assert found.isfinite().all()
    assert (found[weight.abs().sum(1) == 0] == 0).all()
    assert (x @ (found - weight).T).norm() <= 0.4 * (x @ weight.T).norm() + 1e-4


@pytest.mark.parametrize("spec", EXAMPLES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(spec, value):
    weight = weights(8, 32)
    weight[3, 4] = value
    with pytest.raises(MethodError, match=r"holds? NaN or infinite"):
        quantizers.parse(spec).compress(weight, statistics(inputs(32)))


@pytest.mark.parametrize("spec", EXAMPLES)
def test_inputs_that_never_occur_do_no_harm(spec):
    x = inputs(48)
    x[:, 10:20] = 0
    weight = weights(8, 48)
    found = torch.from_numpy(quantizers.parse(spec).compress(weight, statistics(x)).dense())
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("spec", "baseline", "share"),
    [
        ("gptq:bits=3,group=16", "rtn:bits=3,group=16", 0.7),
        ("gptq:bits=3,group=16", "gptq:bits=3,group=16,order=given", 1.0),
        ("gptq:bits=3,group=16,passes=4", "gptq:bits=3,group=16", 0.97),
        ("rtn:bits=3,group=32,levels=learned", "rtn:bits=3,group=32", 0.95),
        ("gptq:bits=3,group=32,levels=learned", "gptq:bits=3,group=32", 0.95),
        ("nupes:bits=3,group=32", "gptq:bits=3,group=32", 1.0),
        ("rtn:bits=4,group=16,scale_bits=6", "rtn:bits=4,group=16", 1.06),
        ("rtn:bits=4,group=16,symmetric=false,scale_bits=6", "rtn:bits=4,group=16", 0.95),
    ],
)
def test_a_quantiser_loses_less_than_its_baseline(spec, baseline, share):
    x, weight = inputs(96), weights(64, 96)
    assert error(spec, weight, x) < share * error(baseline, weight, x)


@pytest.mark.parametrize(
    ("spec", "baseline", "share"),
    [
        ("easyquant:bits=3,group=0", "rtn:bits=3,group=0", 0.97),
        ("easyquant:bits=3,sigma=2", "easyquant:bits=3,sigma=100", 0.7),
        ("easyquant:bits=3", "easyquant:bits=3,steps=0", 0.999),
        ("squeezellm:bits=3", "rtn:bits=3,group=0", 0.8),
        ("squeezellm:bits=3,outliers=0.02", "squeezellm:bits=3,outliers=0", 0.95),
        ("finequant:bits=3,group=8,gain=0", "rtn:bits=3,group=8", 1.0001),
    ],
)
def test_a_quantiser_without_data_is_closer_to_the_weights(spec, baseline, share):
    weight = weights(64, 96)

    def lost(name):
        stored = quantizers.parse(name).compress(weight, Statistics())
        return float((torch.from_numpy(stored.dense()) - weight).square().sum())

    assert lost(spec) < share * lost(baseline)


def test_fine_scales_take_few_bits():
    weight = weights(16, 128)
    stored = quantizers.parse("rtn:bits=4,group=32,scale_bits=6,levels=learned").compress(
        weight, Statistics()
    )
    assert isinstance(stored, TwoGrained)
    assert stored.nbytes == 16 * 128 // 2 + 16 * 4 * 6 // 8 + 16 * 2 + 16
    assert (np.diff(stored.levels.astype(int)) > 0).all()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("rtn:scale_bits=1", "scale_bits is 1, expected 0, or 2 to 8"),
        ("rtn:levels=odd", "expected even or learned"),
        ("rtn:levels=learned,symmetric=false", "symmetric grids"),
        ("rtn:levels=learned,bits=8", "up to 6 bits"),
        ("dgq:bits=5", "dgq:bits is 5"),
        ("dgq:levels=learned,symmetric=true", "leave levels"),
        ("nupes:levels=learned", "leave both out"),
        ("nupes:mean_bits=7", "nupes:mean_bits is 7.0, expected 2.0 to 6.0"),
        ("rtn:levels=learned,mean_bits=7", "rtn:mean_bits is 7.0, expected 2.0 to 6.0"),
        ("finequant:group=0", "finequant:group is 0"),
        ("gptq:order=size", "expected activation or given"),
        ("gptq:passes=-1", "gptq:passes is -1"),
    ],
)
def test_wrong_settings_are_refused(spec, said):
    with pytest.raises(MethodError, match=said):
        quantizers.parse(spec)


@pytest.mark.parametrize("spec", ["rtn", "nupes", "gptq:levels=learned"])
@pytest.mark.parametrize("extra", [-9.0, 9.0])
def test_a_matrix_has_no_more_bits_than_the_method(spec, extra):
    start = ":" if ":" not in spec else ","
    method = quantizers.parse(f"{spec}{start}mean_bits=4")
    plan = method.for_block({"q": weights(8, 64)}, {"q": Statistics(extra_bits=extra)})
    assert plan["q"].bits == (2 if extra < 0 else method.widest)


def test_codebooks_weigh_errors_by_fisher_information():
    weight = weights(16, 128)
    random = torch.Generator().manual_seed(3)
    fisher = torch.rand(16, 128, generator=random) ** 8
    blind = quantizers.parse("squeezellm:bits=3,outliers=0")
    seeing = quantizers.parse("squeezellm:bits=3,outliers=0,sensitive=0")

    def lost(method, stats):
        missed = torch.from_numpy(method.compress(weight, stats).dense()) - weight
        return float((missed.square() * fisher).sum())

    weighed = lost(seeing, Statistics(fisher=fisher))
    assert weighed < 0.6 * lost(blind, Statistics())
    kept = quantizers.parse("squeezellm:bits=3,outliers=0,sensitive=0.05")
    assert lost(kept, Statistics(fisher=fisher)) < 0.8 * weighed


def test_codebooks_of_rows_are_as_good_as_any_split_of_few_values():
    """All splits of six numbers into two clusters: k-means finds one that no move betters."""
    values = torch.tensor([[-3.0, -2.0, 0.0, 0.5, 4.0, 4.5]])
    clusters = RowClusters(values, torch.ones(1, 6))
    found = clusters.fit(2)
    torch.testing.assert_close(found, torch.tensor([[-1.125, 4.25]]))
    parts, _ = clusters.split(found, clusters.bounds(found))
    torch.testing.assert_close(parts, torch.tensor([[-2.5, 0.25, 4.0, 4.5]]))


def test_groups_are_small_where_outliers_are():
    even, uneven = weights(16, 256), weights(16, 256)
    uneven[:, ::64] *= 30
    method = quantizers.parse("finequant:group=16,gain=0.15")
    assert method.group_of(even) == 256
    assert method.group_of(uneven) == 16
    assert method.group_of(torch.zeros(2, 256)) == 256


def test_steps_and_codes_make_whole_bytes():
    x = inputs(96)
    for spec in ("dgq", "dgq:bits=3,group=16,symmetric=true", "dgq:group=0"):
        stored = quantizers.parse(spec).compress(weights(24, 96), statistics(x))
        bytes_of = stored.dense() / stored.units[:, None]
        np.testing.assert_array_equal(bytes_of, bytes_of.round())
        assert np.abs(bytes_of).max() <= 127
        np.testing.assert_array_equal(stored.grouped.dense(), stored.dense())
    assert error("dgq", weights(64, 96), x) < 1.1 * error(
        "rtn:group=32,symmetric=false", weights(64, 96), x
    )


def test_weights_apart_take_a_byte_and_a_number_each():
    weight = weights(64, 512)
    stored = quantizers.parse("easyquant:sigma=4").compress(weight, Statistics())
    assert isinstance(stored, Sum)
    apart = stored.parts[1]
    kept = int(apart.mask.sum())
    assert 0 < kept < 0.001 * weight.numel()
    assert apart.nbytes <= 2 * kept + kept + weight.numel() // 255 + 2
    places = torch.from_numpy(apart.mask)
    found = torch.from_numpy(stored.dense())
    torch.testing.assert_close(found[places], weight[places], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        "gptq:group=16,order=given",
        "gptq:group=16,order=activation",
        "quik:outliers=0.1",
        "gguf:type=q8_0,feedback=true",
    ],
)
def test_matrices_with_one_input_share_their_factor(spec, monkeypatch):
    made = []
    factor = torch.linalg.cholesky
    monkeypatch.setattr(
        torch.linalg, "cholesky", lambda *args, **more: made.append(1) or factor(*args, **more)
    )
    stats = statistics(inputs(32))
    for _ in range(3):
        quantizers.parse(spec).compress(weights(8, 32), stats)
    assert len(made) == 1


OTHERS = [
    f"gguf:type={name}" for name in ("q4_0", "q4_1", "q5_0", "q8_0", "q3_k", "q6_k", "iq4_nl")
]
OTHERS += ["gptq:bits=3,group=16,symmetric=false,passes=2", "gptq:group=32,levels=learned"]
OTHERS += ["gguf:type=q4_0,feedback=true", "rtn:group=32,levels=learned,scale_bits=6"]


@pytest.mark.parametrize("spec", dict.fromkeys([*EXAMPLES, *OTHERS]))
@pytest.mark.parametrize("pruner", ["magnitude", "magnitude:pattern=2:4"])
def test_what_a_pruner_made_zero_stays_zero_or_is_refused(spec, pruner):
    keeps = quantizers.parse(spec).keeps_zeros
    if not keeps:
        name = spec.partition(":")[0]
        with pytest.raises(MethodError, match=f"{name}, set like this, does not keep the zeros"):
            parse_steps(f"{pruner}+{spec}")
        return
    for columns in (512, 96):
        weight, stats = weights(6, columns), statistics(inputs(columns))
        pruned = parse_steps(pruner).compress(weight, stats).dense() == 0
        stored = parse_steps(f"{pruner}+{spec}").compress(weight, stats).dense()
        assert not stored[pruned].any()
        assert (stored[~pruned] != 0).mean() > 0.5


def test_gptq_makes_up_for_errors_beside_pruned_weights():
    x = inputs(96)
    weight, stats = weights(24, 96), statistics(x)
    pruned = torch.from_numpy(parse_steps("magnitude").compress(weight, stats).dense())

    def lost(spec):
        stored = torch.from_numpy(parse_steps(f"magnitude+{spec}").compress(weight, stats).dense())
        return float((x @ (stored - pruned).T).square().sum())

    assert lost("gptq:bits=3,group=32") < 0.8 * lost("rtn:bits=3,group=32")
    assert lost("gptq:bits=3,group=32,passes=2") < lost("gptq:bits=3,group=32")


@pytest.mark.parametrize("tuner", ["block_ap", "pv", "lrq"])
def test_tuners_that_would_fill_zeros_are_refused(tuner):
    with pytest.raises(MethodError, match=f"{tuner} moves the codes of all weights, .* magnitude"):
        parse_steps(f"magnitude+rtn:bits=3,group=32+{tuner}")


@pytest.mark.parametrize(("columns", "block"), [(96, 1024), (96, 96), (100, 32), (1, 4)])
def test_the_factor_of_an_inverse_is_made_in_blocks(columns, block, monkeypatch):
    from paceline.compress import column_errors

    monkeypatch.setattr(column_errors, "_BLOCK", block)
    moment = statistics(inputs(columns)).second_moment
    before = moment.clone()
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    factor = column_errors.inverse_factor(moment, 0.01, "gptq", order)
    assert torch.equal(moment, before)
    damped = moment[order][:, order].double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(columns)
    assert not factor.tril(-1).any()
    product = factor.double().T @ factor.double() @ damped
    torch.testing.assert_close(product, torch.eye(columns).double(), atol=1e-4, rtol=0)


def test_a_factor_is_kept_as_long_as_its_moment():
    from paceline.compress.column_errors import keep_last

    calls = []

    @keep_last
    def twice(moment, name):
        calls.append(name)
        return moment * 2

    one, other = torch.ones(2), torch.ones(2)
    assert twice(one, "a") is twice(one, "a")
    twice(one, "b")
    twice(other, "b")
    del other
    assert torch.equal(twice(one, "b"), torch.full((2,), 2.0))
    assert calls == ["a", "b", "b", "b"]
