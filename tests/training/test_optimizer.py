from __future__ import annotations

import pytest
import torch
from torch import nn
from training import little

from clipdistill.core.errors import ConfigError
from clipdistill.training.optimizer import (
    align_gradients,
    build_optimizer,
    frozen,
    part_of,
    set_rates,
    trained_parameters,
)


def test_every_parameter_is_in_one_group_with_its_towers_rate_and_its_decay():
    student, objective = little.student("test_vit"), little.objective()
    parameters = trained_parameters(student.module, objective)
    train = little.settings(lr=1e-1, lr_image=1e-2, lr_text=1e-3, weight_decay=0.3)
    optimizer = build_optimizer(parameters, train)
    groups = {id(value): group for group in optimizer.param_groups for value in group["params"]}
    assert len(groups) == len(parameters) == sum(len(group["params"]) for group in optimizer.param_groups)
    rates = {"visual": 1e-2, "text": 1e-3}
    for name, value in student.model.named_parameters():
        if name.startswith("logit_"):
            assert id(value) not in groups  # set from the objective's
            continue
        assert groups[id(value)]["lr"] == rates[name.split(".")[0]], name
    for name, value in objective.named_parameters():
        assert (id(value) in groups) == value.requires_grad
        if value.requires_grad:
            assert (groups[id(value)]["lr"], groups[id(value)]["weight_decay"]) == (1e-1, 0.0), name
    decayed = {name for name, value in parameters.items() if groups[id(value)]["weight_decay"] == 0.3}
    assert all(parameters[name].ndim >= 2 for name in decayed)
    undecayed = {name for name, value in parameters.items() if value.ndim >= 2} - decayed
    assert undecayed == {
        "student.model.visual.trunk.cls_token",
        "student.model.visual.trunk.pos_embed",
        "student.model.text.positional_embedding",
    }


def test_projections_belong_to_their_towers():
    names = trained_parameters(little.student(dim=8).module, little.objective())
    assert part_of("student.projection.image.weight") == "image"
    assert part_of("student.model.visual.trunk.classifier.weight") == "head"
    assert part_of("student.model.visual.trunk.head.fc.weight") == "head"
    assert part_of("student.model.visual.head.proj.weight") == "head"
    assert part_of("student.model.visual.proj") == "head"
    assert part_of("student.model.visual.trunk.conv_head.weight") == "image"
    assert part_of("student.projection.text.weight") == "text"
    assert {"student.projection.image.weight", "student.projection.text.weight"} < set(names)


def test_rates_are_shares_of_the_groups_own():
    student = little.student()
    optimizer = build_optimizer(
        trained_parameters(student.module, little.objective()), little.settings(lr=0.5, lr_text=2)
    )
    for share in (0.5, 0.25):
        set_rates(optimizer, share)
        assert {group["lr"] for group in optimizer.param_groups} == {0.5 * share, 2 * share}


def test_a_step_is_adamws_by_the_formula_in_any_memory_order():
    # Loshchilov & Hutter's update, written out, against the fused kernel; gradients come in the other memory order.
    torch.manual_seed(0)
    start = torch.randn(4, 3, 2, 2)
    value = nn.Parameter(start.clone().to(memory_format=torch.channels_last))
    train = little.settings(lr=0.1, weight_decay=0.2, betas=(0.9, 0.98))
    optimizer = build_optimizer({"objective.conv": value}, train)
    first = second = torch.zeros_like(start)
    want = start.clone()
    for step in range(1, 4):
        gradient = torch.randn(4, 3, 2, 2)
        value.grad = gradient.clone()
        align_gradients([value])
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.98 * second + 0.02 * gradient**2
        want = want * (1 - 0.1 * 0.2)
        want = want - 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.98**step)).sqrt() + 1e-8)
        torch.testing.assert_close(value.detach(), want, atol=1e-6, rtol=1e-5)


def test_frozen_parameters_are_not_trained_and_come_back():
    student = little.student()
    with frozen(student.model, ("visual.trunk.blocks.0", "text.token_embedding")) as norms:
        names = trained_parameters(student.module, little.objective())
        assert not any("trunk.blocks.0." in name or "token_embedding" in name for name in names)
        assert any("trunk.blocks.1." in name for name in names)
        inside = [part for part in student.model.visual.trunk.blocks[0].modules() if hasattr(part, "running_mean")]
        assert set(norms) == set(inside) != set()
    assert all(value.requires_grad for value in student.model.parameters())


def test_a_batch_norm_is_frozen_only_with_all_its_parameters():
    student = little.student()
    with frozen(student.model, ("visual.trunk.bn1.weight",)) as norms:
        assert norms == []
    with frozen(student.model, ("visual.trunk.bn1",)) as norms:
        assert norms == [student.model.visual.trunk.bn1]
    with frozen(student.model, ("visual.trunk.bn1.weight", "visual.trunk.bn1.bias")) as norms:
        assert norms == [student.model.visual.trunk.bn1]


def test_a_batch_norm_without_parameters_is_frozen_by_its_own_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    with frozen(nn.ModuleDict({"trunk": model}), ("trunk",)) as norms:
        assert norms == [model[1]]
    with frozen(nn.ModuleDict({"trunk": model}), ("trunk.0",)) as norms:
        assert norms == []


def test_all_unknown_names_are_reported_at_once():
    with pytest.raises(ConfigError) as caught, frozen(little.student().model, ("visul", "text.transformer", "txt.")):
        pass
    assert len(caught.value.faults) == 2
    assert "did you mean 'visual'" in caught.value.faults[0]
