"""Channel widths: read, set, and taken away together with what the optimizer and other callbacks keep."""

import pytest
import torch
from torch import nn

from callbacks.widths import narrow, narrower, set_widths, shapes_at, take, widths
from micronet.models import resnet20


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False))


def keep(model: nn.Module, channels: list[int]) -> tuple[dict, dict]:
    """Which elements stay, and the new widths, where the first layer keeps some of its channels."""
    chosen, places = torch.tensor(channels), {}
    for name, value in model.state_dict().items():
        if value.dim():
            axis = 1 if name == "3.weight" else 0
            places[name] = torch.arange(value.numel()).reshape(value.shape).index_select(axis, chosen)
    count = len(channels)
    table = {
        "0": {"in_channels": 3, "out_channels": count, "groups": 1},
        "1": {"num_features": count},
        "3": {"in_channels": count, "out_channels": 4, "groups": 1},
    }
    return places, table


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=["momentum", "adam"])
def test_narrowing_takes_the_optimizers_state_along_by_the_same_channels(make):
    model = two_layers()
    opt = make(model.parameters(), lr=0.1, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    x = torch.randn(2, 3, 5, 5)
    model(x).square().sum().backward()
    opt.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    keys = ("momentum_buffer",) if make is torch.optim.SGD else ("exp_avg", "exp_avg_sq")
    state = {name: {key: opt.state[p][key].clone() for key in keys} for name, p in model.named_parameters()}
    objects = list(model.parameters())

    narrow(model, *keep(model, [0, 2, 5]), opt=opt)

    assert all(now is then for now, then in zip(model.parameters(), objects, strict=True))
    assert model[0].weight.shape == (3, 3, 3, 3)
    assert model[1].running_var.shape == (3,)
    torch.testing.assert_close(model[0].weight.detach(), before["0.weight"][[0, 2, 5]], rtol=0, atol=0)
    torch.testing.assert_close(model[3].weight.detach(), before["3.weight"][:, [0, 2, 5]], rtol=0, atol=0)
    for key in keys:
        assert torch.equal(opt.state[model[0].weight][key], state["0.weight"][key][[0, 2, 5]])
        assert torch.equal(opt.state[model[3].weight][key], state["3.weight"][key][:, [0, 2, 5]])
    # Every parameter still trains.
    then = [p.detach().clone() for p in model.parameters()]
    opt.zero_grad()
    model(x).square().sum().backward()
    opt.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), then, strict=True))


def test_narrowing_a_layer_that_feeds_nothing_else_keeps_the_others_answers():
    model, x = two_layers().eval(), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        model[3].weight[:, [1, 3, 4]] = 0  # what these channels carry counts for nothing
        whole = model(x)
        narrow(model, *keep(model, [0, 2, 5]))
        torch.testing.assert_close(model(x), whole)


def test_channels_last_stays_channels_last():
    model = two_layers().to(memory_format=torch.channels_last)
    narrow(model, *keep(model, [0, 2, 5]))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()


def test_what_does_not_fit_together_is_refused_and_nothing_changes():
    model = two_layers()
    places, table = keep(model, [0, 2, 5])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = [
        (places | {"0.weight": places["0.weight"][:2]}, table, "is kept of a layer whose widths"),
        ({k: v for k, v in places.items() if k != "3.weight"}, table, "3.weight: it is not said"),
        (places, {k: v for k, v in table.items() if k != "1"}, "BatchNorm2d can't be resized"),
        (places, table | {"2": {"num_features": 3}}, "there is no layer '2'"),
        (places, table | {"1": {"num_features": 0}}, "whole numbers from 1"),
    ]
    for kept, widths_, message in wrong:
        with pytest.raises(ValueError, match=message):
            narrow(model, kept, widths_)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_layer_with_tensors_of_its_own_is_refused():
    class Scaled(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.gain = nn.Parameter(torch.ones(self.out_channels))

    model = nn.Sequential(Scaled(3, 4, 1))
    with pytest.raises(ValueError, match="a Scaled with a tensor 'gain'"):
        shapes_at(model, {"0": {"in_channels": 3, "out_channels": 2, "groups": 1}})


def test_a_table_makes_the_same_network_as_narrow_again():
    model = two_layers()
    narrow(model, *keep(model, [1, 4]))
    again = two_layers()
    set_widths(again, narrower(model, widths(again)))
    assert widths(again) == widths(model)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_transposed_and_grouped_layers_have_their_own_shapes():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(6, 6, 3, groups=6))
    shapes = shapes_at(
        model,
        {
            "0": {"in_channels": 4, "out_channels": 3, "groups": 1},
            "1": {"in_channels": 3, "out_channels": 3, "groups": 3},
        },
    )
    assert shapes == {"0.weight": (4, 3, 2, 2), "0.bias": (3,), "1.weight": (3, 1, 3, 3), "1.bias": (3,)}


def test_widths_of_a_whole_network():
    table = widths(resnet20(num_classes=10))
    assert table["conv1"] == {"in_channels": 3, "out_channels": 16, "groups": 1}
    assert narrower(resnet20(num_classes=10), table) == {}
    assert set(narrower(resnet20(num_classes=3), table)) == {"fc"}


def test_take_gives_the_elements_at_their_places():
    assert take(torch.arange(6.0).reshape(2, 3), torch.tensor([[5, 0]])).tolist() == [[5.0, 0.0]]
