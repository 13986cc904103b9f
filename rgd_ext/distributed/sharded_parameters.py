"""The parameters of a model that `fully_shard` has sharded over the processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..contributions.ledger import Contributions
from .agreement import checksum, first_other
from .buckets import Layout
from .group import Group
from .parameters import Comparison, ModelParameters
from .sharded_layout import ShardedLayout, shard_dim

_TENSOR_PARALLEL = (
    "parameter '{}' is distributed in a way that a captured model cannot follow ({}): shards have to be those of"
    " torch.distributed.fsdp.fully_shard, without tensor, sequence, context or expert parallelism. Build the model"
    " without these, and call fully_shard alone"
)
_ELSEWHERE = (
    "parameter '{}' is distributed (placements {}), and not by fully_shard of a module that is captured: capture the"
    " model that was passed to fully_shard, or pass the part that is captured to it, too. Tensor, sequence, context and"
    " expert parallelism are not supported"
)
_OTHER_MESH = (
    "parameter '{}' is on a mesh of the processes {}, and process_group has the processes {}: pass a group of all"
    " processes that have shards or replicas of the model, such as torch.distributed.group.WORLD"
)
_OFFLOADED = (
    "parameter '{}' is kept on {} and used on {}, as by CPUOffloadPolicy, which a captured model cannot follow: call"
    " fully_shard without an offload_policy"
)
_SHARDED_ANEW = (
    "parameter '{}' is {}, unlike at the capture: shard the model before you capture it, and do not capture it right"
    " after a forward that failed, which leaves parameters whole. Nothing was written to .grad; call .remove() on the"
    " handle, and capture the model again"
)


class _Place(NamedTuple):
    """Where the model has a parameter.

    Attributes:
        module, key: the module that owns it, and its name there.
        block: the number of the module that shards it, among those that were passed to `fully_shard`; -1 for none.
    """

    module: nn.Module
    key: str
    block: int

    @property
    def parameter(self) -> nn.Parameter:
        """The one that is there now."""
        return cast("nn.Parameter", self.module._parameters[self.key])


class ShardedParameters(ModelParameters):
    """The parameters of a model of which each process has shards; some may be whole in each.

    While a module runs, it has whole parameters in the place of its shards. FSDP makes them once; afterwards it frees
    their storage, but not themselves. Layers use these, and optimizers step the shards, which have `.grad`.

    Args:
        model: the model, the same in all processes; not in the midst of a step.
        group: all processes that have shards or replicas of it.

    Raises:
        ValueError: for parameters that are distributed otherwise.
        RuntimeError: if replicas differ after the broadcast, or a process does not take part.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        super().__init__(model)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._reshard()
        self._places = dict(_places(model, self._modules))
        self._aliases = super().aliases()
        # As it was when it was last seen, since modules that run have whole ones in its place.
        self._stepped = {name: place.parameter for name, place in self._places.items()}
        self._shardings = {_sharding(p) for p in self._stepped.values()}
        for name, place in self._places.items():
            _check_placed(name, place, group)
        self._replica_groups = {
            name: _groups_of_replicas(p, group) for name, p in self._stepped.items() if _has_replicas(p)
        }
        self._share_replicas(group)
        self._versions = {name: _version(p) for name, p in self._stepped.items()}
        self._whole = self._find_whole()
        self._names = {p: name for name, p in self._whole.items()}

    @property
    def is_sharded(self) -> bool:
        return True

    def used(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, self._whole.get(name, place.parameter)) for name, place in self._places.items()]

    def stepped(self) -> list[tuple[str, nn.Parameter]]:
        for name, place in self._places.items():
            found = place.parameter
            if found is not self._stepped[name] and _sharding(found) == _sharding(self._stepped[name]):
                self._stepped[name], self._versions[name] = found, _version(found)
        return [*self._stepped.items()]

    def stepped_of(self, used: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        stepped = dict(self.stepped())
        return [stepped[self._names[p]] if p in self._names else p for p in used]

    def is_temporary(self, parameter: nn.Parameter) -> bool:
        # With `reshard_after_forward` a number, a module has shards of other sizes between forward and backward.
        return isinstance(parameter, DTensor) and _sharding(parameter) not in self._shardings

    def aliases(self) -> dict[str, str]:
        return self._aliases

    def compared(self, name: str, parameter: nn.Parameter) -> Comparison:
        if not isinstance(parameter, DTensor):
            return super().compared(name, parameter)
        if name in self._replica_groups:
            value = f"the value of parameter '{name}'"
            return Comparison(value, lambda: checksum(parameter.to_local()), self._replica_groups[name])
        # No process has what another one has of it.
        changes = f"the number of changes (steps of optimizers, loaded values) of parameter '{name}' since the capture"
        return Comparison(changes, lambda: _version(parameter) - self._versions[name])

    def restore_stepped(self) -> None:
        self._reshard()
        for name, place in self._places.items():
            sharding = _sharding(place.parameter)
            if sharding != _sharding(self._stepped[name]):
                raise RuntimeError(_SHARDED_ANEW.format(name, "whole" if sharding is None else "sharded"))

    def split(self, contributions: Contributions, layouts: Sequence[Layout]) -> list[Contributions]:
        return contributions.split([layout.parameters for layout in layouts])

    def _blocks(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[Layout]:
        """The parameters of each module that was passed to `fully_shard`; those that are not sharded by themselves."""
        stepped = dict(self.stepped())
        groups: dict[object, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named:
            shard, block = stepped[name], self._places[name].block
            kind = (block, shard.device_mesh, shard_dim(shard.placements)) if isinstance(shard, DTensor) else None
            groups.setdefault(kind, []).append((name, parameter))
        return [
            Layout(group) if kind is None else ShardedLayout(group, self._shards_of) for kind, group in groups.items()
        ]

    def _shards_of(self, used: Iterable[nn.Parameter]) -> list[DTensor]:
        return cast("list[DTensor]", self.stepped_of(used))

    def _reshard(self) -> None:
        for module in self._modules:
            module.reshard()

    def _find_whole(self) -> dict[str, nn.Parameter]:
        """What layers use in the place of shards. No more than the parameters of one module are whole at a time."""
        found: dict[str, nn.Parameter] = {}
        for block, module in enumerate(self._modules):
            module.unshard()
            try:
                for name, place in self._places.items():
                    if place.block == block and isinstance(self._stepped[name], DTensor):
                        _check_whole(name, place.parameter, self._stepped[name])
                        found[name] = place.parameter
            finally:
                module.reshard()
        return found

    def _share_replicas(self, group: Group) -> None:
        """Give all replicas of a shard the values of the first one."""
        sums: dict[str, int] = {}
        for name in self._replica_groups:
            shard = cast("DTensor", self._stepped[name])
            replicas = shard.device_mesh.get_group(shard.placements.index(Replicate()))
            local = shard.to_local().detach()
            with group.named("the parameters of the first replica"):
                distributed.broadcast(local, distributed.get_global_rank(replicas, 0), group=replicas)
            sums[name] = checksum(local)
        found = group.all_gather_objects("checksums of the replicas", sums) if sums else []
        for name, kinds in self._replica_groups.items():
            other = first_other([each[name] for each in found], kinds)
            if other is not None:
                raise RuntimeError(f"'{name}' differs between ranks {other[0]} and {other[1]} after a broadcast")


def _has_replicas(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and Replicate() in parameter.placements


def _version(parameter: nn.Parameter) -> int:
    """How often a parameter, or this process's shard of it, was changed in place."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return parameter._version + local._version  # operations of DTensors count those of the DTensor


def _sharding(parameter: nn.Parameter) -> object:
    """The mesh and the placements of a parameter; None for one that is whole."""
    return (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None


def _groups_of_replicas(parameter: nn.Parameter, group: Group) -> tuple[int, ...]:
    """The number of the shard that each rank of the group has."""
    shard = cast("DTensor", parameter)
    mesh_dim = shard_dim(shard.placements)
    ranks = distributed.get_process_group_ranks(group.process_group)
    if mesh_dim is None:
        return (0,) * len(ranks)
    return tuple(int((shard.device_mesh.mesh == rank).nonzero()[0, mesh_dim]) for rank in ranks)


def _places(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[tuple[str, _Place]]:
    """The first place of each parameter, by its name, as the model lists them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    numbers = {module: number for number, module in enumerate(modules)}
    pending, seen = [(model, -1)], set()
    while pending:
        module, outer = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        block = numbers.get(module, outer)
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in names:
                yield names.pop(parameter), _Place(module, key, block)
        pending += [(child, block) for child in reversed([*module.children()])]


def _check_placed(name: str, place: _Place, group: Group) -> None:
    """Raise ValueError unless a parameter is sharded by `fully_shard` over the group, replicated, or whole."""
    shard = place.parameter
    if not isinstance(shard, DTensor):
        return
    kinds = [type(placement) for placement in shard.placements]
    if place.block == -1:
        raise ValueError(_ELSEWHERE.format(name, tuple(shard.placements)))
    if kinds not in ([Shard], [Replicate], [Replicate, Shard]):
        raise ValueError(_TENSOR_PARALLEL.format(name, f"placements {tuple(shard.placements)}"))
    meshed = sorted(shard.device_mesh.mesh.flatten().tolist())
    own = sorted(distributed.get_process_group_ranks(group.process_group))
    if meshed != own:
        raise ValueError(_OTHER_MESH.format(name, meshed, own))


def _check_whole(name: str, whole: nn.Parameter, shard: nn.Parameter) -> None:
    """Raise ValueError unless a layer uses a whole parameter on the device of its shard."""
    if isinstance(whole, DTensor):
        raise ValueError(_TENSOR_PARALLEL.format(name, "it is a DTensor in the forward"))
    device = cast("DTensor", shard).to_local().device
    if whole.device != device:
        raise ValueError(_OFFLOADED.format(name, device, whole.device))
