"""The rules: the challenge's published operation counts, sparsity, widths, assumptions, the course's formula, gates."""

import json
from dataclasses import replace

import pytest
import torch
from counting import Run
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from vectors import vectors

from callbacks.ledger import Array, Ledger, Line, build
from callbacks.op_trace import trace
from micronet.counting import Assume, _tree_bits, stored_bits
from micronet.errors import MicronetError
from micronet.rules import RULES, imt, imt_small, official, official_imagenet, seed
from micronet.score import Accuracy, score, tally

ACTIVATIONS = {None: nn.Identity, "relu": nn.ReLU, "swish": nn.SiLU, "sigmoid": nn.Sigmoid}


def as_module(op, args):
    """One of the published counter's operations as a torch module, and the sizes of its inputs."""
    if op in ("Conv2D", "DepthWiseConv2D"):
        k, _, c_in, c_out = args["kernel_shape"]
        groups = c_in if op.startswith("Depth") else 1
        padding = k // 2 if args["padding"] == "same" else 0
        conv = nn.Conv2d(
            c_in, c_out * groups, k, args["strides"][0], padding, groups=groups, bias=args["use_bias"], device="meta"
        )
        return nn.Sequential(conv, ACTIVATIONS[args["activation"]]()), (c_in, args["input_size"], args["input_size"])
    if op == "FullyConnected":
        linear = nn.Linear(*args["kernel_shape"], bias=args["use_bias"], device="meta")
        return nn.Sequential(linear, ACTIVATIONS[args["activation"]]()), (args["kernel_shape"][0],)
    size = (args["n_channels"], args["input_size"], args["input_size"])
    if op == "GlobalAvg":
        return nn.AdaptiveAvgPool2d(1), size
    other = (args["n_channels"], 1, 1) if op == "Scale" else size
    return Run(lambda s, x, y: x * y if op == "Scale" else x + y), (size, other)


def test_every_operation_of_the_published_counter():
    cases = vectors("oplevel_official")["cases"]
    ledgers = {}
    for case in cases:
        key = json.dumps([case["op"], case["args"]])
        if key not in ledgers:
            module, size = as_module(case["op"], case["args"])
            ledgers[key] = build(trace(module, size))
        assume = Assume(bits=case["param_bits"], sparsity=case["sparsity"])
        result = tally("case", ledgers[key], official, assume)
        assert (result.storage * 32, result.mults, result.adds) == (
            case["storage_bits"],
            case["mults"],
            case["adds"],
        ), case
    assert (len(cases), len(ledgers)) == (255, 17)


def net_and_masks(density=0.5):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    masks = {"0.weight": torch.rand(8, 4, 3, 3) < density}
    net[0].weight.data[~masks["0.weight"]] = 0
    return net, masks


def test_a_declared_mask_makes_a_tensor_sparse_in_storage_and_operations():
    net, masks = net_and_masks()
    kept = int(masks["0.weight"].sum())
    result, dense = score(net, input_size=(4, 8, 8), masks=masks), score(net, input_size=(4, 8, 8), masks={})
    assert result.lines[0].mults == kept * 36
    assert result.lines[0].adds == kept * 36 - 8 * 36 + 8 * 36
    assert (result.lines[0].weights, result.lines[0].nonzero) == (288, kept)
    assert dense.storage - result.storage == (288 * 16 - (kept * 16 + 288)) / 32
    assert dense.lines[0].mults == 288 * 36  # zeros that nothing declares are numbers like any other


def test_the_mask_says_what_is_kept_and_not_the_zeros():
    net, masks = net_and_masks()
    everything = {"0.weight": torch.ones_like(masks["0.weight"])}
    dense = score(net, input_size=(4, 8, 8), masks={})
    assert score(net, input_size=(4, 8, 8), masks=everything).storage == dense.storage
    tied = nn.Sequential(nn.Flatten(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False))
    tied[3].weight = tied[1].weight
    mask = torch.rand(16, 16) < 0.5
    for name in ("1.weight", "3.weight"):
        lines = score(tied, input_size=(1, 4, 4), masks={name: mask}).lines
        assert [line.mults for line in lines if line.weights] == [int(mask.sum())] * 2


def test_truth_values_are_no_quantisation():
    net = Run(lambda s, x: (s.a(x) > 0).sum((2, 3)), a=nn.Conv2d(4, 4, 1))
    assert any("16 bits for free" in note for note in score(net, input_size=(4, 8, 8)).tally.notes)


def test_weights_that_are_written_into_the_program_are_not_stored():
    blur = Run(lambda s, x: torch.nn.functional.conv2d(x, torch.ones(4, 1, 3, 3) / 9, groups=4))
    result = score(blur, input_size=(4, 8, 8))
    assert (result.storage, result.mults) == (0, 9 * 4 * 36)


def test_a_tree_never_costs_less_than_nothing():
    rules, tree = replace(official, freebie=False), replace(official, adder_tree=True)
    for net in (nn.ConvTranspose2d(8, 4, 4, stride=2), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8)):
        for sparsity in (None, 0.5):
            assume = Assume(bits=8, sparsity=sparsity)
            flat, summed = (score(net, input_size=(8, 8, 8), rules=r, assume=assume) for r in (rules, tree))
            assert 0 < summed.ops <= flat.ops
    # 3.5 terms on average: half of the sums have three, half four.
    assert _tree_bits(3.5, 16) == ((16 + 17) + (2 * 16 + 17)) / 2


def test_torchs_own_pruning_declares_its_zeros():
    net, _ = net_and_masks(1.1)
    prune.random_unstructured(net[0], "weight", 0.02)  # so few that a mask costs more than it saves
    prune.random_unstructured(net[3], "weight", 0.5)
    lines = score(net, input_size=(4, 8, 8), masks={}).lines
    assert (lines[0].nonzero, lines[0].mults) == (288 - 6, 282 * 36)
    assert lines[-1].mults == 8 * 36 * 5 // 2
    prune.remove(net[0], "weight")
    assert score(net, input_size=(4, 8, 8), masks={}).lines[0].mults == 288 * 36
    assert score(net, input_size=(4, 8, 8)).lines[0].mults == 288 * 36


def test_without_masks_a_tensor_is_sparse_where_that_is_smaller():
    for density, sparse in ((0.5, True), (0.99, False)):
        net, masks = net_and_masks(density)
        kept = int(masks["0.weight"].sum())
        assert kept < 288
        result = score(net, input_size=(4, 8, 8))
        assert result.lines[0].mults == (kept if sparse else 288) * 36


@given(
    numel=st.integers(1, 10_000),
    share=st.floats(0, 1),
    bits=st.sampled_from((1, 2, 4, 8, 16, 32)),
    masked=st.booleans(),
)
def test_an_array_takes_the_smaller_form_or_the_declared_one(numel, share, bits, masked):
    array = Array(name="w", role="weight", shape=(numel,), bits=bits, nonzero=int(share * numel))
    free, density = stored_bits(array, bits, Assume())
    assert free == min(numel * bits, array.nonzero * bits + numel)
    assert density in (1, array.nonzero / numel)
    told, density = stored_bits(replace(array, masked=masked), bits, Assume())
    sparse = masked and array.nonzero < numel
    assert (told, density) == ((array.nonzero * bits + numel, array.nonzero / numel) if sparse else (numel * bits, 1))
    assert stored_bits(replace(array, role="bias"), bits, Assume())[0] == numel * bits


def test_the_freebie_is_for_models_that_quantise_nothing():
    line = Line(
        name="a", op="linear", module="Linear", in_shape=(4,), out_shape=(2,), taps=4, weights=8, mults=8, adds=6
    )
    array = Array(name="w", role="weight", shape=(2, 4), bits=32)

    def ops(weight_bits, act_bits, **options):
        ledger = Ledger(
            lines=(replace(line, weight_bits=weight_bits, act_bits=act_bits, macs=8, arrays=("w",), weight_array="w"),),
            arrays=(replace(array, bits=weight_bits),),
            params=8,
        )
        result = tally("net", ledger, replace(official, **options))
        return result.storage, result.ops

    assert ops(32, 32) == (8 / 2, 8 / 2 + 6)
    assert ops(32, 32, freebie=False) == (8, 8 + 6)
    assert ops(8, 32) == (2, 8 + 6)  # the widest input, and no freebie for the activations
    assert ops(8, 8) == (2, 2 + 6)
    assert ops(4, 8) == (1, 2 + 6)
    assert ops(1, 8) == (8 / 32, 8 / 32 + 6)  # binary weights
    assert ops(8, 8, int_acc_bits=16) == (2, 2 + 3)
    assert ops(32, 32, int_acc_bits=16) == (4, 4 + 6)  # no integers to accumulate
    # Two sums of four 16-bit products: two additions at 16 bits and one at 17 for each.
    assert ops(8, 8, adder_tree=True) == (2, 2 + 2 * (2 * 16 + 17) / 32)


@pytest.mark.parametrize("stated", [{"int_acc_bits": 16}, {"adder_tree": True}])
def test_what_is_stated_of_integer_sums_holds_where_integers_are_summed_assumed_ones_too(stated):
    net, rules = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), replace(official, **stated)

    def told(assume, rules):
        result = score(net, input_size=(4, 8, 8), rules=rules, assume=assume)
        return result.ops, [note for note in result.tally.notes if "integer" in note]

    for assume in (Assume(), Assume(bits=16)):
        plain, (ops, notes) = told(assume, official), told(assume, rules)
        assert plain == (ops, [])
        assert notes == ["no integers are summed here: what you state of accumulators or an adder tree changes nothing"]
    plain, (ops, notes) = told(Assume(bits=8), official), told(Assume(bits=8), rules)
    assert ops < plain[0]
    assert len(notes) == 1
    assert "as you state" in notes[0]


def test_additions_below_zero_are_kept_and_named():
    net = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    result = score(net, input_size=(8, 8, 8), assume=Assume(sparsity=0.95))
    assert result.adds == pytest.approx((9 * 0.05 - 1) * 8 * 36)
    assert result.adds < 0
    assert any("below zero" in note for note in result.tally.notes)
    assert result.to_json()["options"]["assumed"] == {"sparsity": 0.95}


def test_choices_within_the_official_rules_are_counted_and_named():
    net = nn.Sequential(nn.MaxPool2d(3, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    plain = score(net, input_size=(4, 9, 9))
    pooled = score(net, input_size=(4, 9, 9), rules=replace(official, max_pool=True))
    assert pooled.mults - plain.mults == 8 * 4 * 16
    free = score(net, input_size=(4, 9, 9), rules=replace(official, free_batch_norm=True))
    assert (plain.mults - free.mults, plain.adds - free.adds) == (64, 64)
    assert plain.params - free.params == 8
    assert plain.storage - free.storage == 8 / 2
    assert ["not counted" in note for note in plain.tally.notes].count(True) == 1
    assert any("max pooling is counted" in note for note in pooled.tally.notes)
    assert any("1 BatchNorm" in note and "cost nothing" in note for note in free.tally.notes)


def test_the_courses_formula():
    for case in vectors("imt_formula_cases")["cases"]:
        line = Line(name="a", op="conv2d", module="", in_shape=(), out_shape=(), macs=case["f"])
        rules = {8.3e8: imt, 2.8e8: imt_small}[case["ref_f"]]
        options = {key: case[key] for key in ("ps", "pu", "qw", "qa")}
        result = tally("net", Ledger(lines=(line,), arrays=(), params=case["w"]), replace(rules, **options))
        assert result.score == pytest.approx(case["score"], rel=1e-12)
        assert any("twice" in note for note in result.tally.notes) == bool(case["ps"])


def test_the_course_reads_what_is_not_given_from_the_model():
    net, masks = net_and_masks(0.25)
    result = score(net, input_size=(4, 8, 8), rules=imt, masks=masks)
    zeros = 288 - int(masks["0.weight"].sum())
    pu = zeros / (288 + 8 * 36 * 5)
    assert result.score_params == pytest.approx((1 - pu) * sum(p.numel() for p in net.parameters()) / 5.6e6)
    told = score(net, input_size=(4, 8, 8), rules=replace(imt, pu=0.0), masks=masks)
    assert told.score_params > result.score_params
    with pytest.raises(MicronetError, match=r"ps \+ pu"):
        score(net, input_size=(4, 8, 8), rules=replace(imt, ps=0.7, pu=0.5))


def test_the_gate_is_a_count():
    assert "this network tells 2 classes apart" in score(nn.Linear(4, 2), input_size=(4,)).verdict
    result = score(nn.Linear(4, 100), input_size=(4,))
    assert result.verdict.startswith("not qualified: accuracy unknown")
    assert "--data" not in score(nn.Linear(4, 1000), input_size=(4,), rules=official_imagenet).verdict
    for correct, said in ((8_000, ": qualifies"), (7_999, "does not qualify")):
        told = replace(result, accuracy=Accuracy(data="cifar100 test", correct=correct, images=10_000)).verdict
        assert f"{correct:,} of 10,000 correct" in told
        assert said in told
    for accuracy in (
        Accuracy(data="cifar10 test", correct=9_900, images=10_000),  # another data set
        Accuracy(data="cifar100 test", correct=90, images=100),  # a part of it
    ):
        assert "not qualified, the rules ask for 8,000" in replace(result, accuracy=accuracy).verdict
    assert (imt.gate.data, imt.gate.correct) == ("cifar10", 9_000)
    assert official_imagenet.gate.correct / official_imagenet.gate.images == 0.75


def test_rules_are_found_by_name_and_say_where_they_come_from():
    assert {"official", "official-imagenet", "seed", "imt"} <= set(RULES)
    assert all(rules.source and rules.params_norm > 0 and rules.ops_norm > 0 for rules in RULES.values())
    assert (official_imagenet.params_norm, official_imagenet.ops_norm) == (6.9e6, 1.17e9)


@pytest.mark.parametrize("wrong", [{"bits": 0}, {"bits": 33}, {"acc": 0}, {"sparsity": 1.0}, {"sparsity": -0.1}])
def test_impossible_assumptions_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Assume(**wrong)


def test_rules_without_widths_assume_nothing():
    with pytest.raises(MicronetError, match="nothing to assume"):
        score(nn.Linear(4, 2), input_size=(4,), rules=seed, assume=Assume(bits=8))
