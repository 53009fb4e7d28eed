"""Structured pruning of convolutional picture towers, and their batch norms' statistics anew.

Channels that depend on each other (through residual sums, depthwise convolutions, squeeze-and-excitation) leave
together; torch-pruning finds such groups by tracing the network (DepGraph; Fang et al., 2023). Each group keeps the
same share of its channels, those that matter most:

* ``magnitude``: the mean over the group's layers of ||w_c||^2, the squared norm of channel c's weights (Li et al.,
  2017, over groups as in DepGraph). It needs no pictures. A configuration's ``activation`` means this one here: a
  batch norm fixes the spread of a channel before its scale and shift, so that its weights tell its activations.
* ``taylor``: the mean over the group's layers of |w_c * de/dw_c|, how far the embedding e would move without the
  channel, to the first order (Molchanov et al., 2019). The embedding stands in the place of a loss, which is at its
  least where the network is its own teacher; random signs r with E_r (d(r.e)/dw)^2 = ||de/dw||^2 (Hutchinson, 1989)
  make one number of it.

The means and variances of the batch norms behind a pruned layer are no longer those of what arrives there; they are
counted again on calibration pictures, without learning (Li et al., 2020, EagleEye).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipdistill.core.errors import ConfigError, DataError, MissingExtraError
from clipdistill.towers.pruned import reshape, shapes_of
from clipdistill.towers.student import seeded

Importance = Literal["magnitude", "taylor"]

_BATCH = 32
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_LAYERS = (nn.Conv2d, nn.Linear, _BATCH_NORM)
_TRACING_FAULTS = (ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError)


def pruning_faults(visual: nn.Module) -> Iterator[str]:
    """Why a picture tower cannot be pruned, one reason a sentence; looks at its layers alone.

    Args:
        visual: The ``visual`` of an open_clip model, or the timm network inside; may lie on the meta device.
    """
    layers = list(visual.named_modules())
    odd = [f"{name} ({type(part).__name__})" for name, part in layers if _has_weights(part)]
    if odd:
        yield f"only convolutions, batch norms and linear layers can be, and it has others, such as {odd[0]}"
    elif not any(isinstance(part, _BATCH_NORM) for _, part in layers):
        yield "it has no batch norms, so it is not a convolutional network of the kind that can be"
    grouped = [
        name for name, part in layers if isinstance(part, nn.Conv2d) and part.groups not in (1, part.in_channels)
    ]
    if grouped:
        yield f"its convolution {grouped[0]} has groups of several channels"


def prune_channels(
    visual: nn.Module,
    share: float,
    pixels: Tensor,
    *,
    importance: Importance = "magnitude",
    seed: int = 0,
    section: str = "student.prune",
) -> None:
    """Prune a convolutional picture tower to a share of its channels and count its batch norms' statistics anew.

    The outputs of the last layer, the embedding, all stay. Every group of channels keeps
    max(1, round(share * channels)). A share of 1 changes nothing.

    Args:
        visual: The ``visual`` of an open_clip model with a timm network inside, changed in place.
        share: The share of channels that stays, above 0 and up to 1.
        pixels: Calibration pictures, float32 [pictures, 3, height, width], as the tower takes them; at least 2.
        importance: By what the channels are chosen.
        seed: Decides ``taylor``'s random signs.
        section: Where the configuration asks for it, for messages.

    Raises:
        ConfigError: If the share is out of range, or the tower is of a kind that cannot be pruned.
        DataError: If there are fewer than 2 pictures.
        MissingExtraError: If torch-pruning is not installed.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"{section}: must be a share above 0 and up to 1, got {share}")
    faults = list(pruning_faults(visual))
    if faults:
        raise ConfigError(f"{section}: this picture tower cannot be pruned: {'; '.join(faults)}")
    if share == 1:
        return
    _check_pictures(pixels)
    library, whole = torch_pruning(), deepcopy(visual)
    with _still(visual):
        try:
            _prune(library, visual, share, pixels, importance, seed)
            reshape(whole, shapes_of(visual))
            whole.load_state_dict(visual.state_dict())
            same = torch.equal(_embedded(whole, pixels[:2]), _embedded(visual, pixels[:2]))
        except _TRACING_FAULTS as fault:
            reason = " ".join(str(fault).split())[:200] or type(fault).__name__
            raise ConfigError(f"{section}: this picture tower cannot be pruned: {reason}") from fault
    if not same:
        raise ConfigError(
            f"{section}: this picture tower cannot be pruned: rebuilt from its weights it embeds differently"
        )
    reestimate(visual, pixels)


def reestimate(module: nn.Module, pixels: Tensor, batch: int = 64) -> None:
    """Count the statistics of a network's batch norms anew: the mean over batches of each batch's own.

    Nothing is learnt, and dropout and the like stay off. Batches are as equal as can be.

    Args:
        module: The network, changed in place; each part's mode is as before afterwards.
        pixels: Calibration pictures, float32 [pictures, 3, height, width]; at least 2.
        batch: How many go through at once, at most; below 3 it is 3, so that none is left alone.

    Raises:
        DataError: If there are fewer than 2 pictures.
    """
    _check_pictures(pixels)
    with _still(module), torch.no_grad():
        norms = [part for part in module.modules() if isinstance(part, _BATCH_NORM) and part.track_running_stats]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the cumulative mean
        device = next(module.parameters()).device
        for rows in pixels.tensor_split(max(1, -(-len(pixels) // max(batch, 3)))):
            module(rows.to(device))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def torch_pruning() -> Any:
    """The torch-pruning library.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import torch_pruning as library
    except ModuleNotFoundError as missing:
        raise MissingExtraError("torch-pruning", "prune") from missing
    return library


def _prune(library: Any, visual: nn.Module, share: float, pixels: Tensor, importance: Importance, seed: int) -> None:
    """Prune in place; all groups are weighed before the first one is pruned, so that their order does not matter."""
    last = _last_layer(visual, pixels[:1])
    if importance == "taylor":
        _add_gradients(visual, pixels, seed)
    weigh = (
        library.importance.GroupTaylorImportance()
        if importance == "taylor"
        else library.importance.GroupMagnitudeImportance()
    )
    with torch.enable_grad():
        graph = library.DependencyGraph().build_dependency(visual, example_inputs=pixels[:1])
    roots = []
    for group in graph.get_all_groups(ignored_layers=[last], root_module_types=[nn.Conv2d, nn.Linear]):
        scores = weigh(group)
        out = max(1, round(share * len(scores)))
        gone = scores.argsort(descending=True, stable=True)[out:].sort().values.tolist()
        roots.append((group[0].dep.target.module, group[0].dep.handler, gone))
    for parameter in visual.parameters():
        parameter.grad = None
    for module, handler, gone in roots:
        if gone:
            graph.get_pruning_group(module, handler, gone).prune()


def _last_layer(visual: nn.Module, pixels: Tensor) -> nn.Module:
    """The layer whose outputs are the embedding: the convolution or linear layer that runs last."""
    ran: list[nn.Module] = []
    hooks = [
        part.register_forward_hook(lambda part, *_: ran.append(part))
        for part in visual.modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
    ]
    _embedded(visual, pixels)
    for hook in hooks:
        hook.remove()
    return ran[-1]


def _add_gradients(visual: nn.Module, pixels: Tensor, seed: int) -> None:
    """Leave the gradients of the pictures' unit embeddings under random signs in ``grad``, summed over all pictures."""
    generator = torch.Generator().manual_seed(seed)
    for rows in pixels.tensor_split(-(-len(pixels) // _BATCH)):
        with torch.enable_grad():
            embedded = F.normalize(visual(rows), dim=-1)
            signs = torch.randint(0, 2, embedded.shape, generator=generator).to(embedded) * 2 - 1
            torch.autograd.backward((embedded * signs).sum())


def _embedded(visual: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = visual(pixels)
    return found


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """A block with every part in eval mode and a seed of its own; each part's mode is put back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with seeded(0):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _check_pictures(pixels: Tensor) -> None:
    if len(pixels) < 2:
        raise DataError(
            f"student.prune: {len(pixels)} calibration pictures, where batch norms need 2 or more; "
            "add pictures to data.train or data.images, or raise student.inherit.calibration"
        )


def _has_weights(part: nn.Module) -> bool:
    """Whether a part that is no known layer has weights of its own."""
    return not isinstance(part, _LAYERS) and bool([*part.parameters(recurse=False)])
