"""What is found once about parameters: where they lie, which of them share memory, how many numbers they have."""

from __future__ import annotations

import torch
from torch import nn

from hf_sam.update.reductions import Reductions
from hf_sam.update.space import Space, alias_groups


def test_tensors_that_share_memory_take_turns_and_others_do_not():
    flat = torch.zeros(20)
    whole, view, left, right, alone = (
        flat[:6].view(2, 3),
        flat[:6].view(2, 3).t(),
        flat[4:10],
        flat[10:],
        torch.zeros(2),
    )
    assert alias_groups([alone, left, right]) == [0, 0, 0]
    found = alias_groups([whole, view, left, right, alone, torch.zeros(0)])
    assert len({found[0], found[1], found[2]}) == 3
    assert found[3:] == [0, 0, 0]


def test_weights_that_were_given_other_memory_are_noticed():
    p, q = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    layout = Space().layout([p, q])
    assert layout.weights[0].data_ptr() == p.data_ptr()
    assert layout.weights is layout.weights
    assert layout.alias_groups == [0, 0]
    p.data = q.data
    assert layout.weights[0].data_ptr() == q.data_ptr()
    assert sorted(layout.alias_groups) == [0, 1]
    assert not layout.weights[0].requires_grad


def test_reductions_are_made_once_for_a_list_of_parameters_and_anew_when_others_train():
    made = []

    def reductions(parameters):
        made.append(len(parameters))
        return Reductions()

    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    space = Space(reductions, parameters)
    for _ in range(3):
        space.layout(list(parameters))
        space.layout(parameters[:1])
    assert made == [2, 1]
    space.changed(parameters)
    space.layout(parameters)
    assert made == [2, 1, 2]


def test_lists_that_come_and_go_are_forgotten():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(40)]
    space = Space()
    first = space.layout(parameters)
    for i in range(40):
        space.layout(parameters[i:])
        assert space.layout(parameters) is first, "what is asked for all the time stays"
    assert len(space._layouts) < 20
